"""What lies where in an export, and the manifest that says what it is; knows nothing of Parquet itself.

What must stay true: the manifest is written last, so a folder with one has everything that it lists.
"""

import datetime
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

MANIFEST_NAME: Final = "manifest.json"
FORMAT: Final = "openmanager-parquet"
FORMAT_VERSION: Final = 1
POINTS_FOLDER: Final = "points"
SERVERS_NAME: Final = "servers.parquet"

Progress = Callable[[str, int, float], None]
"""Called with the file that is worked on, the points of all files so far, and the share that is done (1.0: of it)."""


class ParquetError(Exception):
    """Why an export or an import was not made, in words that say what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedFile:
    """A file of points: its path in the export, its size and its rows."""

    name: str
    bytes: int
    points: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an export is. Times are RFC 3339, UTC.

    Attributes:
        created_time: when it began; it holds everything acknowledged before.
        start_time, end_time: the range that was asked for, the end excluded; None: open.
        servers, metrics: those that were asked for; None: all.
        first_time, last_time: of the points.
        points: how many there are.
        files: their files.
        left_out: days of the store that could not be read, or were gone.
        damaged: blocks of other days that could not be read.
    """

    created_time: str
    start_time: str | None
    end_time: str | None
    servers: tuple[str, ...] | None
    metrics: tuple[str, ...] | None
    first_time: str
    last_time: str
    points: int
    files: tuple[ExportedFile, ...]
    left_out: tuple[str, ...]
    damaged: int

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def time_text(time_ms: int) -> str:
    """RFC 3339, UTC, to the millisecond."""
    time = datetime.datetime.fromtimestamp(0, datetime.UTC) + datetime.timedelta(milliseconds=time_ms)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def part_name(day: datetime.date, number: int) -> str:
    """The path of a file of points in the export."""
    return f"{POINTS_FOLDER}/date={day.isoformat()}/part-{number}.parquet"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes and syncs it."""
    text = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **asdict(manifest)}, indent=2)
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def files_to_import(path: Path) -> tuple[list[Path], Path | None]:
    """The files of points that a path names (a file, an export, or a folder of files), and that of the servers.

    Raises:
        ParquetError: there are none, or an export is not whole.
    """
    if path.is_file():
        return [path], None
    if not path.is_dir():
        raise ParquetError(f"there is no {path}: name an export, a Parquet file, or a folder of such files")
    if path.name.endswith(".partial"):
        raise ParquetError(f"{path} is an export that was not finished: export again, or name another folder")
    if (path / MANIFEST_NAME).exists():
        files = [_whole(path, name, size) for name, size in _listed(path / MANIFEST_NAME)]
        servers = path / SERVERS_NAME
        return files, servers if servers.exists() else None
    files = sorted(_data_files(path))
    if not files:
        raise ParquetError(f"there is no file *.parquet in {path}: name another folder")
    return files, None


def _data_files(folder: Path) -> Iterator[Path]:
    """As other readers do it: what begins with a dot or an underscore is not data."""
    for path in folder.rglob("*.parquet"):
        if path.is_file() and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts):
            yield path


def _listed(path: Path) -> list[tuple[str, int]]:
    try:
        fields = json.loads(path.read_text("utf-8"))
        known = (fields["format"], fields["version"]) == (FORMAT, FORMAT_VERSION)
        files = [(str(file["name"]), int(file["bytes"])) for file in fields["files"]] if known else []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ParquetError(f"{path} cannot be read ({error!r}): name its folder {POINTS_FOLDER} instead") from error
    if not known:
        raise ParquetError(
            f"{path} is no {FORMAT} of version {FORMAT_VERSION}: use the program that wrote it, or name the folder"
            " of the Parquet files alone"
        )
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name, _ in files):
        raise ParquetError(f"{path} names files outside of the export: it was not written by this program")
    return files


def _whole(folder: Path, name: str, size: int) -> Path:
    path = folder / name
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        what = "missing" if found is None else f"of {found} bytes, {size} were written"
        raise ParquetError(
            f"{path} is {what}: copy the export again, or name its folder {POINTS_FOLDER} to import what there is"
        )
    return path
