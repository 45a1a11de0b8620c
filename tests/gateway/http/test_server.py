"""The server itself: addresses, TLS, HTTP/2, and an orderly end."""

import asyncio
import socket
import ssl
from pathlib import Path

import pytest

from runtime.server import AddressInUse, AddressUnavailable
from tests.gateway.http.serving import read_answer, read_head, serving
from tests.harness import eventually


async def test_port_0_is_reported_as_the_real_one() -> None:
    async with serving() as served:
        assert served.port > 0
        assert (await served.get("/healthz")).status == 200


async def test_an_address_in_use_is_one_line_that_names_the_setting() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(AddressInUse) as caught:
            async with serving(address=address):
                pass
    assert caught.value.strerror == f"address {address} is already in use (set GATEWAY_HTTP_ADDRESS)"


async def test_two_servers_cannot_share_a_port() -> None:
    async with serving() as served:
        with pytest.raises(AddressInUse):
            async with serving(address=served.address):
                pass
        assert (await served.get("/healthz")).status == 200


@pytest.mark.parametrize("address", ["203.0.113.1:0", "no-such-host.invalid:0"])
async def test_an_address_that_is_not_ours_is_one_line(address: str) -> None:
    with pytest.raises(AddressUnavailable, match=f"cannot listen on {address}: .* \\(set GATEWAY_HTTP_ADDRESS\\)"):
        async with serving(address=address):
            pass


async def test_ipv6() -> None:
    try:
        async with serving(address="[::1]:0") as served:
            reader, writer = await asyncio.open_connection("::1", served.port)
            writer.write(b"GET /v1/servers HTTP/1.1\r\nhost: [::1]\r\n\r\n")
            assert (await read_answer(reader)).status == 200
            writer.close()
            assert served.servicer.contexts[-1].peer().startswith("ipv6:[::1]:")
    except AddressUnavailable:
        pytest.skip("this machine has no IPv6")


async def test_a_request_in_flight_is_answered_although_the_server_stops() -> None:
    async with serving(grace_s=60) as served:
        reader, writer = await served.send("GET", "/v1/servers/slow")
        await eventually(lambda: served.servicer.running == 1)
        served.stopping.set()

        async def refused() -> bool:
            try:
                _reader, probe = await served.open()
            except OSError:
                return True
            probe.close()
            return False

        await eventually(refused)
        assert not served.task.done()
        served.servicer.release.set()
        answer = await read_answer(reader)
        writer.close()
        await asyncio.wait_for(asyncio.shield(served.task), 20)
    assert answer.status == 200
    assert answer.json()["id"] == "slow"


async def test_a_request_that_does_not_end_is_cut_off_after_the_grace_period() -> None:
    async with serving(grace_s=0.2) as served:
        _reader, writer = await served.send("GET", "/v1/servers/slow")
        await eventually(lambda: served.servicer.running == 1)
        served.stopping.set()
        await asyncio.wait_for(asyncio.shield(served.task), 8)  # what is not cut off has 10 s
        assert served.servicer.cancelled == 1
        writer.close()


async def test_idle_connections_do_not_hold_the_stop_up() -> None:
    async with serving(grace_s=60) as served:
        reader, writer = await served.open()
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert (await read_answer(reader)).status == 200
        _reader, silent = await served.open()
        served.stopping.set()
        await asyncio.wait_for(asyncio.shield(served.task), 20)
        writer.close()
        silent.close()


async def test_the_port_is_free_after_the_stop() -> None:
    async with serving() as served:
        address = served.address
        assert (await served.get("/healthz")).status == 200
    async with serving(address=address) as again:
        assert (await again.get("/healthz")).status == 200


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls(certificate: tuple[Path, Path], version: ssl.TLSVersion) -> None:
    cert, key = certificate
    async with serving(tls_cert_file=cert, tls_key_file=key) as served:
        context = ssl.create_default_context(cafile=str(cert))
        context.minimum_version = context.maximum_version = version
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", served.port, ssl=context, server_hostname="localhost"
        )
        writer.write(b"GET /v1/servers HTTP/1.1\r\nhost: localhost\r\norigin: https://localhost\r\n\r\n")
        assert (await read_answer(reader)).status == 200
        writer.close()
        plain_reader, plain = await served.open()
        plain.write(b"GET /v1/servers HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b"HTTP/1.1 200" not in await plain_reader.read(100)
        plain.close()


async def test_a_certificate_that_is_none_is_one_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.pem"
    bad.write_text("nothing")
    with pytest.raises(AddressUnavailable, match="TLS_CERT_FILE"):
        async with serving(tls_cert_file=bad, tls_key_file=bad):
            pass


async def test_too_many_headers_are_refused() -> None:
    async with serving() as served:
        reader, writer = await served.send("GET", "/healthz", headers={"x-big": "x" * (80 << 10)})
        assert (await read_head(reader))[0] == 431
        writer.close()


async def test_http2_is_served_on_the_same_port_and_passes_the_guard() -> None:
    """A hand-made HTTP/2 request: preface, empty SETTINGS, one HEADERS frame with literal fields."""

    def literal(name: bytes, value: bytes) -> bytes:
        return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

    fields = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/v1/servers"), (b":authority", b"localhost")]
    block = b"".join(literal(name, value) for name, value in fields)
    frame = len(block).to_bytes(3, "big") + b"\x01\x05" + (1).to_bytes(4, "big") + block
    async with serving() as served:
        reader, writer = await served.open()
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0" + frame)
        answer = b""
        while b'"totalSize":0' not in answer:
            piece = await asyncio.wait_for(reader.read(4096), 20)
            assert piece, answer
            answer += piece
        writer.close()
