"""Who may call the public gRPC services: the token's holder when there is one, otherwise whoever is on this machine.

The HTTP side has the same rule and more of it, since browsers are on this machine too (``gateway.http.guard``).
"""

import hmac
from urllib.parse import unquote

from pydantic import SecretStr

from gateway.admission import Admission
from runtime.errors import PermissionDenied, Unauthenticated
from runtime.interception import Authenticator, CallContext, metadata_value, peer_is_loopback


def grpc_authenticator(token: SecretStr | None, admission: Admission) -> Authenticator:
    """The check before every gRPC call.

    Args:
        token: the administrator's token; None: callers on this machine are let in, others are not.
        admission: who of those that may come in is let in now.
    """
    expected = None if token is None else f"Bearer {token.get_secret_value()}".encode()

    def authenticate(_method: str, context: CallContext) -> None:
        if expected is None:
            if not peer_is_loopback(context.peer()):
                raise PermissionDenied("only callers on this machine are let in while no token is configured")
        else:
            given = (metadata_value(context, "authorization") or "").encode()
            if not hmac.compare_digest(given, expected):
                raise Unauthenticated("a token is needed: authorization: Bearer <token>", reason="TOKEN_REQUIRED")
        if admission.counts:
            admission.admit(_host(context.peer()), metadata_value(context, "x-forwarded-for"))

    return authenticate


def _host(peer: str) -> str:
    """The address in "ipv4:127.0.0.1:4711" or "ipv6:%5B::1%5D:4711"."""
    return unquote(peer.partition(":")[2]).rpartition(":")[0].strip("[]")
