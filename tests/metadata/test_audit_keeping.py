"""The audit log as it is kept: what is taken, signed, shipped later, listed and dropped, in a real PostgreSQL."""

import asyncio
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fleet.audit.event import MAX_STATE_BYTES, START, Draft, Event, draft, placed
from fleet.audit.log import AuditLog
from openmanager.gateway.v1 import audit_pb2 as public
from runtime import tasks
from runtime.clock import ManualClock, SystemClock
from runtime.errors import FailedPrecondition, ResourceExhausted, Unavailable
from runtime.limits import MAX_MESSAGE_BYTES
from services.metadata.audit.checkpoint import CHECKPOINTS_FILE, KEY_FILE
from services.metadata.audit.keeper import CHECKPOINT_INTERVAL_S
from services.metadata.audit.servicer import AuditServicer
from services.metadata.audit.store import EventFilter
from services.metadata.journal import Fact
from tests.harness import eventually
from tests.harness.postgres import PostgresServer
from tests.metadata.audit_parts import Audit, Writer, auditing, told

DAY_US = 86_400_000_000


async def test_a_sink_takes_each_event_once_and_never_another_one_in_its_place(on_one: Audit) -> None:
    writer = Writer()
    events = writer.make(10)
    sink = on_one.keeper.sink
    await sink.append(events[:6])
    await sink.append(events[3:8])  # the answer to the first was lost
    for wrong in (events[9:], [replace(events[8], actor="mallory")]):
        with pytest.raises(FailedPrecondition) as caught:
            await sink.append(wrong)
        assert caught.value.reason == "AUDIT_CHAIN_BROKEN"
    other = Writer()
    with pytest.raises(FailedPrecondition):  # a journal that was put back gives numbers again
        await sink.append(other.make(3))
    await sink.append(events)
    await on_one.parts.all_inserted()
    assert await on_one.sql("SELECT count(*) FROM audit_events") == 10
    assert await on_one.found() == set()


async def test_a_checkpoint_is_signed_every_minute_in_which_something_happened(
    embedded_server: PostgresServer, tmp_path: Path
) -> None:
    clock = ManualClock(1_790_000_000_000)
    target = await embedded_server.fresh_database()
    async with auditing(target, embedded_server, tmp_path, clock=clock) as audit:
        for number in range(3):
            await audit.ship(Writer(f"writer-{number}").make(4))

            def is_signed(lines: int = len(lines_of(tmp_path)) + 1) -> bool:
                clock.advance(CHECKPOINT_INTERVAL_S + 1)  # again, for whoever had not gone to sleep yet
                return len(lines_of(tmp_path)) == lines

            await eventually(is_signed)
        await audit.keeper.sign()
        assert len(lines_of(tmp_path)) == 3
        await audit.parts.all_inserted()
        assert (await audit.keeper.verify()).unproved_events == 0


def lines_of(folder: Path) -> list[str]:
    file = folder / CHECKPOINTS_FILE
    return file.read_text().splitlines() if file.exists() else []


async def test_a_log_that_is_written_and_signed_while_it_is_verified_has_no_faults(on_one: Audit) -> None:
    writer = Writer()

    async def write() -> None:
        while True:
            await on_one.ship(writer.make(3))
            await on_one.keeper.sign()

    async with tasks.beside("writes", write()):
        for _ in range(40):
            proof = await on_one.keeper.verify()
            assert not proof.findings


async def test_the_ends_of_chains_are_known_again_after_a_start(
    embedded_server: PostgresServer, tmp_path: Path
) -> None:
    target = await embedded_server.fresh_database()
    writer = Writer()
    async with auditing(target, embedded_server, tmp_path) as audit:
        await audit.filled(writer, 10)
        await audit.ship(writer.make(5))
        audit.keeper.sign = nothing  # type: ignore[method-assign]  as a kill would have it
        await audit.parts.all_inserted()
    async with auditing(target, embedded_server, tmp_path) as audit:
        assert audit.keeper.sink.end(writer.name) == writer.end
        await audit.tamper("DELETE FROM audit_events WHERE seq > 13")
        assert await audit.found() == {("REMOVED", 14, 15)}
        await audit.ship(writer.make(1))


async def test_a_chain_goes_on_from_the_database_where_data_dir_was_lost(
    embedded_server: PostgresServer, tmp_path: Path
) -> None:
    target = await embedded_server.fresh_database()
    writer = Writer()
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
    async with auditing(target, embedded_server, tmp_path / "first") as audit:
        await audit.filled(writer, 10)
        await audit.ship(writer.make(5))
        audit.keeper.sign = nothing  # type: ignore[method-assign]
        await audit.parts.all_inserted()
    async with auditing(target, embedded_server, tmp_path / "second") as audit:
        await audit.ship(writer.make(5))
        assert audit.keeper.sink.end(writer.name) == writer.end
        await audit.parts.all_inserted()
        assert {kind for kind, _, _ in await audit.found()} == {"CHECKPOINT_REMOVED", "CHECKPOINT_ALTERED"}  # no key


async def test_a_start_without_data_dir_and_database_gives_no_number_twice(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    """A machine that is set up again from backups may well start metadata before PostgreSQL."""
    target = await own_server.fresh_database()
    writer, other = Writer(), Writer("metadata-2")
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
    async with auditing(target, own_server, tmp_path / "first") as audit:
        for _ in range(3):
            await audit.filled(writer, 5)
    key = (tmp_path / "first" / KEY_FILE).read_bytes()
    (tmp_path / "second" / KEY_FILE).write_bytes(key)
    own_server.stop(signal.SIGQUIT)
    async with auditing(target, own_server, tmp_path / "second") as audit:
        await audit.ship(other.make(2))
        with pytest.raises(Unavailable):
            await audit.keeper.sign()
        own_server.start()
        await audit.parts.all_inserted(60.0)
        await audit.ship(writer.make(5))
        assert await audit.keeper.sign()
        await audit.parts.all_inserted(60.0)
        proof = await audit.keeper.verify()
        assert (told(proof), proof.checkpoints) == ({("CHECKPOINT_REMOVED", 1, 3)}, 4)  # those of DATA_DIR are lost
        assert {chain.writer_id: chain.proved_seq for chain in proof.chains} == {writer.name: 20, other.name: 2}


async def nothing() -> bool:
    return False


class Told:
    """Stands for the service's own log."""

    def __init__(self, told: list[Draft]) -> None:
        self._told = told

    async def append(self, said: Draft) -> None:
        self._told.append(said)


async def test_old_months_go_with_a_checkpoint_of_their_end(embedded_server: PostgresServer, tmp_path: Path) -> None:
    clock = ManualClock(1_790_000_000_000)
    target = await embedded_server.fresh_database()
    async with auditing(target, embedded_server, tmp_path, clock=clock, retention_s=30 * 86_400) as audit:
        one, other = Writer("one"), Writer("other")
        await audit.filled(one, 60, time_us=1_780_000_000_000_000, step_us=DAY_US)  # 2026-05-28 on
        await audit.filled(other, 10, time_us=1_788_000_000_000_000, step_us=DAY_US)
        told: list[Draft] = []
        audit.keeper.log = Told(told)  # type: ignore[assignment]
        assert await audit.keeper.drop_old() == ["2026-05", "2026-06", "2026-07"]
        assert [(said.action, said.target, said.after) for said in told] == [
            ("openmanager.metadata.DropAuditMonth", "2026-05", '{"events":4,"checkpoint":3}'),
            ("openmanager.metadata.DropAuditMonth", "2026-06", '{"events":30,"checkpoint":4}'),
            ("openmanager.metadata.DropAuditMonth", "2026-07", '{"events":26,"checkpoint":5}'),
        ]
        await audit.parts.all_inserted()
        proof = await audit.keeper.verify()
        assert proof.findings == []
        assert [(chain.writer_id, chain.first_seq, chain.last_seq) for chain in proof.chains] == [
            ("one", 0, 60),
            ("other", 1, 10),
        ]
        assert await audit.store.months() == {"2026-08", "2026-09"}
        await audit.ship(one.make(3, time_us=1_790_000_000_000_000))  # the chain goes on
        await audit.parts.all_inserted()
        assert await audit.found() == set()
        await audit.tamper("DELETE FROM audit_events WHERE writer_id = 'one' AND seq = 61")
        assert await audit.found() == {("REMOVED", 61, 61)}


async def test_nothing_is_dropped_under_a_legal_hold_nor_while_something_is_wrong(
    embedded_server: PostgresServer, tmp_path: Path
) -> None:
    clock = ManualClock(1_790_000_000_000)
    target = await embedded_server.fresh_database()
    async with auditing(target, embedded_server, tmp_path, clock=clock, legal_hold=True, retention_s=86_400) as audit:
        await audit.filled(Writer(), 10, time_us=1_780_000_000_000_000)
        assert await audit.keeper.drop_old() == []
    async with auditing(target, embedded_server, tmp_path, clock=clock, retention_s=86_400) as audit:
        assert await audit.store.months() == {"2026-05"}
        await audit.tamper("UPDATE audit_events SET actor = 'nobody' WHERE seq = 5")
        assert await audit.keeper.drop_old() == []
        assert await audit.found() == {("ALTERED", 5, 5)}


async def test_listing_pages_through_what_matches(on_one: Audit) -> None:
    one = Writer("one")
    await on_one.filled(one, 25)
    found = await on_one.store.newest(EventFilter(), None, 10)
    assert found == one.events[:-11:-1]
    only = await on_one.store.newest(EventFilter(target="server-7"), None, 10)
    assert only == [one.events[6]]
    assert await on_one.store.newest(EventFilter(actor="nobody"), None, 10) == []


async def test_while_postgresql_is_away_events_are_taken_and_shipped_later_in_order(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    target = await own_server.fresh_database()
    async with auditing(target, own_server, tmp_path) as audit:
        writer = Writer()
        await audit.filled(writer, 100)
        own_server.stop(signal.SIGQUIT)
        await audit.ship(writer.make(900))
        assert await audit.keeper.sign()  # signed on our disk meanwhile
        with pytest.raises(Unavailable):
            await audit.keeper.verify()
        own_server.start()
        await audit.parts.all_inserted(60.0)
        rows = [row.seq async for page in audit.store.rows() for row in page]
        assert rows == list(range(1, 1_001))
        proof = await audit.keeper.verify()
        assert (proof.total, proof.unproved_events, proof.checkpoints) == (0, 0, 2)


async def test_events_that_the_database_does_not_have_yet_are_not_missed(on_one: Audit) -> None:
    """It refuses some, in the middle and at the end: they are in the journal, as those are that wait."""
    await on_one.filled(Writer("first"), 5)
    await on_one.sql("ALTER TABLE audit_events ADD CHECK (seq NOT IN (7, 20))")
    writer = Writer()
    await on_one.filled(writer, 20)
    assert await on_one.sql("SELECT count(*) FROM audit_events WHERE writer_id = $1", writer.name) == 18
    proof = await on_one.keeper.verify()
    assert (proof.findings, proof.events, proof.unproved_events) == ([], 25, 0)


async def test_a_journal_that_was_put_back_from_a_copy_begins_a_new_chain_and_loses_nothing(
    on_one: Audit, tmp_path: Path
) -> None:
    folder, copy = tmp_path / "gateway", tmp_path / "copy"
    folder.mkdir()

    async def record(actions: Sequence[str]) -> str:
        ship = on_one.keeper.sink.append
        log = AuditLog(folder / "audit.db", "gateway", clock=SystemClock(), limit_bytes=1 << 20, ship=ship)
        async with log:
            for action in actions:
                await log.append(draft(time_us=1_790_000_000_000_000, action=action))
            await eventually(lambda: log.lag.events == 0)
            return log.writer_id

    before = await record(["a", "b"])
    shutil.copytree(folder, copy)
    await record(["c", "d", "e"])
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    after = await record(["f", "g"])
    assert after != before
    await on_one.parts.all_inserted()
    found = await on_one.store.newest(EventFilter(), None, 20)
    assert sorted(event.action for event in found) == list("abcdefg")
    assert await on_one.found() == set()


async def test_a_journal_that_was_put_back_with_events_that_were_taken_meanwhile_loses_none_and_doubles_none(
    on_one: Audit, tmp_path: Path
) -> None:
    folder, copy = tmp_path / "gateway", tmp_path / "copy"
    folder.mkdir()
    is_away = True

    async def ship(events: Sequence[Event]) -> None:
        if is_away:
            raise Unavailable("metadata is away")
        await on_one.keeper.sink.append(events)

    async def record(actions: Sequence[str]) -> None:
        log = AuditLog(folder / "audit.db", "gateway", clock=SystemClock(), limit_bytes=1 << 20, ship=ship)
        async with log:
            for action in actions:
                await log.append(draft(time_us=1_790_000_000_000_000, action=action))
            await eventually(lambda: is_away or log.lag.events == 0)

    await record(["a", "b"])
    shutil.copytree(folder, copy)
    is_away = False
    await record(["c"])
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)
    is_away = True
    await record(["d", "e"])
    is_away = False
    await record(["f"])
    await on_one.parts.all_inserted()
    found = await on_one.store.newest(EventFilter(), None, 20)
    assert sorted(event.action for event in found) == list("abcdef")
    assert await on_one.found() == set()


async def test_a_full_journal_takes_no_event_before_one_that_it_refused(
    embedded_server: PostgresServer, tmp_path: Path
) -> None:
    target = await embedded_server.fresh_database()
    said = [draft(time_us=1_790_000_000_000_000, action="a", after="x" * size) for size in (10, 30_000, 10)]
    events: list[Event] = []
    for one in said:
        events.append(placed(one, "gateway-1", events[-1].link if events else START))
    async with auditing(target, embedded_server, tmp_path) as audit:
        facts = audit.parts.facts
        facts._limit_bytes = (await facts.backlog()).bytes + 20_000
        with pytest.raises(ResourceExhausted):
            await audit.ship(events)
        await audit.parts.all_inserted()
        assert await audit.found() == set()
    async with auditing(target, embedded_server, tmp_path) as audit:
        await audit.ship(events)
        await audit.parts.all_inserted()
        assert await audit.found() == set()


async def test_events_that_are_being_taken_were_not_put_in(on_one: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of a batch are in the database already while others wait for their sync."""
    record_all, release = on_one.parts.facts.record_all, asyncio.Event()

    async def slow(facts: Sequence[Fact]) -> list[Fact]:
        first = await record_all(facts[:5])
        await release.wait()
        return first + await record_all(facts[5:])

    monkeypatch.setattr(on_one.parts.facts, "record_all", slow)
    taking = asyncio.create_task(on_one.keeper.sink.append(Writer().make(10)))

    async def five_there() -> bool:
        return bool(await on_one.sql("SELECT count(*) FROM audit_events") == 5)

    await eventually(five_there)
    assert await on_one.found() == set()
    release.set()
    await taking
    await on_one.parts.all_inserted()
    assert await on_one.found() == set()


async def test_a_page_of_large_events_fits_into_a_message(on_one: Audit) -> None:
    servicer = AuditServicer(on_one.keeper, on_one.store)
    large = "x" * (MAX_STATE_BYTES - 2)
    end, events = START, []
    for _ in range(300):
        events.append(placed(draft(time_us=1_790_000_000_000_000, before=large, after=large), "w", end))
        end = events[-1].link
    await on_one.ship(events)
    await on_one.parts.all_inserted(60.0)
    request, seen, pages = public.ListAuditEventsRequest(page_size=1_000), [], 0
    while pages == 0 or request.page_token:
        answer = await servicer.ListAuditEvents(request, None)
        assert answer.ByteSize() < MAX_MESSAGE_BYTES
        seen += [event.id for event in answer.events]
        request.page_token = answer.next_page_token
        pages += 1
    assert pages > 1 and sorted(seen) == sorted(event.id for event in events)
