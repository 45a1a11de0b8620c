"""A disk that can lose its power: what `kill -9` cannot show, since the page cache survives it.

While a `Disk` is entered, every SQLite connection of the process opens its files through a VFS that stands on the
ordinary one and writes down, for everything under the disk's root, what SQLite asks for: writes, truncations, syncs,
files made and deleted. The few calls of `os` that make, rename and remove names, and the sync of a folder, are written
down too. The real files are always as the program sees them; nothing is really synced, which makes it quick.

`lose_power` then draws, at that moment, a disk as the machine might find it when it comes back:

* of a file all that was synced, and of each write and truncation since then either nothing, or all, or, of a write,
  some of its sectors of 512 bytes (bytes beside what was written do not change);
* of a folder all names as they were when it was synced, and of each later change of a name either nothing or all;
* no shared memory (`-shm`), which SQLite never syncs.

That is more than a journaling file system would lose, and all that POSIX promises. One thing SQLite does unasked, and
so does this: the first sync of a log through a connection that may have made it syncs its folder.

The hook `step` is called after every change, in the thread that made it, with the kind of change (`KINDS`) and the
path; nothing changes on the disk while it runs, so it is the place to call `lose_power` from.
"""

import os
import random
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import apsw

SECTOR_BYTES: Final = 512
KINDS: Final = ("write", "truncate", "sync", "name", "sync_folder")
LOG_OR_JOURNAL: Final = apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL

Change = tuple[int, bytes | None]
"""Of a file: offset and data, or the size it is cut or grown to."""


class File:
    """The bytes that are safe, and what was asked for since."""

    def __init__(self, safe: bytes = b"") -> None:
        self._safe = bytearray(safe)
        self._since: list[Change] = []

    def change(self, at: int, data: bytes | None) -> None:
        self._since.append((at, data))

    def sync(self) -> None:
        for at, data in self._since:
            _apply(self._safe, at, data)
        self._since.clear()

    def after_loss(self, rng: random.Random, kept: float, torn: float) -> bytes:
        content = bytearray(self._safe)
        for at, data in self._since:
            if rng.random() >= kept:
                continue
            if data is None or rng.random() >= torn:
                _apply(content, at, data)
                continue
            for start, end in _sectors(at, at + len(data)):
                if rng.random() < 0.5:
                    _apply(content, start, data[start - at : end - at])
        return bytes(content)


def _apply(content: bytearray, at: int, data: bytes | None) -> None:
    if data is None:
        del content[at:]
    if len(content) < at:
        content.extend(bytes(at - len(content)))
    if data is not None:
        content[at : at + len(data)] = data


def _sectors(start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end:
        next_sector = min(end, (start // SECTOR_BYTES + 1) * SECTOR_BYTES)
        yield start, next_sector
        start = next_sector


class Folder:
    """The names that are safe, what was done to names since, and the names as the program sees them."""

    def __init__(self) -> None:
        self.now: dict[str, File | Folder] = {}
        self._safe: dict[str, File | Folder] = {}
        self._since: list[dict[str, File | Folder | None]] = []

    def change(self, names: "dict[str, File | Folder | None]") -> None:
        """Changes some names at once: what each is from now on, None for a name that goes."""
        self._since.append(names)
        _rename(self.now, names)

    def sync(self) -> None:
        self._safe = dict(self.now)
        self._since.clear()

    def after_loss(self, rng: random.Random, kept: float) -> "dict[str, File | Folder]":
        names = dict(self._safe)
        for change in self._since:
            if rng.random() < kept:
                _rename(names, change)
        return names


def _rename(names: "dict[str, File | Folder]", change: "dict[str, File | Folder | None]") -> None:
    for name, node in change.items():
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Disk:
    """Everything under `root`, an existing folder whose content is safe; only what is entered is written down.

    `deaf` plants a bug: what it says True of is never synced, though SQLite is told that it was.
    """

    def __init__(
        self, root: Path, step: Callable[[str, Path], None], *, deaf: Callable[[Path], bool] = lambda _path: False
    ) -> None:
        self._root = root.resolve()
        self._step = step
        self._deaf = deaf
        self._lock = threading.RLock()
        self._content = _scan(self._root)
        self._vfs: _PowerVFS | None = None
        self._restore: list[tuple[str, Any]] = []

    def __enter__(self) -> Self:
        self._vfs = _PowerVFS(self, apsw.vfs_names()[0])
        for name in ("mkdir", "unlink", "remove", "rename", "replace", "rmdir", "fsync"):
            real = getattr(os, name)
            self._restore.append((name, real))
            setattr(os, name, self._watched(name, real))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._restore:
            setattr(os, *self._restore.pop())
        assert self._vfs is not None
        apsw.set_default_vfs(self._vfs.base)
        self._vfs.unregister()
        self._vfs = None

    def lose_power(self, target: Path, rng: random.Random) -> None:
        """Writes what is left to `target`, which is made, not under `root`. How much of what was not synced survives
        is drawn too."""
        kept, torn = rng.choice((0.0, 0.5, 0.9, 1.0, rng.random())), rng.choice((0.0, 0.5))

        def write(folder: Folder, path: Path) -> None:
            path.mkdir()
            for name, node in folder.after_loss(rng, kept).items():
                if isinstance(node, Folder):
                    write(node, path / name)
                else:
                    (path / name).write_bytes(node.after_loss(rng, kept, torn))

        with self._lock:
            write(self._content, target)

    # what the VFS and the calls of os tell

    def opened(self, path: Path, *, new: bool) -> File | None:
        """The file of a path that was just opened, None when it is none of this disk's."""
        place = self._place(path)
        if place is None:
            return None
        folder, name = place
        node = folder.now.get(name)
        if new or not isinstance(node, File):
            node = File()
            folder.change({name: node})
            self._step("name", path)
        return node

    @contextmanager
    def changing(self) -> Iterator[None]:
        """The real change and its note are one."""
        with self._lock:
            yield

    def changed(self, path: Path, file: File, at: int, data: bytes | None) -> None:
        file.change(at, data)
        self._step("truncate" if data is None else "write", path)

    def synced(self, path: Path, file: File) -> None:
        if not self._deaf(path):
            file.sync()
        self._step("sync", path)

    def folder_synced(self, path: Path) -> None:
        node = self._folder(path)
        if node is not None and not self._deaf(path):
            node.sync()
            self._step("sync_folder", path)

    def removed(self, path: Path) -> None:
        place = self._place(path)
        if place is not None and place[1] in place[0].now:
            place[0].change({place[1]: None})
            self._step("name", path)

    def _made(self, path: Path) -> None:
        place = self._place(path)
        if place is not None:
            place[0].change({place[1]: Folder()})
            self._step("name", path)

    def _renamed(self, source: Path, target: Path) -> None:
        old, new = self._place(source), self._place(target)
        if old is None or new is None or old[1] not in old[0].now:
            return
        node = old[0].now[old[1]]
        if old[0] is new[0]:
            old[0].change({old[1]: None, new[1]: node})
        else:
            new[0].change({new[1]: node})
            old[0].change({old[1]: None})
        self._step("name", target)

    def _place(self, path: Path) -> tuple[Folder, str] | None:
        folder = self._folder(path.parent)
        return None if folder is None else (folder, path.name)

    def _folder(self, path: Path) -> Folder | None:
        if not path.is_relative_to(self._root):
            return None
        node: File | Folder | None = self._content
        for name in path.relative_to(self._root).parts:
            node = node.now.get(name) if isinstance(node, Folder) else None
        return node if isinstance(node, Folder) else None

    def _watched(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def unlink(path: Any, *args: Any, **options: Any) -> None:
            real(path, *args, **options)
            self.removed(Path(path).absolute())

        def mkdir(path: Any, *args: Any, **options: Any) -> None:
            real(path, *args, **options)
            self._made(Path(path).absolute())

        def rename(source: Any, target: Any, *args: Any, **options: Any) -> None:
            real(source, target, *args, **options)
            self._renamed(Path(source).absolute(), Path(target).absolute())

        def fsync(handle: Any) -> None:
            path = Path(f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}").readlink()
            if not path.is_relative_to(self._root):
                real(handle)
            elif stat.S_ISDIR(path.stat().st_mode):
                self.folder_synced(path)

        by_name: dict[str, Callable[..., None]]
        by_name = {"fsync": fsync, "mkdir": mkdir, "rename": rename, "replace": rename, "unlink": unlink}
        by_name |= {"remove": unlink, "rmdir": unlink}
        chosen = by_name[name]

        def watched(*args: Any, **options: Any) -> None:
            with self._lock:
                chosen(*args, **options)

        return watched


def _scan(path: Path) -> Folder:
    folder = Folder()
    for child in path.iterdir():
        if child.is_dir():
            folder.change({child.name: _scan(child)})
        elif not child.name.endswith("-shm"):
            folder.change({child.name: File(child.read_bytes())})
    folder.sync()
    return folder


class _PowerVFS(apsw.VFS):
    def __init__(self, disk: Disk, base: str) -> None:
        super().__init__("power", base, makedefault=True)
        self._disk = disk
        self.base = base

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        path = Path(name.filename() if isinstance(name, apsw.URIFilename) else name or "/nowhere")
        with self._disk.changing():
            new = not path.exists()
            file = _PowerFile(self._disk, self.base, path, name, flags)
            file.content = self._disk.opened(path, new=new)
        return file

    def xDelete(self, filename: str, syncdir: bool) -> None:
        path = Path(filename)
        with self._disk.changing():
            super().xDelete(filename, False)
            self._disk.removed(path)
            if syncdir:
                self._disk.folder_synced(path.parent)


class _PowerFile(apsw.VFSFile):
    def __init__(self, disk: Disk, base: str, path: Path, name: Any, flags: list[int]) -> None:
        super().__init__(base, name, flags)
        self._disk = disk
        self._path = path
        self._folder_too = bool(flags[0] & LOG_OR_JOURNAL and flags[0] & apsw.SQLITE_OPEN_CREATE)
        self.content: File | None = None

    def xWrite(self, data: Any, offset: int) -> None:
        with self._disk.changing():
            super().xWrite(data, offset)
            if self.content is not None:
                self._disk.changed(self._path, self.content, offset, bytes(data))

    def xTruncate(self, newsize: int) -> None:
        with self._disk.changing():
            super().xTruncate(newsize)
            if self.content is not None:
                self._disk.changed(self._path, self.content, newsize, None)

    def xSync(self, flags: int) -> None:
        if self.content is None:
            super().xSync(flags)
            return
        with self._disk.changing():
            self._disk.synced(self._path, self.content)
            if self._folder_too:
                self._folder_too = False
                self._disk.folder_synced(self._path.parent)
