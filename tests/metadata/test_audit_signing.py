"""A checkpoint on our disk gets into the database, too, whatever came between; else the log looks tampered with."""

from pathlib import Path

import pytest

from runtime.errors import ResourceExhausted
from services.metadata.facts import Facts
from services.metadata.journal import Fact
from services.metadata.kinds import AUDIT_CHECKPOINT
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
