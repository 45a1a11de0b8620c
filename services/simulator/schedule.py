"""When a tick is due: at every multiple of the interval since the Unix epoch, by the machine's clock.

What must stay true: a tick's time is computed from its number and never from the tick before, so nothing drifts, and
two simulators (or one before and after a restart) tick at the same moments. A tick that is noticed late is still given
out, in order; only what lies further back than ``most_late`` is skipped, and counted.
"""

from dataclasses import dataclass

from runtime.clock import Clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A tick whose time has come.

    Attributes:
        tick: its number: milliseconds since the epoch divided by the interval.
        time_ms: its time, milliseconds since the Unix epoch.
        skipped: ticks between the one before and this one that are given up.
    """

    tick: int
    time_ms: int
    skipped: int


class Schedule:
    """Gives out ticks as they come due, starting with the next one."""

    def __init__(self, clock: Clock, *, interval_ms: int, most_late: int) -> None:
        """Begins a schedule.

        Args:
            clock: the time.
            interval_ms: distance of two ticks, milliseconds.
            most_late: how many ticks back one may still be given out; 0 means only the latest.
        """
        assert interval_ms > 0
        self._clock = clock
        self._interval_ms = interval_ms
        self._most_late = most_late
        self._next = clock.now_ms() // interval_ms + 1

    async def next(self) -> Due:
        """Waits until the next tick is due and returns it."""
        while (wait_ms := self._next * self._interval_ms - self._clock.now_ms()) > 0:
            if wait_ms > 2 * self._interval_ms:  # the clock was set back: go on from there, without a long silence
                self._next = self._clock.now_ms() // self._interval_ms + 1
                continue
            await self._clock.sleep_until(self._clock.monotonic() + wait_ms / 1000.0)
        latest = self._clock.now_ms() // self._interval_ms
        skipped = max(0, latest - self._most_late - self._next)
        tick = self._next + skipped
        self._next = tick + 1
        return Due(tick=tick, time_ms=tick * self._interval_ms, skipped=skipped)
