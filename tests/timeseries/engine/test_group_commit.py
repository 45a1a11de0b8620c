"""A group of batches is one transaction, whichever way it is written; what is remembered of senders is never wrong."""

import asyncio
from pathlib import Path
from typing import Any

import apsw
import pytest

from runtime.clock import ManualClock
from runtime.errors import InvalidArgument, ResourceExhausted
from services.timeseries.engine import Engine, EngineSettings, roster
from services.timeseries.engine.catalog import Additions, Catalog
from services.timeseries.engine.journal import Journal
from services.timeseries.engine.journal_reader import JournalRow
from services.timeseries.engine.roster import Rosters
from tests.harness import eventually
from tests.timeseries.engine.model import EVERYTHING, Model, assert_same, everything, metric_set, rows

NOON = 19_700 * 86_400_000 + 43_200_000
SET = metric_set("cpu_usage", "memory_usage")
OTHER_SET = metric_set("load_1m")
QUIET = EngineSettings(maintenance_interval_s=1e9)


def row(sequence: int) -> JournalRow:
    payload = bytes([sequence % 256]) * 30_000
    return JournalRow(
        sequence=sequence, received_ms=NOON, metric_set=None, row_count=0, points=sequence, payload=payload
    )


@pytest.mark.parametrize("size", [1, 2, 16, 17, 40])
def test_a_group_is_stored_as_a_whole_or_not_at_all(tmp_path: Path, size: int) -> None:
    nothing_new = Additions(Catalog())
    journal = Journal(tmp_path / "journal.db", may_create=True, now_ms=0)
    group = [row(sequence) for sequence in range(1, size + 1)]
    journal.commit(nothing_new, group)
    with pytest.raises(apsw.ConstraintError):
        journal.commit(nothing_new, [*(row(sequence) for sequence in range(size + 1, 2 * size)), row(1)])
    assert journal.last_sequence == size
    assert list(journal.rows()) == group
    journal.commit(nothing_new, [row(size + 1)])
    journal.close()
    again = Journal(tmp_path / "journal.db", may_create=False, now_ms=0)
    assert list(again.rows()) == [*group, row(size + 1)]
    again.close()


async def test_a_sender_whose_first_commit_failed_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The numbers it would have had go to others."""
    model = Model()
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:

        async def append(of_set: Any, *servers: str) -> None:
            batch = rows(of_set, [(s, NOON + engine.last_sequence, [float(ord(s))] * len(of_set)) for s in servers])
            await engine.append(batch, metric_sets=(of_set,))
            model.append(of_set, batch)

        await append(SET, "a")
        with monkeypatch.context() as patches:

            def full(*_: object) -> None:
                raise apsw.FullError("disk full")

            patches.setattr(Journal, "commit", full)
            for of_set, servers in ((SET, ("b", "c")), (OTHER_SET, ("a",))):
                with pytest.raises(ResourceExhausted):
                    await append(of_set, *servers)
        for _ in range(3):
            await append(SET, "x", "a")
            await append(OTHER_SET, "y")
            await append(SET, "b", "c")
            await append(OTHER_SET, "a")
            await append(SET, "c", "b")
        assert_same(await everything(engine), model.query(EVERYTHING))
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        assert_same(await everything(engine), model.query(EVERYTHING))


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster, "KEPT_ROWS", 100)
    monkeypatch.setattr(roster, "LONGEST_ROWS", 40)
    catalog = Catalog()
    additions = Additions(catalog)
    additions.add_set(SET)
    stored, known = additions.stored_set(SET.id), tuple(f"s{number}" for number in range(200))
    rosters = Rosters()
    rosters.of(known, stored, additions)
    additions.publish()

    def ask(first: int, size: int) -> bool:
        """Whether it was remembered."""
        before = rosters.of(known[first : first + size], stored, Additions(catalog))
        assert [cohort.server_id for cohort in before.cohorts] == list(known[first : first + size])
        assert [catalog.server_ids[number] for number in before.servers.tolist()] == list(known[first : first + size])
        return before is rosters.of(known[first : first + size], stored, Additions(catalog))

    assert ask(0, 40) and ask(1, 40)
    assert not ask(0, 41)
    kept = rosters.of(known[0:40], stored, Additions(catalog))
    assert ask(2, 40), "the third is one too many"
    assert rosters.of(known[0:40], stored, Additions(catalog)) is kept, "what was asked for last stays"
    assert len(rosters._kept) == 2


async def test_a_group_is_answered_at_once_and_each_caller_gets_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=QUIET) as engine:
        await engine.append(metric_sets=(SET, OTHER_SET))
        groups: list[int] = []
        real = Journal.commit

        def counted(journal: Journal, additions: Additions, group: list[JournalRow]) -> None:
            groups.append(len(group))
            real(journal, additions, group)

        monkeypatch.setattr(Journal, "commit", counted)
        engine._writer._wake.acquire()  # until all are in line
        tasks = []
        try:
            for number in range(6):
                misfit = number == 3
                batch = rows(OTHER_SET if misfit else SET, [("a", NOON + number, [1.0] * (1 if misfit else 2))])
                batch = type(batch)(**{**vars(batch), "metric_set_id": SET.id})
                tasks.append(asyncio.create_task(engine.append(batch)))
            await asyncio.sleep(0)
            await eventually(lambda: len(engine._writer._appends) == 6)
        finally:
            engine._writer._wake.release()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert groups == [5]
    assert isinstance(outcomes.pop(3), InvalidArgument)
    assert outcomes == [2, 3, 4, 5, 6]
