"""Certificates that are about to end, and have ended, are told of in time."""

import asyncio
import contextlib
import datetime
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from runtime.clock import ManualClock
from runtime.expiry import LOOK_EVERY_S, Expiry
from tests.harness import eventually
from tests.runtime.echo import EchoSettings
from tests.runtime.test_process import started

DAY_S = 86_400
NOW_S = 1_800_000_000
KEY = ec.generate_private_key(ec.SECP256R1())


def pem(begins_s: float, ends_s: float) -> bytes:
    """A certificate that signs itself."""
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "openmanager")])
    begins, ends = (datetime.datetime.fromtimestamp(at_s, datetime.UTC) for at_s in (begins_s, ends_s))
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(KEY.public_key())
    builder = builder.serial_number(1).not_valid_before(begins).not_valid_after(ends)
    return builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def year_until(ends_s: float) -> bytes:
    return pem(ends_s - 365 * DAY_S, ends_s)


class Watched:
    """A process's look at its files, by a clock of ours; what it says."""

    def __init__(self, clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
        self._clock = clock
        self._caplog = caplog

    async def after(self, seconds: float) -> list[tuple[str, str]]:
        """What was said within so long."""
        await self._asleep()
        self._caplog.clear()
        for _ in range(round(seconds / LOOK_EVERY_S)):
            self._clock.advance(LOOK_EVERY_S)
            await self._asleep()
        return self.said()

    async def _asleep(self) -> None:
        await eventually(lambda: self._clock.sleepers == 1)

    def said(self) -> list[tuple[str, str]]:
        return [
            (record.levelname, record.getMessage())
            for record in self._caplog.records
            if record.name == "runtime.expiry" and record.levelno > logging.INFO
        ]


@contextlib.asynccontextmanager
async def watching(
    folder: Path, caplog: pytest.LogCaptureFixture, cert: bytes, authorities: bytes | None = None
) -> AsyncIterator[Watched]:
    (folder / "cert.pem").write_bytes(cert)
    ca = None
    if authorities is not None:
        ca = folder / "ca.pem"
        ca.write_bytes(authorities)
    settings = EchoSettings(data_dir=folder, tls_cert_file=folder / "cert.pem", tls_ca_file=ca)
    clock = ManualClock(NOW_S * 1_000)
    task = asyncio.create_task(Expiry(settings, clock).watch(), name="watch")
    try:
        yield Watched(clock, caplog)
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_nothing_is_said_while_there_is_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with watching(tmp_path, caplog, year_until(NOW_S + 20 * DAY_S), year_until(NOW_S + 300 * DAY_S)) as watched:
        assert await watched.after(5 * DAY_S) == [] == watched.said()


async def test_it_is_said_once_a_day_until_the_file_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with watching(tmp_path, caplog, year_until(NOW_S + 3 * DAY_S)) as watched:
        told = await watched.after(2 * DAY_S)
        assert [level for level, _ in told] == ["WARNING"] * 2
        assert told[-1][1] == (
            f"the certificate {tmp_path / 'cert.pem'} (TLS_CERT_FILE) ends in 24 hours, on 2027-01-18 08:00 UTC: "
            "replace the file, it is read anew while this runs"
        )
        told = await watched.after(2 * DAY_S)
        assert [level for level, _ in told] == ["ERROR"] * 2 and "has ended on 2027-01-18 08:00 UTC" in told[0][1]
        (tmp_path / "cert.pem").write_bytes(year_until(NOW_S + 400 * DAY_S))
        assert await watched.after(2 * DAY_S) == []


async def test_the_short_lives_of_what_is_renewed_daily_are_no_alarm(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with watching(tmp_path, caplog, pem(NOW_S, NOW_S + 8 * DAY_S)) as watched:
        assert await watched.after(5.9 * DAY_S) == []
        assert len(await watched.after(0.2 * DAY_S)) == 1


async def test_of_a_chain_counts_what_ends_first_and_of_authorities_what_ends_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soon, late = year_until(NOW_S + 10 * DAY_S), year_until(NOW_S + 300 * DAY_S)
    async with watching(tmp_path, caplog, late + soon, soon + late) as watched:
        told = await watched.after(DAY_S)
        assert len(told) == 1 and "TLS_CERT_FILE" in told[0][1]
        (tmp_path / "cert.pem").write_bytes(late)
        (tmp_path / "ca.pem").write_bytes(soon)
        told = await watched.after(DAY_S)
        assert len(told) == 1 and "TLS_CA_FILE" in told[0][1]


async def test_a_file_that_cannot_be_read_is_looked_at_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with watching(tmp_path, caplog, b"no certificate") as watched:
        assert await watched.after(DAY_S) == []
        (tmp_path / "cert.pem").unlink()
        assert await watched.after(DAY_S) == []
        (tmp_path / "cert.pem").write_bytes(year_until(NOW_S + 3 * DAY_S))
        assert len(await watched.after(LOOK_EVERY_S)) == 1


async def test_a_metric_has_what_is_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    class Meter:
        def create_observable_gauge(self, name: str, callbacks: Any, **more: Any) -> None:
            given[name] = callbacks[0], more["unit"]

    monkeypatch.setattr("runtime.expiry.telemetry.meter", lambda _name: Meter())
    async with watching(tmp_path, caplog, year_until(NOW_S + 3 * DAY_S)) as watched:
        await watched.after(4 * DAY_S)
        read, unit = given["openmanager.tls.certificate.remaining"]
        found = [(observation.value, observation.attributes) for observation in read(None)]
    assert (found, unit) == ([(-DAY_S, {"setting": "TLS_CERT_FILE"})], "s")


async def test_a_process_looks_at_its_files(tmp_path: Path) -> None:
    now_s = datetime.datetime.now(datetime.UTC).timestamp()
    cert, key = tmp_path / "cert.pem", tmp_path / "cert.key"
    cert.write_bytes(pem(now_s - 10 * DAY_S, now_s + 7_300))
    text = serialization.PrivateFormat.PKCS8
    key.write_bytes(KEY.private_bytes(serialization.Encoding.PEM, text, serialization.NoEncryption()))
    async with started(tmp_path / "data", TLS_CERT_FILE=str(cert), TLS_KEY_FILE=str(key)) as running:
        await running.says("(TLS_CERT_FILE) ends in 2 hours")
