"""The synthetic fleet as a source of batches: signals bent by scenarios, cut into batches that fit a message."""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Final

import numpy as np

from fleet.model import Rows, WriteBatch
from runtime.errors import InvalidArgument, NotFound, ResourceExhausted
from services.simulator.catalogue import METRIC_SET
from services.simulator.fleet import SimulatedServer
from services.simulator.scenarios import Injection, ScenarioKind, Stage
from services.simulator.signals import SignalGenerator

MAX_BATCH_POINTS: Final = 1_000_000
"""8 MB of values: half of what a message may hold."""
MAX_INJECTIONS: Final = 10_000
"""Scenarios played at once, over all servers."""
MIN_SCENARIO_S: Final = 1.0
MAX_SCENARIO_S: Final = 7 * 86_400.0
_MAX_POINTS_ON_LOOP = 50_000  # about 5 ms; larger fleets are computed in a thread

SCENARIO_NAMES: Final = ", ".join(kind.value for kind in ScenarioKind)


class SyntheticSource:
    """Makes the batches of a tick; ticks are to be asked for in order."""

    catches_up: Final = True
    """A late tick can still be computed."""

    def __init__(self, servers: Sequence[SimulatedServer], *, seed: int, interval_ms: int) -> None:
        self._generator = SignalGenerator(servers, seed=seed, interval_ms=interval_ms)
        self._stage = Stage(len(servers), interval_ms=interval_ms)
        self._descriptors = tuple(server.descriptor for server in servers)
        self._ids = tuple(server.descriptor.server_id for server in servers)
        self._rows = {server_id: row for row, server_id in enumerate(self._ids)}
        self._batch_rows = max(1, MAX_BATCH_POINTS // len(METRIC_SET))

    @property
    def server_count(self) -> int:
        """How many servers the fleet has, silent ones included."""
        return len(self._ids)

    @property
    def metric_count(self) -> int:
        """How many metrics each server reports."""
        return len(METRIC_SET)

    @property
    def injections(self) -> tuple[Injection, ...]:
        """The scenarios that are played or still to come."""
        return self._stage.injections

    async def batches(self, tick: int, time_ms: int) -> list[WriteBatch]:
        """Returns what the fleet reports at a tick; empty when every server is silent."""
        self._stage.expire(time_ms)
        if len(self._ids) * len(METRIC_SET) > _MAX_POINTS_ON_LOOP:
            return await asyncio.to_thread(self._make, tick, time_ms)
        return self._make(tick, time_ms)

    def _make(self, tick: int, time_ms: int) -> list[WriteBatch]:
        latent = self._generator.latent(tick, self._stage.reboots_s)
        present = self._stage.bend(latent, time_ms)
        values = self._generator.render(latent, tick)
        rows = np.flatnonzero(present)
        batches = []
        for start in range(0, len(rows), self._batch_rows):
            part = rows[start : start + self._batch_rows]
            whole = len(part) == len(self._ids)
            chosen = part.tolist()
            batches.append(
                WriteBatch(
                    metric_set=METRIC_SET,
                    rows=Rows(
                        metric_set_id=METRIC_SET.id,
                        server_ids=self._ids if whole else tuple(self._ids[row] for row in chosen),
                        times_ms=np.full(len(part), time_ms, dtype=np.int64),
                        values=values if whole else values[part],
                    ),
                    servers=self._descriptors if whole else tuple(self._descriptors[row] for row in chosen),
                )
            )
        return batches

    def inject(self, server_id: str, scenario: str, duration_s: float, now_ms: int) -> Injection:
        """Plays a scenario on a server from now on.

        Raises:
            InvalidArgument: the scenario is unknown, or the duration is not between 1 s and 7 days.
            NotFound: there is no such server.
            ResourceExhausted: too many scenarios are being played.
        """
        kind = _kind(scenario)
        if not MIN_SCENARIO_S <= duration_s <= MAX_SCENARIO_S:  # also refuses NaN
            raise InvalidArgument(f"{duration_s:g} s is not between 1 s and 7 days", field="duration")
        self._check_server(server_id)
        if len(self._stage.injections) >= MAX_INJECTIONS:
            raise ResourceExhausted(f"{MAX_INJECTIONS} scenarios are being played (MAX_INJECTIONS): end some first")
        injection = Injection(
            injection_id=secrets.token_hex(6),
            kind=kind,
            server_id=server_id,
            row=self._rows[server_id],
            start_ms=now_ms,
            end_ms=now_ms + round(duration_s * 1000.0),
        )
        self._stage.add(injection)
        return injection

    def clear(self, server_id: str, scenario: str, now_ms: int) -> tuple[Injection, ...]:
        """Ends scenarios now and returns them; an empty ``server_id`` or ``scenario`` means all.

        Raises:
            InvalidArgument: the scenario is unknown.
            NotFound: there is no such server.
        """
        if scenario:
            _kind(scenario)
        if server_id:
            self._check_server(server_id)
        chosen = tuple(
            injection
            for injection in self._stage.injections
            if server_id in {"", injection.server_id} and scenario in {"", injection.kind.value}
        )
        for injection in chosen:
            self._stage.end(injection.injection_id, now_ms)
        return chosen

    def _check_server(self, server_id: str) -> None:
        if not server_id:
            raise InvalidArgument("no server is named", field="server_id")
        if server_id not in self._rows:
            raise NotFound(f"there is no simulated server {server_id[:255]!r}", field="server_id")


def _kind(name: str) -> ScenarioKind:
    for kind in ScenarioKind:
        if kind.value == name:
            return kind
    raise InvalidArgument(f"{name[:80]!r} is not one of {SCENARIO_NAMES}", field="name")
