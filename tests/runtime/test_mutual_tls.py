"""Inner services and their callers prove who they are to each other, by certificates of `openmanager certs init`."""

import asyncio
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from client.command import certs, exits
from runtime import errors
from runtime.channel import Channel, _Real, calling
from runtime.folder import CannotStartError
from runtime.process import Process
from runtime.server import bind
from runtime.tls import server_credentials
from tests.harness import eventually
from tests.runtime.echo import SERVICE, Echo, EchoServicer, EchoSettings, EchoStub

SECRET = "a-secret-of-this-test-suite"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs") / "certs"
    certs.init(folder, [], days=30, now=datetime.now(UTC))
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of another authority."""
    folder = tmp_path_factory.mktemp("foreign") / "certs"
    certs.init(folder, [], days=30, now=datetime.now(UTC))
    return folder


@pytest.fixture(scope="module")
def expired(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("expired") / "certs"
    certs.init(folder, [], days=30, now=datetime.now(UTC) - timedelta(days=60))
    return folder


def settings(folder: Path, certificates: Path, name: str, ca: Path | None = None) -> EchoSettings:
    return EchoSettings(
        data_dir=folder,
        tls_cert_file=certificates / f"{name}.crt",
        tls_key_file=certificates / f"{name}.key",
        tls_ca_file=ca or certificates / "ca.crt",
    )


@asynccontextmanager
async def serving(given: EchoSettings, servicer: EchoServicer | None = None) -> AsyncIterator[str]:
    process = Process("echo", given, secret=SECRET)
    async with asyncio.TaskGroup() as group:
        group.create_task(process.serve_grpc("127.0.0.1:0", [bind(SERVICE, servicer or EchoServicer())]))
        address = await eventually(lambda: process.bound_addresses.get("ECHO_ADDRESS"))
        assert isinstance(address, str)
        yield address
        process.stopping.set()


def channel(address: str, ca: Path, own: Path | None = None, name: str = "gateway") -> Channel:
    key, chain = ((own / f"{name}.{kind}").read_bytes() if own else None for kind in ("key", "crt"))
    credentials = grpc.ssl_channel_credentials((ca / "ca.crt").read_bytes(), key, chain)
    return Channel(address, secret=SECRET, credentials=lambda: credentials, default_deadline_s=20.0)


async def answers(to: Channel) -> bool:
    """Whether a call works; a handshake that fails is UNAVAILABLE."""
    async with to:
        try:
            async with calling("echo"):
                answer = await EchoStub(to.grpc).Create(Echo(text="x"))
        except errors.Unavailable:
            return False
    return bool(answer.text == "x")


async def test_a_process_calls_another(tmp_path: Path, made: Path) -> None:
    async with serving(settings(tmp_path, made, "cache")) as address:
        caller = Process("gateway", settings(tmp_path, made, "gateway"), secret=SECRET)
        assert await answers(caller.open_channel(address))


async def test_callers_without_a_certificate_of_the_authority_are_refused(
    tmp_path: Path, made: Path, foreign: Path, expired: Path
) -> None:
    both = tmp_path / "both.crt"
    both.write_bytes((made / "ca.crt").read_bytes() + (expired / "ca.crt").read_bytes())
    async with serving(settings(tmp_path, made, "cache", ca=both)) as address:
        assert not await answers(channel(address, made))
        assert not await answers(channel(address, made, foreign))
        assert not await answers(channel(address, made, expired))
        assert await answers(channel(address, made, made))


async def test_a_caller_wants_the_name_that_it_dials(tmp_path: Path, made: Path) -> None:
    async with serving(settings(tmp_path, made, "cache")) as address:
        port = address.rpartition(":")[2]
        assert await answers(channel(f"localhost:{port}", made, made))
        for name, is_right in (("cache", True), ("metadata", False), ("evil.example", False)):
            dialled = _Named(address, made, name)
            assert await answers(dialled) is is_right, name


class _Named(Channel):
    """Dials an address as if a name had led to it."""

    def __init__(self, address: str, own: Path, name: str) -> None:
        super().__init__(address, secret=SECRET, default_deadline_s=20.0)
        key, chain = ((own / f"gateway.{kind}").read_bytes() for kind in ("key", "crt"))
        credentials = grpc.ssl_channel_credentials((own / "ca.crt").read_bytes(), key, chain)
        options = (("grpc.ssl_target_name_override", name),)
        self.grpc._channels[SERVICE] = _Real(grpc.aio.secure_channel(address, credentials, options))


async def test_a_caller_refuses_servers_of_another_authority_and_expired_ones(
    tmp_path: Path, made: Path, foreign: Path, expired: Path
) -> None:
    async with serving(settings(tmp_path, foreign, "cache", ca=made / "ca.crt")) as address:
        assert not await answers(channel(address, made, made))
        assert await answers(channel(address, foreign, made))
    async with serving(settings(tmp_path, expired, "cache", ca=made / "ca.crt")) as address:
        assert not await answers(channel(address, expired, made))


async def told(to: Channel) -> str:
    """What a call that does not work says."""
    async with to:
        with pytest.raises(errors.Unavailable) as caught:
            async with calling("echo"):
                await EchoStub(to.grpc).Create(Echo(text="x"))
    assert caught.value.reason == "PEER_UNAVAILABLE"
    return str(caught.value)


async def test_who_is_not_reached_because_of_certificates_is_told_so(
    tmp_path: Path, made: Path, foreign: Path, expired: Path
) -> None:
    async with serving(settings(tmp_path, expired, "cache", ca=made / "ca.crt")) as address:
        said = await told(channel(address, expired, made))
        assert said == "echo is not reachable: no TLS with it: CERTIFICATE_VERIFY_FAILED: certificate has expired"
    async with serving(settings(tmp_path, made, "cache")) as address:
        assert "is not reachable: no TLS with it: " in await told(channel(address, foreign, made))
        assert (
            await told(_Named(address, made, "metadata")) == "echo is not reachable: its certificate is for other names"
        )
        closes = "echo is not reachable: it closes the connection, as one does that has no TLS, or wants another"
        for refused in (channel(address, made), channel(address, made, foreign), Channel(address, secret=SECRET)):
            assert (await told(refused)).startswith(closes)
    async with serving(EchoSettings(data_dir=tmp_path)) as address:
        assert "no TLS with it: WRONG_VERSION_NUMBER" in await told(channel(address, made, made))
    assert await told(channel(address, made, made)) == "echo is not reachable"  # nobody listens there any more


async def test_files_that_are_replaced_count_from_the_next_handshake_on(
    tmp_path: Path, made: Path, foreign: Path
) -> None:
    live = tmp_path / "live"
    shutil.copytree(made, live)
    async with serving(settings(tmp_path, live, "cache")) as address:
        before = channel(address, made, made)
        async with before:
            stub = EchoStub(before.grpc)
            assert (await stub.Get(Echo(text="x"))).text == "x"
            shutil.copyfile(foreign / "cache.crt", live / "cache.crt")  # without its key: not to be used
            assert await answers(channel(address, made, made))
            shutil.copyfile(foreign / "cache.key", live / "cache.key")
            shutil.copyfile(foreign / "ca.crt", live / "ca.crt")
            assert await answers(channel(address, foreign, foreign))
            assert not await answers(channel(address, made, made))
            assert (await stub.Get(Echo(text="y"))).text == "y"  # a connection that stands goes on
            (live / "cache.key").unlink()
            assert await answers(channel(address, foreign, foreign))


def put(made: Path, live: Path, *names: str) -> None:
    """Puts files in the place of others at once, as certbot does."""
    for name in names:
        shutil.copyfile(made / name, live / f"{name}.new")
        (live / f"{name}.new").rename(live / name)


def shown_by_the_caller(_request: Any, context: Any) -> Any:
    (pem,) = context.auth_context()["x509_pem_cert"]
    return Echo(text=pem.decode())


async def test_a_caller_shows_its_new_certificate_and_loses_no_call(
    tmp_path: Path, made: Path, foreign: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live, own = tmp_path / "live", tmp_path / "server"
    shutil.copytree(made, live)
    shutil.copytree(made, own)
    (own / "ca.crt").write_bytes((made / "ca.crt").read_bytes() + (foreign / "ca.crt").read_bytes())
    servicer = EchoServicer(shown_by_the_caller)
    first, second = ((folder / "gateway.crt").read_text() for folder in (made, foreign))
    async with serving(settings(tmp_path, own, "cache"), servicer) as address:
        caller = Process("gateway", settings(tmp_path, live, "gateway"), secret=SECRET)
        async with caller.open_channel(address) as open_channel:
            stub = EchoStub(open_channel.grpc)

            async def shown() -> str:
                return str((await stub.Get(Echo())).text)

            assert await shown() == first
            stream = stub.Watch(Echo(text="x"))
            assert (await stream.read()).text == "x"
            put(foreign, live, "gateway.key")  # without its certificate
            with caplog.at_level(logging.ERROR, "runtime.tls"):

                async def told() -> bool:
                    return await shown() == first and bool(caplog.records)

                await eventually(told)
            (record,) = caplog.records
            assert f"{live / 'gateway.key'} is not the key of {live / 'gateway.crt'}" in record.getMessage()
            put(foreign, live, "gateway.crt")
            (live / "ca.crt").write_bytes((own / "ca.crt").read_bytes())

            async def renewed() -> bool:
                return await shown() == second

            await eventually(renewed)
            (old,) = open_channel.grpc._old
            servicer.hold.set()
            assert (await stream.read()).text == first  # over the connection that stood
            assert await stream.code() is grpc.StatusCode.OK
            await eventually(lambda: not open_channel.grpc._old)
            assert old.channel._channel.closed()
    assert len(caplog.records) == 1


@pytest.mark.full
async def test_calls_go_on_while_a_callers_certificate_is_replaced_again_and_again(
    tmp_path: Path, made: Path, foreign: Path
) -> None:
    live, own = tmp_path / "live", tmp_path / "server"
    shutil.copytree(made, live)
    shutil.copytree(made, own)
    (own / "ca.crt").write_bytes((made / "ca.crt").read_bytes() + (foreign / "ca.crt").read_bytes())
    (live / "ca.crt").write_bytes((own / "ca.crt").read_bytes())
    seen: set[str] = set()
    async with serving(settings(tmp_path, own, "cache"), EchoServicer(shown_by_the_caller)) as address:
        caller = Process("gateway", settings(tmp_path, live, "gateway"), secret=SECRET)
        async with caller.open_channel(address) as open_channel:
            stub = EchoStub(open_channel.grpc)
            done = asyncio.Event()

            async def calls() -> None:
                while not done.is_set():
                    seen.add((await stub.Create(Echo())).text)  # which nobody repeats

            async with asyncio.TaskGroup() as group:
                for _ in range(8):
                    group.create_task(calls())
                for folder in (foreign, made, foreign):
                    put(folder, live, "gateway.key", "gateway.crt")
                    seen.clear()
                    wanted = (folder / "gateway.crt").read_text()
                    await eventually(lambda wanted=wanted: wanted in seen)
                done.set()
            await eventually(lambda: not open_channel.grpc._old)


def test_files_that_do_not_fit_together_end_the_start(tmp_path: Path, made: Path, foreign: Path) -> None:
    given = settings(tmp_path, made, "cache").model_copy(update={"tls_key_file": foreign / "cache.key"})
    with pytest.raises(CannotStartError, match="TLS_KEY_FILE"):
        server_credentials(given, "127.0.0.1:0", public=False)


async def test_public_callers_are_not_asked_for_a_certificate(tmp_path: Path, made: Path) -> None:
    process = Process("echo", settings(tmp_path, made, "gateway"), secret=SECRET)
    async with asyncio.TaskGroup() as group:
        group.create_task(process.serve_grpc("127.0.0.1:0", [bind(SERVICE, EchoServicer())], public=True))
        address = await eventually(lambda: process.bound_addresses.get("ECHO_ADDRESS"))
        assert await answers(channel(str(address), made))
        process.stopping.set()


def test_an_authority_without_a_certificate_of_ones_own_is_a_mistake(tmp_path: Path, made: Path) -> None:
    given = EchoSettings(data_dir=tmp_path, tls_ca_file=made / "ca.crt")
    assert [problem for problem in given.problems() if problem.startswith("TLS_CERT_FILE")]


def run(*arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    environ: dict[str, Any] = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "client", "certs", "init", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False, umask=0
    )


def test_the_command_makes_them_and_writes_nothing_over(tmp_path: Path) -> None:
    done = run("--name", "OM.example.net", "--name", "10.0.0.7", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "certs"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {
        f"{name}.{kind}": 0o600 if kind == "key" else 0o644
        for name in ("ca", *certs.PROCESSES)
        for kind in ("crt", "key")
    }
    verified = subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", "ca.crt", "-verify_hostname", "om.example.net", "cache.crt"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert verified.returncode == 0, verified.stderr
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = run(folder=tmp_path)
    assert (again.returncode, "is there already" in again.stderr) == (exits.FAILED, True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", ["", "a b", "-a", "a..b", "1.2.3", "x" * 64, "a_b", "https://a"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    done = run(f"--name={name}", folder=tmp_path)
    assert (done.returncode, "neither a host name nor" in done.stderr) == (exits.USAGE, True)
    assert not (tmp_path / "certs").exists()
