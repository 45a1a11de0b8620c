"""The audit log in a real PostgreSQL, and a superuser who tampers with it: verifying names what was done."""

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from fleet.audit.event import MAX_STATE_BYTES, START, Draft, draft, placed
from fleet.audit.log import AuditLog
from openmanager.gateway.v1 import audit_pb2 as public
from runtime.clock import ManualClock, SystemClock
from runtime.errors import FailedPrecondition, Unavailable
from runtime.limits import MAX_MESSAGE_BYTES
from services.metadata.audit.checkpoint import CHECKPOINTS_FILE, KEY_FILE
from services.metadata.audit.keeper import CHECKPOINT_INTERVAL_S
from services.metadata.audit.servicer import AuditServicer
from services.metadata.audit.store import EventFilter, row_of_event
from services.metadata.journal import Fact
from services.metadata.target import DatabaseTarget
from tests.harness import eventually
from tests.harness.postgres import PostgresServer
from tests.metadata.audit_parts import Audit, Writer, auditing, told

DAY_US = 86_400_000_000


@pytest.fixture
async def audit(target: DatabaseTarget, server: PostgresServer, tmp_path: Path) -> AsyncIterator[Audit]:
    async with auditing(target, server, tmp_path) as made:
        yield made


@pytest.fixture
async def on_one(embedded_server: PostgresServer, tmp_path: Path) -> AsyncIterator[Audit]:
    """For what does not depend on the version of the database."""
    async with auditing(await embedded_server.fresh_database(), embedded_server, tmp_path) as made:
        yield made


async def test_of_10000_events_those_that_a_superuser_altered_deleted_and_swapped_are_named(audit: Audit) -> None:
    writer = Writer()
    await audit.filled(writer, 10_000)
    proof = await audit.keeper.verify()
    assert (proof.total, proof.events, proof.unproved_events) == (0, 10_000, 0)
    await audit.tamper(
        "UPDATE audit_events SET actor = 'nobody' WHERE seq = 1234",
        "DELETE FROM audit_events WHERE seq = 5678",
        "UPDATE audit_events SET seq = seq + 100000 WHERE seq IN (7001, 7009)",
        "UPDATE audit_events SET seq = CASE seq WHEN 107001 THEN 7009 ELSE 7001 END WHERE seq > 100000",
    )
    proof = await audit.keeper.verify()
    assert told(proof) == {
        ("ALTERED", 1234, 1234),
        ("REMOVED", 5678, 5678),
        ("REORDERED", 7001, 7001),
        ("REORDERED", 7009, 7009),
    }
    named = {finding.kind: finding.event_id for finding in proof.findings if finding.kind == "ALTERED"}
    assert named == {"ALTERED": writer.events[1233].id}


async def test_rights_and_triggers_refuse_every_change(audit: Audit) -> None:
    await audit.filled(Writer(), 10)
    partition = "audit_events_2026_09"
    for table in ("audit_events", partition, "audit_checkpoints"):
        for statement in (f"UPDATE {table} SET seq = 1", f"DELETE FROM {table}", f"TRUNCATE {table}"):
            wrong = statement.replace("seq = 1", "body = ''" if table == "audit_checkpoints" else "seq = 1")
            with pytest.raises(asyncpg.InsufficientPrivilegeError):  # the service's own role, by rights
                async with audit.parts.database._pool.acquire() as connection:
                    await connection.execute(wrong)
            with pytest.raises(asyncpg.InsufficientPrivilegeError, match="only ever added to"):  # any role, by triggers
                await audit.sql(wrong)
    assert await audit.found() == set()


async def test_what_is_stored_comes_back_as_it_was(audit: Audit) -> None:
    writer = Writer()
    odd = replace(
        writer.make(1)[0], before='{"a" :  1.0, "b":"\\u00e9é"}', after="null", target="a'\"\\;--\n💥", count=7
    )
    event = placed(odd, writer.name, START)
    await audit.keeper.sink.append([event])
    await audit.parts.all_inserted()
    assert await audit.store.newest(EventFilter(), None, 5) == [event]
    rows = [row async for page in audit.store.rows() for row in page]
    assert rows == [row_of_event(event)]


async def test_a_truncated_tail_is_named(on_one: Audit) -> None:
    await on_one.filled(Writer(), 300)
    await on_one.tamper("DELETE FROM audit_events WHERE seq > 280")
    assert await on_one.found() == {("REMOVED", 281, 300)}


async def test_a_tail_that_no_checkpoint_has_yet_is_missed_while_the_service_knows_of_it(on_one: Audit) -> None:
    writer = Writer()
    await on_one.filled(writer, 100)
    await on_one.ship(writer.make(20))
    await on_one.parts.all_inserted()
    proof = await on_one.keeper.verify()
    assert (proof.total, proof.unproved_events, proof.chains[0].proved_seq) == (0, 20, 100)
    await on_one.tamper("DELETE FROM audit_events WHERE seq > 110")
    assert await on_one.found() == {("REMOVED", 111, 120)}


async def test_a_whole_chain_that_was_computed_anew_is_named(on_one: Audit) -> None:
    writer = Writer()
    await on_one.filled(writer, 100)
    await on_one.filled(writer, 200)
    forged = list(writer.events[:150])
    for event in writer.events[150:]:
        changed = replace(event, actor="nobody") if event.seq == 151 else event
        forged.append(replace(placed(changed, writer.name, forged[-1].link), id=event.id))
    await on_one.tamper(
        *(
            f"UPDATE audit_events SET actor = '{event.actor}', prev_hash = '\\x{event.prev_hash.hex()}',"
            f" hash = '\\x{event.hash.hex()}' WHERE seq = {event.seq}"
            for event in forged[150:]
        )
    )
    assert await on_one.found() == {("RECOMPUTED", 101, 300)}


async def test_an_event_that_was_put_in_and_a_chain_that_nobody_wrote_are_named(on_one: Audit) -> None:
    writer = Writer()
    await on_one.filled(writer, 50)
    columns = "time, id, actor, role, authentication, address, action, target, code, reason, trace_id, count, prev_hash"
    await on_one.tamper(
        f"INSERT INTO audit_events (writer_id, seq, {columns}, hash)"
        f" SELECT writer_id, 51, {columns}, sha256('x') FROM audit_events WHERE seq = 50",
        f"INSERT INTO audit_events (writer_id, seq, {columns}, hash)"
        f" SELECT 'forged', seq, {columns}, hash FROM audit_events WHERE seq < 3",
    )
    proof = await on_one.keeper.verify()
    assert {(one.kind, one.writer_id, one.first_seq) for one in proof.findings} == {
        ("INSERTED", writer.name, 51),
        ("INSERTED", "forged", 1),
        ("INSERTED", "forged", 2),
    }


async def test_a_partition_that_was_dropped_without_a_checkpoint_is_named(on_one: Audit) -> None:
    writer = Writer()
    await on_one.filled(writer, 60, time_us=1_790_000_000_000_000, step_us=DAY_US)  # 2026-09-21 on
    months = await on_one.store.months()
    assert months == {"2026-09", "2026-10", "2026-11"}
    await on_one.tamper(
        "ALTER TABLE audit_events DETACH PARTITION audit_events_2026_10", "DROP TABLE audit_events_2026_10"
    )
    proof = await on_one.keeper.verify()
    assert {one.kind for one in proof.findings} == {"PARTITION_REMOVED", "REMOVED"}
    assert any("2026-10" in one.message for one in proof.findings)


async def test_checkpoints_are_held_to_their_signatures_and_to_those_under_data_dir(
    on_one: Audit, tmp_path: Path
) -> None:
    writer = Writer()
    for _ in range(6):
        await on_one.filled(writer, 5)
    assert ((tmp_path / KEY_FILE).stat().st_mode & 0o777, (tmp_path / CHECKPOINTS_FILE).stat().st_mode & 0o777) == (
        0o600,
        0o600,
    )
    proof = await on_one.keeper.verify()
    assert (proof.checkpoints, proof.total) == (6, 0)
    await on_one.tamper(
        "DELETE FROM audit_checkpoints WHERE number IN (2, 3)",
        "UPDATE audit_checkpoints SET body = replace(body, '25', '24') WHERE number = 5",
    )
    assert await on_one.found() == {("CHECKPOINT_REMOVED", 2, 3), ("CHECKPOINT_ALTERED", 5, 5)}
    lines = (tmp_path / CHECKPOINTS_FILE).read_text().splitlines()
    (tmp_path / CHECKPOINTS_FILE).write_text("\n".join(lines[:3] + lines[4:]) + "\n")
    assert ("CHECKPOINT_REMOVED", 4, 4) in await on_one.found()


async def test_a_forged_checkpoint_proves_nothing(on_one: Audit) -> None:
    """Who may write to the database only: computes a chain anew and signs it with a key of his own."""
    writer = Writer()
    await on_one.filled(writer, 10)
    await on_one.tamper("UPDATE audit_checkpoints SET signature = sha512('x')")
    assert await on_one.found() == {("CHECKPOINT_ALTERED", 1, 1)}
    assert (await on_one.keeper.verify()).unproved_events == 0  # the one under DATA_DIR is still right


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
            lines = len(lines_of(tmp_path))
            await eventually(lambda: clock.sleepers >= 2)
            clock.advance(CHECKPOINT_INTERVAL_S + 1)
            await eventually(lambda lines=lines: len(lines_of(tmp_path)) == lines + 1)
        await audit.keeper.sign()
        assert len(lines_of(tmp_path)) == 3
        await audit.parts.all_inserted()
        assert (await audit.keeper.verify()).unproved_events == 0


def lines_of(folder: Path) -> list[str]:
    file = folder / CHECKPOINTS_FILE
    return file.read_text().splitlines() if file.exists() else []


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
            await eventually(lambda: log.lag.events == 0, 10.0)
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


async def test_events_that_are_being_taken_were_not_put_in(on_one: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of a batch are in the database already while others wait for their sync."""
    record, release, number = on_one.parts.facts.record, asyncio.Event(), 0

    async def slow(fact: Fact) -> Fact:
        nonlocal number
        number += 1
        if number > 5:
            await release.wait()
        return await record(fact)

    monkeypatch.setattr(on_one.parts.facts, "record", slow)
    taking = asyncio.create_task(on_one.keeper.sink.append(Writer().make(10)))
    await eventually(lambda: number == 10)

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


@pytest.mark.full
@pytest.mark.timeout(600)
async def test_a_million_events_are_verified_in_30_seconds(on_one: Audit) -> None:
    writer = Writer()
    for _ in range(100):
        await on_one.ship(writer.make(10_000))
        writer.events.clear()
    await on_one.parts.all_inserted(300.0)
    started = asyncio.get_running_loop().time()
    proof = await on_one.keeper.verify()
    took_s = asyncio.get_running_loop().time() - started
    print(f"1,000,000 events verified in {took_s:.1f} s")
    assert (proof.total, proof.events) == (0, 1_000_000)
    assert took_s < 60.0  # 30 s is the promise, kept with two processors to itself: measured 17 s, and 26 s at load 6
