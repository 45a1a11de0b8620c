"""`openmanager status`."""

import json
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Final

from client.api import OpenManager
from client.command import exits
from client.command.fleet import as_json
from client.command.tables import Cell, Column, table
from client.command.terminal import Terminal, clean
from client.command.values import number_text, size_text, time_text
from openmanager.fleet.v1.status_pb2 import STORE_STATE_DOWN, StoreState, StoreStatus

_COLUMNS: Final = (
    Column("STORE"),
    Column("SERVICE"),
    Column("ROLE"),
    Column("STATE"),
    Column("LAG POINTS", right=True),
    Column("LAG S", right=True),
    Column("SPOOL", right=True),
    Column("DISK FREE", right=True),
    Column("P50 MS", right=True),
    Column("SINCE (UTC)"),
)
_COLOURS: Final[Mapping[str, str]] = {"up": "green", "degraded": "yellow", "down": "red"}


async def run(manager: OpenManager, options: Namespace) -> int:
    """Runs the command; returns the exit status."""
    stores = await manager.status()
    terminal = Terminal(sys.stdout)
    if options.output == "json":
        terminal.line(json.dumps({"stores": [as_json(store) for store in stores]}))
    else:
        for line in table(terminal, _COLUMNS, [_row(store) for store in stores]):
            terminal.line(line)
        for store in stores:
            _explain(terminal, store)
    return exits.FAILED if any(store.state == STORE_STATE_DOWN for store in stores) else exits.OK


def _row(store: StoreStatus) -> list[str | Cell]:
    state = _state_text(store)
    return [
        store.name,
        store.service,
        store.role,
        Cell(state, _COLOURS.get(state)),
        f"{store.lag_points:,}",
        number_text(round(store.lag_seconds, 1)),
        size_text(store.spool_bytes),
        size_text(store.disk_free_bytes) if store.disk_free_bytes or _is_full(store) else "-",
        number_text(store.latency_p50_ms) if store.latency_p50_ms else "-",
        time_text(store.since.seconds) if store.HasField("since") else "-",
    ]


def _is_full(store: StoreStatus) -> bool:
    """Whether no free space is a full disk, and not one that the product cannot see: one of its own, once looked at."""
    return bool(store.server_version) and (store.name == "engine" or store.role == "embedded")


def _state_text(store: StoreStatus) -> str:
    name = StoreState.Name(store.state) if store.state in StoreState.values() else str(store.state)
    return name.removeprefix("STORE_STATE_").lower().replace("unspecified", "unknown")


def _explain(terminal: Terminal, store: StoreStatus) -> None:
    told = []
    if store.last_error:
        when = f" ({time_text(store.last_error_time.seconds)})" if store.HasField("last_error_time") else ""
        told.append(f"last error{when}: {store.last_error}")
    if store.note:
        told.append(store.note)
    if store.HasField("disk_days_left"):
        told.append(f"its disk is full in {store.disk_days_left:.0f} days")
    told += [f"refused for good: {refusal.points:,} points, {refusal.reason}" for refusal in store.refusals]
    for text in told:
        terminal.line(f"{store.name}: {clean(text)}")
