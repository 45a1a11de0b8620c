"""Disks that fill up as told: what capacity forecasts are judged on, because nobody publishes recordings of full disks.

Each kind is a noiseless course over a history of 30 to 90 days and a future of 800, hourly or every 5 minutes, measured
with noise. The truth is when the noiseless course first reaches the limit.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

KINDS: Final = ("linear", "saw-tooth", "weekly clean-up", "jumps", "jumps once", "rate change", "some jumps")
FLAT: Final = ("white", "correlated", "slow", "daily", "weekly")
JUMPING: Final = {"some jumps": (0.2, 0.45), "jumps": (0.3, 0.7)}
"""Which part of the growth comes in jumps that go on."""
NOISES: Final = (0.02, 0.2, 1.0)
"""Standard deviations of a measurement, in percent of the disk."""
LIMIT: Final = 90.0
START_MS: Final = 1_750_032_000_000
HOUR_MS: Final = 3_600_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """times_ms and values as a capacity forecast takes them; days from the last of them to the truth."""

    times_ms: NDArray[np.int64]
    values: Floats
    days_left: float


def disk(kind: str, seed: int, noise: float, *, minutes: int = 60) -> Disk:
    """A disk of a kind that reaches LIMIT 10 to 200 days after its history."""
    rng = np.random.default_rng([seed, KINDS.index(kind)])
    history, ahead = int(rng.integers(30, 91)), 10.0 * 20.0 ** rng.random()
    days = np.arange(0, history + 800, minutes / 1440)
    now = np.searchsorted(days, history) - 1
    level = rng.uniform(20, 75)
    slope = (LIMIT - level) / ahead
    course = level + slope * (days - days[now])
    if kind == "saw-tooth":
        course += rng.uniform(1, 8) * (np.mod(days + rng.random(), 1.0) - 1.0)
    elif kind == "weekly clean-up":
        course += rng.uniform(2, 10) * (np.mod(days / 7 + rng.random(), 1.0) - 1.0)
    elif kind in JUMPING:
        share, every = rng.uniform(*JUMPING[kind]), rng.uniform(4, 12)
        at = np.cumsum(rng.exponential(every, 400))
        sizes = rng.exponential(share * slope * every, 400)
        heaps = np.concatenate(([0.0], np.cumsum(sizes)))[np.searchsorted(at, days)]
        course += heaps - heaps[now] - share * slope * (days - days[now])
    elif kind == "jumps once":
        for _ in range(int(rng.integers(1, 4))):
            course -= rng.choice([-1, 1], p=[0.3, 0.7]) * rng.uniform(2, 12) * (days < rng.uniform(3, history - 3))
    elif kind == "rate change":
        ago = rng.uniform(8, min(28, history - 10))
        other = slope * rng.choice([rng.uniform(-0.2, 0.5), rng.uniform(2, 4)])
        course += np.where(days < days[now] - ago, (other - slope) * (days - days[now] + ago), 0.0)
    reached = np.flatnonzero((course >= LIMIT) & (days > days[now]))
    left = float(days[reached[0]] - days[now]) if len(reached) else 800.0
    course = course[: now + 1]
    times = START_MS + np.round(days[: now + 1] * 24 * HOUR_MS).astype(np.int64)
    return Disk(times_ms=times, values=course + noise * rng.standard_normal(now + 1), days_left=left)


def flat(kind: str, seed: int, noise: float, *, days: int = 60) -> Disk:
    """A disk that does not fill up; its hours are alike as the kind says ("slow": .99 from hour to hour, .79 a day)."""
    rng = np.random.default_rng([seed, FLAT.index(kind), 7])
    hours = days * 24
    times = START_MS + np.arange(hours, dtype=np.int64) * HOUR_MS
    white = rng.standard_normal(hours + 1000)
    alike = {"correlated": 0.9, "slow": 0.99}.get(kind, 0.0)
    if alike:
        state, wave = 0.0, np.empty(len(white))
        for hour, shock in enumerate(np.sqrt(1 - alike**2) * white):
            state = alike * state + shock
            wave[hour] = state
        white = wave
    values = rng.uniform(30, 80) + noise * white[1000:]
    if kind == "daily":
        values += rng.uniform(1, 8) * np.sin(np.arange(hours) * np.pi / 12)
    elif kind == "weekly":
        values += rng.uniform(1, 8) * np.mod(np.arange(hours) / 168 + rng.random(), 1.0)
    return Disk(times_ms=times, values=values, days_left=np.inf)
