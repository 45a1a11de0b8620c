"""The live state: which rows count, how servers are judged, what silence and removal do."""

import math

import numpy as np
import pytest

from fleet.health import ServerStatus
from services.cache import arrivals as arrivals_module
from services.cache import room
from services.cache import state as state_module
from services.cache.metric_sets import MetricSets
from services.cache.model import FleetSummary
from tests.cache.samples import HEADLINE, T0, World, descriptor, rows_of, set_of


@pytest.fixture
def world() -> World:
    return World()


def status(world: World, server_id: str = "a") -> ServerStatus:
    found = world.live.get(server_id)
    assert found is not None
    return found.status


def metrics(world: World, server_id: str = "a") -> dict[str, float]:
    found = world.live.get(server_id)
    assert found is not None
    return found.metrics()


def test_a_row_of_an_unknown_server_makes_one_named_by_its_id(world: World) -> None:
    assert world.report("a", 12).changed == ("a",)
    found = world.live.get("a")
    assert found is not None
    assert (found.descriptor.hostname, found.status) == ("a", ServerStatus.HEALTHY)
    assert (found.observed_ms, found.received_ms, found.sequence) == (T0, T0, 1)
    assert found.metrics() == {"cpu_usage": 12, "memory_usage": 10, "disk_usage": 10}


@pytest.mark.parametrize("late_ms", [0, 1, 60_000])
def test_a_row_that_is_not_newer_changes_nothing(world: World, late_ms: int) -> None:
    world.report("a", 12)
    before = world.live.get("a")
    outcome = world.report("a", 99, at_ms=T0 - late_ms)
    assert (outcome.changed, outcome.ignored_rows) == ((), 1)
    assert world.live.get("a") is before
    assert world.live.sequence == 1


def test_rows_of_one_request_in_any_order_leave_the_newest(world: World) -> None:
    outcome = world.rows(*(rows_of(HEADLINE, {"a": (cpu, 1, 1)}, T0 + cpu) for cpu in (5, 9, 7)))
    assert (outcome.changed, outcome.ignored_rows) == (("a",), 1)
    assert metrics(world)["cpu_usage"] == 9
    assert world.live.sequence == 1


def test_a_state_does_not_change_with_the_batch_it_came_from(world: World) -> None:
    metric_set, rows = rows_of(HEADLINE, {"a": (1, 2, 3)}, T0)
    world.rows((metric_set, rows))
    rows.values[:] = 77
    assert metrics(world)["cpu_usage"] == 1


def test_a_status_is_left_later_than_it_is_entered(world: World) -> None:
    seen = []
    for step, cpu in enumerate((79, 80, 76, 74, 96, 91, 89, 74), start=1):
        world.report("a", cpu, at_ms=T0 + step)
        seen.append(status(world).name)
    assert seen == ["HEALTHY", "WARNING", "WARNING", "HEALTHY", "CRITICAL", "CRITICAL", "WARNING", "HEALTHY"]


def test_silence_is_measured_from_when_rows_arrive_not_by_what_the_sender_calls_the_time(world: World) -> None:
    for _ in range(5):
        world.report("slow-clock", 10, at_ms=world.clock.now_ms() - 86_400_000)
        world.report("fast-clock", 10, at_ms=world.clock.now_ms() + 3_000_000)
        world.clock.advance(10)
        assert world.live.sweep() == ()
    world.clock.advance(19.9)
    assert world.live.sweep() == ()
    world.clock.advance(0.1)
    assert sorted(world.live.sweep()) == ["fast-clock", "slow-clock"]
    assert status(world, "slow-clock") == status(world, "fast-clock") == ServerStatus.OFFLINE
    assert world.live.sweep() == ()


def test_silence_does_not_see_the_wall_clock_jump(world: World) -> None:
    world.report("a", 10)
    world.clock.set_now_ms(T0 + 86_400_000)
    assert world.live.sweep() == ()
    world.clock.set_now_ms(T0 - 86_400_000)
    world.clock.advance(30)
    assert world.live.sweep() == ("a",)


def test_an_offline_server_is_judged_again_by_its_next_row(world: World) -> None:
    world.report("a", 10)
    world.clock.advance(30)
    world.live.sweep()
    world.report("a", 97)
    assert status(world) == ServerStatus.CRITICAL
    assert world.live.summary() == FleetSummary(total=1, critical=1)


def test_three_of_the_servers_own_intervals_count(world: World) -> None:
    world.describe(descriptor("a", report_interval_ms=60_000))
    world.report("a", 10)
    world.clock.advance(179)
    assert world.live.sweep() == ()
    world.clock.advance(1)
    assert world.live.sweep() == ("a",)


def test_a_descriptor_is_no_sign_of_life_and_a_server_that_never_reported_is_offline(world: World) -> None:
    world.describe(descriptor("a"))
    assert status(world) == ServerStatus.OFFLINE
    world.clock.advance(20)
    world.describe(descriptor("a", role="database"))
    assert status(world) == ServerStatus.OFFLINE
    world.clock.advance(10)
    assert world.live.sweep() == ()
    found = world.live.get("a")
    assert found is not None
    assert (found.descriptor.role, found.observed_ms, found.samples) == ("database", None, ())


def test_late_rows_are_no_sign_of_life(world: World) -> None:
    world.report("a", 10)
    for _ in range(3):
        world.clock.advance(10)
        world.report("a", 10, at_ms=T0 - 1)
    assert world.live.sweep() == ("a",)


@pytest.mark.parametrize("ahead_s", [11, 600, 3_600])
def test_a_clock_that_was_ahead_hides_nothing_when_it_is_set_right(world: World, ahead_s: int) -> None:
    world.report("a", 10, at_ms=T0 + ahead_s * 1_000)
    for number in range(1, 7):
        world.clock.advance(10.5)
        world.report("a", 20 + number, at_ms=world.clock.now_ms() - 50)
        assert world.live.sweep() == ()
        found = world.live.get("a")
        assert found is not None and found.observed_ms == world.clock.now_ms() - 50
        assert metrics(world)["cpu_usage"] == 20 + number


@pytest.mark.parametrize("ahead_s", [60, 5 * 3_600])
def test_our_own_clock_that_was_ahead_hides_nothing_when_it_is_set_right(world: World, ahead_s: int) -> None:
    """Every server was offline, whatever it reported, until the time came to which the clock had jumped."""
    world.clock.set_now_ms(T0 + ahead_s * 1_000)
    world.report("a", 10)
    world.clock.set_now_ms(T0)
    for number in range(1, 5):
        world.clock.advance(10.5)
        world.report("a", 20 + number, at_ms=world.clock.now_ms() - 50)
        assert world.report("a", 99, at_ms=world.clock.now_ms() - 60).ignored_rows == 1
        assert world.live.sweep() == ()
        found = world.live.get("a")
        assert found is not None and found.observed_ms == world.clock.now_ms() - 50
        assert metrics(world)["cpu_usage"] == 20 + number
        assert status(world) == ServerStatus.HEALTHY


def test_late_rows_of_a_clock_that_is_ahead_are_late(world: World) -> None:
    for second in range(3):
        world.clock.advance(1)
        world.report("a", second, at_ms=T0 + 600_000 + second * 1_000)
        late = world.report("a", 99, at_ms=T0 + 600_000 + second * 1_000 - 500)
        again = world.report("a", 99, at_ms=T0 + 600_000 + second * 1_000)
        assert (late.ignored_rows, again.ignored_rows, metrics(world)["cpu_usage"]) == (1, 1, second)


def test_an_unchanged_descriptor_changes_nothing(world: World) -> None:
    assert world.describe(descriptor("a")).changed == ("a",)
    assert world.describe(descriptor("a")).changed == ()
    assert world.live.sequence == 1


def test_overlapping_sets_are_joined_and_the_newest_value_wins(world: World) -> None:
    left, right = set_of("cpu_usage", "x"), set_of("x", "y")
    world.rows(rows_of(left, {"a": (97, 1)}, T0))
    world.rows(rows_of(right, {"a": (2, 3)}, T0 + 1))
    assert metrics(world) == {"cpu_usage": 97, "x": 2, "y": 3}
    assert status(world) == ServerStatus.CRITICAL
    world.rows(rows_of(left, {"a": (50, 8)}, T0 + 2))
    assert metrics(world) == {"cpu_usage": 50, "x": 8, "y": 3}
    found = world.live.get("a")
    assert found is not None
    assert [sample.metric_set.id for sample in found.samples] == [right.id, left.id]  # the newest last
    assert found.observed_ms == T0 + 2


def test_a_row_older_than_another_sets_sample_still_counts_for_its_own(world: World) -> None:
    left, right = set_of("x", "y"), set_of("x", "z")
    world.rows(rows_of(left, {"a": (1, 1)}, T0 + 10))
    world.rows(rows_of(right, {"a": (2, 2)}, T0 + 5))
    assert metrics(world) == {"x": 1, "y": 1, "z": 2}


@pytest.mark.parametrize(("after_s", "kept"), [(299.9, True), (300.0, False)])
def test_a_set_that_is_no_longer_reported_is_dropped_while_others_come(
    world: World, after_s: float, kept: bool
) -> None:
    world.rows(rows_of(set_of("x"), {"a": (1,)}, T0))
    world.clock.advance(after_s)
    world.report("a", 10)
    assert ("x" in metrics(world)) == kept


def test_a_silent_server_keeps_what_it_said_last(world: World) -> None:
    world.rows(rows_of(set_of("x"), {"a": (1,)}, T0))
    world.clock.advance(3_600)
    world.live.sweep()
    assert metrics(world) == {"x": 1}


def test_what_is_not_finite_is_no_value(world: World) -> None:
    world.rows(rows_of(set_of("cpu_usage", "x", "y"), {"a": (math.inf, math.nan, 1)}, T0))
    assert metrics(world) == {"y": 1}
    assert status(world) == ServerStatus.HEALTHY


def test_a_removed_server_stays_removed_until_it_is_admitted(world: World) -> None:
    world.report("a", 10)
    assert world.live.remove(["a", "never-seen"]) == 1
    assert world.live.remove(["a"]) == 0
    assert world.live.sequence == 3  # the state and two removals; removing again is no change
    world.clock.advance(1)
    assert world.report("a", 10).ignored_rows == 1
    assert world.describe(descriptor("a")).changed == ()
    assert world.report("never-seen", 10).ignored_rows == 1
    assert len(world.live) == 0
    assert world.live.summary() == FleetSummary()
    assert world.describe(descriptor("a"), admit_removed=True).changed == ("a",)
    assert world.report("a", 10).changed == ("a",)
    assert world.live.removed_after(0) == [("never-seen", 3)]


def test_removed_servers_are_remembered_up_to_a_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "MAX_REMOVED_SERVERS", 2)
    for server_id in "abc":
        world.report(server_id, 10)
    world.live.remove(["a", "b", "c"])
    assert [server_id for server_id, _ in world.live.removed_after(0)] == ["b", "c"]
    assert world.live.oldest_removal == 4


def test_every_change_has_the_next_number_and_the_order_can_be_walked(world: World) -> None:
    for server_id in ("a", "b", "c"):
        world.report(server_id, 10)
    world.clock.advance(1)
    world.report("a", 11)
    assert [(state.server_id, state.sequence) for state in world.live.changed_after(1)] == [
        ("b", 2),
        ("c", 3),
        ("a", 4),
    ]
    assert world.live.changed_after(4) == []
    assert [state.server_id for state in world.fleet().states] == ["a", "b", "c"]


def test_the_summary_agrees_with_the_states(world: World) -> None:
    rng = np.random.default_rng(7)
    for step in range(300):
        world.clock.advance(float(rng.integers(0, 4)))
        name = f"s{rng.integers(0, 12)}"
        if rng.random() < 0.1:
            world.live.remove([name])
        else:
            world.rows(
                rows_of(HEADLINE, {name: tuple(rng.random(3) * 110)}, T0 + step), admit_removed=rng.random() < 0.5
            )
        world.live.sweep()
        found = [state.status for state in world.fleet().states]
        assert world.live.summary() == FleetSummary(
            total=len(found),
            healthy=found.count(ServerStatus.HEALTHY),
            warning=found.count(ServerStatus.WARNING),
            critical=found.count(ServerStatus.CRITICAL),
            offline=found.count(ServerStatus.OFFLINE),
        )


def test_too_many_servers_are_refused_by_the_bounds_name_and_keep_nobody_out(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MAX_SERVERS", 2)
    world.report("a", 10)
    outcome = world.rows(rows_of(HEADLINE, dict.fromkeys("bca", (1, 1, 1)), T0 + 1))
    assert outcome.no_room is not None and outcome.no_room.metadata == {"limit": "MAX_SERVERS"}
    assert sorted(outcome.changed) == ["a", "b"] and len(world.live) == 2
    assert world.report("a", 11, at_ms=T0 + 2).no_room is None


def test_too_many_values_are_refused_by_the_bounds_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "MAX_LIVE_VALUES", 6)
    world.rows(rows_of(HEADLINE, dict.fromkeys("ab", (1, 1, 1)), T0))
    no_room = world.report("c", 1).no_room
    assert no_room is not None and no_room.metadata == {"limit": "MAX_LIVE_VALUES"}
    assert world.report("a", 11, at_ms=T0 + 1).changed == ("a",)
    world.live.remove(["b"])
    assert world.report("c", 1).changed == ("c",)


def test_a_fleet_whose_sets_change_and_that_fills_all_room_is_not_kept_out_by_its_own_past(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MAX_LIVE_VALUES", 30)
    for step in range(1, 60):
        world.clock.advance(10)
        for server_id in "abc":
            names = ("cpu_usage", *(f"{server_id}{step}_{number}" for number in range(3)))
            outcome = world.rows(rows_of(set_of(*names), {server_id: (10, 1, 2, 3)}, world.clock.now_ms()))
            assert outcome.changed == (server_id,) and outcome.no_room is None
            assert set(metrics(world, server_id)) >= set(names)
            assert sum(state.cells for state in world.fleet().states) <= 30
        assert world.live.sweep() == ()
    no_room = world.report("d", 1).no_room
    assert no_room is not None and no_room.metadata == {"limit": "MAX_LIVE_VALUES"}
    wide = rows_of(set_of(*(f"w{number}" for number in range(31))), {"a": range(31)}, world.clock.now_ms())
    assert world.rows(wide).no_room is not None


def test_a_server_has_a_bounded_number_of_sets(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals_module, "MAX_SAMPLES_PER_SERVER", 2)
    for step, name in enumerate("xyz"):
        world.rows(rows_of(set_of(name), {"a": (1,)}, T0 + step))
    assert sorted(metrics(world)) == ["y", "z"]


def test_sets_used_longest_ago_are_forgotten_first() -> None:
    sets = MetricSets(max_sets=2, max_metrics=10)
    first, second, third = set_of("a"), set_of("b"), set_of("c")
    sets.add(first)
    sets.add(second)
    assert sets.get(first.id) is first
    sets.add(third)
    assert sets.get(second.id) is None
    assert sets.get(first.id) is first
    sets.add(set_of(*(f"m{index}" for index in range(20))))  # over the other bound by itself, and still usable
    assert len(sets) == 1
