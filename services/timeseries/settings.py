"""What ``python -m services.timeseries`` can be told."""

from collections.abc import Iterator
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, SecretStr

from runtime.settings import Address, ByteSize, CommonSettings, Duration, Target, Targets, setting
from services.timeseries.engine.settings import DAY_MS, GIB, EngineSettings


def _http_url(url: str, *, port: int, token: str) -> str:
    """Refuses what is no URL of an HTTP API; no message holds any part of it, since it may hold a password."""
    try:
        parts = urlsplit(url)
        number = parts.port
    except ValueError:
        raise ValueError(f"is not a URL such as http://host:{port}") from None
    if parts.scheme not in ("http", "https"):
        raise ValueError("must begin with http:// or https://, also behind a comma")
    if not parts.hostname or number == 0 or set(url) & set(" \t\r\n"):
        raise ValueError(f"names no host or port, such as {parts.scheme}://host:{port}")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"must hold no user, password or options: the token is {token}")
    return url


def _influxdb_url(url: str) -> str:
    return _http_url(url, port=8086, token="INFLUXDB_TOKEN")  # noqa: S106  a setting's name


def _prometheus_urls(urls: str) -> str:
    for url in split_urls(urls):
        _http_url(url, port=9090, token="PROMETHEUS_BEARER_TOKEN")  # noqa: S106  a setting's name
    return urls


def split_urls(urls: str) -> list[str]:
    """The addresses of one store, in the order in which they are tried."""
    return [url.strip() for url in urls.split(",")]


InfluxUrl = Annotated[str, AfterValidator(_influxdb_url)]
PrometheusUrls = Annotated[str, AfterValidator(_prometheus_urls)]


class TimeSeriesSettings(CommonSettings):
    """Settings of the timeseries process."""

    address: Address = setting("TIMESERIES_ADDRESS", "127.0.0.1:50052", "Where timeseries listens.")
    target: Target | None = setting(
        "TIMESERIES_TARGET",
        None,
        "The service that `import` sends to. Unset: the one that has the store in DATA_DIR open, at "
        "TIMESERIES_ADDRESS; or, if none has, the store itself.",
    )
    block_age: Duration = setting(
        "TIMESERIES_BLOCK_AGE", "2h", "A head becomes a compressed block so long after its first row.", ge=1.0
    )
    head_limit: ByteSize = setting(
        "TIMESERIES_HEAD_LIMIT",
        "1GiB",
        "Memory for points that are in no block yet; from half of it on short blocks are written early, to be merged. "
        "20,000 servers of 511 metrics want 3GiB.",
        ge=GIB // 16,
    )
    spool_limit: ByteSize = setting(
        "TIMESERIES_SPOOL_LIMIT", "8GiB", "Journal size over which followers no longer hold it back.", ge=GIB // 16
    )
    retention_raw: Duration = setting(
        "TIMESERIES_RETENTION_RAW",
        "30d",
        "A UTC day of points goes when all of it is older and in the roll-ups. Older rows are taken where no roll-up "
        "has been made yet; for others they are rejected, TOO_LATE.",
        ge=DAY_MS / 1_000,
    )
    retention_5m: Duration = setting(
        "TIMESERIES_RETENTION_5M", "180d", "The same of the 5 min roll-ups, in files of 8 days.", ge=DAY_MS / 1_000
    )
    retention_1h: Duration = setting(
        "TIMESERIES_RETENTION_1H",
        "1826d",
        "The same of the 1 h roll-ups, in files of 64 days; rows that are older are rejected, TOO_LATE.",
        ge=DAY_MS / 1_000,
    )
    disk_limit: ByteSize | None = setting(
        "TIMESERIES_DISK_LIMIT",
        None,
        "Size of journal, blocks and roll-ups at which the oldest days of points go, then the oldest roll-ups, but "
        "never today's; a warning is shown from 80 % on. "
        "The journal waits for followers only up to half of it. Unset: no limit.",
        ge=GIB,
    )

    influxdb_url: InfluxUrl | None = setting(
        "INFLUXDB_URL", None, "InfluxDB 2 that follows the history, http:// or https://; unset: none."
    )
    influxdb_token: SecretStr | None = setting(
        "INFLUXDB_TOKEN",
        None,
        "API token that may write INFLUXDB_BUCKET, read it where history is read back from there, and create buckets "
        "where it does not exist yet; needed with INFLUXDB_URL.",
    )
    influxdb_org: str = setting("INFLUXDB_ORG", "openmanager", "Organization of the bucket.", min_length=1)
    influxdb_bucket: str = setting(
        "INFLUXDB_BUCKET", "metrics", "Bucket that is written; created where it is missing.", min_length=1
    )
    influxdb_retention: Duration | None = setting(
        "INFLUXDB_RETENTION",
        None,
        "How long the bucket keeps points; an existing bucket is changed to it. Unset: a new bucket keeps them for "
        "ever, an existing one is left alone.",
        ge=3_600.0,
    )

    prometheus_write_url: PrometheusUrls | None = setting(
        "PROMETHEUS_WRITE_URL",
        None,
        "Remote write of a Prometheus-compatible store that follows the history, such as "
        "http://prometheus:9090/api/v1/write or http://mimir:8080/api/v1/push; unset: none. Several addresses of one "
        "store, with commas between them, are tried in turn.",
    )
    prometheus_query_url: PrometheusUrls | None = setting(
        "PROMETHEUS_QUERY_URL",
        None,
        "Base of the same store's query API, such as http://prometheus:9090 or http://mimir:8080/prometheus; several "
        "as above.",
    )
    prometheus_bearer_token: SecretStr | None = setting(
        "PROMETHEUS_BEARER_TOKEN", None, "Bearer token for both addresses, where the store wants one."
    )
    prometheus_tenant: str = setting(
        "PROMETHEUS_TENANT", "", "Sent as X-Scope-OrgID, by which Mimir, Cortex and others tell tenants apart."
    )

    read: Literal["local", "remote"] = setting(
        "TIMESERIES_READ",
        "local",
        "Where ranges beyond local retention are read: not at all, or from the store that follows. With "
        "TIMESERIES_PEERS the rows of other replicas are read from it, too.",
    )
    ack: Literal["local", "follower"] = setting(
        "TIMESERIES_ACK",
        "local",
        "When a batch is acknowledged: once it is on this machine's disk, or when every store that follows has it too.",
    )
    peers: Targets = setting(
        "TIMESERIES_PEERS", (), "The other replicas, gRPC targets separated by commas; needs TIMESERIES_READ=remote."
    )

    def problems(self) -> Iterator[str]:
        """Also: a store that nobody could log in to."""
        yield from super().problems()
        if self.influxdb_url is not None and self.influxdb_token is None:
            yield "INFLUXDB_TOKEN: must be set too, since INFLUXDB_URL is"
        if self.read == "remote" and self.influxdb_url is None and self.prometheus_query_url is None:
            yield "TIMESERIES_READ: remote needs a store to read from: set PROMETHEUS_QUERY_URL or INFLUXDB_URL"
        if self.ack == "follower" and self.influxdb_url is None and self.prometheus_write_url is None:
            yield "TIMESERIES_ACK: follower needs a store that follows: set PROMETHEUS_WRITE_URL or INFLUXDB_URL"
        if self.prometheus_query_url is not None and self.prometheus_write_url is None:
            yield "PROMETHEUS_WRITE_URL: must be set too, since PROMETHEUS_QUERY_URL is"
        if self.peers and self.read != "remote":
            yield "TIMESERIES_PEERS: needs TIMESERIES_READ=remote: what replicas share is the store"
        if not self.retention_raw <= self.retention_5m <= self.retention_1h:
            yield "TIMESERIES_RETENTION_RAW, _5M and _1H: each must be at least as long as the one before"
        token = self.influxdb_token.get_secret_value() if self.influxdb_token else ""
        if not _fits_header(token):
            yield "INFLUXDB_TOKEN: has characters that no header can hold"
        token = self.prometheus_bearer_token.get_secret_value() if self.prometheus_bearer_token else ""
        if not _fits_header(token):
            yield "PROMETHEUS_BEARER_TOKEN: has characters that no header can hold"
        if not _fits_header(self.prometheus_tenant):
            yield "PROMETHEUS_TENANT: has characters that no header can hold"

    def engine(self) -> EngineSettings:
        """The engine's bounds."""
        spool_limit = self.spool_limit if self.disk_limit is None else min(self.spool_limit, self.disk_limit // 2)
        return EngineSettings(
            head_age_s=self.block_age,
            head_bytes_limit=self.head_limit,
            journal_bytes_limit=spool_limit,
            raw_retention_s=self.retention_raw,
            five_minute_retention_s=self.retention_5m,
            hour_retention_s=self.retention_1h,
            disk_bytes_limit=self.disk_limit,
        )


def _fits_header(text: str) -> bool:
    return not text or (text.isascii() and text.isprintable() and " " not in text)
