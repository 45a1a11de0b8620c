"""The values that every process passes around: metrics, metric sets, servers and rows.

They exist apart from the protobuf messages because the engine, the stores and the tests work on numpy columns and
hashable values; ``fleet.codec`` is the only border between the two. What must stay true:

* the identity of a metric is its name and its sorted labels (``Metric.key``); unit and kind only describe it;
* the id of a metric set is a hash of its content, computed the same way by every sender in every language;
* times are ``int64`` milliseconds since the Unix epoch, UTC; a value that is not there is NaN.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

HEADLINE_METRICS = ("cpu_usage", "memory_usage", "disk_usage")
"""Percentages, 0 to 100: what the BASIC view shows and what the health rules judge."""

NO_TIME_MS = -(1 << 63) + 1
"""Stands for the time of a row that has none; no row is taken with it."""

_FEW_ROWS = 100
"""For fewer numbers Python's min and max are faster than numpy's, which take 1.4 us for any."""

_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


class MetricKind(IntEnum):
    """How a metric's values relate; the numbers are those of ``openmanager.fleet.v1.MetricKind``."""

    UNSPECIFIED = 0
    GAUGE = 1
    COUNTER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One column of a metric set.

    Attributes:
        name: the metric's name, for example ``cpu_usage``.
        unit: a UCUM unit (``%``, ``By``, ``By/s``, ``s``, ``1``), or empty when the sender does not know it.
        kind: gauge or counter; a counter only grows, but for resets to (nearly) zero.
        labels: (name, value) pairs sorted by name; senders of plain metrics have none.
    """

    name: str
    unit: str = ""
    kind: MetricKind = MetricKind.UNSPECIFIED
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """The identity as text: ``name``, or ``name{k="v",...}`` with sorted names and escaped values."""
        return metric_key(self.name, self.labels)


def metric_key(name: str, labels: Iterable[tuple[str, str]] = ()) -> str:
    """Returns the text form of a metric's identity.

    Args:
        name: the metric's name.
        labels: (name, value) pairs in any order.
    """
    pairs = ",".join(f'{label}="{value.translate(_ESCAPES)}"' for label, value in sorted(labels))
    return f"{name}{{{pairs}}}" if pairs else name


@dataclass(frozen=True)
class MetricSet:
    """An ordered list of metrics: the dictionary that turns a row of numbers into named values.

    Not slotted, so that ``id`` and ``keys`` are computed once: hashing 511 metrics takes 1 ms.
    """

    metrics: tuple[Metric, ...]

    @cached_property
    def id(self) -> str:
        """32 hexadecimal digits: the first 16 bytes of SHA-256 over the metrics in order.

        Each metric contributes name, unit, kind as a decimal number and then each label's name and value in sorted
        order; every one of these is preceded by its UTF-8 length in bytes as a decimal number and a colon, and each
        metric ends with a semicolon. A length before each text makes two different sets differ in the hashed bytes.
        """
        digest = hashlib.sha256()
        for metric in self.metrics:
            texts = [metric.name, metric.unit, str(int(metric.kind))]
            texts.extend(text for label in sorted(metric.labels) for text in label)
            for text in texts:
                encoded = text.encode()
                digest.update(b"%d:%b" % (len(encoded), encoded))
            digest.update(b";")
        return digest.hexdigest()[:32]

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The metrics' identities as text, in the order of the columns."""
        return tuple(metric.key for metric in self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerDescriptor:
    """What a sender says of a server, once a stream and on change.

    Attributes:
        server_id: the stable identity, at most 255 characters.
        report_interval_ms: how often rows are to be expected; 0 when the sender does not say.
    """

    server_id: str
    hostname: str
    environment: str = ""
    role: str = ""
    location: str = ""
    report_interval_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerDetails:
    """What is recorded of a server beside its descriptor, as far as the live state shows it.

    Attributes:
        revision: grows by one with every change of the record; 0: no record is known.
        labels: (key, value) pairs sorted by key.
        has_notes: the record has notes.
        maintenance: windows that had not ended, [start, end) in ms since the epoch, in order.
    """

    revision: int = 0
    labels: tuple[tuple[str, str], ...] = ()
    has_notes: bool = False
    maintenance: tuple[tuple[int, int], ...] = ()

    def in_maintenance(self, now_ms: int) -> bool:
        """Whether a window is open at a time in ms since the epoch."""
        return any(start <= now_ms < end for start, end in self.maintenance)

    def next_edge_ms(self, now_ms: int) -> int | None:
        """When a window begins or ends next; None: never."""
        return min((edge for window in self.maintenance for edge in window if edge > now_ms), default=None)


NO_DETAILS = ServerDetails()


def etag_of(revision: int) -> str:
    """What a change of a record may be compared with; empty where no record is known."""
    return f"r{revision}" if revision else ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """Rows of one metric set: row ``i`` is what server ``server_ids[i]`` measured at ``times_ms[i]``.

    Not slotted, so that what three stages of the write path ask of the arrays is looked up once; nobody changes them.

    Attributes:
        metric_set_id: id of the set that names the columns.
        server_ids: n ids.
        times_ms: int64, shape (n,), milliseconds since the Unix epoch, UTC.
        values: float64, shape (n, m); NaN means no value.
    """

    metric_set_id: str
    server_ids: tuple[str, ...]
    times_ms: NDArray[np.int64]
    values: NDArray[np.float64]

    @cached_property
    def points(self) -> int:
        """How many points the rows hold: cells that are not NaN."""
        return count_points(self.values)

    @cached_property
    def span_ms(self) -> tuple[int, int]:
        """The first and the last time; there must be rows."""
        if len(self.times_ms) > _FEW_ROWS:
            return int(self.times_ms.min()), int(self.times_ms.max())
        few = self.times_ms.tolist()
        return min(few), max(few)

    def select(self, keep: NDArray[np.bool_]) -> "Rows":
        """Returns the rows where ``keep`` (bool, shape (n,)) is true."""
        return Rows(
            metric_set_id=self.metric_set_id,
            server_ids=tuple(np.array(self.server_ids, dtype=object)[keep]),
            times_ms=self.times_ms[keep],
            values=self.values[keep],
        )


def count_points(values: NDArray[np.float64]) -> int:
    """How many cells are not NaN."""
    return values.size - int(np.count_nonzero(np.isnan(values)))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowError:
    """Why one row of a batch was not taken; the other rows are durable.

    Attributes:
        row: index in the batch as it was sent.
        field: the field at fault, for example ``rows[3].time``.
        reason: UPPER_SNAKE, for example ``TIME_IN_FUTURE``.
        message: for people.
    """

    row: int
    field: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteBatch:
    """What a sender writes at once: the rows, the set that names their columns and the servers they belong to."""

    metric_set: MetricSet
    rows: Rows
    servers: tuple[ServerDescriptor, ...] = field(default=())
