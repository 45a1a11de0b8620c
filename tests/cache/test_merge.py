"""What two replicas know of a server, joined: the same in any order, and nothing is lost."""

import itertools
import random
from collections.abc import Sequence

import pytest

from fleet.health import ServerStatus
from fleet.model import ServerDetails
from services.cache.model import Removal, ServerState, Stored
from services.cache.state import LiveState, Update
from tests.cache.samples import HEADLINE, T0, World, descriptor, rows_of, set_of

OTHER = set_of("x", "y")


def content(live: LiveState, server_id: str = "a") -> object:
    """What two replicas must agree on."""
    stored = live.stored(server_id)
    if not isinstance(stored, ServerState):
        return stored and stored.life
    samples = sorted((sample.set_id, sample.time_ms, sample.received_ms) for sample in stored.samples)
    times = stored.observed_ms, stored.received_ms
    return stored.descriptor, stored.details, stored.status, times, samples, stored.metrics()


def exchange(worlds: Sequence[World], rng: random.Random) -> None:
    """Gives each what the others have, in any order, until nobody has anything new."""
    for _ in range(8):
        pairs = list(itertools.permutations(worlds, 2))
        rng.shuffle(pairs)
        is_quiet = True
        for giver, taker in pairs:
            stored = giver.live.stored("a")
            if stored is not None:
                absorbed = taker.live.absorb([stored])
                is_quiet &= not absorbed.changed and not absorbed.ahead
        if is_quiet:
            return
    raise AssertionError("they never agree")


@pytest.mark.parametrize("seed", range(60))
def test_replicas_that_hear_anything_in_any_order_end_with_the_same(seed: int) -> None:
    rng = random.Random(seed)
    worlds = [World(f"e{index}") for index in range(3)]
    for index, world in enumerate(worlds):
        world.clock.advance(index * 0.7)  # their clocks differ
    for step in range(25):
        world = rng.choice(worlds)
        action = rng.random()
        if action < 0.35:
            ahead_ms = rng.choice((0, 0, 0, 60_000, 600_000))  # the sender's clock is ahead, and set right
            world.report("a", rng.random() * 100, at_ms=T0 + step + ahead_ms)
        elif action < 0.55:
            world.rows(rows_of(OTHER, {"a": (rng.random(), rng.random())}, T0 + step))
        elif action < 0.65:
            world.describe(descriptor("a", role=f"role-{step}"))
        elif action < 0.68:
            windows = ((T0 + step, T0 + step + 9),) if rng.random() < 0.5 else ()
            details = ServerDetails(revision=rng.randrange(1, step + 2), maintenance=windows)
            described = [descriptor("a", role=f"recorded-{step}")] if rng.random() < 0.5 else []
            world.live.update(Update(descriptors=described, details={"a": details}))
        elif action < 0.7:
            world.live.remove(["a"], {"a": rng.randrange(step + 2)})
        elif action < 0.75:
            world.describe(descriptor("a", role=f"back-{step}"), admit_removed=True)
        elif action < 0.85:
            world.live.sweep()
        else:
            giver = rng.choice(worlds)
            stored = giver.live.stored("a")
            if stored is not None:
                world.live.absorb([stored])
        for each in worlds:
            each.clock.advance(rng.choice((0, 0, 0.001, 1, 20)))
    exchange(worlds, rng)
    assert content(worlds[0].live) == content(worlds[1].live) == content(worlds[2].live)


def both(first: World, second: World) -> tuple[Stored, Stored]:
    mine, theirs = first.live.stored("a"), second.live.stored("a")
    assert mine is not None
    assert theirs is not None
    return mine, theirs


def test_an_old_judgement_of_silence_does_not_beat_newer_rows() -> None:
    first, second = World("e1"), World("e2")
    first.report("a", 10)
    second.live.absorb([both(first, first)[0]])
    for world in (first, second):
        world.clock.advance(29)
    first.report("a", 10)
    second.clock.advance(5)
    assert second.live.sweep() == ("a",)  # it has not heard of the row, and its judgement has a later stamp
    mine, theirs = both(first, second)
    assert theirs.stamp > mine.stamp
    absorbed = first.live.absorb([theirs])
    assert absorbed.ahead == ("a",)
    second.live.absorb([both(first, second)[0]])
    for world in (first, second):
        found = world.live.get("a")
        assert found is not None
        assert found.status == ServerStatus.HEALTHY


def test_a_clock_that_was_ahead_is_set_right_at_every_replica() -> None:
    first, second = World("e1"), World("e2")
    first.report("a", 10, at_ms=T0 + 600_000)
    second.live.absorb([both(first, first)[0]])
    for world in (first, second):
        world.clock.advance(11)
    first.report("a", 97)
    exchange([second, first], random.Random(1))
    for world in (first, second):
        found = world.live.get("a")
        assert found is not None and found.observed_ms == T0 + 11_000 and found.status == ServerStatus.CRITICAL


def test_a_descriptor_and_a_row_told_to_different_replicas_are_both_kept() -> None:
    first, second = World("e1"), World("e2")
    first.describe(descriptor("a"))
    second.live.absorb([both(first, first)[0]])
    for world in (first, second):
        world.clock.advance(1)
    first.describe(descriptor("a", role="database"))
    second.clock.advance(1)
    second.report("a", 97)
    exchange([first, second], random.Random(1))
    for world in (first, second):
        found = world.live.get("a")
        assert found is not None
        assert (found.descriptor.role, found.status) == ("database", ServerStatus.CRITICAL)


def test_a_set_that_expired_here_is_not_brought_back_by_who_still_has_it() -> None:
    first, second = World("e1"), World("e2")
    first.rows(rows_of(OTHER, {"a": (1, 2)}, T0))
    second.live.absorb([both(first, first)[0]])
    for world in (first, second):
        world.clock.advance(301)
    first.report("a", 10)
    exchange([first, second], random.Random(1))
    for world in (first, second):
        found = world.live.get("a")
        assert found is not None
        assert [sample.set_id for sample in found.samples] == [HEADLINE.id]


def test_of_a_removal_and_an_admission_the_later_one_counts() -> None:
    first, second = World("e1"), World("e2")
    first.report("a", 10)
    second.live.absorb([both(first, first)[0]])
    first.clock.advance(1)
    first.live.remove(["a"])
    second.clock.advance(2)
    second.describe(descriptor("a"), admit_removed=True)
    exchange([first, second], random.Random(1))
    assert first.live.get("a") is not None
    second.clock.advance(1)
    second.live.remove(["a"])
    exchange([first, second], random.Random(1))
    assert isinstance(first.live.stored("a"), Removal)
    first.clock.advance(1)
    assert first.report("a", 10).ignored_rows == 1


def test_while_we_are_deaf_the_silence_of_what_others_heard_is_ours() -> None:
    first, second = World("e1"), World("e2")
    first.report("a", 10)
    second.live.absorb([both(first, first)[0]])
    second.report("b", 10)
    second.clock.advance(31)
    assert second.live.sweep(deaf=True) == ("b",)
    second.clock.advance(29)
    assert second.live.sweep() == ()
    second.clock.advance(2)
    assert second.live.sweep() == ("a",)


@pytest.mark.parametrize("first", ["here", "there"])
def test_a_descriptor_told_here_and_a_record_told_there_are_both_kept(first: str) -> None:
    here, there = World("e1"), World("e2")
    for world in (here, there):
        world.describe(descriptor("a"))
    exchange([here, there], random.Random(0))
    details = ServerDetails(revision=2, labels=(("team", "shop"),))
    there.record("a", details)
    here.clock.advance(1)
    here.describe(descriptor("a", role="db"))
    giver, taker = (there, here) if first == "here" else (here, there)
    taker.live.absorb([stored for stored in [giver.live.stored("a")] if stored is not None])
    exchange([here, there], random.Random(0))
    for world in (here, there):
        state = world.live.get("a")
        assert state is not None
        assert (state.details, state.descriptor.role) == (details, "db")
