"""A certificate that is replaced is shown without a restart, and nothing is lost for it: with real handshakes."""

import asyncio
import contextlib
import logging
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.http import certificate, generations
from gateway.http.idle import IdleBounds
from openmanager.gateway.v1 import fleet_pb2
from runtime import tls
from runtime.server import AddressUnavailable
from tests.gateway.http.serving import Answer, Served, full_server, read_answer, read_chunk, read_head, serving
from tests.harness import eventually

SOON_S = 20.0
IDLE = IdleBounds(look_every_s=0.05)
P256 = "ec -pkeyopt ec_paramgen_curve:prime256v1"
UNKNOWN_TO_RUSTLS = "ec -pkeyopt ec_paramgen_curve:secp256k1"
ENDED = "no connection of before the certificate was replaced is left"

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Certificates:
    """cert.pem and key.pem, which are replaced as certbot does it: each by a rename."""

    def __init__(self, folder: Path) -> None:
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self._folder = folder
        self._made = 0

    def make(self, kind: str = P256) -> tuple[Path, Path]:
        """A new certificate and its key, elsewhere."""
        self._made += 1
        cert, key = self._folder / f"{self._made}.pem", self._folder / f"{self._made}.key"
        command = f"openssl req -x509 -newkey {kind} -nodes -days 1 -subj /CN=localhost -out {cert} -keyout {key}"
        subprocess.run(command.split(), check=True, capture_output=True)
        return cert, key

    def replace(self, kind: str = P256) -> bytes:
        """Puts a new one in place; returns what is shown from then on."""
        cert, key = self.make(kind)
        shown = ssl.PEM_cert_to_DER_cert(cert.read_text())
        cert.rename(self.cert)
        key.rename(self.key)
        return shown


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are looked at more often than they are."""
    monkeypatch.setattr(generations, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(tls, "SETTLED_AFTER_S", 0.5)


@contextlib.asynccontextmanager
async def served_with(certificates: Certificates, **options: Any) -> AsyncIterator[Served]:
    async with serving(tls_cert_file=certificates.cert, tls_key_file=certificates.key, idle=IDLE, **options) as served:
        yield served


def trusting_all() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


async def connect(served: Served) -> Connection:
    return await asyncio.open_connection(served.host, served.port, ssl=trusting_all())


async def shown(served: Served) -> bytes:
    _, writer = await connect(served)
    found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return found


async def is_shown(served: Served, wanted: bytes) -> None:
    async def it_is() -> bool:
        return await shown(served) == wanted

    await eventually(it_is, SOON_S)


def ask(connection: Connection, path: str) -> None:
    connection[1].write(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())


async def asked(connection: Connection, path: str) -> Answer:
    ask(connection, path)
    return await read_answer(connection[0])


async def test_a_new_certificate_is_shown_and_what_was_begun_goes_on(
    certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = certificates.replace()
    async with served_with(certificates) as served:
        assert await shown(served) == first
        idle, slow, watcher = [await connect(served) for _ in range(3)]
        assert (await asked(idle, "/v1/servers")).status == 200
        ask(slow, "/v1/servers/slow")
        ask(watcher, "/v1/fleet/watch")
        served.servicer.ticks.put_nowait(fleet_pb2.WatchFleetResponse(servers=[full_server()]))
        assert (await read_head(watcher[0]))[0] == 200
        assert await read_chunk(watcher[0])
        silent = await served.open()  # its handshake is still to come
        await eventually(lambda: served.servicer.running == 2)

        second = certificates.replace()
        await is_shown(served, second)
        for _ in range(20):
            assert await shown(served) == second

        served.servicer.release.set()
        assert (await read_answer(slow[0])).status == 200
        assert (await asked(idle, "/v1/servers")).status == 200
        await silent[1].start_tls(trusting_all())
        assert (await asked(silent, "/v1/servers")).status == 200
        served.servicer.ticks.put_nowait(fleet_pb2.WatchFleetResponse(servers=[full_server()]))
        assert await read_chunk(watcher[0])
        assert ENDED not in caplog.text
        for _, writer in (idle, slow, watcher, silent):
            writer.close()
        await eventually(lambda: ENDED in caplog.text, SOON_S)
        assert await shown(served) == second
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.usefixtures("quick")
async def test_no_request_is_lost_while_certificates_come_and_go(certificates: Certificates) -> None:
    """Some over a connection each that stays, some over a new one each; nobody asks again."""
    certificates.replace()
    done = asyncio.Event()
    stays, new = 0, 0

    async def over_one(served: Served) -> None:
        nonlocal stays
        connection = await connect(served)
        while not done.is_set():
            assert (await asked(connection, "/v1/servers")).status == 200
            stays += 1
        connection[1].close()

    async def over_many(served: Served) -> None:
        nonlocal new
        while not done.is_set():
            connection = await connect(served)
            assert (await asked(connection, "/v1/servers")).status == 200
            connection[1].close()
            new += 1

    async with served_with(certificates) as served, asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(over_one(served))
            group.create_task(over_many(served))
        for _ in range(4):
            await is_shown(served, certificates.replace())
            wanted = (stays + 20, new + 20)
            await eventually(lambda wanted=wanted: stays > wanted[0] and new > wanted[1], SOON_S)
        done.set()


@pytest.mark.usefixtures("quick")
async def test_a_broken_file_keeps_the_one_before_and_is_named(
    certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    first = certificates.replace()
    async with served_with(certificates) as served:
        for breaks in ("half", "another's key", "unknown to rustls", "gone"):
            caplog.clear()
            if breaks == "half":
                half = certificates.cert.with_suffix(".half")
                half.write_bytes(certificates.cert.read_bytes()[:200])
                half.rename(certificates.cert)
            elif breaks == "another's key":
                certificates.make()[1].rename(certificates.key)
            elif breaks == "unknown to rustls":
                certificates.replace(UNKNOWN_TO_RUSTLS)
            else:
                certificates.key.unlink()

            def errors() -> list[str]:
                return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]

            await eventually(lambda: bool(errors()), SOON_S)
            for _ in range(3):
                assert await shown(served) == first
            (error,) = errors()
            wrong = certificates.cert if breaks in {"half", "unknown to rustls"} else certificates.key
            assert str(wrong) in error, error
            first = certificates.replace()
            await is_shown(served, first)


@pytest.mark.usefixtures("quick")
async def test_a_certificate_that_could_not_be_tried_is_tried_again(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    certificates.replace()
    with monkeypatch.context() as without_memory:
        without_memory.setattr(certificate.sys, "executable", str(killed))
        async with served_with(certificates) as served:
            await eventually(lambda: "could not be tried" in caplog.text, SOON_S)  # and it begins all the same
            first = await shown(served)
            second = certificates.replace()
            await eventually(lambda: caplog.text.count("could not be tried") >= 2, SOON_S)
            assert await shown(served) == first
            without_memory.undo()
            await is_shown(served, second)


async def test_a_certificate_that_the_server_does_not_take_ends_the_start(certificates: Certificates) -> None:
    certificates.replace(UNKNOWN_TO_RUSTLS)
    with pytest.raises(AddressUnavailable, match="TLS_CERT_FILE and TLS_KEY_FILE cannot be used"):
        async with served_with(certificates):
            pass


@pytest.mark.usefixtures("quick")
async def test_a_request_to_the_server_before_is_answered_although_all_stop(certificates: Certificates) -> None:
    certificates.replace()
    async with served_with(certificates, grace_s=60) as served:
        slow = await connect(served)
        ask(slow, "/v1/servers/slow")
        await eventually(lambda: served.servicer.running == 1)
        await is_shown(served, certificates.replace())
        served.stopping.set()
        done, _ = await asyncio.wait({served.task}, timeout=0.5)
        assert not done, "it does not wait for the server before"
        served.servicer.release.set()
        assert (await read_answer(slow[0])).status == 200
        await asyncio.wait_for(asyncio.shield(served.task), 20)
        slow[1].close()


@pytest.mark.usefixtures("quick")
async def test_servers_before_are_bounded(certificates: Certificates, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays on the oldest is then ended: a watcher comes back by itself."""
    monkeypatch.setattr(generations, "MAX_OLD", 1)
    certificates.replace()
    async with served_with(certificates) as served:
        watchers = []
        for number in range(3):
            watcher = await connect(served)
            ask(watcher, "/v1/fleet/watch")
            await eventually(lambda number=number: served.servicer.running == number + 1)
            watchers.append(watcher)
            await is_shown(served, certificates.replace())
        async with asyncio.timeout(SOON_S):
            with contextlib.suppress(ConnectionError):
                while await watchers[0][0].read(65_536):
                    pass
        await eventually(lambda: served.servicer.running < 3, SOON_S)
        assert served.servicer.running >= 1  # of the newest ones
        for _, writer in watchers:
            writer.close()
