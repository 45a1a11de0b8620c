"""How many calls may wait for their answers: what sheds load before everybody waits longer than anybody will.

A call that is answered from memory never waits; one that needs a store does, until its answer begins. When a store is
slow such calls pile up, each as late as all before it together. So only so many of one service are taken in, and
more are refused at once, which costs next to nothing and leaves the others their time.

What must stay true: services do not share their places, so that a store that hangs stops the callers of no other;
watchers, who wait for news and for no store, take no place; a place is given back however the call ends.

How late the event loop runs was tried as the sign of overload before and is none: a closed loop of 50 callers was
refused that the process answers well. What gRPC itself has not handed over yet is bounded by gRPC
(runtime.limits.MAX_PENDING_CALLS).
"""

from collections.abc import Collection
from typing import Final

from runtime import telemetry
from runtime.errors import ResourceExhausted

RETRY_AFTER_S: Final = 1.0
REASON: Final = "OVERLOADED"

refused: Final = telemetry.meter(__name__).create_counter(
    "openmanager.refused.calls", unit="{call}", description="Calls that were refused because of too many, by reason."
)


class Waiting:
    """The places of a process; its transports share one."""

    def __init__(self, most: int, *, setting: str, watchers: Collection[str] = ()) -> None:
        """Takes `most`, the places of each service, and the name of the setting that says so.

        `watchers`: methods ("/pkg.Service/Method") whose stream has nothing to say for as long as nothing changes.
        """
        self._most = most
        self._setting = setting
        self._watchers = frozenset(watchers)
        self._now: dict[str, int] = {}

    def enter(self, method: str) -> str:
        """Takes a place for a call of "/pkg.Service/Method"; returns what `leave` wants, empty for a watcher.

        Raises:
            ResourceExhausted: OVERLOADED, with the time after which to try again.
        """
        if method in self._watchers:
            return ""
        service = method[1 : method.rindex("/")]
        now = self._now.get(service, 0)
        if now >= self._most:
            refused.add(1, {"reason": REASON})
            raise ResourceExhausted(
                f"{now} calls of {service} are waiting already ({self._setting})",
                reason=REASON,
                retry_after_s=RETRY_AFTER_S,
                metadata={"limit": self._setting},
            )
        self._now[service] = now + 1
        return service

    def leave(self, service: str) -> None:
        """Gives a place back."""
        self._now[service] -= 1
