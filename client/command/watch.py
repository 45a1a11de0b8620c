"""`openmanager watch`: a table that redraws itself on a terminal, elsewhere a line for each change.

What must stay true: the terminal is left as it was found, however the command ends; what is shown while the gateway is
away says so.
"""

import asyncio
import contextlib
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import AsyncIterator
from typing import Final

from client.api import OpenManager
from client.command import exits
from client.command.fleet import COLUMNS, HEADLINE, row, status_text
from client.command.tables import table
from client.command.terminal import Terminal, clean, clip, complain
from client.command.values import number_text, time_text
from client.errors import OpenManagerError
from openmanager.gateway.v1.fleet_pb2 import Server, WatchFleetResponse

_REDRAW_S: Final = 1.0
"""Ages are shown to the second."""
_MIN_PAUSE_S: Final = 0.2
_WORST_FIRST: Final = {"critical": 0, "warning": 1, "offline": 2}
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"


async def run(manager: OpenManager, options: Namespace) -> int:
    """Runs until Ctrl-C, or until the gateway refuses."""
    terminal = Terminal(sys.stdout)
    if terminal.is_terminal:
        await _Screen(terminal, manager.address).run(manager, options)
    else:
        await _print_changes(terminal, manager, options)
    return exits.OK


async def _print_changes(terminal: Terminal, manager: OpenManager, options: Namespace) -> None:
    lost = False

    def on_lost(error: OpenManagerError, delay_s: float) -> None:
        nonlocal lost
        lost = True
        complain(f"{error}; trying again in {delay_s:.1f} s")

    watching = manager.watch(environment=options.environment, role=options.role, on_lost=on_lost)
    async with contextlib.aclosing(watching) as messages:
        async for message in messages:
            if lost:
                lost = False
                complain(f"{manager.address} is back")
            for server in message.servers:
                terminal.line(line_of(server))
            for removed in message.removed:
                terminal.line(f"{time_text(round(time.time()))} {clean(removed.id)} removed")
            terminal.out.flush()


def line_of(server: Server) -> str:
    """`2026-11-23 00:30:30 web-01 healthy cpu_usage=28.6 ...`; the time is that of its values."""
    when = time_text(server.observed_time.ToNanoseconds() / 1e9) if server.HasField("observed_time") else "never"
    values = [f"{name}={number_text(server.metrics[name])}" for name in HEADLINE if name in server.metrics]
    return " ".join((when, clean(server.id), status_text(server), *values))


class _Screen:
    """The live table."""

    def __init__(self, terminal: Terminal, address: str) -> None:
        self._terminal = terminal
        self._address = address
        self._servers: dict[str, Server] = {}
        self._trouble = ""
        self._changed = asyncio.Event()

    async def run(self, manager: OpenManager, options: Namespace) -> None:
        """Follows and draws until either fails or is cancelled."""
        watching = manager.watch(environment=options.environment, role=options.role, on_lost=self._lost)
        async with contextlib.aclosing(watching) as messages:
            self._take(await anext(messages))  # a gateway that cannot be reached is told of on the screen as it was
            drawer = asyncio.create_task(self._draw_on(), name="draw")
            follower = asyncio.create_task(self._follow(messages), name="follow")
            self._terminal.out.write(_ENTER)
            try:
                done, _ = await asyncio.wait((drawer, follower), return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in (drawer, follower):
                    task.cancel()
                await asyncio.gather(drawer, follower, return_exceptions=True)
                self._terminal.out.write(_LEAVE)
                self._terminal.out.flush()

    async def _follow(self, messages: AsyncIterator[WatchFleetResponse]) -> None:
        async for message in messages:
            self._take(message)

    def _take(self, message: WatchFleetResponse) -> None:
        if message.snapshot:
            self._servers.clear()
        self._servers.update((server.id, server) for server in message.servers)
        for removed in message.removed:
            self._servers.pop(removed.id, None)
        self._trouble = ""
        self._changed.set()

    def _lost(self, error: OpenManagerError, delay_s: float) -> None:
        self._trouble = f"not live: {error}; trying again in {delay_s:.1f} s"
        self._changed.set()

    async def _draw_on(self) -> None:
        while True:
            self._draw()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), _REDRAW_S)
            self._changed.clear()
            await asyncio.sleep(_MIN_PAUSE_S)

    def _draw(self) -> None:
        columns, lines = self._terminal.size()
        now = time.time()
        counts = Counter(status_text(server) for server in self._servers.values())
        told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        head = f"{self._address}  {time_text(round(now))} UTC  {len(self._servers)} servers" + (
            f": {told}" if told else ""
        )
        room = max(lines - 4, 1)  # head, titles, what is left out, trouble
        worst = sorted(self._servers.values(), key=lambda server: (_WORST_FIRST.get(status_text(server), 9), server.id))
        shown = table(self._terminal, COLUMNS, [row(server, now) for server in worst[:room]], fit=columns)
        mark = "…" if self._terminal.shows_unicode else "~"
        drawn = [clip(head, columns, mark), *shown]
        if len(worst) > room:
            drawn.append(clip(f"and {len(worst) - room} more", columns, mark))
        if self._trouble:
            drawn.append(self._terminal.coloured(clip(clean(self._trouble), columns, mark), "red"))
        text = (f"{_CLEAR_LINE}\n").join(drawn)
        self._terminal.out.write(f"{_HOME}{text}{_CLEAR_LINE}{_CLEAR_BELOW}")
        self._terminal.out.flush()
