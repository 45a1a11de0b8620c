"""A database that is dead, slow or silent: who pays for it, what is read meanwhile, and what is there afterwards."""

import asyncio
import itertools
import random
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import apsw
import pytest

from fleet.model import ServerDescriptor
from openmanager.gateway.v1 import ai_pb2
from openmanager.metadata.v1 import metadata_pb2 as pb
from runtime.channel import calling
from runtime.circuit import CircuitState
from runtime.errors import NotFound, OpenManagerError, Unavailable
from services.metadata.queries import ServerQuery
from services.metadata.store import NewInteraction, ServerFilter
from services.metadata.store_connection import Bounds
from services.metadata.store_postgres import PostgresStore
from services.metadata.target import DatabaseTarget, target_of_url
from tests.harness import eventually
from tests.harness.fault_proxy import FaultProxy, fault_proxy
from tests.harness.postgres import PostgresServer
from tests.metadata.parts import EVERYTHING, Parts, opened
from tests.metadata.service import DOWN, Recorder, caught_up, postmasters, registers, running, server
from tests.metadata.test_connection import QUICK
from tests.metadata.test_failover import has_at_least, ids_in

DELAY_S = 5.0
CALLERS = 10
WATCHED_S = 3.0
"""How long it is seen that nobody waits any more: several time-outs."""
WATCHED_CALLS = 600
"""And of how many calls; if each waited for a time-out there would be 40 in that time."""


def descriptor(server_id: str, **fields: str) -> ServerDescriptor:
    return ServerDescriptor(server_id=server_id, hostname=fields.pop("hostname", server_id), **fields)


def through(postgres: PostgresServer, target: DatabaseTarget, proxy: FaultProxy) -> DatabaseTarget:
    name = target.address.rpartition("/")[2]
    return target_of_url(postgres.url(name).replace(f":{postgres.admin['port']}/", f":{proxy.port}/"))


async def copied(parts: Parts, servers: int) -> None:
    """Waits until the copy has so many servers, deleted ones too."""

    async def there() -> bool:
        wanted = replace(EVERYTHING, show_deleted=True)
        return parts.copy.as_of is not None and (await parts.copy.list(wanted))[1] == servers

    await eventually(there)


async def until_fresh(parts: Parts) -> None:
    async def fresh() -> bool:
        return (await parts.store.list_servers(ServerFilter())).stale_since is None

    await eventually(fresh)


async def slow(proxy: FaultProxy) -> None:
    proxy.delay_s = DELAY_S


async def silent(proxy: FaultProxy) -> None:
    proxy.half_open()


async def cut(proxy: FaultProxy) -> None:
    await proxy.cut()


@pytest.mark.fault("PostgreSQL away")
@pytest.mark.parametrize(
    "fault", [slow, pytest.param(silent, marks=pytest.mark.full), pytest.param(cut, marks=pytest.mark.full)]
)
async def test_the_first_callers_pay_and_nobody_after_them(
    debian_server: PostgresServer, tmp_path: Path, fault: Callable[[FaultProxy], Awaitable[None]]
) -> None:
    real = await debian_server.fresh_database()
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(fault_proxy(debian_server.admin["port"]))
        parts = await stack.enter_async_context(opened(through(debian_server, real, proxy), tmp_path, bounds=QUICK))
        store = parts.store

        async def registered(*names: str) -> bool:
            try:
                await store.register_servers([descriptor(name) for name in names])
            except Unavailable:
                return False
            return True

        await eventually(lambda: registered("a", "b"))
        await copied(parts, 2)
        took: list[float] = []
        failures: list[OpenManagerError] = []

        async def caller(stop: asyncio.Event) -> None:
            made = 0
            while not stop.is_set():
                made += 1
                for call in (
                    lambda: store.list_servers(ServerFilter()),
                    lambda: store.get_server("a"),
                    lambda: store.record_interaction(NewInteraction(query="why?")),
                ):
                    started = time.monotonic()
                    try:
                        await call()
                    except OpenManagerError as error:
                        failures.append(error)
                    took.append(time.monotonic() - started)
                    await asyncio.sleep(0.002)

        stop = asyncio.Event()
        callers = [asyncio.create_task(caller(stop)) for _ in range(CALLERS)]
        await eventually(lambda: len(took) > 100)
        usual_s = sorted(took)[int(len(took) * 0.9)]
        await fault(proxy)
        began = time.monotonic()
        with pytest.raises(Unavailable):
            await store.register_servers([descriptor("c")])
        await eventually(lambda: parts.database.circuit.state is not CircuitState.CLOSED)
        opened_after_s = time.monotonic() - began
        worst_s, before = max(took), len(took)
        seen: list[CircuitState] = []
        asked, watched_since = proxy.accepted, time.monotonic()
        started = time.monotonic()
        with pytest.raises(Unavailable) as refused:
            await store.register_servers([descriptor("c")])
        at_once_s = time.monotonic() - started

        def watched() -> bool:
            seen.append(parts.database.circuit.state)
            return time.monotonic() - watched_since > WATCHED_S and len(took) > before + CALLERS + WATCHED_CALLS

        await eventually(watched)
        asked_again, watched_s = proxy.accepted - asked, time.monotonic() - watched_since
        stop.set()
        await asyncio.gather(*callers)
        after = sorted(took[before + CALLERS :])  # those that were on their way when it opened are first callers
        assert failures == []
        assert refused.value.reason == "CIRCUIT_OPEN"
        assert CircuitState.CLOSED not in seen
        p90_s = after[int(len(after) * 0.9)]  # a machine that stalls stops all callers at once, a few times
        print(
            f"{fault.__name__}: open after {opened_after_s:.2f} s, worst before {worst_s:.2f} s, then refused in"
            f" {at_once_s * 1e3:.1f} ms, p90 of {len(after)} calls {p90_s * 1e3:.1f} ms, worst {after[-1]:.3f} s,"
            f" {asked_again} connections"
        )
        # They wait for no time-out; 0.8 s and 0.6 s are the bounds of this database.
        assert p90_s < max(QUICK.command_s / 2, 3 * usual_s)
        assert asked_again <= 5 * watched_s, "the keeper backs off"
        await proxy.restore()
        await until_fresh(parts)
        await eventually(lambda: registered("c"))
        await parts.all_inserted()


async def test_the_copy_answers_every_question_as_postgresql_does(parts: Parts) -> None:
    rng = random.Random(5)
    pick = {"environment": ("", "prod", "dev"), "role": ("", "web", "db"), "location": ("", "Zürich", "eu")}
    names = [f"{letter}{number}" for letter in ("a", "B", "é", "z_", "😀") for number in range(12)]
    servers = [descriptor(name, **{field: rng.choice(values) for field, values in pick.items()}) for name in names]
    await parts.store.register_servers(servers)
    for name in rng.sample(names, 15):
        await parts.store.delete_server(name)
    for name in rng.sample(names, 10):
        with_role = descriptor(name, role="new")
        try:
            await parts.store.update_server(with_role, ["role"])
        except NotFound:
            continue
    await copied(parts, 60)
    async with parts.database.connection() as connection:  # by hand, as an operator may
        await connection.execute("DELETE FROM servers WHERE id = 'a1'")
    parts.copy.changed()
    await copied(parts, 59)
    postgres = PostgresStore(parts.database)
    ids = ((), ("a2", "é3", "none", "😀7"))
    pages = 0
    for environment, role, some, deleted, size in itertools.product(
        pick["environment"], ("", "web", "new"), ids, (False, True), (7, 1_000)
    ):
        filters = ServerFilter(environment=environment, role=role, ids=some, show_deleted=deleted)
        token = ""
        while True:
            query = ServerQuery.of(filters, size, token)
            of_postgres = query.page(*await postgres.list_servers(query))
            assert query.page(*await parts.copy.list(query)) == of_postgres
            pages += 1
            if not (token := of_postgres.next_page_token):
                break
    assert pages > 80
    for name in names:
        try:
            found = await postgres.get_server(name)
        except NotFound:
            found = None
        assert await parts.copy.get(name) == found


async def test_a_copy_that_cannot_be_read_is_made_anew(target: DatabaseTarget, tmp_path: Path) -> None:
    (tmp_path / "servers.db").write_bytes(b"no database at all" * 500)
    async with opened(target, tmp_path) as parts:
        await parts.store.register_servers([descriptor("a")])
        await copied(parts, 1)


@pytest.mark.full
async def test_servers_are_read_stale_also_after_a_restart(own_server: PostgresServer, data_dir: Path) -> None:
    name = (await own_server.fresh_database()).address.rpartition("/")[2]
    url = own_server.url(name)
    list_all, get_a = pb.ListServerRecordsRequest(), pb.GetServerRecordRequest(server_id="a")
    async with running(data_dir, DATABASE_URL=url) as service:
        request = pb.RegisterServersRequest(servers=[server("a", role="web"), server("b")])
        await service.servers.RegisterServers(request)
        fresh = await service.servers.ListServerRecords(list_all)
        assert not fresh.HasField("stale_since")

        async def is_copied() -> bool:
            return (data_dir / "metadata" / "servers.db").exists() and "b" in await asyncio.to_thread(
                copied_ids, data_dir
            )

        await eventually(is_copied)
        own_server.stop(signal.SIGQUIT)
        stale = await service.servers.ListServerRecords(list_all)
        assert stale.HasField("stale_since")
        assert stale.stale_since.ToMilliseconds() / 1e3 <= time.time()
        assert list(stale.servers) == list(fresh.servers)
        await eventually(lambda: is_down(service))
        assert not await registers(service, "c")
        service.stop(signal.SIGKILL)
    async with running(data_dir, DATABASE_URL=url) as service:
        again = await service.servers.ListServerRecords(list_all)
        assert list(again.servers) == list(fresh.servers)
        assert again.stale_since.ToMilliseconds() <= stale.stale_since.ToMilliseconds() + 10_000
        got = await service.servers.GetServerRecord(get_a)
        assert (got.server.descriptor.role, got.HasField("stale_since")) == ("web", True)
        with pytest.raises(Unavailable):
            async with calling("metadata"):
                await service.servers.GetServerRecord(pb.GetServerRecordRequest(server_id="made-since"))
        own_server.start()

        async def is_fresh() -> bool:
            return not (await service.servers.ListServerRecords(list_all)).HasField("stale_since")

        await eventually(is_fresh)
        assert await registers(service, "c")
        assert await service.size() == 3


def copied_ids(data_dir: Path) -> set[str]:
    with apsw.Connection(str(data_dir / "metadata" / "servers.db")) as db:
        found = db.execute("SELECT id FROM servers").fetchall()
    db.close()
    return {str(one) for (one,) in found}


async def is_down(service: object) -> bool:
    return (await service.status()).state == DOWN  # type: ignore[attr-defined]


@pytest.mark.full
@pytest.mark.fault("metadata killed while facts wait for PostgreSQL")
async def test_killed_with_9_while_facts_wait_each_is_there_once(own_server: PostgresServer, data_dir: Path) -> None:
    name = (await own_server.fresh_database()).address.rpartition("/")[2]
    acknowledged: list[str] = []
    for life in range(2):
        async with running(data_dir, DATABASE_URL=own_server.url(name)) as service:
            recorder = Recorder(service)
            async with recorder.going_on():
                await eventually(lambda recorder=recorder: len(recorder.acknowledged) > 20)
                if life == 0:
                    own_server.stop(signal.SIGQUIT)
                so_far = len(recorder.acknowledged)
                await eventually(lambda recorder=recorder, n=so_far: len(recorder.acknowledged) > n + 40)
                service.stop(signal.SIGKILL)
            acknowledged += recorder.acknowledged
    own_server.start()
    async with running(data_dir, DATABASE_URL=own_server.url(name)) as service:
        await has_at_least(own_server, name, len(acknowledged))
        await caught_up(service)
    found = await ids_in(own_server, name)
    assert len(found) == len(set(found))
    # What was cut off before its answer may be there, too: one call a life.
    assert set(acknowledged) <= set(found)
    assert len(found) <= len(acknowledged) + 2


@pytest.mark.fault("embedded PostgreSQL killed")
@pytest.mark.full
async def test_the_embedded_database_may_die_while_facts_are_recorded(data_dir: Path, made_cluster: Path) -> None:
    (data_dir / "metadata").mkdir(mode=0o700)
    await asyncio.to_thread(subprocess.run, ["cp", "-a", str(made_cluster), str(data_dir / "metadata")], check=True)
    async with running(data_dir) as service:
        recorder = Recorder(service)
        async with recorder.going_on():
            for _ in range(2):
                so_far = len(recorder.acknowledged)
                await eventually(lambda n=so_far: len(recorder.acknowledged) > n + 30)
                (postmaster,) = postmasters(data_dir)
                postmaster.kill()
                await eventually(lambda: bool(postmasters(data_dir)))
        assert recorder.failures == []

        async def all_listed_fresh() -> bool:
            answer = await service.interactions.ListInteractions(ai_pb2.ListInteractionsRequest(page_size=1))
            status = await service.status()
            fresh = not answer.HasField("stale_since") and status.lag_points == 0
            return fresh and answer.total_size == len(recorder.acknowledged)

        await eventually(all_listed_fresh, 30.0)
        status = await caught_up(service)
        assert status.role == "embedded"
        assert status.spool_bytes > 0
        assert service.stop() == 0


@pytest.mark.full
async def test_a_listing_without_the_database_says_so_over_the_wire(own_server: PostgresServer, data_dir: Path) -> None:
    name = (await own_server.fresh_database()).address.rpartition("/")[2]
    own_server.stop(signal.SIGQUIT)
    async with running(data_dir, DATABASE_URL=own_server.url(name)) as service:
        with pytest.raises(Unavailable) as nothing:
            async with calling("metadata"):
                await service.interactions.ListInteractions(ai_pb2.ListInteractionsRequest())
        assert nothing.value.reason == "OLDER_UNAVAILABLE"
        recorder = Recorder(service)
        made = await recorder.record(session_id="s")
        answer = await service.interactions.ListInteractions(ai_pb2.ListInteractionsRequest(session_id="s"))
        assert [one.id for one in answer.interactions] == [made]
        assert answer.next_page_token
        assert answer.HasField("stale_since")
        await eventually(lambda: is_down(service))

        async def lags() -> bool:
            status = await service.status()
            return (status.lag_points, status.lag_seconds > 0, status.spool_bytes > 0) == (1, True, True)

        await eventually(lags)
        own_server.start()
        await has_at_least(own_server, name, 1)
        await caught_up(service)


@pytest.mark.fault("PostgreSQL away for long, 20 callers")
@pytest.mark.full
@pytest.mark.timeout(600)
async def test_a_long_outage_under_load_catches_up_without_starving_callers(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    target = await own_server.fresh_database()
    async with opened(target, tmp_path, bounds=Bounds()) as parts:
        await parts.store.register_servers([descriptor("a")])
        await copied(parts, 1)
        own_server.stop(signal.SIGQUIT)
        made: set[str] = set()

        async def sender(number: int) -> None:
            for _ in range(2_000):
                made.add((await parts.store.record_interaction(NewInteraction(query="q" * 500))).id)
                if number == 0:
                    await parts.store.list_servers(ServerFilter())

        started = time.monotonic()
        await asyncio.gather(*(sender(number) for number in range(20)))
        rate = len(made) / (time.monotonic() - started)
        assert len(made) == 40_000
        own_server.start()
        took: list[float] = []
        started = time.monotonic()
        while (await parts.facts.backlog()).waiting:
            began = time.monotonic()
            page = await parts.store.list_servers(ServerFilter())
            took.append(time.monotonic() - began)
            assert len(page.items) == 1
        seconds = time.monotonic() - started
        took.sort()
        print(
            f"{rate:.0f} facts/s recorded, 40,000 caught up in {seconds:.1f} s, reads meanwhile: p50"
            f" {took[len(took) // 2] * 1e3:.1f} ms, p99 {took[int(len(took) * 0.99)] * 1e3:.1f} ms"
        )
        async with parts.database.connection() as connection:
            found = [str(row["id"]) for row in await connection.fetch("SELECT id FROM ai_interactions")]
        assert len(found) == 40_000
        assert set(found) == made
