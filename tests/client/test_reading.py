"""Watching and reading against gateways that break off in awkward places, or ask for patience."""

import asyncio
import contextlib
import os
import random
import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from client import OpenManager, OpenManagerError
from client.backoff import Backoff
from openmanager.gateway.v1 import fleet_pb2
from runtime.errors import InvalidArgument, ResourceExhausted, Unavailable
from runtime.errors import OpenManagerError as ServerError
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from runtime.tls import server_credentials
from tests.harness.product import ROOT
from tests.runtime.echo import EchoSettings
from tests.runtime.test_tls import files  # noqa: F401  a fixture

Message = fleet_pb2.WatchFleetResponse


@dataclass
class FakeFleet:
    """Plays one stream of messages after the other, each ended by an error (None: as if all were well)."""

    streams: list[tuple[list[Message], ServerError | None]] = field(default_factory=list)
    summaries: list[ServerError | None] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    async def WatchFleet(self, request: Any, _context: object) -> AsyncIterator[Any]:
        messages, error = self.streams[len(self.asked)]
        self.asked.append(request.after_version)
        for message in messages:
            yield message
        if error is not None:
            raise error

    async def GetFleetSummary(self, _request: Any, _context: object) -> Any:
        self.asked.append("")
        error = self.summaries.pop(0)
        if error is not None:
            raise error
        return fleet_pb2.GetFleetSummaryResponse(summary=fleet_pb2.FleetSummary(total=1))


@contextlib.asynccontextmanager
async def gateway(servicer: FakeFleet, timeout_s: float = 10.0) -> AsyncIterator[OpenManager]:
    server = GrpcServer([bind("openmanager.gateway.v1.FleetService", servicer)], Interception(None))
    address = await server.start("127.0.0.1:0")
    manager = OpenManager.connect(address, timeout_s=timeout_s)
    manager._backoff = Backoff(initial_s=0.01, max_s=0.02, rng=random.Random(1))
    try:
        async with manager:
            yield manager
    finally:
        await server.stop(0)


def change(version: str, *, snapshot: bool = False, continues: bool = False) -> Message:
    return Message(version=version, snapshot=snapshot, continues=continues)


async def watched(servicer: FakeFleet) -> tuple[list[str], OpenManagerError]:
    """What came until watching ended, and why it did."""
    versions = []
    async with gateway(servicer) as manager:
        with pytest.raises(OpenManagerError) as ended:
            async for message in manager.watch():
                versions.append(message.version)  # noqa: PERF401  a comprehension would lose what came before the error
    return versions, ended.value


async def test_watching_goes_on_behind_the_last_whole_change() -> None:
    away, wrong = Unavailable("away"), InvalidArgument("enough")
    servicer = FakeFleet(
        streams=[
            ([change("e-1", snapshot=True), change("e-2"), change("e-3", continues=True)], away),
            ([change("e-3")], None),
            ([change("f-1", snapshot=True, continues=True)], away),
            ([change("f-1", snapshot=True, continues=True), change("f-1")], away),
            ([], away),
            ([], wrong),
        ]
    )
    versions, error = await watched(servicer)
    assert servicer.asked == ["", "e-2", "e-3", "", "f-1", "f-1"]
    assert versions == ["e-1", "e-2", "e-3", "e-3", "f-1", "f-1", "f-1"]
    assert error.message == "enough"


async def test_a_gateway_that_cannot_be_reached_at_first_is_raised() -> None:
    servicer = FakeFleet(streams=[([], Unavailable("away", reason="SHUTTING_DOWN"))] * 9)
    versions, error = await watched(servicer)
    assert (versions, error.reason) == ([], "SHUTTING_DOWN")


async def test_a_throttled_call_waits_as_long_as_it_is_told_to() -> None:
    patience = ResourceExhausted("wait", reason="RATE_LIMITED", retry_after_s=0.02)
    servicer = FakeFleet(summaries=[patience, patience, None])
    async with gateway(servicer) as manager:
        assert (await manager.summary()).total == 1
    assert len(servicer.asked) == 3


@pytest.mark.parametrize(
    "error",
    [
        ResourceExhausted("wait", retry_after_s=3_600),
        ResourceExhausted("too much"),
        InvalidArgument("wrong", retry_after_s=0.01),
    ],
    ids=str,
)
async def test_what_waiting_does_not_mend_is_raised_at_once(error: ServerError) -> None:
    servicer = FakeFleet(summaries=[error])
    async with gateway(servicer) as manager:
        with pytest.raises(OpenManagerError, match=str(error)):
            await manager.summary()
    assert len(servicer.asked) == 1


async def told_by_the_command(folder: Path, *arguments: str) -> str:
    """What `openmanager` writes to stderr, beside a python as in .venv/bin."""
    shutil.copy(ROOT / "tools" / "openmanager", folder)
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "python").chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    command = await asyncio.create_subprocess_exec(
        *("/bin/sh", str(folder / "openmanager"), *arguments),
        env=environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
        stderr=asyncio.subprocess.PIPE,
    )
    return (await command.communicate())[1].decode()


async def test_tls_with_an_authority_of_ones_own(files: dict[str, Any], tmp_path: Path) -> None:  # noqa: F811
    settings = EchoSettings(data_dir=tmp_path, **files)
    servicer = FakeFleet(summaries=[None])
    server = GrpcServer(
        [bind("openmanager.gateway.v1.FleetService", servicer)],
        Interception(None),
        credentials=server_credentials(settings, "127.0.0.1:0", public=True),
    )
    address = await server.start("127.0.0.1:0")
    try:
        async with OpenManager.connect(address, ca_file=files["tls_ca_file"]) as manager:
            assert (await manager.summary()).total == 1
        for wrong in (address, f"https://{address}"):
            async with OpenManager.connect(wrong) as manager:
                with pytest.raises(OpenManagerError, match="is not reachable") as failed:
                    await manager.summary()
            assert "--ca-file" in failed.value.hint
        said = await told_by_the_command(tmp_path, "--address", f"https://{address}", "servers")
        assert [line.partition(":")[0] for line in said.splitlines()] == ["openmanager", "openmanager"], said
    finally:
        await server.stop(0)


async def test_a_call_has_an_end() -> None:
    class Silent(FakeFleet):
        async def GetFleetSummary(self, _request: Any, _context: object) -> Any:
            await asyncio.Event().wait()

    async with gateway(Silent(), timeout_s=0.2) as manager:
        with pytest.raises(OpenManagerError) as late:
            await manager.summary()
    assert late.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
