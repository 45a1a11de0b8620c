"""TLS for both ends of a call, from TLS_CERT_FILE, TLS_KEY_FILE and TLS_CA_FILE.

Public servers use the certificate whenever there is one. Inner services on a loopback address use it only when
TLS_CA_FILE is set too, because their callers, who read the same variables, dial with TLS exactly then; so a
certificate for the gateway's public name alone does not cut the processes of one machine off from each other.
"""

from typing import Any

import grpc

from runtime.settings import CommonSettings, is_loopback, split_address


def server_credentials(settings: CommonSettings, address: str, *, public: bool) -> Any:
    """grpc.ServerCredentials for a listener on `address`; None: without TLS."""
    if settings.tls_cert_file is None or settings.tls_key_file is None:
        return None
    if not public and settings.tls_ca_file is None and is_loopback(split_address(address)[0]):
        return None
    return grpc.ssl_server_credentials([(settings.tls_key_file.read_bytes(), settings.tls_cert_file.read_bytes())])


def channel_credentials(settings: CommonSettings) -> Any:
    """grpc.ChannelCredentials for calls to inner services; None: without TLS."""
    if settings.tls_ca_file is None:
        return None
    key = settings.tls_key_file.read_bytes() if settings.tls_key_file else None
    chain = settings.tls_cert_file.read_bytes() if settings.tls_cert_file else None
    return grpc.ssl_channel_credentials(settings.tls_ca_file.read_bytes(), key, chain)
