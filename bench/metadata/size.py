"""How much is done, and where."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import asyncpg

from bench.peers import Server
from services.metadata.embedded import DATABASE, USER
from services.metadata.postmaster import SOCKET_PORT


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of each row.

    Attributes:
        rounds: turns of each contender; what is told is the median.
        interactions: recorded in a turn.
        at_once: calls in flight, and connections of the yardstick.
        searched: interactions that are searched.
        searches: questions, and pages of servers.
        servers: that are listed.
    """

    rounds: int
    interactions: int
    at_once: int
    searched: int
    searches: int
    servers: int


FULL: Final = Size(rounds=5, interactions=10_000, at_once=50, searched=1_000_000, searches=1_000, servers=20_000)
QUICK: Final = Size(rounds=1, interactions=500, at_once=20, searched=20_000, searches=50, servers=2_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What every row is given: how much, the service, its data folder and secret, and where to say each step."""

    size: Size
    service: Server
    data: Path
    secret: str
    say: Callable[[str], None]

    def connection_options(self) -> dict[str, Any]:
        """How to connect to the service's own PostgreSQL with its role."""
        (pid_file,) = self.data.glob("metadata/**/postmaster.pid")
        socket_folder = pid_file.read_text().splitlines()[4]
        account = {"user": USER, "password": "", "database": DATABASE}
        return {"host": socket_folder, "port": SOCKET_PORT, "ssl": False, "target_session_attrs": "any", **account}

    async def connect(self) -> Any:
        """A connection to it."""
        return await asyncpg.connect(command_timeout=3_600, **self.connection_options())
