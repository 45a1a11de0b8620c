"""`make bench-metadata` works from end to end with a tiny load, and what is missing voids what was measured."""

import asyncio
import math
from pathlib import Path
from typing import Any

import orjson
import pytest

from bench.__main__ import Progress
from bench.api import reported
from bench.metadata import command, record_row, search_row
from bench.metadata.rows import ROWS
from bench.metadata.size import Size
from bench.peers import BenchError

TINY = Size(rounds=1, interactions=200, at_once=10, searched=2_000, searches=30, servers=500)


@pytest.mark.full
@pytest.mark.timeout(200)
async def test_every_row_runs(tmp_path: Path) -> None:
    found = await asyncio.to_thread(command.run, TINY, tuple(ROWS), tmp_path, Progress())
    found = orjson.loads(orjson.dumps(found))
    assert [row["row"] for row in found["table"]] == ["record", "search", "servers"]
    for row in found["table"]:
        assert row["ratio"] is not None, row
        assert math.isfinite(row["ratio"]) and row["ratio"] > 0, row
    assert "| interactions recorded, until PostgreSQL has them |" in reported.show(found)
    assert set(found["results"]["search"]["took_ms"]) >= {"frequent", "none"}


async def test_what_is_lost_or_doubled_voids_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Connection:
        def __init__(self, there: int) -> None:
            self.there = there

        async def fetchval(self, *_: object) -> int:
            return self.there

    async def record(_number: int, _session: str) -> None: ...

    bench: Any = type("Bench", (), {"size": TINY})
    monkeypatch.setattr(record_row, "SHIPPED_WITHIN_S", 0.05)
    assert (await record_row._turn(bench, 5, record, Connection(5)))[0] > 0
    for there in (4, 6):
        with pytest.raises(BenchError):
            await record_row._turn(bench, 5, record, Connection(there))


def test_the_judgement_is_of_all_questions() -> None:
    slow = {"total": 10, "took_ms": {"rare": [1.0] * 90, "none": [60.0] * 10}}
    (row,) = search_row.judged(slow)
    assert not row.met
    assert "slowest: none" in row.remark
    slow["took_ms"]["none"] = [60.0] * 3  # type: ignore[index]
    assert search_row.judged(slow)[0].met
