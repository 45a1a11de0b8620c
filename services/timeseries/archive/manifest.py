"""manifest.json: which files a backup has, and what their bytes were when it was made.

What must stay true: it is written last, so a folder with a manifest had everything in it that the manifest lists.
"""

import datetime
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from services.timeseries.engine.database import FORMAT_VERSION
from services.timeseries.engine.partition import day_of
from services.timeseries.engine.tiers import TIERS, TierKind

MANIFEST_NAME: Final = "manifest.json"
MANIFEST_VERSION: Final = 2
READABLE_VERSIONS: Final = (1, 2)
"""1 was written while there were no roll-ups; it says the same. 2 keeps programs of that time from restoring partitions
that they cannot read."""
JOURNAL_NAME: Final = "journal.db"
_READ_BYTES: Final = 1 << 20

Progress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes of it that are done, and its bytes; at its end once with both equal."""


class BackupError(Exception):
    """Why a backup or a restore was not made, in words that say what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackedUpFile:
    """A file of a backup: its path in it, its size, and the SHA-256 of its bytes."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a backup is.

    Attributes:
        format_version: of the journal, as in its `meta`.
        identity: of the journal.
        created_time: when the backup began, RFC 3339, UTC.
        last_sequence: the last batch in it.
        files: the journal first, then the partitions, the finer tiers' first.
        left_out: partitions that could not be read.
    """

    format_version: int
    identity: str
    created_time: str
    last_sequence: int
    files: tuple[BackedUpFile, ...]
    left_out: tuple[str, ...]

    @property
    def created_ms(self) -> int:
        """When the backup began, UTC epoch milliseconds. Raises ValueError, TypeError."""
        return round(datetime.datetime.fromisoformat(self.created_time).timestamp() * 1_000)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


def store_files(folder: Path) -> list[str]:
    """The partitions of a store, the finer tiers' first, as paths in its folder; set-aside ones are none."""
    return [name for kind in TIERS for name in tier_files(folder, kind)]


def tier_files(folder: Path, kind: TierKind) -> list[str]:
    """The partitions of one tier, the older first."""
    paths = sorted((folder / kind.folder).glob("*.db"))
    return [f"{kind.folder}/{path.name}" for path in paths if day_of(path) is not None]


def describe(folder: Path, name: str) -> BackedUpFile:
    """Syncs a file and says what it is."""
    with (folder / name).open("rb") as file:
        os.fsync(file.fileno())
        digest, size = digest_of(file.read)
    return BackedUpFile(name=name, bytes=size, sha256=digest)


def digest_of(read: Callable[[int], bytes], write: Callable[[bytes], object] | None = None) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    while data := read(_READ_BYTES):
        digest.update(data)
        size += len(data)
        if write is not None:
            write(data)
    return digest.hexdigest(), size


def write_manifest(folder: Path, manifest: Manifest) -> None:
    text = json.dumps({"manifest_version": MANIFEST_VERSION, **asdict(manifest)}, indent=2)
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a backup; raises BackupError."""
    path = folder / MANIFEST_NAME
    try:
        fields = json.loads(path.read_text("utf-8"))
        version = fields.pop("manifest_version")
        if version not in READABLE_VERSIONS or fields["format_version"] != FORMAT_VERSION:
            raise BackupError(f"{path} is of another version: use the program that wrote it")
        files = tuple(BackedUpFile(**file) for file in fields.pop("files"))
        manifest = Manifest(**{**fields, "files": files, "left_out": tuple(fields["left_out"])})
        _ = manifest.created_ms
    except FileNotFoundError:
        raise BackupError(f"{folder} is no finished backup: it has no {MANIFEST_NAME}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BackupError(f"{path} cannot be read ({error!r}): use another backup") from error
    names = [Path(file.name) for file in manifest.files]
    if JOURNAL_NAME not in map(str, names) or any(name.is_absolute() or ".." in name.parts for name in names):
        raise BackupError(f"{path} does not name the files of a store: use another backup")
    return manifest


def damaged_files(folder: Path, manifest: Manifest, progress: Progress) -> Iterator[tuple[str, str]]:
    """The files of a backup that are not what the manifest says, each with what is wrong."""
    for file in manifest.files:
        try:
            with (folder / file.name).open("rb") as opened:
                digest, size = digest_of(opened.read)
        except OSError as error:
            yield file.name, error.strerror or str(error)
            continue
        if size != file.bytes:
            yield file.name, f"it has {size} bytes, {file.bytes} were written"
        elif digest != file.sha256:
            yield file.name, "its checksum is not the manifest's"
        progress(file.name, file.bytes, file.bytes)
