"""Who is let in when there are too many calls: a rate for each caller, and a share of all when the process is too slow.

A process that is asked more than it can answer gets slower for everybody, and callers who give up and try again make it
worse. So while its event loop runs late, and because of its own work, a growing share of new calls is refused at once
with RESOURCE_EXHAUSTED and the time after which to try again. A machine that is busy with something else is no reason:
then refusing would help nobody.

What must stay true: what is refused costs no look-up and no call of a store; memory is bounded; calls that run are left
alone, and so are health checks.
"""

import asyncio
import ipaddress
import random
import time
from collections import OrderedDict
from typing import Final

from runtime import telemetry
from runtime.clock import Clock
from runtime.errors import ResourceExhausted

BURST_S: Final = 2.0
"""A caller that was quiet may make the calls of so many seconds at once."""
MAX_CALLERS: Final = 10_000
TICK_S: Final = 0.1
LATE_S: Final = 0.25
"""Later than this, on average over a second, new calls would wait longer than they are worth."""
OWN_SHARE: Final = 0.7
"""Of a processor, that this process used itself: less, and others keep it from running."""
MAX_REFUSED_SHARE: Final = 0.9
MEMORY: Final = 0.9
"""Of each tick's averages over the last ones, about ten."""

_refused = telemetry.meter(__name__).create_counter(
    "openmanager.gateway.refused.calls", unit="{call}", description="Calls that were refused because of too many."
)


class Admission:
    """Asked before each call. `watch` runs beside it."""

    def __init__(self, clock: Clock, *, rate: float = 0.0, trusted_proxy: str | None = None) -> None:
        """Prepares.

        Args:
            clock: of the rates.
            rate: calls a second for each caller; 0: any.
            trusted_proxy: the network of proxies whose X-Forwarded-For is believed.
        """
        self._clock = clock
        self._rate = rate
        self._proxies = None if trusted_proxy is None else ipaddress.ip_network(trusted_proxy)
        self._rng = random.Random()  # noqa: S311  no secret
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # caller -> calls left, as of when
        self.refused_share = 0.0
        self._late_s = self._used = 0.0

    def admit(self, host: str, forwarded_for: str | None = None) -> None:
        """Lets a call in.

        Args:
            host: the address that it came from.
            forwarded_for: the X-Forwarded-For that came with it.

        Raises:
            ResourceExhausted: RATE_LIMITED or OVERLOADED, with the time after which to try again.
        """
        if self._rate:
            self._spend(self._caller(host, forwarded_for))
        if self.refused_share and self._rng.random() < self.refused_share:
            _refused.add(1, {"reason": "OVERLOADED"})
            raise ResourceExhausted(
                "more is asked than this gateway can answer in time; try again in a moment",
                reason="OVERLOADED",
                retry_after_s=0.5 + self._rng.random(),
            )

    def _caller(self, host: str, forwarded_for: str | None) -> str:
        if self._proxies is None or not forwarded_for:
            return host
        try:
            if ipaddress.ip_address(host) not in self._proxies:
                return host
            return str(ipaddress.ip_address(forwarded_for.rpartition(",")[2].strip()))
        except ValueError:
            return host

    def _spend(self, caller: str) -> None:
        now_s, most = self._clock.monotonic(), max(1.0, self._rate * BURST_S)
        left, at_s = self._buckets.get(caller, (most, now_s))
        left = min(most, left + (now_s - at_s) * self._rate)
        self._buckets[caller] = (left - 1 if left >= 1 else left, now_s)
        self._buckets.move_to_end(caller)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        if left < 1:
            _refused.add(1, {"reason": "RATE_LIMITED"})
            raise ResourceExhausted(
                f"more than {self._rate:g} calls a second from {caller} (GATEWAY_RATE_LIMIT)",
                reason="RATE_LIMITED",
                retry_after_s=(1 - left) / self._rate,
                metadata={"limit": "GATEWAY_RATE_LIMIT"},
            )

    async def watch(self) -> None:
        """Watches how late the event loop runs, until cancelled."""
        while True:
            began_s, used_s = time.monotonic(), time.process_time()
            await asyncio.sleep(TICK_S)
            took_s = time.monotonic() - began_s
            self.note(late_s=took_s - TICK_S, used=(time.process_time() - used_s) / took_s)

    def note(self, *, late_s: float, used: float) -> None:
        """Takes in how late a tick came, in seconds, and the share of a processor that this process used meanwhile."""
        self._late_s = MEMORY * self._late_s + (1 - MEMORY) * late_s
        self._used = MEMORY * self._used + (1 - MEMORY) * used
        if self._late_s > LATE_S and self._used > OWN_SHARE:
            self.refused_share = min(MAX_REFUSED_SHARE, self.refused_share + 0.05)
        else:
            self.refused_share = max(0.0, self.refused_share - 0.02)
