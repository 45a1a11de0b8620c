"""TLS for both ends of a call, from TLS_CERT_FILE, TLS_KEY_FILE and TLS_CA_FILE.

Public servers use the certificate whenever there is one. Inner services on a loopback address use it only when
TLS_CA_FILE is set too, because their callers, who read the same variables, dial with TLS exactly then; so a
certificate for the gateway's public name alone does not cut the processes of one machine off from each other. With
TLS_CA_FILE inner services also want a certificate of that authority from whoever calls them, beside the service secret.

What must stay true: a caller checks the server's certificate by the name that it dials; files that are replaced count
from the next handshake on, and files that do not fit together never do: the ones before go on until they do. Callers'
own certificates are read when a channel is made.
"""

import logging
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from runtime.folder import CannotStartError
from runtime.settings import CommonSettings, is_loopback, split_address

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
    files = _Files(settings.tls_cert_file, settings.tls_key_file, ca_file)
    try:
        first = files.read()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise CannotStartError(f"TLS_CERT_FILE, TLS_KEY_FILE and TLS_CA_FILE cannot be used: {error}") from None
    return grpc.dynamic_ssl_server_credentials(first, files.changed, require_client_authentication=ca_file is not None)


def channel_credentials(settings: CommonSettings) -> Any:
    """grpc.ChannelCredentials for calls to inner services; None: without TLS."""
    if settings.tls_ca_file is None:
        return None
    key = settings.tls_key_file.read_bytes() if settings.tls_key_file else None
    chain = settings.tls_cert_file.read_bytes() if settings.tls_cert_file else None
    return grpc.ssl_channel_credentials(settings.tls_ca_file.read_bytes(), key, chain)


class _Files:
    """The files of a server, looked at before each handshake (three calls of stat, 5 us)."""

    def __init__(self, cert: Path, key: Path, ca: Path | None) -> None:
        self._cert, self._key, self._ca = cert, key, ca
        self._seen: _Stamps = ()

    def read(self) -> Any:
        """grpc.ServerCertificateConfiguration of them; OSError (ssl.SSLError is one) where they do not fit together."""
        self._seen = self._stamps()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._cert, self._key)
        if self._ca is not None:
            context.load_verify_locations(self._ca)
        pair = (self._key.read_bytes(), self._cert.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], self._ca.read_bytes() if self._ca else None)

    def changed(self) -> Any:
        """The new configuration; None: as it was. Called by gRPC, in a thread of its own."""
        try:
            if self._stamps() == self._seen:
                return None
            configuration = self.read()
        except (OSError, ValueError) as error:
            _log.warning("the changed certificate %s is not used yet: %s", self._cert, error)
            return None
        _log.info("the certificate %s was read anew", self._cert)
        return configuration

    def _stamps(self) -> _Stamps:
        files: Sequence[Path] = [file for file in (self._cert, self._key, self._ca) if file is not None]
        return tuple((state.st_mtime_ns, state.st_size, state.st_ino) for state in (file.stat() for file in files))
