"""Backup while things move: rows become blocks and roll-ups, days go, right between the copies of two files.

Each promise of the essay in backup.py has a bug here that breaks it, put in on purpose: the same check must find it.
"""

import dataclasses
from collections.abc import Callable, Collection
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from runtime.clock import ManualClock
from services.timeseries.archive import backup, journal_copy
from services.timeseries.archive.journal_copy import Gone, JournalCopy
from services.timeseries.engine import Engine
from tests.timeseries.engine.model import everything
from tests.timeseries.interleaved import Interleaved, Plant, wrong_with
from tests.timeseries.stores import DAY_MS, NOON, OTHER_SET, QUIET, goes_on, ignore, restore, verify

pytestmark = pytest.mark.usefixtures("unsynced")
TODAY = NOON // DAY_MS
YESTERDAY = TODAY - 1
OF_YESTERDAY, OF_TODAY, OF_TOMORROW = (f"blocks/2023-12-{day:02d}.db" for day in (8, 9, 10))
FIVE_MINUTES, HOURS = "rollup-5m/2023-12-05.db", "rollup-1h/2023-10-18.db"
COPIES = ("journal.db", OF_YESTERDAY, OF_TODAY, FIVE_MINUTES, HOURS)


async def moves_between_the_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], *, swept: bool
) -> set[str]:
    """Rows in blocks and rows in heads; after the first copy the heads close, more comes and closes; and so on.

    Returns what is wrong with the backup; a plant is a bug put in on purpose.
    """
    settings = QUIET if swept else dataclasses.replace(QUIET, journal_keep_s=3_600.0)
    clock = ManualClock(NOON)
    async with Engine.open(tmp_path / "live", clock=clock, settings=settings) as engine:
        it = Interleaved(engine, tmp_path / "live", monkeypatch)
        plant(monkeypatch)
        for server in "abab":
            await it.append(server)
            await it.append(server, days=1)
        await it.close_and_sweep()
        for server in "ab":
            await it.append(server)
            await it.append(server, days=1)

        async def after_first() -> None:
            clock.advance(1)
            for _ in range(3):
                await it.append("a")
            await it.append("c", OTHER_SET)
            await it.close_and_sweep()

        async def after_second() -> None:
            clock.advance(1)
            await it.append("a", kept=not swept)
            await it.append("d", OTHER_SET, days=1)
            await it.close_and_sweep()

        async def after_third() -> None:
            clock.advance(1)
            await it.append("e", days=1, kept=not swept)
            await it.close_and_sweep()

        async def after_others() -> None:
            await it.append("f", days=1, kept=False)
            await it.close_and_sweep()

        it.after_each = [after_first, after_second, after_third, after_others, after_others]
        await it.back_up(tmp_path / "backup")
        assert not it.after_each
    wrong = {"damaged"} if verify(tmp_path / "backup")[1] else set()
    restored = restore(tmp_path / "backup", tmp_path / "store")
    async with Engine.open(tmp_path / "store", clock=clock, settings=QUIET) as engine:
        found, status = await everything(engine), await engine.status()
    for name, points in it.model.series.items():
        if points.items() - dict(found.get(name, [])).items():
            wrong.add("missing")
    assert status.points == restored.points
    if status.points != sum(map(len, found.values())):
        wrong.add("doubled")
    for (server, key), series in found.items():
        it.model.series.setdefault((server, key), {}).update(series)
    try:
        await goes_on(tmp_path / "store", it.model)
    except AssertionError:
        wrong.add("later")
    return wrong


@pytest.mark.parametrize("swept", [True, False])
async def test_rows_that_move_between_two_copies_are_there_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swept: bool
) -> None:
    assert await moves_between_the_copies(tmp_path, monkeypatch, ignore, swept=swept) == set()


def partitions_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the journal is copied last, when what became blocks meanwhile is swept."""
    copy, finish, live = backup._copy_database, JournalCopy.finish, []

    def all_but_the_journal(source: Path, target: Path, step: Callable[[int, int], None]) -> None:
        if source.name == "journal.db":
            live.extend((source, target))
            apsw.Connection(str(target)).close()
        else:
            copy(source, target, step)

    def the_journal(journal: JournalCopy, partitions: Collection[tuple[int, int]]) -> tuple[str, int]:
        copy(*live, ignore)
        return finish(journal, partitions)

    monkeypatch.setattr(backup, "_copy_database", all_but_the_journal)
    monkeypatch.setattr(JournalCopy, "catch_up", ignore)
    monkeypatch.setattr(JournalCopy, "gone", lambda *_: Gone(0, going=False))
    monkeypatch.setattr(JournalCopy, "finish", the_journal)


def no_catching_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: partitions newer than the journal that names their cohorts and gives their sequences."""
    monkeypatch.setattr(JournalCopy, "catch_up", ignore)


def no_note_of_the_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: the copy's journal ends before sequences that blocks have."""
    monkeypatch.setattr(journal_copy, "_note_hole", ignore)


@pytest.mark.parametrize(
    ("plant", "found"),
    [(partitions_first, "missing"), (no_catching_up, "later"), (no_note_of_the_hole, "later")],
)
async def test_a_wrong_order_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], found: str
) -> None:
    assert found in await moves_between_the_copies(tmp_path, monkeypatch, plant, swept=True)


def by_name(patches: pytest.MonkeyPatch) -> None:
    patches.setattr(backup, "_ORDER", (0, 2, 1))


def coarsest_first(patches: pytest.MonkeyPatch) -> None:
    patches.setattr(backup, "_ORDER", (2, 1, 0))


@pytest.mark.parametrize(
    ("plant", "found"), [(ignore, None), (by_name, "tier 1 gone"), (coarsest_first, "tier 0 gone")]
)
async def test_roll_ups_that_are_made_between_two_copies_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant, found: str | None
) -> None:
    """Yesterday's points wait for their 5 min, today's 5 min for their hours; files come after a tier was listed."""
    async with Engine.open(tmp_path / "live", clock=ManualClock(NOON), settings=QUIET) as engine:
        it = Interleaved(engine, tmp_path / "live", monkeypatch)
        plant(monkeypatch)
        for day in (YESTERDAY, TODAY):
            await it.add(day, 0)
        await it.close_and_sweep()
        await it.add(TODAY, 1)
        await it.close()
        await it.roll(0)
        await it.add(YESTERDAY, 1)
        await it.close()

        async def new_days() -> None:
            for day in (YESTERDAY - 3, TODAY + 100):
                await it.add(day, 0)
                await it.close()

        async def later_days() -> None:
            for day in (YESTERDAY - 2, TODAY + 99):
                await it.add(day, 0)
                await it.close()

        it.after = {
            "journal.db": new_days,
            OF_YESTERDAY: later_days,
            FIVE_MINUTES: lambda: it.roll(0),
            HOURS: lambda: it.roll(1),
        }
        await it.back_up(tmp_path / "backup")
        assert not it.after and len(it.copied) == 7
        model = it.model
    wrong = await wrong_with(tmp_path, model, range(1 << 20))
    assert wrong == set() if found is None else found in wrong


async def test_of_an_older_program_that_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its journal lacks the newer tables when the backup begins, and has them before it ends."""
    async with Engine.open(tmp_path / "live", clock=ManualClock(NOON), settings=QUIET) as engine:
        it = Interleaved(engine, tmp_path / "live", monkeypatch)
        await it.add(YESTERDAY, 0)
        await it.close_and_sweep()
        await it.add(YESTERDAY, 1)
    with closing(apsw.Connection(str(tmp_path / "live" / "journal.db"))) as journal:
        journal.execute("DROP TABLE ended; DROP TABLE evictions")

    async def it_is_updated() -> None:
        async with Engine.open(tmp_path / "live", clock=ManualClock(NOON), settings=QUIET):
            pass

    it.after = {OF_YESTERDAY: it_is_updated}
    await it.back_up(tmp_path / "backup")
    assert not it.after
    assert await wrong_with(tmp_path, it.model, range(1 << 20)) == set()
