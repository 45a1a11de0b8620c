"""The breaker: who is let through when, on a clock that stands still."""

import asyncio
import random
import time
from contextlib import suppress

import pytest

from runtime import deadline
from runtime.circuit import Circuit, CircuitState, is_open_error
from runtime.clock import ManualClock
from runtime.errors import DeadlineExceeded, InvalidArgument, Unavailable
from runtime.tasks import Backoff


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def circuit(clock: ManualClock) -> Circuit:
    return Circuit("Redis", clock, rng=random.Random(1), pauses=Backoff(initial_s=1.0, max_s=8.0))


def fail(circuit: Circuit, error: Exception | None = None) -> None:
    with pytest.raises(type(error or Unavailable(""))), circuit.attempt():
        raise error or Unavailable("no answer")


def test_two_failures_in_a_row_open_it_and_an_answer_between_does_not(circuit: Circuit) -> None:
    fail(circuit)
    with circuit.attempt():
        pass
    fail(circuit)
    assert circuit.state is CircuitState.CLOSED
    fail(circuit, DeadlineExceeded("slow"))
    assert circuit.state is CircuitState.OPEN
    assert circuit.last_error == "slow"


@pytest.mark.parametrize(("left_s", "after"), [(0.5, CircuitState.CLOSED), (60.0, CircuitState.OPEN)])
def test_a_caller_in_a_hurry_proves_nothing_by_running_out_of_time(
    circuit: Circuit, left_s: float, after: CircuitState
) -> None:
    token = deadline.current.set(deadline.CallDeadline(time.monotonic() + left_s))
    for error in (DeadlineExceeded("no time is left"), TimeoutError()):
        fail(circuit, error)
    assert circuit.state is after
    for _ in range(2):
        fail(circuit, Unavailable("away"))
    assert circuit.state is CircuitState.OPEN, "that it is away is no matter of time"
    deadline.current.reset(token)


def test_a_refusal_is_an_answer(circuit: Circuit) -> None:
    for _ in range(5):
        fail(circuit, InvalidArgument("no"))
    assert circuit.state is CircuitState.CLOSED


def test_while_it_is_open_nothing_is_sent(circuit: Circuit) -> None:
    fail(circuit)
    fail(circuit, TimeoutError())
    sent = False
    with pytest.raises(Unavailable, match="Redis is away: no answer in time") as refused, circuit.attempt():
        sent = True
    assert not sent
    assert is_open_error(refused.value)
    assert 0.5 <= (refused.value.retry_after_s or 0) <= 1.0


@pytest.mark.parametrize("answer", [None, InvalidArgument("no")])
def test_an_answer_to_a_call_from_before_it_was_opened_does_not_close_it(
    circuit: Circuit, answer: Exception | None
) -> None:
    with suppress(InvalidArgument), circuit.attempt():
        fail(circuit)
        fail(circuit)
        assert circuit.state is CircuitState.OPEN
        if answer is not None:
            raise answer
    assert circuit.state is CircuitState.OPEN
    circuit.reset()
    assert circuit.state is CircuitState.CLOSED


async def test_many_callers_who_wait_in_the_moment_of_an_outage_make_it_no_longer(
    circuit: Circuit, clock: ManualClock
) -> None:
    async def ask() -> None:
        with circuit.attempt():
            await clock.sleep(0.5)
            raise Unavailable("no answer")

    asking = asyncio.gather(*(ask() for _ in range(20)), return_exceptions=True)
    await asyncio.sleep(0)
    clock.advance(0.5)
    await asking
    assert circuit.state is CircuitState.OPEN
    clock.advance(1.0)
    assert circuit.state is CircuitState.HALF_OPEN, "the first pause is a second, whoever has waited"


async def test_after_the_pause_one_trial_goes_through_and_its_answer_closes(
    circuit: Circuit, clock: ManualClock
) -> None:
    fail(circuit)
    fail(circuit)
    clock.advance(1.0)
    assert circuit.state is CircuitState.HALF_OPEN
    with circuit.attempt(), pytest.raises(Unavailable), circuit.attempt():
        pytest.fail("two trials at once")
    assert circuit.state is CircuitState.CLOSED
    assert circuit.last_error == ""


async def test_each_failed_trial_doubles_the_pause_up_to_a_bound(circuit: Circuit, clock: ManualClock) -> None:
    fail(circuit)
    fail(circuit)
    for longest_s in (2.0, 4.0, 8.0, 8.0):
        clock.advance(8.0)
        fail(circuit)
        assert circuit.state is CircuitState.OPEN
        clock.advance(longest_s / 2 - 0.01)
        assert circuit.state is CircuitState.OPEN
        clock.advance(longest_s / 2 + 0.01)
        assert circuit.state is CircuitState.HALF_OPEN


async def test_a_trial_whose_caller_goes_away_proves_nothing(circuit: Circuit, clock: ManualClock) -> None:
    fail(circuit)
    fail(circuit)
    clock.advance(1.0)
    with pytest.raises(asyncio.CancelledError), circuit.attempt():
        raise asyncio.CancelledError
    assert circuit.state is CircuitState.HALF_OPEN
    with circuit.attempt():
        pass
    assert circuit.state is CircuitState.CLOSED


def test_changes_are_told_once_each(circuit: Circuit) -> None:
    told: list[CircuitState] = []
    circuit.on_change(told.append)
    for _ in range(2):
        fail(circuit)
    circuit.reset()
    circuit.reset()
    assert told == [CircuitState.OPEN, CircuitState.CLOSED]
