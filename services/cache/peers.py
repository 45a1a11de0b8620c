"""Hears what other replicas write to the store, and takes it in.

A subscription tells which servers somebody wrote; they are read and joined with what is known here. Whenever it begins
anew, and after every failure, all that differs is read, since nobody knows what was missed.

What must stay true: `is_current` only while a subscription stands that everything was read under; a replica that is not
current writes nothing about the fleet as a whole.
"""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from types import TracebackType
from typing import Final, Self

from opentelemetry.instrumentation.utils import suppress_instrumentation

from runtime.circuit import Circuit
from runtime.clock import Clock
from runtime.errors import OpenManagerError, Unavailable
from runtime.tasks import Backoff, cancel, run_forever
from services.cache.model import Stored
from services.cache.state import MAX_FLEET_BASES, LiveState
from services.cache.store import StateStore

SUBSCRIBE_TIMEOUT_S: Final = 3.0
READ_TIMEOUT_S: Final = 10.0
"""For some servers; reading everything goes on for as long as some come within this."""
REREAD_INTERVAL_S: Final = 60.0
"""So often all versions are compared, for what a writer that died did not tell; 20,000 take 0.3 s of work."""
MAX_READ_AT_ONCE: Final = 500
RETRY: Final = Backoff(initial_s=0.1, max_s=2.0)


class Peers:
    """Listens and reads for as long as it is entered."""

    def __init__(
        self,
        store: StateStore,
        live: LiveState,
        circuit: Circuit,
        clock: Clock,
        rng: random.Random,
        *,
        absorb: Callable[[Iterable[Stored]], None],
        missing: Callable[[Iterable[str]], None],
    ) -> None:
        """Prepares.

        Args:
            store: what is listened to.
            live: what is known here; read only.
            circuit: before the store.
            clock: of the schedule.
            rng: jitter of the retries.
            absorb: takes in what others wrote.
            missing: told of servers that the store lacks.
        """
        self._store = store
        self._live = live
        self._circuit = circuit
        self._clock = clock
        self._rng = rng
        self._absorb = absorb
        self._missing = missing
        self._heard: dict[str, str] = {}
        self._heard_fleets: deque[str] = deque(maxlen=MAX_FLEET_BASES)
        self._is_listening = False
        self._distrusts = 1  # how often something may have been missed ...
        self._trusted = 0  # ... and how many of those were followed by reading everything
        self._compare_at = clock.monotonic() + REREAD_INTERVAL_S
        self._must_compare = False
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._became_current: Callable[[], None] = lambda: None
        self.last_error = ""
        self.has_others = False
        """Whether anybody else was ever heard: who is alone has nobody to wait for."""

    @property
    def is_current(self) -> bool:
        """Whether everything that others wrote is known here, but for what is on its way."""
        return self._is_listening and self._trusted == self._distrusts

    async def __aenter__(self) -> Self:
        for name, work in (("cache-listen", self._listen), ("cache-read", self._read_forever)):
            forever = run_forever(name, work, RETRY, clock=self._clock, rng=self._rng)
            self._tasks.append(asyncio.create_task(forever, name=name))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await cancel(*self._tasks)

    def on_current(self, became_current: Callable[[], None]) -> None:
        """Has it told whenever this becomes current."""
        self._became_current = became_current

    def distrust(self) -> None:
        """Says that something may have been missed."""
        self._distrusts += 1
        self._wake.set()

    def tick(self) -> None:
        """Once a second: starts the comparison of everything when it is due."""
        if self._clock.monotonic() >= self._compare_at:
            self._must_compare = True
            self._wake.set()

    async def _listen(self) -> None:
        try:
            with suppress_instrumentation():
                async with aclosing(self._store.heard()) as heard:
                    with self._circuit.attempt(), _bounded():
                        async with asyncio.timeout(SUBSCRIBE_TIMEOUT_S):
                            await anext(heard)
                    self._is_listening = True
                    self.distrust()
                    async for one in heard:
                        news = self._news(one.versions)
                        self.has_others |= bool(news or (one.fleet and not one.fleet.endswith(f".{self._live.epoch}")))
                        self._heard |= news  # at most one entry for each server
                        if one.fleet:
                            self._heard_fleets.append(one.fleet)
                        self._wake.set()
        except OpenManagerError as error:
            self.last_error = error.message
            raise
        finally:
            self._is_listening = False

    async def _read_forever(self) -> None:
        self._wake.set()  # after a failure too
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not self._is_listening:
                continue  # it is woken once somebody listens
            with suppress_instrumentation():
                await self._read_once()

    async def _read_once(self) -> None:
        try:
            if self._must_compare or not self.is_current:
                await self._reread()
            fleets = list(self._heard_fleets)
            while self._heard:
                part = dict(list(self._heard.items())[:MAX_READ_AT_ONCE])
                for server_id in part:
                    del self._heard[server_id]
                news = list(self._news(part))
                with self._circuit.attempt(), _bounded():
                    async with asyncio.timeout(READ_TIMEOUT_S):
                        self._absorb(await self._store.read(news))
            self._live.fleet_bases.extend(fleets)  # all that they were made of was read
            for fleet in fleets:
                if fleet in self._heard_fleets:
                    self._heard_fleets.remove(fleet)
        except BaseException:
            self._distrusts += 1
            raise

    async def _reread(self) -> None:
        """Takes in whatever differs from what was taken in before."""
        was_current, distrusts = self.is_current, self._distrusts
        fleets: list[str] = []
        self._heard.clear()
        self._heard_fleets.clear()
        known = {server_id: self._live.bases.get(server_id, "") for server_id in self._live.ids()}
        with self._circuit.attempt(), _bounded():
            async with (
                asyncio.timeout(READ_TIMEOUT_S) as limit,
                aclosing(self._store.differences(known)) as differences,
            ):
                async for difference in differences:
                    limit.reschedule(asyncio.get_running_loop().time() + READ_TIMEOUT_S)
                    self._absorb(difference.found)
                    self._missing(difference.missing)
                    fleets += difference.fleets
        self._live.fleet_bases.extend(dict.fromkeys(fleets))
        self._trusted = distrusts
        self._must_compare, self._compare_at = False, self._clock.monotonic() + REREAD_INTERVAL_S
        self.last_error = ""
        if self.is_current and not was_current:
            self._became_current()

    def _news(self, versions: Mapping[str, str]) -> dict[str, str]:
        """Those that are not known yet."""
        return {server_id: version for server_id, version in versions.items() if not self._is_known(server_id, version)}

    def _is_known(self, server_id: str, version: str) -> bool:
        """What is ours is, but for a server that we have removed since: somebody who did not hear of that may have
        written it again."""
        if version == self._live.bases.get(server_id):
            return True
        removal = self._live.removal(server_id)
        return version.endswith(f".{self._live.epoch}") and (removal is None or removal.version == version)


@contextmanager
def _bounded() -> Iterator[None]:
    """Says of a time-out what it is."""
    try:
        yield
    except TimeoutError as error:
        raise Unavailable("no answer in time", reason="STORE_UNAVAILABLE") from error
