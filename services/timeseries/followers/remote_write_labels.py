"""The labels of series as remote write has them, prepared for each metric of a set before a server's are known.

1.0 writes every label in full; 2.0 writes each text once a request, and numbers for it. What must stay true: labels are
sorted by name, a metric's own among `environment`, `role` and `server_id`, of which an empty one is left out.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Final, NamedTuple

from fleet.model import Metric, MetricKind
from services.timeseries.prometheus.labels import ENVIRONMENT, ROLE, SERVER_ID, labels_of

_METADATA_TYPES: Final = {MetricKind.COUNTER: 1, MetricKind.GAUGE: 2}


class Version(Enum):
    """Which remote write."""

    V1 = "1.0"
    V2 = "2.0"


def varint(number: int) -> bytes:
    """A protobuf varint."""
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


SHORT_VARINTS: Final = [varint(number) for number in range(1 << 14)]


def delimited(tag: bytes, body: bytes) -> bytes:
    """A field of a message, a text or bytes."""
    return tag + varint(len(body)) + body


class Column(NamedTuple):
    """The labels of a metric around those of its server: sorted, before `environment`, between, and behind."""

    before: tuple[tuple[str, str], ...]
    to_role: tuple[tuple[str, str], ...]
    to_server: tuple[tuple[str, str], ...]
    behind: tuple[tuple[str, str], ...]
    kind: MetricKind
    unit: str


def column_of(metric: Metric) -> Column | None:
    labels = labels_of(metric.name, metric.labels)
    if labels is None:
        return None
    pairs = sorted(labels.items())

    def between(low: str, high: str) -> tuple[tuple[str, str], ...]:
        return tuple(pair for pair in pairs if low < pair[0] and (not high or pair[0] < high))

    return Column(
        before=between("", ENVIRONMENT),
        to_role=between(ENVIRONMENT, ROLE),
        to_server=between(ROLE, SERVER_ID),
        behind=between(SERVER_ID, ""),
        kind=metric.kind,
        unit=metric.unit,
    )


class Prepared(NamedTuple):
    """A column's labels as bytes; `plain` when none lies behind `environment`."""

    before: bytes
    to_role: bytes
    to_server: bytes
    behind: bytes
    metadata: bytes
    plain: bool


class Names:
    """How labels are written in one request; `tag` begins each series."""

    tag: bytes

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> bytes:
        raise NotImplementedError

    def metadata(self, kind: MetricKind, unit: str) -> bytes:
        raise NotImplementedError

    def whole(self, labels: bytes, metadata: bytes) -> bytes:
        raise NotImplementedError

    def head(self) -> bytes:
        raise NotImplementedError

    def prepared(self, column: Column) -> Prepared:
        return Prepared(
            before=self.pairs(column.before),
            to_role=self.pairs(column.to_role),
            to_server=self.pairs(column.to_server),
            behind=self.pairs(column.behind),
            metadata=self.metadata(column.kind, column.unit),
            plain=not (column.to_role or column.to_server or column.behind),
        )

    def all_of(self, columns: list[Prepared | None], tags: tuple[str, str, str]) -> list[bytes | None]:
        """Each column's label part for one server."""
        environment, role, server = (
            self.pairs(((name, value),)) if value else b""
            for name, value in zip((ENVIRONMENT, ROLE, SERVER_ID), tags, strict=True)
        )
        together, whole = environment + role + server, self.whole
        return [
            None
            if column is None
            else whole(column.before + together, column.metadata)
            if column.plain
            else whole(
                b"".join((column.before, environment, column.to_role, role, column.to_server, server, column.behind)),
                column.metadata,
            )
            for column in columns
        ]


class LabelNames(Names):
    """1.0: every label in full, and no metadata."""

    tag = b"\x0a"

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> bytes:
        return b"".join(
            delimited(b"\x0a", delimited(b"\x0a", name.encode()) + delimited(b"\x12", value.encode()))
            for name, value in pairs
        )

    def metadata(self, _kind: MetricKind, _unit: str) -> bytes:
        return b""

    def whole(self, labels: bytes, _metadata: bytes) -> bytes:
        return labels

    def head(self) -> bytes:
        return b""


class SymbolNames(Names):
    """2.0: each text once, and numbers for it."""

    tag = b"\x2a"

    def __init__(self) -> None:
        self._symbols: dict[str, bytes] = {"": b"\x00"}

    def _ref(self, text: str) -> bytes:
        ref = self._symbols.get(text)
        if ref is None:
            ref = self._symbols[text] = varint(len(self._symbols))
        return ref

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> bytes:
        return b"".join([self._ref(text) for pair in pairs for text in pair])

    def metadata(self, kind: MetricKind, unit: str) -> bytes:
        parts = b"\x08" + varint(_METADATA_TYPES[kind]) if kind in _METADATA_TYPES else b""
        if unit:
            parts += b"\x20" + self._ref(unit)
        return delimited(b"\x2a", parts) if parts else b""

    def whole(self, labels: bytes, metadata: bytes) -> bytes:
        size = len(labels)
        return b"\x0a" + (SHORT_VARINTS[size] if size < 16_384 else varint(size)) + labels + metadata

    def head(self) -> bytes:
        return b"".join(delimited(b"\x22", symbol.encode()) for symbol in self._symbols)


def names_of(version: Version) -> Names:
    """For one request."""
    return SymbolNames() if version is Version.V2 else LabelNames()
