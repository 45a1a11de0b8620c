"""A circuit breaker: what keeps callers from waiting, one after the other, for something that does not answer.

    closed      calls go through; `failures_to_open` in a row open it
    open        calls fail at once, until a pause is over that doubles with each failed trial
    half-open   one call goes through as a trial; its answer closes the circuit, its failure opens it again

A slow peer is treated as a dead one: what counts is that no answer came within the caller's own time-out. Any answer,
also "no", shows that the peer is there.

What must stay true: while it is open nobody waits and nothing is sent but one trial at a time; a caller that goes away,
or is in a hurry, proves nothing in either direction, nor does the end of a call from before it was opened: an answer
may have come before the outage, and was only looked at since; that the others who waited then failed, too, makes
neither the outage nor the pause any longer. Why it is ours: docs/adr/0004-circuit-breaker.md.
"""

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Final

from runtime import deadline
from runtime.clock import Clock
from runtime.errors import DeadlineExceeded, OpenManagerError, Unavailable
from runtime.tasks import Backoff

PAUSES: Final = Backoff(initial_s=0.5, max_s=10.0)
PATIENT_S: Final = 1.0
"""A caller who gives less time than this proves nothing by running out of it."""
FAILURES_TO_OPEN: Final = 2
"""One lost connection is no outage; with a second one every further caller would only wait as long."""


class CircuitState(Enum):
    """Whether calls go through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Circuit:
    """The breaker before one peer. Belongs to one event loop."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        *,
        rng: random.Random | None = None,
        pauses: Backoff = PAUSES,
        failures_to_open: int = FAILURES_TO_OPEN,
    ) -> None:
        """Closed at first.

        Args:
            name: the peer, as people call it: "Redis".
            clock: of the pauses.
            rng: jitter of the pauses, so that many callers do not return at once.
            pauses: how long it stays open after the n-th failure beyond the first that opened it.
            failures_to_open: failures in a row that open it.
        """
        self._name = name
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311  jitter, no secret
        self._pauses = pauses
        self._failures_to_open = failures_to_open
        self._failures = 0
        self._closed_again_at: float | None = None  # monotonic; None while closed
        self._trial_runs = False
        self._last_error = ""
        self._changed: Callable[[CircuitState], None] = lambda _state: None

    @property
    def state(self) -> CircuitState:
        """Now: an open circuit becomes half-open by time alone."""
        if self._closed_again_at is None:
            return CircuitState.CLOSED
        if self._trial_runs or self._clock.monotonic() >= self._closed_again_at:
            return CircuitState.HALF_OPEN
        return CircuitState.OPEN

    @property
    def last_error(self) -> str:
        """What the last failure said; empty while the circuit is closed."""
        return self._last_error

    def on_change(self, changed: Callable[[CircuitState], None]) -> None:
        """Has every opening and closing told to `changed`."""
        self._changed = changed

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """One call of the peer. Unavailable, DeadlineExceeded and TimeoutError are failures, all else is an answer.
        Running out of time is none where the call that we run for had less than PATIENT_S left.

        Raises:
            Unavailable: CIRCUIT_OPEN, at once, with the time until the next trial.
        """
        is_trial = self._enter()
        left_s = deadline.remaining_s()
        try:
            yield
        except (Unavailable, DeadlineExceeded, TimeoutError) as error:
            if left_s is not None and left_s < PATIENT_S and not isinstance(error, Unavailable):
                raise
            self._failed(str(error) or "no answer in time", is_trial=is_trial)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException:
            self._answered_to(is_trial=is_trial)
            raise
        else:
            self._answered_to(is_trial=is_trial)
        finally:
            if is_trial:
                self._trial_runs = False

    def reset(self) -> None:
        """Closes it: somebody else has seen the peer answer."""
        self._answered()

    def _enter(self) -> bool:
        """Whether this call is a trial."""
        if self._closed_again_at is None:
            return False
        left_s = self._closed_again_at - self._clock.monotonic()
        if left_s > 0 or self._trial_runs:
            raise Unavailable(
                f"{self._name} is away: {self._last_error}", reason="CIRCUIT_OPEN", retry_after_s=max(left_s, 0.0)
            )
        self._trial_runs = True
        return True

    def _answered_to(self, *, is_trial: bool) -> None:
        if is_trial or self._closed_again_at is None:
            self._answered()

    def _failed(self, text: str, *, is_trial: bool) -> None:
        was_open = self._closed_again_at is not None
        if was_open and not is_trial:
            return
        self._failures += 1
        self._last_error = text
        if self._failures >= self._failures_to_open:
            pause_s = self._pauses.delay_s(self._failures - self._failures_to_open, self._rng)
            self._closed_again_at = self._clock.monotonic() + pause_s
            if not was_open:
                self._changed(CircuitState.OPEN)

    def _answered(self) -> None:
        was_open = self._closed_again_at is not None
        self._failures, self._closed_again_at, self._last_error = 0, None, ""
        if was_open:
            self._changed(CircuitState.CLOSED)


def is_open_error(error: OpenManagerError) -> bool:
    """Whether a call failed because the circuit is open, not because the peer was asked."""
    return error.reason == "CIRCUIT_OPEN"
