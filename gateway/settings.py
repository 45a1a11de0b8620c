"""What the gateway can be told, and when it refuses to listen."""

import ipaddress
from collections.abc import Iterator

from pydantic import SecretStr, field_validator

from runtime.settings import Address, ByteSize, CommonSettings, Target, Targets, is_loopback, setting, split_address


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

    @field_validator("trusted_proxy")
    @classmethod
    def _is_network(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                ipaddress.ip_network(value)
            except ValueError:
                raise ValueError(f"{value!r} is not a network such as 10.0.0.0/24") from None
        return value

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
