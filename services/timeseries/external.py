"""The external stores that the settings name.

What must stay true: a driver is loaded only for a store that is set up; influxdb_client takes 0.8 s.
"""

from functools import partial
from typing import Any, Final

from runtime.clock import Clock
from runtime.redaction import redact
from services.timeseries.engine import Engine, EngineSettings
from services.timeseries.followers.backend import Backend
from services.timeseries.remote.history import Guarded, RemoteHistory
from services.timeseries.settings import TimeSeriesSettings, split_urls


def backends(settings: TimeSeriesSettings, clock: Clock) -> list[Backend]:
    """What rows are shipped to, in no order; nothing is connected to yet. Whoever takes one closes it."""
    found: list[Backend] = []
    if settings.influxdb_url is not None and settings.influxdb_token is not None:
        from services.timeseries.followers.influxdb import InfluxBackend  # noqa: PLC0415

        found.append(InfluxBackend(_influx_target(settings), settings.influxdb_retention))
    if settings.prometheus_write_url is not None:
        from services.timeseries.followers.prometheus import PrometheusBackend  # noqa: PLC0415

        found.append(
            PrometheusBackend(
                write_urls=split_urls(settings.prometheus_write_url),
                query_urls=split_urls(settings.prometheus_query_url) if settings.prometheus_query_url else (),
                bearer_token=_bearer(settings),
                tenant=settings.prometheus_tenant,
                clock=clock,
            )
        )
    return found


def histories(
    settings: TimeSeriesSettings, clock: Clock, bounds: EngineSettings, engine: Engine | None = None
) -> list[RemoteHistory]:
    """What history can be read back from, the store that replicas can share first; as `backends`.

    Args:
        settings: of the process.
        clock: of time-outs.
        bounds: of a query.
        engine: knows with what tags rows of a server were shipped; needed only where some were sent again after it
            had moved.
    """
    found: list[RemoteHistory] = []
    if settings.prometheus_query_url is not None:
        from services.timeseries.remote.prometheus import PrometheusHistory  # noqa: PLC0415

        found.append(
            PrometheusHistory(
                query_urls=split_urls(settings.prometheus_query_url),
                bearer_token=_bearer(settings),
                tenant=settings.prometheus_tenant,
                clock=clock,
            )
        )
    if settings.influxdb_url is not None and settings.influxdb_token is not None:
        from services.timeseries.remote.influxdb import InfluxHistory  # noqa: PLC0415

        tags = None if engine is None else partial(tags_of, engine)
        found.append(Guarded(InfluxHistory(_influx_target(settings), bounds, tags), clock))
    return found


async def tags_of(engine: Engine, server_id: str) -> list[tuple[str, str]]:
    """Environment and role that a server has been told of, in order, the present ones last."""
    told = (await engine.told(server_id)).get(server_id)
    return [(one.environment, one.role) for one in told.descriptors] if told else []


TARGETS: Final = {"influxdb": "INFLUXDB_URL", "prometheus": "PROMETHEUS_WRITE_URL"}
"""The stores that rows can be shipped to, and the setting without which there is none."""


def describe_target(settings: TimeSeriesSettings, name: str) -> str:
    """Where a store keeps what is shipped, in words that differ for different places."""
    if name == "influxdb":
        return f"{settings.influxdb_url} {settings.influxdb_org}/{settings.influxdb_bucket}"
    return redact(str(getattr(settings, TARGETS[name].lower(), None)))


def _bearer(settings: TimeSeriesSettings) -> str:
    return settings.prometheus_bearer_token.get_secret_value() if settings.prometheus_bearer_token else ""


def _influx_target(settings: TimeSeriesSettings) -> Any:
    from services.timeseries.followers.influxdb_api import InfluxTarget  # noqa: PLC0415

    assert settings.influxdb_url is not None and settings.influxdb_token is not None
    return InfluxTarget(
        url=settings.influxdb_url,
        token=settings.influxdb_token.get_secret_value(),
        org=settings.influxdb_org,
        bucket=settings.influxdb_bucket,
    )
