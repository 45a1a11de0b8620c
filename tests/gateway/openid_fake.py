"""An OpenID provider that can be told to lie: a small HTTP server on a free port.

It keeps the rules itself (a code is good once, with its verifier and from its client), so that a test that breaks one
thing breaks that alone. `log_in` does what a browser and its user do there.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import secrets
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

import pytest
from joserfc import jws
from joserfc.jwk import ECKey
from pydantic import SecretStr

from fleet.access import ADMIN, OPERATOR, VIEWER
from gateway.access.openid import OpenId, Registration
from openmanager.access.v1 import access_pb2
from runtime.clock import ManualClock
from runtime.errors import OpenManagerError, status_code

CLIENT, SECRET = "openmanager", "secret-of-this-client-0123456789abcdef"
INSTALLATION = "secret of the installation"
REDIRECT = "https://manager.example/auth/openid/callback"
Writer = asyncio.StreamWriter
Claims = dict[str, Any]


@dataclass(frozen=True)
class Request:
    verb: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def form(self) -> dict[str, str]:
        return dict(parse_qsl(self.body.decode()))


def key(kid: str) -> ECKey:
    return ECKey.generate_key("P-256", {"kid": kid, "alg": "ES256", "use": "sig"})


def signed_by(signer: ECKey, claims: Claims, **header: Any) -> str:
    return jws.serialize_compact({"alg": "ES256", "kid": signer.kid} | header, json.dumps(claims), signer)


def unsigned(claims: Claims) -> str:
    return _by_hand({"alg": "none"}, claims, lambda _signed: b"")


def by_hmac(claims: Claims, secret: bytes = SECRET.encode(), **header: str) -> str:
    """HS256, by hand: a library may see that the secret is a public key."""
    sign = lambda signed: hmac.digest(secret, signed, "sha256")  # noqa: E731
    return _by_hand({"alg": "HS256"} | header, claims, sign)


def _by_hand(header: Claims, claims: Claims, sign: Callable[[bytes], bytes]) -> str:
    signed = b".".join(_encoded(json.dumps(part).encode()) for part in (header, claims))
    return (signed + b"." + _encoded(sign(signed))).decode()


def _encoded(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


@dataclass
class FakeProvider:
    """Attributes that tests set:

    lie: changes the claims of the next ID tokens.
    sign: makes an ID token of claims, instead of the provider's own key.
    user: what is said of the user in the ID token; `userinfo`: at that endpoint.
    metadata: what it says of itself besides, or instead.
    answers: path -> what writes the answer there, instead of its own.
    """

    clock: ManualClock
    tls: ssl.SSLContext | None = None
    port: int = 0
    public_client: bool = False
    key: ECKey = field(default_factory=lambda: key("first"))
    published: list[Any] = field(default_factory=list)
    user: Claims = field(default_factory=lambda: {"sub": "u-1", "preferred_username": "ada"})
    userinfo: Claims = field(default_factory=dict)
    metadata: Claims = field(default_factory=dict)
    lie: Callable[[Claims], None] = lambda _claims: None
    sign: Callable[[Claims], str] | None = None
    answers: dict[str, Callable[[Request, Writer], Awaitable[None]]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    """Secrets that have passed: codes, tokens, verifiers."""
    _codes: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def issuer(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/realm"

    def asked(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    def log_in(self, url: str) -> dict[str, str]:
        """What the browser comes back with, once its user has logged in."""
        assert url.startswith(f"{self.issuer}/auth?"), url
        asked = {name: value for name, (value,) in parse_qs(urlsplit(url).query, strict_parsing=True).items()}
        assert asked["response_type"] == "code" and asked["client_id"] == CLIENT, asked
        assert asked["redirect_uri"] == REDIRECT and "openid" in asked["scope"].split(), asked
        assert asked["code_challenge_method"] == "S256" and asked["nonce"] and asked["state"], asked
        code = secrets.token_urlsafe(16)
        self._codes[code] = asked
        self.told += [code, asked["nonce"]]
        return {"code": code, "state": asked["state"]}

    def id_token(self, asked: dict[str, str]) -> str:
        now_s = self.clock.now_ms() // 1_000
        claims = {"iss": self.issuer, "aud": CLIENT, "iat": now_s, "exp": now_s + 300, "nonce": asked["nonce"]}
        claims |= self.user
        self.lie(claims)
        return (self.sign or self.sign_well)(claims)

    def sign_well(self, claims: Claims) -> str:
        """As an honest provider does."""
        return signed_by(self.key, claims)

    async def serve(self, reader: asyncio.StreamReader, writer: Writer) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            verb, target, _ = head[0].split()
            headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in head[1:])}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            request = Request(verb, urlsplit(target).path, headers, body)
            self.requests.append(request)
            answer = self.answers.get(request.path.removeprefix("/realm"))
            if answer is not None:
                await answer(request, writer)
            else:
                await send(writer, *self.answered(request))
            await writer.drain()
        writer.close()

    def answered(self, request: Request) -> tuple[int, Any]:
        """The right answer."""
        match request.path.removeprefix("/realm"):
            case "/.well-known/openid-configuration":
                said = {"authorization_endpoint": "auth", "token_endpoint": "token", "jwks_uri": "keys"}
                said = {name: f"{self.issuer}/{path}" for name, path in said.items()} | {"issuer": self.issuer}
                if self.userinfo:
                    said["userinfo_endpoint"] = f"{self.issuer}/userinfo"
                return 200, said | self.metadata
            case "/keys":
                return 200, {"keys": [*self.published, self.key.as_dict(private=False)]}
            case "/token":
                return self._token(request)
            case "/userinfo":
                assert request.headers["authorization"] == f"Bearer {self.told[-1]}"
                return 200, self.userinfo
        return 404, {}

    def _token(self, request: Request) -> tuple[int, Any]:
        form = request.form
        basic = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        by_header = request.headers.get("authorization") == f"Basic {basic}" and "client_secret" not in form
        by_form = form.get("client_id") == CLIENT and form.get("client_secret") == (
            None if self.public_client else SECRET
        )
        if not (by_form or (by_header and not self.public_client)):
            return 401, {"error": "invalid_client"}
        verifier = form["code_verifier"]
        self.told.append(verifier)
        asked = self._codes.pop(form["code"], {})
        challenge = _encoded(hashlib.sha256(verifier.encode()).digest()).decode()
        if asked.get("code_challenge") != challenge or form["redirect_uri"] != asked["redirect_uri"]:
            return 400, {"error": "invalid_grant", "error_description": f"code {form['code']}"}
        token, access = self.id_token(asked), secrets.token_urlsafe(16)
        self.told += [token, access]
        return 200, {"access_token": access, "token_type": "Bearer", "expires_in": 60, "id_token": token}


async def send(writer: Writer, status: int, said: Any, *headers: str) -> None:
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    lines = (f"HTTP/1.1 {status} -", "content-type: application/json", f"content-length: {len(body)}", *headers)
    writer.write("\r\n".join((*lines, "connection: close", "", "")).encode() + body)


@contextlib.asynccontextmanager
async def fake_provider(clock: ManualClock, tls: ssl.SSLContext | None = None) -> AsyncIterator[FakeProvider]:
    """A running one."""
    provider = FakeProvider(clock, tls)
    server = await asyncio.start_server(provider.serve, "127.0.0.1", 0, ssl=tls)
    provider.port = server.sockets[0].getsockname()[1]
    try:
        yield provider
    finally:
        server.close()


def registration(issuer: str, **changed: Any) -> Registration:
    known = {
        "issuer": issuer,
        "client_id": CLIENT,
        "client_secret": SecretStr(SECRET),
        "redirect_url": REDIRECT,
        "scopes": "openid profile email",
        "name_claim": "preferred_username",
        "role_claim": "groups",
        "roles": {"admins": ADMIN, "ops": OPERATOR, "staff": VIEWER},
    }
    return Registration(**known | changed)


@contextlib.asynccontextmanager
async def client(provider: FakeProvider, secret: str = INSTALLATION, **options: Any) -> AsyncIterator[OpenId]:
    names = {name: options.pop(name) for name in ("timeout_s", "max_exchanges") if name in options}
    async with OpenId(registration(provider.issuer, **options), secret, provider.clock, **names) as openid:
        yield openid


async def logged_in(provider: FakeProvider, openid: OpenId) -> access_pb2.Identity:
    url, carried = await openid.begin()
    return await openid.finish(provider.log_in(url), carried)


async def refusal(
    openid: OpenId, query: Mapping[str, str], carried: str, *, reason: str, code: str = "UNAUTHENTICATED"
) -> OpenManagerError:
    with pytest.raises(OpenManagerError) as caught:
        await openid.finish(query, carried)
    assert (caught.value.reason, status_code(caught.value).name) == (reason, code), caught.value
    return caught.value
