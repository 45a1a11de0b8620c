"""What the analytics service can be told."""

from runtime.settings import Address, CommonSettings, Duration, Target, setting


class AnalyticsSettings(CommonSettings):
    """Settings of ``python -m services.analytics``."""

    analytics_address: Address = setting("ANALYTICS_ADDRESS", "127.0.0.1:50055", "Where the service listens.")
    timeseries_target: Target = setting(
        "TIMESERIES_TARGET",
        "127.0.0.1:50052",
        "Where timeseries is; of several replicas, one: each wants an analytics.",
    )
    metadata_target: Target = setting(
        "METADATA_TARGET", "127.0.0.1:50053", "Where metadata is, which keeps the findings."
    )
    checkpoint_interval_s: Duration = setting(
        "ANALYTICS_CHECKPOINT_INTERVAL",
        30.0,
        "How often the state is saved; rows since are read again.",
        ge=0.1,
        le=3600,
    )
    series_limit: int = setting(
        "ANALYTICS_SERIES_LIMIT",
        200_000,
        "Most series that are judged; 2.5 GB of memory and 1 s of a core a minute for each million.",
        ge=1_000,
        le=20_000_000,
    )
    silence_s: Duration = setting(
        "ANALYTICS_SILENCE",
        30.0,
        "A server that reported steadily is found when it has been silent for 3 of its intervals, and for so long.",
        ge=5,
        le=86_400,
    )
