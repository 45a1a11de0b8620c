"""How much is done, and on what."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from bench.analytics.scored import Scored


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiet:
    """Simulated fleets on which nothing happens: one a seed, so many days of each, a tick so often."""

    seeds: int
    processes: int
    servers: int
    days: float
    tick_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenarios:
    """Simulated fleets on which everything happens, watched for so many hours from then on; a tick so often."""

    seeds: int
    processes: int
    servers: int
    hours: float
    tick_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarts:
    """A simulated fleet whose detector is restarted so often in so many minutes; what is learnt before may have another
    tick, as it is the same with restarts and without."""

    servers: int
    learn_tick_ms: int
    minutes: int
    restarts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of each row; None is all there is.

    Attributes:
        servers: labelled recordings of each set.
        learnt, tested: rows of each that are learnt (the last of them) and judged (the first).
        origin_hours: from one origin of a forecast to the next.
        origins: of each series at most, the newest.
        seeds: disks of each kind and noise.
        warm_windows, windows: of all series, not timed and timed.
        forecasts: series that are forecast for the time it takes.
        quiet, scenarios, restarts: of the simulator.
    """

    servers: int | None
    learnt: int | None
    tested: int | None
    origin_hours: int
    origins: int | None
    seeds: int
    warm_windows: int
    windows: int
    forecasts: int
    quiet: Quiet
    scenarios: Scenarios
    restarts: Restarts


FULL: Final = Size(
    servers=None,
    learnt=None,
    tested=None,
    origin_hours=84,
    origins=None,
    seeds=40,
    warm_windows=320,
    windows=200,
    forecasts=10_220,
    quiet=Quiet(seeds=4, processes=2, servers=20, days=7.0, tick_ms=10_000),
    scenarios=Scenarios(seeds=20, processes=2, servers=20, hours=26.0, tick_ms=10_000),
    restarts=Restarts(servers=20, learn_tick_ms=60_000, minutes=90, restarts=30),
)
QUICK: Final = Size(
    servers=1,
    learnt=1_600,
    tested=1_200,
    origin_hours=168,
    origins=3,
    seeds=1,
    warm_windows=10,
    windows=10,
    forecasts=64,
    quiet=Quiet(seeds=1, processes=1, servers=2, days=0.1, tick_ms=300_000),
    scenarios=Scenarios(seeds=1, processes=1, servers=8, hours=7.0, tick_ms=300_000),
    restarts=Restarts(servers=2, learn_tick_ms=300_000, minutes=30, restarts=5),
)


@dataclass(slots=True, kw_only=True)
class Bench:
    """What every row is given: how much, where to say each step, the recordings' folder (None: not there), and one for
    files. `scored` is what two rows share; see there."""

    size: Size
    say: Callable[[str], None]
    data: Path | None
    folder: Path
    scored: "list[Scored]" = field(default_factory=list)
