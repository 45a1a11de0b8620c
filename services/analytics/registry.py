"""Who is watched: servers, their series, and where in the arrays each has its place.

A series is a metric of a server, whatever set it came in, so that it goes on when the server's set changes, but for one
that means something else from then on (`detect.Series`); it has a cell. A stream is a server and a set, and knows the
cells of its rows. A server that comes with its first set gets cells side by side, so that a tick of the fleet is mostly
slices.

What must stay true: there are never more servers, series and streams than the limits, what is beyond is refused and
told once; cell 0 is nobody's and takes the values of refused series; places change only in `compact`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray

from services.analytics.detect import Series, SetColumns
from services.analytics.scoring.arrays import Columns, Flags, Integers

_STREAMS_PER_SERVER: Final = 4
"""With more of them those that are not in use are forgotten."""
_FIRST_STREAMS: Final = 64
_UNKNOWN: Final = -2
_SCATTERED: Final = -1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is watched at most. A series takes 2.2 kB of memory, 0.5 GB for all of them, and while servers come or go
    twice that."""

    servers: int = 50_000
    series: int = 200_000
    streams: int = 400_000


@dataclass(slots=True, eq=False)
class _Cells(Columns):
    """Of each series: its server, -1 for nobody's, its name, its kind, and what it foretells."""

    server: Integers
    name: Integers
    is_counter: Flags
    role: NDArray[np.int8]

    SHAPES: ClassVar = {
        "server": ((), np.int64, -1),
        "name": ((), np.int64, 0),
        "is_counter": ((), np.bool_, 0),
        "role": ((), np.int8, 0),
    }


@dataclass(slots=True, eq=False)
class _Streams(Columns):
    """Of each stream: its server, its set, and its first cell where they lie side by side."""

    server: Integers
    set_number: Integers
    first: Integers

    SHAPES: ClassVar = {
        "server": ((), np.int64, -1),
        "set_number": ((), np.int64, 0),
        "first": ((), np.int64, _UNKNOWN),
    }


class Registry:
    """The watched servers, series and streams, in the order in which they came."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.server_ids: list[str] = []
        self.names: list[str] = [""]
        self.cell_count = 1
        self.lacking: set[str] = set()
        """Servers of which series were refused. Another set where places changed, so that it can be read meanwhile."""
        self._is_told: set[str] = set()
        self._named: tuple[str, Integers] | None = None
        self._servers: dict[str, int] = {}
        self._name_places: dict[str, int] = {"": 0}
        self._cells = _Cells.fresh(1)
        self._cell_of: list[dict[Series, int]] = []  # of each server
        self._set_numbers: dict[str, int] = {}
        self._by_set: dict[str, dict[str, int]] = {}  # set -> server -> stream
        self._streams = _Streams.fresh(_FIRST_STREAMS)
        self._stream_cells: list[Integers | None] = []

    @property
    def stream_count(self) -> int:
        """How many streams there are."""
        return len(self._stream_cells)

    @property
    def has_many_streams(self) -> bool:
        """Whether it is time to forget those that are not in use."""
        return self.stream_count > _STREAMS_PER_SERVER * len(self.server_ids) + _FIRST_STREAMS

    @property
    def cell_servers(self) -> Integers:
        """The server of each cell."""
        return self._cells.server[: self.cell_count]

    @property
    def cell_counters(self) -> Flags:
        """Whether each cell is a counter's."""
        return self._cells.is_counter[: self.cell_count]

    @property
    def cell_roles(self) -> NDArray[np.int8]:
        """What each cell's series foretells (`prediction.words.Role`)."""
        return self._cells.role[: self.cell_count]

    def names_of(self, cells: Integers) -> list[str]:
        """The metrics of cells."""
        return [self.names[place] for place in self._cells.name[cells].tolist()]

    def name_of(self, cell: int) -> str:
        """The metric of a cell."""
        return self.names[int(self._cells.name[cell])]

    def server_of(self, server_id: str) -> int | None:
        """The place of a server; None when it is not watched."""
        return self._servers.get(server_id)

    def streams(self, columns: SetColumns, server_ids: Sequence[str]) -> Integers:
        """The streams of servers and a set, new ones at the end; -1 for what is beyond the limits."""
        known = self._by_set.get(columns.set_id, {})
        places = [known.get(server_id, -1) for server_id in server_ids]
        if -1 in places:
            places = [self._place(columns, server_id) for server_id in server_ids]
        streams = np.array(places, np.int64)
        wanting = streams[(streams >= 0) & (self._streams.first[streams] == _UNKNOWN)]
        for stream in wanting.tolist():
            self._find_cells(stream, columns)
        return streams

    def servers_of(self, streams: Integers) -> Integers:
        """The server of each stream."""
        return self._streams.server[streams]

    def cells_of(self, streams: Integers, width: int) -> slice | Integers:
        """The cells of some streams of one set: a slice where they lie side by side, else shape (n, width)."""
        first = self._streams.first[streams]
        if (first >= 0).all():
            if (np.diff(first) == width).all():
                return slice(int(first[0]), int(first[0]) + width * len(first))
            cells: Integers = first[:, None] + np.arange(width)
            return cells
        return np.stack([self._cells_of(stream, width) for stream in streams.tolist()])

    def _cells_of(self, stream: int, width: int) -> Integers:
        cells = self._stream_cells[stream]
        return int(self._streams.first[stream]) + np.arange(width) if cells is None else cells

    def _place(self, columns: SetColumns, server_id: str) -> int:
        known = self._by_set.setdefault(columns.set_id, {})
        stream = known.get(server_id)
        if stream is not None:
            return stream
        if len(self._stream_cells) >= self.limits.streams:
            self._tell(
                "servers sent rows of %d sets (Limits.streams): further ones are not judged", len(self._stream_cells)
            )
            return -1
        server = self._servers.get(server_id)
        if server is None:
            if len(self.server_ids) >= self.limits.servers:
                self._tell("%d servers are watched (Limits.servers): further ones are not judged", self.limits.servers)
                return -1
            server = self._servers[server_id] = len(self.server_ids)
            self.server_ids.append(server_id)
            self._cell_of.append({})
        stream = known[server_id] = len(self._stream_cells)
        self._stream_cells.append(None)
        if stream >= len(self._streams.server):
            self._streams = self._streams.sized(2 * stream)
        self._streams.server[stream] = server
        self._streams.set_number[stream] = self._set_numbers.setdefault(columns.set_id, len(self._set_numbers))
        self._streams.first[stream] = _UNKNOWN
        return stream

    def _find_cells(self, stream: int, columns: SetColumns) -> None:
        server, first = int(self._streams.server[stream]), self.cell_count
        known = self._cell_of[server]
        places = [place for place, series in enumerate(columns.series) if series not in known] if known else None
        new = columns.series if places is None else [columns.series[place] for place in places]
        roles = columns.roles if places is None else columns.roles[places]
        room = max(self.limits.series + 1 - first, 0)  # the limit may have been lowered
        if len(new) > room:
            self.lacking.add(self.server_ids[server])
            self._tell("%d series are watched (Limits.series): further ones are not judged", self.limits.series)
            new, roles = new[:room], roles[:room]
        self._add_cells(server, new, roles, self._names_of(columns) if len(new) == len(columns) else None)
        if len(new) == len(columns) == len(known):  # as of most: a server with its first set
            self._streams.first[stream] = first
            return
        cells = np.array([known.get(series, 0) for series in columns.series], np.int64)
        together = len(cells) > 0 and cells[0] > 0 and bool((np.diff(cells) == 1).all())
        self._streams.first[stream] = cells[0] if together else _SCATTERED
        self._stream_cells[stream] = None if together else cells

    def _add_cells(
        self, server: int, series: Sequence[Series], roles: NDArray[np.int8], names: Integers | None
    ) -> None:
        first, end = self.cell_count, self.cell_count + len(series)
        self._cell_of[server].update(zip(series, range(first, end), strict=True))
        if end > len(self._cells.server):
            self._cells = self._cells.sized(max(end, 2 * first))
        self._cells.server[first:end] = server
        self._cells.name[first:end] = self._places_of(series) if names is None else names
        self._cells.is_counter[first:end] = [is_counter for _, is_counter, _ in series]
        self._cells.role[first:end] = roles
        self.cell_count = end

    def _names_of(self, columns: SetColumns) -> Integers:
        """The places of the names of a set, found once as long as it is the same set."""
        if self._named is None or self._named[0] != columns.set_id:
            self._named = columns.set_id, self._places_of(columns.series)
        return self._named[1]

    def _places_of(self, series: Sequence[Series]) -> Integers:
        places = self._name_places
        found = np.array([places.setdefault(name, len(places)) for name, _, _ in series], np.int64)
        self.names.extend(islice(places, len(self.names), None))
        return found

    def _tell(self, text: str, count: int) -> None:
        if text not in self._is_told:
            self._is_told.add(text)
            _log.error(text, count)

    def compact(self, keep_servers: Flags, keep_cells: Flags, keep_streams: Flags) -> None:
        """Forgets the others; of servers that go, cells and streams must go too."""
        place = np.cumsum(keep_servers) - 1
        moved = not bool(keep_cells.all())
        cells = self._cells.rearranged(np.flatnonzero(keep_cells))
        cells.server = np.where(cells.server >= 0, place[cells.server], -1)
        streams = self._streams.rearranged(np.flatnonzero(keep_streams))
        set_ids = list(self._set_numbers)
        kept_streams = [
            (set_ids[number], self.server_ids[server])
            for number, server in zip(streams.set_number.tolist(), streams.server.tolist(), strict=True)
        ]
        streams.server = place[streams.server]
        stream_cells = [cells for cells, stays in zip(self._stream_cells, keep_streams.tolist(), strict=True) if stays]
        if moved:
            streams.first[:] = _UNKNOWN
        self.server_ids = [one for one, stays in zip(self.server_ids, keep_servers.tolist(), strict=True) if stays]
        # who has lacked series looks for all of them anew
        self.lacking = set() if moved else self.lacking.intersection(self.server_ids)
        self._set(cells, self.names, streams, kept_streams, stream_cells)

    def _set(
        self,
        cells: _Cells,
        names: Sequence[str],
        streams: _Streams,
        about: Sequence[tuple[str, str]],
        stream_cells: Sequence[Integers | None],
    ) -> None:
        """Takes over arrays, with only the names and sets that are in use; `about`: set and server of each stream."""
        used, name = np.unique(np.append(cells.name, 0), return_inverse=True)
        cells.name = name[:-1].astype(np.int64)
        self.names = [names[place] for place in used.tolist()]
        self._named = None
        self._name_places = {name: place for place, name in enumerate(self.names)}
        self._cells, self.cell_count = cells, len(cells.server)
        self._servers = {server_id: place for place, server_id in enumerate(self.server_ids)}
        self._cell_of = [{} for _ in self.server_ids]
        columns = (cells.server.tolist(), cells.name.tolist(), cells.is_counter.tolist(), cells.role.tolist())
        for cell, (server, place, is_counter, role) in enumerate(zip(*columns, strict=True)):
            if server >= 0:
                self._cell_of[server][self.names[place], is_counter, role] = cell
        self._by_set = {}
        for stream, (set_id, server_id) in enumerate(about):
            self._by_set.setdefault(set_id, {})[server_id] = stream
        self._set_numbers = {set_id: number for number, set_id in enumerate(self._by_set)}
        streams.set_number = np.array([self._set_numbers[set_id] for set_id, _ in about], np.int64)
        self._stream_cells = list(stream_cells)
        self._streams = streams.sized(max(_FIRST_STREAMS, len(about)))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `restored` needs beside `texts`; copies."""
        streams = self._streams.sized(self.stream_count)
        streams.first[:] = _UNKNOWN
        return self._cells.sized(self.cell_count).arrays("cells.") | streams.arrays("streams.")

    def texts(self) -> dict[str, tuple[str, ...]]:
        """What `restored` needs beside `arrays`."""
        return {"servers": tuple(self.server_ids), "names": tuple(self.names), "sets": tuple(self._set_numbers)}

    @classmethod
    def restored(cls, limits: Limits, arrays: dict[str, NDArray[Any]], texts: dict[str, tuple[str, ...]]) -> Self:
        """The registry as it was saved.

        Raises:
            ValueError: the parts do not fit together.
        """
        servers, names, sets = (texts.get(name, ()) for name in ("servers", "names", "sets"))
        cells = _Cells.of_arrays(arrays, "cells.", _length(arrays, "cells.server"))
        streams = _Streams.of_arrays(arrays, "streams.", _length(arrays, "streams.server"))
        for texts_of in (servers, names, sets):
            if len(set(texts_of)) != len(texts_of):
                raise ValueError("a name is there twice")
        if not len(cells.server) or cells.server[0] != -1:
            raise ValueError("the first cell is somebody's")
        for array, least, end in (
            (cells.server[1:], 0, len(servers)),
            (cells.name, 0, len(names)),
            (streams.server, 0, len(servers)),
            (streams.set_number, 0, len(sets)),
        ):
            if ((array < least) | (array >= end)).any():
                raise ValueError("an array refers to a name that is not there")
        registry = cls(limits)
        registry.server_ids = list(servers)
        about = [
            (sets[number], servers[server])
            for number, server in zip(streams.set_number.tolist(), streams.server.tolist(), strict=True)
        ]
        streams.first[:] = _UNKNOWN
        registry._set(cells, names, streams, about, [None] * len(about))
        return registry


def _length(arrays: dict[str, NDArray[Any]], name: str) -> int:
    array = arrays.get(name)
    if array is None or array.ndim != 1:
        raise ValueError(f"the array {name} is not one of numbers")
    return len(array)
