"""No process of the product starts because somebody asked what it is, or mistyped a command; what each begins with."""

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


@pytest.mark.full
@pytest.mark.parametrize("module", [spec.module for spec in _PROCESSES])
def test_grpc_is_told_to_be_quiet_before_it_is_imported(module: str) -> None:
    code = f"""
import importlib, os, sys
class Watcher:
    def find_spec(self, name, path=None, target=None):
        if name == "grpc":
            print(os.environ.get("GRPC_VERBOSITY"))
sys.meta_path.insert(0, Watcher())
importlib.import_module("{module}.__main__")
"""
    environ = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'gen'}"
    asked = subprocess.run([sys.executable, "-c", code], check=True, env=environ, stdout=subprocess.PIPE, text=True)
    assert asked.stdout == "ERROR\n"
