"""A real InfluxDB 2 that a test may kill and start again.

Found on the PATH as `influxd`. Where it is missing the test is skipped, visibly, and in CI fails. What it acknowledged
is in its folder, so that a killed one comes back with it, on the same port.
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from influxdb_client.client.influxdb_client import InfluxDBClient
from influxdb_client.client.write_api import SYNCHRONOUS
from influxdb_client.domain.bucket_retention_rules import BucketRetentionRules
from influxdb_client.domain.onboarding_request import OnboardingRequest
from influxdb_client.domain.permission import Permission
from influxdb_client.domain.permission_resource import PermissionResource
from influxdb_client.rest import ApiException
from influxdb_client.service.setup_service import SetupService
from urllib3.exceptions import HTTPError

from tests.harness import eventually, free_port

START_BOUND_S: Final = 60.0
PORT_ATTEMPTS: Final = 3
ORG: Final = "openmanager"
TOKEN: Final = "the-token-of-the-test-suite"


@dataclass(frozen=True, slots=True)
class Token:
    """A token that can be taken away and given back."""

    server: "InfluxServer"
    identity: str
    text: str

    async def revoke(self) -> None:
        await self.server.set_token_status(self.identity, "inactive")

    async def restore(self) -> None:
        await self.server.set_token_status(self.identity, "active")


class InfluxServer:
    """One server on one port of 127.0.0.1, with one organization and a token that may do everything."""

    def __init__(self, program: str, folder: Path) -> None:
        self._program = program
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Starts the server, on the same port as before when there was one, and returns once it answers."""
        again = self.port != 0
        for _ in range(PORT_ATTEMPTS):
            self.port = self.port if again else free_port()
            self._launch()
            if await self._answers():
                if not again:
                    await asyncio.to_thread(self._set_up)
                return
            self.end()
        raise AssertionError(f"influxd did not start: {(self._folder / 'influxd.log').read_text()[-1000:]}")

    def kill(self) -> None:
        """SIGKILL: connections are reset."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def end(self) -> None:
        """Kills the server if it runs."""
        if self._process is not None:
            self.kill()

    async def make_bucket(self, name: str, retention_s: int = 0) -> None:
        """Creates a bucket; retention 0 keeps everything."""
        rules = [BucketRetentionRules(type="expire", every_seconds=retention_s)] if retention_s else None

        def make() -> None:
            with self._client() as client:
                client.buckets_api().create_bucket(bucket_name=name, org=ORG, retention_rules=rules)

        await asyncio.to_thread(make)

    async def retention_s(self, bucket: str) -> int | None:
        """How long a bucket keeps points, 0: for ever; None: there is no such bucket."""

        def find() -> int | None:
            with self._client() as client:
                found = client.buckets_api().find_bucket_by_name(bucket)
                return found and sum(rule.every_seconds for rule in found.retention_rules)

        return await asyncio.to_thread(find)

    async def delete_bucket(self, bucket: str) -> None:
        """Deletes a bucket with all that is in it."""

        def delete() -> None:
            with self._client() as client:
                buckets = client.buckets_api()
                buckets.delete_bucket(buckets.find_bucket_by_name(bucket))

        await asyncio.to_thread(delete)

    async def make_token(self, bucket: str, *actions: str) -> "Token":
        """A token that may do this to one bucket ("read", "write") and nothing else."""

        def make() -> Token:
            with self._client() as client:
                found = client.buckets_api().find_bucket_by_name(bucket)
                resource = PermissionResource(type="buckets", id=found.id, org_id=found.org_id)
                permissions = [Permission(action=action, resource=resource) for action in actions]
                made = client.authorizations_api().create_authorization(found.org_id, permissions)
                return Token(self, made.id, made.token)

        return await asyncio.to_thread(make)

    async def set_token_status(self, identity: str, status: str) -> None:
        """Makes a token `inactive` or `active` again."""

        def change() -> None:
            with self._client() as client:
                tokens = client.authorizations_api()
                authorization = tokens.find_authorization_by_id(identity)
                authorization.status = status
                tokens.update_authorization(authorization)

        await asyncio.to_thread(change)

    async def write(self, bucket: str, lines: str) -> None:
        """Writes line protocol in milliseconds, as another program would."""

        def write() -> None:
            with self._client() as client, client.write_api(write_options=SYNCHRONOUS) as api:
                api.write(bucket, ORG, lines, write_precision="ms")

        await asyncio.to_thread(write)

    async def query(self, flux: str) -> list[dict[str, Any]]:
        """The records of all tables of a Flux query."""

        def query() -> list[dict[str, Any]]:
            with self._client() as client:
                return [record.values for table in client.query_api().query(flux) for record in table.records]

        return await asyncio.to_thread(query)

    async def points(self, bucket: str) -> dict[tuple[str, str, str], int]:
        """How many points there are by (server_id, environment, role), counted by Flux; an absent tag is empty."""
        counted = await self.query(
            f'from(bucket: "{bucket}") |> range(start: 0, stop: 2200-01-01T00:00:00Z)'
            ' |> filter(fn: (r) => r._measurement == "server_metrics")'
            ' |> group(columns: ["server_id", "environment", "role"]) |> count()'
        )
        return {
            (found.get("server_id") or "", found.get("environment") or "", found.get("role") or ""): found["_value"]
            for found in counted
        }

    def _client(self) -> InfluxDBClient:
        return InfluxDBClient(self.url, TOKEN, org=ORG, timeout=30_000)

    def _launch(self) -> None:
        folder = self._folder
        command = [self._program, "--bolt-path", str(folder / "bolt"), "--engine-path", str(folder / "engine")]
        command += ["--sqlite-path", str(folder / "sqlite"), "--http-bind-address", f"127.0.0.1:{self.port}"]
        command += ["--reporting-disabled", "--log-level", "error"]
        with (folder / "influxd.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)

    def _set_up(self) -> None:
        with self._client() as client:
            request = OnboardingRequest(username="tests", password="test-suite", org=ORG, bucket="unused", token=TOKEN)
            SetupService(client.api_client).post_setup(request)

    async def _answers(self) -> bool:
        def ping() -> bool:
            assert self._process is not None
            if self._process.poll() is not None:
                return True
            try:
                with self._client() as client:
                    return client.ready().status == "ready"
            except (ApiException, HTTPError) as error:
                raise AssertionError(str(error)) from error

        await eventually(lambda: asyncio.to_thread(ping), within_s=START_BOUND_S)
        return self._process is not None and self._process.poll() is None


@contextlib.asynccontextmanager
async def influx_server() -> AsyncIterator[InfluxServer]:
    """A running server, ended with the block."""
    program = shutil.which("influxd")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("influxd is not on the PATH, and CI may not skip")
        pytest.skip("influxd (InfluxDB 2.7) is not on the PATH")
    with tempfile.TemporaryDirectory(prefix="openmanager-influxdb-") as folder:
        server = InfluxServer(program, Path(folder))
        try:
            await server.start()
            yield server
        finally:
            server.end()
