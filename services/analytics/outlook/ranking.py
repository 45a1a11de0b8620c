"""When many servers reach a limit: looked at one after another for as long as there is time, and remembered.

A server takes 55 ms (measured: 20 with a year by the hour, 1.06 s), so 20,000 take 18 minutes. An answer is of days, so
it may be old: the more servers there are, the longer each is kept, so that whoever asks again and again has a tenth of
one core at work and not more.

What must stay true: a server is looked at, now or before, or counted as pending, and who asks again and again comes to
an end: a list that is more than can be remembered is refused; what is remembered is bounded, and what goes first is the
oldest; a caller who leaves stops the work at the next series.
"""

import asyncio
import contextlib
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from fleet.codec import ms_from_timestamp
from openmanager.analytics.v1.capacity_pb2 import RankCapacityRequest, RankCapacityResponse
from openmanager.fleet.v1 import outlook_pb2 as pb
from runtime import deadline
from runtime.clock import Clock
from runtime.errors import InvalidArgument, NotFound, ResourceExhausted
from services.analytics.outlook import arguments
from services.analytics.outlook.arguments import Question
from services.analytics.outlook.measurements import Chosen, Measurements, Source
from services.analytics.outlook.servicer import capacity_from, capacity_of
from services.analytics.outlook.tally import Tally
from services.analytics.outlook.workers import Workers

CAPACITY_SERVICE: Final = "openmanager.analytics.v1.CapacityService"
MAX_SERVERS: Final = 20_000
MAX_REMEMBERED: Final = 40_000
"""Answers kept, 0.7 KB each: a fleet of 20,000 with two questions."""
MAX_WAITING: Final = 8
"""Lists that wait for the one being made."""
SERVERS_TOGETHER: Final = 4
"""Servers read at once: what was read and not yet computed is lost when time is over."""
WORK_SHARE: Final = 0.7
MAX_WORK_S: Final = 30.0
"""Of the caller's time this part, and at most so much, is worked; the rest is for the answer's way back."""
KEPT_S_A_SERVER: Final = 0.5
"""Ten times what looking at a server takes."""
MIN_KEPT_S: Final = 60.0

_Key = tuple[str, Question, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Remembered:
    """What was found of a server, one for each metric of the name; none: it has none."""

    at_s: float
    found: tuple[pb.Capacity, ...]


class CapacityServicer:
    """Answers ``openmanager.analytics.v1.CapacityService``."""

    def __init__(self, source: Source, workers: Workers, clock: Clock, tally: Tally) -> None:
        self._source = source
        self._workers = workers
        self._clock = clock
        self._tally = tally
        self._one_at_a_time = asyncio.Lock()
        self._waiting = 0
        self._remembered: OrderedDict[_Key, _Remembered] = OrderedDict()
        self._kept = 0

    async def RankCapacity(self, request: RankCapacityRequest, _context: object) -> RankCapacityResponse:
        """Looks at those that are not known, as long as there is time; then puts all that are in order."""
        arguments.check_metric(request.metric)
        question, within_ms = arguments.question_of(request), arguments.within_of(request.within)
        if len(request.server_ids) > MAX_SERVERS:
            raise ResourceExhausted(
                f"more than {MAX_SERVERS} servers (MAX_SERVERS): name an environment or a role", reason="MAX_SERVERS"
            )
        asked = list(dict.fromkeys(request.server_ids))
        metrics = await self._source.metrics("", request.metric)
        check_limit(question, metrics, request.metric)
        fresh_from_s = self._clock.monotonic() - max(MIN_KEPT_S, KEPT_S_A_SERVER * len(asked))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(work_s()), self._turn():
                await self._look_at(asked, request.metric, metrics, question, fresh_from_s)
        known = {
            server_id: kept.found
            for server_id in asked
            if (kept := self._remembered.get((request.metric, question, server_id))) and kept.at_s >= fresh_from_s
        }
        # 40 ms for 20,000 servers of which none is listed, 90 where all are
        answer = await self._workers.run(partial(ranked, known, self._clock.now_ms() + within_ms))
        answer.servers, answer.pending_servers = len(known), len(asked) - len(known)
        return answer

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        if self._waiting >= MAX_WAITING:
            raise ResourceExhausted(
                f"{self._waiting} lists wait already (MAX_WAITING)", reason="TOO_MANY_WAITING", retry_after_s=1.0
            )
        self._waiting += 1
        try:
            async with self._one_at_a_time:
                yield
        finally:
            self._waiting -= 1

    async def _look_at(
        self, asked: Sequence[str], name: str, metrics: Sequence[Chosen], question: Question, fresh_from_s: float
    ) -> None:
        """Remembers what is found of the servers that are not known since then."""
        left = [
            server_id
            for server_id in asked
            if (kept := self._remembered.get((name, question, server_id))) is None or kept.at_s < fresh_from_s
        ]
        wanted = set(asked)
        for at in range(0, len(left), SERVERS_TOGETHER):
            together = left[at : at + SERVERS_TOGETHER]
            by_server = await self._read(together, metrics)
            for server_id in together:
                found = [await self._computed(measured, question) for measured in by_server.get(server_id, ())]
                gone = self._remember((name, question, server_id), tuple(found))
                if any(key[:2] == (name, question) and key[2] in wanted and at_s >= fresh_from_s for key, at_s in gone):
                    raise ResourceExhausted(
                        f"the list has over {MAX_REMEMBERED} series (MAX_REMEMBERED): name the labels of one, an "
                        "environment or a role",
                        reason="MAX_SERVERS",
                    )

    async def _read(self, server_ids: Sequence[str], metrics: Sequence[Chosen]) -> dict[str, list[Measurements]]:
        """What was measured, of each server that has anything."""
        now_ms = self._clock.now_ms()
        found: list[Measurements] = []
        try:
            for is_counter in (False, True):
                if alike := [metric for metric in metrics if metric.is_counter == is_counter]:
                    found += await self._source.read_many(server_ids, alike, capacity_from(now_ms), now_ms)
        except NotFound:  # timeseries refuses all because of one
            if len(server_ids) == 1:
                return {}
            alone = [await self._read([server_id], metrics) for server_id in server_ids]
            return {server_id: measured for one in alone for server_id, measured in one.items()}
        by_server: dict[str, list[Measurements]] = {}
        for measured in found:
            if len(measured.values):
                by_server.setdefault(measured.server_id, []).append(measured)
        return by_server

    async def _computed(self, measured: Measurements, question: Question) -> pb.Capacity:
        limit = arguments.limit_of(question, measured.metric)
        found = await self._workers.run(partial(capacity_of, measured, limit, question, self._clock.now_ms()))
        self._tally.add(found)
        return found

    def _remember(self, key: _Key, found: tuple[pb.Capacity, ...]) -> list[tuple[_Key, float]]:
        """What is forgotten for it, and when that was found."""
        before = self._remembered.pop(key, None)
        self._kept += max(len(found), 1) - (0 if before is None else max(len(before.found), 1))
        self._remembered[key] = _Remembered(at_s=self._clock.monotonic(), found=found)
        gone = []
        while self._kept > MAX_REMEMBERED:
            forgotten, oldest = self._remembered.popitem(last=False)
            self._kept -= max(len(oldest.found), 1)
            gone.append((forgotten, oldest.at_s))
        return gone


def work_s() -> float:
    """How long to work for the running call."""
    left_s = deadline.remaining_s()
    return MAX_WORK_S if left_s is None else min(MAX_WORK_S, max(left_s, 0.0) * WORK_SHARE)


def check_limit(question: Question, metrics: Sequence[Chosen], name: str) -> None:
    """Raises InvalidArgument where no server has the metric, or the limit makes no sense for one that is meant."""
    if not metrics:
        raise InvalidArgument(f"no server has a metric {name[:255]!r}", field="metric")
    for metric in metrics:
        limit = arguments.limit_of(question, metric)
        if metric.unit == "%":
            arguments.check_within_percent(limit)


def ranked(known: "dict[str, tuple[pb.Capacity, ...]]", until_ms: int) -> RankCapacityResponse:
    """Those that are past the limit or reach it by then, in order; a count of the others for each reason."""
    listed: list[tuple[float, pb.Capacity]] = []
    others: dict[int, int] = {}
    incomplete: dict[str, None] = {}
    for found in known.values():
        if not found:
            others[pb.CAPACITY_REASON_NO_DATA] = others.get(pb.CAPACITY_REASON_NO_DATA, 0) + 1
        for capacity in found:
            incomplete |= dict.fromkeys(capacity.incomplete)
            when_ms = reached_ms(capacity)
            if when_ms <= until_ms:
                listed.append((when_ms, capacity))
            else:
                others[capacity.reason] = others.get(capacity.reason, 0) + 1
    listed.sort(key=lambda pair: (pair[0], pair[1].server_id, pair[1].metric))
    return RankCapacityResponse(
        capacities=[capacity for _, capacity in listed],
        others=[
            pb.CapacityCount(reason=pb.CapacityReason.ValueType(reason), series=count)
            for reason, count in sorted(others.items())
        ],
        incomplete=incomplete,
    )


def reached_ms(capacity: pb.Capacity) -> float:
    """When the limit is reached, in order: past is before all dates, never behind them."""
    if capacity.HasField("date"):
        return ms_from_timestamp(capacity.date)
    return -math.inf if capacity.reason == pb.CAPACITY_REASON_PAST_LIMIT else math.inf
