"""The page before services that are played: what the real ones say only at rare moments."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from fleet.anomaly import anomaly_to_pb
from gateway import web
from openmanager.fleet.v1 import status_pb2
from openmanager.gateway.v1 import access_pb2, analytics_pb2, fleet_pb2, options_pb2, storage_pb2
from runtime.prepared import Prepared
from tests.gateway.http.serving import serving
from tests.harness import eventually
from tests.harness.findings import finding
from tests.web.browser import Browser
from tests.web.guarded import SHOWN_WITHIN_S

pytestmark = pytest.mark.full


class Quiet:
    """A fleet in which nothing changes, so that its entity tag stays, and a cache that is followed or not."""

    age = "30"

    async def GetCaller(self, _request: Any, _context: Any) -> Any:
        return access_pb2.GetCallerResponse(name="Ada", role=options_pb2.ROLE_ADMIN)

    async def GetFleetSummary(self, _request: Any, context: Any) -> Any:
        if self.age:
            context.set_trailing_metadata((("age", self.age),))
        summary = fleet_pb2.GetFleetSummaryResponse(summary=fleet_pb2.FleetSummary(total=7))
        return Prepared(summary.SerializeToString(), etag="e-1")

    async def WatchFleet(self, _request: Any, _context: Any) -> AsyncIterator[Any]:
        yield fleet_pb2.WatchFleetResponse(snapshot=True, version="e-1", servers=[fleet_pb2.Server(id="web-1")])
        await asyncio.get_running_loop().create_future()

    async def GetStorageStatus(self, _request: Any, _context: Any) -> Any:
        full = [("engine", "primary"), ("postgresql", "embedded"), ("postgresql", "primary")]
        stores = [
            status_pb2.StoreStatus(name=name, role=role, address=f"{role}:1", server_version="1") for name, role in full
        ]
        return storage_pb2.GetStorageStatusResponse(stores=stores)


def played_by(fleet: Quiet) -> dict[str, object]:
    return dict.fromkeys(("FleetService", "AccessService", "StorageService"), fleet)


async def test_a_disk_of_ours_that_is_full_is_told_from_one_that_nobody_sees(browser: Browser) -> None:
    async with serving(extra=web.routes(), servicers=played_by(Quiet())) as served:
        with browser.page() as page:
            await asyncio.to_thread(page.open, f"http://{served.address}/")
            shown = "[...document.querySelectorAll('#stores-rows tr')].map((row) => row.cells[4].textContent)"
            three = f"(() => {{ const cells = {shown}; return cells.length === 3 && cells; }})()"
            assert await asyncio.to_thread(page.within, SHOWN_WITHIN_S, three) == ["0 B", "0 B", "–"]


async def test_a_fleet_that_is_followed_again_is_not_said_to_be_old(browser: Browser) -> None:
    """A 304 has no `Age`, and leaves the one of the answer that the browser has."""
    fleet = Quiet()
    async with serving(extra=web.routes(), servicers=played_by(fleet)) as served:
        with browser.page() as page:
            await asyncio.to_thread(page.open, f"http://{served.address}/")
            old = "document.querySelector('#banners').textContent.includes('does not hear from the cache')"
            await asyncio.to_thread(page.within, SHOWN_WITHIN_S, old)
            fleet.age = ""
            await asyncio.to_thread(page.within, SHOWN_WITHIN_S, f"!{old}")
            assert await asyncio.to_thread(page.text, "#live-text") == "Live"


class Foreseen(Quiet):
    """Of one server it is likely that it fails, and analytics watches less than there is."""

    age = ""

    async def WatchFleet(self, _request: Any, _context: Any) -> AsyncIterator[Any]:
        told = [
            anomaly_to_pb(replace(finding("web-1", 1_790_000_000_000 + place, detector="prediction"), **more))
            for place, more in enumerate(({"metric": "", "contributions": ()}, {}))
        ]
        yield fleet_pb2.WatchFleetResponse(
            snapshot=True, version="e-1", servers=[fleet_pb2.Server(id="web-1")], anomalies=told
        )
        await asyncio.get_running_loop().create_future()

    async def ListAnomalies(self, _request: Any, _context: Any) -> Any:
        return analytics_pb2.ListAnomaliesResponse(learned=1.0, partly_judged=True)


async def test_what_is_foreseen_is_told_from_what_is_abnormal_and_that_not_all_is_judged(browser: Browser) -> None:
    played = played_by(fleet := Foreseen()) | {"AnalyticsService": fleet}
    async with serving(extra=web.routes(), servicers=played) as served:
        with browser.page() as page:
            await asyncio.to_thread(page.open, f"http://{served.address}/")
            words = "[...document.querySelectorAll('#findings .what')].map((cell) => cell.textContent)"
            two = f"(() => {{ const words = {words}; return words.length === 2 && words; }})()"
            shown = await asyncio.to_thread(page.within, SHOWN_WITHIN_S, two)
            assert shown == ["likely to fail: cpu_usage", "likely to fail"]
            lacks = "Not all metrics are judged: analytics watches as many as it may."
            said = f"document.querySelector('#findings-said').textContent.endsWith('{lacks}')"
            await asyncio.to_thread(page.within, SHOWN_WITHIN_S, said)


async def test_a_stream_that_falls_silent_is_opened_anew_by_a_clock_that_is_set_back(browser: Browser) -> None:
    fleet = Quiet()
    fleet.age = ""
    async with serving(extra=web.routes(), servicers=played_by(fleet)) as served:
        with browser.page() as page:
            await asyncio.to_thread(page.open, f"http://{served.address}/")
            # All of it: what the stream tells after the clock is set back would have the new time.
            told = "document.querySelector('#servers a')?.textContent === 'web-1'"
            await asyncio.to_thread(page.within, SHOWN_WITHIN_S, told)
            before = len(page.requests)
            back = "(() => { const now = Date.now; Date.now = () => now() - 3_600_000; })()"
            await asyncio.to_thread(page.value, back)

            def opened_anew() -> bool:
                assert any("/fleet/watch" in request for request in page.requests[before:]), page.requests
                return True

            await eventually(opened_anew, within_s=20)
