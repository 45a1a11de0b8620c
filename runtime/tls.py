"""TLS for both ends of a call, from TLS_CERT_FILE, TLS_KEY_FILE and TLS_CA_FILE.

Public servers use the certificate whenever there is one. Inner services on a loopback address use it only when
TLS_CA_FILE is set too, because their callers, who read the same variables, dial with TLS exactly then; so a
certificate for the gateway's public name alone does not cut the processes of one machine off from each other. With
TLS_CA_FILE inner services also want a certificate of that authority from whoever calls them, beside the service secret.

What must stay true: a caller checks the server's certificate by the name that it dials; files that are replaced count
for new connections, at servers from the next handshake on and at callers within LOOK_EVERY_S, and files that do not
fit together never do: the ones before go on until they do.
"""

import logging
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from runtime.folder import CannotStartError
from runtime.settings import CommonSettings, is_loopback, split_address

LOOK_EVERY_S: Final = 1.0
"""How often files are looked at where no handshake asks for them (three calls of stat, 5 us)."""
SETTLED_AFTER_S: Final = 2.0
"""Files are replaced one after the other: what does not fit together for so long is a fault."""

_log = logging.getLogger(__name__)
_Stamps = tuple[tuple[int, int, int], ...]


def server_credentials(settings: CommonSettings, address: str, *, public: bool) -> Any:
    """grpc.ServerCredentials for a listener on `address`; None: without TLS.

    Raises:
        CannotStartError: the files do not fit together.
    """
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    if not public and settings.tls_ca_file is None and is_loopback(split_address(address)[0]):
        return None
    ca_file = None if public else settings.tls_ca_file
    files = CertificateFiles(settings.tls_cert_file, settings.tls_key_file, ca_file)

    def changed() -> Any:
        """Called by gRPC before each handshake, in a thread of its own; None: as it was."""
        found = files.renewed()
        return None if found is None else _configuration(found)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(_first(files)), changed, require_client_authentication=ca_file is not None
    )


def channel_credentials(settings: CommonSettings) -> "Callable[[], Any] | None":
    """What tells the grpc.ChannelCredentials for calls to inner services, another object when the files were replaced;
    None: without TLS.

    Raises:
        CannotStartError: the files do not fit together.
    """
    if settings.tls_ca_file is None:
        return None
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        raise CannotStartError("TLS_CERT_FILE and TLS_KEY_FILE must be set, since TLS_CA_FILE is")
    return _CallersFiles(CertificateFiles(settings.tls_cert_file, settings.tls_key_file, settings.tls_ca_file))


def _first(files: "CertificateFiles") -> "Certificate":
    try:
        return files.read()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise CannotStartError(f"TLS_CERT_FILE, TLS_KEY_FILE and TLS_CA_FILE cannot be used: {error}") from None


def _configuration(found: "Certificate") -> Any:
    return grpc.ssl_server_certificate_configuration([(found.key, found.chain)], found.ca)


class _CallersFiles:
    def __init__(self, files: "CertificateFiles") -> None:
        self._files = files
        self._credentials = self._of(_first(files))
        self._look_at = 0.0

    def __call__(self) -> Any:
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + LOOK_EVERY_S
            found = self._files.renewed()
            if found is not None:
                self._credentials = self._of(found)
        return self._credentials

    @staticmethod
    def _of(found: "Certificate") -> Any:
        return grpc.ssl_channel_credentials(found.ca, found.key, found.chain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What the files hold, as PEM; `ca` only where there is such a file."""

    chain: bytes
    key: bytes
    ca: bytes | None


class CertificateFiles:
    """The files of a certificate, which may be replaced, one after the other, while we run."""

    def __init__(self, cert: Path, key: Path, ca: Path | None = None) -> None:
        self.cert = cert
        self.key = key
        self._ca = ca
        self._used: object = ()  # how the files were when they were last used
        self._faulty: object = ()  # and when they last could not be
        self._faulty_since_s: float | None = None  # None: it was told

    def read(self) -> Certificate:
        """What they hold now; OSError or ValueError, which names the file at fault, where that cannot be used."""
        stamps = self._stamps()
        found = Certificate(
            chain=_certificates(self.cert),
            key=self.key.read_bytes(),
            ca=_certificates(self._ca) if self._ca is not None else None,
        )
        try:  # without an empty password OpenSSL asks for one at the terminal
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.cert, self.key, password="")
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise ValueError(f"{self.key} is not the key of {self.cert}") from None
            if error.reason:
                raise ValueError(f"{self.cert} and {self.key} are refused by OpenSSL: {error.reason}") from None
            raise ValueError(f"{self.key} has no private key that can be read without a password") from None
        if self._stamps() != stamps:
            raise ValueError(f"{self.cert} is being replaced")
        self._used = stamps
        return found

    def renewed(self) -> Certificate | None:
        """What they hold, if they were replaced and can be used. That they cannot is logged once, as an error."""
        stamps: object = None
        try:
            stamps = self._stamps()
            if stamps == self._used:
                self._faulty = ()
                return None
            if stamps == self._faulty and self._faulty_since_s is None:
                return None
            found = self.read()
        except (OSError, ValueError) as error:
            self._fault(stamps, error)
            return None
        self._faulty = ()
        _log.info("the certificate %s was read anew", self.cert)
        return found

    def refuse(self, why: object) -> None:
        """Says that what `renewed` gave cannot be used after all."""
        self._tell(f"{self.cert} with {self.key}: {why}")

    def forget(self) -> None:
        """`renewed` gives what it gave last once more: it was not used."""
        self._used = ()

    def _fault(self, stamps: object, error: Exception) -> None:
        now = time.monotonic()
        if stamps != self._faulty:
            self._faulty, self._faulty_since_s = stamps, now
        if self._faulty_since_s is not None and now - self._faulty_since_s >= SETTLED_AFTER_S:
            self._faulty_since_s = None
            self._tell(error)

    def _tell(self, why: object) -> None:
        _log.error("the new certificate is not used, the one before still is: %s", why, extra={"file": str(self.cert)})

    def _stamps(self) -> _Stamps:
        files = [file for file in (self.cert, self.key, self._ca) if file is not None]
        return tuple((state.st_mtime_ns, state.st_size, state.st_ino) for state in (file.stat() for file in files))


def _certificates(file: Path) -> bytes:
    found = file.read_bytes()
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=found.decode("ascii", "ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(f"{file} has no certificates that can be read: {error}") from None
    return found
