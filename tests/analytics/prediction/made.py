"""Minutes made by hand: resources that climb, and servers of which little is known but what a test says."""

from typing import Any

import numpy as np

from services.analytics.prediction.climbs import Climbs, ClimbWindow
from services.analytics.prediction.foresight import Foresight
from services.analytics.prediction.predictor import Predictor, layout_of
from services.analytics.prediction.words import Role
from services.analytics.scoring.series import SeriesWindow
from services.analytics.scoring.server import ServerWindow

MINUTE = 29_000_000
"""The first one, since the epoch."""
MINUTE_MS = 60_000
DAY = 1_440
SERVERS = ("a", "b", "c")
NAMES = ("disk", "memory", "fails", "drops")
"""The series of each server."""
ROLES = (Role.RESOURCE, Role.RESOURCE, Role.ERRORS, Role.ERRORS)


def fed(values: Any, climbs: Climbs | None = None, start: int = MINUTE) -> tuple[Climbs, list[ClimbWindow]]:
    """Climbs that have seen minutes, shape (T, R), and what each foretold."""
    values = np.asarray(values, np.float64).reshape(len(values), -1)
    climbs = climbs or Climbs.fresh(values.shape[1])
    return climbs, [climbs.update(start + place, row) for place, row in enumerate(values)]


def climb(start: float, per_hour: float, minutes: int) -> Any:
    """A straight climb, shape (minutes,)."""
    return np.minimum(start + per_hour * np.arange(minutes) / 60.0, 100.0)


def saw(low: float, high: float, period: int, minutes: int) -> Any:
    """A disk that fills from `low` to `high` in a period of minutes and is cleaned then."""
    return low + (high - low) * (np.arange(minutes) % period) / period


def new_predictor(servers: tuple[str, ...] = SERVERS) -> Predictor:
    """With the series of NAMES for each server."""
    owners = np.repeat(np.arange(len(servers)), len(NAMES))
    roles = np.array(ROLES * len(servers), np.int8)
    return Predictor(layout_of(servers, owners, roles, NAMES * len(servers)))


def window_of(values: Any, raw: Any, judged: Any = True) -> ServerWindow:
    """What the scorer said of a minute: of its servers as told, of its series that all count."""
    size, nothing = len(values), np.zeros(len(values))
    series = SeriesWindow(
        present=np.isfinite(values),
        views=nothing,
        score=nothing,
        rested=nothing,
        departure=np.nan_to_num(values),
        counts=np.ones(size, np.bool_),
    )
    raw = np.asarray(raw, np.float64)
    return ServerWindow(
        score=raw / (raw + 4.0),
        raw=raw,
        alarm=raw >= 4.0,
        level=np.full(len(raw), 4.0),
        is_finding=raw >= 4.0,
        judged=np.broadcast_to(np.asarray(judged, np.bool_), raw.shape),
        series=series,
    )


def foretold(predictor: Predictor, minute: int, values: Any, *, raw: Any = None, falls: Any = None) -> Foresight:
    """A minute of a predictor: the highest usual rate of errors is 1."""
    values = np.asarray(values, np.float64).reshape(-1)
    servers = len(predictor.layout.server_ids)
    return predictor.update(
        (MINUTE + minute) * MINUTE_MS,
        values,
        np.ones(len(values)),
        window_of(values, np.zeros(servers) if raw is None else raw),
        np.zeros(servers) if falls is None else np.asarray(falls, np.float64),
    )
