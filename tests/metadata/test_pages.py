"""Listings of a stretch of time over HTTP, with a clock that moves: the same query string and the token go on."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from fleet.anomaly import Anomaly, finding_id
from gateway.findings import Findings
from gateway.servicers.anomalies import AnomalyServicer
from gateway.state import FleetState
from runtime.channel import Channel
from runtime.clock import ManualClock, SystemClock
from runtime.interception import Interception
from runtime.server import GrpcServer, bind
from services.metadata.anomalies.servicer import ANOMALY_STORE, AnomalyStoreServicer
from services.metadata.anomalies.store import AnomalyStore
from services.metadata.audit.servicer import AuditServicer
from services.metadata.interactions_servicer import AiInteractionServicer
from services.metadata.queries import instant_of
from services.metadata.store import NewInteraction
from tests.gateway.http.serving import Answer, Served, serving
from tests.harness.postgres import PostgresServer
from tests.metadata.audit_parts import Audit, Writer, auditing
from tests.metadata.parts import Parts

NOW_MS = 1_790_000_000_000
MINUTE_MS = 60_000
ROWS = 10
"""Of each listing in the last hour: 3, 8, ... 48 minutes old."""


@asynccontextmanager
async def findings_behind(store: AnomalyStore) -> AsyncIterator[AnomalyServicer]:
    """The gateway's findings with the record behind them, and nobody else."""
    inner = GrpcServer([bind(ANOMALY_STORE, AnomalyStoreServicer(store))], Interception())
    async with Channel(await inner.start("127.0.0.1:0")) as metadata:
        state = FleetState(metadata, SystemClock())
        findings = Findings(metadata, state, SystemClock())
        yield AnomalyServicer(metadata, metadata, state, findings, SystemClock())
    await inner.stop(0)


class Listings:
    """All of them behind the HTTP server, in each a row every five minutes, and more of them when the clock moves."""

    def __init__(self, served: Served, audit: Audit, findings: AnomalyStore, clock: ManualClock) -> None:
        self._served = served
        self._audit = audit
        self._findings = findings
        self._writer = Writer()
        self.clock = clock

    @property
    def _parts(self) -> Parts:
        return self._audit.parts

    async def filled(self, *minutes_ago: int) -> None:
        """Rows of so many minutes ago."""
        for minutes in minutes_ago:
            at_ms = self.clock.now_ms() - minutes * MINUTE_MS
            made = await self._parts.store.record_interaction(NewInteraction(query=f"disk {at_ms}", session_id="s"))
            await self._parts.all_inserted()
            async with self._parts.database.connection() as connection:
                at = instant_of(at_ms * 1_000)
                await connection.execute("UPDATE ai_interactions SET created_at = $1 WHERE id = $2", at, made.id)
            await self._audit.ship(self._writer.make(1, time_us=at_ms * 1_000))
            await self._findings.record([found(at_ms)])
        await self._parts.all_inserted()

    async def get(self, path: str) -> Answer:
        return await self._served.get(path)


def found(at_ms: int) -> Anomaly:
    return Anomaly(
        id=finding_id("s", "departure", at_ms),
        server_id="s",
        metric="cpu",
        start_ms=at_ms,
        end_ms=at_ms,
        peak_ms=at_ms,
        score=1.0,
        value=9.0,
        expected_low=1.0,
        expected_high=2.0,
        detector="departure",
    )


@pytest.fixture
async def listings(embedded_server: PostgresServer, tmp_path: Any) -> AsyncIterator[Listings]:
    clock = ManualClock(NOW_MS)
    auditor = auditing(await embedded_server.fresh_database(), embedded_server, tmp_path)
    async with auditor as audit, AsyncExitStack() as stack:
        findings = await AnomalyStore.opened(audit.parts.database, audit.parts.facts, SystemClock())
        behind = await stack.enter_async_context(findings_behind(findings))
        servicers = {
            "AiInteractionService": AiInteractionServicer(audit.parts.store),
            "AuditService": AuditServicer(audit.keeper, audit.store),
            "AnalyticsService": behind,
        }
        async with serving(clock=clock, servicers=servicers) as served:
            made = Listings(served, audit, findings, clock)
            await made.filled(*range(-2 + 5 * ROWS, 0, -5), 70)
            yield made


@pytest.mark.parametrize(
    ("path", "rows"),
    [
        ("/v1/ai/interactions?session_id=s", "interactions"),
        ("/v1/ai/interactions:search?query=disk", "interactions"),
        ("/v1/audit?action=/openmanager.gateway.v1.FleetService/UpdateServer", "events"),
        ("/v1/anomalies?server_id=s", "anomalies"),
    ],
)
async def test_the_last_hour_goes_on_while_time_does(listings: Listings, path: str, rows: str) -> None:
    """The second page is asked for so late that the hour before it has nothing of the first page's hour."""
    for times in ("start_time=-1h&end_time=now", "start_time=-1h", "start_time=-1h&end_time=2026-09-21T14:13:20Z"):
        asked, seen, token = f"{path}&{times}&page_size=4", [], ""
        first_hour = await whole(listings, f"{path}&{times}", rows)
        assert len(first_hour) >= ROWS
        while True:
            answer = await listings.get(asked + (f"&page_token={token}" if token else ""))
            assert answer.status == 200, answer.body
            seen += [row["id"] for row in answer.json()[rows]]
            if not (token := answer.json()["nextPageToken"]):
                break
            listings.clock.advance(timedelta(minutes=61).total_seconds())
            await listings.filled(1)
        assert seen == first_hour
        listings.clock.set_now_ms(NOW_MS)


async def whole(listings: Listings, path: str, rows: str) -> list[str]:
    return [row["id"] for row in (await listings.get(path)).json()[rows]]


@pytest.mark.parametrize("path", ["/v1/ai/interactions", "/v1/audit", "/v1/anomalies"])
async def test_what_was_given_is_given_again(listings: Listings, path: str) -> None:
    """With a token, an absolute time does not say anything new; leaving one out, or adding one, is another question."""
    first = (await listings.get(f"{path}?start_time=-1h&page_size=4")).json()
    going_on = f"{path}?page_size=4&page_token={first['nextPageToken']}"
    second = (await listings.get(f"{going_on}&start_time=-1h")).json()
    for start in ("-1m", "2001-01-01T00:00:00Z", "now"):
        assert (await listings.get(f"{going_on}&start_time={start}")).json() == second
    for times in ("", "&end_time=now", "&start_time=-1h&end_time=now"):
        refused = await listings.get(going_on + times)
        assert (refused.status, refused.field()) == (400, "page_token")
