"""A checkpoint on our disk gets into the database, too, whatever came between; else the log looks tampered with."""

import asyncio
import errno
import threading
from pathlib import Path

import orjson
import pytest

from runtime.errors import ResourceExhausted
from services.metadata.audit.checkpoint import CHECKPOINTS_FILE, Checkpoint
from services.metadata.facts import Facts
from services.metadata.journal import Fact
from services.metadata.kinds import AUDIT_CHECKPOINT
from tests.harness import eventually
from tests.harness.postgres import PostgresServer
from tests.metadata.audit_parts import Audit, Writer, auditing


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The journal has no room for checkpoints, until this is undone."""
    record = Facts.record

    async def refused(self: Facts, fact: Fact) -> Fact:
        if fact.kind == AUDIT_CHECKPOINT.name:
            raise ResourceExhausted("the journal is full", reason="JOURNAL_FULL")
        return await record(self, fact)

    monkeypatch.setattr(Facts, "record", refused)
    return monkeypatch


async def test_a_checkpoint_that_a_full_journal_refused_is_sent_later(full: pytest.MonkeyPatch, on_one: Audit) -> None:
    writer = Writer()
    for _ in range(3):
        await on_one.ship(writer.make(2))
        with pytest.raises(ResourceExhausted):
            await on_one.keeper.sign()
    await on_one.parts.all_inserted()
    assert await on_one.found() == set(), "it is on its way, and not removed"
    full.undo()
    await on_one.filled(writer, 2)
    assert await on_one.found() == set()
    assert (await on_one.keeper.verify()).unproved_events == 0


async def test_metadata_starts_while_its_journal_is_full(
    full: pytest.MonkeyPatch, embedded_server: PostgresServer, tmp_path: Path
) -> None:
    target, writer = await embedded_server.fresh_database(), Writer()
    async with auditing(target, embedded_server, tmp_path) as audit:
        await audit.ship(writer.make(2))
        with pytest.raises(ResourceExhausted):
            await audit.keeper.sign()
    async with auditing(target, embedded_server, tmp_path) as audit:
        full.undo()
        await audit.keeper.sign()
        await audit.parts.all_inserted()
        assert await audit.found() == set()


async def test_a_stop_while_a_checkpoint_is_written_gives_no_number_twice(
    embedded_server: PostgresServer, tmp_path: Path
) -> None:
    target, writer = await embedded_server.fresh_database(), Writer()
    begun, go_on = asyncio.Event(), threading.Event()
    async with auditing(target, embedded_server, tmp_path) as audit:
        await audit.filled(writer, 2)
        append, loop = audit.keeper._file.append, asyncio.get_running_loop()

        def slow(checkpoint: Checkpoint) -> None:
            loop.call_soon_threadsafe(begun.set)
            assert go_on.wait(30.0)
            append(checkpoint)

        audit.keeper._file.append = slow  # type: ignore[method-assign]
        await audit.ship(writer.make(2))
        signing = asyncio.create_task(audit.keeper.sign())
        await begun.wait()
        signing.cancel()
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.wait([signing])
        await eventually(lambda: len(lines_of(tmp_path)) == 2)
        await audit.filled(writer, 2)
    async with auditing(target, embedded_server, tmp_path) as audit:
        await audit.filled(writer, 2)
        assert await audit.found() == set()
    signed = [orjson.loads(line)["number"] for line in lines_of(tmp_path)]
    assert signed == list(range(1, len(signed) + 1))


async def test_a_checkpoint_whose_sync_failed_is_followed_by_another_one_with_its_number(
    embedded_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, writer = await embedded_server.fresh_database(), Writer()

    def failing(_descriptor: int) -> None:
        raise OSError(errno.EIO, "as a disk says it")

    async with auditing(target, embedded_server, tmp_path) as audit:
        await audit.filled(writer, 2)
        await audit.ship(writer.make(2))
        with monkeypatch.context() as broken:
            broken.setattr("os.fsync", failing)
            with pytest.raises(OSError, match="as a disk says it"):
                await audit.keeper.sign()
        await audit.filled(writer, 2)
    async with auditing(target, embedded_server, tmp_path) as audit:
        await audit.filled(writer, 2)
        assert await audit.found() == set()


def lines_of(folder: Path) -> list[str]:
    return (folder / CHECKPOINTS_FILE).read_text().splitlines()
