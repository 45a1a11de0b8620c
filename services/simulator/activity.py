"""From time to drivers: the daily wave, the noise around it, disks that fill, machines that boot.

What must stay true: everything here is a function of the seed and the time alone. Rates are never negative and have an
integral in closed form, so that a counter is the integral from the server's boot to now, whichever tick is asked first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.simulator.drivers import DRIVERS, RATES, Driver
from services.simulator.fleet import SimulatedServer
from services.simulator.noise import Dice, Floats, Pulses, WeeklyProfiles, Wobble, uniform

DAY_S: Final = 86_400.0

# One working day of what people do, by hour of local time; week-ends are quieter.
_DAY = (
    0.18, 0.14, 0.11, 0.10, 0.10, 0.13, 0.22, 0.38, 0.58, 0.78, 0.90, 0.95,
    0.90, 0.93, 0.97, 0.96, 0.90, 0.82, 0.74, 0.70, 0.66, 0.55, 0.40, 0.27,
)  # fmt: skip
_WEEKDAYS = (1.0, 1.02, 1.03, 1.0, 0.93, 0.58, 0.52)
_PROFILE_OF_ROLE = {"db": 1, "worker": 2, "queue": 2}

# How the rates mix: rows are the basis (constant, wave, pulses), columns the drivers from ONE to FAILURES.
_PULSES = (60.0, 600.0, 7_200.0, 93_600.0, 1_500.0, 900.0, 2_400.0, 3_600.0)
_MIX: Final = np.array(
    [
        # ONE   CPU    IOWAIT PAGING DISK_IO NETWORK LOSS   REQUESTS FAILURES
        [1.0, 0.030, 0.001, 0.02, 0.02, 0.01, 0.0002, 0.02, 0.0003],
        [0.0, 0.300, 0.000, 0.04, 0.10, 0.14, 0.0003, 0.45, 0.0003],
        [0.0, 0.015, 0.000, 0.00, 0.00, 0.01, 0.0000, 0.02, 0.0000],  # 1 min
        [0.0, 0.030, 0.000, 0.00, 0.02, 0.02, 0.0000, 0.05, 0.0000],  # 10 min
        [0.0, 0.030, 0.004, 0.00, 0.00, 0.00, 0.0000, 0.05, 0.0000],  # 2 h
        [0.0, 0.020, 0.000, 0.00, 0.00, 0.00, 0.0000, 0.03, 0.0000],  # 26 h
        [0.0, 0.000, 0.012, 0.00, 0.06, 0.00, 0.0000, 0.00, 0.0000],  # disks
        [0.0, 0.000, 0.000, 0.00, 0.00, 0.03, 0.0000, 0.00, 0.0000],  # network
        [0.0, 0.000, 0.000, 0.06, 0.00, 0.00, 0.0000, 0.00, 0.0000],  # pager
        [0.0, 0.000, 0.000, 0.00, 0.00, 0.00, 0.0004, 0.00, 0.0012],  # errors
    ]
)
_MIN_GAIN, _MAX_GAIN = 0.65, 1.3
LEAST_RATES: Final[Floats] = np.concatenate([[1.0], _MIN_GAIN * _MIX[0, 1:]])
"""No driver with an integral is ever below this, shape (RATES,)."""

# What a momentary reading shows on top of the rates: too quick for a counter to tell.
_WOBBLES = (90.0, 600.0, 3_600.0, 21_600.0)
_WOBBLE_MIX: Final = np.zeros((len(_WOBBLES), DRIVERS))
for _driver, _amplitudes in {
    Driver.CPU: (0.03, 0.03, 0.03, 0.0),
    Driver.IOWAIT: (0.002, 0.001, 0.0, 0.0),
    Driver.DISK_IO: (0.015, 0.01, 0.0, 0.0),
    Driver.NETWORK: (0.01, 0.01, 0.005, 0.0),
    Driver.REQUESTS: (0.02, 0.04, 0.04, 0.0),
    Driver.LOAD_1M: (0.024, 0.03, 0.03, 0.0),
    Driver.LOAD_5M: (0.006, 0.027, 0.03, 0.0),
    Driver.LOAD_15M: (0.002, 0.014, 0.03, 0.0),
    Driver.MEMORY: (0.0, 0.006, 0.01, 0.04),
    Driver.SWAP: (0.0, 0.0, 0.002, 0.01),
    Driver.HEAT: (0.0, 0.004, 0.02, 0.02),
}.items():
    _WOBBLE_MIX[:, _driver] = _amplitudes

# Disk: how low a clean-up goes, how much is written until the next one, days between clean-ups; (least, most).
_FILLINGS: Final = {
    Driver.DISK_ROOT: ((0.28, 0.44), (0.14, 0.30), (9.0, 40.0)),
    Driver.DISK_DATA: ((0.30, 0.42), (0.20, 0.38), (20.0, 90.0)),
    Driver.DISK_LOGS: ((0.12, 0.25), (0.20, 0.45), (1.0, 7.0)),
}
_LOWEST: Final = np.zeros(DRIVERS)
_LOWEST[Driver.LATENCY] = 1.0
_HIGHEST: Final = np.ones(DRIVERS)
_HIGHEST[
    [Driver.LOAD_1M, Driver.LOAD_5M, Driver.LOAD_15M, Driver.LATENCY, Driver.HEAT, Driver.UPTIME, Driver.EPOCH]
] = np.inf

_STREAM_PULSES, _STREAM_WOBBLES, _STREAM_GAINS, _STREAM_DISKS, _STREAM_BOOTS = 10, 20, 30, 40, 60


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Latent:
    """The drivers of all servers at one time; scenarios bend the arrays in place before values are made of them.

    Attributes:
        time_s: seconds since the Unix epoch.
        drivers: shape (servers, DRIVERS).
        totals: integrals of the rates from a fixed moment, shape (servers, RATES), driver-seconds.
        grown: integrals since each server's boot, shape (servers, RATES).
        boots_s: when each server booted, shape (servers,).
    """

    time_s: float
    drivers: Floats
    totals: Floats
    grown: Floats
    boots_s: Floats


def latency(drivers: Floats) -> Floats:
    """Returns how many times slower than idle servers with these drivers are: a queue at a busy processor."""
    busy = np.minimum(drivers[..., Driver.CPU], 0.985)
    slower = 0.5 * busy * busy / (1.0 - busy) + 8.0 * drivers[..., Driver.IOWAIT] + 40.0 * drivers[..., Driver.LOSS]
    return np.asarray(1.0 + slower)


class Activity:
    """Computes the drivers of a fleet."""

    def __init__(self, servers: Sequence[SimulatedServer], *, seed: int) -> None:
        count = len(servers)
        self._seed = seed
        self._rows = np.arange(count)
        self._offsets_s = np.array([server.utc_offset_s for server in servers])
        chosen = np.array([_PROFILE_OF_ROLE.get(server.descriptor.role, 0) for server in servers])
        self._profiles = WeeklyProfiles(_profile_hours(), chosen)
        self._pulses = Pulses(seed, _STREAM_PULSES, count, _PULSES)
        self._wobbles = Wobble(seed, _STREAM_WOBBLES, count, _WOBBLES)
        self._gains = np.ones((count, RATES))
        shared = self._constant(_STREAM_GAINS, 0.72, 1.18)[:, None]
        own = uniform(seed, _STREAM_GAINS + 1, self._rows[:, None] * RATES + np.arange(RATES - 1))
        self._gains[:, 1:] = np.clip(shared * (0.9 + 0.2 * own), _MIN_GAIN, _MAX_GAIN)
        self._memory_base = self._constant(_STREAM_GAINS + 2, 0.30, 0.54)
        self._swap_base = self._constant(_STREAM_GAINS + 3, 0.02, 0.07)
        self._boot_cycle_s = self._constant(_STREAM_BOOTS, 21.0, 45.0) * DAY_S
        self._boot_phase_s = self._constant(_STREAM_BOOTS + 1, 0.0, 45.0) * DAY_S
        self._boot_dice = Dice(seed, _STREAM_BOOTS + 2, self._rows)
        self._disks = {
            driver: _Filling(seed, _STREAM_DISKS + 4 * number, self._rows, *filling)
            for number, (driver, filling) in enumerate(_FILLINGS.items())
        }
        self._boots_s = np.full(count, np.nan)
        self._totals_at_boot = np.zeros((count, RATES))

    def _constant(self, stream: int, least: float, most: float) -> Floats:
        return least + (most - least) * uniform(self._seed, stream, self._rows)

    def at(self, time_s: float, reboots_s: Floats | None = None) -> Latent:
        """Returns the drivers at a time.

        Args:
            time_s: seconds since the Unix epoch.
            reboots_s: boots that are not of the plan, one for each server, -inf where there was none.
        """
        times = np.full(len(self._rows), time_s)
        boots = self._planned_boots(time_s)
        if reboots_s is not None:
            boots = np.maximum(boots, reboots_s)
        basis, integrals = self._basis(times)
        drivers = np.zeros((len(self._rows), DRIVERS))
        drivers[:, :RATES] = self._gains * (basis @ _MIX)
        totals = self._gains * (integrals @ _MIX)
        self._derive(drivers, basis)
        drivers += self._wobbles.at(time_s) @ _WOBBLE_MIX
        drivers[:, Driver.LATENCY] = latency(drivers)
        for driver, filling in self._disks.items():
            drivers[:, driver] = filling.at(time_s)
        np.clip(drivers, _LOWEST, _HIGHEST, out=drivers)
        drivers[:, Driver.UPTIME] = time_s - boots
        drivers[:, Driver.EPOCH] = boots
        grown = totals - self._at_boot(boots)
        return Latent(time_s=time_s, drivers=drivers, totals=totals, grown=grown, boots_s=boots)

    def _basis(self, times_s: Floats) -> tuple[Floats, Floats]:
        """Returns what the rates are mixed of, and its integrals, both of shape (servers, basis)."""
        wave, waves = self._profiles.at(times_s + self._offsets_s)
        pulses, grown = self._pulses.at(times_s)
        return np.column_stack([np.ones_like(wave), wave, pulses]), np.column_stack([times_s, waves, grown])

    def _derive(self, drivers: Floats, basis: Floats) -> None:
        """Fills the drivers that follow the rates: load is CPU without its quickest movements."""
        gain = self._gains[:, Driver.CPU]
        quick = (basis[:, 2:4] - 1.0) * _MIX[2:4, Driver.CPU] * gain[:, None]  # pulses of 1 and 10 minutes
        cpu = drivers[:, Driver.CPU]
        drivers[:, Driver.LOAD_1M] = 1.05 * (cpu - 0.2 * quick[:, 0])
        drivers[:, Driver.LOAD_5M] = 1.05 * (cpu - 0.8 * quick[:, 0] - 0.1 * quick[:, 1])
        drivers[:, Driver.LOAD_15M] = 1.05 * (cpu - quick[:, 0] - 0.5 * quick[:, 1])
        drivers[:, Driver.MEMORY] = self._memory_base + 0.12 * drivers[:, Driver.REQUESTS]
        drivers[:, Driver.SWAP] = self._swap_base
        drivers[:, Driver.HEAT] = 0.15 + 0.55 * cpu

    def _planned_boots(self, time_s: float) -> Floats:
        position = (time_s - self._boot_phase_s) / self._boot_cycle_s
        cycle = np.floor(position)
        boots = self._boot_of(cycle)
        return np.where(boots > time_s, self._boot_of(cycle - 1.0), boots)

    def _boot_of(self, cycle: Floats) -> Floats:
        late = 0.25 * self._boot_dice.at(cycle.astype(np.int64))
        return np.floor(self._boot_phase_s + (cycle + late) * self._boot_cycle_s)

    def _at_boot(self, boots_s: Floats) -> Floats:
        """Returns the totals at each server's boot; a cache, since boots are weeks apart."""
        if not np.array_equal(boots_s, self._boots_s):
            self._boots_s, self._totals_at_boot = boots_s, self._gains * (self._basis(boots_s)[1] @ _MIX)
        return self._totals_at_boot


class _Filling:
    """A disk that fills from one clean-up to the next, each time from another level by another amount."""

    def __init__(
        self,
        seed: int,
        stream: int,
        rows: NDArray[np.int64],
        low: tuple[float, float],
        height: tuple[float, float],
        days: tuple[float, float],
    ) -> None:
        self._period_s = (days[0] + (days[1] - days[0]) * uniform(seed, stream, rows)) * DAY_S
        self._phase = uniform(seed, stream + 1, rows)
        self._dice = Dice(seed, stream + 2, np.stack([rows * 2, rows * 2 + 1]))
        self._low, self._height = low, height

    def at(self, time_s: float) -> Floats:
        """Returns which fraction of each server's disk is used, shape (servers,)."""
        position = time_s / self._period_s + self._phase
        cycle = np.floor(position)
        bottom, written = self._dice.at(cycle.astype(np.int64))
        least = self._low[0] + (self._low[1] - self._low[0]) * bottom
        return np.asarray(
            least + (self._height[0] + (self._height[1] - self._height[0]) * written) * (position - cycle)
        )


def _profile_hours() -> NDArray[np.float64]:
    """Returns the weeks of user-facing servers, databases (a back-up at night) and workers (jobs at night)."""
    day = np.array(_DAY)
    back_up = np.where((np.arange(24) >= 2) & (np.arange(24) < 4), 0.45, 0.0)
    jobs = np.where((np.arange(24) >= 1) & (np.arange(24) < 5), 0.40, 0.0)
    users = np.concatenate([day * factor for factor in _WEEKDAYS])
    return np.stack(
        [
            np.minimum(users, 1.0),
            np.minimum(0.05 + 0.85 * users + np.tile(back_up, 7), 1.0),
            np.minimum(0.25 + 0.35 * users + np.tile(jobs, 7), 1.0),
        ]
    )
