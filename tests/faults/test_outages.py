"""A store that is down stops nobody, and when it is back nothing is missing and nothing is there twice.

Each store alone, and all together, is killed, cut off, delayed and made to lose packets, for as many ticks as
FAULT_TICKS says (360, an hour's worth, with `make faults`), while senders send, readers read and facts are recorded.
The backlog is at least five times what a follower holds in memory.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest

from services.timeseries.followers.backend import MAX_SHIP_POINTS
from tests.faults.load import POINTS_A_TICK, p99
from tests.faults.stand import OPEN, Stand, stand
from tests.harness.fault_report import Row

TICKS: Final = int(os.environ.get("FAULT_TICKS", "40"))
BEFORE: Final = max(10, TICKS // 6)
FACTS_EVERY: Final = 4
MAX_SLOWER: Final = 5.0
"""Reads may take so much longer at p99, on a machine that others use too; the promise is 2 and the table says what it
was. A reader that waits for a store that hangs would be slower by a hundred times."""
LEAST_P99_S: Final = 0.1
"""What is faster than this is not looked at: at a few ms the p99 of some hundred reads is chance."""

TRIES: Final = 3
"""Outages, until one has passed without slow reads: the p99 of some hundred reads is three or four of them, which a
machine that others use may hold up; readers that wait for a store are slow in each."""

ALL: Final = tuple(OPEN)
QUICK: Final = [("all", "kill")]
FULL: Final = [
    ("redis", "half-open"),
    ("influxdb", "delay"),
    ("prometheus", "kill"),
    ("postgresql", "delay"),
    ("all", "half-open"),
]
CASES: Final = [(name, how) for name in (*ALL, "all") for how in ("kill", "cut", "delay", "half-open")]


def _marked(case: tuple[str, str]) -> object:
    """Some are in the quick tests, some in the full ones, all in `make faults`."""
    marks = [] if case in QUICK else [pytest.mark.full]
    marks += [] if case in (*QUICK, *FULL) else [pytest.mark.marathon]
    return pytest.param(*case, id="-".join(case), marks=marks)


@pytest.mark.timeout(600)
@pytest.mark.fault("in use, under load:")
@pytest.mark.parametrize(("store", "how"), [_marked(case) for case in CASES])
async def test_an_outage_loses_nothing_and_stops_nobody(tmp_path: Path, fault_row: Row, store: str, how: str) -> None:
    assert TICKS * POINTS_A_TICK >= 5 * MAX_SHIP_POINTS
    names = ALL if store == "all" else (store,)
    row = fault_row
    async with stand(tmp_path, *names, ticks=TRIES * (TICKS + 2 * BEFORE)) as made, _in_use(made):
        for _ in range(TRIES):
            is_slower = await _outage(made, row, names, how)
            if not is_slower:
                break
        row.sent, row.acknowledged = made.sender.sent_points, made.sender.acknowledged_points
        counted = {"engine": await made.engine()} | {name: await made.stores[name].count(made) for name in names}
        row.found = counted["engine" if store == "all" else store].found
        row.missing = sum(found.missing for found in counted.values())
        row.doubled = sum(found.doubled for found in counted.values())
        assert made.readers.failures == []
        assert (row.missing, row.doubled) == (0, 0), counted
        assert row.acknowledged == row.sent
        assert not is_slower, row


async def _outage(made: Stand, row: Row, names: tuple[str, ...], how: str) -> bool:
    """Breaks stores and mends them, and returns whether reads were slower meanwhile; notes in the row how it went."""
    with made.readers.phase() as healthy:
        await _go_on(made, BEFORE // 2)
    with made.readers.phase() as ill:
        began = time.monotonic()
        for name in names:
            await made.break_(name, how)
        shown = asyncio.create_task(made.shown(names))
        await _go_on(made, TICKS)
        row.shown_s = await shown
    row.down_s = time.monotonic() - began
    for name in names:
        await made.mend(name, how)
    recovering = asyncio.create_task(made.caught_up())
    await _go_on(made, BEFORE // 2)  # what comes in meanwhile is not starved
    row.recovery_s = await recovering
    row.p99_ratio = p99(ill) / p99(healthy)
    return row.p99_ratio >= MAX_SLOWER and p99(ill) >= LEAST_P99_S


@asynccontextmanager
async def _in_use(made: Stand) -> AsyncIterator[None]:
    """Every server has reported, every store has caught up, and from then on it is read."""
    await made.sender.send(BEFORE)
    await made.facts.record()
    await made.caught_up()
    async with made.readers.reading():
        yield


async def _go_on(made: Stand, ticks: int) -> None:
    """Sends ticks and records facts between them."""
    for _ in range(0, ticks, FACTS_EVERY):
        await made.sender.send(FACTS_EVERY)
        await made.facts.record()
