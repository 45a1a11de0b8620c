"""What the simulator can be told."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from runtime.settings import Address, CommonSettings, Duration, Target, Targets, setting
from services.simulator.fleet import MAX_SERVERS

MIN_INTERVAL_S = 0.1
MAX_INTERVAL_S = 3600.0
MAX_REPLAY_SPEED = 1_000_000.0


def _interval(seconds: float) -> float:
    if not MIN_INTERVAL_S <= seconds <= MAX_INTERVAL_S:
        raise ValueError(f"{seconds:g} s is not between 100ms and 1h")
    if not math.isclose(seconds * 1000.0, round(seconds * 1000.0)):
        raise ValueError(f"{seconds:g} s is not a whole number of milliseconds")
    return seconds


def _speed(text: str) -> str:
    if text == "max":
        return text
    try:
        speed = float(text)
    except ValueError:
        speed = math.nan
    if not 0.0 < speed <= MAX_REPLAY_SPEED:
        raise ValueError(f"{text[:40]!r} is neither 'max' nor a number above 0, at most {MAX_REPLAY_SPEED:.0f}")
    return text


class SimulatorSettings(CommonSettings):
    """The settings of ``services.simulator``."""

    simulator_address: Address = setting("SIMULATOR_ADDRESS", "127.0.0.1:50054", "Where the simulator listens.")
    simulator_mode: Literal["synthetic", "replay", "host"] = setting(
        "SIMULATOR_MODE", "synthetic", "Where rows come from: made up, a recording, or this machine."
    )
    simulator_servers: int = setting(
        "SIMULATOR_SERVERS", 20, "Servers of the synthetic fleet, 1 to 20000.", ge=1, le=MAX_SERVERS
    )
    simulator_interval: Annotated[Duration, AfterValidator(_interval)] = setting(
        "SIMULATOR_INTERVAL", 10.0, "Time between ticks, 100ms to 1h."
    )
    simulator_seed: int = setting("SIMULATOR_SEED", 1, "The same seed plays the same fleet.", ge=0, le=2**53)
    simulator_replay_file: Path | None = setting(
        "SIMULATOR_REPLAY_FILE", None, "Recording to play: CSV or gzip of it, columns time, server_id and metrics."
    )
    simulator_replay_speed: Annotated[str, AfterValidator(_speed)] = setting(
        "SIMULATOR_REPLAY_SPEED", "1", "1: as recorded, N: N times faster, max: as fast as accepted."
    )
    simulator_replay_times: Literal["shift", "keep"] = setting(
        "SIMULATOR_REPLAY_TIMES", "shift", "shift: move times so that the recording ends now; keep: as recorded."
    )
    timeseries_targets: Targets = setting(
        "TIMESERIES_TARGET", "127.0.0.1:50052", "Where timeseries is; of several replicas, all, separated by commas."
    )
    cache_target: Target = setting("CACHE_TARGET", "127.0.0.1:50051", "Where cache is.")
    metadata_target: Target = setting("METADATA_TARGET", "127.0.0.1:50053", "Where metadata is.")

    @property
    def interval_ms(self) -> int:
        """Time between ticks, milliseconds."""
        return round(self.simulator_interval * 1000.0)

    @property
    def replay_speed(self) -> float | None:
        """Seconds of the recording in a second; None: as fast as accepted."""
        return None if self.simulator_replay_speed == "max" else float(self.simulator_replay_speed)

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.simulator_mode != "replay":
            return
        path = self.simulator_replay_file
        if path is None:
            yield "SIMULATOR_REPLAY_FILE: must be set, since SIMULATOR_MODE is replay"
        elif not path.is_file() or not os.access(path, os.R_OK):
            yield f"SIMULATOR_REPLAY_FILE: {str(path)!r} is no file that can be read"
