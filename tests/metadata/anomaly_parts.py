"""Findings as tests tell them, and what must come back of them."""

import math
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from fleet.anomaly import Anomaly, Contribution, finding_id
from runtime.clock import SystemClock
from runtime.errors import Unavailable
from services.metadata.anomalies.model import Recorded
from services.metadata.anomalies.query import AnomalyFilter
from services.metadata.anomalies.store import AnomalyStore
from tests.metadata.parts import Parts

NOON_MS = 1_790_000_000_000
MINUTE_MS = 60_000
EVERYTHING = AnomalyFilter()
HITS = 12


def anomaly(server_id: str = "web-1", minute: int = 0, detector: str = "departure", **fields: object) -> Anomaly:
    start_ms = NOON_MS + minute * MINUTE_MS
    part = Contribution(metric="cpu_usage", value=99.5, expected_low=math.nan, expected_high=30.0, score=0.75)
    made = Anomaly(
        id=finding_id(server_id, detector, start_ms),
        server_id=server_id,
        metric="cpu_usage",
        start_ms=start_ms,
        end_ms=None,
        peak_ms=start_ms,
        score=0.5,
        value=math.inf,
        expected_low=-0.1,
        expected_high=0.1 + 0.2,
        detector=detector,
        contributions=(part, replace(part, metric='disk{path="C:\\"}', score=0.0)),
    )
    return replace(made, **fields)  # type: ignore[arg-type]


async def store_of(parts: Parts) -> AnomalyStore:
    return await AnomalyStore.opened(parts.database, parts.facts, SystemClock())


@asynccontextmanager
async def lagging(parts: Parts) -> AsyncIterator[None]:
    """PostgreSQL answers and takes nothing in."""
    async with parts.database.connection() as connection, connection.transaction():
        await connection.execute("LOCK TABLE anomalies, anomaly_remarks IN EXCLUSIVE MODE")
        yield


def shape(known: Recorded) -> str:
    """All of it, NaN equal to itself."""
    return repr(known)


async def listed(store: AnomalyStore, filters: AnomalyFilter = EVERYTHING, size: int = 25) -> list[Recorded]:
    """All that match; totals and staleness agree from page to page."""
    found: list[Recorded] = []
    totals, token = set(), ""
    while True:
        try:
            page = await store.listing(filters, page_size=size, page_token=token)
        except Unavailable as error:
            assert error.reason == "OLDER_UNAVAILABLE"
            return found
        found += page.items
        totals.add(page.total_size)
        if not (token := page.next_page_token):
            assert totals == {len(found)}
            return found


def wanted(known: Recorded, filters: AnomalyFilter) -> bool:
    """What the filters mean, said once more."""
    one = known.anomaly
    assert one is not None
    verdict = "none" if known.verdict is None else "real" if known.verdict.is_real else "false"
    return all(
        (
            filters.server_id in {"", one.server_id},
            filters.server_ids is None or one.server_id in filters.server_ids,
            filters.start_us is None or one.end_ms is None or one.end_ms * 1_000 >= filters.start_us,
            filters.end_us is None or one.start_ms * 1_000 < filters.end_us,
            filters.detector in {"", one.detector},
            not filters.metric or any(part.metric == filters.metric for part in one.contributions),
            one.score >= filters.min_score,
            filters.open is None or filters.open == (one.end_ms is None),
            filters.acknowledged is None or filters.acknowledged == (known.acknowledged is not None),
            filters.verdict in {"", verdict},
        )
    )


def random_filter(rng: random.Random) -> AnomalyFilter:
    some: dict[str, object] = {
        "server_id": rng.choice(["a", "b", "none"]),
        "server_ids": rng.choice([(), ("a",), ("a", "c", "none")]),
        "start_us": (NOON_MS + rng.randrange(60) * MINUTE_MS) * 1_000,
        "end_us": (NOON_MS + rng.randrange(60, 90) * MINUTE_MS) * 1_000,
        "detector": rng.choice(["departure", "silence", "' OR true --"]),
        "metric": rng.choice(["cpu_usage", 'disk{path="C:\\"}', "none"]),
        "min_score": rng.choice([0.25, 0.5]),
        "open": rng.choice([True, False]),
        "acknowledged": rng.choice([True, False]),
        "verdict": rng.choice(["none", "real", "false"]),
    }
    return AnomalyFilter(**{name: some[name] for name in rng.sample(sorted(some), rng.randrange(1, 4))})  # type: ignore[arg-type]


class Scene:
    """Findings of three servers that begin, grow and end, and people who say something of them."""

    def __init__(self, store: AnomalyStore) -> None:
        self._store = store
        self._rng = random.Random(7)
        self.known: dict[str, Recorded] = {}
        self.asked = [EVERYTHING, *(random_filter(self._rng) for _ in range(24))]

    async def play(self, events: int) -> None:
        rng = self._rng
        for _ in range(events):
            ids = sorted(self.known)
            if len(ids) < 20 or rng.random() < 0.3:
                one = anomaly(
                    rng.choice("abc"), rng.randrange(90), rng.choice(["departure", "silence"]), value=1.0, metric="m"
                )
                if rng.random() < 0.3:
                    one = replace(one, contributions=one.contributions[:1], score=0.125)
                if one.id in self.known:
                    continue
                await self._tell(one)
            elif rng.random() < 0.5:
                one_id = rng.choice(ids)
                before = self.known[one_id].anomaly
                assert before is not None
                if before.end_ms is None:
                    await self._tell(before.changed(**rng.choice([{"score": 0.9}, {"end_ms": before.start_ms + 1}])))
            else:
                said = await self._store.remark(
                    rng.choice(ids), is_real=rng.choice([None, True, False]), author="ada", comment=str(rng.random())
                )
                assert said.anomaly is not None
                self.known[said.anomaly.id] = said

    async def _tell(self, one: Anomaly) -> None:
        await self._store.record([one])
        self.known[one.id] = await self._store.get(one.id)

    async def check(self) -> None:
        """Every listing and every single finding is as it was told."""
        hits = 0
        for filters in self.asked:
            expected = sorted(
                (one for one in self.known.values() if wanted(one, filters)), key=lambda one: one.place, reverse=True
            )
            found = await listed(self._store, filters)
            assert [shape(one) for one in found] == [shape(one) for one in expected], filters
            hits += len(expected) not in {0, len(self.known)}
        assert hits > HITS
        for one_id, one in self.known.items():
            assert shape(await self._store.get(one_id)) == shape(one)
