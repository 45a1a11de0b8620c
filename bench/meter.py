"""What a process has used and what its files hold, as Linux tells it.

`write_bytes` is what the process made dirty in the page cache, log, checkpoint and all; a page that is changed twice
before it is written out counts once. Sizes of files are what `du` says.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import apsw
import psutil

from runtime.sqlite import fetch
from services.timeseries.engine.database import connect_read_only


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Since the process started; memory in bytes, `peak_bytes` the most it ever was."""

    cpu_s: float
    write_bytes: int
    memory_bytes: int
    peak_bytes: int


def usage(pid: int) -> Usage:
    """Reads it of a running process."""
    times = psutil.Process(pid).cpu_times()
    status = _numbers(Path(f"/proc/{pid}/status"))
    return Usage(
        cpu_s=times.user + times.system,
        write_bytes=_numbers(Path(f"/proc/{pid}/io"))["write_bytes"],
        memory_bytes=status["VmRSS"] * 1_024,
        peak_bytes=status["VmHWM"] * 1_024,
    )


def _numbers(path: Path) -> dict[str, int]:
    """The lines of "name: number [unit]"."""
    found = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            found[name] = int(words[0])
    return found


def sizes(store: Path) -> dict[str, int]:
    """Bytes on disk by kind of file: the journal, each folder of partitions, and their logs."""
    found: dict[str, int] = {}
    for path in store.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a file may be evicted meanwhile
            if not path.is_file() or path.name == "lock":
                continue
            inner = path.relative_to(store).parts
            kind = inner[0] if len(inner) > 1 else path.name.partition(".")[0]
            kind += " log" if path.name.endswith(("-wal", "-shm")) else ""
            found[kind] = found.get(kind, 0) + path.lstat().st_blocks * 512
    return found


def counts(store: Path) -> dict[str, int]:
    """Rows of each table of each folder of partitions, such as "blocks/blocks"; what cannot be read now is left out."""
    found: dict[str, int] = {}
    for path in sorted(store.glob("*/*.db")):
        with contextlib.suppress(apsw.Error, FileNotFoundError):
            db = connect_read_only(path)
            try:
                for (table,) in fetch(db, "SELECT name FROM sqlite_schema WHERE type = 'table' AND name != 'meta'"):
                    name = f"{path.parent.name}/{table}"
                    ((rows,),) = fetch(db, f'SELECT count(*) FROM "{table}"')
                    found[name] = found.get(name, 0) + int(rows)
            finally:
                db.close()
    return found
