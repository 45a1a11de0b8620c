"""No process of the product starts because somebody asked what it is, or mistyped a command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.__main__ import _PROCESSES
from tests.harness.product import ROOT


@pytest.mark.parametrize("module", [spec.module for spec in _PROCESSES])
@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("no-such-command", 2)])
def test_an_argument_starts_nothing(tmp_path: Path, module: str, argument: str, status: int) -> None:
    environ = os.environ | {"DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"}
    command = [sys.executable, "-m", module, argument]
    ended = subprocess.run(command, check=False, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == status
    assert f"usage: python -m {module}" in ended.stdout + ended.stderr
    assert not (tmp_path / "data").exists()
