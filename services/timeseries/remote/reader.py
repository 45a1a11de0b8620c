"""Answers queries where the history is not all here: what is older lies in an external store, other servers' rows on
other replicas.

Alone, a replica has all rows of its retention; what is older is asked of the store, with what of an import of long ago
that does not have yet::

    [start, edge)  the store          [edge, end)  the engine, with its roll-ups

With others, the store has what all have shipped, and each replica what it has not shipped yet. The ranges of that are
read as points from the store and from the replicas, put together and made into windows here; all else is the store's
own answer::

    [start, ...)  the store     [...)  points of the store + points of every replica     [..., end)  the store

While the store is away, or lacks too much, the replicas answer with what they hold: a series that only one has as it
is, one that has moved from one to another from the points of both, and before those from the windows of each.

What must stay true: an acknowledged point of the range is in the answer, or `incomplete` says who could not be asked;
replicas are asked before the store, for what is shipped in between is then in both answers, not in neither.
"""

import asyncio
import datetime
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fleet.model import Metric, MetricKind
from runtime.errors import DeadlineExceeded, InvalidArgument, OpenManagerError, ResourceExhausted, Unavailable
from services.timeseries.engine import Engine
from services.timeseries.engine.aggregate import Aggregation, lookback_ms
from services.timeseries.engine.catalog import MetricInfo
from services.timeseries.engine.query import Query, SeriesResult, check_query
from services.timeseries.engine.unshipped import Ranges, joined
from services.timeseries.remote.history import RemoteHistory
from services.timeseries.remote.joining import Name, concatenated, merged, windowed
from services.timeseries.remote.replica import Held, Replica, ThisReplica

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Answer:
    """Series in order of server id and metric key, and what could not be asked."""

    results: list[SeriesResult] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)


class Reader:
    """Reads from the engine, the store and the other replicas."""

    def __init__(
        self, engine: Engine, remote: RemoteHistory, *, peers: Sequence[Replica] = (), max_points: int
    ) -> None:
        """Joins them.

        Args:
            engine: this replica's.
            remote: what the follower of the same name ships to.
            peers: the other replicas.
            max_points: bound of an answer.
        """
        self._engine = engine
        self._remote = remote
        self._peers = tuple(peers)
        self._this = ThisReplica(engine)
        self._max_points = max_points

    def is_here(self, query: Query) -> bool:
        """Whether the engine alone has all there is to the query."""
        return not self._peers and all(is_here for _, _, is_here in self._parts(query))

    def lacking(self, query: Query) -> list[str]:
        """Of which parts of a query's range the engine may not have everything that came to this replica."""
        return [
            f"from {_text(start)} to {_text(end)} only what replicas hold is shown"
            for start, end, is_here in self._parts(query)
            if not is_here
        ]

    async def list_metrics(self, server_id: str) -> list[MetricInfo]:
        """The metrics of all replicas that answer, in order of their keys; one that is away is logged."""
        found: dict[str, MetricInfo] = {}
        asked = [replica.list_metrics(server_id) for replica in (self._this, *self._peers)]
        for infos in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(infos, Unavailable | DeadlineExceeded):
                _log.warning("its metrics are not listed: %s", infos)
                continue
            if isinstance(infos, BaseException):
                raise infos
            for info in infos:
                before = found.get(info.key)
                found[info.key] = replace(info, servers=info.servers + (before.servers if before else 0))
        return [found[key] for key in sorted(found)]

    async def read(self, query: Query) -> Answer:
        """The whole answer.

        Raises:
            InvalidArgument: field start_time, step or aggregation.
            ResourceExhausted: MAX_SERIES, MAX_POINTS or MAX_SCANNED_POINTS.
        """
        check_query(query)
        answer = Answer()
        metrics = await self._metrics()
        _check_rate(query, metrics)
        if self._peers:
            await self._of_replicas(query, metrics, answer)
        else:
            await self._of_times(query, metrics, answer)
        if sum(len(result.times_ms) for result in answer.results) > self._max_points:
            raise ResourceExhausted(
                f"the answer has more than max_points = {self._max_points} points", reason="MAX_POINTS"
            )
        return answer

    # --- this replica alone

    def _edge(self, query: Query, step_ms: int) -> int:
        """From where on windows of that width are all here, with what RATE looks for before them; a multiple of the
        query's step."""
        held_ms = self._engine.held_from_ms(step_ms) + lookback_ms(query.aggregation, query.step_ms)
        step = query.step_ms or 1
        return -(-held_ms // step) * step

    def _parts(self, query: Query) -> list[tuple[int, int, bool]]:
        """The range as parts that follow each other, and whether each is all here. Roll-ups have whole windows only: a
        part of one, at the ends of the range, is made of points."""
        step = query.step_ms or 1
        whole_from, points_from = self._edge(query, query.step_ms), self._edge(query, 0)
        first, last = -(-query.start_ms // step) * step, query.end_ms // step * step
        lacks_from, lacks_until = self._engine.lacks_ms
        lacks_from = lacks_from // step * step
        lacks_until = -(-(lacks_until + lookback_ms(query.aggregation, query.step_ms)) // step) * step
        edges = (first, last, whole_from, lacks_from, lacks_until)
        inner = (edge for edge in edges if query.start_ms < edge < query.end_ms)
        parts: list[tuple[int, int, bool]] = []
        for start, end in pairwise(sorted({query.start_ms, *inner, query.end_ms})):
            is_whole = start % step == 0 and end % step == 0
            is_here = start >= (whole_from if is_whole else points_from) and not lacks_from <= start < lacks_until
            if parts and parts[-1][2] == is_here:
                start = parts.pop()[0]  # noqa: PLW2901  one part with the one before
            parts.append((start, end, is_here))
        return parts

    async def _of_times(self, query: Query, metrics: Mapping[str, Metric], answer: Answer) -> None:
        parts, here = await self._held(query)
        found: list[list[SeriesResult]] = []
        for start, end, is_here in parts:
            part = replace(query, start_ms=start, end_ms=end)
            if is_here:
                found.append(here.pop(0))
                continue
            try:
                unshipped = await self._this.unshipped(part, self._remote.name)  # of an import of long ago
                found.append(await self._of_store(part, metrics, [unshipped]))
            except (Unavailable, DeadlineExceeded) as error:
                range_text = f"from {_text(start)} to {_text(end)} only what is held here is shown"
                answer.incomplete.append(f"{self._away(error)}: {range_text}")
                found.append(await self._this.query(part))
        answer.results = concatenated(found)

    async def _held(self, query: Query) -> tuple[list[tuple[int, int, bool]], list[list[SeriesResult]]]:
        """The range as parts, and the answers to those that are here; read anew when a day went meanwhile. Before the
        store is asked: while that takes its time, a day may go, too."""
        while True:
            parts = self._parts(query)
            here = [
                await self._this.query(replace(query, start_ms=start, end_ms=end))
                for start, end, is_here in parts
                if is_here
            ]
            if self._parts(query) == parts:
                return parts, here

    # --- one of several

    async def _of_replicas(self, query: Query, metrics: Mapping[str, Metric], answer: Answer) -> None:
        replicas: tuple[Replica, ...] = (self._this, *self._peers)
        held: list[Held] = []
        without = ""
        asked = [replica.unshipped(query, self._remote.name) for replica in replicas]
        for replica, found in zip(replicas, await asyncio.gather(*asked, return_exceptions=True), strict=True):
            if isinstance(found, Held):
                held.append(found)
            elif isinstance(found, Unavailable | DeadlineExceeded):
                text = f"{replica.name} does not answer: what it has not shipped to {self._remote.name} is missing"
                answer.incomplete.append(text)
            elif isinstance(found, ResourceExhausted) and query.step_ms:  # points, not windows, are too many
                without = f"{self._remote.name} is not asked, it lacks too much to be put together ({found.message})"
            else:
                raise found
        try:
            if not without:
                answer.results = await self._of_store(query, metrics, held)
        except (Unavailable, DeadlineExceeded) as error:
            without = self._away(error)
        if without:
            answer.incomplete[:] = self.lacking(query)
            await self._without_store(query, replicas, answer)
            if answer.incomplete:
                answer.incomplete.insert(0, without)

    async def _of_store(self, query: Query, metrics: Mapping[str, Metric], held: Sequence[Held]) -> list[SeriesResult]:
        back_ms = lookback_ms(query.aggregation, query.step_ms)
        unsure = _unsure([one for each in held for one in each.ranges], query, back_ms)
        parts: list[list[SeriesResult]] = []
        edges = [query.start_ms, *(edge for part in unsure for edge in part), query.end_ms]
        for index, (start, end) in enumerate(pairwise(edges)):
            if start >= end:
                continue
            part = replace(query, start_ms=start, end_ms=end)
            if index % 2 == 0:
                parts.append(await self._asked(part, metrics))
            else:
                points = await self._asked(replace(part, start_ms=start - back_ms, step_ms=0), metrics)
                parts.append(windowed(merged([points, *(each.points for each in held)]), part))
        return concatenated(parts)

    async def _without_store(self, query: Query, replicas: Sequence[Replica], answer: Answer) -> None:
        there: list[Replica] = []
        by_name: dict[Name, list[tuple[Replica, SeriesResult]]] = {}
        asked = [replica.answered(query) for replica in replicas]
        for replica, found in zip(replicas, await asyncio.gather(*asked, return_exceptions=True), strict=True):
            if isinstance(found, BaseException):
                if not isinstance(found, Unavailable | DeadlineExceeded):
                    raise found
                answer.incomplete.append(f"{replica.name} does not answer: rows that it alone holds are missing")
                continue
            there.append(replica)
            answer.incomplete += [f"{replica.name}: {text}" for text in found.lacking]
            for result in found.results:
                by_name.setdefault((result.server_id, result.metric_key), []).append((replica, result))
        moved = {name: [one for _, one in results] for name, results in by_name.items() if len(results) > 1}
        alone = [result for name, ((_, result), *_) in by_name.items() if name not in moved]
        both = await self._of_several(query, there, moved, answer) if moved else []
        answer.results = sorted([*alone, *both], key=lambda result: (result.server_id, result.metric_key))

    async def _of_several(
        self, query: Query, replicas: Sequence[Replica], moved: Mapping[Name, list[SeriesResult]], answer: Answer
    ) -> list[SeriesResult]:
        """Series that more than one replica has: of the points of all where those are held; an older window, of which
        there may be roll-ups alone, as who has it gives it."""
        edge = self._edge(query, 0) if query.step_ms else query.start_ms
        shared = {name: _shared(results, edge) for name, results in moved.items()}
        start_ms = max(query.start_ms, min(edge, *(int(labels.min(initial=edge)) for labels in shared.values())))
        points: list[SeriesResult] = []
        if start_ms < query.end_ms:
            points = await _of_points(replace(query, start_ms=start_ms), replicas, set(moved))
        if edge <= query.start_ms:
            return points
        if any(len(labels) for labels in shared.values()):
            text = f"before {_text(edge)} a window in which a server moved may show what one replica has of it"
            answer.incomplete.append(text)
        chosen = [_only(one, edge, shared[one.server_id, one.metric_key]) for one in points]
        return merged([*([one] for results in moved.values() for one in results), chosen])

    # --- the store

    async def _asked(self, query: Query, metrics: Mapping[str, Metric]) -> list[SeriesResult]:
        results: list[SeriesResult] = []
        left = self._max_points
        async for result in self._remote.query(query, metrics):
            left -= len(result.times_ms)
            if left < 0:
                raise ResourceExhausted(
                    f"the answer has more than max_points = {self._max_points} points", reason="MAX_POINTS"
                )
            results.append(result)
        return results

    async def _metrics(self) -> Mapping[str, Metric]:
        """Those of all replicas that answer; one that is away is told by what is asked of it next."""
        known: dict[str, Metric] = {}
        asked = [peer.metrics() for peer in self._peers]
        for found in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(found, BaseException):
                if not isinstance(found, OpenManagerError):
                    raise found
            else:
                known.update(found)
        return known | dict(await self._this.metrics())

    def _away(self, error: OpenManagerError) -> str:
        return f"{self._remote.name} is away ({error.message})"


async def _of_points(query: Query, replicas: Sequence[Replica], moved: set[Name]) -> list[SeriesResult]:
    """The answer for series that more than one replica has, from the points of all of them."""
    wanted = replace(
        query,
        start_ms=query.start_ms - lookback_ms(query.aggregation, query.step_ms),
        step_ms=0,
        server_ids=tuple(sorted({server_id for server_id, _ in moved})),
        metrics=tuple(sorted({key for _, key in moved})),
    )
    found = await asyncio.gather(*(replica.query(wanted) for replica in replicas))
    only = [[result for result in results if (result.server_id, result.metric_key) in moved] for results in found]
    return windowed(merged(only), query)


def _shared(results: Sequence[SeriesResult], edge: int) -> NDArray[np.int64]:
    """The windows before an instant that several have."""
    labels, counts = np.unique(np.concatenate([one.times_ms for one in results]), return_counts=True)
    return labels[(labels < edge) & (counts > 1)]


def _only(result: SeriesResult, edge: int, labels: NDArray[np.int64]) -> SeriesResult:
    """The windows from an instant on, and some before it."""
    wanted = (result.times_ms >= edge) | np.isin(result.times_ms, labels)
    return replace(result, times_ms=result.times_ms[wanted], values=result.values[wanted])


def _unsure(ranges: Ranges, query: Query, back_ms: int) -> Ranges:
    """The windows for which the store may lack something; a point changes the RATE of those after it, too."""
    step = query.step_ms or 1
    found = []
    for start, end in ranges:
        first = max(start // step * step, query.start_ms)
        last = min(-(-(end + back_ms) // step) * step, query.end_ms)
        if first < last:
            found.append((first, last))
    return joined(found, gap_ms=step)


def _check_rate(query: Query, metrics: Mapping[str, Metric]) -> None:
    """As the engine does, which may have none of the range."""
    if query.aggregation is not Aggregation.RATE or not query.step_ms:
        return
    wanted = None if query.metrics is None else set(query.metrics)
    for key, metric in metrics.items():
        if metric.kind is MetricKind.GAUGE and (wanted is None or {key, metric.name} & wanted):
            raise InvalidArgument(f"RATE wants a counter, {key} is a gauge", field="aggregation")


def _text(time_ms: int) -> str:
    try:
        return datetime.datetime.fromtimestamp(time_ms / 1_000, datetime.UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError):  # nothing is held here
        return "now"
