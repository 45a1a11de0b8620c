"""What a process keeps on disk for itself: its locked folder, and the secret all processes of an install share.

What must stay true: two processes never use one folder at a time; one whose launcher was killed, and which is about to
notice, keeps nobody from starting; however many processes start at once, they all end up with the same secret, in a
file that only its owner can read.
"""

import contextlib
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from runtime.logs import OF_SET_UP
from runtime.redaction import remember_secret
from runtime.settings import CommonSettings

SECRET_FILE_NAME: Final = "service-secret"  # noqa: S105  a name
MIN_SECRET_CHARS: Final = 16
PARENT_PID_VARIABLE: Final = "OPENMANAGER_PARENT_PID"
"""In the environment of a process that ends when this one, its parent, is gone."""
ORPHAN_WAIT_S: Final = 25.0
"""Such a process notices that within a second, and its orderly stop is bounded."""
_LOOK_EVERY_S: Final = 0.1

_log = logging.getLogger(__name__)


class CannotStartError(Exception):
    """Why a process does not start, in one line that says what to do."""


@contextlib.contextmanager
def locked(data_dir: Path, name: str) -> Iterator[Path]:
    """DATA_DIR/<name>/, made when missing, locked against every other process until the end of the block.

    The lock is the kernel's and dies with the process, so nothing is left over after a kill -9.
    """
    folder = data_dir / name
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise CannotStartError(f"cannot use folder {folder}: {error.strerror} (set DATA_DIR)") from error
    try:
        _lock(descriptor, folder, name)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield folder
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, name: str) -> None:
    ends = time.monotonic() + ORPHAN_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            if not _is_orphan(owner) or time.monotonic() >= ends:
                raise CannotStartError(
                    f"folder {folder} is in use by another {name} process (pid {owner}): "
                    "stop that one, or set DATA_DIR to another folder"
                ) from error
            time.sleep(_LOOK_EVERY_S)
        else:
            return


def _is_orphan(owner: str) -> bool:
    """Whether a process ends by itself, because its launcher is gone, or has just ended."""
    import psutil  # noqa: PLC0415  nearly nobody has to know

    try:
        process = psutil.Process(int(owner))
        launcher = process.environ().get(PARENT_PID_VARIABLE, "")
        return launcher.isdecimal() and int(launcher) != process.ppid()
    except psutil.NoSuchProcess:
        return True
    except (ValueError, psutil.Error):
        return False


def write_private(path: Path, content: bytes) -> None:
    """Puts a file that only its owner can read in the place of the one before, whole or not at all."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def service_secret(settings: CommonSettings) -> str:
    """The secret inner services demand: SERVICE_SECRET, or what DATA_DIR/service-secret holds, made when missing."""
    if settings.service_secret is not None:
        secret = settings.service_secret.get_secret_value()
    else:
        secret = _secret_of(settings.data_dir / SECRET_FILE_NAME)
    remember_secret(secret)
    return secret


def _secret_of(path: Path) -> str:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _create(path)
        if path.stat().st_mode & 0o077:
            _log.warning("%s can be read by other users of this machine: chmod 600 it", path, extra=OF_SET_UP)
        secret = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not ASCII text"
        raise CannotStartError(f"cannot use {path}: {reason} (or set SERVICE_SECRET)") from error
    if len(secret) < MIN_SECRET_CHARS:
        raise CannotStartError(f"{path} holds no secret: delete it and start again, or set SERVICE_SECRET")
    return secret


def _create(path: Path) -> None:
    """Writes a new secret beside `path` and links it into place: the first link wins, and it is complete."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was first: its secret is the one
            os.link(draft, path)
    finally:
        draft.unlink()
