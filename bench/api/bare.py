"""The yardsticks: the same transports with nothing behind them. `python -m bench.api.bare grpc|http ADDRESS FILE`.

grpc: grpc.aio on uvloop with one generic handler that returns the bytes of FILE: no messages, interceptors or
token.
http: the gateway's own ASGI server (`gateway.http.server`, so granian is set up the same) with an application that
answers everything with the status line, headers and body of FILE, a whole HTTP/1.1 answer as the gateway gave it. It is
called as granian calls applications, in a task each time, and not by `gateway.http.dispatch`.
"""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, cast

import grpc
import grpc.aio
import uvloop

from gateway.http import generations
from gateway.http.app import HttpApp
from gateway.http.server import serve_http

SERVICE: Final = "openmanager.gateway.v1.FleetService"
METHOD: Final = "GetServer"
OF_THE_SERVER: Final = frozenset({b"date", b"server", b"transfer-encoding", b"connection"})
"""Headers that the ASGI server adds by itself."""


async def serve_grpc(address: str, reply: bytes, stopping: asyncio.Event) -> None:
    """Serves until told to stop."""

    async def answer(_request: bytes, _context: Any) -> bytes:
        return reply

    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    handlers: dict[str, Any] = {METHOD: grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(address)
    await server.start()
    await stopping.wait()
    await server.stop(None)


class Ready:
    """The empty ASGI application, with what `serve_http` asks of the gateway's."""

    in_flight = 0

    def __init__(self, answer: bytes) -> None:
        head, _, self._body = answer.partition(b"\r\n\r\n")
        lines = [line.partition(b":") for line in head.split(b"\r\n")[1:]]
        headers = [(name.lower(), value.strip()) for name, _, value in lines]
        self._headers = [header for header in headers if header[0] not in OF_THE_SERVER]

    async def __call__(self, _scope: Any, _receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await send({"type": "http.response.body", "body": self._body})

    def begin_drain(self) -> None:
        """Nothing lasts."""

    def cut_off(self) -> None:
        """Nothing lasts."""


async def _as_it_comes(server: Any, *arguments: Any) -> None:
    """granian's own worker, in place of the gateway's."""
    asyncio.get_running_loop().call_soon(server._has_begun.set)
    await server._spawn_asgi_worker(*arguments)


async def serve(kind: str, address: str, reply: bytes) -> None:
    """Serves until SIGTERM."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    if kind == "grpc":
        await serve_grpc(address, reply, stopping)
    else:
        generations._Server._spawn = _as_it_comes  # type: ignore[assignment,method-assign]
        await serve_http(cast("HttpApp", Ready(reply)), address, stopping)


if __name__ == "__main__":
    kind, address, file = sys.argv[1:]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(kind, address, Path(file).read_bytes()))
