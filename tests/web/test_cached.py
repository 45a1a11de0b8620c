"""What a browser keeps of answers, by itself, is not taken for what the gateway says now."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway import web
from openmanager.gateway.v1 import access_pb2, fleet_pb2, options_pb2
from runtime.prepared import Prepared
from tests.gateway.http.serving import serving
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
        yield fleet_pb2.WatchFleetResponse(snapshot=True, version="e-1")
        await asyncio.get_running_loop().create_future()


async def test_a_fleet_that_is_followed_again_is_not_said_to_be_old(browser: Browser) -> None:
    """A 304 has no `Age`, and leaves the one of the answer that the browser has."""
    fleet = Quiet()
    services = {"FleetService": fleet, "AccessService": fleet}
    async with serving(extra=web.routes(), servicers=services) as served:
        with browser.page() as page:
            await asyncio.to_thread(page.open, f"http://{served.address}/")
            old = "document.querySelector('#banners').textContent.includes('does not hear from the cache')"
            await asyncio.to_thread(page.within, SHOWN_WITHIN_S, old)
            fleet.age = ""
            await asyncio.to_thread(page.within, SHOWN_WITHIN_S, f"!{old}")
            assert await asyncio.to_thread(page.text, "#live-text") == "Live"
