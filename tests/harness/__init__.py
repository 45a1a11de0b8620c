"""What every test may lean on: waiting for a fact with a bound instead of sleeping, and ports nobody else uses."""

import asyncio
import contextlib
import inspect
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeVar, cast, overload

T = TypeVar("T")

_EPHEMERAL: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST_PORT: Final = 10_000
_PORTS_TRIED: Final = 100
_PROCESSES: Final = 4
"""Test processes at once, each with ports of its own."""
_given: Final[set[int]] = set()
_POLL_S = 0.01  # short enough to add nothing to a test, long enough to leave the event loop to the code under test


@overload
async def eventually(predicate: Callable[[], Awaitable[T | None]], within_s: float = ...) -> T: ...
@overload
async def eventually(predicate: Callable[[], T | None], within_s: float = ...) -> T: ...
async def eventually(predicate: Callable[[], object], within_s: float = 15.0) -> object:
    """Waits until `predicate()` (plain or async) is true and returns its value; AssertionError after `within_s`.

    The bound catches hangs and is no promise: a busy machine that stalls for seconds must not reach it. Nor is it so
    long that what the product does by itself, every 20 s and more, looks like what was waited for.

    An AssertionError raised by the predicate counts as "not yet", and is the cause shown when time runs out.
    """
    ends = time.monotonic() + within_s
    while True:
        failure: AssertionError | None = None
        value: object = None
        try:
            answer = predicate()
            value = await answer if inspect.isawaitable(answer) else answer
        except AssertionError as error:
            failure = error
        if failure is None and value:
            return value
        if time.monotonic() >= ends:
            raise AssertionError(f"not true within {within_s} s; last value: {value!r}") from failure
        await asyncio.sleep(_POLL_S)


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that was free a moment ago. Servers that can listen on port 0 should do that instead.

    Not one of those that the kernel gives to outgoing connections: on a busy machine it did, before the server came.
    Nor one that was given before, or that a test process beside this one gives: for a server that is still to come.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    first, last = (int(word) for word in _EPHEMERAL.read_text().split())
    beside = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    mine = range(_LOWEST_PORT + beside % _PROCESSES, 1 << 16, _PROCESSES)
    candidates = [port for port in mine if not first <= port <= last and port not in _given]
    for port in random.sample(candidates, min(len(candidates), _PORTS_TRIED)):
        with socket.socket(family, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            _given.add(port)
            return port
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return cast("int", probe.getsockname()[1])
