"""Verification: every byte of a store or a backup is read, and what is damaged is named.

It opens read-only connections only, so that it may run beside the service; each file is read within one read
transaction, a moment of it. What must stay true: a healthy store is never called damaged, also while it is written.
So what a partition refers to in the journal (cohorts, sequences) is looked up in a journal read after it; and
everything that a reader would leave out is named here, column by column.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import apsw
import numpy as np
from numpy.typing import NDArray

from services.timeseries.engine import batch as batch_codec
from services.timeseries.engine.block import BlockReader
from services.timeseries.engine.catalog import Catalog, Cohort
from services.timeseries.engine.database import FORMAT_VERSION, connect_read_only, fetch, file_bytes
from services.timeseries.engine.frame import FrameReader
from services.timeseries.engine.journal import JournalReader, JournalRow, load_catalog
from services.timeseries.engine.manifest import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    BackupError,
    Progress,
    damaged_files,
    read_manifest,
    store_files,
)
from services.timeseries.engine.partition import BlockInfo, Partition
from services.timeseries.engine.settings import DAY_MS

_READ_BYTES: Final = 16 << 20
_PROGRESS_BLOCKS: Final = 16
_TABLES_WAIT_S: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Something that is not what was written.

    Attributes:
        file: its path in the folder.
        where: what is damaged in it: a block with its server, a batch, or nothing when it is the file.
        what: in which way.
    """

    file: str
    where: str
    what: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.where, self.what) if part)


@dataclass(slots=True, kw_only=True)
class Verified:
    """What was read; points are those of undamaged columns."""

    partitions: int = 0
    blocks: int = 0
    points: int = 0
    batches: int = 0
    bytes: int = 0
    damages: int = 0


@dataclass(frozen=True, slots=True)
class _JournalState:
    catalog: Catalog
    cohorts: dict[int, Cohort]
    last_sequence: int
    identity: str


@dataclass(slots=True)
class Verifier:
    """Verifies one folder: a store, in use or not, or a backup. Call `run` once."""

    folder: Path
    found: Callable[[Damage], None]
    progress: Progress
    verified: Verified = field(default_factory=Verified)
    _immutable: bool = False
    _state: _JournalState | None = None

    def run(self) -> Verified:
        """Reads everything; `found` is told of each damage as it is met. Raises BackupError when there is no store."""
        is_backup = (self.folder / MANIFEST_NAME).exists() and not (self.folder / "lock").exists()  # it may be served
        if not (self.folder / JOURNAL_NAME).exists() and not is_backup:
            raise BackupError(f"there is no store and no backup in {self.folder}: name its folder, or set DATA_DIR")
        if is_backup:
            self._immutable = True
            self._manifest()
        self._file(JOURNAL_NAME, self._journal)
        for name in store_files(self.folder):
            if not self._file(name, self._partition) and not (self.folder / name).exists():
                continue  # retention unlinked it
            self.verified.partitions += 1
        return self.verified

    def _damaged(self, file: str, where: str, what: object) -> None:
        self.verified.damages += 1
        self.found(Damage(file=file, where=where, what=str(what)))

    def _manifest(self) -> None:
        try:
            manifest = read_manifest(self.folder)
        except BackupError as error:
            self._damaged(MANIFEST_NAME, "", error)
            return
        for name, what in damaged_files(self.folder, manifest, lambda *_: None):
            self._damaged(name, "", what)

    def _file(self, name: str, check: Callable[[str, apsw.Connection], None]) -> bool:
        """Opens a file and checks it and what is in it; what SQLite cannot read is damage of the file."""
        path = self.folder / name
        size = file_bytes(path)
        try:
            with closing(connect_read_only(path, immutable=self._immutable)) as db:
                if not db.table_exists("main", "meta"):
                    time.sleep(_TABLES_WAIT_S)  # it may have been created a moment ago
                db.execute("BEGIN")
                meta = dict(fetch(db, "SELECT key, value FROM meta"))
                if meta.get("format_version") != FORMAT_VERSION:
                    self._damaged(name, "", f"its format {meta.get('format_version')} is not {FORMAT_VERSION}")
                    return True
                for (line,) in fetch(db, "PRAGMA integrity_check"):  # unlike quick_check it compares indexes too
                    if line != "ok":
                        self._damaged(name, "", f"SQLite says: {line}")
                check(name, db)
        except (apsw.Error, LookupError, ValueError, TypeError) as error:  # the last three: nonsense in its tables
            if path.exists():
                self._damaged(name, "", f"it cannot be read: {error}")
            return False
        self.verified.bytes += size
        self.progress(name, size, size)
        return True

    def _read_state(self, db: apsw.Connection) -> _JournalState:
        catalog = load_catalog(db)
        meta = dict(fetch(db, "SELECT key, value FROM meta"))
        ((highest,),) = fetch(db, "SELECT max(sequence) FROM batches")
        return _JournalState(
            catalog,
            {cohort.id: cohort for cohort in catalog.cohorts.values()},
            max(int(meta["swept_through"]), highest or 0),
            str(meta["identity"]),
        )

    def _state_now(self) -> _JournalState:
        """The journal as it is now: what a partition that was read before may refer to."""
        with closing(connect_read_only(self.folder / JOURNAL_NAME, immutable=self._immutable)) as db:
            db.execute("BEGIN")
            self._state = self._read_state(db)
        return self._state

    # the journal

    def _journal(self, name: str, db: apsw.Connection) -> None:
        state = self._state = self._read_state(db)
        meta = dict(fetch(db, "SELECT key, value FROM meta"))
        wanted, gap_through = int(meta["swept_through"]) + 1, int(meta.get("gap_through", 0))
        size, read = file_bytes(self.folder / name), 0
        ((first,),) = fetch(db, "SELECT min(sequence) FROM batches")
        at = first or 1
        if first is not None and first < wanted:
            self._damaged(name, f"batch {first}", f"it should be swept: the journal is swept through {wanted - 1}")
            wanted = first
        for number, content_id in fetch(db, "SELECT id, content_id FROM metric_sets"):
            if state.catalog.sets_by_id[number].metric_set.id != content_id:
                self._damaged(name, f"metric set {number}", "its names are not those it was stored with")
        reader = JournalReader(self.folder / name, db)
        while rows := reader.read(at, state.last_sequence, _READ_BYTES):
            for row in rows:
                if row.sequence != wanted and row.sequence - 1 > gap_through:
                    self._damaged(name, f"batch {wanted}", f"no batches between {wanted - 1} and {row.sequence}")
                wanted = row.sequence + 1
                self._batch(name, state.catalog, row)
                read += len(row.payload)
            at = wanted
            self.progress(name, min(read, size), size)
        for follower, cursor in reader.followers().items():
            if cursor > state.last_sequence:
                self._damaged(
                    name, f"follower {follower}", f"its cursor {cursor} is past the end {state.last_sequence}"
                )

    def _batch(self, name: str, catalog: Catalog, row: JournalRow) -> None:
        self.verified.batches += 1
        if row.row_count == 0 and not row.payload:
            return
        where = f"batch {row.sequence}"
        try:
            batch = batch_codec.decode(row.payload)
        except batch_codec.CorruptBatchError as error:
            self._damaged(name, where, error)
            return
        stored = catalog.sets_by_id.get(row.metric_set or 0)
        points = int(np.count_nonzero(~np.isnan(batch.values)))
        if stored is None:
            self._damaged(name, where, f"its metric set {row.metric_set} is not known")
        elif batch.values.shape[1] != len(stored.metric_set):
            self._damaged(name, where, f"{batch.values.shape[1]} columns for {len(stored.metric_set)} metrics")
        elif unknown := {n for n in batch.servers.tolist() if (n, stored.id) not in catalog.cohorts}:
            self._damaged(name, where, f"its servers {sorted(unknown)} are not known")
        if (len(batch.values), points) != (row.row_count, row.points):
            said = f"{row.row_count} rows and {row.points} points"
            self._damaged(name, where, f"it has {len(batch.values)} rows and {points} points, not {said}")

    # a partition

    def _partition(self, name: str, db: apsw.Connection) -> None:
        meta = dict(fetch(db, "SELECT key, value FROM meta"))
        heads = dict(fetch(db, "SELECT cohort, blocked_through FROM heads"))
        blocks = fetch(
            db,
            "SELECT id, cohort, first_ms, last_ms, row_count, points, min_sequence, max_sequence"
            " FROM blocks ORDER BY id",
        )
        state = self._state_for({block[1] for block in blocks} | heads.keys(), max(heads.values(), default=0))
        if state is None:
            self._damaged(name, "", "the journal, which names its servers, cannot be read: its blocks were not checked")
            return
        if meta.get("identity") != state.identity:
            self._damaged(name, "", "it belongs to another journal")
            return
        for cohort_id, through in heads.items():
            if through > state.last_sequence:
                self._damaged(
                    name,
                    f"head of cohort {cohort_id}",
                    f"blocked through {through}, past the end {state.last_sequence}",
                )
        partition = Partition(int(meta["day"]), 0, db)
        size = file_bytes(self.folder / name)
        try:
            for number, block in enumerate(blocks):
                cohort = state.cohorts.get(block[1])
                where = f"block {block[0]} (server {cohort.server_id if cohort else 'unknown'})"
                if cohort is None:
                    self._damaged(name, where, f"its cohort {block[1]} is not known")
                else:
                    for what in self._block(partition, cohort, block, heads.get(cohort.id, 0)):
                        self._damaged(name, where, what)
                if number % _PROGRESS_BLOCKS == 0:
                    self.progress(name, size * number // len(blocks), size)
        finally:
            partition.done()

    def _state_for(self, cohorts: set[int], last_sequence: int) -> _JournalState | None:
        """The state of the journal that covers what a partition refers to, read again where it is newer."""
        state = self._state
        if state is None or (cohorts <= state.cohorts.keys() and last_sequence <= state.last_sequence):
            return state
        return self._state_now()

    def _block(self, partition: Partition, cohort: Cohort, row: Sequence[Any], blocked_through: int) -> Iterator[str]:
        """What is wrong with a block."""
        self.verified.blocks += 1
        number, _, first_ms, last_ms, row_count, points, _, max_sequence = row
        info = BlockInfo(id=number, life=0, first_ms=first_ms, last_ms=last_ms, rows=row_count, bytes=0)
        try:
            reader = partition.reader(info, cohort)
        except (ValueError, apsw.Error) as error:
            partition.done()
            yield f"all columns: {error}"
            return
        found, damaged = 0, 0
        for column, key in enumerate(cohort.stored_set.metric_set.keys):
            count = _points_of(reader, column)
            if count is None:
                damaged += 1
                yield f"column {key}: it is not what was written (checksum or encoding)"
            found += count or 0
        self.verified.points += found
        if reader.rows != row_count:
            yield f"it has {reader.rows} rows, not {row_count}"
        if not damaged and found != points:
            yield f"it has {found} points, not {points}"
        if max_sequence > blocked_through:
            yield f"its sequence {max_sequence} is past its head's blocked_through {blocked_through}"
        try:
            times, sequences = reader.keys()
        except Exception as error:
            yield f"times and sequences: {error}"
            return
        if not 0 < len(times) == len(sequences) == reader.rows:
            yield f"it has {len(times)} times and {len(sequences)} sequences for {reader.rows} rows"
            return
        if (times // DAY_MS != partition.day).any():
            yield "it has rows of another day"
        yield from _unlike(times, sequences, row)


def _unlike(times: NDArray[np.int64], sequences: NDArray[np.int64], row: Sequence[Any]) -> Iterator[str]:
    """In which way the keys of a block are not sorted, or not what it is listed with."""
    _, _, first_ms, last_ms, _, _, min_sequence, max_sequence = row
    later = np.diff(times)
    if (later < 0).any() or (np.diff(sequences)[later == 0] < 0).any():
        yield "its rows are not sorted by time and sequence"
    if (int(times[0]), int(times[-1])) != (first_ms, last_ms):
        yield f"its times are not those it is listed with, {first_ms} to {last_ms}"
    if (int(sequences.min()), int(sequences.max())) != (min_sequence, max_sequence) or min_sequence < 1:
        yield f"its sequences are not those it is listed with, {min_sequence} to {max_sequence}"


def _points_of(reader: BlockReader | FrameReader, column: int) -> int | None:
    """How many values a column has; None: it cannot be read."""
    try:
        (values,), damaged = reader.values([column])
        return None if damaged or len(values) != reader.rows else int(np.count_nonzero(~np.isnan(values)))
    except Exception:  # whatever a decoder makes of bytes that only look right
        return None
