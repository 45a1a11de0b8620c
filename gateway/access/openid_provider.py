"""What an OpenID provider says of itself: its addresses and its keys (OpenID Connect Discovery).

What must stay true: it is the provider that was meant, by its own word; no address of it is plain HTTP, but on this
machine; of its keys only the asymmetric ones are taken, and one that cannot be read does not spoil the others; reading
them holds the event loop for less than 10 ms.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from authlib.integrations.httpx_client import AsyncOAuth2Client
from joserfc.errors import JoseError
from joserfc.jwk import JWKRegistry, Key, KeySet

from runtime.settings import is_loopback

MAX_KEYS: Final = 100
"""Further ones are passed over. One takes 75 us (RSA), and an answer has room for thousands; providers have a few."""
_ASYMMETRIC: Final = frozenset({"RSA", "EC"})


class ProviderError(ValueError):
    """What the provider says cannot be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """Its addresses and keys, as of a time. `auth_methods`: how it may be shown a client's secret."""

    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    userinfo_endpoint: str | None
    auth_methods: tuple[str, ...]
    keys: KeySet
    known_since_s: float


async def asked(client: AsyncOAuth2Client, issuer: str, now_s: float) -> Provider:
    """What the provider says now; raises ProviderError, and what the client raises."""
    said = await json_at(client, f"{issuer.rstrip('/')}/.well-known/openid-configuration")
    if said.get("issuer") != issuer:
        raise ProviderError(f"it calls itself {said.get('issuer')!r}, and OIDC_ISSUER is {issuer!r}")
    jwks_uri = _endpoint(said, "jwks_uri")
    methods = said.get("token_endpoint_auth_methods_supported")
    return Provider(
        authorization_endpoint=_endpoint(said, "authorization_endpoint"),
        token_endpoint=_endpoint(said, "token_endpoint"),
        jwks_uri=jwks_uri,
        userinfo_endpoint=_endpoint(said, "userinfo_endpoint") if "userinfo_endpoint" in said else None,
        auth_methods=tuple(methods) if isinstance(methods, list) else ("client_secret_basic",),
        keys=await keys_at(client, jwks_uri),
        known_since_s=now_s,
    )


async def keys_at(client: AsyncOAuth2Client, url: str) -> KeySet:
    """The keys that it signs with."""
    said = (await json_at(client, url)).get("keys")
    keys: list[Key] = []
    for one in said[:MAX_KEYS] if isinstance(said, list) else []:
        with suppress(JoseError, ValueError, TypeError, KeyError):
            if one["kty"] in _ASYMMETRIC:
                keys.append(JWKRegistry.import_key(one))
    if not keys:
        raise ProviderError(f"{url} has no key that can be read")
    return KeySet(keys)


async def json_at(client: AsyncOAuth2Client, url: str, *, with_token: bool = False) -> dict[str, Any]:
    """A JSON object of the provider's. `with_token`: it is shown the client's access token."""
    answer = await client.request("GET", url, withhold_token=not with_token)
    answer.raise_for_status()
    said = answer.json()
    if not isinstance(said, dict):
        raise ProviderError(f"{url} is no JSON object")
    return said


def _endpoint(said: Mapping[str, Any], name: str) -> str:
    url = said.get(name)
    parts = urlsplit(url) if isinstance(url, str) else urlsplit("")
    host = parts.hostname or ""
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))):
        raise ProviderError(f"its {name} is no https URL")
    return str(url)
