"""How much is done, and where."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.api.product import Inner


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of each row.

    Attributes:
        seconds: of each contender's turn.
        rounds: turns of each; what is told is the median.
        clients: of the rows in an open loop, one call a second each.
        tick_s: from one tick of the fleet to the next while it is fed.
        subscribers: of the row that watches.
    """

    seconds: float
    rounds: int
    clients: int
    tick_s: float
    subscribers: int


FULL: Final = Size(seconds=8.0, rounds=5, clients=500, tick_s=1.0, subscribers=2_000)
QUICK: Final = Size(seconds=1.0, rounds=1, clients=50, tick_s=0.5, subscribers=50)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What every row is given: how much, the services, a folder for its files, and where to say each step."""

    size: Size
    inner: Inner
    folder: Path
    say: Callable[[str], None]
