"""Our processes with the environment that Compose gives them: the settings load, and TLS and the health check work.

Only the listening address differs from a container's: 127.0.0.1 and a free port instead of 0.0.0.0 and the fixed one.
"""

import asyncio
import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from openmanager.fleet.v1 import status_pb2, status_pb2_grpc
from runtime.channel import Channel, calling
from runtime.errors import Unavailable
from runtime.process import Process
from runtime.settings import CommonSettings, SettingsError
from runtime.tls import channel_credentials, server_credentials
from tests.deploy.compose_file import ROOT, fill_in, read, read_env
from tests.deploy.conftest import Installation, need
from tests.deploy.test_compose import GRPC_PORTS, MODULES
from tests.harness import eventually, free_port

SETTINGS: Final = {
    "gateway": "GatewaySettings",
    "cache": "CacheSettings",
    "timeseries": "TimeSeriesSettings",
    "metadata": "MetadataSettings",
    "simulator": "SimulatorSettings",
    "analytics": "AnalyticsSettings",
}
START_BOUND_S: Final = 80.0


def settings_class(name: str) -> type[CommonSettings]:
    found: type[CommonSettings] = getattr(importlib.import_module(f"{MODULES[name]}.settings"), SETTINGS[name])
    return found


async def run(*command: str, environment: Mapping[str, str]) -> tuple[int, str]:
    """Exit status and all that was said, with nothing of this machine's environment but the path."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env={"PATH": os.environ["PATH"], **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, said.decode()


async def health(environment: Mapping[str, str], variable: str) -> tuple[int, str]:
    """What the container's health check says."""
    script = ROOT / "deploy/compose/healthcheck.py"
    return await run(sys.executable, str(script), variable, environment=environment)


@contextlib.asynccontextmanager
async def serving(
    environment: Mapping[str, str], ready: Callable[[], bool], address: str = "127.0.0.1:0"
) -> AsyncIterator[str]:
    """A server of the runtime's with the TLS settings of `environment`; gives its port."""
    process = Process("probe", CommonSettings.load(environment))
    task = asyncio.create_task(
        process.serve_grpc(address, [], address_setting="PROBE_ADDRESS", ready=ready), name="probe"
    )
    try:
        bound = await eventually(lambda: process.bound_addresses.get("PROBE_ADDRESS"))
        yield bound.rpartition(":")[2]
    finally:
        process.stopping.set()
        await task


@pytest.mark.parametrize("name", GRPC_PORTS)
def test_the_settings_load_and_mean_tls_both_ways(installation: Installation, name: str) -> None:
    settings = settings_class(name).load(installation.environment(name))
    listened = settings.listen_addresses()
    variable = "GATEWAY_GRPC_ADDRESS" if name == "gateway" else f"{name.upper()}_ADDRESS"
    assert listened[variable] == f"0.0.0.0:{GRPC_PORTS[name]}"
    assert server_credentials(settings, listened[variable], public=name == "gateway") is not None
    assert channel_credentials(settings) is not None
    assert settings.service_secret is not None
    for field, env in settings.env_names().items():
        if env.endswith("_TARGET"):
            peer = env.removesuffix("_TARGET").lower()
            target = f"{peer}:{GRPC_PORTS[peer]}"
            assert getattr(settings, field) in {target, (target,)}


@pytest.mark.parametrize("name", GRPC_PORTS)
def test_without_tls_no_process_would_start(installation: Installation, name: str) -> None:
    environment = {key: value for key, value in installation.environment(name).items() if key[:4] != "TLS_"}
    with pytest.raises(SettingsError, match="TLS_CERT_FILE"):
        settings_class(name).load(environment)


def test_without_a_token_the_gateway_would_not_start(installation: Installation) -> None:
    environment = installation.environment("gateway")
    del environment["GATEWAY_TOKEN"]
    with pytest.raises(SettingsError, match="GATEWAY_TOKEN"):
        settings_class("gateway").load(environment)


async def test_the_health_check_says_what_the_server_says(installation: Installation) -> None:
    environment = installation.environment("cache")
    is_ready = False
    async with serving(environment, lambda: is_ready) as port:
        for address in (f"0.0.0.0:{port}", f"127.0.0.1:{port}", f"localhost:{port}"):
            environment["CACHE_ADDRESS"] = address
            status, said = await health(environment, "CACHE_ADDRESS")
            assert status == 1 and said.rstrip().endswith(": NOT_SERVING"), said
        is_ready = True

        async def serves() -> bool:
            status, said = await health(environment, "CACHE_ADDRESS")
            return status == 0 and said.rstrip().endswith(": SERVING")

        await eventually(serves)
    status, said = await health(environment, "CACHE_ADDRESS")
    assert status == 1 and "UNAVAILABLE" in said


async def test_the_health_check_trusts_our_authority_only(
    installation: Installation, new_installation: Callable[[], Installation]
) -> None:
    stranger = new_installation()
    assert stranger.make_env().returncode == 0
    environment = installation.environment("cache")
    async with serving(environment, lambda: True) as port:
        environment |= {"CACHE_ADDRESS": f"0.0.0.0:{port}", "TLS_CA_FILE": str(stranger.tls / "ca.crt")}
        status, said = await health(environment, "CACHE_ADDRESS")
        assert status == 1 and "UNAVAILABLE" in said
        del environment["TLS_CA_FILE"]
        status, _ = await health(environment, "CACHE_ADDRESS")
        assert status == 1, "the server must not answer without TLS"


@pytest.mark.parametrize("arguments", [[], ["CACHE_ADDRESS"], ["A", "B"]])
async def test_the_health_check_says_how_to_call_it(arguments: list[str]) -> None:
    script = ROOT / "deploy/compose/healthcheck.py"
    status, said = await run(sys.executable, str(script), *arguments, environment={"A": "127.0.0.1:1"})
    assert status == 2 and said.startswith("usage:")


async def test_a_real_process_serves_with_the_compose_environment(installation: Installation, tmp_path: Path) -> None:
    """The cache: it listens with TLS, takes the service secret, does without its Redis, and ends on SIGTERM."""
    port = free_port()
    environment = installation.environment("cache")
    environment |= {"CACHE_ADDRESS": f"127.0.0.1:{port}", "DATA_DIR": str(tmp_path / "data")}
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", MODULES["cache"]),
            env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", **environment},
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
    try:

        async def serves() -> bool:
            assert process.returncode is None, (tmp_path / "log").read_text()
            status, _ = await health(environment, "CACHE_ADDRESS")
            return status == 0

        await eventually(serves, within_s=START_BOUND_S)
        as_in_the_container = {**environment, "CACHE_ADDRESS": f"0.0.0.0:{port}"}
        assert await health(as_in_the_container, "CACHE_ADDRESS") == (0, f"localhost:{port}: SERVING\n")
        await check_callers(environment, port)
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 60) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    log_text = (tmp_path / "log").read_text()
    assert [line for line in log_text.splitlines() if not line.startswith("{")] == [], "gRPC's, of who came without TLS"
    assert not any(secret in log_text for secret in read_env(installation.env_file).values())


async def check_callers(environment: Mapping[str, str], port: int) -> None:
    """With TLS and the secret a call gets through; without one of them it does not."""
    settings = settings_class("cache").load(environment)
    assert settings.service_secret is not None
    secret, credentials = settings.service_secret.get_secret_value(), channel_credentials(settings)
    async with Channel(f"localhost:{port}", secret=secret, credentials=credentials) as channel:
        stub = status_pb2_grpc.StoreStatusServiceStub(channel.grpc)
        async with calling("cache"):
            answer = await stub.ListStoreStatuses(status_pb2.ListStoreStatusesRequest())
        assert [store.name for store in answer.stores] == ["redis"]
    for bad_secret, bad_credentials in (("another secret altogether", credentials), (secret, None)):
        async with Channel(f"localhost:{port}", secret=bad_secret, credentials=bad_credentials) as channel:
            stub = status_pb2_grpc.StoreStatusServiceStub(channel.grpc)
            with pytest.raises(Unavailable):  # what a process that may not talk to another one sees
                async with calling("cache"):
                    await stub.ListStoreStatuses(status_pb2.ListStoreStatusesRequest())


async def test_redis_starts_as_the_compose_file_says(installation: Installation, tmp_path: Path) -> None:
    """Its own command, in folders of the test's: a password is demanded, the health check passes, writes are kept."""
    need("redis-server")
    need("redis-cli")
    service: dict[str, Any] = fill_in(read(ROOT / "docker-compose.yml"), read_env(installation.env_file))["services"][
        "redis"
    ]
    port = str(free_port())
    folders = {"/tmp/": f"{tmp_path}/", "/data": str(tmp_path)}
    command = list(service["command"])
    for old, new in folders.items():
        command = [argument.replace(old, new) for argument in command]
    environment = {"PATH": os.environ["PATH"], **service["environment"]}
    process = await asyncio.create_subprocess_exec(
        *command, "--port", port, "--bind", "127.0.0.1", env=environment, stdout=subprocess.DEVNULL
    )
    try:
        kind, check = service["healthcheck"]["test"]
        assert kind == "CMD-SHELL"
        check = check.replace("redis-cli ", f"redis-cli -p {port} ")

        async def healthy() -> bool:
            return (await run("/bin/sh", "-c", check, environment=service["environment"]))[0] == 0

        await eventually(healthy)
        assert (await run("/bin/sh", "-c", check, environment={}))[0] != 0, "no password was asked for"
        setting = await run("redis-cli", "-p", port, "CONFIG", "GET", "appendonly", environment=service["environment"])
        assert setting[1].split() == ["appendonly", "yes"]
        assert (tmp_path / "appendonlydir").is_dir()
        arguments = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert service["environment"]["REDIS_PASSWORD"].encode() not in arguments
    finally:
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 30) == 0
