"""The journal's copy in a backup, which follows the live one while partitions are copied. `backup.py` says why.

What must stay true: what is read in one `catch_up` is one moment of the live journal; of batches, cohorts, sets and
servers everything is taken, of the notes of partitions that went only those whose files the backup does not have.
"""

from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple

import apsw

from runtime.sqlite import Transaction, fetch
from services.timeseries.engine.database import read_only_uri
from services.timeseries.engine.journal import add_missing_tables, noted_partitions
from services.timeseries.engine.tiers import RAW


class Gone(NamedTuple):
    """What a journal notes of the files that a partition had before.

    Attributes:
        through: the sequence up to which rows went with the last of them; 0: none went.
        going: the last of them may still be there, and goes whatever happens.
    """

    through: int
    going: bool


NOT_GONE: Final = Gone(0, going=False)


class JournalCopy:
    """The copy at `path` of the journal at `live`, which is written meanwhile."""

    def __init__(self, live: Path, path: Path) -> None:
        self._live = live
        self._path = path

    def catch_up(self, level: int, settled: Collection[int]) -> None:
        """Adds what the live journal has got since; raises `apsw.Error`.

        Args:
            level: the tier that is being copied, of whose partitions the notes are taken.
            settled: the days of it of which the backup has a file, or will have none for another reason: what is
                noted of them from now on is not taken.
        """
        with closing(self._open()) as copy:
            copy.execute("ATTACH ? AS live", (read_only_uri(self._live),))
            with Transaction(copy):
                last = _last_sequence(copy)
                for table in ("metric_sets", "servers", "cohorts"):  # numbered upwards and never deleted
                    copy.execute(
                        f"INSERT INTO main.{table} SELECT * FROM live.{table}"  # noqa: S608  names of ours
                        f" WHERE id > (SELECT coalesce(max(id), 0) FROM main.{table})"
                    )
                copy.execute("INSERT INTO main.descriptors SELECT * FROM live.descriptors WHERE sequence > ?", (last,))
                copy.execute("INSERT INTO main.batches SELECT * FROM live.batches WHERE sequence > ?", (last,))
                add_missing_tables(copy)
                for day, gone in _gone(copy, "live", level).items():
                    if day not in settled:
                        _take_note(copy, level, day, gone)
                ((swept,),) = fetch(copy, "SELECT value FROM live.meta WHERE key = 'swept_through'")
                if swept > last:
                    _note_hole(copy, swept)

    def gone(self, level: int, day: int) -> Gone:
        """What the copy notes of a partition, by its first day."""
        with closing(self._open()) as copy:
            return _gone(copy, "main", level).get(day, NOT_GONE)

    def noted(self, level: int) -> dict[int, int]:
        """The partitions of a tier that the copy notes as being there: first day -> days."""
        with closing(self._open()) as copy:
            return {day: days for (tier, day), days in noted_partitions(copy).items() if tier == level}

    def leave_out(self, level: int, days: range) -> None:
        """Notes that the points of a partition that cannot be read are gone, so that what was made of them stays as it
        is: of the few rows of it that the journal has, or that come later, it must not be made anew. Of roll-ups it is
        noted that there should be some: whoever opens the copy misses them, and makes them anew where that is
        possible."""
        with closing(self._open()) as copy, Transaction(copy):
            if level != RAW:
                copy.execute("INSERT OR REPLACE INTO partitions VALUES (?, ?, ?)", (level, days.start, len(days)))
                return
            last = _last_sequence(copy)
            gone = [(level, day, last) for day in days]
            copy.executemany("INSERT OR REPLACE INTO ended VALUES (?, ?, ?)", gone)

    def finish(self, partitions: Collection[tuple[int, int]]) -> tuple[str, int]:
        """The identity and the last sequence of the copy, which is one file from here on.

        `partitions`: the tiers and first days of those that it may go on to note as being there.
        """
        with closing(self._open()) as copy:
            gone = [(tier, day) for tier, day in noted_partitions(copy) if (tier, day) not in partitions]
            copy.executemany("DELETE FROM partitions WHERE tier = ? AND day = ?", gone)
            ((identity,),) = fetch(copy, "SELECT value FROM meta WHERE key = 'identity'")
            copy.execute(
                "DELETE FROM meta WHERE key = 'stored_through'"
            )  # of the live files, which may not all be here
            last_sequence = _last_sequence(copy)
            copy.pragma("wal_checkpoint", "TRUNCATE")
        return str(identity), last_sequence

    def _open(self) -> apsw.Connection:
        copy = apsw.Connection(str(self._path), flags=apsw.SQLITE_OPEN_READWRITE | apsw.SQLITE_OPEN_URI)
        copy.pragma("synchronous", 0)  # synced as a whole at the end
        return copy


def _gone(copy: apsw.Connection, schema: str, level: int) -> dict[int, Gone]:
    """What a journal notes of a tier, by partition."""
    found = {}
    if copy.table_exists(schema, "ended"):  # an older program that is still running does not have it
        for day, through in fetch(copy, f"SELECT day, through FROM {schema}.ended WHERE tier = ?", (level,)):  # noqa: S608
            found[day] = Gone(through, going=False)
    if level == RAW and copy.table_exists(schema, "evictions"):
        for day, through, unlinked in fetch(copy, f"SELECT day, through, unlinked FROM {schema}.evictions"):  # noqa: S608
            found[day] = Gone(through, going=not unlinked)
    return found


def _take_note(copy: apsw.Connection, level: int, day: int, gone: Gone) -> None:
    """Notes the same in the copy. The live journal forgets an eviction when its rows are swept; the copy has them."""
    if _gone(copy, "main", level).get(day) == gone:
        return
    copy.execute("INSERT OR REPLACE INTO main.ended VALUES (?, ?, ?)", (level, day, gone.through))
    if level == RAW:
        copy.execute("INSERT OR REPLACE INTO main.evictions VALUES (?, ?, ?)", (day, gone.through, not gone.going))


def _note_hole(copy: apsw.Connection, swept: int) -> None:
    """Says that batches up to `swept` may be missing from the run, and keeps their sequences from being given again."""
    copy.execute("INSERT OR REPLACE INTO main.meta VALUES ('gap_through', ?)", (swept,))
    if _last_sequence(copy) < swept:
        copy.execute(
            "INSERT INTO main.batches SELECT ?1, coalesce(max(received_ms), 0), NULL, 0, 0, x'' FROM main.batches",
            (swept,),
        )


def _last_sequence(copy: apsw.Connection) -> int:
    ((last,),) = fetch(
        copy,
        "SELECT max(value, coalesce((SELECT max(sequence) FROM main.batches), 0))"
        " FROM main.meta WHERE key = 'swept_through'",
    )
    return int(last)
