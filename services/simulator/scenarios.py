"""Trouble on demand: what a scenario does to the drivers of the server it is played on.

What must stay true: a scenario bends drivers, so that its consequences are correlated (a busy processor also makes the
load, the heat and the latency rise); several may bend one server, each starting from what the one before left; when the
last one ends, the server is healthy at the next tick. Counters never step back: a changed rate is added to what the
healthy rate has grown, and only a reboot, which ends an outage, starts them again.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from services.simulator.activity import Latent, latency
from services.simulator.drivers import RATES, Driver
from services.simulator.noise import Floats
from services.simulator.signals import LEAST_RATIO

FLAP_TICKS: Final = 6
"""A flapping server is silent and talks for as many ticks in turn: twice what makes a server offline."""


class ScenarioKind(Enum):
    """What can be played; the values are the names people use."""

    CPU_SPIKE = "cpu-spike"
    MEMORY_LEAK = "memory-leak"
    DISK_FILL = "disk-fill"
    OUTAGE = "outage"
    FLAPPING = "flapping"
    PACKET_LOSS = "packet-loss"
    NETWORK_SATURATION = "network-saturation"
    THRASHING = "thrashing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """A scenario on one server during ``[start_ms, end_ms)``.

    Attributes:
        row: the server's row in the fleet.
        start_ms, end_ms: milliseconds since the Unix epoch.
    """

    injection_id: str
    kind: ScenarioKind
    server_id: str
    row: int
    start_ms: int
    end_ms: int

    def active(self, time_ms: int) -> bool:
        """Tells whether the scenario is played at a time."""
        return self.start_ms <= time_ms < self.end_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class _Course:
    """How far a scenario has come: seconds since its start, and the fraction of its duration, 0 to 1."""

    elapsed_s: float
    progress: float

    def soon(self, tau_s: float) -> float:
        """Returns a rise from 0 to 1 with a time constant, as a load average or a heat sink has it."""
        return 1.0 - math.exp(-self.elapsed_s / tau_s)


def _raise(row: Floats, driver: Driver, target: float, by: float = 1.0) -> None:
    """Moves a driver up towards ``target`` by the fraction ``by``; one that is higher already stays."""
    row[driver] += max(0.0, target - row[driver]) * by


def _busy(row: Floats, course: _Course, load: float) -> None:
    _raise(row, Driver.LOAD_1M, load, course.soon(40.0))
    _raise(row, Driver.LOAD_5M, load, course.soon(200.0))
    _raise(row, Driver.LOAD_15M, load, course.soon(600.0))
    _raise(row, Driver.HEAT, 0.15 + 0.8 * row[Driver.CPU], course.soon(120.0))


def _cpu_spike(row: Floats, course: _Course) -> None:
    _raise(row, Driver.CPU, 0.975)
    _busy(row, course, 1.7)


def _memory_leak(row: Floats, course: _Course) -> None:
    _raise(row, Driver.MEMORY, 0.985, course.progress)
    short = max(0.0, (row[Driver.MEMORY] - 0.85) / 0.135)  # the last eighth is paid for with swap
    _raise(row, Driver.SWAP, 0.8, short)
    _raise(row, Driver.PAGING, 0.7, short)
    _raise(row, Driver.IOWAIT, 0.15, short)


def _disk_fill(row: Floats, course: _Course) -> None:
    _raise(row, Driver.DISK_ROOT, 0.99, course.progress)
    _raise(row, Driver.DISK_LOGS, 0.97, course.progress)
    _raise(row, Driver.DISK_IO, row[Driver.DISK_IO] + 0.15)


def _packet_loss(row: Floats, course: _Course) -> None:  # noqa: ARG001 (every effect has the same shape)
    _raise(row, Driver.LOSS, 0.12)
    _raise(row, Driver.FAILURES, 0.03)
    row[Driver.NETWORK] *= 0.6
    row[Driver.REQUESTS] *= 0.75


def _network_saturation(row: Floats, course: _Course) -> None:
    _raise(row, Driver.NETWORK, 0.98)
    _raise(row, Driver.LOSS, 0.02)
    _raise(row, Driver.CPU, row[Driver.CPU] + 0.12)
    _busy(row, course, row[Driver.LOAD_1M] + 0.15)


def _thrashing(row: Floats, course: _Course) -> None:
    _raise(row, Driver.MEMORY, 0.975, course.soon(60.0))
    _raise(row, Driver.SWAP, 0.95, course.soon(120.0))
    _raise(row, Driver.PAGING, 1.0, course.soon(30.0))
    _raise(row, Driver.IOWAIT, 0.45, course.soon(30.0))
    _raise(row, Driver.DISK_IO, 0.9, course.soon(30.0))
    _raise(row, Driver.FAILURES, 0.01, course.soon(60.0))
    row[Driver.REQUESTS] *= 0.7
    _busy(row, course, 3.0)


_EFFECTS: Final[dict[ScenarioKind, Callable[[Floats, _Course], None]]] = {
    ScenarioKind.CPU_SPIKE: _cpu_spike,
    ScenarioKind.MEMORY_LEAK: _memory_leak,
    ScenarioKind.DISK_FILL: _disk_fill,
    ScenarioKind.PACKET_LOSS: _packet_loss,
    ScenarioKind.NETWORK_SATURATION: _network_saturation,
    ScenarioKind.THRASHING: _thrashing,
}


class Stage:
    """Plays injections on a fleet: bends drivers, and says who is silent.

    Ticks are to be played in order; what scenarios added to counters is kept until the server's next boot.
    """

    def __init__(self, servers: int, *, interval_ms: int) -> None:
        self._interval_ms = interval_ms
        self._added = np.zeros((servers, RATES))
        self._reboots_s = np.full(servers, -np.inf)
        self._last_totals: Floats | None = None
        self._last_boots_s: Floats | None = None
        self._injections: tuple[Injection, ...] = ()

    @property
    def injections(self) -> tuple[Injection, ...]:
        """What is being played, in the order in which it was injected."""
        return self._injections

    @property
    def reboots_s(self) -> Floats:
        """Boots that ended an outage, seconds since the Unix epoch, shape (servers,); -inf where there was none."""
        return self._reboots_s

    def add(self, injection: Injection) -> None:
        """Plays an injection from its start on."""
        self._injections = (*self._injections, injection)

    def end(self, injection_id: str, time_ms: int) -> None:
        """Ends an injection at ``time_ms``, before its time; an outage ends with a reboot."""
        for injection in self._injections:
            if injection.injection_id == injection_id:
                self._ended(injection, min(time_ms, injection.end_ms))
        self._injections = tuple(kept for kept in self._injections if kept.injection_id != injection_id)

    def expire(self, time_ms: int) -> tuple[Injection, ...]:
        """Ends and returns the injections whose time is over."""
        over = tuple(injection for injection in self._injections if injection.end_ms <= time_ms)
        for injection in over:
            self._ended(injection, injection.end_ms)
        if over:
            self._injections = tuple(kept for kept in self._injections if kept.end_ms > time_ms)
        return over

    def _ended(self, injection: Injection, time_ms: int) -> None:
        if injection.kind is ScenarioKind.OUTAGE and time_ms > injection.start_ms:
            self._reboots_s[injection.row] = max(self._reboots_s[injection.row], time_ms / 1000.0)

    def bend(self, latent: Latent, time_ms: int) -> NDArray[np.bool_]:
        """Applies what is played at ``time_ms`` to the drivers, in place.

        Returns:
            Which servers send anything at all, shape (servers,).
        """
        present = np.ones(len(latent.drivers), dtype=bool)
        if self._last_boots_s is not None:
            self._added[latent.boots_s != self._last_boots_s] = 0.0
        healthy: dict[int, Floats] = {}
        for injection in self._injections:
            if not injection.active(time_ms):
                continue
            row = injection.row
            if injection.kind is ScenarioKind.OUTAGE:
                present[row] = False
            elif injection.kind is ScenarioKind.FLAPPING:
                ticks = (time_ms - injection.start_ms) // self._interval_ms
                present[row] &= bool(ticks // FLAP_TICKS % 2)
            else:
                healthy.setdefault(row, latent.drivers[row].copy())
                self._play(injection, latent.drivers[row], time_ms)
        self._grow(latent, healthy)
        return present

    def _play(self, injection: Injection, drivers: Floats, time_ms: int) -> None:
        elapsed_ms = time_ms - injection.start_ms
        progress = min(1.0, (elapsed_ms + self._interval_ms) / (injection.end_ms - injection.start_ms))
        _EFFECTS[injection.kind](drivers, _Course(elapsed_s=elapsed_ms / 1000.0, progress=progress))
        drivers[Driver.LATENCY] = latency(drivers) + 30.0 * max(0.0, drivers[Driver.NETWORK] - 0.9)

    def _grow(self, latent: Latent, healthy: dict[int, Floats]) -> None:
        """Adds to the counters what bent rates made them grow since the last tick, beyond the healthy growth."""
        if self._last_totals is not None:
            for row, before in healthy.items():
                ratio = np.maximum(latent.drivers[row, :RATES] / before[:RATES], LEAST_RATIO)
                self._added[row] += (ratio - 1.0) * (latent.totals[row] - self._last_totals[row])
        latent.grown[:] += self._added
        self._last_totals, self._last_boots_s = latent.totals, latent.boots_s
