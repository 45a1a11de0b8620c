"""History as Parquet, with the columns of an export (docs/formats/parquet.md), so that `import` takes it back.

Imported only where Parquet is asked for: pyarrow is an extra of 170 MB.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from client.history import Series
from openmanager.fleet.v1.metric_pb2 import MetricKind
from openmanager.gateway.v1.history_pb2 import MetricDescription

ROWS_OF_A_GROUP: Final = 262_144
_TEXT: Final = pa.dictionary(pa.int32(), pa.string())
SCHEMA: Final = pa.schema(
    [
        pa.field("server_id", _TEXT, nullable=False),
        pa.field("metric", _TEXT, nullable=False),
        pa.field("labels", _TEXT, nullable=False),
        pa.field("unit", _TEXT, nullable=False),
        pa.field("kind", _TEXT, nullable=False),
        pa.field("time", pa.timestamp("ms", tz="UTC"), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
    ]
)


class _Sink:
    """Standard output as a file that knows where it is: a pipe does not."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._written = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        self._out.write(data)
        self._written += len(data)
        return len(data)

    def tell(self) -> int:
        return self._written

    def flush(self) -> None:
        self._out.flush()

    def close(self) -> None:
        self.closed = True


class ParquetWriter:
    """Writes row groups as the parts come."""

    whole_series = False

    def __init__(self, described: Mapping[str, MetricDescription], aggregation: str) -> None:
        """Takes the metrics by identity, which say what no series says, and how windows became values ("": not)."""
        self._described = described
        self._aggregation = aggregation
        self._waiting: list[Any] = []
        self._rows = 0
        self._file: Any = None

    def begin(self) -> None:
        """Opens the file."""
        self._file = pq.ParquetWriter(pa.PythonFile(_Sink(sys.stdout.buffer), mode="w"), SCHEMA, compression="zstd")

    def add(self, series: Series) -> None:
        """Takes points; writes them when a row group is full."""
        name, labels, unit, kind = self._description(series)
        texts = (series.server_id, name, labels, unit, kind)
        rows = len(series.times)
        codes = pa.array(np.zeros(rows, np.int32))
        columns = [pa.DictionaryArray.from_arrays(codes, pa.array([text], pa.string())) for text in texts]
        times = np.round(series.times * 1_000).astype(np.int64)
        columns += [pa.array(times).cast(SCHEMA.field("time").type), pa.array(series.values)]
        self._waiting.append(pa.Table.from_arrays(columns, schema=SCHEMA))
        self._rows += rows
        if self._rows >= ROWS_OF_A_GROUP:
            self._write()

    def end(self, _incomplete: list[str]) -> None:
        """Writes what waits and the footer."""
        if self._waiting:
            self._write()
        self._file.close()

    def _write(self) -> None:
        whole = pa.concat_tables(self._waiting).unify_dictionaries()
        self._file.write_table(whole, row_group_size=ROWS_OF_A_GROUP)
        self._waiting, self._rows = [], 0

    def _description(self, series: Series) -> tuple[str, str, str, str]:
        known = self._described.get(series.metric)
        name, labels, kind = series.metric, "{}", "unspecified"
        if known is not None:
            name = known.name
            labels = json.dumps(dict(known.labels), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
            kind = MetricKind.Name(known.kind).removeprefix("METRIC_KIND_").lower()
        unit = series.unit
        if self._aggregation == "RATE":
            unit, kind = f"{unit or '1'}/s", "gauge"
        elif self._aggregation == "COUNT":
            unit, kind = "1", "gauge"
        return name, labels, unit, kind
