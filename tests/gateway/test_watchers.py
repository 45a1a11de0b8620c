"""How many may watch at once, and that one caller leaves places to others."""

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fleet.access import ADMIN, VIEWER, Caller
from gateway import changes, findings
from openmanager.gateway.v1 import fleet_pb2
from runtime import caller
from runtime.errors import ResourceExhausted
from tests.gateway.played_fleet import World, server_state, world
from tests.harness import eventually

Watch = Callable[[World], AsyncGenerator[Any, None]]
WATCHES: dict[str, Watch] = {
    "the fleet": lambda made: made.servicer.WatchFleet(fleet_pb2.WatchFleetRequest(), None),
    "findings": lambda made: made.findings.watch(lambda _: True, ""),
}
GRACE = Caller.of("Grace", VIEWER, "session", token_id="3")
HOLDER = Caller.of("token-holder", ADMIN, "token")


def ada(token_id: str) -> Caller:
    return Caller.of("Ada", VIEWER, "token", token_id=token_id)


@contextmanager
def calling(who: Caller) -> Iterator[None]:
    token = caller.current.set(who)
    try:
        yield
    finally:
        caller.current.reset(token)


@pytest.mark.parametrize("kind", WATCHES)
async def test_one_caller_leaves_half_of_the_places_to_others(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With whatever tokens and sessions he has: he could blind everybody else."""
    for module in (changes, findings):
        monkeypatch.setattr(module, "MAX_WATCHERS", 4)
    async with world() as made:
        made.cache.send(server_state("web-1"), snapshot=True)
        await eventually(made.caught_up)
        made.findings.version = 1
        begun = []

        async def begin(who: Caller) -> None:
            with calling(who):
                watch = WATCHES[kind](made)
                begun.append(watch)
                await anext(watch)

        async def refused(who: Caller) -> str:
            with pytest.raises(ResourceExhausted) as caught:
                await begin(who)
            assert caught.value.metadata["limit"] == "MAX_WATCHERS"
            return caught.value.message

        await begin(ada("1"))
        await begin(ada("2"))
        assert "2 clients of Ada" in await refused(ada("2"))
        await begin(GRACE)
        await begin(HOLDER)
        assert "4 clients" in await refused(HOLDER)
        for watch in begun:
            await watch.aclose()
        for _ in range(4):  # an administrator's programs, who are one caller
            await begin(HOLDER)
        for watch in begun:
            await watch.aclose()
