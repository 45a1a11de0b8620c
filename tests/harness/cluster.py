"""A PostgreSQL cluster that is made once, for the products of tests to begin with a copy.

initdb waits for the disk: it takes a first start 3 s on two busy cores, of which it works 0.4, and a copy takes 0.2.

What must stay true: a copy is what initdb makes; the product that many tests look at (`shared_product`) begins with
nothing, as a user's does, and so do the tests of first starts.
"""

import atexit
import shutil
import subprocess
from functools import cache
from pathlib import Path

from services.metadata import postmaster
from tests.harness.postgres import scratch_folder


@cache
def made_cluster() -> Path:
    """A cluster that does not run; of this process, for as long as it lives."""
    made = scratch_folder()
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    postmaster.prepare(made)
    return made / "postgresql"


def copy_cluster(to: Path) -> None:
    """Puts a copy into a folder, with its owner."""
    subprocess.run(["cp", "-a", "--reflink=auto", str(made_cluster()), str(to)], check=True)


def begin_with_cluster(data: Path) -> None:
    """Puts a copy where metadata looks for it in DATA_DIR, unless there is one."""
    folder = data / "metadata"
    for each in (data, folder):
        each.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (folder / "postgresql").exists():
        copy_cluster(folder)
