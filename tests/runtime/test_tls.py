"""TLS on both ends, with a throw-away authority."""

import asyncio
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from runtime import errors
from runtime.channel import Channel, calling
from runtime.process import Process
from runtime.server import bind
from runtime.tls import CertificateFiles, channel_credentials, server_credentials
from tests.harness import eventually
from tests.runtime.echo import SERVICE, Echo, EchoServicer, EchoSettings, EchoStub


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True, timeout=20)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An authority, and a certificate of its for 127.0.0.1 and localhost."""
    folder = tmp_path_factory.mktemp("tls")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca, ca_key, cert, cert_key = (folder / name for name in ("ca.pem", "ca.key", "cert.pem", "cert.key"))
    openssl("req", "-x509", *key, "-keyout", ca_key, "-out", ca, "-days", "2", "-subj", "/CN=test authority")
    openssl("req", *key, "-keyout", cert_key, "-out", folder / "csr", "-subj", "/CN=openmanager")
    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    openssl("x509", "-req", "-in", folder / "csr", "-CA", ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "2",
            "-out", cert, "-extfile", folder / "ext")  # fmt: skip
    return {"tls_ca_file": ca, "tls_cert_file": cert, "tls_key_file": cert_key}


async def test_processes_talk_tls_and_plain_callers_are_refused(tmp_path: Path, files: dict[str, Any]) -> None:
    process = Process("echo", EchoSettings(data_dir=tmp_path, **files))
    async with asyncio.TaskGroup() as group:
        group.create_task(process.serve_grpc("127.0.0.1:0", [bind(SERVICE, EchoServicer())]))
        address = await eventually(lambda: process.bound_addresses.get("ECHO_ADDRESS"))
        assert address is not None
        async with process.open_channel(address) as channel:
            assert (await EchoStub(channel.grpc).Get(Echo(text="x"))).text == "x"
        async with Channel(address, secret=process.secret) as plain:
            with pytest.raises(errors.Unavailable):
                async with calling("echo"):
                    await EchoStub(plain.grpc).Create(Echo())
        process.stopping.set()


def test_a_certificate_alone_does_not_cut_local_processes_off(tmp_path: Path, files: dict[str, Any]) -> None:
    alone = EchoSettings(data_dir=tmp_path, tls_cert_file=files["tls_cert_file"], tls_key_file=files["tls_key_file"])
    assert channel_credentials(alone) is None
    assert server_credentials(alone, "127.0.0.1:1", public=False) is None
    assert server_credentials(alone, "127.0.0.1:1", public=True) is not None
    assert server_credentials(alone, "10.0.0.1:1", public=False) is not None
    assert server_credentials(EchoSettings(data_dir=tmp_path), "127.0.0.1:1", public=True) is None


@pytest.mark.parametrize(
    "fault", ["no certificate", "half a certificate", "no key", "another key", "a password", "gone"]
)
def test_the_file_at_fault_is_named(tmp_path: Path, files: dict[str, Any], fault: str) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "cert.key"
    cert.write_bytes(files["tls_cert_file"].read_bytes())
    key.write_bytes(files["tls_key_file"].read_bytes())
    assert CertificateFiles(cert, key).read().chain == cert.read_bytes()
    wrong = cert if "certificate" in fault else key
    if fault == "gone":
        key.unlink()
    elif fault == "half a certificate":
        cert.write_bytes(cert.read_bytes()[:300])
    elif fault == "another key":
        openssl("genpkey", "-algorithm", "ed25519", "-out", key)
    elif fault == "a password":
        openssl("pkey", "-in", files["tls_key_file"], "-out", key, "-aes256", "-passout", "pass:abcd")
    else:
        wrong.write_bytes(b"")
    with pytest.raises((OSError, ValueError), match=re.escape(str(wrong))):
        CertificateFiles(cert, key).read()


def test_an_authority_that_is_none_is_named(tmp_path: Path, files: dict[str, Any]) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "ca.pem"))):
        CertificateFiles(files["tls_cert_file"], files["tls_key_file"], tmp_path / "ca.pem").read()
