"""Programs that tests need and the product does not: found on PATH, or the test is skipped visibly (in CI: fails)."""

import shutil

import pytest


def require_command(name: str) -> str:
    """The path of a program."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not on PATH")
    return path
