"""What tests of the engine share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

from services.timeseries.engine import database, journal, partitions


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written and not synced: what is copied, or left by a kill, is the same; many small tests are quick."""

    def without_syncs(connect: Callable[..., apsw.Connection]) -> Callable[..., apsw.Connection]:
        def connected(path: Path, *more: Any) -> apsw.Connection:
            db = connect(path, *more)
            db.pragma("synchronous", 0)
            return db

        return connected

    monkeypatch.setattr(os, "fsync", lambda _: None)
    for module in (journal, partitions):
        monkeypatch.setattr(module, "connect", without_syncs(database.connect))
