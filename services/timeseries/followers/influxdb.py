"""InfluxDB 2 as a follower: line protocol over its HTTP API.

    server_metrics,environment=E,role=R,server_id=S cpu_usage=1.5,disk\\ usage{k\\="v"}=2.0 1700000000000

Measurement `server_metrics`; tags environment, role and server_id, an empty one left out; a float field for each
metric, named by the metric's key; milliseconds. Absent values are left out; infinite ones, which InfluxDB does not
know, and names that line protocol cannot hold are left out and counted.

What must stay true: the same row always makes the same line, so that a repeated one changes nothing; neither encoding,
compression nor waiting happens on the event loop; every request has a time-out; no message holds the token. What an
operator mends (token, bucket, permission) is an outage, never a refusal: nothing is given up for it.

The driver's asynchronous client needs aiohttp, and its gzip is level 9 (4.1 us a point, level 1: 0.44 us and 7 % more
bytes), so its synchronous client is used in a thread with lines compressed here.
"""

import asyncio
import gzip
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from operator import add
from typing import Any, Final, TypeVar

import numpy as np
import orjson
from influxdb_client.domain.write_precision import WritePrecision
from influxdb_client.rest import ApiException
from influxdb_client.service.write_service import WriteService
from numpy.typing import NDArray

from fleet.model import MetricSet
from runtime.errors import InvalidArgument, OpenManagerError, Unavailable, clip
from runtime.redaction import redact
from services.timeseries.followers.backend import BackendInfo, Receipt, TaggedRows
from services.timeseries.followers.influxdb_api import (
    CONNECT_TIMEOUT_S,
    MAX_ERROR_BYTES,
    MEASUREMENT,
    NAME,
    InfluxTarget,
    text_of,
)
from services.timeseries.followers.influxdb_bucket import BACKFILL, Bucket

WRITE_TIMEOUT_S: Final = 10.0
"""For the answer to one write; also how long a stop may wait for a store that hangs."""
PROBE_TIMEOUT_S: Final = 1.2
"""Less than the monitor's 1.5 s, so that the error says what it is."""
WRITTEN: Final = 204
"""What InfluxDB answers to lines that it has; a log-in page before it, or a web server in its place, says 200."""
MAX_BODY_BYTES: Final = 8 << 20
"""Of a request before compression; a batch with longer lines takes several."""
MAX_LINE_BYTES: Final = 1 << 20
"""Field names of one line. A row of more is several lines, which InfluxDB joins again."""
MAX_FIELD_BYTES: Final = 60_000
"""InfluxDB refuses a series key and field of more than 65,535 bytes; tags take up to 2.8 kB."""
MAX_CACHED_SETS: Final = 64
MAX_CACHED_TAGS: Final = 65_536
GZIP_LEVEL: Final = 1

INFINITE_VALUE: Final = "INFINITE_VALUE"
NAME_NOT_REPRESENTABLE: Final = "NAME_NOT_REPRESENTABLE"

_TAG_ESCAPES: Final = str.maketrans({",": "\\,", "=": "\\=", " ": "\\ "})
_FIELD_ESCAPES: Final = str.maketrans({",": "\\,", "=": "\\=", " ": "\\ ", '"': '\\"'})
# InfluxDB reads a backslash together with what follows it, and has no way to say a backslash itself: a name in which an
# odd run of them stands before a special character, or any at the end, would swallow that character.
# Some control characters end lines or vanish at the beginning of a name; none is in what the service takes.
_UNFIT_FIELD: Final = re.compile(r"(?<!\\)(?:\\\\)*\\[,= ]|\\$|[\x00-\x1f]")
_UNFIT_TAG: Final = re.compile(r"\\$|[\x00-\x1f]")

_PERMANENT: Final = frozenset({400, 413, 422})
_DROPPED: Final = re.compile(r"dropped=(\d+)")
_REASONS: Final = (
    ("retention policy", "BEYOND_RETENTION"),
    ("field type conflict", "FIELD_TYPE_CONFLICT"),
    ("unable to parse", "UNREADABLE_LINE"),
)

_T = TypeVar("_T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """Columns that go into one line: each field's `name=`, and all of them as one %-template."""

    columns: slice
    prefixes: tuple[bytes, ...]
    template: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """How the rows of a set are written; `unfit` are the columns that cannot be."""

    chunks: tuple[_Chunk, ...]
    unfit: NDArray[np.bool_]
    any_unfit: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """Lines of one request, uncompressed."""

    text: bytes
    lines: int
    points: int


def field_name(key: str) -> bytes | None:
    """A metric's key as line protocol writes it; None when it cannot."""
    if key == "time" or _UNFIT_FIELD.search(key):  # InfluxDB drops a field `time` silently
        return None
    escaped = key.translate(_FIELD_ESCAPES).encode()
    return escaped if len(escaped) <= MAX_FIELD_BYTES else None


@lru_cache(maxsize=MAX_CACHED_TAGS)
def line_head(server_id: str, environment: str, role: str) -> bytes | None:
    """Measurement and tags of a line, with the space behind them; None when line protocol cannot hold a tag."""
    head = MEASUREMENT.encode()
    for name, value in ((b"environment", environment), (b"role", role), (b"server_id", server_id)):
        if _UNFIT_TAG.search(value):
            return None
        if value:
            head += b",%b=%b" % (name, value.translate(_TAG_ESCAPES).encode())
    return head + b" "


class LineEncoder:
    """Makes request bodies of rows. Measured for 20 x 511: 0.07 us a point, 0.17 us in rows where some are absent."""

    def __init__(self) -> None:
        self._layouts: dict[str, _Layout] = {}

    def encode(self, batch: Sequence[TaggedRows], refused: Counter[str]) -> Iterator[Body]:
        """Bodies of at most MAX_BODY_BYTES (or one line); counts into `refused` what is left out, by reason."""
        lines: list[bytes] = []
        size = points = 0
        for tagged in batch:
            for line, fields in self._lines(tagged, refused):
                if lines and size + len(line) > MAX_BODY_BYTES:
                    yield Body(text=b"".join(lines), lines=len(lines), points=points)
                    lines, size, points = [], 0, 0
                lines.append(line)
                size += len(line)
                points += fields
        if lines:
            yield Body(text=b"".join(lines), lines=len(lines), points=points)

    def _lines(self, tagged: TaggedRows, refused: Counter[str]) -> Iterator[tuple[bytes, int]]:
        layout = self._layout(tagged.metric_set)
        rows = tagged.rows
        present = np.isfinite(rows.values)
        if not present.all():
            refused[INFINITE_VALUE] += int(np.isinf(rows.values).sum())
        if layout.any_unfit:
            refused[NAME_NOT_REPRESENTABLE] += int(present[:, layout.unfit].sum())
            present[:, layout.unfit] = False
        whole: list[bool] = np.all(present, axis=1).tolist()
        times = rows.times_ms.tolist()
        for row, (server_id, told) in enumerate(zip(rows.server_ids, tagged.descriptors, strict=True)):
            head = line_head(server_id, told.environment if told else "", told.role if told else "")
            if head is None:
                refused[NAME_NOT_REPRESENTABLE] += int(present[row].sum())
                continue
            numbers = _numbers(rows.values[row])
            tail = b" %d\n" % times[row]
            for chunk in layout.chunks:
                part = numbers[chunk.columns]
                fields = len(part)
                if whole[row]:
                    text = chunk.template % tuple(part)
                else:
                    mask = present[row, chunk.columns].tolist()
                    fields = sum(mask)
                    text = b",".join(map(add, compress(chunk.prefixes, mask), compress(part, mask)))
                if fields:
                    yield head + text + tail, fields

    def _layout(self, metric_set: MetricSet) -> _Layout:
        layout = self._layouts.get(metric_set.id)
        if layout is None:
            if len(self._layouts) >= MAX_CACHED_SETS:
                self._layouts.pop(next(iter(self._layouts)))
            layout = self._layouts[metric_set.id] = _layout_of(metric_set)
        return layout


def _numbers(values: NDArray[np.float64]) -> list[bytes]:
    """Each value's shortest decimal that reads back as the same bits. Not finite: `null`."""
    return orjson.dumps(np.ascontiguousarray(values), option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")


def _layout_of(metric_set: MetricSet) -> _Layout:
    names = [field_name(key) for key in metric_set.keys]
    prefixes = [b"" if name is None else name + b"=" for name in names]
    chunks, start, size = [], 0, 0
    for column, prefix in enumerate(prefixes):
        if size and size + len(prefix) > MAX_LINE_BYTES:
            chunks.append(_chunk(prefixes, start, column))
            start, size = column, 0
        size += len(prefix)
    chunks.append(_chunk(prefixes, start, len(prefixes)))
    unfit = np.array([name is None for name in names], np.bool_)
    return _Layout(chunks=tuple(chunks), unfit=unfit, any_unfit=bool(unfit.any()))


def _chunk(prefixes: list[bytes], start: int, stop: int) -> _Chunk:
    template = b",".join(prefix.replace(b"%", b"%%") + b"%b" for prefix in prefixes[start:stop])
    return _Chunk(columns=slice(start, stop), prefixes=tuple(prefixes[start:stop]), template=template)


class InfluxBackend:
    """A bucket, which is made where it is missing."""

    def __init__(self, target: InfluxTarget, retention_s: float | None = None) -> None:
        """Prepares connections; none is made before the first call.

        Args:
            target: the bucket; the token must be allowed to write it.
            retention_s: how long the bucket is to keep points; None: for ever if it is new, else as it does.
        """
        self._target = target
        self._encoder = LineEncoder()
        self._client = target.client(WRITE_TIMEOUT_S)
        self._service: Any = WriteService(self._client.api_client)  # type: ignore[no-untyped-call]  # the driver is half typed
        self._bucket = Bucket(target, self._client, retention_s, WRITE_TIMEOUT_S)
        self._was_there = False
        self._shipping = ThreadPoolExecutor(1, "influxdb-ship")
        self._probing = ThreadPoolExecutor(1, "influxdb-probe")

    @property
    def name(self) -> str:
        return NAME

    @property
    def address(self) -> str:
        return self._target.address

    @property
    def syncs(self) -> bool:
        """Its write-ahead log is synced first (storage-wal-fsync-delay, 0 by default)."""
        return True

    async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
        return await _in(self._shipping, lambda: self._ship(batch))

    async def probe(self) -> BackendInfo:
        """Writes nothing, which InfluxDB answers as it would rows: it looks at token, organization and bucket."""

        def write_nothing() -> str:
            headers = self._write(b"", round(PROBE_TIMEOUT_S * 1_000))
            return str(headers.get("X-Influxdb-Version", "?"))

        return BackendInfo(version=f"InfluxDB {await _in(self._probing, write_nothing)}")

    async def close(self) -> None:
        """A request that runs ends by itself, within WRITE_TIMEOUT_S."""
        for pool in (self._shipping, self._probing):
            pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._client.close)

    def _ship(self, batch: Sequence[TaggedRows]) -> Receipt:
        refused: Counter[str] = Counter()
        shipped = 0
        for body in self._encoder.encode(batch, refused):
            try:
                self._write(body.text, (round(CONNECT_TIMEOUT_S * 1_000), round(WRITE_TIMEOUT_S * 1_000)))
            except InvalidArgument as error:
                if error.metadata.get("dropped") != str(body.lines):  # only some: the follower finds which
                    raise
                refused[error.reason] += body.points
            else:
                shipped += body.points
        self._bucket.settle()
        return Receipt(shipped=shipped, refused=+refused)

    def _write(self, text: bytes, timeout_ms: int | tuple[int, int]) -> Any:
        """Writes lines, into a bucket that is made where it is missing; returns the answer's headers."""
        try:
            headers = self._post(text, timeout_ms)
        except _NoBucketError:
            was_there, self._was_there = self._was_there, False
            if self._bucket.make() and was_there:
                lost = f"INFLUXDB_BUCKET {self._target.bucket!r} was deleted and is created again, empty: {BACKFILL}"
                _log.error("%s", lost)
                raise Unavailable(lost, reason="STORE_REFUSED") from None  # once: told wherever an outage is
            headers = self._post(text, timeout_ms)
        self._was_there = True
        return headers

    def _post(self, text: bytes, timeout_ms: int | tuple[int, int]) -> Any:
        """Writes lines; returns the answer's headers. `timeout_ms` is in all, or for (connect, answer)."""
        with self._target.as_ours(_judge, "write to"):
            said, status, headers = self._service.post_write_with_http_info(
                org=self._target.org,
                bucket=self._target.bucket,
                body=gzip.compress(text, GZIP_LEVEL) if text else b"",
                precision=WritePrecision.MS,
                _request_timeout=timeout_ms,
                **({"content_encoding": "gzip"} if text else {}),
            )
        if status != WRITTEN:
            text_said = clip(redact(str(said or "")), MAX_ERROR_BYTES)
            raise Unavailable(
                f"INFLUXDB_URL leads to something that is no InfluxDB: it answers {status} to rows: {text_said}",
                reason="STORE_REFUSED",
            )
        return headers


class _NoBucketError(Unavailable):
    """The organization is there, the bucket is not."""


def _judge(status: int, said: str, error: ApiException) -> OpenManagerError | None:
    """What a refused write means; None: an outage like any other."""
    whole_text = text_of(error)
    if status in _PERMANENT:
        reason = next((reason for words, reason in _REASONS if words in whole_text), f"REFUSED_{status}")
        dropped = _DROPPED.search(whole_text)
        return InvalidArgument(said, reason=reason, metadata={"dropped": dropped[1]} if dropped else None)
    if status == 404 and whole_text.startswith("bucket"):
        return _NoBucketError(said)
    return None


async def _in(pool: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
    return await asyncio.get_running_loop().run_in_executor(pool, work)
