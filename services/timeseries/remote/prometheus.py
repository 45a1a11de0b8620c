"""History read from a Prometheus-compatible store: Prometheus, Mimir, Thanos, Cortex, VictoriaMetrics.

What must stay true: the answers are the engine's (`history.py`). AVG, MIN, MAX, SUM and COUNT are computed by the
store, and LAST where a window has points of one series only; RATE (Prometheus' own extrapolates), FIRST and the rest
are made of points that are read back, by the engine's own functions. Points are counted before they are read, and every
request, answer and wait has a bound. A store that answers with less than it has, since a part of it is away, has not
answered.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fleet.model import Metric, MetricKind
from runtime.circuit import Circuit, CircuitState
from runtime.clock import Clock
from runtime.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from services.timeseries.engine.aggregate import Aggregation, Windows
from services.timeseries.engine.query import Query, SeriesResult, check_query
from services.timeseries.engine.settings import MAX_TIME_MS, MIN_TIME_MS
from services.timeseries.prometheus.client import Nodes
from services.timeseries.prometheus.labels import NAME, SERVER_ID, escaped_name, labels_of
from services.timeseries.remote import promql
from services.timeseries.remote.history import patiently
from services.timeseries.remote.prometheus_answers import (
    Found,
    Points,
    data_of,
    decoded,
    distinct,
    in_order,
    joined,
    texts,
)
from services.timeseries.remote.prometheus_run import Run, check_rate, windowed
from services.timeseries.remote.promql import Part, Term

QUERY_TIMEOUT_S: Final = 8.0
"""For the whole answer of one node to one request."""
QUERY_THREADS: Final = 4
MAX_ANSWER_BYTES: Final = 128 << 20
MAX_STEPS: Final = 10_000
"""Windows of one request; Prometheus refuses more than 11,000."""
POINTS_TOGETHER: Final = 200_000
"""About what one request brings: 7 MB of JSON."""
SCANNED_TOGETHER: Final = 20_000_000
"""About how many samples one request makes the store look at, of one in 10 s: a second's work."""
MAX_WINDOWS: Final = 1_000_000
SERVERS_TOGETHER: Final = 100
TERMS_TOGETHER: Final = 40
MAX_SERVERS_BYTES: Final = 4_000
MAX_QUERY_BYTES: Final = 15_000
"""Of a query's text: VictoriaMetrics refuses more than 16 KiB."""
EXACT_TERMS: Final = 20
"""So many labelled metrics of one name are asked for by labels; of more, all of that name are, and picked here."""
MAX_AHEAD_MS: Final = 7_200_000
"""No row is further ahead of our clock; it keeps ranges without an end from being asked for by the century."""
EDGES_KNOWN_S: Final = 5.0
"""And no longer than until a request fails: less than it takes to put another version in a store's place unnoticed."""
SLICES: Final = 64
MAX_POINTS: Final = 10_000_000
MAX_READ_POINTS: Final = 10_000_000
MAX_SERIES: Final = 20_000
_COMPLETE: Final = (("deny_partial_response", "1"), ("partial_response", "false"))
"""VictoriaMetrics and Thanos then answer with an error where a part of them is away."""


class PrometheusHistory:
    """The history that a store holds; see `RemoteHistory`."""

    def __init__(
        self,
        *,
        query_urls: Sequence[str],
        bearer_token: str = "",
        tenant: str = "",
        clock: Clock,
        max_points: int = MAX_POINTS,
        max_read_points: int = MAX_READ_POINTS,
        max_series: int = MAX_SERIES,
    ) -> None:
        """Prepares connections; none is made before the first query.

        Args:
            query_urls: bases of the query API, tried in turn.
            bearer_token: sent with every request when not empty.
            tenant: sent as X-Scope-OrgID when not empty.
            clock: of the circuit, and of what cannot have been written yet.
            max_points: of one answer.
            max_read_points: that one query may read back to make windows of them.
            max_series: of one answer.
        """
        self._nodes = Nodes(query_urls, bearer_token=bearer_token, tenant=tenant)
        self._clock = clock
        self._circuit = Circuit("PROMETHEUS_QUERY_URL", clock)
        self._pool = ThreadPoolExecutor(QUERY_THREADS, "prometheus-query")
        self._max_points, self._max_read_points, self._max_series = max_points, max_read_points, max_series
        self._closed_left = False
        self._edges_until_s = float("-inf")

    @property
    def name(self) -> str:
        return "prometheus"

    async def close(self) -> None:
        """A request that runs ends by itself, within QUERY_TIMEOUT_S for each node."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._nodes.close()

    async def query(self, query: Query, metrics: Mapping[str, Metric]) -> AsyncIterator[SeriesResult]:
        """See `RemoteHistory.query`."""
        check_query(query)
        run = Run(
            query=query,
            metrics=metrics,
            start_ms=max(query.start_ms, MIN_TIME_MS),
            end_ms=min(query.end_ms, MAX_TIME_MS + 1, self._clock.now_ms() + MAX_AHEAD_MS),
            selectors=None if query.metrics is None else frozenset(query.metrics),
        )
        check_rate(run, run.selectors or ())
        if run.start_ms >= run.end_ms or query.server_ids == () or query.metrics == ():
            return
        try:
            await self._learn_edges(run)
            terms = await self._terms(run)
            servers = await self._servers(run, terms) if terms else []
            for some in promql.servers_together(servers, SERVERS_TOGETHER, MAX_SERVERS_BYTES):
                found = await self._answered(run, terms, some)
                for (server_id, key), (times, values) in sorted(found.items(), key=lambda item: item[0]):
                    if len(times):
                        yield self._result(run, server_id, key, times, values)
        finally:
            run.cancel.set()  # a caller that is gone: what is on its way is not read to its end

    def _result(
        self, run: Run, server_id: str, key: str, times: NDArray[np.int64], values: NDArray[np.float64]
    ) -> SeriesResult:
        run.series += 1
        run.returned += len(times)
        if run.series > self._max_series:
            raise ResourceExhausted(f"more than max_series = {self._max_series} series", reason="MAX_SERIES")
        if run.returned > self._max_points:
            raise self._too_many_points()
        metric = run.metrics.get(key)
        return SeriesResult(
            server_id=server_id,
            metric_key=key,
            unit=metric.unit if metric else "",
            kind=metric.kind if metric else MetricKind.UNSPECIFIED,
            times_ms=times,
            values=values,
        )

    def _too_many_points(self) -> ResourceExhausted:
        return ResourceExhausted(
            f"the answer has more than max_points = {self._max_points} points", reason="MAX_POINTS"
        )

    # What there is

    async def _learn_edges(self, run: Run) -> None:
        """Whether a range includes its left edge, as before Prometheus 3; by a query of no data. Asked again, since the
        store may have become another version."""
        if self._clock.monotonic() >= self._edges_until_s:
            fields = [("query", "count_over_time(vector(1)[2s:1s])"), ("time", "2001-01-01T00:00:00Z")]
            found = await self._series(run, "/api/v1/query", fields)
            self._closed_left = bool(found) and bool(found[0].values[-1] == 3)
            self._edges_until_s = self._clock.monotonic() + EDGES_KNOWN_S
        run.closed_left = self._closed_left

    async def _terms(self, run: Run) -> list[Term]:
        """The metrics that may match, by name; what they bring is looked at again."""
        if run.query.metrics is None:
            servers = run.query.server_ids
            matcher = promql.of_servers(servers)
            if len(matcher) > MAX_SERVERS_BYTES:
                matcher = promql.of_servers(None)
            names = await self._label_values(run, NAME, [matcher])
            return [Term(name) for name in names]
        exact: dict[str, list[Term]] = {}
        whole: set[str] = set()
        for wanted in run.query.metrics:
            known = run.metrics.get(wanted)
            labels = labels_of(known.name, known.labels) if known is not None and known.labels else None
            if labels is not None:
                name = labels.pop(NAME)
                exact.setdefault(name, []).append(Term(name, tuple(sorted(labels.items()))))
            else:  # a name; or the key of a metric that only the store knows, whose name ends before some brace
                whole.add(escaped_name(wanted))
                whole.update(escaped_name(wanted[:at]) for at, found in enumerate(wanted) if found == "{" and at)
        whole.update(
            name
            for name, terms in exact.items()
            if len(terms) > EXACT_TERMS or max(term.bytes for term in terms) > MAX_SERVERS_BYTES // 2
        )
        terms = [Term(name) for name in whole]
        terms += [term for name, of_name in exact.items() if name not in whole for term in of_name]
        return sorted(terms)

    async def _servers(self, run: Run, terms: Sequence[Term]) -> list[str]:
        if run.query.server_ids is not None:
            return sorted(set(run.query.server_ids))
        matchers = [promql.of_servers(None)]
        named = promql.any_of(NAME, sorted({term.name for term in terms}))
        if len(named) <= MAX_SERVERS_BYTES:
            matchers.append(named)
        return await self._label_values(run, SERVER_ID, matchers)

    async def _label_values(self, run: Run, label: str, matchers: Sequence[str]) -> list[str]:
        """What may have points in the range, and perhaps more. Up to now: of a past range Prometheus does not name
        the series whose samples came out of order."""
        fields = [("match[]", promql.selector(matchers)), ("start", promql.instant(run.read_from_ms))]
        fields.append(("end", promql.instant(max(run.end_ms, self._clock.now_ms()))))
        found = await self._ask(run, "GET", f"/api/v1/label/{label}/values", [*fields, *_COMPLETE])
        return sorted(texts(found))

    # What it comes to

    async def _answered(self, run: Run, terms: Sequence[Term], servers: Sequence[str]) -> dict[tuple[str, str], Points]:
        query = run.query
        if query.step_ms and query.aggregation in promql.PUSHED_DOWN:
            return await self._pushed_down(run, terms, servers)
        if query.step_ms and query.aggregation is Aggregation.LAST:
            return await self._last(run, terms, servers)
        found = await self._points(run, terms, servers, run.read_from_ms, run.end_ms)
        check_rate(run, (key for _, key in found))
        return found if not query.step_ms else windowed(run, found)

    async def _pushed_down(
        self, run: Run, terms: Sequence[Term], servers: Sequence[str]
    ) -> dict[tuple[str, str], Points]:
        pieces: dict[tuple[str, str], list[Points]] = {}
        matcher = promql.of_servers(servers)
        requests = (
            (promql.windows(some, matcher, run.query.aggregation, run.width(part)), part)
            for some in promql.terms_together(terms, TERMS_TOGETHER, MAX_QUERY_BYTES, matcher)
            for part in self._parts(run, len(some) * len(servers))
        )
        async for found in self._all_evaluated(run, requests):
            self._collect(run, pieces, found)
        return {identity: joined(of_one) for identity, of_one in pieces.items()}

    async def _last(self, run: Run, terms: Sequence[Term], servers: Sequence[str]) -> dict[tuple[str, str], Points]:
        """Each series' last points; where a window has those of several, their points tell which is the last."""
        pieces: dict[tuple[str, str], list[Points]] = {}
        names: dict[tuple[str, str], str] = {}
        matcher = promql.of_servers(servers)
        requests = (
            (f"last_over_time({promql.ranged([*matchers, matcher], run.width(part))})", part)
            for matchers, count in promql.selections(terms, TERMS_TOGETHER, MAX_SERVERS_BYTES)
            for part in self._parts(run, count * len(servers))
        )
        async for series in self._all_evaluated(run, requests):
            self._collect(run, pieces, series)
            names.update((one.identity, one.labels[NAME]) for one in series)
        found = {}
        for identity, of_one in pieces.items():
            times, values = in_order(of_one)
            twice = times[1:][times[1:] == times[:-1]]
            if len(twice):
                step_ms = run.query.step_ms
                start, end = max(int(twice[0]), run.start_ms), min(int(twice[-1]) + step_ms, run.end_ms)
                points = (await self._points(run, [Term(names[identity])], identity[:1], start, end)).get(identity)
                if points is not None:
                    labels, last = Windows(start, step_ms, Aggregation.LAST).of(*points)
                    kept = ~np.isin(times, labels)
                    times, values = in_order([(times[kept], values[kept]), (labels, last)])
            found[identity] = times, values
        return found

    def _collect(self, run: Run, pieces: dict[tuple[str, str], list[Points]], found: Sequence[Found]) -> None:
        """Keeps what is wanted; the bound of the answer is looked at while it grows."""
        for series in found:
            if run.wants(series):
                pieces.setdefault(series.identity, []).append((series.times_ms, series.values))
                run.read += len(series.times_ms)
        if run.read > self._max_points:
            raise self._too_many_points()

    def _parts(self, run: Run, series: int) -> list[Part]:
        step_ms = run.query.step_ms
        if (run.end_ms - run.start_ms) // step_ms > MAX_WINDOWS:
            raise ResourceExhausted(
                f"more than {MAX_WINDOWS} windows (MAX_WINDOWS): a longer step or a shorter range", reason="MAX_POINTS"
            )
        most = min(MAX_STEPS, POINTS_TOGETHER // series, SCANNED_TOGETHER * 10_000 // (series * step_ms))
        return promql.parts(run.start_ms, run.end_ms, step_ms, max(1, most))

    async def _all_evaluated(self, run: Run, requests: Iterable[tuple[str, Part]]) -> AsyncIterator[list[Found]]:
        """The answers in order; some are asked for at once, unless one is to show first that the store is back."""
        waiting = iter(requests)
        while some := list(
            itertools.islice(waiting, QUERY_THREADS if self._circuit.state is CircuitState.CLOSED else 1)
        ):
            for found in await asyncio.gather(*(self._evaluated(run, text, part) for text, part in some)):
                yield found

    async def _evaluated(self, run: Run, text: str, part: Part) -> list[Found]:
        """The windows of a part, labelled as ours are."""
        if part.count == 1:
            fields = [("query", text), ("time", promql.instant(part.at_ms))]
            found = await self._series(run, "/api/v1/query", fields)
            return [series._replace(times_ms=np.full(len(series.values), part.label_ms)) for series in found]
        last_ms = part.at_ms + (part.count - 1) * part.step_ms
        fields = [("query", text), ("start", promql.instant(part.at_ms)), ("end", promql.instant(last_ms))]
        found = await self._series(run, "/api/v1/query_range", [*fields, ("step", f"{part.step_ms}ms")])
        return [series._replace(times_ms=series.times_ms - part.at_ms + part.label_ms) for series in found]

    # Points

    async def _points(
        self, run: Run, terms: Sequence[Term], servers: Sequence[str], start_ms: int, end_ms: int
    ) -> dict[tuple[str, str], Points]:
        """The points of some series in a range, each time once."""
        pieces: dict[tuple[str, str], list[Points]] = {}
        matcher = promql.of_servers(servers)
        for some in promql.terms_together(terms, TERMS_TOGETHER, MAX_QUERY_BYTES, matcher):
            for start, end in await self._slices(run, some, matcher, start_ms, end_ms):
                width = run.width(Part(start, start, end, end - start))
                for matchers, _ in promql.selections(some, TERMS_TOGETHER, MAX_SERVERS_BYTES):
                    text = promql.ranged([*matchers, matcher], width)
                    fields = [("query", text), ("time", promql.instant(end - 1))]
                    for series in await self._series(run, "/api/v1/query", fields):
                        if run.wants(series):
                            pieces.setdefault(series.identity, []).append((series.times_ms, series.values))
        return {identity: distinct(*in_order(of_one)) for identity, of_one in pieces.items()}

    async def _slices(
        self, run: Run, terms: Sequence[Term], servers: str, start_ms: int, end_ms: int
    ) -> list[tuple[int, int]]:
        """Cuts a range where points are many; those without any are left out. Counts against the bounds."""
        whole = Part(start_ms, start_ms, end_ms, end_ms - start_ms)
        counted = await self._evaluated(run, promql.total(terms, servers, run.width(whole)), whole)
        points = int(sum(series.values.sum() for series in counted))
        run.read += points
        if not run.query.step_ms and run.read > self._max_points:
            raise self._too_many_points()
        if run.read > self._max_read_points:
            raise ResourceExhausted(
                f"the query reads back more than max_read_points = {self._max_read_points} points",
                reason="MAX_SCANNED_POINTS",
            )
        return await self._cut(run, terms, servers, start_ms, end_ms, points)

    async def _cut(
        self, run: Run, terms: Sequence[Term], servers: str, start_ms: int, end_ms: int, points: int
    ) -> list[tuple[int, int]]:
        if not points:
            return []
        width = -(-(end_ms - start_ms) // SLICES)
        if points <= POINTS_TOGETHER or width < 2:
            return [(start_ms, end_ms)]
        part = Part(start_ms, start_ms, start_ms + width, width, SLICES)
        counts: dict[int, int] = {}
        for series in await self._evaluated(run, promql.total(terms, servers, run.width(part)), part):
            for label, count in zip(series.times_ms.tolist(), series.values.tolist(), strict=True):
                counts[label] = counts.get(label, 0) + int(count)
        found: list[tuple[int, int]] = []
        held = 0
        for label in sorted(counts):
            end = min(label + width, end_ms)
            if counts[label] > POINTS_TOGETHER:
                found += await self._cut(run, terms, servers, label, end, counts[label])
                held = POINTS_TOGETHER
            elif found and held + counts[label] <= POINTS_TOGETHER:
                found[-1], held = (found[-1][0], end), held + counts[label]
            else:
                found.append((label, end))
                held = counts[label]
        return found

    # Requests

    async def _series(self, run: Run, path: str, fields: list[tuple[str, str]]) -> list[Found]:
        """The series of an answer, NaN left out."""
        # nocache and latency_offset: VictoriaMetrics would align the range, and repeat old values in its last 30 s
        exact = [("nocache", "1"), ("latency_offset", "1ms")]
        data = await self._ask(run, "POST", path, [*fields, *exact, *_COMPLETE])
        found: list[Found] = await self._in_thread(decoded, data)
        return found

    async def _ask(self, run: Run, method: str, path: str, fields: list[tuple[str, str]]) -> Any:
        try:
            with self._circuit.attempt():
                async with patiently(self.name):
                    return await self._in_thread(self._request, run, method, path, fields)
        except (Unavailable, DeadlineExceeded):
            self._edges_until_s = float("-inf")
            raise

    async def _in_thread(self, work: Any, *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *arguments)

    def _request(self, run: Run, method: str, path: str, fields: list[tuple[str, str]]) -> Any:
        answer = self._nodes.request(
            method,
            path,
            fields=fields,
            timeout_s=QUERY_TIMEOUT_S,
            max_bytes=MAX_ANSWER_BYTES,
            cancel=run.cancel,
        )
        return data_of(answer)
