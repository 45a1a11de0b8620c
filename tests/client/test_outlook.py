"""What is to come, from gateways that answer in pages and little by little."""

import asyncio
import json
from typing import Any

from client import OpenManager, outlook
from client.command.outlook import MAX_VAIN
from openmanager.fleet.v1 import outlook_pb2
from openmanager.gateway.v1 import analytics_pb2 as pb
from tests.client.calling import OnTerminal, called, serving


class FakeAnalytics:
    """Has five servers, and looks at `a_call` of them each time; two on a page."""

    def __init__(self, a_call: int = 5) -> None:
        self.a_call = a_call
        self.looked_at = 0
        self.asked: list[Any] = []

    async def ListCapacity(self, request: Any, _context: object) -> pb.ListCapacityResponse:
        self.asked.append(request)
        if not request.page_token:
            self.looked_at = min(5, self.looked_at + self.a_call)
        first = int(request.page_token or 0)
        shown = [outlook_pb2.Capacity(server_id=f"s-{number}") for number in range(first, self.looked_at)][:2]
        following = first + len(shown)
        return pb.ListCapacityResponse(
            capacities=shown,
            next_page_token=str(following) if following < self.looked_at else "",
            total_size=self.looked_at,
            servers=self.looked_at,
            pending_servers=5 - self.looked_at,
        )

    async def ForecastMetric(self, request: Any, _context: object) -> pb.ForecastMetricResponse:
        self.asked.append(request)
        return pb.ForecastMetricResponse(forecast=outlook_pb2.Forecast(server_id=request.server_id, values=[1, 2]))


async def test_all_pages_are_one_list() -> None:
    fake = FakeAnalytics()
    async with serving(fake) as address, OpenManager.connect(address) as manager:
        found = await outlook.fleet_capacity(manager, "m", limit=0, growth=0.2, within_s=86_400, role="db")
        assert [capacity.server_id for capacity in found.capacities] == [f"s-{number}" for number in range(5)]
        assert (found.total_size, found.next_page_token) == (5, "")
        assert len(fake.asked) == 3 and {request.within.seconds for request in fake.asked} == {86_400}
        assert {(request.metric, request.HasField("limit"), request.role) for request in fake.asked} == {
            ("m", True, "db")
        }


async def test_a_forecast() -> None:
    fake = FakeAnalytics()
    async with serving(fake) as address, OpenManager.connect(address) as manager:
        assert list((await outlook.forecast(manager, "web-01", "m", horizon_s=7_200, step_s=300)).values) == [1, 2]
        assert (fake.asked[0].horizon.seconds, fake.asked[0].step.seconds) == (7_200, 300)
        await outlook.forecast(manager, "web-01", "m")
        assert not fake.asked[1].HasField("horizon")


async def test_the_command_asks_until_all_servers_were_looked_at() -> None:
    fake = FakeAnalytics(a_call=2)
    async with serving(fake) as address:
        done = await asyncio.to_thread(called, address, "capacity", "--output", "json")
        assert done.returncode == 0 and done.stderr == ""
        assert len(json.loads(done.stdout)["capacities"]) == 5
        fake.looked_at = 0

        def on_terminal() -> str:
            with OnTerminal(address, "capacity") as terminal:
                assert terminal.ended() == 0
                return terminal.shown

        shown = await asyncio.to_thread(on_terminal)
        assert "2 of 5 servers looked at" in shown and "5 of 5 servers" in shown.splitlines()[-7]


async def test_the_command_gives_up_where_nothing_more_is_looked_at() -> None:
    fake = FakeAnalytics(a_call=0)
    async with serving(fake) as address:
        done = await asyncio.to_thread(called, address, "capacity")
        assert (done.returncode, done.stdout) == (1, "")
        assert "5 servers could not be looked at" in done.stderr and len(fake.asked) == MAX_VAIN
