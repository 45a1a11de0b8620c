"""Backup while days go: each is in the copy wholly, or is not there and what was made of it is whole.

As in test_backup_order.py, each bug that is put in on purpose must be found by the same check.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from runtime.clock import ManualClock
from services.timeseries.archive import backup, journal_copy
from services.timeseries.archive.journal_copy import Gone, JournalCopy
from services.timeseries.engine import Engine
from services.timeseries.engine import partitions as partitions_module
from tests.timeseries.engine.model import rows
from tests.timeseries.interleaved import BOTH, HOUR_MS, Interleaved, Plant, wrong_windows, wrong_with
from tests.timeseries.stores import DAY_MS, NOON, QUIET, SET, back_up, ignore, restore

pytestmark = pytest.mark.usefixtures("unsynced")
TODAY = NOON // DAY_MS
YESTERDAY = TODAY - 1
OF_YESTERDAY, OF_TODAY, OF_TOMORROW = (f"blocks/2023-12-{day:02d}.db" for day in (8, 9, 10))
FIVE_MINUTES, HOURS = "rollup-5m/2023-12-05.db", "rollup-1h/2023-10-18.db"
COPIES = ("journal.db", OF_YESTERDAY, OF_TODAY, FIVE_MINUTES, HOURS)


def no_notes(patches: pytest.MonkeyPatch) -> None:
    """The planted bug: the copy does not know that a day went whose last rows it has in the journal, nor misses it."""
    patches.setattr(journal_copy, "_take_note", ignore)
    patches.setattr(backup.TierCopy, "missing", lambda _tier: {})


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
        assert not it.after and (found or not manifest.left_out)
        model = it.model
    copied = OF_YESTERDAY in [file.name for file in manifest.files]
    assert copied == (moment in (OF_TODAY, FIVE_MINUTES, HOURS)) or found
    wrong = await wrong_with(tmp_path, model, range(TODAY - copied, 1 << 20))
    assert wrong == set() if found is None else found in wrong


LONG_FILE, NEXT_FILE = "blocks/2023-11-19.db", "blocks/2023-12-21.db"


def first_day_only(patches: pytest.MonkeyPatch) -> None:
    """The planted bug: a file is taken for one of its first day alone."""
    patches.setattr(backup.TierCopy, "_days_of", lambda _tier, _copy, day: range(day, day + 1))


@pytest.mark.parametrize(
    ("moment", "plant", "found"),
    [
        *((moment, ignore, None) for moment in ("journal.db", LONG_FILE, NEXT_FILE, FIVE_MINUTES)),
        ("journal.db", no_notes, "tier 0 gone"),
        (NEXT_FILE, first_day_only, "missing"),
    ],
)
async def test_a_file_of_several_days_goes_with_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, plant: Plant, found: str | None
) -> None:
    """Few points, so that a file has 32 days; after it there is one more to be copied."""
    settings = dataclasses.replace(QUIET, sparse_points_a_day=1 << 40)
    async with Engine.open(tmp_path / "live", clock=ManualClock(NOON), settings=settings) as engine:
        it = Interleaved(engine, tmp_path / "live", monkeypatch)
        plant(monkeypatch)
        for day in (YESTERDAY, TODAY, TODAY + 20):
            await it.add(day, 0)
        engine._store.clock.advance(1)
        await it.close_and_sweep()
        assert engine.first_sequence > 2
        for day in (YESTERDAY, TODAY):
            await it.add(day, 1)
        await it.close()
        await it.add(YESTERDAY, 2)
        it.after = {moment: lambda: it.evict(0, TODAY // 32 * 32)}
        manifest = await it.back_up(tmp_path / "backup")
        assert not it.after
    copied = LONG_FILE in [file.name for file in manifest.files]
    assert copied == (moment in (NEXT_FILE, FIVE_MINUTES))
    wrong = await wrong_with(tmp_path, it.model, range(0 if copied else TODAY + 1, 1 << 20))
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


@pytest.mark.parametrize(("of", "plant"), [(OF_YESTERDAY, False), (OF_YESTERDAY, True), (FIVE_MINUTES, False)])
async def test_what_was_made_of_a_partition_that_cannot_be_read_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str, plant: bool
) -> None:
    """The journal has a few rows of yesterday and a mark is left, for which no bucket must be made anew where the other
    points are gone; roll-ups that cannot be read are made of all points."""
    late_row = rows(SET, [("a", YESTERDAY * DAY_MS + 10 * HOUR_MS + 30_000, [-9.0, -9.0, -9.0])])
    async with Engine.open(tmp_path / "live", clock=ManualClock(NOON), settings=QUIET) as engine:
        it = Interleaved(engine, tmp_path / "live", None)
        for day in (YESTERDAY, TODAY):
            await it.add(day, 0)
        await it.close_and_sweep()
        await it.add(YESTERDAY, 1)
        await it.close()
        await it.roll(0)
        await it.roll(1)
        await engine.append(late_row)
        await it.close()
    if of == FIVE_MINUTES:
        it.model.append(SET, late_row)
    (tmp_path / "live" / of).write_bytes(b"this is no database" * 1_000)
    with monkeypatch.context() as patches:
        if plant:
            patches.setattr(JournalCopy, "leave_out", ignore)
        assert back_up(tmp_path / "live", tmp_path / "backup").left_out == (of,)
    restore(tmp_path / "backup", tmp_path / "store")
    async with Engine.open(tmp_path / "store", clock=ManualClock(NOON), settings=QUIET) as engine:
        await engine.maintain(everything=True)
        assert await wrong_windows(engine, it.model, BOTH) == plant
        late, _ = await engine.too_late(("a",), np.array([YESTERDAY * DAY_MS + 10 * HOUR_MS]))
        assert late.all() == (of == OF_YESTERDAY and not plant), "its points are gone"
