"""What the analytics service can be told."""

from collections.abc import Iterator

from runtime.settings import Address, CommonSettings, Duration, Target, setting
from services.analytics.detect import EwmaRules


class AnalyticsSettings(CommonSettings):
    """Settings of ``python -m services.analytics``."""

    analytics_address: Address = setting("ANALYTICS_ADDRESS", "127.0.0.1:50055", "Where the service listens.")
    timeseries_target: Target = setting(
        "TIMESERIES_TARGET",
        "127.0.0.1:50052",
        "Where timeseries is; of several replicas, one: each wants an analytics.",
    )
    checkpoint_interval_s: Duration = setting(
        "ANALYTICS_CHECKPOINT_INTERVAL",
        30.0,
        "How often the state is saved; rows since are read again.",
        ge=0.1,
        le=3600,
    )
    cold_start_points: int = setting(
        "ANALYTICS_COLD_START_POINTS", 60, "A series is judged once it has so many points.", ge=2, le=1_000_000
    )
    memory_points: int = setting(
        "ANALYTICS_MEMORY_POINTS", 360, "What is usual follows the last so many points.", ge=2, le=1_000_000
    )
    open_deviations: float = setting(
        "ANALYTICS_OPEN_DEVIATIONS",
        6.0,
        "A point so many standard deviations from the mean is abnormal.",
        gt=0,
        le=1000,
    )
    close_deviations: float = setting(
        "ANALYTICS_CLOSE_DEVIATIONS", 3.0, "While a finding is open, a point within so many is normal.", gt=0, le=1000
    )
    open_points: int = setting(
        "ANALYTICS_OPEN_POINTS", 3, "So many abnormal points in a row open a finding.", ge=1, le=10_000
    )
    close_points: int = setting(
        "ANALYTICS_CLOSE_POINTS", 6, "So many normal points in a row close it.", ge=1, le=10_000
    )
    min_deviation: float = setting(
        "ANALYTICS_MIN_DEVIATION", 1.0, "Least standard deviation, in the metric's unit.", gt=0, le=1e9
    )
    rest_s: Duration = setting(
        "ANALYTICS_REST", 600.0, "A series has no new finding for so long after one.", ge=0, le=86_400
    )
    silence_s: Duration = setting(
        "ANALYTICS_SILENCE", 900.0, "Findings of a server that sends nothing for so long are closed.", ge=1, le=604_800
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.close_deviations > self.open_deviations:
            yield (
                f"ANALYTICS_CLOSE_DEVIATIONS: {self.close_deviations:g} is more than ANALYTICS_OPEN_DEVIATIONS "
                f"({self.open_deviations:g})"
            )

    def rules(self) -> EwmaRules:
        """The detector's rules."""
        return EwmaRules(
            cold_start_points=self.cold_start_points,
            memory_points=self.memory_points,
            open_deviations=self.open_deviations,
            close_deviations=self.close_deviations,
            open_points=self.open_points,
            close_points=self.close_points,
            min_deviation=self.min_deviation,
            rest_ms=round(self.rest_s * 1000),
            silence_ms=round(self.silence_s * 1000),
        )
