"""Real servers on free ports for the tests of the runtime."""

import contextlib
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from runtime.channel import Channel
from runtime.doorman import Knows
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from tests.runtime.echo import SERVICE, EchoServicer, EchoSettings


@pytest.fixture
def settings(tmp_path: Path) -> EchoSettings:
    return EchoSettings(data_dir=tmp_path)


class Serving:
    """A running server of EchoService, and ways to call it."""

    def __init__(self, server: GrpcServer, address: str, servicer: EchoServicer) -> None:
        self.server = server
        self.address = address
        self.servicer = servicer

    def channel(self, **kwargs: Any) -> Channel:
        return Channel(self.address, **kwargs)

    def raw(self, **options: Any) -> grpc.aio.Channel:
        """A channel as a foreign client has it."""
        return grpc.aio.insecure_channel(self.address, options=tuple((f"grpc.{k}", v) for k, v in options.items()))


@contextlib.asynccontextmanager
async def serving(
    servicer: EchoServicer | None = None,
    interception: Interception | None = None,
    address: str = "127.0.0.1:0",
    knows: Knows | None = None,
    open_to_all: Collection[str] = (),
) -> AsyncIterator[Serving]:
    servicer = servicer or EchoServicer()
    server = GrpcServer([bind(SERVICE, servicer)], interception or Interception(), knows=knows, open_to_all=open_to_all)
    bound = await server.start(address)
    try:
        yield Serving(server, bound, servicer)
    finally:
        await server.stop(0)
