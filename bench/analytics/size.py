"""How much is done, and on what."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from bench.analytics.scored import Scored


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
