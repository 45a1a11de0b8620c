"""A real, small disk that a test may fill: a tmpfs of its own, seen by one program only and gone with it.

It is mounted in a mount namespace of the program: as root, or in a user namespace where the machine allows those.
In a plain container neither is permitted, but /dev/shm is a small tmpfs there. Otherwise the test is skipped visibly.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
SHARED_MEMORY: Final = Path("/dev/shm")
SHARED_MEMORY_LIMIT_BYTES: Final = 128 << 20
"""A larger /dev/shm is the machine's own, and not for us to fill."""
_MOUNT_THEN: Final = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && shift 2 && exec "$@"'
_SPACES: Final = (("unshare", "--mount"), ("unshare", "--map-root-user", "--mount"))


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """`folder` is the disk for programs whose command begins with `prefix`."""

    folder: Path
    prefix: tuple[str, ...]

    def run(self, module: str, *arguments: str, within_s: float) -> None:
        """Runs `python -m module FOLDER arguments...`; fails with what it printed unless it exits with 0."""
        command = [*self.prefix, sys.executable, "-m", module, str(self.folder), *arguments]
        environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"}
        ended = subprocess.run(
            command, check=False, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=within_s
        )
        if ended.returncode:
            pytest.fail(f"{module} ended with {ended.returncode}:\n{ended.stdout[-2_000:]}\n{ended.stderr[-6_000:]}")


@contextmanager
def small_disk(size_bytes: int) -> Iterator[SmallDisk]:
    """A disk of about that size, empty."""
    refusals = []
    folder = Path(tempfile.mkdtemp(prefix="openmanager-disk-"))
    try:
        for space in _SPACES:
            prefix = (*space, "sh", "-c", _MOUNT_THEN, "sh", str(size_bytes), str(folder))
            if shutil.which(space[0]) is None:
                refusals.append(f"{space[0]} is not on PATH")
                continue
            tried = subprocess.run([*prefix, "true"], check=False, capture_output=True, text=True)
            if tried.returncode == 0:
                yield SmallDisk(folder, prefix)
                return
            refusals.append(f"{' '.join(space)}: {tried.stderr.strip()}")
    finally:
        folder.rmdir()
    if SHARED_MEMORY.is_mount() and shutil.disk_usage(SHARED_MEMORY).total <= SHARED_MEMORY_LIMIT_BYTES:
        with tempfile.TemporaryDirectory(prefix="openmanager-disk-", dir=SHARED_MEMORY) as shared:
            yield SmallDisk(Path(shared), ())
        return
    pytest.skip(f"no small disk can be had: {'; '.join(refusals)}; {SHARED_MEMORY} is not a small one")


def fill(folder: Path, leave_bytes: int) -> Path:
    """Takes all but so much of the space of a folder's disk; the file returned gives it back when it goes."""
    ballast = folder / "ballast"
    with ballast.open("ab") as file:
        taken = file.tell()
        while (missing := shutil.disk_usage(folder).free - leave_bytes) > 0:
            os.posix_fallocate(file.fileno(), taken, missing)
            taken += missing
    return ballast
