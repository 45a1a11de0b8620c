"""Who is let in when there are too many calls: each caller has a rate.

What must stay true: what is refused costs no look-up and no call of a store, and says when to try again; memory is
bounded; health checks and pages are left alone. How many wait at once is bounded by runtime.waiting.
"""

from collections import OrderedDict
from typing import Final

from runtime.clock import Clock
from runtime.errors import ResourceExhausted
from runtime.waiting import refused

BURST_S: Final = 2.0
"""A caller that was quiet may make the calls of so many seconds at once."""
MAX_CALLERS: Final = 10_000
RATE_LIMITED: Final = "RATE_LIMITED"


class Admission:
    """Asked before each call."""

    def __init__(self, clock: Clock, *, rate: float = 0.0) -> None:
        """`rate`: calls a second for each caller's address; 0: any."""
        self._clock = clock
        self._rate = rate
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller -> calls left, as of when

    @property
    def counts(self) -> bool:
        """Whether anybody can be refused."""
        return self._rate > 0

    def admit(self, address: str) -> None:
        """Lets a call in; raises ResourceExhausted, RATE_LIMITED, with the time after which to try again."""
        if self.counts:
            self._spend(address)

    def _spend(self, caller: str) -> None:
        now_s, most = self._clock.monotonic(), max(1.0, self._rate * BURST_S)
        left, at_s = self._buckets.get(caller, (most, now_s))
        left = min(most, left + (now_s - at_s) * self._rate)
        self._buckets[caller] = (left - 1 if left >= 1 else left, now_s)
        self._buckets.move_to_end(caller)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        if left < 1:
            refused.add(1, {"reason": RATE_LIMITED})
            raise ResourceExhausted(
                f"more than {self._rate:g} calls a second from {caller} (GATEWAY_RATE_LIMIT)",
                reason=RATE_LIMITED,
                retry_after_s=(1 - left) / self._rate,
                metadata={"limit": "GATEWAY_RATE_LIMIT"},
            )
