"""Verification: every byte of a store or a backup is read, and what is damaged is named.

It opens read-only connections only, so that it may run beside the service; each file is read within one read
transaction, a moment of it. What must stay true: a healthy store is never called damaged, also while it is written.
So what a partition refers to in the journal (cohorts, sequences) is looked up in a journal read after it; and
everything that a reader would leave out is named here, column by column, and each file that is gone. Tiers are not
compared with one another: their files are read at different moments, and a bucket may rightly be newer or older than
the points it is made of.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import apsw
import numpy as np

from runtime.sqlite import fetch
from services.timeseries.archive.block_checks import LISTED, BlockCheck, Listed
from services.timeseries.archive.manifest import (
    JOURNAL_NAME,
    MANIFEST_NAME,
    BackupError,
    Progress,
    damaged_files,
    read_manifest,
    tier_files,
)
from services.timeseries.engine import batch as batch_codec
from services.timeseries.engine.catalog import Catalog, Cohort
from services.timeseries.engine.database import FORMAT_VERSION, connect_read_only, file_bytes
from services.timeseries.engine.journal import load_catalog, noted_partitions
from services.timeseries.engine.journal_reader import JournalReader, JournalRow
from services.timeseries.engine.partition import READABLE_VERSIONS, Partition, day_of, files_aside, partition_path
from services.timeseries.engine.rollup import GENERATION_SHIFT
from services.timeseries.engine.settings import DAY_MS
from services.timeseries.engine.tiers import RAW, TIERS

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
class TierTotals:
    """What was read of a tier; `points`, of roll-ups the buckets of metrics, are those of undamaged columns."""

    partitions: int = 0
    blocks: int = 0
    points: int = 0


@dataclass(slots=True, kw_only=True)
class Verified:
    """What was read; `tiers` by their folders, from the finest to the coarsest."""

    tiers: dict[str, TierTotals] = field(default_factory=lambda: {kind.folder: TierTotals() for kind in TIERS})
    batches: int = 0
    bytes: int = 0
    damages: int = 0


@dataclass(frozen=True, slots=True)
class _JournalState:
    catalog: Catalog
    cohorts: dict[int, Cohort]
    last_sequence: int
    identity: str
    partitions: Mapping[tuple[int, int], int]


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
        self._file(JOURNAL_NAME, (FORMAT_VERSION,), self._journal)
        for level, kind in enumerate(TIERS):
            for name in tier_files(self.folder, kind):
                whole = self._file(name, READABLE_VERSIONS, partial(self._partition, level))
                if whole or (self.folder / name).exists():  # else retention unlinked it
                    self.verified.tiers[kind.folder].partitions += 1
        if not is_backup:  # of which the manifest says what it has
            self._missing()
            self._set_aside()
        return self.verified

    def _set_aside(self) -> None:
        """Names the partitions that were set aside: nobody reads them, and the status counts them."""
        for kind in TIERS:
            for path in files_aside(self.folder / kind.folder):
                self._damaged(f"{kind.folder}/{path.name}", "", "it was set aside, and what it held is left out")

    def _missing(self) -> None:
        """Names the partitions that the journal notes and that are not there."""

        def missing(state: _JournalState | None) -> set[tuple[int, str]]:
            noted = state.partitions if state is not None else {}
            paths = [(level, partition_path(self.folder / TIERS[level].folder, day)) for level, day in noted]
            return {(level, f"{path.parent.name}/{path.name}") for level, path in paths if not path.exists()}

        if found := missing(self._state):
            for _, name in sorted(found & missing(self._state_now())):  # it is noted that one goes before it does
                self._damaged(name, "", "it is not there, and nothing says that it went")

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

    def _file(self, name: str, versions: tuple[int, ...], check: Callable[[str, apsw.Connection], None]) -> bool:
        """Opens a file and checks it and what is in it; what SQLite cannot read is damage of the file."""
        path = self.folder / name
        size = file_bytes(path)
        try:
            with closing(connect_read_only(path, immutable=self._immutable)) as db:
                if not db.table_exists("main", "meta"):
                    time.sleep(_TABLES_WAIT_S)  # it may have been created a moment ago
                db.execute("BEGIN")
                meta = dict(fetch(db, "SELECT key, value FROM meta"))
                if meta.get("format_version") not in versions:
                    self._damaged(name, "", f"its format {meta.get('format_version')} is not {versions[-1]}")
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
            noted_partitions(db),
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
        for where, what in _past_the_end(db, reader, state.last_sequence):
            self._damaged(name, where, what)

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

    def _partition(self, level: int, name: str, db: apsw.Connection) -> None:
        meta = dict(fetch(db, "SELECT key, value FROM meta"))
        first = meta["format_version"] == 1
        kind, day = TIERS[level], int(meta["day"])
        head_day = "(SELECT value FROM meta WHERE key = 'day')" if first else "day"
        heads = {
            (cohort_id, of): through
            for cohort_id, of, through in fetch(db, f"SELECT cohort, {head_day}, blocked_through FROM heads")  # noqa: S608
        }
        found = _Contents(
            days=range(day, day + int(meta.get("span_days", kind.span_days))),
            heads=heads,
            blocks=[Listed(*row) for row in fetch(db, f"SELECT {LISTED} FROM blocks ORDER BY id")],  # noqa: S608
            marks=[] if first else fetch(db, "SELECT id, cohort, first_ms, last_ms FROM dirty"),
        )
        state = self._state_for(found.cohorts, found.reaches(level))
        if state is None:
            self._damaged(name, "", "the journal, which names its servers, cannot be read: its blocks were not checked")
            return
        if meta.get("identity") != state.identity:
            self._damaged(name, "", "it belongs to another journal")
            return
        for where, what in _contradictions(name, level, found, state):
            self._damaged(name, where, what)
        self._blocks(name, Partition(day, 0, db), level, found, state)

    def _state_for(self, cohorts: set[int], last_sequence: int) -> _JournalState | None:
        """The state of the journal that covers what a partition refers to, read again where it is newer."""
        state = self._state
        if state is None or (cohorts <= state.cohorts.keys() and last_sequence <= state.last_sequence):
            return state
        return self._state_now()

    def _blocks(self, name: str, partition: Partition, level: int, found: "_Contents", state: _JournalState) -> None:
        totals, size = self.verified.tiers[TIERS[level].folder], file_bytes(self.folder / name)
        check = BlockCheck(partition, level, found.days, found.heads, state.last_sequence)
        try:
            for number, listed in enumerate(found.blocks):
                cohort = state.cohorts.get(listed.cohort_id)
                where = f"block {listed.id} (server {cohort.server_id if cohort else 'unknown'})"
                if cohort is None:
                    self._damaged(name, where, f"its cohort {listed.cohort_id} is not known")
                else:
                    for what in check.faults(cohort, listed):
                        self._damaged(name, where, what)
                if number % _PROGRESS_BLOCKS == 0:
                    self.progress(name, size * number // len(found.blocks), size)
        finally:
            partition.done()
            totals.blocks += len(found.blocks)
            totals.points += check.points


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contents:
    """What a partition holds: its days; blocked_through by cohort and day; blocks; marks as (id, cohort, times)."""

    days: range
    heads: dict[tuple[int, int], int]
    blocks: list[Listed]
    marks: list[tuple[int, int, int, int]]

    @property
    def cohorts(self) -> set[int]:
        return {
            *(block.cohort_id for block in self.blocks),
            *(cohort_id for cohort_id, _ in self.heads),
            *(mark[1] for mark in self.marks),
        }

    def reaches(self, level: int) -> int:
        """The highest sequence that the journal must have given."""
        made = [block.max_sequence >> GENERATION_SHIFT for block in self.blocks] if level != RAW else []
        return max([*self.heads.values(), *made], default=0)


def _contradictions(name: str, level: int, found: _Contents, state: _JournalState) -> Iterator[tuple[str, str]]:
    """What a partition says beside its blocks that cannot be: where, and what."""
    kind, days = TIERS[level], found.days
    if days.start != day_of(Path(name)):
        yield "", "it is the file of another day than its name says"
    spans = [kind.span_days << power for power in range(8) if kind.span_days << power <= kind.sparse_days]
    if len(days) not in spans or days.start % len(days):
        yield "", f"no file of this tier has {len(days)} days from day {days.start} on"
    for (cohort_id, day), through in found.heads.items():
        where = f"head of cohort {cohort_id} on day {day}"
        if level != RAW:
            yield where, "roll-ups have no heads"
        elif through > state.last_sequence:
            yield where, f"blocked through {through}, past the end {state.last_sequence}"
        elif day not in days:
            yield where, "it is of another day"
    for number, cohort_id, first_ms, last_ms in found.marks:
        if cohort_id not in state.cohorts:
            yield f"mark {number}", f"its cohort {cohort_id} is not known"
        if not days.start * DAY_MS <= first_ms <= last_ms < days.stop * DAY_MS:
            yield f"mark {number}", f"its times {first_ms} to {last_ms} are not of these days"


def _past_the_end(db: apsw.Connection, reader: JournalReader, last_sequence: int) -> Iterator[tuple[str, str]]:
    """What a journal says of sequences that it never gave: where, and what."""
    for follower, cursor in reader.followers().items():
        if cursor > last_sequence:
            yield f"follower {follower}", f"its cursor {cursor} is past the end {last_sequence}"
    for table in ("evictions", "ended"):
        if db.table_exists("main", table):  # a journal may be from before there were any
            for day, through in fetch(db, f"SELECT day, through FROM {table}"):  # noqa: S608  names of ours
                if through > last_sequence:
                    yield f"{table} of day {day}", f"rows went through {through}, past the end {last_sequence}"
