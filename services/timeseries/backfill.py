"""Back-fill: history that an external store does not have, copied to it from the engine's blocks.

**From copies.** Day by day the journal and the blocks of the day are copied as for an export (`archive.excerpt`), and
an engine on the copy is read; so it works beside a running service, and without one, and takes nothing from it.

**The same lines.** A row is given the tags that the follower gave it, or would have given: those that were valid at its
sequence, which blocks keep (`engine.told`). Else its points would be there twice, under two sets of tags. Where a
server changed so often, or so long ago, that this is forgotten, the oldest tags known are taken, and it is counted. A
row of which every value was written anew after the server had moved is not copied: blocks do not have it any more.

**Later rows win.** While days are copied, rows for them may be written anew and be shipped by the follower; what the
back-fill ships of its older copy would then replace them. So each later copy of the journal, and in the end further
ones, are searched for such rows, and they are shipped again, until there are none.

What must stay true: a point is copied when the target has acknowledged it; interrupted anywhere and begun again it goes
on; beginning anew changes nothing; memory is bounded by `engine.rows.CELLS_AT_ONCE` and the follower's bounds.
"""

import asyncio
import datetime
import difflib
import random
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleet.model import Metric, MetricSet, Rows, ServerDescriptor
from runtime.clock import Clock
from runtime.errors import InvalidArgument, Unavailable
from runtime.tasks import Backoff
from services.timeseries.archive.backup import check_target
from services.timeseries.archive.excerpt import READING, copy_range, journaled_days, partitions_of
from services.timeseries.backfill_state import State
from services.timeseries.engine import Aggregation, Engine, Query, TailBatch
from services.timeseries.engine.database import file_bytes
from services.timeseries.engine.partition import EPOCH
from services.timeseries.engine.settings import DAY_MS
from services.timeseries.engine.told import Told
from services.timeseries.followers.backend import (
    MAX_SHIP_BYTES,
    MAX_SHIP_POINTS,
    MAX_SHIP_ROWS,
    Backend,
    TaggedRows,
    halves,
)
from services.timeseries.followers.follower import MAX_RETRY_AFTER_S
from services.timeseries.remote.history import RemoteHistory

DEFAULT_RATE: Final = 200_000
"""Points a second: a third of what InfluxDB takes at best, so that live rows find it free."""
SAVE_INTERVAL_S: Final = 1.0
"""How much is copied again at worst."""
OUTAGE_BOUND_S: Final = 300.0
"""A target that is away for longer ends the command, which can be called again."""
RETRY: Final = Backoff(initial_s=0.2, max_s=5.0)
SHOWN_AFTER: Final = Backoff(initial_s=0.5, max_s=4.0)
MAX_COUNTS: Final = 6
"""So often a day is counted before points are told as short: VictoriaMetrics shows what it acknowledged within 5 s."""
MAX_SHORT: Final = 1_000
"""Servers and days of which it is remembered that the target has fewer points."""
_SHOWN_NAMES: Final = 3
_SMALL_BYTES: Final = 1 << 20
"""What a day counts for at least in the share that is done."""

Progress = Callable[[str, int, float], None]
Tell = Callable[[str], None]
Tags = tuple[ServerDescriptor | None, ...]


class BackfillError(Exception):
    """Why it cannot be done, and what to do."""


class Backfill:
    """One back-fill as it runs. `state` says how far it is."""

    def __init__(
        self,
        store: Path,
        folder: Path,
        backend: Backend,
        state: State,
        *,
        clock: Clock,
        rate: float = DEFAULT_RATE,
        servers: tuple[str, ...] | None = None,
        progress: Progress,
        tell: Tell,
        reader: RemoteHistory | None = None,
    ) -> None:
        """Prepares it.

        Args:
            store: the folder of the store, which may be in use.
            folder: of the state, and of copies while it runs.
            backend: the target.
            state: what to go on with, or a new one; it has the range.
            clock: for pauses.
            rate: points a second at most.
            servers: whose rows; None: all.
            progress: is told of the day, the points so far and the share of all.
            tell: is told what an operator should know meanwhile.
            reader: counts at the target after each day what should be there; None: nobody counts.
        """
        self.state = state
        self._store, self._folder, self._backend = store, folder, backend
        self._rate, self._servers = rate, servers
        self._clock, self._progress, self._tell, self._reader = clock, progress, tell, reader
        self._rng = random.Random()  # noqa: S311  jitter
        self._told: Mapping[str, Told] = {}
        self._left: dict[int, int] = {}
        self._journaled: set[int] = set()
        self._waiting: list[TaggedRows] = []
        self._waiting_likely = 0
        self._copied_through = ""  # the last server whose rows are all in `_waiting` or shipped
        self._free_at_s = self._saved_at_s = clock.monotonic()
        self._began_points = state.points
        self._date, self._done, self._share, self._of_day = "", 0.0, 0.0, 0.0

    async def run(self) -> None:
        """Copies all of it.

        Raises:
            BackfillError, Unavailable: it stops where it is; called again it goes on.
        """
        await self._backend.probe()
        try:
            sizes, servers = await self._overview()
            self._left = {day: size for day, size in sizes.items() if day >= (self.state.day or 0)}
            done = 0
            while self._left:
                day = next(iter(self._left))
                async with self._opened(range(day, day + 1)) as engine:
                    everything = done + sum(self._left.values())
                    self._done, self._share = done / everything, self._left[day] / everything
                    await self._again(engine)
                    await self._day(engine, day, servers)
                    await self._verify(engine, day, servers)
                done += self._left.pop(day)
            while await self._once_more():
                pass
            self.state.is_done = True
        finally:
            await asyncio.to_thread(self.state.save, self._folder)

    async def _overview(self) -> tuple[dict[int, int], list[str]]:
        """The days that may have rows of the range, each with about how many bytes, and the servers."""
        state = self.state
        days = range(state.start_ms // DAY_MS, -(-state.end_ms // DAY_MS))
        async with self._opened(range(0)) as engine:
            known = engine.servers()
            if unknown := [one for one in self._servers or () if one not in known]:
                raise BackfillError(f"there is no server {unknown[0]!r} in the store; {_others(unknown[0], known)}")
            self._journaled = await journaled_days(engine)
            if self._backend.name not in {follower.name for follower in (await engine.status()).followers}:
                self._tell(
                    f"the service does not ship to {self._backend.name} yet: rows that are written from now on are not"
                    " copied. Set it up and start the service first, to lose none"
                )
        sizes = {}
        for day in days:
            files = partitions_of(self._store, range(day, day + 1))[0]
            if files or day in self._journaled:
                sizes[day] = max(_SMALL_BYTES, *(file_bytes(self._store / name) for name in files), 0)
        return sizes, sorted(set(self._servers or known))

    @asynccontextmanager
    async def _opened(self, days: range) -> AsyncIterator[Engine]:
        """An engine on a copy of some days, and of the journal."""
        copy = self._folder / "copy"
        await asyncio.to_thread(shutil.rmtree, copy, ignore_errors=True)  # a killed one's
        files = partitions_of(self._store, days)[0]
        check_target(self._store, copy, files)
        copy.mkdir()
        try:
            excerpt = await asyncio.to_thread(copy_range, self._store, copy, days, lambda *_: None)
            for name in (*excerpt.left_out, *(name for name, gone in excerpt.missing.items() if self._wants(gone))):
                if name not in self.state.left_out:
                    self.state.left_out.append(name)
                    self._tell(f"{name} cannot be read, or is gone, and is left out; `verify` says more")
            for day in self._left.keys() - excerpt.days - self._journaled - set(days):
                if set(partitions_of(self._store, range(day, day + 1))[0]) <= set(files):
                    del self._left[day]  # the files say by their names only where they begin
            async with Engine.open(copy, clock=self._clock, settings=READING) as engine:
                self._told = await engine.told()
                yield engine
                damaged = (await engine.status()).damaged
                if damaged:
                    self.state.damaged = True
                    self._tell(f"{damaged} damaged blocks are left out; `verify` names them")
        finally:
            await asyncio.to_thread(shutil.rmtree, copy, ignore_errors=True)

    def _wants(self, days: range) -> bool:
        """Whether some of these days are in the range."""
        return days.start * DAY_MS < self.state.end_ms and self.state.start_ms < days.stop * DAY_MS

    async def _day(self, engine: Engine, day: int, servers: Sequence[str]) -> None:
        state = self.state
        if state.day != day:
            state.day, state.server = day, ""
        self._copied_through = state.server
        self._date, self._of_day = _date(day), 0.0
        start, end = self._range(day)
        for number, server_id in enumerate(servers):
            if server_id > state.server:
                async for rows in engine.stored_rows(server_id, start, end):
                    ids = (server_id,) * len(rows.times_ms)
                    await self._add(rows.metric_set, ids, rows.times_ms, rows.sequences, rows.values)
                self._copied_through = server_id
            self._of_day = (number + 1) / len(servers)
            self._show()
        await self._flush()
        await asyncio.to_thread(state.save, self._folder)

    async def _again(self, engine: Engine) -> bool:
        """Ships rows that came for what is copied, after it was; whether there were any."""
        state = self.state
        before, last = state.again, engine.last_sequence
        if state.day is not None and state.after <= last:
            if engine.first_sequence > last:
                state.unseen += last - state.after + 1
            through_ms = self._range(state.day)[1]
            async for batch in _batches(engine, state.after, last):
                state.unseen += batch.missed
                if batch.rows is None or batch.metric_set is None:
                    continue
                times = batch.rows.times_ms
                mask = (times >= state.start_ms) & (times < through_ms)
                if self._servers is not None:
                    mask &= np.isin(batch.rows.server_ids, self._servers)
                if mask.any():
                    rows = batch.rows.select(mask)
                    sequences = np.full(len(rows.server_ids), batch.sequence)
                    state.again += rows.points
                    await self._add(batch.metric_set, rows.server_ids, rows.times_ms, sequences, rows.values)
            await self._flush()
        state.after = last + 1
        return state.again > before

    async def _once_more(self) -> bool:
        async with self._opened(range(0)) as engine:
            return await self._again(engine)

    def _range(self, day: int) -> tuple[int, int]:
        return max(self.state.start_ms, day * DAY_MS), min(self.state.end_ms, (day + 1) * DAY_MS)

    async def _add(
        self,
        metric_set: MetricSet,
        server_ids: tuple[str, ...],
        times_ms: NDArray[np.int64],
        sequences: NDArray[np.int64],
        values: NDArray[np.float64],
    ) -> None:
        """Has rows shipped with what is collected, or by themselves."""
        rows = Rows(metric_set_id=metric_set.id, server_ids=server_ids, times_ms=times_ms, values=values)
        descriptors, likely = self._tags(server_ids, sequences)
        everything = TaggedRows(metric_set=metric_set, rows=rows, descriptors=descriptors)
        a_row = len(metric_set)
        step = max(1, min(MAX_SHIP_ROWS, MAX_SHIP_POINTS // a_row, MAX_SHIP_BYTES // (8 * a_row + 8)))
        for start, stop in pairwise([*range(0, len(server_ids), step), len(server_ids)]):
            part = everything.part(start, stop)
            cells = sum(one.cells for one in self._waiting) + part.cells
            if self._waiting and (cells > MAX_SHIP_POINTS or sum(map(len, self._waiting)) + len(part) > MAX_SHIP_ROWS):
                await self._flush()
            self._waiting.append(part)
            self._waiting_likely += int((~np.isnan(part.rows.values[likely[start:stop]])).sum())

    def _tags(self, server_ids: Sequence[str], sequences: NDArray[np.int64]) -> tuple[Tags, NDArray[np.bool_]]:
        """What was valid of each row's server, and whether that is only likely."""
        if len(set(server_ids)) == 1:
            told = self._told.get(server_ids[0])
            return told.at(sequences) if told else ((None,) * len(sequences), np.zeros(len(sequences), np.bool_))
        each = [self._tags((server_id,), sequences[row : row + 1]) for row, server_id in enumerate(server_ids)]
        return tuple(tags[0] for tags, _ in each), np.array([likely[0] for _, likely in each])

    async def _flush(self) -> None:
        """Ships what is collected, at the rate that is wanted, then notes it."""
        waiting = [self._waiting] if self._waiting else []
        self._waiting = []
        while waiting:
            part = waiting.pop()
            points = sum(rows.rows.points for rows in part)
            await self._clock.sleep_until(self._free_at_s)
            self._free_at_s = max(self._free_at_s, self._clock.monotonic() - 1.0) + points / self._rate
            try:
                await self._shipped(part)
            except InvalidArgument as error:
                if parts := halves(part):
                    waiting += reversed(parts)
                else:
                    self._refuse({error.reason: points})
        self._show()
        self.state.likely += self._waiting_likely
        self._waiting_likely = 0
        self.state.server = max(self.state.server, self._copied_through)
        if self._clock.monotonic() - self._saved_at_s >= SAVE_INTERVAL_S:
            await asyncio.to_thread(self.state.save, self._folder)
            self._saved_at_s = self._clock.monotonic()

    async def _shipped(self, part: Sequence[TaggedRows]) -> None:
        failures, away_since_s = 0, self._clock.monotonic()
        while True:
            try:
                receipt = await self._backend.ship(part)
            except Unavailable as error:
                if self._clock.monotonic() - away_since_s > OUTAGE_BOUND_S:
                    raise
                if not failures:
                    self._tell(f"{error.message}; it is tried again for {OUTAGE_BOUND_S:.0f} s")
                pause_s = max(RETRY.delay_s(failures, self._rng), min(error.retry_after_s or 0.0, MAX_RETRY_AFTER_S))
                failures += 1
                await self._clock.sleep(pause_s)
            else:
                self.state.points += receipt.shipped
                self._refuse(receipt.refused)
                return

    def _refuse(self, refused: Mapping[str, int]) -> None:
        self.state.refused = dict(Counter(self.state.refused) + Counter(refused))

    def _show(self) -> None:
        points = self.state.points - self._began_points
        self._progress(self._date, points, self._done + self._share * self._of_day)

    async def _verify(self, engine: Engine, day: int, servers: Sequence[str]) -> None:
        """Compares how many points of each server's day are here and there."""
        if self._reader is None:
            return
        start, end = self._range(day)
        query = Query(
            metrics=None,
            start_ms=start,
            end_ms=end,
            server_ids=tuple(servers),
        )
        here = Counter[str]()
        async for result in engine.query(query):  # an excerpt has points only, so no windows
            here[result.server_id] += len(result.values)
        known = {info.key: info.metric for info in await engine.list_metrics()}
        counting = replace(query, step_ms=DAY_MS, aggregation=Aggregation.COUNT)
        there = await self._counted(self._reader, counting, known)
        for failures in range(1, MAX_COUNTS if not self._backend.syncs else 1):
            if there >= here:
                break
            await self._clock.sleep(SHOWN_AFTER.delay_s(failures, self._rng))
            there = await self._counted(self._reader, counting, known)
        for server_id in sorted(here):
            if there[server_id] < here[server_id] and len(self.state.short) < MAX_SHORT:
                self.state.short.append((_date(day), server_id, here[server_id], there[server_id]))

    @staticmethod
    async def _counted(reader: RemoteHistory, counting: Query, known: Mapping[str, Metric]) -> Counter[str]:
        """The points of each server at the target."""
        found = Counter[str]()
        async for result in reader.query(counting, known):
            found[result.server_id] += int(result.values.sum())
        return found


async def _batches(engine: Engine, first: int, last: int) -> AsyncIterator[TailBatch]:
    """The batches of `[first, last]` that the journal has."""
    if engine.first_sequence <= last:
        async for batch in engine.tail(first):
            yield batch
            if batch.sequence >= last:
                return


def _date(day: int) -> str:
    return str(EPOCH + datetime.timedelta(days=day))


def _others(name: str, known: Mapping[str, object]) -> str:
    """What may have been meant."""
    shown = difflib.get_close_matches(name, known, _SHOWN_NAMES) or sorted(known)[:_SHOWN_NAMES]
    return f"{len(known)} are there, such as {', '.join(shown)}" if known else "there is none at all"
