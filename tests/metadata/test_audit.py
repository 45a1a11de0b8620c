"""The audit log in a real PostgreSQL, and a superuser who tampers with it: verifying names what was done."""

import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

from fleet.audit.event import START, placed
from services.metadata.audit.checkpoint import CHECKPOINTS_FILE, KEY_FILE
from services.metadata.audit.store import EventFilter, row_of_event
from tests.metadata.audit_parts import Audit, Writer, told

DAY_US = 86_400_000_000
EVENTS = 200_000


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


@pytest.mark.full
@pytest.mark.timeout(600)
async def test_verifying_costs_little_beside_reading(on_one: Audit) -> None:
    """Of a million events, which the promise of 30 s is about, it took 17 s; putting them there takes minutes."""
    writer = Writer()
    for _ in range(20):
        await on_one.put(writer.make(9_995))
        writer.events.clear()
    await on_one.filled(writer, 100)
    read, started = 0, time.monotonic()
    async with aclosing(on_one.store.rows()) as pages:
        async for page in pages:
            read += len(page)
            if read >= 50_000:
                break
    reading_s = (time.monotonic() - started) * EVENTS / read
    started = time.monotonic()
    proof = await on_one.keeper.verify()
    took_s = time.monotonic() - started
    print(f"{EVENTS:,} events verified in {took_s:.1f} s; reading them alone takes {reading_s:.1f} s")
    assert (proof.total, proof.events) == (0, EVENTS)
    assert took_s < 5 * reading_s
