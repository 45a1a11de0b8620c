"""`openmanager servers` and `openmanager server ID`."""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from client.api import OpenManager
from client.command import exits, transfer
from client.command.tables import Cell, Column, table
from client.command.terminal import Terminal, clean
from client.command.values import age_text, number_text, time_text
from openmanager.fleet.v1.status_pb2 import ServerStatus
from openmanager.gateway.v1.fleet_pb2 import Server

HEADLINE: Final = ("cpu_usage", "memory_usage", "disk_usage")
COLUMNS: Final = (
    Column("ID"),
    Column("STATUS"),
    Column("CPU %", right=True),
    Column("MEMORY %", right=True),
    Column("DISK %", right=True),
    Column("SEEN", right=True),
    Column("ENVIRONMENT"),
    Column("ROLE"),
    Column("LOCATION"),
)
_COLOURS: Final[Mapping[str, str]] = {"healthy": "green", "warning": "yellow", "critical": "red", "offline": "dim"}


async def run(manager: OpenManager, options: Namespace) -> int:
    """Runs the command; returns the exit status."""
    if options.command == "servers" and options.action:
        return await transfer.run(manager, options)
    terminal = Terminal(sys.stdout)
    if options.command == "server":
        _show(terminal, await manager.server(options.id), options.output)
        return exits.OK
    listing = manager.servers(status=options.status or "", environment=options.environment, role=options.role)
    servers = [server async for server in listing]
    if options.output == "json":
        terminal.line(json.dumps({"servers": [as_json(server) for server in servers], "totalSize": len(servers)}))
        return exits.OK
    now = time.time()
    for line in table(terminal, COLUMNS, [row(server, now) for server in servers]):
        terminal.line(line)
    return exits.OK


def row(server: Server, now_s: float) -> list[str | Cell]:
    """The cells of a server for COLUMNS."""
    metrics = server.metrics
    values = [number_text(metrics[name]) if name in metrics else "-" for name in HEADLINE]
    seen = age_text(now_s - server.observed_time.ToNanoseconds() / 1e9) if server.HasField("observed_time") else "never"
    return [server.id, status_cell(server), *values, seen, server.environment, server.role, server.location]


def status_cell(server: Server) -> Cell:
    """The status in its colour."""
    text = status_text(server)
    return Cell(text, _COLOURS.get(text))


def status_text(server: Server) -> str:
    """`healthy`; `unknown` where there is nothing to judge by."""
    name = ServerStatus.Name(server.status) if server.status in ServerStatus.values() else str(server.status)
    return name.removeprefix("SERVER_STATUS_").lower().replace("unspecified", "unknown")


def as_json(message: Message) -> dict[str, Any]:
    """A message as the HTTP API shows it."""
    return MessageToDict(message, always_print_fields_with_no_presence=True)


def _show(terminal: Terminal, server: Server, output: str) -> None:
    if output == "json":
        terminal.line(json.dumps(as_json(server)))
        return
    status = status_cell(server)
    facts = {
        "status": terminal.coloured(status.text, status.colour),
        "hostname": clean(server.hostname),
        "environment": clean(server.environment),
        "role": clean(server.role),
        "location": clean(server.location),
        "observed": f"{time_text(server.observed_time.ToNanoseconds() / 1e9)} UTC"
        if server.HasField("observed_time")
        else "never",
        "maintenance": "a window is open" if server.in_maintenance else "",
        "labels": clean(", ".join(f"{key}={value}" for key, value in sorted(server.labels.items()))),
        "notes": clean(server.notes.replace("\n", " ")),
        "clock skew": f"{server.clock_skew.ToNanoseconds() / 1e9:+.3f} s" if server.HasField("clock_skew") else "",
    }
    terminal.line(terminal.coloured(clean(server.id), "bold"))
    for name, value in facts.items():
        if value:
            terminal.line(f"  {name:<12}{value}")
    if not server.metrics:
        return
    terminal.line()
    columns = (Column("METRIC"), Column("VALUE", right=True))
    for line in table(
        terminal, columns, [(name, number_text(server.metrics[name])) for name in sorted(server.metrics)]
    ):
        terminal.line(line)
