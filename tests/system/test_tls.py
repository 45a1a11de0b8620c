"""The whole product under TLS, both ways between its processes, while all of its certificates are replaced."""

import os
import shutil
import signal
import ssl
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest

from client.command import certs
from openmanager.gateway.v1 import fleet_pb2, fleet_pb2_grpc
from tests.harness.launched import Launched, within

NAMES = ("gateway.crt", "gateway.key")


def made(folder: Path) -> Path:
    certs.init(folder, [], days=30, now=datetime.now(UTC))
    return folder


def put(source: Path, live: Path, *names: str) -> None:
    """As certbot does it: each at once, one after the other."""
    for name in names:
        shutil.copyfile(source / name, live / f"{name}.new")
        (live / f"{name}.new").rename(live / name)


def shown(address: str) -> str:
    host, _, port = address.partition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=5)


def get(launched: Launched, authority: Path, path: str) -> Any:
    context = ssl.create_default_context(cafile=str(authority))
    with urllib.request.urlopen(f"https://{launched.http_address}{path}", timeout=10, context=context) as answer:
        return orjson.loads(answer.read())


def servers_over_grpc(launched: Launched, authority: Path) -> int:
    credentials = grpc.ssl_channel_credentials(authority.read_bytes())
    with grpc.secure_channel(launched.addresses["gateway"], credentials) as channel:
        stub = fleet_pb2_grpc.FleetServiceStub(channel)
        return int(stub.ListServers(fleet_pb2.ListServersRequest(), timeout=10).total_size)


@pytest.mark.full
def test_all_certificates_are_replaced_while_it_runs(tmp_path: Path) -> None:
    first, second = made(tmp_path / "first"), made(tmp_path / "second")
    live = tmp_path / "live"
    live.mkdir()
    put(first, live, *NAMES)
    (live / "ca.crt").write_bytes((first / "ca.crt").read_bytes() + (second / "ca.crt").read_bytes())
    settings = {"TLS_CERT_FILE": live / "gateway.crt", "TLS_KEY_FILE": live / "gateway.key"}
    settings |= {"TLS_CA_FILE": live / "ca.crt"}
    with Launched(
        tmp_path,
        SIMULATOR_SERVERS="2",
        SIMULATOR_INTERVAL="1s",
        GATEWAY_WORKERS="2",
        **{name: str(path) for name, path in settings.items()},
    ) as launched:
        assert f"  HTTP        https://{launched.http_address}/v1/servers" in launched.printed
        assert f"  gRPC        {launched.addresses['gateway']}   (TLS)" in launched.printed
        within(30, lambda: get(launched, first / "ca.crt", "/v1/servers")["totalSize"] == 2)
        assert servers_over_grpc(launched, first / "ca.crt") == 2
        assert shown(launched.http_address) == (first / "gateway.crt").read_text()

        put(second, live, *NAMES)
        wanted = (second / "gateway.crt").read_text()
        for address in (launched.http_address, launched.addresses["gateway"]):
            within(30, lambda address=address: all(shown(address) == wanted for _ in range(8)))
        put(second, live, "ca.crt")  # from now on the first authority is nobody
        called = ("cache", "metadata", "timeseries")
        for name in called:
            os.kill(launched.pid_of(name), signal.SIGKILL)
        within(60, lambda: all(launched.says(f"{name} is back") for name in called))

        def all_up() -> bool:
            stores = get(launched, second / "ca.crt", "/v1/storage/status")["stores"]
            return {store["state"] for store in stores} == {"STORE_STATE_UP"}

        within(30, all_up)
        within(30, lambda: servers_over_grpc(launched, second / "ca.crt") == 2)
        logs = "".join(log.read_text() for log in (launched.data / "logs").glob("*.log"))
        assert '"level":"ERROR"' not in logs
        assert launched.stop(signal.SIGINT) == 0, launched.printed
        assert "Traceback" not in launched.printed
