"""What the record says of a server in its live state: the latest revision, and maintenance that begins and ends."""

import math

import orjson

from fleet.model import NO_DETAILS, ServerDetails
from openmanager.cache.v1 import cache_pb2
from services.cache.documents import full_document, parse_stored, removal_note
from services.cache.model import ServerState
from services.cache.state import Update
from services.cache.wire import Encoder, tag
from tests.cache.samples import HEADLINE, T0, World, descriptor, rows_of

MINUTE_MS = 60_000
LABELS = (("team", "shop"), ("tier", ""))


def state_of(world: World) -> ServerState:
    found = world.live.get("a")
    assert found is not None
    return found


def window(revision: int, *windows: tuple[int, int]) -> ServerDetails:
    """Windows in minutes from T0."""
    return ServerDetails(
        revision=revision, maintenance=tuple((T0 + start * MINUTE_MS, T0 + end * MINUTE_MS) for start, end in windows)
    )


def test_the_latest_revision_counts_whatever_comes_when() -> None:
    world = World()
    assert world.record("a", window(1)).changed == ()  # of a server that is not there
    world.describe(descriptor("a"))
    assert state_of(world).details == NO_DETAILS
    latest = ServerDetails(revision=3, labels=LABELS, has_notes=True)
    assert world.record("a", latest).changed == ("a",)
    sequence = world.live.sequence
    for other in (window(2), window(3)):
        assert world.record("a", other).changed == ()
    assert (state_of(world).details, world.live.sequence) == (latest, sequence)
    world.report("a", 10)
    world.describe(descriptor("a", role="db"))
    assert state_of(world).details == latest


def test_maintenance_begins_and_ends_by_our_clock_each_once() -> None:
    world = World()
    world.describe(descriptor("a"))
    world.record("a", window(1, (1, 2), (2, 4), (6, 7)))
    seen = []
    for _ in range(16):
        before = world.live.sequence
        world.live.sweep()
        seen.append((state_of(world).in_maintenance, world.live.sequence > before))
        world.clock.advance(30)
    opened = [is_open for is_open, _ in seen]
    assert opened == [False] * 2 + [True] * 6 + [False] * 4 + [True] * 2 + [False] * 2
    told = [minute / 2 for minute, (_, is_told) in enumerate(seen) if is_told]
    assert told == [1, 2, 4, 6, 7]


def test_a_window_that_is_taken_back_ends_at_once() -> None:
    world = World()
    world.describe(descriptor("a"))
    world.record("a", window(1, (0, 9)))
    assert state_of(world).in_maintenance
    world.record("a", window(2))
    assert not state_of(world).in_maintenance


def test_a_removed_server_has_no_windows_left() -> None:
    world = World()
    world.describe(descriptor("a"))
    world.record("a", window(1, (1, 2)))
    world.live.remove(["a"])
    world.clock.advance(90)
    assert world.live.sweep() == ()
    world.describe(descriptor("a"), admit_removed=True)
    assert state_of(world).details == NO_DETAILS


def test_a_record_of_a_later_revision_than_the_one_that_was_deleted_takes_the_server_back() -> None:
    world = World()
    world.describe(descriptor("a"))
    world.record("a", window(1))
    world.live.remove(["a"], {"a": 2})
    for old in (window(1), window(2)):
        world.live.update(Update(descriptors=[descriptor("a")], details={"a": old}))
    world.record("a", window(3))  # who it is was not told
    assert world.live.is_removed("a")
    world.live.update(Update(descriptors=[descriptor("a")], details={"a": window(3)}))
    assert state_of(world).details.revision == 3
    world.live.remove(["a"], {"a": 2})  # the record is an older copy by now, and what is deleted is gone all the same
    world.live.update(Update(descriptors=[descriptor("a")], details={"a": window(3)}))
    assert world.live.is_removed("a")


def test_a_removal_of_which_no_revision_was_told_stands_until_one_is() -> None:
    world = World()
    world.live.remove(["a"])
    world.live.update(Update(descriptors=[descriptor("a")], details={"a": window(9)}))
    assert world.live.is_removed("a")
    assert world.live.remove(["a"], {"a": 5}) == 0
    removal = world.live.removal("a")
    assert removal is not None
    assert parse_stored("a", removal_note(removal), None, {}) == removal
    assert world.live.remove(["a"], {"a": 4}) == 0
    assert world.live.removal("a") is removal
    world.live.update(Update(descriptors=[descriptor("a")], details={"a": window(6)}))
    assert state_of(world).life > removal.life


def test_a_server_that_is_deleted_again_is_gone_also_where_nobody_heard_that_it_was_restored() -> None:
    first, second = World("e1"), World("e2")
    for world in (first, second):
        world.live.remove(["a"], {"a": 2})
    first.clock.advance(1)
    first.live.update(Update(descriptors=[descriptor("a")], details={"a": window(3)}))
    restored = state_of(first)
    second.clock.advance(2)
    second.live.remove(["a"], {"a": 4})
    removal = second.live.removal("a")
    assert removal is not None
    second.live.absorb([restored])
    first.live.absorb([removal])
    assert first.live.is_removed("a") and second.live.is_removed("a")


def test_a_replica_that_was_told_of_the_restored_server_alone_wins_over_the_removal_in_the_store() -> None:
    """It was restarted after the removal, and a removed server has no document to be read back."""
    before, after = World("e1"), World("e2")
    before.live.remove(["a"], {"a": 2})
    removal = before.live.removal("a")
    assert removal is not None
    after.live.update(Update(descriptors=[descriptor("a")], details={"a": window(2)}))
    after.live.absorb([removal])
    assert after.live.is_removed("a")
    again = World("e3")
    again.live.update(Update(descriptors=[descriptor("a")], details={"a": window(3)}))
    assert again.live.absorb([removal]).ahead == ("a",)
    before.live.absorb([state_of(again)])
    assert state_of(before).life == state_of(again).life > removal.life


def test_the_status_is_judged_all_the_same() -> None:
    world = World()
    world.record("a", window(1, (0, 9)))
    world.report("a", 99)
    world.record("a", window(1, (0, 9)))
    assert (state_of(world).in_maintenance, state_of(world).status.name) == (True, "CRITICAL")


def test_it_is_on_the_wire_and_comes_back_from_the_store() -> None:
    world = World()
    world.rows(rows_of(HEADLINE, {"a": (1, math.nan, 3)}, T0))
    details = ServerDetails(revision=7, labels=LABELS, has_notes=True, maintenance=((T0, T0 + 1), (T0 + 5, T0 + 9)))
    world.record("a", details)
    state = state_of(world)
    answer = cache_pb2.GetServerStateResponse.FromString(
        tag(cache_pb2.GetServerStateResponse.STATE_FIELD_NUMBER) + Encoder().state(state)
    )
    message = answer.state
    assert (message.details.revision, message.in_maintenance) == (7, True)
    assert dict(message.details.labels) == dict(LABELS)
    document, note = full_document(state)
    stored = parse_stored("a", note, orjson.loads(document), {})
    assert isinstance(stored, ServerState)
    assert stored.details == details
