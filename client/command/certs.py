"""`openmanager certs init`: an authority of one's own, and a certificate of it for each process.

What must stay true: nothing that is there is written over; keys are readable by their owner only, from the first byte
on; a certificate holds for the names that it was asked for and no others, as server and as caller.
"""

import ipaddress
import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from client.command import exits
from client.command.terminal import Terminal

PROCESSES: Final = ("gateway", "cache", "timeseries", "metadata", "simulator", "analytics")
LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")
AUTHORITY_DAYS: Final = 3_650
_BACKDATED: Final = timedelta(hours=1)
"""For clocks that are behind."""
_LABEL: Final = r"[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_HOST: Final = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")
_MAX_HOST_CHARACTERS: Final = 253


def run(options: Namespace) -> int:
    """Runs the command; returns the exit status.

    Raises:
        UsageError: a name that no certificate can be for.
        CommandFailed: a file is there already.
    """
    folder = Path(options.dir)
    names = [checked_name(name) for name in options.name]
    made = init(folder, names, days=options.days, now=datetime.now(UTC))
    terminal = Terminal(sys.stdout)
    for path in made:
        terminal.line(str(path))
    terminal.line()
    terminal.line("for each process, by its own name:")
    terminal.line(f"  TLS_CA_FILE={folder / 'ca.crt'}")
    terminal.line(f"  TLS_CERT_FILE={folder / 'gateway.crt'} TLS_KEY_FILE={folder / 'gateway.key'}")
    terminal.line(f"keep {folder / 'ca.key'} elsewhere: whoever has it can be any of them")
    return exits.OK


def init(folder: Path, names: Sequence[str], *, days: int, now: datetime) -> list[Path]:
    """Makes the authority and the certificates; returns the files.

    Args:
        folder: where to; made with mode 0700 where it is not there.
        names: host names and addresses for all certificates, beside LOCAL_NAMES and the process's own name.
        days: how long the certificates hold; the authority AUTHORITY_DAYS, and as long as they.
        now: from when on, but for an hour.

    Raises:
        CommandFailed: one of the files is there.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for name in ("ca", *PROCESSES) for kind in ("crt", "key")]
    there = [path for path in paths if path.exists() or path.is_symlink()]
    if there:
        raise exits.CommandFailed(f"{there[0]} is there already, and is not written over: choose another --dir")
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _authority(authority_key, now, max(AUTHORITY_DAYS, days))
    _write(folder, "ca", authority, authority_key)
    for process in PROCESSES:
        key = ec.generate_private_key(ec.SECP256R1())
        unique = dict.fromkeys((process, *LOCAL_NAMES, *names))
        _write(folder, process, _leaf(process, unique, key, authority, authority_key, now, days), key)
    return paths


def checked_name(text: str) -> str:
    """A host name, or an IP address in its usual form.

    Raises:
        UsageError: it is neither.
    """
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        pass
    looks_like_address = re.fullmatch(r"[\d.]+", text) is not None
    if looks_like_address or len(text) > _MAX_HOST_CHARACTERS or _HOST.fullmatch(text) is None:
        raise exits.UsageError(f"{text[:64]!r} is neither a host name nor an IP address")
    return text.lower()


def _authority(key: ec.EllipticCurvePrivateKey, now: datetime, days: int) -> x509.Certificate:
    name = _named("OpenManager authority")
    builder = _builder(name, name, key, now, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return builder.sign(key, hashes.SHA256())


def _leaf(
    process: str,
    names: Iterable[str],
    key: ec.EllipticCurvePrivateKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    days: int,
) -> x509.Certificate:
    builder = _builder(_named(process), authority.subject, key, now, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    builder = builder.add_extension(both, critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return builder.add_extension(issuer, critical=False).sign(authority_key, hashes.SHA256())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - _BACKDATED).not_valid_after(now + timedelta(days=days))
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _write(folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _new_file(folder / f"{name}.key", pem, 0o600)
    _new_file(folder / f"{name}.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _new_file(path: Path, data: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
