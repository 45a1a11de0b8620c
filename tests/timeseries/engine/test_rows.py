"""Rows with their sequences, and what was valid of their servers then: what a back-fill is made of."""

import math
from contextlib import closing
from pathlib import Path

import apsw
import numpy as np
import pytest

from fleet.model import ServerDescriptor
from runtime.clock import ManualClock
from services.timeseries.engine import Engine, EngineSettings
from services.timeseries.engine import rows as module
from services.timeseries.engine import told as module_of_told
from services.timeseries.engine.told import Told
from services.timeseries.external import tags_of
from tests.timeseries.engine.model import NAN, metric_set, rows

DAY_MS = 86_400_000
NOON = 19_700 * DAY_MS + DAY_MS // 2
SETTINGS = EngineSettings(maintenance_interval_s=1e9, head_rows=4, merge_blocks=2, journal_keep_s=0.0)
FULL, PART = metric_set("cpu_usage", "memory_usage"), metric_set("memory_usage", "load")


def said(server: str, role: str) -> ServerDescriptor:
    return ServerDescriptor(server_id=server, hostname=server, role=role)


async def replayed(engine: Engine, server: str, end_ms: int = 1 << 50) -> dict[tuple[int, str], float]:
    """What a store that takes one row after the other ends with; asserts their order."""
    found: dict[tuple[int, str], float] = {}
    before = (0, 0)
    async for part in engine.stored_rows(server, 0, end_ms):
        for time, sequence, values in zip(
            part.times_ms.tolist(), part.sequences.tolist(), part.values.tolist(), strict=True
        ):
            assert (time, sequence) > before
            before = (time, sequence)
            found |= {
                (time, key): value for key, value in zip(part.metric_set.keys, values, strict=True) if value == value
            }
    return found


@pytest.mark.parametrize("place", ["heads", "blocks", "both"])
@pytest.mark.parametrize("cells", [module.CELLS_AT_ONCE, 20])
async def test_rows_come_with_their_sequences_in_the_order_in_which_the_later_wins(
    tmp_path: Path, place: str, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CELLS_AT_ONCE", cells)
    expected: dict[tuple[int, str], float] = {}
    async with Engine.open(tmp_path, clock=ManualClock(NOON), settings=SETTINGS) as engine:
        for number in range(60):
            of_set = FULL if number % 3 else PART
            time = NOON + (number * 7 % 40) * 1_000  # later ones meet the times of earlier ones, of both sets
            values = [float(number), NAN if number % 5 == 0 else number + 0.5]
            sequence = await engine.append(rows(of_set, [("a", time, values)]), metric_sets=(of_set,))
            assert sequence == number + 1
            expected |= {(time, k): v for k, v in zip(of_set.keys, values, strict=True) if not math.isnan(v)}
            if place != "heads" and number in (25, 40, 59 if place == "blocks" else 40):
                await engine.maintain(everything=True)
        assert await replayed(engine, "a") == expected
        early = {name: value for name, value in expected.items() if name[0] < NOON + 9_000}
        assert await replayed(engine, "a", NOON + 9_000) == early
        assert await replayed(engine, "nobody") == {}


async def test_what_a_server_said_is_known_after_its_batches_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of_told, "KEPT_DESCRIPTORS", 3)
    clock = ManualClock(NOON)

    async def append(engine: Engine, *roles: str) -> None:
        await engine.append(rows(FULL, [("a", clock.now_ms(), [1.0, 2.0])]), metric_sets=(FULL,))
        for role in roles:
            await engine.append(servers=[said("a", role)])
        clock.advance(1)
        await engine.maintain(everything=True)
        assert engine.first_sequence == engine.last_sequence + 1

    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        await append(engine, "web", "db")  # sequences 2, 3
        await append(engine, "cache")  # 5
        told = (await engine.told())["a"]
        descriptors, likely = told.at(np.array([1, 2, 3, 4, 5, 9]))
        assert [one and one.role for one in descriptors] == [None, "web", "db", "db", "cache", "cache"]
        assert not likely.any()
        await append(engine, "queue")  # 7: one too many
        told = (await engine.told("a"))["a"]
        descriptors, likely = told.at(np.array([1, 2, 3, 7]))
        assert [one and one.role for one in descriptors] == ["db", "db", "db", "queue"]
        assert likely.tolist() == [True, True, False, False], "what came before is only likely"
        assert await engine.told("nobody") == {} and await tags_of(engine, "nobody") == []
        assert await tags_of(engine, "a") == [("", "db"), ("", "cache"), ("", "queue")]
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        assert engine.servers() == {"a": said("a", "queue")}
        again: Told = (await engine.told())["a"]
        assert again.descriptors == told.descriptors and again.is_cut


async def test_a_journal_that_had_forgotten_says_so_and_a_new_one_does_not(tmp_path: Path) -> None:
    clock = ManualClock(NOON)
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        await engine.append(rows(FULL, [("a", NOON, [1.0, 2.0])]), metric_sets=(FULL,), servers=[said("a", "web")])
        clock.advance(1)
        await engine.maintain(everything=True)
        await engine.append(servers=[said("b", "web")])
        await engine.append(servers=[said("c", "web")])
        assert not any(told.is_cut for told in (await engine.told()).values())
    with closing(apsw.Connection(str(tmp_path / "journal.db"))) as database:
        database.execute("DROP TABLE descriptors_cut")
    async with Engine.open(tmp_path, clock=clock, settings=SETTINGS) as engine:
        cut = {server: told.is_cut for server, told in (await engine.told()).items()}
        assert cut == {"a": True, "b": True, "c": False}, "what came after all that is swept cannot be a later one"
