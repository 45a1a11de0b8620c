"""The external stores that are set up: what ships to them, and what reads from them. Nothing else loads a driver, and
a driver is loaded only for a store that is set up: influxdb_client takes 0.8 s."""

from runtime.clock import Clock
from services.timeseries.followers.follower import Backend
from services.timeseries.remote.history import RemoteHistory
from services.timeseries.settings import TimeSeriesSettings, split_urls


def backends(settings: TimeSeriesSettings, clock: Clock) -> list[Backend]:
    """What the history is shipped to."""
    found: list[Backend] = []
    if settings.influxdb_url is not None and settings.influxdb_token is not None:
        from services.timeseries.followers.influxdb import InfluxBackend  # noqa: PLC0415

        token = settings.influxdb_token.get_secret_value()
        org, bucket = settings.influxdb_org, settings.influxdb_bucket
        found.append(InfluxBackend(url=settings.influxdb_url, token=token, org=org, bucket=bucket))
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


def history(settings: TimeSeriesSettings, clock: Clock) -> RemoteHistory:
    """What history is read back from, as the settings have seen to; of two stores, the one that replicas can share."""
    from services.timeseries.remote.prometheus import PrometheusHistory  # noqa: PLC0415

    assert settings.prometheus_query_url is not None
    return PrometheusHistory(
        query_urls=split_urls(settings.prometheus_query_url),
        bearer_token=_bearer(settings),
        tenant=settings.prometheus_tenant,
        clock=clock,
    )


def _bearer(settings: TimeSeriesSettings) -> str:
    return settings.prometheus_bearer_token.get_secret_value() if settings.prometheus_bearer_token else ""
