"""What the gateway can be told, and when it refuses to listen."""

import ipaddress
from collections.abc import Iterator
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, SecretStr, field_validator

from fleet.access import ADMIN, OPERATOR, VIEWER, role_name
from runtime.settings import (
    Address,
    ByteSize,
    CommonSettings,
    Target,
    Targets,
    bearer_problems,
    is_loopback,
    setting,
    split_address,
)

OPENID_LOGIN_PATH: Final = "/auth/openid/login"
OPENID_CALLBACK_PATH: Final = "/auth/openid/callback"
_ROLES: Final = {role_name(role): role for role in (VIEWER, OPERATOR, ADMIN)}
"""Those that people have."""


def _url(value: str) -> str:
    parts = urlsplit(value)
    host = parts.hostname or ""
    is_plain = host and not (parts.query or parts.fragment or parts.username or parts.password)
    if not is_plain or not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host))):
        raise ValueError("is not an https URL without a query (http only on this machine)")
    return value


def _roles(value: object) -> object:
    """Value of the claim -> role; a value may have "=" in it, but no comma."""
    if not isinstance(value, str):
        return value
    found = {}
    for part in filter(None, map(str.strip, value.split(","))):
        shown, _, name = part.rpartition("=")
        if not shown or name not in _ROLES:
            raise ValueError(f"{part!r} is not value=ROLE with one of {', '.join(_ROLES)}")
        found[shown] = _ROLES[name]
    return found


Url = Annotated[str, AfterValidator(_url)]
Roles = Annotated[dict[str, int], BeforeValidator(_roles)]


class GatewaySettings(CommonSettings):
    """Settings of ``python -m gateway``."""

    grpc_address: Address = setting("GATEWAY_GRPC_ADDRESS", "127.0.0.1:50050", "Where gRPC is served.")
    http_address: Address = setting("GATEWAY_HTTP_ADDRESS", "127.0.0.1:8080", "Where HTTP is served.")
    workers: int = setting(
        "GATEWAY_WORKERS",
        1,
        "Processes that serve the same addresses; more than one pays where there are more than two processors.",
        ge=1,
        le=64,
    )
    rate_limit: float = setting(
        "GATEWAY_RATE_LIMIT",
        0.0,
        "Calls a second that one caller's address may make of one process, twice as many at once; 0: any number.",
        ge=0,
        le=1e6,
    )
    max_waiting_calls: int = setting(
        "GATEWAY_MAX_WAITING_CALLS",
        500,
        "Calls of one service that may wait for a store at once in one process; more are refused and told when to try "
        "again.",
        ge=1,
        le=10_000,
    )
    token: SecretStr | None = setting(
        "GATEWAY_TOKEN",
        None,
        "Administrator's bearer token; with it every caller must present it, or a token of AccessService.",
        min_length=16,
    )
    accounts: bool = setting(
        "GATEWAY_ACCOUNTS",
        False,
        "true: every caller must present a token, of GATEWAY_TOKEN or of AccessService; the first administrator is "
        "made with the token in DATA_DIR/metadata/setup-token.",
    )
    trusted_proxy: str | None = setting(
        "TRUSTED_PROXY", None, "CIDR of a TLS-terminating proxy: the one way to listen beyond loopback without TLS."
    )
    audit_journal_limit: ByteSize = setting(
        "AUDIT_JOURNAL_LIMIT",
        "256MiB",
        "Size of a process's own journal of audit events at which changes are refused while metadata does not take "
        "them; refused calls have an eighth of it besides.",
        ge=1 << 20,
    )
    cache_target: Target = setting("CACHE_TARGET", "127.0.0.1:50051", "Where the cache is.")
    timeseries_targets: Targets = setting(
        "TIMESERIES_TARGET", "127.0.0.1:50052", "Where timeseries is; of several replicas, all, separated by commas."
    )
    metadata_target: Target = setting("METADATA_TARGET", "127.0.0.1:50053", "Where metadata is.")
    simulator_target: Target = setting("SIMULATOR_TARGET", "127.0.0.1:50054", "Where the simulator is.")
    analytics_target: Target = setting("ANALYTICS_TARGET", "127.0.0.1:50055", "Where analytics is.")
    oidc_issuer: Url | None = setting(
        "OIDC_ISSUER",
        None,
        "URL of the OpenID provider that people may log in with, exactly as it calls itself; unset: there is none.",
    )
    oidc_client_id: str | None = setting("OIDC_CLIENT_ID", None, "What the provider calls this installation.")
    oidc_client_secret: SecretStr | None = setting(
        "OIDC_CLIENT_SECRET", None, "What the provider knows it by; unset: it is a public client there."
    )
    oidc_redirect_url: Url | None = setting(
        "OIDC_REDIRECT_URL",
        None,
        "Where the provider sends browsers back to, as it has it on record: this installation's address, and "
        f"`{OPENID_CALLBACK_PATH}`.",
    )
    oidc_scopes: str = setting("OIDC_SCOPES", "openid profile email", "What the provider is asked for.")
    oidc_name_claim: str = setting(
        "OIDC_NAME_CLAIM",
        "preferred_username",
        "Claim that holds the user's name here; of `email` the provider must say that it is verified.",
        min_length=1,
    )
    oidc_role_claim: str | None = setting(
        "OIDC_ROLE_CLAIM", None, "Claim whose values give roles (`groups`); unset: only who is a user already comes in."
    )
    oidc_roles: Roles = setting(
        "OIDC_ROLES", "", "Which: `admins=ADMIN,ops=OPERATOR`; of several the most powerful counts."
    )

    @field_validator("trusted_proxy")
    @classmethod
    def _is_network(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                ipaddress.ip_network(value)
            except ValueError:
                raise ValueError(f"{value!r} is not a network such as 10.0.0.0/24") from None
        return value

    @field_validator("oidc_scopes")
    @classmethod
    def _asks_for_openid(cls, value: str) -> str:
        if "openid" not in value.split():
            raise ValueError("openid is not among them")
        return value

    def problems(self) -> Iterator[str]:
        """Those of all processes, and of the log-in with a provider."""
        yield from super().problems()
        yield from bearer_problems("GATEWAY_TOKEN", self.token)
        needed = {
            "OIDC_ISSUER": self.oidc_issuer,
            "OIDC_CLIENT_ID": self.oidc_client_id,
            "OIDC_REDIRECT_URL": self.oidc_redirect_url,
        }
        given = [name for name, value in needed.items() if value is not None]
        yield from (
            f"{name}: must be set too, since {given[0]} is" for name, value in needed.items() if given and value is None
        )
        if self.oidc_redirect_url is not None and urlsplit(self.oidc_redirect_url).path != OPENID_CALLBACK_PATH:
            yield f"OIDC_REDIRECT_URL: its path is not {OPENID_CALLBACK_PATH}"
        if (self.oidc_role_claim is None) != (not self.oidc_roles):
            set_one, unset = ("OIDC_ROLE_CLAIM", "OIDC_ROLES")[:: 1 if self.oidc_role_claim else -1]
            yield f"{unset}: must be set too, since {set_one} is"

    def exposure_problems(self) -> Iterator[str]:
        """One line for each address that strangers could reach without a token, or without TLS in between."""
        has_tls = self.tls_cert_file is not None and self.tls_key_file is not None
        for env, address in self.listen_addresses().items():
            if is_loopback(split_address(address)[0]):
                continue
            if self.token is None and not self.accounts:
                yield f"{env}: {address} is reachable from other machines: set GATEWAY_TOKEN or GATEWAY_ACCOUNTS=true"
            if not has_tls and self.trusted_proxy is None:
                yield (
                    f"{env}: {address} is reachable from other machines: set TLS_CERT_FILE and TLS_KEY_FILE, or "
                    "TRUSTED_PROXY when a proxy terminates TLS in front of it"
                )
