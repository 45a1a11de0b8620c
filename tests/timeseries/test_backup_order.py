"""Backup while things move: rows become blocks and roll-ups, days go, right between the copies of two files.

Each promise of the essay in backup.py has a bug here that breaks it, put in on purpose: the same check must find it.
"""

import dataclasses
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import apsw
import numpy as np
import pytest

from runtime.clock import ManualClock
from services.timeseries.engine import Aggregation, Engine, Query, backup, journal_copy
from services.timeseries.engine import partition as partitions_module
from services.timeseries.engine.journal_copy import Gone, JournalCopy
from tests.timeseries.engine.model import Model, ask, assert_same, everything, rows
from tests.timeseries.interleaved import HOUR_MS, MINUTE_MS, Interleaved
from tests.timeseries.stores import DAY_MS, NOON, OTHER_SET, QUIET, SET, back_up, goes_on, ignore, restore, verify

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

    def the_journal(journal: JournalCopy) -> tuple[str, int]:
        copy(*live, ignore)
        return finish(journal)

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


WINDOWS = (Aggregation.COUNT, Aggregation.SUM, Aggregation.MAX, Aggregation.LAST)


async def wrong_windows(engine: Engine, model: Model, steps: Iterable[int]) -> bool:
    for aggregation in WINDOWS:
        for step_ms in steps:
            query = Query(metrics=None, start_ms=0, end_ms=2 * NOON, step_ms=step_ms, aggregation=aggregation)
            try:
                assert_same(await ask(engine, query), model.query(query), aggregation)
            except AssertionError:
                return True
    return False


BOTH = (5 * MINUTE_MS, HOUR_MS)


async def wrong_with(tmp_path: Path, model: Model, days: Iterable[int], steps: tuple[int, ...] = BOTH) -> set[str]:
    """What is wrong with the backup once it is restored: its points, which should be those of `days`, whole; and all
    windows of whole buckets: at once, when its roll-ups are made, when its points are gone, when the 5 min are too."""
    wrong = {"damaged"} if verify(tmp_path / "backup")[1] else set()
    restore(tmp_path / "backup", tmp_path / "store")
    async with Engine.open(tmp_path / "store", clock=ManualClock(NOON), settings=QUIET) as engine:
        it = Interleaved(engine, tmp_path / "store", None)
        for name, series in model.series.items():
            wanted = {(time, value) for time, value in series.items() if time // DAY_MS in days}
            found = set((await everything(engine)).get(name, []))
            wrong |= {"missing"} if wanted - found else set()
            wrong |= {"more"} if found - wanted else set()
        wrong |= {"at once"} if await wrong_windows(engine, model, (HOUR_MS,)) else set()
        await engine.maintain(everything=True)
        wrong |= {"rolled up"} if await wrong_windows(engine, model, steps) else set()
        for level, left in ((0, steps), (1, (HOUR_MS,))):
            for day in engine._store.tiers[level].partitions.days(0, 1 << 20):
                await it.evict(level, day)
            wrong |= {f"tier {level} gone"} if await wrong_windows(engine, model, left) else set()
        status = await engine.status()
        assert (status.damaged, status.last_error) == (0, None)
    return wrong


Plant = Callable[[pytest.MonkeyPatch], None]


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


def no_notes(patches: pytest.MonkeyPatch) -> None:
    """The planted bug: the copy does not know that a day went whose last rows it has in the journal."""
    patches.setattr(journal_copy, "_take_note", ignore)


def every_note(patches: pytest.MonkeyPatch) -> None:
    """The planted bug: of a day that is in the copy is noted that it went, as it did later."""
    real = JournalCopy.catch_up

    def catch_up(journal: JournalCopy, _level: int, _settled: object) -> None:
        for level in range(3):
            real(journal, level, ())

    patches.setattr(JournalCopy, "catch_up", catch_up)


def no_second_look(patches: pytest.MonkeyPatch) -> None:
    """The planted bug: nobody asks whether the file that was copied was on its way out."""
    patches.setattr(JournalCopy, "gone", lambda *_: Gone(0, going=False))


def not_unlinked(_: Path) -> None:
    raise OSError("killed here")


@pytest.mark.parametrize(
    ("moment", "unlinked", "plant", "found"),
    [
        *((moment, unlinked, ignore, None) for moment in COPIES for unlinked in (True, False)),
        ("journal.db", True, no_notes, "tier 0 gone"),
        (OF_YESTERDAY, True, no_second_look, "missing"),
        (FIVE_MINUTES, True, every_note, "tier 0 gone"),
        (FIVE_MINUTES, False, every_note, "missing"),
    ],
)
async def test_a_day_that_goes_meanwhile_is_in_the_copy_or_gone_with_its_roll_ups_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, unlinked: bool, plant: Plant, found: str | None
) -> None:
    """Yesterday goes after the copy of some file; the journal has some of its rows, and marks some of its buckets."""
    async with Engine.open(tmp_path / "live", clock=ManualClock(NOON), settings=QUIET) as engine:
        it = Interleaved(engine, tmp_path / "live", monkeypatch)
        plant(monkeypatch)
        for day in (YESTERDAY, TODAY):
            await it.add(day, 0)
        engine._store.clock.advance(1)
        await it.close_and_sweep()
        assert engine.first_sequence > 2
        for day in (YESTERDAY, TODAY):
            await it.add(day, 1)
        await it.close()
        await it.add(YESTERDAY, 2)

        async def go() -> None:
            with monkeypatch.context() as patches:
                if not unlinked:
                    patches.setattr(partitions_module, "remove_files", not_unlinked)
                await it.evict(0, YESTERDAY)

        it.after = {moment: go}
        manifest = await it.back_up(tmp_path / "backup")
        assert not it.after
        model = it.model
    copied = OF_YESTERDAY in [file.name for file in manifest.files]
    assert copied == (moment in (OF_TODAY, FIVE_MINUTES, HOURS)) or found
    wrong = await wrong_with(tmp_path, model, range(TODAY - copied, 1 << 20))
    assert wrong == set() if found is None else found in wrong


@pytest.mark.parametrize(
    ("moment", "plant", "found"),
    [
        *((moment, ignore, None) for moment in COPIES),
        (OF_TODAY, no_notes, "tier 1 gone"),
        (HOURS, every_note, "tier 1 gone"),
    ],
)
async def test_a_file_of_roll_ups_that_goes_meanwhile_leaves_the_hours_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, plant: Plant, found: str | None
) -> None:
    """The 5 min go after the copy of some file; the points have marks for some of them, they for some hours.

    Where marks of the points were copied and the 5 min were not, an hour lacks points until the first upkeep.
    """
    async with Engine.open(tmp_path / "live", clock=ManualClock(NOON), settings=QUIET) as engine:
        it = Interleaved(engine, tmp_path / "live", monkeypatch)
        plant(monkeypatch)
        for day in (YESTERDAY, TODAY):
            await it.add(day, 0)
        await it.close_and_sweep()
        await it.add(TODAY, 1)
        await it.close()
        await it.roll(0)
        await engine.append(rows(SET, [("a", YESTERDAY * DAY_MS + 10 * HOUR_MS + 1, [-9.0, -9.0, -9.0])]))
        it.model.append(SET, rows(SET, [("a", YESTERDAY * DAY_MS + 10 * HOUR_MS + 1, [-9.0, -9.0, -9.0])]))
        await it.close()
        it.after = {moment: lambda: it.evict(1, TODAY // 8 * 8)}
        await it.back_up(tmp_path / "backup")
        assert not it.after
    wrong = await wrong_with(tmp_path, it.model, range(1 << 20), (HOUR_MS,)) - {"at once"}
    assert wrong == set() if found is None else found in wrong


@pytest.mark.parametrize("plant", [False, True])
@pytest.mark.parametrize(("of", "steps"), [(OF_YESTERDAY, BOTH), (FIVE_MINUTES, (HOUR_MS,))])
async def test_what_was_made_of_a_partition_that_cannot_be_read_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str, steps: tuple[int, ...], plant: bool
) -> None:
    """The journal has a few rows of yesterday and a mark is left, for which no bucket must be made anew."""
    async with Engine.open(tmp_path / "live", clock=ManualClock(NOON), settings=QUIET) as engine:
        it = Interleaved(engine, tmp_path / "live", None)
        for day in (YESTERDAY, TODAY):
            await it.add(day, 0)
        await it.close_and_sweep()
        await it.add(YESTERDAY, 1)
        await it.close()
        await it.roll(0)
        await it.roll(1)
        await engine.append(rows(SET, [("a", YESTERDAY * DAY_MS + 10 * HOUR_MS + 30_000, [-9.0, -9.0, -9.0])]))
        await it.close()
    (tmp_path / "live" / of).write_bytes(b"this is no database" * 1_000)
    with monkeypatch.context() as patches:
        if plant:
            patches.setattr(JournalCopy, "leave_out", ignore)
        assert back_up(tmp_path / "live", tmp_path / "backup").left_out == (of,)
    restore(tmp_path / "backup", tmp_path / "store")
    async with Engine.open(tmp_path / "store", clock=ManualClock(NOON), settings=QUIET) as engine:
        await engine.maintain(everything=True)
        assert await wrong_windows(engine, it.model, steps) == plant
        late, _ = await engine.too_late(("a",), np.array([YESTERDAY * DAY_MS + 10 * HOUR_MS]))
        assert late.all() != plant, "its points are gone"


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
