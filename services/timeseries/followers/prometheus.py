"""A Prometheus-compatible store as a follower: remote write, 2.0 where the store takes it and says so, else 1.0.

Labels: `__name__`, `server_id`, `environment`, `role` (an empty one is left out) and the metric's own; what Prometheus'
names cannot hold is escaped (`prometheus/labels.py`). NaN is no value; infinities are values.

What must stay true: nothing is taken for written that the store does not say it has, and a page in its place says
nothing. A receiver that does not know 2.0 answers 204 and drops everything (VictoriaMetrics 1.130 does), so 2.0 is used
only with one that counts what it wrote.
What is refused for good is counted by reason, and the rest of its request is written: Prometheus counts it in the
answer; Mimir, which has written the rest by then, and anybody who speaks 1.0 only says that something was refused, and
is asked again with ever smaller halves. A sample that is there already is a no-op for all of them. What an operator
mends (address, token, tenant) is an outage, never a refusal. Nothing waits on the event loop.

Whether the store takes samples out of order decides what becomes of late rows, so it is tried out at the start and
after outages with a series of its own, `openmanager_probe`, and told in the status. Its samples are never newer than
what was shipped: Prometheus takes nothing that is an hour older than the newest sample it has, of whatever series.
"""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final, TypeVar

import cramjam
import orjson

from runtime.clock import Clock
from runtime.errors import OpenManagerError, Unavailable
from services.timeseries.followers.backend import BackendInfo, Receipt, TaggedRows
from services.timeseries.followers.remote_write import Encoded, RemoteWriteEncoder, single
from services.timeseries.followers.remote_write_labels import Version
from services.timeseries.prometheus.client import Answer, Nodes, shown

NAME: Final = "prometheus"
WRITE_TIMEOUT_S: Final = 10.0
"""For the answer of one node to one request."""
PROBE_TIMEOUT_S: Final = 1.2
"""For all nodes together, less than the monitor's 1.5 s, so that the error says what it is."""
LOOK_WAIT_S: Final = 0.3
"""How long a probe waits for what it need not know; as long as that took longer the last time, not at all."""
MAX_BODY_BYTES: Final = 8 << 20
"""Of a request before compression; receivers take 32 MiB."""
MAX_ANSWER_BYTES: Final = 4 << 20
"""Prometheus answers with a line for each refused sample; a longer answer is cut."""
MAX_SEARCH_REQUESTS: Final = 500
"""So many requests look for the refused samples of one; what is not told apart by then is counted as refused, so the
count is then too high. Nothing is lost by it: the store has what it takes."""
VERSION_INTERVAL_S: Final = 60.0
ORDER_PROBE_INTERVAL_S: Final = 3_600.0
ORDER_PROBE_SERIES: Final = "openmanager_probe"
ORDER_PROBE_LATE_MS: Final = (60_000, 3_600_000)

_CONTENT: Final = {
    Version.V1: ("application/x-protobuf", "0.1.0"),
    Version.V2: ("application/x-protobuf;proto=io.prometheus.write.v2.Request", "2.0.0"),
}
_WRITTEN: Final = "X-Prometheus-Remote-Write-Samples-Written"
_MIMIR_REASON: Final = re.compile(r"\(err-mimir-([a-z][a-z-]{2,60})\)")
_MIMIR_REASONS: Final = {
    "sample-out-of-order": "OUT_OF_ORDER",
    "sample-timestamp-too-old": "TOO_OLD",
    "sample-duplicate-timestamp": "DUPLICATE_TIMESTAMP",
}
_REASONS: Final = (
    ("duplicate sample for timestamp", "DUPLICATE_TIMESTAMP"),
    ("too far in the future", "TOO_FAR_IN_FUTURE"),
    ("out of order", "OUT_OF_ORDER"),
    ("too old", "TOO_OLD"),
    ("out of bounds", "TOO_OLD"),
)
_PERMANENT: Final = frozenset({400, 409, 413, 422})
"""409: what Thanos says of samples that are out of order, too old or twice there."""

_T = TypeVar("_T")


class _SpeaksNo2(Exception):  # noqa: N818  no error: the other version is used
    """The store took a request of 2.0 without saying what it wrote, or refused its type."""


class PrometheusBackend:
    """A receiver of remote write, at one address or several."""

    def __init__(
        self,
        *,
        write_urls: Sequence[str],
        query_urls: Sequence[str] = (),
        bearer_token: str = "",
        tenant: str = "",
        clock: Clock,
    ) -> None:
        """Prepares connections; none is made before the first call.

        Args:
            write_urls: whole addresses of remote write, tried in turn.
            query_urls: bases of the query API, asked for the store's version; without one it stays unknown.
            bearer_token: sent with every request when not empty.
            tenant: sent as X-Scope-OrgID when not empty.
            clock: how often to look again.
        """
        self._writers = Nodes(write_urls, bearer_token=bearer_token, tenant=tenant)
        self._nodes = len(write_urls)
        self._readers = Nodes(query_urls, bearer_token=bearer_token, tenant=tenant) if query_urls else None
        self._clock = clock
        self._encoder = RemoteWriteEncoder()
        self._version: Version | None = None
        self._server = ""
        self._note = ""
        self._order_due_s = 0.0
        self._server_due_s = 0.0
        self._newest_ms: int | None = None
        self._shipping = ThreadPoolExecutor(1, "prometheus-ship")
        self._probing = ThreadPoolExecutor(1, "prometheus-probe")
        self._looking = ThreadPoolExecutor(1, "prometheus-look")
        self._look: Future[None] | None = None
        self._looked_s = 0.0

    @property
    def name(self) -> str:
        return NAME

    @property
    def address(self) -> str:
        return self._writers.address

    @property
    def syncs(self) -> bool:
        """VictoriaMetrics holds rows in memory for 5 s; Prometheus and Mimir write without a sync."""
        return False

    async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
        return await self._in(self._shipping, lambda: self._ship(batch))

    async def probe(self) -> BackendInfo:
        """Writes nothing, which is answered as rows would be; at times, samples that are out of order."""
        return await self._in(self._probing, self._probe)

    async def close(self) -> None:
        """A request that runs ends by itself, within WRITE_TIMEOUT_S for each node."""
        for pool in (self._shipping, self._probing, self._looking):
            pool.shutdown(wait=False, cancel_futures=True)
        self._writers.close()
        if self._readers is not None:
            self._readers.close()

    async def _in(self, pool: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work)
        except Unavailable as error:
            if error.reason != "STORE_THROTTLES":
                self._version, self._order_due_s = None, 0.0  # what comes back may be another one
            raise

    def _ship(self, batch: Sequence[TaggedRows]) -> Receipt:
        version = self._agreed(WRITE_TIMEOUT_S)
        try:
            return self._shipped(batch, version)
        except _SpeaksNo2:
            self._version = Version.V1
            return self._shipped(batch, Version.V1)

    def _shipped(self, batch: Sequence[TaggedRows], version: Version) -> Receipt:
        refused: Counter[str] = Counter()
        encoded = self._encoder.encode(batch, version, refused)
        shipped = sum(self._send(part, version, refused) for part in encoded.split(MAX_BODY_BYTES))
        if shipped:
            self._newest_ms = max(self._newest_ms or 0, *(tagged.rows.span_ms[1] for tagged in batch if len(tagged)))
        return Receipt(shipped=shipped, refused=+refused)

    def _send(self, request: Encoded, version: Version, refused: Counter[str]) -> int:
        """Writes a request; returns how many of its samples are there, and counts the others."""
        waiting, shipped, searches = [request], 0, 0
        while waiting:
            part = waiting.pop()
            points = part.points
            answer = self._post(part.body(), version, WRITE_TIMEOUT_S)
            if answer.status not in _PERMANENT:
                written = points if version is Version.V1 else _written(answer)
                if written < points:
                    refused["NOT_WRITTEN"] += points - written
                shipped += min(written, points)
                continue
            found = _counted(answer, points) if version is Version.V2 else None
            if found is not None:
                refused.update(found)
                shipped += points - found.total()
                continue
            halves = part.halves()
            if halves and (searches < MAX_SEARCH_REQUESTS or answer.status == 413):
                searches += 2
                waiting += reversed(halves)
            else:
                refused[_reason(answer)] += points
        return shipped

    def _agreed(self, timeout_s: float) -> Version:
        """Which version the store speaks; asked once, and again after an outage."""
        version = self._version
        if version is None:
            try:
                _written(self._post(b"", Version.V2, timeout_s))
            except _SpeaksNo2:
                version = Version.V1
            else:
                version = Version.V2
            self._version = version
        return version

    def _post(self, body: bytes, version: Version, timeout_s: float) -> Answer:
        """Writes a message. Returns what took it, or refuses it for good; all else is an outage."""
        content, number = _CONTENT[version]
        answer = self._writers.request(
            "POST",
            body=bytes(cramjam.snappy.compress_raw(body)),
            headers={
                "Content-Type": content,
                "Content-Encoding": "snappy",
                "X-Prometheus-Remote-Write-Version": number,
            },
            timeout_s=timeout_s,
            max_bytes=MAX_ANSWER_BYTES,
            may_cut=True,
        )
        status = answer.status
        is_page = answer.headers.get("Content-Type", "").startswith("text/html")  # of a log-in, or for every path
        if (200 <= status < 300 and not is_page) or status in _PERMANENT:
            return answer
        if version is Version.V2 and status in {406, 415}:
            raise _SpeaksNo2
        if status in {401, 403}:
            raise Unavailable(
                f"PROMETHEUS_WRITE_URL refuses PROMETHEUS_BEARER_TOKEN or PROMETHEUS_TENANT: {status} {answer.text}",
                reason="STORE_REFUSED",
            )
        raise Unavailable(
            f"PROMETHEUS_WRITE_URL is no address of remote write: it answers {status} {answer.text}",
            reason="STORE_REFUSED",
        )

    def _probe(self) -> BackendInfo:
        try:
            return self._probed()
        except _SpeaksNo2:  # another one answers now; whoever ships would find out with the next rows
            self._version = Version.V1
            return self._probed()

    def _probed(self) -> BackendInfo:
        ends_s = time.monotonic() + PROBE_TIMEOUT_S
        each_s = PROBE_TIMEOUT_S / min(self._nodes, 2)
        version = self._version
        if version is None:
            version = self._agreed(each_s)
        else:
            self._post(b"", version, each_s)  # an answer that refuses nothing also says that it is there
        self._look_again(version, each_s, ends_s)
        server = f"{self._server}, " if self._server else ""
        return BackendInfo(version=f"{server}remote write {version.value}", note=self._note)

    def _look_again(self, version: Version, timeout_s: float, ends_s: float) -> None:
        """What else there is to know. A probe waits for it while that is quick: a store that takes rows is up, however
        long its query API says nothing, and however long four further answers take."""
        if self._look is None or self._look.done():
            self._look = self._looking.submit(self._look_closer, version, timeout_s)
        if self._looked_s < LOOK_WAIT_S:
            wait([self._look], max(0.0, min(LOOK_WAIT_S, ends_s - time.monotonic())))
            if not self._look.done():
                self._looked_s = LOOK_WAIT_S

    def _look_closer(self, version: Version, timeout_s: float) -> None:
        started_s, now_s = time.monotonic(), self._clock.monotonic()
        try:
            if self._newest_ms is not None and now_s >= self._order_due_s:
                self._note = self._order(version, self._newest_ms, timeout_s)
                self._order_due_s = now_s + ORDER_PROBE_INTERVAL_S
            if now_s >= self._server_due_s:
                self._server = self._asked_version(timeout_s) or self._server
                self._server_due_s = now_s + (VERSION_INTERVAL_S if self._server else 0.0)
        except (Unavailable, _SpeaksNo2):
            return  # the next probe says so, and the one after an outage looks again
        finally:
            self._looked_s = time.monotonic() - started_s

    def _order(self, version: Version, newest_ms: int, timeout_s: float) -> str:
        """Writes a sample, then earlier ones of the same series; says which were taken."""
        taken = []
        for late_ms in (0, *ORDER_PROBE_LATE_MS):
            sample = single(version, ORDER_PROBE_SERIES, max(newest_ms - late_ms, 0), 1.0)
            taken.append(self._post(sample.body(), version, timeout_s).status not in _PERMANENT)
        _, by_a_minute, by_an_hour = taken
        if by_an_hour:
            return "takes samples that are out of order, by an hour at least"
        if by_a_minute:
            return "takes samples that are out of order by a minute, not by an hour: later rows are refused"
        return (
            "takes no samples that are out of order, late rows are refused: set storage.tsdb.out_of_order_time_window "
            "(Prometheus) or limits.out_of_order_time_window (Mimir)"
        )

    def _asked_version(self, timeout_s: float) -> str:
        """What the query API says that it is; empty when it does not say."""
        if self._readers is None:
            return ""
        try:
            answer = self._readers.request("GET", "/api/v1/status/buildinfo", timeout_s=timeout_s)
            found = orjson.loads(answer.data)["data"]
            return shown(f"{found.get('application', 'Prometheus API')} {found['version'] or 'unknown'}".encode())
        except (OpenManagerError, ValueError, LookupError, TypeError, AttributeError):
            return ""  # rows can be written all the same; who asks for history is told what is wrong


def _written(answer: Answer) -> int:
    """How many samples a receiver of 2.0 says it wrote."""
    text = answer.headers.get(_WRITTEN, "")
    if not text.isdecimal():
        raise _SpeaksNo2
    return int(text)


def _counted(answer: Answer, points: int) -> Counter[str] | None:
    """What an answer of 2.0 says was refused, when it adds up; Mimir says that it wrote what it refused."""
    text = answer.headers.get(_WRITTEN, "")
    if not text.isdecimal() or int(text) >= points:
        return None
    missing = points - int(text)
    reasons = Counter(map(_reason_of, answer.data.decode(errors="replace").splitlines()))
    if reasons.total() == missing:
        return reasons
    return Counter({next(iter(reasons)): missing}) if len(reasons) == 1 else None


def _reason(answer: Answer) -> str:
    found = _reason_of(answer.data.decode(errors="replace"))
    return found if found != "REFUSED" else f"REFUSED_{answer.status}"


def _reason_of(text: str) -> str:
    """The reason in a text; what it says of the series and its labels is not looked at."""
    mimir = _MIMIR_REASON.search(text)
    if mimir is not None:
        return _MIMIR_REASONS.get(mimir[1], mimir[1].replace("-", "_").upper())
    said = text.partition(" for series ")[0]
    return next((reason for words, reason in _REASONS if words in said), "REFUSED")
