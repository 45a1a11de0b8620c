"""From drivers to values: what each of the 511 metrics of each server reads at a tick.

A tick ``k`` is the moment ``k * interval``. The same seed, interval and tick give the same values bit for bit, in any
order of asking: tests, benches and the accuracy reports use ``SignalGenerator`` offline to make weeks of history.
Values are rounded as agents round them (whole bytes, percentages to two places), so that they compress as real ones do.
Measured on one core: 20 servers x 511 metrics in 0.8 ms a tick, 13 M values a second.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fleet.model import MetricKind
from services.simulator.activity import LEAST_RATES, Activity, Latent
from services.simulator.catalogue import CATALOGUE
from services.simulator.catalogue_words import MetricSpec, Scale
from services.simulator.drivers import DRIVERS
from services.simulator.fleet import SimulatedServer
from services.simulator.noise import Floats, uniform

_SPREAD = 0.2  # how far servers differ in a metric for no reason we know: factors of 0.8 to 1.2
_IDLE_ROLE = 0.12  # what a program does on a server of another role, as a fraction of its full use
_WANDER_S: Final = 1_200.0  # corners of each metric's own slow wander
_NOISE_BOUND: Final = 3.0  # standard deviations; bounded, so that a counter's noise never outruns its growth
_CHUNK_ROWS: Final = 256  # 1 MB of values: the passes over a chunk stay in the processor's cache

# A counter's own noise moves by at most these fractions of its least growth between two ticks.
_COUNTER_NOISE, _COUNTER_WANDER = 0.2, 0.2
LEAST_RATIO: Final = 0.5
"""A scenario may slow a rate down to this fraction at most: below, noise could make a counter step back."""

_STREAM_SPREAD = 80
_KEY_NOISE, _KEY_WANDER = 1, 2


class SignalGenerator:
    """Computes the values of a fleet at any tick."""

    def __init__(self, servers: Sequence[SimulatedServer], *, seed: int, interval_ms: int) -> None:
        """Prepares what is constant: 4 KB a server.

        Args:
            servers: the fleet, in the order of the rows.
            seed: any integer from 0.
            interval_ms: distance of two ticks, milliseconds.
        """
        self.interval_ms = interval_ms
        self._seed = seed
        self._activity = Activity(servers, seed=seed)
        self._scale = _scales(servers, seed)
        counters = np.array([spec.metric.kind is MetricKind.COUNTER for spec in CATALOGUE])
        drivers = np.array([int(spec.driver) for spec in CATALOGUE])
        span = np.array([spec.full - spec.rest for spec in CATALOGUE])
        jitter = np.array([spec.jitter for spec in CATALOGUE])
        least_growth = np.where(counters, span * LEAST_RATES[np.minimum(drivers, len(LEAST_RATES) - 1)], 0.0)
        reach = 2.0 * _NOISE_BOUND
        interval_s = interval_ms / 1000.0
        self._source = np.where(counters, DRIVERS + drivers, drivers)
        self._gain = span
        self._noise = np.where(counters, _COUNTER_NOISE * least_growth * interval_s / reach, 0.6 * jitter * abs(span))
        self._wander = np.where(counters, _COUNTER_WANDER * least_growth * _WANDER_S / reach, 0.8 * jitter * abs(span))
        raised = np.where(counters, _NOISE_BOUND * (self._noise + self._wander), 0.0)
        self._rest = np.array([spec.rest for spec in CATALOGUE]) + raised
        self._low = np.array([spec.low for spec in CATALOGUE])
        self._high = np.array([spec.high for spec in CATALOGUE])
        self._places = 10.0 ** np.array([spec.decimals for spec in CATALOGUE])
        self._corners: dict[int, NDArray[np.float32]] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """Servers and metrics: the shape of what ``values`` returns."""
        return self._scale.shape[0], self._scale.shape[1]

    def time_ms(self, tick: int) -> int:
        """Returns the tick's time in milliseconds since the Unix epoch."""
        return tick * self.interval_ms

    def latent(self, tick: int, reboots_s: Floats | None = None) -> Latent:
        """Returns the drivers at a tick, for scenarios to bend; ``reboots_s`` as in ``Activity.at``."""
        return self._activity.at(self.time_ms(tick) / 1000.0, reboots_s)

    def values(self, tick: int) -> Floats:
        """Returns what the healthy fleet reads at a tick, float64, shape (servers, metrics)."""
        return self.render(self.latent(tick), tick)

    def render(self, latent: Latent, tick: int) -> Floats:
        """Returns the values that belong to (bent) drivers, float64, shape (servers, metrics)."""
        sources = np.concatenate([latent.drivers, latent.grown], axis=1)
        noise = self._random(_KEY_NOISE, tick)
        position = latent.time_s / _WANDER_S
        corner = int(position // 1)
        before, after = self._corner(corner), self._corner(corner + 1)
        along = np.float32(position - corner)
        out = np.empty(self.shape)
        for start in range(0, len(out), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            values = out[rows]
            np.multiply(sources[rows][:, self._source], self._gain, out=values)
            values += self._rest
            values += self._noise * _normals(noise, values.shape)
            values += self._wander * (before[rows] + (after[rows] - before[rows]) * along)
            values *= self._scale[rows]
            np.clip(values, self._low, self._high, out=values)
            values *= self._places
            np.rint(values, out=values)
            values /= self._places
        return out

    def _random(self, stream: int, position: int) -> np.random.Generator:
        key = np.array([self._seed * 8 + stream & 0xFFFFFFFFFFFFFFFF, position & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def _corner(self, corner: int) -> NDArray[np.float32]:
        """Returns where each metric's wander is at a corner; the two last used are kept."""
        if corner not in self._corners:
            for old in sorted(self._corners, key=lambda kept: abs(kept - corner))[1:]:
                del self._corners[old]
            self._corners[corner] = _normals(self._random(_KEY_WANDER, corner), self.shape)
        return self._corners[corner]


def _normals(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    drawn = random.standard_normal(shape, dtype=np.float32)
    return np.clip(drawn, -_NOISE_BOUND, _NOISE_BOUND, out=drawn)


def _scales(servers: Sequence[SimulatedServer], seed: int) -> Floats:
    """Returns what each server's values are multiplied with, shape (servers, metrics)."""
    hardware = {
        Scale.MEMORY: np.array([server.memory_bytes for server in servers], dtype=np.float64),
        Scale.SWAP: np.array([server.swap_bytes for server in servers], dtype=np.float64),
        Scale.DISK_ROOT: np.array([server.disk_root_bytes for server in servers], dtype=np.float64),
        Scale.DISK_DATA: np.array([server.disk_data_bytes for server in servers], dtype=np.float64),
        Scale.DISK_LOGS: np.array([server.disk_logs_bytes for server in servers], dtype=np.float64),
    }
    rows = np.arange(len(servers))
    roles = np.array([server.descriptor.role for server in servers])
    scales = np.ones((len(servers), len(CATALOGUE)))
    for column, spec in enumerate(CATALOGUE):
        if spec.scale in hardware:
            scales[:, column] = hardware[spec.scale]
        elif spec.scale is Scale.SPREAD:
            drawn = uniform(seed, _STREAM_SPREAD, rows, column)
            scales[:, column] = (1.0 - _SPREAD + 2.0 * _SPREAD * drawn) * _role_factor(spec, roles)
    return scales


def _role_factor(spec: MetricSpec, roles: NDArray[np.str_]) -> Floats:
    if not spec.roles:
        return np.ones(len(roles))
    return np.where(np.isin(roles, sorted(spec.roles)), 1.0, _IDLE_ROLE)
