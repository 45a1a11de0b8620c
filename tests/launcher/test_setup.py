"""What `make` sets up stays right when the checkout goes elsewhere."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.product import ROOT


@pytest.mark.parametrize("how", [shutil.move, pytest.param(shutil.copytree, marks=pytest.mark.full)])
def test_a_checkout_that_was_moved_or_copied_runs_its_own_code(
    tmp_path: Path, how: Callable[[Path, Path], object]
) -> None:
    first, second = tmp_path / "first", tmp_path / "another place" / "with a space"
    for name in ("Makefile", "tools/check_python.py"):
        (first / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, first / name)
    (first / "gen").mkdir()
    (first / "protos" / "openmanager").mkdir(parents=True)
    make = ["make", "--silent", ".venv/stamps/venv", f"PYTHON={sys.executable}"]
    subprocess.run(make, check=True, cwd=first)
    second.parent.mkdir()
    how(first, second)
    code = "import sys; print(*sys.path, sep='\\n')"
    python = [str(second / ".venv/bin/python"), "-P", "-c", code]
    found = subprocess.run(python, check=True, cwd=tmp_path, capture_output=True, text=True).stdout.splitlines()
    assert {str(second), str(second / "gen")} <= set(found)
    assert not {str(first), str(first / "gen")} & set(found)
