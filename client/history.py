"""History as numpy arrays, whole or part by part.

A series may be longer than a message; its parts follow each other, and `Joiner` puts them together.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp
from numpy.typing import NDArray

from openmanager.fleet.v1 import history_pb2
from openmanager.gateway.v1 import history_pb2 as public_pb2

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric of one server over time.

    Attributes:
        server_id: empty when servers were put together.
        metric: name, or name{label="value",...}.
        unit: of the values, as the sender gave it (for RATE: a second).
        times: seconds since the Unix epoch, ascending, shape (n,).
        values: shape (n,); a gap is an absent point.
        resolution_s: width of the coarsest roll-ups behind the values; 0: the points as they were written.
    """

    server_id: str
    metric: str
    unit: str
    times: Floats
    values: Floats
    resolution_s: float

    @property
    def identity(self) -> tuple[str, str]:
        """What parts of one series have in common."""
        return self.server_id, self.metric


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """An answer, or a part of one.

    Attributes:
        series: in order of server and metric.
        incomplete: what could not be asked, so that points may be missing; empty: nothing is.
    """

    series: list[Series] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)


def from_message(message: public_pb2.QueryHistoryResponse) -> History:
    """A message of the stream as arrays."""
    return History(series=[_series(one) for one in message.series], incomplete=list(message.incomplete))


def _series(message: history_pb2.Series) -> Series:
    return Series(
        server_id=message.server_id,
        metric=message.metric,
        unit=message.unit,
        times=np.array(message.times, np.float64),
        values=np.array(message.values, np.float64),
        resolution_s=message.resolution.ToNanoseconds() / 1e9,
    )


class Joiner:
    """Puts the parts of a stream together; holds the parts of one series."""

    def __init__(self) -> None:
        self._parts: list[Series] = []

    def add(self, parts: Iterable[Series]) -> list[Series]:
        """Takes the next parts; returns the series that are whole with them."""
        whole = []
        for part in parts:
            if self._parts and self._parts[0].identity != part.identity:
                whole += self.end()
            self._parts.append(part)
        return whole

    def end(self) -> list[Series]:
        """The last series, when the stream is over."""
        parts, self._parts = self._parts, []
        return [_joined(parts)] if parts else []


def _joined(parts: Sequence[Series]) -> Series:
    first = parts[0]
    if len(parts) == 1:
        return first
    return Series(
        server_id=first.server_id,
        metric=first.metric,
        unit=first.unit,
        times=np.concatenate([part.times for part in parts]),
        values=np.concatenate([part.values for part in parts]),
        resolution_s=max(part.resolution_s for part in parts),
    )


def timestamp(moment: datetime | float) -> Timestamp:
    """An instant as a message: a datetime with its zone, or seconds since the Unix epoch."""
    if isinstance(moment, datetime):
        if moment.tzinfo is None:
            raise ValueError(f"{moment} has no time zone: say tzinfo=datetime.UTC, for example")
        moment = moment.timestamp()
    stamp = Timestamp()
    stamp.FromMilliseconds(round(moment * 1_000))
    return stamp
