"""History read back from InfluxDB, as the engine would answer it from points.

**What is pushed down.** Windows of AVG, MIN, MAX, SUM, COUNT, FIRST and LAST are made by InfluxDB's storage, of each
series, and only they travel. RATE wants every sample for its resets, so its points are read back and the engine's
own function makes the windows; so are points without a step.

**One server, several of its series.** A server that moved from staging to production is two series there. A window in
which only one of them has points is that one's. Of a window in which several have some, the move's, the points are read
back and put together before the engine's functions make it: FIRST and LAST, or an AVG of averages, would else be wrong.
Where two have a point of the same time, as when rows are sent again after the move, InfluxDB cannot tell which was
written later: that of the tags which the server was told of last wins (`tags_of`); of tags that nobody here knows those
which have the newest point. A server that moved and moved back, with rows sent again across its first move, is the case
in which that is the wrong one.

What must stay true: the answers are those of `services.timeseries.engine`, in the same order; no more than
`MAX_HELD_POINTS` are held; what a bound stops is said and never cut; a caller that goes away stops InfluxDB too.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleet.model import Metric, MetricKind
from runtime.errors import InvalidArgument, ResourceExhausted
from services.timeseries.engine.aggregate import Windows, lookback_ms
from services.timeseries.engine.query import Query, SeriesResult, check_query
from services.timeseries.engine.settings import MAX_TIME_MS, MIN_TIME_MS, EngineSettings
from services.timeseries.followers.influxdb_api import NAME, InfluxTarget
from services.timeseries.remote import flux
from services.timeseries.remote.annotated_csv import tables, texts
from services.timeseries.remote.influxdb_connection import Askers

TOGETHER_POINTS: Final = 500_000
"""About so many points are asked for at once, 8 MB; those of a single server may be more."""
MAX_HELD_POINTS: Final = 8_000_000
"""Points of one answer of InfluxDB, 128 MB; more is refused (MAX_SCANNED_POINTS)."""
MAX_SERVERS_TOGETHER: Final = 128
"""Servers that one question names: a condition for each."""
MAX_CONTESTED_RUNS: Final = 16
"""Runs of windows in which a server has several series that are read one by one; of more, all from first to last."""

_UNKNOWN: Final = Metric(name="")

Points = tuple[NDArray[np.int64], NDArray[np.float64]]
Tags = tuple[str, str]
Series = dict[tuple[str, str], dict[Tags, Points]]
"""By server and field: the points, or windows, of each combination of tags."""
TagsOf = Callable[[str], Awaitable[Sequence[Tags]]]


class InfluxHistory:
    """What a bucket holds. Belongs to one event loop."""

    def __init__(self, target: InfluxTarget, bounds: EngineSettings, tags_of: TagsOf | None = None) -> None:
        """Prepares connections; none is made before the first query.

        Args:
            target: the bucket; the token must be allowed to read it.
            bounds: of which `max_series`, `max_points` and `max_scanned_points` hold for a query.
            tags_of: environment and role that a server has been told of, in order, the present ones last; asked only
                where two points are of one time.
        """
        self._bucket = target.bucket
        self._bounds = bounds
        self._tags_of = tags_of or _unknown_tags
        self._askers = Askers(target)

    @property
    def name(self) -> str:
        return NAME

    async def query(self, query: Query, metrics: Mapping[str, Metric]) -> AsyncIterator[SeriesResult]:
        """As `RemoteHistory.query`. Also raises FailedPrecondition: what other programs wrote is in the way."""
        check_query(query)
        asked = _Asked.of(self._bucket, query, metrics)
        if asked is None:
            return
        reading = _Reading(self._askers, asked, self._bounds, self._tags_of)
        async for result in reading.results():
            yield result

    async def close(self) -> None:
        """Ends connections; no query may run."""
        await self._askers.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """A query in InfluxDB's terms: its range is within what rows can have and not empty."""

    bucket: str
    query: Query
    metrics: Mapping[str, Metric]
    start_ms: int
    end_ms: int
    fields: str
    known: int
    """How many fields are expected of a server."""

    @classmethod
    def of(cls, bucket: str, query: Query, metrics: Mapping[str, Metric]) -> "_Asked | None":
        """None: nothing can match."""
        start_ms, end_ms = max(query.start_ms, MIN_TIME_MS), min(query.end_ms, MAX_TIME_MS + 1)
        if start_ms >= end_ms or (query.metrics is not None and not query.metrics):
            return None
        fields, known = "", len(metrics)
        if query.metrics is not None:
            wanted = set(query.metrics)
            keys = wanted.union(key for key, metric in metrics.items() if metric.name in wanted)
            fields, known = flux.fields(sorted(keys), sorted(wanted)), len(keys & metrics.keys())
        return cls(
            bucket=bucket,
            query=query,
            metrics=metrics,
            start_ms=start_ms,
            end_ms=end_ms,
            fields=fields,
            known=max(known, 1),
        )

    def metric(self, key: str) -> Metric:
        """What is known of a field."""
        return self.metrics.get(key, _UNKNOWN)

    @property
    def is_pushed_down(self) -> bool:
        return self.query.step_ms > 0 and self.query.aggregation in flux.FUNCTIONS

    def matches(self, key: str) -> bool:
        """Whether a field is asked for: the pattern of a name finds fields of which the name is only the beginning."""
        wanted = self.query.metrics
        if wanted is None or key in wanted:
            return True
        known = self.metrics.get(key)
        if known is not None:
            return known.name in wanted
        return key.endswith("}") and any(key.startswith(f"{name}{{") for name in wanted)


class _Reading:
    """One query as it runs."""

    def __init__(self, askers: Askers, asked: _Asked, bounds: EngineSettings, tags_of: TagsOf) -> None:
        self._askers = askers
        self._asked = asked
        self._bounds = bounds
        self._tags_of = tags_of
        self._series = self._points = self._scanned = 0
        query = asked.query
        self._windows = Windows(asked.start_ms, query.step_ms, query.aggregation) if query.step_ms else None

    async def results(self) -> AsyncIterator[SeriesResult]:
        """The series, by server and key."""
        asked = self._asked
        wanted = asked.query.server_ids
        servers = await self._servers() if wanted is None else sorted(filter(_can_be, set(wanted)))
        windows = -(-(asked.end_ms - asked.start_ms) // asked.query.step_ms) + 1 if asked.is_pushed_down else 0
        count = max(1, TOGETHER_POINTS // (windows * asked.known)) if windows else 1
        at = 0
        while at < len(servers):
            named: Sequence[str] = servers[at : at + min(count, MAX_SERVERS_TOGETHER)]
            some = len(named)
            if wanted is None and not at and count >= len(servers):
                named, some = (), len(servers)
            at += some
            found = await (self._windowed(named) if asked.is_pushed_down else self._pointed(named))
            of_server = max(1, sum(len(times) for one in found.values() for times, _ in one.values()) // some)
            for (server_id, key), by_tags in sorted(found.items()):
                ((times, values),) = by_tags.values()
                if len(times):
                    yield self._result(server_id, key, times, values)
            count = min(2 * some, max(1, TOGETHER_POINTS // of_server))

    async def _servers(self) -> list[str]:
        asked = self._asked
        before_ms = max(MIN_TIME_MS, asked.start_ms - lookback_ms(asked.query.aggregation, asked.query.step_ms))
        text = flux.server_ids(asked.bucket, before_ms, asked.end_ms, [asked.fields])
        return sorted(set(filter(None, await self._askers.ask(text, texts))))

    async def _windowed(self, named: Iterable[str]) -> Series:
        """The windows of the named servers (none: of all), each series with one combination of tags."""
        asked, step_ms = self._asked, self._asked.query.step_ms
        conditions = [flux.servers(named), asked.fields]
        text = flux.windows(asked.bucket, asked.start_ms, asked.end_ms, conditions, step_ms, asked.query.aggregation)
        found = await self._ask(text, _free)
        made, several = await asyncio.to_thread(_labelled, found, step_ms)
        for server_id, series in several.items():
            made.update(await self._joined_windows(server_id, series))
        return made

    async def _joined_windows(self, server_id: str, series: Series) -> Series:
        """The windows of a server that has several series a field."""
        step_ms = self._asked.query.step_ms
        contested: set[int] = set()
        for by_tags in series.values():
            labels, counts = np.unique(np.concatenate([times for times, _ in by_tags.values()]), return_counts=True)
            contested.update(labels[counts > 1].tolist())
        parts: dict[tuple[str, str], list[Points]] = {name: [] for name in series}
        for name, by_tags in series.items():
            for times, values in by_tags.values():
                alone = ~np.isin(times, list(contested))
                parts[name].append((times[alone], values[alone]))
        for first, last in _runs(sorted(contested), step_ms):
            start_ms = max(first, self._asked.start_ms)
            end_ms = min(last + step_ms, self._asked.end_ms)
            for name, by_tags in (await self._points_of([server_id], start_ms, end_ms)).items():
                if name in parts:
                    (points,) = by_tags.values()
                    labels, values = self._in_windows(*points)
                    again = np.isin(labels, list(contested))
                    parts[name].append((labels[again], values[again]))
        return {name: {("", ""): _sorted(of_name)} for name, of_name in parts.items()}

    async def _pointed(self, named: Iterable[str]) -> Series:
        """The same of points, or of windows made of them here."""
        asked = self._asked
        query = asked.query
        start_ms = max(MIN_TIME_MS, asked.start_ms - lookback_ms(query.aggregation, query.step_ms))
        found = await self._points_of(named, start_ms, asked.end_ms)
        if not query.step_ms:
            return found
        for _, key in found:
            if self._asked.metric(key).kind is MetricKind.GAUGE:
                raise InvalidArgument(f"RATE wants a counter, {key} is a gauge", field="aggregation")

        def in_windows() -> Series:
            return {
                name: {tags: self._in_windows(*points) for tags, points in by_tags.items()}
                for name, by_tags in found.items()
            }

        return await asyncio.to_thread(in_windows)

    async def _points_of(self, named: Iterable[str], start_ms: int, end_ms: int) -> Series:
        """The points of some servers in a range, each series with one combination of tags."""
        asked = self._asked
        text = flux.points(asked.bucket, start_ms, end_ms, [flux.servers(named), asked.fields])
        found = await self._ask(text, self._scan_budget)
        doubled = await asyncio.to_thread(_doubled, found)
        ranks = {server_id: await self._ranks(server_id, tags) for server_id, tags in doubled.items()}
        return await asyncio.to_thread(_joined, found, ranks)

    async def _ranks(self, server_id: str, tags: set[Tags]) -> dict[Tags, int]:
        """Which tags of a server are later ones: those that are known by their place, others by their newest point."""
        ranks = {one: MAX_TIME_MS + 1 + place for place, one in enumerate(await self._tags_of(server_id))}
        if tags - ranks.keys():
            conditions = [flux.servers([server_id]), self._asked.fields]
            for by_tags in (await self._ask(flux.newest(self._asked.bucket, conditions), _free)).values():
                for one, (times, _) in by_tags.items():
                    ranks[one] = max(ranks.get(one, -1), int(times[-1]))
        return ranks

    async def _ask(self, text: str, spend: Callable[[int], None]) -> Series:
        """What InfluxDB answers, by server and field; `spend` is told of points as they come, and may raise."""

        def read(lines: Iterator[str]) -> Series:
            parts: dict[tuple[str, str], dict[Tags, list[Points]]] = {}
            held = 0
            for table in tables(lines):
                spend(len(table.times_ms))
                held += len(table.times_ms)
                if held > MAX_HELD_POINTS:
                    raise ResourceExhausted(
                        f"one answer of InfluxDB has more than MAX_HELD_POINTS = {MAX_HELD_POINTS} points: "
                        "ask for fewer metrics or a shorter range",
                        reason="MAX_SCANNED_POINTS",
                    )
                if table.server_id and self._asked.matches(table.field):
                    by_tags = parts.setdefault((table.server_id, table.field), {})
                    by_tags.setdefault(table.tags, []).append((table.times_ms, table.values))
            return {
                name: {tags: _sorted(pieces) for tags, pieces in by_tags.items()} for name, by_tags in parts.items()
            }

        return await self._askers.ask(text, read)

    def _scan_budget(self, points: int) -> None:
        limit = self._bounds.max_scanned_points
        self._scanned += points
        if self._scanned > limit:
            raise ResourceExhausted(
                f"the query reads more than max_scanned_points = {limit} points", reason="MAX_SCANNED_POINTS"
            )

    def _in_windows(self, times: NDArray[np.int64], values: NDArray[np.float64]) -> Points:
        assert self._windows is not None
        return self._windows.of(times, values)

    def _result(self, server_id: str, key: str, times: NDArray[np.int64], values: NDArray[np.float64]) -> SeriesResult:
        metric = self._asked.metric(key)
        self._series += 1
        if self._series > self._bounds.max_series:
            raise ResourceExhausted(f"more than max_series = {self._bounds.max_series} series", reason="MAX_SERIES")
        self._points += len(times)
        limit = self._bounds.max_points
        if self._points > limit:
            raise ResourceExhausted(f"the answer has more than max_points = {limit} points", reason="MAX_POINTS")
        return SeriesResult(
            server_id=server_id, metric_key=key, unit=metric.unit, kind=metric.kind, times_ms=times, values=values
        )


def _free(_points: int) -> None:
    """What arrives of windows becomes the answer, whose points are counted there."""


def _can_be(server_id: str) -> bool:
    """Whether a series can be of such a server."""
    try:
        return bool(server_id.encode())
    except UnicodeEncodeError:
        return False


def _labelled(found: Series, step_ms: int) -> tuple[Series, dict[str, Series]]:
    """Windows by the start of theirs, not of what is left of it; and, by server, those of several series a field."""
    made: Series = {}
    several: dict[str, Series] = {}
    for (server_id, key), by_tags in found.items():
        labelled = {tags: (times // step_ms * step_ms, values) for tags, (times, values) in by_tags.items()}
        if len(labelled) == 1:
            made[server_id, key] = labelled
        else:
            several.setdefault(server_id, {})[server_id, key] = labelled
    return made, several


def _doubled(found: Series) -> dict[str, set[Tags]]:
    """The servers of which two points of a field have one time, with their tags."""
    tags_of: dict[str, set[Tags]] = {}
    for (server_id, _), by_tags in found.items():
        if _share_times(list(by_tags.values())):
            tags_of.setdefault(server_id, set()).update(by_tags)
    return tags_of


def _joined(found: Series, ranks: Mapping[str, Mapping[Tags, int]]) -> Series:
    """Each series with one combination of tags; of equal times that of the tags with the higher rank."""
    made: Series = {}
    for (server_id, key), by_tags in found.items():
        of_server = ranks.get(server_id, {})
        in_order = sorted(by_tags, key=lambda one, ranked=of_server: (ranked.get(one, -1), one))  # type: ignore[misc]
        made[server_id, key] = {("", ""): _sorted([by_tags[one] for one in in_order])}
    return made


def _share_times(pieces: Sequence[Points]) -> bool:
    """Whether two points have one time."""
    if len(pieces) == 1:
        return False
    times = np.concatenate([times for times, _ in pieces])
    return len(np.unique(times)) < len(times)


async def _unknown_tags(_server_id: str) -> Sequence[Tags]:
    return ()


def _sorted(pieces: Sequence[Points]) -> Points:
    """Points in order of time; of equal times that of the later piece."""
    times, values = pieces[0] if len(pieces) == 1 else (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    if (times[1:] > times[:-1]).all():
        return times, values
    order = np.argsort(times, kind="stable")
    times, values = times[order], values[order]
    newest = np.append(times[1:] != times[:-1], True)
    return times[newest], values[newest]


def _runs(labels: Sequence[int], step_ms: int) -> list[tuple[int, int]]:
    """The first and last of each run of windows that follow each other."""
    runs = []
    for _, run in groupby(enumerate(labels), lambda one: one[1] // step_ms - one[0]):
        members = list(map(itemgetter(1), run))
        runs.append((members[0], members[-1]))
    return runs if len(runs) <= MAX_CONTESTED_RUNS else [(labels[0], labels[-1])]
