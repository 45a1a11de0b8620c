"""InfluxDB 2 as a follower: line protocol over its HTTP API. The only file that imports influxdb_client.

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
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from operator import add
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import numpy as np
import orjson
from influxdb_client.client.influxdb_client import InfluxDBClient
from influxdb_client.domain.write_precision import WritePrecision
from influxdb_client.rest import ApiException
from influxdb_client.service.write_service import WriteService
from numpy.typing import NDArray
from urllib3.exceptions import HTTPError

from fleet.model import MetricSet
from runtime.errors import InvalidArgument, OpenManagerError, Unavailable, clip
from runtime.redaction import redact, remember_secret
from services.timeseries.followers.follower import BackendInfo, Receipt, TaggedRows

NAME: Final = "influxdb"
MEASUREMENT: Final = b"server_metrics"

CONNECT_TIMEOUT_S: Final = 2.0
WRITE_TIMEOUT_S: Final = 10.0
"""For the answer to one write; also how long a stop may wait for a store that hangs."""
PROBE_TIMEOUT_S: Final = 1.2
"""Less than the monitor's 1.5 s, so that the error says what it is."""
MAX_BODY_BYTES: Final = 8 << 20
"""Of a request before compression; a batch with longer lines takes several."""
MAX_LINE_BYTES: Final = 1 << 20
"""Field names of one line. A row of more is several lines, which InfluxDB joins again."""
MAX_FIELD_BYTES: Final = 60_000
"""InfluxDB refuses a series key and field of more than 65,535 bytes; tags take up to 2.8 kB."""
MAX_CACHED_SETS: Final = 64
MAX_CACHED_TAGS: Final = 65_536
MAX_ERROR_BYTES: Final = 300
GZIP_LEVEL: Final = 1

INFINITE_VALUE: Final = "INFINITE_VALUE"
NAME_NOT_REPRESENTABLE: Final = "NAME_NOT_REPRESENTABLE"

_TAG_ESCAPES: Final = str.maketrans({",": "\\,", "=": "\\=", " ": "\\ "})
_FIELD_ESCAPES: Final = str.maketrans({",": "\\,", "=": "\\=", " ": "\\ ", '"': '\\"'})
# InfluxDB reads a backslash together with what follows it, and has no way to say a backslash itself: a name in which an
# odd run of them stands before a special character, or any at the end, would swallow that character.
_UNFIT_FIELD: Final = re.compile(r"(?<!\\)(?:\\\\)*\\[,= ]|\\$|\n")
_UNFIT_TAG: Final = re.compile(r"\\$|\n")

_PERMANENT: Final = frozenset({400, 413, 422})
_DROPPED: Final = re.compile(r"dropped=(\d+)")
_REASONS: Final = (
    ("retention policy", "BEYOND_RETENTION"),
    ("field type conflict", "FIELD_TYPE_CONFLICT"),
    ("unable to parse", "UNREADABLE_LINE"),
)

_T = TypeVar("_T")


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
    head = MEASUREMENT
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
    """A bucket, which is expected to exist."""

    def __init__(self, *, url: str, token: str, org: str, bucket: str) -> None:
        """Prepares connections; none is made before the first call.

        Args:
            url: http:// or https://, checked by the settings.
            token: an API token that may write the bucket.
            org: the organization's name.
            bucket: the bucket's name.
        """
        remember_secret(token)
        parts = urlsplit(url)
        self._address = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._org, self._bucket = org, bucket
        self._encoder = LineEncoder()
        self._client: Any = InfluxDBClient(url=url, token=token, org=org, timeout=round(WRITE_TIMEOUT_S * 1_000))
        self._service: Any = WriteService(self._client.api_client)  # type: ignore[no-untyped-call]  # the driver is half typed
        self._shipping = ThreadPoolExecutor(1, "influxdb-ship")
        self._probing = ThreadPoolExecutor(1, "influxdb-probe")

    @property
    def name(self) -> str:
        return NAME

    async def ship(self, batch: Sequence[TaggedRows]) -> Receipt:
        return await _in(self._shipping, lambda: self._ship(batch))

    async def probe(self) -> BackendInfo:
        """Writes nothing, which InfluxDB answers as it would rows: it looks at token, organization and bucket."""

        def write_nothing() -> str:
            headers = self._post(b"", round(PROBE_TIMEOUT_S * 1_000))
            return str(headers.get("X-Influxdb-Version", "?"))

        return BackendInfo(address=self._address, version=f"InfluxDB {await _in(self._probing, write_nothing)}")

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
                self._post(body.text, (round(CONNECT_TIMEOUT_S * 1_000), round(WRITE_TIMEOUT_S * 1_000)))
            except InvalidArgument as error:
                if error.metadata.get("dropped") != str(body.lines):  # only some: the follower finds which
                    raise
                refused[error.reason] += body.points
            else:
                shipped += body.points
        return Receipt(shipped=shipped, refused=+refused)

    def _post(self, text: bytes, timeout_ms: int | tuple[int, int]) -> Any:
        """Writes lines; returns the answer's headers. `timeout_ms` is in all, or for (connect, answer)."""
        with self._as_ours():
            _, _, headers = self._service.post_write_with_http_info(
                org=self._org,
                bucket=self._bucket,
                body=gzip.compress(text, GZIP_LEVEL) if text else b"",
                precision=WritePrecision.MS,
                _request_timeout=timeout_ms,
                **({"content_encoding": "gzip"} if text else {}),
            )
        return headers

    @contextmanager
    def _as_ours(self) -> Iterator[None]:
        """The border where the driver's exceptions become ours; it lets urllib3's through."""
        try:
            yield
        except ApiException as error:
            raise self._answered(error) from None  # its text holds headers and body
        except (HTTPError, OSError) as error:
            text = clip(redact(f"InfluxDB does not answer: {error}"), MAX_ERROR_BYTES)
            raise Unavailable(text, reason="STORE_UNAVAILABLE") from error

    def _answered(self, error: ApiException) -> OpenManagerError:
        status, said = int(error.status or 0), clip(redact(str(error.message)), MAX_ERROR_BYTES)
        if status in _PERMANENT:
            whole_text = str(error.message)
            reason = next((reason for words, reason in _REASONS if words in whole_text), f"REFUSED_{status}")
            dropped = _DROPPED.search(whole_text)
            return InvalidArgument(said, reason=reason, metadata={"dropped": dropped[1]} if dropped else None)
        if status == 401:
            return Unavailable(f"InfluxDB refuses INFLUXDB_TOKEN: {said}", reason="STORE_REFUSED")
        if status == 403:
            return Unavailable(
                f"INFLUXDB_TOKEN may not write to the bucket {self._bucket!r}: {said}", reason="STORE_REFUSED"
            )
        if status == 404:
            return Unavailable(
                f"INFLUXDB_ORG {self._org!r} or INFLUXDB_BUCKET {self._bucket!r} does not exist: {said}",
                reason="STORE_REFUSED",
            )
        return Unavailable(
            f"InfluxDB answers {status}: {said}",
            reason="STORE_UNAVAILABLE",
            retry_after_s=_seconds(error.headers.get("Retry-After") if error.headers else None),
        )


def _seconds(text: str | None) -> float | None:
    return float(text) if text is not None and text.isdecimal() else None


async def _in(pool: ThreadPoolExecutor, work: Callable[[], _T]) -> _T:
    return await asyncio.get_running_loop().run_in_executor(pool, work)
