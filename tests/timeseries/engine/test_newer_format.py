"""A store that a newer program wrote: an older one that is put back in its place says so, and touches nothing."""

from contextlib import closing
from pathlib import Path

import apsw
import pytest

from runtime.clock import ManualClock
from runtime.errors import FailedPrecondition
from services.timeseries.engine import Engine
from tests.timeseries.engine.damaged import DAY_MS, NOON, SET, SETTINGS
from tests.timeseries.engine.model import everything, rows


def of_format(path: Path, version: int) -> None:
    with closing(apsw.Connection(str(path))) as database:
        database.execute("UPDATE meta SET value = ? WHERE key = 'format_version'", (version,))
        database.pragma("wal_checkpoint", "TRUNCATE")


@pytest.mark.parametrize("tier", ["blocks", "rollup-5m"])
async def test_a_day_of_a_newer_format_is_neither_set_aside_nor_called_damaged(tmp_path: Path, tier: str) -> None:
    """Its file was renamed to .unusable-1 and a new one begun, which the newer program did not undo."""
    clock = ManualClock(NOON + DAY_MS)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        for second in range(3):
            await engine.append(rows(SET, [("a", NOON + second * 1_000, [1.0, 2.0, 3.0])]), metric_sets=(SET,))
        await engine.maintain(everything=True)
        written = await everything(engine)
    path = next((tmp_path / tier).glob("*.db"))
    of_format(path, 3)
    with pytest.raises(FailedPrecondition, match=rf"{tier}/{path.name} has format 3, this program reads up to 2"):
        async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
            await engine.append(rows(SET, [("a", NOON + 60_000, [1.0, 2.0, 3.0])]), metric_sets=(SET,))
            await engine.maintain(everything=True)
    assert list(tmp_path.glob("*/*unusable*")) == []
    of_format(path, 2)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        assert await everything(engine) == written
