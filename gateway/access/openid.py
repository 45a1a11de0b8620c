"""Log-in with an OpenID provider: authorization code with PKCE (S256), state and nonce. Authlib speaks the protocol;
what has to hold for somebody to be let in stands here.

    url, carried = await openid.begin()                # a browser is sent to `url`, with `carried` in a cookie,
    identity = await openid.finish(query, carried)     # and comes back with a code, which buys an ID token

What must stay true: nothing that a browser brings is looked at before the cookie's seal, its age and the state hold; an
ID token counts only if the provider's own key signed it, by an asymmetric algorithm, for this client and this very
log-in, and it has not expired; a provider that is away, slow or endless costs a bounded time and a bounded memory; no
code, token, verifier or secret gets into a log, and no words of the provider's to the browser.
"""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import httpx2
from authlib.common.errors import AuthlibBaseError
from authlib.integrations.httpx_client import AsyncOAuth2Client
from authlib.oidc.core import CodeIDToken
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jws import JWSRegistry
from pydantic import SecretStr

from gateway.access.openid_http import BoundedTransport
from gateway.access.openid_provider import Provider, ProviderError, asked, json_at, keys_at
from gateway.access.openid_state import Attempt, Seal
from gateway.settings import GatewaySettings
from openmanager.access.v1 import access_pb2
from openmanager.gateway.v1 import options_pb2
from runtime.clock import Clock
from runtime.errors import OpenManagerError, PermissionDenied, Unauthenticated, Unavailable, clip
from runtime.redaction import remember_secret

TIMEOUT_S: Final = 10.0
"""How long all that one request of a browser asks of the provider may take."""
MAX_EXCHANGES: Final = 10
"""Requests of browsers that may wait for the provider at once in one process."""
REFRESH_S: Final = 600.0
"""How long what the provider says of itself, and its keys, are taken for true."""
LEEWAY_S: Final = 60
"""How much its clock and ours may differ."""
MAX_CODE_CHARACTERS: Final = 4_096
MAX_NAME_CHARACTERS: Final = 255
MAX_LOGGED_BYTES: Final = 200
_JWS: Final = JWSRegistry(
    algorithms=[f"{kind}{bits}" for kind in ("RS", "PS", "ES") for bits in (256, 384, 512)],
    strict_check_header=False,  # providers add names of their own
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What the provider knows this installation by, and what is made of its answers; see gateway.settings."""

    issuer: str
    client_id: str
    client_secret: SecretStr | None
    redirect_url: str
    scopes: str
    name_claim: str
    role_claim: str | None
    roles: Mapping[str, int]

    @classmethod
    def of(cls, settings: GatewaySettings) -> Self | None:
        """None: people do not log in with a provider."""
        if settings.oidc_issuer is None or settings.oidc_client_id is None or settings.oidc_redirect_url is None:
            return None
        return cls(
            issuer=settings.oidc_issuer,
            client_id=settings.oidc_client_id,
            client_secret=settings.oidc_client_secret,
            redirect_url=settings.oidc_redirect_url,
            scopes=settings.oidc_scopes,
            name_claim=settings.oidc_name_claim,
            role_claim=settings.oidc_role_claim,
            roles=settings.oidc_roles,
        )


class OpenId:
    """Logs people in with one provider. Close it (`async with`)."""

    def __init__(
        self,
        registration: Registration,
        secret: str,
        clock: Clock,
        *,
        timeout_s: float = TIMEOUT_S,
        max_exchanges: int = MAX_EXCHANGES,
    ) -> None:
        """`secret`: of the installation."""
        self._registration = registration
        self._seal = Seal(secret)
        self._clock = clock
        self._timeout_s = timeout_s
        self._max_exchanges = max_exchanges
        self._exchanges = 0
        self._known: Provider | None = None
        self._learning = asyncio.Lock()
        # Made once, since it reads the machine's authorities (25 ms), or those of SSL_CERT_FILE as OpenSSL does.
        self._connections = httpx2.AsyncHTTPTransport()
        if registration.client_secret is not None:
            remember_secret(registration.client_secret.get_secret_value())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_raised: object) -> None:
        await self._connections.aclose()

    async def begin(self) -> tuple[str, str]:
        """Where to send the browser, and what its state cookie is to carry.

        Raises:
            Unavailable: OPENID_UNAVAILABLE, OPENID_BUSY.
        """
        provider = self._fresh()
        if provider is None:
            async with self._exchange() as client:
                provider = await self._provider(client)
        attempt = Attempt.beginning(self._clock.now_ms())
        url, _ = self._client().create_authorization_url(
            provider.authorization_endpoint, state=attempt.state, code_verifier=attempt.verifier, nonce=attempt.nonce
        )
        return url, self._seal.put_on(attempt)

    async def finish(self, query: Mapping[str, str], carried: str) -> access_pb2.Identity:
        """Who has come back.

        Args:
            query: the parameters that the browser came back with.
            carried: what its state cookie carries; empty: it has none.

        Raises:
            Unauthenticated: OPENID_STATE_INVALID, OPENID_REFUSED, OPENID_TOKEN_INVALID.
            PermissionDenied: OPENID_NAME_MISSING.
            Unavailable: OPENID_UNAVAILABLE, OPENID_BUSY.
        """
        attempt = self._seal.opened(carried, self._clock.now_ms())
        if not hmac.compare_digest(query.get("state", "").encode(), attempt.state.encode()):
            raise Unauthenticated("this is not the log-in that began here", reason="OPENID_STATE_INVALID")
        code = self._code(query)
        async with self._exchange() as client:
            provider = await self._provider(client)
            client.token_endpoint_auth_method = self._auth_method(provider)
            token = await client.fetch_token(
                provider.token_endpoint, grant_type="authorization_code", code=code, code_verifier=attempt.verifier
            )
            claims = await self._verified(client, provider, token, attempt.nonce)
            claims = await self._completed(client, provider, claims)
        return self._identity(claims)

    def _code(self, query: Mapping[str, str]) -> str:
        """What the provider sent the browser back with."""
        issuer = self._registration.issuer
        if query.get("iss", issuer) != issuer:  # RFC 9207
            raise _refused("the answer is another provider's")
        if "error" in query:
            raise _refused(f"the provider answers {query['error']!r}", level=logging.INFO)
        code = query.get("code", "")
        if not (0 < len(code) <= MAX_CODE_CHARACTERS and code.isascii() and code.isprintable()):
            raise _refused("there is no code in the answer")
        return code

    async def _verified(
        self, client: AsyncOAuth2Client, provider: Provider, token: Mapping[str, Any], nonce: str
    ) -> dict[str, Any]:
        """The claims of the ID token, of which nothing is open to doubt."""
        registration = self._registration
        with _checking_token():
            try:
                decoded = jwt.decode(token["id_token"], provider.keys, registry=_JWS)
            except InvalidKeyIdError:  # the provider has a new key
                self._known = replace(provider, keys=await keys_at(client, provider.jwks_uri))
                decoded = jwt.decode(token["id_token"], self._known.keys, registry=_JWS)
            options = {
                "iss": {"essential": True, "value": registration.issuer},
                "aud": {"essential": True, "value": registration.client_id},
            }
            here = {
                "nonce": nonce,
                "client_id": registration.client_id,  # for azp
                "access_token": token.get("access_token"),  # for at_hash
            }
            claims = CodeIDToken(decoded.claims, decoded.header, options, here)
            claims.validate(now=self._clock.now_ms() // 1_000, leeway=LEEWAY_S)
            if not _is_name(claims["sub"]):
                raise ValueError("its sub is no name")
        return dict(claims)

    async def _completed(self, client: AsyncOAuth2Client, provider: Provider, claims: dict[str, Any]) -> dict[str, Any]:
        """With what the provider tells only who asks for it: what scopes bring need not be in the ID token (OpenID
        Connect Core, 5.4)."""
        needed = {self._registration.name_claim, self._registration.role_claim} - {None}
        if "email" in needed:
            needed.add("email_verified")
        if needed <= claims.keys() or provider.userinfo_endpoint is None:
            return claims
        told = await json_at(client, provider.userinfo_endpoint, with_token=True)
        if told.get("sub") != claims["sub"]:
            raise _refused("what the provider tells of the user is another's", reason="OPENID_TOKEN_INVALID")
        return {**told, **claims}

    def _identity(self, claims: Mapping[str, Any]) -> access_pb2.Identity:
        registration = self._registration
        name = claims.get(registration.name_claim)
        if not isinstance(name, str) or not _is_name(name):
            raise _nameless(f"there is no {registration.name_claim} (OIDC_NAME_CLAIM)")
        if registration.name_claim == "email" and claims.get("email_verified") is not True:
            raise _nameless("the e-mail address is not verified")
        shown = claims.get(registration.role_claim) if registration.role_claim is not None else None
        values = [value for value in (shown if isinstance(shown, list) else [shown]) if isinstance(value, str)]
        return access_pb2.Identity(
            issuer=registration.issuer,
            subject=claims["sub"],
            name=name,
            role=_most_powerful(registration.roles.get(value, 0) for value in values),
        )

    def _fresh(self) -> Provider | None:
        known = self._known
        return known if known and self._clock.monotonic() - known.known_since_s < REFRESH_S else None

    async def _provider(self, client: AsyncOAuth2Client) -> Provider:
        """What the provider says of itself; of many who want to know, one asks."""
        async with self._learning:
            if (known := self._fresh()) is None:
                self._known = known = await asked(client, self._registration.issuer, self._clock.monotonic())
            return known

    def _auth_method(self, provider: Provider) -> str:
        """How the provider is shown the secret; the way that all have to know before the other."""
        if self._registration.client_secret is None:
            return "none"
        return "client_secret_basic" if "client_secret_basic" in provider.auth_methods else "client_secret_post"

    def _client(self) -> AsyncOAuth2Client:
        """For one log-in: it remembers tokens."""
        registration = self._registration
        secret = registration.client_secret
        return AsyncOAuth2Client(
            client_id=registration.client_id,
            client_secret=None if secret is None else secret.get_secret_value(),
            redirect_uri=registration.redirect_url,
            scope=registration.scopes,
            code_challenge_method="S256",
            leeway=0,
            transport=BoundedTransport(self._connections),
            timeout=self._timeout_s,
            trust_env=False,
        )

    @asynccontextmanager
    async def _exchange(self) -> AsyncIterator[AsyncOAuth2Client]:
        """Talks with the provider: one of few at once, for a bounded time. What goes wrong becomes an error of ours."""
        if self._exchanges >= self._max_exchanges:
            raise Unavailable("too many are logging in", reason="OPENID_BUSY", retry_after_s=1.0)
        self._exchanges += 1
        try:
            async with asyncio.timeout(self._timeout_s), self._client() as client:
                yield client
        except OpenManagerError:
            raise
        except AuthlibBaseError as error:
            raise _refused(f"the provider does not take the code: {error.error!r}") from None
        except TimeoutError:
            raise _unavailable(f"no answer within {self._timeout_s:g} s") from None
        except Exception as error:  # the provider may say anything, and Authlib takes much of it for granted
            raise _unavailable(f"{type(error).__name__}: {error}") from None
        finally:
            self._exchanges -= 1


def _is_name(text: str) -> bool:
    return 0 < len(text) <= MAX_NAME_CHARACTERS and text.isprintable()


def _most_powerful(roles: Iterator[int]) -> options_pb2.Role.ValueType:
    """The numbers of people's roles rise with what they may; 0: none."""
    return options_pb2.Role.ValueType(max(roles, default=0))


@contextmanager
def _checking_token() -> Iterator[None]:
    try:
        yield
    except ProviderError:  # its keys
        raise
    except KeyError:
        raise _refused("there is no ID token", reason="OPENID_TOKEN_INVALID") from None
    except (JoseError, ValueError, TypeError) as error:
        raise _refused(f"the ID token does not hold: {error}", reason="OPENID_TOKEN_INVALID") from None


def _refused(why: str, *, reason: str = "OPENID_REFUSED", level: int = logging.WARNING) -> Unauthenticated:
    _log.log(level, "a log-in is refused: %s", clip(why, MAX_LOGGED_BYTES), extra={"reason": reason})
    return Unauthenticated("the log-in was not accepted", reason=reason)


def _nameless(why: str) -> PermissionDenied:
    error = PermissionDenied("the provider does not say who this is", reason="OPENID_NAME_MISSING")
    _log.warning("a log-in is refused: %s", why, extra={"reason": error.reason})
    return error


def _unavailable(why: str) -> Unavailable:
    error = Unavailable("the provider cannot be asked", reason="OPENID_UNAVAILABLE", retry_after_s=5.0)
    _log.warning("the OpenID provider cannot be asked: %s", clip(why, MAX_LOGGED_BYTES), extra={"reason": error.reason})
    return error
