"""Who goes on with a watch and has another scope by then: a browser reconnects with the id that it has."""

from collections.abc import Iterator
from contextlib import aclosing, contextmanager

import pytest

from fleet.access import VIEWER, Caller, Scope
from openmanager.gateway.v1 import analytics_pb2 as pb
from runtime import caller
from tests.gateway.played_findings import gateway, known_to
from tests.gateway.played_fleet import server_state, world
from tests.harness import eventually

ALL, WEBS, DBS = None, Scope.of((), ("web",), ()), Scope.of((), ("db",), ())
SEEN = {ALL: ["db-1", "web-1"], WEBS: ["web-1"], DBS: ["db-1"]}


@contextmanager
def seeing(scope: Scope | None) -> Iterator[None]:
    token = caller.current.set(Caller.of("ada", VIEWER, "session", scope=scope))
    try:
        yield
    finally:
        caller.current.reset(token)


@pytest.mark.parametrize("after", [ALL, WEBS, DBS])
@pytest.mark.parametrize("before", [ALL, WEBS, DBS])
async def test_a_watcher_of_the_fleet_has_what_he_sees_now(before: Scope | None, after: Scope | None) -> None:
    async with world() as made:
        made.cache.send(server_state("web-1", role="web"), server_state("db-1", role="db"), snapshot=True)
        await eventually(made.caught_up)
        with seeing(before):
            async with made.watch() as watch:
                await watch.next()
                assert sorted(watch.known) == SEEN[before]
                assert watch.version.partition("@")[0] == made.state.version  # of every gateway process, too
        known, version = watch.known, watch.version
        made.cache.send(server_state("web-1", role="web"), server_state("db-1", role="db"))
        await eventually(made.caught_up)
        with seeing(after):
            async with made.watch(after_version=version) as watch:
                watch.known.update(known)
                message = await watch.next()
                assert sorted(watch.known) == SEEN[after] and message.snapshot == (before != after)


async def test_a_watcher_of_findings_who_sees_all_by_now_is_told_all_that_go_on() -> None:
    async with gateway() as made:  # a goes on at web-1, b at db-1
        task = await known_to(made)
        findings = made.world.findings
        async with aclosing(findings.watch(lambda one: one == "web-1", "", by_place=True, mark=WEBS.mark)) as messages:
            first = await anext(messages)
        assert [one.server_id for one in first.anomalies] == ["web-1"]
        stream = made.stub.WatchAnomalies(pb.WatchAnomaliesRequest(after_version=first.version))
        again = await stream.read()
        assert again.snapshot and sorted(one.server_id for one in again.anomalies) == ["db-1", "web-1"]
        stream.cancel()
        task.cancel()
