"""Real recordings for tests: in the folder OPENMANAGER_TEST_DATA, or beside the checkout; otherwise a visible skip."""

import os
from pathlib import Path

import pytest

_BESIDE = Path(__file__).resolve().parents[3] / "shared" / "data"


def recording(name: str) -> Path:
    """The path of a recording."""
    path = Path(os.environ.get("OPENMANAGER_TEST_DATA") or _BESIDE) / name
    if not path.exists():
        pytest.skip(f"{name} is neither in OPENMANAGER_TEST_DATA nor in {_BESIDE}")
    return path
