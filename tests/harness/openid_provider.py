"""A real OpenID provider, Glewlwyd, with one client and a user, set up by its own API.

Found on the PATH (Debian's package glewlwyd); where it is missing the test is skipped, visibly, and in CI fails. It
runs in a folder of its own, on a port of 127.0.0.1, with the tables that the package brings.
"""

import contextlib
import json
import sqlite3
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import httpx2
from joserfc.jwk import ECKey, RSAKey

from tests.harness import eventually, free_port
from tests.harness.commands import require_command

START_BOUND_S: Final = 30.0
PORT_ATTEMPTS: Final = 3
TABLES: Final = Path("/usr/share/dbconfig-common/data/glewlwyd/install/sqlite3")
MODULES: Final = Path("/usr/lib/glewlwyd")
SCOPES: Final = ("openid", "profile", "email")
CLIENT, SECRET = "openmanager", "secret-of-the-client-of-glewlwyd"
PUBLIC_CLIENT: Final = "openmanager-public"
USER, PASSWORD = "ada", "correct horse battery"
_ADMIN: Final = {"username": "admin", "password": "password"}  # as the package makes it
_CLAIMS: Final = (
    {"name": "preferred_username", "user-property": "username", "scope": ["profile"]},
    {"name": "groups", "user-property": "groups", "scope": ["profile"]},
    {"name": "nickname", "user-property": "nickname", "scope": ["profile"]},
    {
        "name": "email_verified",
        "user-property": "email_verified",
        "type": "boolean",
        "boolean-value-true": "yes",
        "boolean-value-false": "no",
        "scope": ["email"],
    },
)


class OpenIdProvider:
    """One server on one port of 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._program = require_command("glewlwyd")
        self._process: subprocess.Popen[bytes] | None = None
        self._said = {"groups": ["staff", "admins"], "email_verified": "yes", "nickname": USER}
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def issuer(self) -> str:
        return f"{self.url}/api/oidc"

    async def start(self, redirect_url: str) -> None:
        """Starts it, on the same port as before when there was one, and returns once it can be used."""
        again = self.port != 0
        for _ in range(PORT_ATTEMPTS):
            self.port = self.port if again else free_port()
            self._launch()
            await eventually(self._ended_or_ready, START_BOUND_S)
            if self._process is not None and self._process.poll() is None:
                break
            self.end()
        else:
            raise AssertionError(f"glewlwyd did not start: {(self._folder / 'log').read_text()[-1000:]}")
        if not again:
            await self._set_up(redirect_url)

    def end(self) -> None:
        """Kills it if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def change_key(self, kind: str, kid: str) -> None:
        """Has it sign with another key, and forget the one before."""
        async with self._as(_ADMIN) as http:
            await self._plugin(http, "PUT", kind, kid)
            await asked(http, "PUT", "/api/mod/plugin/oidc/reset")

    async def change_user(self, **said: Any) -> None:
        """Changes what is said of the user."""
        self._said |= said  # what is not named would be gone
        async with self._as(_ADMIN) as http:
            await asked(http, "PUT", f"/api/user/{USER}", self._said)

    async def log_in(self, url: str, *, client: str = CLIENT) -> httpx2.URL:
        """Where a browser is sent that comes with `url`, whose user logs in and lets the client know who he is."""
        async with self._as({"username": USER, "password": PASSWORD}) as http:
            await asked(http, "PUT", f"/api/auth/grant/{client}", {"scope": " ".join(SCOPES)})
            # `g_continue`: as its page does once the user has said so
            answer = await http.get(f"{url}&g_continue")
            assert answer.status_code == 302, answer.text
            return httpx2.URL(answer.headers["location"])

    def _launch(self) -> None:
        database, configuration = self._folder / "database", self._folder / "glewlwyd.conf"
        if not database.exists():
            _make(database)
        settings = {
            "external_url": self.url,
            "bind_address": "127.0.0.1",
            "login_url": "login.html",
            "api_prefix": "api",
            "log_mode": "console",
            "log_level": "WARNING",
            "session_key": "session",
            "admin_scope": "g_admin",
            "profile_scope": "g_profile",
            "user_module_path": str(MODULES / "user"),
            "client_module_path": str(MODULES / "client"),
            "user_auth_scheme_module_path": str(MODULES / "scheme"),
            "plugin_module_path": str(MODULES / "plugin"),
            "hash_algorithm": "SHA256",
        }
        lines = [f"port={self.port}", "cookie_secure=0"]
        lines += [f"{name}={json.dumps(value)}" for name, value in settings.items()]
        lines.append(f'database = {{ type = "sqlite3"; path = {json.dumps(str(database))}; }};')
        configuration.write_text("\n".join(lines) + "\n")
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([self._program, "-c", str(configuration)], stdout=log, stderr=log)

    async def _ended_or_ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            return True
        async with httpx2.AsyncClient(trust_env=False) as http:
            try:
                return (await http.get(f"{self.url}/config")).status_code == 200
            except httpx2.HTTPError:
                return False

    async def _set_up(self, redirect_url: str) -> None:
        async with self._as(_ADMIN) as http:
            await self._plugin(http, "POST", "RSA", "first")
            for scope in SCOPES[1:]:
                await asked(http, "POST", "/api/scope/", {"name": scope, "password_required": False, "scheme": {}})
            registered = {
                "scope": [],
                "enabled": True,
                "redirect_uri": [redirect_url],
                "authorization_type": ["code"],
            }
            confidential = {"client_id": CLIENT, "confidential": True, "client_secret": SECRET}
            confidential |= {"token_endpoint_auth_method": ["client_secret_basic"]}
            public = {"client_id": PUBLIC_CLIENT, "confidential": False, "token_endpoint_auth_method": ["none"]}
            for client in (confidential, public):
                await asked(http, "POST", "/api/client/", registered | client)
            user = {"username": USER, "password": PASSWORD, "name": "Ada Lovelace", "email": "ada@example.com"}
            user |= {"scope": ["g_profile", *SCOPES], "enabled": True}
            await asked(http, "POST", "/api/user/", user | self._said)

    async def _plugin(self, http: httpx2.AsyncClient, verb: str, kind: str, kid: str) -> None:
        """Its OpenID part: codes alone, and none without PKCE."""
        signer = (
            RSAKey.generate_key(2048, {"kid": kid, "alg": "RS256"})
            if kind == "RSA"
            else ECKey.generate_key("P-256", {"kid": kid, "alg": "ES256"})
        )
        parameters = {
            "iss": self.issuer,
            "oauth-as-iss-id": True,
            "jwks-private": json.dumps({"keys": [signer.as_dict(private=True)]}),
            "jwks-show": True,
            "access-token-duration": 3_600,  # it has a default, but of that its userinfo endpoint knows nothing
            "auth-type-code-enabled": True,
            "auth-type-code-revoke-replayed": True,
            "auth-type-token-enabled": False,
            "auth-type-id-token-enabled": True,
            "allow-non-oidc": False,
            "pkce-allowed": True,
            "pkce-required": True,
            "pkce-method-plain-allowed": False,
            "subject-type": "public",
            "name-claim": "on-demand",
            "name-claim-scope": ["profile"],
            "email-claim": "on-demand",
            "email-claim-scope": ["email"],
            "claims": list(_CLAIMS),
        }
        body = {"module": "oidc", "name": "oidc", "display_name": "OpenID Connect", "parameters": parameters}
        await asked(http, verb, "/api/mod/plugin/" + ("" if verb == "POST" else "oidc"), body)

    @contextlib.asynccontextmanager
    async def _as(self, who: dict[str, str]) -> AsyncIterator[httpx2.AsyncClient]:
        """A browser of somebody who has logged in."""
        async with httpx2.AsyncClient(base_url=self.url, trust_env=False, timeout=30.0) as http:
            await asked(http, "POST", "/api/auth/", who)
            yield http


async def asked(http: httpx2.AsyncClient, verb: str, path: str, body: Any = None) -> None:
    """One call of its API."""
    answer = await http.request(verb, path, json=body)
    assert answer.status_code == 200, (path, answer.status_code, answer.text)


def _make(database: Path) -> None:
    """As the package does; users have more properties."""
    with contextlib.closing(sqlite3.connect(database)) as made:
        made.executescript(TABLES.read_text())
        ((parameters,),) = made.execute("SELECT gumi_parameters FROM g_user_module_instance")
        known = json.loads(parameters)
        for name, several in (("groups", True), ("email_verified", False), ("nickname", False)):
            known["data-format"][name] = {"multiple": several, "read": True, "write": True}
        made.execute("UPDATE g_user_module_instance SET gumi_parameters = ?", (json.dumps(known),))
        made.commit()


@contextlib.asynccontextmanager
async def openid_provider(redirect_url: str) -> AsyncIterator[OpenIdProvider]:
    """A running one, whose client may have browsers sent back there; ended with the block."""
    require_command("glewlwyd")
    with tempfile.TemporaryDirectory(prefix="openmanager-openid-") as folder:
        provider = OpenIdProvider(Path(folder))
        try:
            await provider.start(redirect_url)
            yield provider
        finally:
            provider.end()
