"""Facts reach PostgreSQL once, whatever happens on the way: refusals, deaths between two notes, another database."""

import asyncio
import dataclasses
import signal
import threading
from pathlib import Path
from uuid import uuid4

import orjson
import pytest

from runtime.clock import SystemClock
from runtime.errors import NotFound, OpenManagerError, ResourceExhausted, Unavailable
from services.metadata import facts as facts_module
from services.metadata import interactions
from services.metadata.facts import Facts
from services.metadata.journal import Fact, Journal
from services.metadata.kinds import KINDS, FactKind
from services.metadata.line import UNSAID, Position
from services.metadata.store import InteractionFilter, NewInteraction
from services.metadata.store_connection import Database
from services.metadata.target import DatabaseTarget, target_of_url
from tests.harness import eventually
from tests.harness.postgres import PostgresServer
from tests.metadata.parts import LIMIT_BYTES, PATIENT, Parts, opened

ALL = InteractionFilter()


async def in_database(parts: Parts) -> list[str]:
    async with parts.database.connection() as connection:
        return [str(row["id"]) for row in await connection.fetch("SELECT id FROM ai_interactions")]


async def forbid(parts: Parts, condition: str) -> None:
    async with parts.database.connection() as connection:
        await connection.execute(f"ALTER TABLE ai_interactions ADD CONSTRAINT forbidden CHECK ({condition})")


def fact(query: str, fact_id: str = "") -> Fact:
    made = interactions.checked_fact(NewInteraction(id=fact_id, query="placeholder"), 1_700_000_000_000_000)
    return dataclasses.replace(made, payload=made.payload.replace("placeholder", query))


async def dead(folder: Path) -> dict[str, str]:
    def read() -> dict[str, str]:
        journal = Journal(folder / "facts.db")
        try:
            return {letter.fact.id: letter.reason for letter in journal.dead_letters()}
        finally:
            journal.close()

    return await asyncio.to_thread(read)


@pytest.mark.fault("PostgreSQL refuses a fact")
async def test_a_refused_fact_is_a_dead_letter_and_holds_nobody_up(
    parts: Parts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await forbid(parts, "query <> 'refused'")
    good = [await parts.store.record_interaction(NewInteraction(query=f"{n}")) for n in range(20)]
    bad = await parts.store.record_interaction(NewInteraction(query="refused", response="between you and me"))
    good += [await parts.store.record_interaction(NewInteraction(query=f"{n}")) for n in range(20)]
    with_nul = await parts.facts.record(fact("a\\u0000b"))  # as no check of ours would let it through
    good.append(await parts.store.record_interaction(NewInteraction(query="last")))
    await parts.all_inserted()
    assert sorted(await in_database(parts)) == sorted(one.id for one in good)
    reasons = await dead(tmp_path)
    assert reasons.keys() == {bad.id, with_nul.id}
    assert "forbidden" in reasons[bad.id]
    assert "UntranslatableCharacterError" in reasons[with_nul.id]
    assert "between you and me" not in str(reasons) + caplog.text
    assert (await parts.store.get_interaction(bad.id)) == bad, "it was acknowledged, so it is read"
    assert (await parts.store.list_interactions(ALL)).total_size == len(good) + 2
    probe = await parts.store.probe()
    assert "refused 2 facts" in probe.degraded
    assert probe.lag_points == 0


async def test_what_befalls_every_fact_alike_makes_no_dead_letters(parts: Parts, tmp_path: Path) -> None:
    async with parts.database.connection() as connection:
        await connection.execute("ALTER TABLE ai_interactions RENAME COLUMN query TO question")
    made = await parts.store.record_interaction(NewInteraction(query="kept"))

    async def told() -> bool:
        return "UndefinedColumnError" in parts.facts._fault

    await eventually(told)
    assert await dead(tmp_path) == {}
    async with parts.database.connection() as connection:
        await connection.execute("ALTER TABLE ai_interactions RENAME COLUMN question TO query")
    await parts.all_inserted()
    assert await in_database(parts) == [made.id]


async def test_facts_that_wait_for_a_lock_say_so(
    target: DatabaseTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts_module, "LATE_S", 0.0)
    async with opened(target, tmp_path, bounds=dataclasses.replace(PATIENT, command_s=2.0)) as parts:
        async with parts.database.connection() as locking, locking.transaction():
            await locking.execute("LOCK TABLE ai_interactions")
            await parts.store.record_interaction(NewInteraction(query="kept"))

            async def told() -> bool:
                return "statement timeout" in (await parts.store.probe()).degraded  # it does answer

            await eventually(told)
        await parts.all_inserted()


async def test_a_full_disk_of_the_database_holds_facts_up_and_no_reads(parts: Parts, tmp_path: Path) -> None:
    async with parts.database.connection() as connection:
        await connection.execute(
            "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'no space left on device' USING ERRCODE = '53100'; END $$"
        )
        await connection.execute(
            "CREATE TRIGGER full_disk BEFORE INSERT ON ai_interactions FOR EACH ROW EXECUTE FUNCTION full_disk()"
        )
    made = await parts.store.record_interaction(NewInteraction(query="kept"))
    await eventually(lambda: "DiskFullError" in parts.facts._fault)
    assert parts.database.usable
    assert await dead(tmp_path) == {}
    async with parts.database.connection() as connection:
        await connection.execute("DROP TRIGGER full_disk ON ai_interactions")
    await parts.all_inserted()
    assert await in_database(parts) == [made.id]


async def test_a_death_between_insertion_and_note_doubles_nothing(
    parts: Parts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    noted = parts.facts._writer.note_inserted
    deaths = []

    def dies(*arguments: object) -> None:
        deaths.append(arguments)
        if len(deaths) <= 4:
            raise Unavailable("as if the process had ended here")
        noted(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(parts.facts._writer, "note_inserted", dies)
    made = await asyncio.gather(*(parts.store.record_interaction(NewInteraction(query=f"{n}")) for n in range(50)))
    await eventually(lambda: len(deaths) > 4)
    assert "callers no longer wait" not in caplog.text, "our disk's failure is none of the database's"
    await parts.all_inserted()
    assert sorted(await in_database(parts)) == sorted(one.id for one in made)
    assert (await parts.facts.backlog()).refused == 0


async def test_one_that_is_in_the_database_already_stays_as_it_is(parts: Parts) -> None:
    chosen = str(uuid4())
    async with parts.database.connection() as connection:
        await connection.execute("INSERT INTO ai_interactions (id, query) VALUES ($1, 'first')", chosen)
    answer = await parts.store.record_interaction(NewInteraction(id=chosen, query="second"))
    assert answer.query == "first"
    await parts.facts.record(fact("second", chosen))  # as recorded while it was away
    await parts.all_inserted()
    assert (await parts.store.get_interaction(chosen)).query == "first"
    assert (await parts.store.list_interactions(ALL)).total_size == 1


async def test_one_that_is_recorded_again_has_what_was_said_of_it_since(parts: Parts) -> None:
    made = await parts.store.record_interaction(NewInteraction(query="q"))
    await parts.all_inserted()
    async with parts.database.connection() as connection, connection.transaction():
        await connection.execute("LOCK TABLE ai_feedback IN EXCLUSIVE MODE")
        rated = await parts.store.rate_interaction(made.id, 5, "good")
        assert await parts.store.record_interaction(NewInteraction(id=made.id, query="q")) == rated


async def test_another_database_gets_what_the_last_one_had(
    embedded_server: PostgresServer, debian_server: PostgresServer, tmp_path: Path
) -> None:
    first, second = await embedded_server.fresh_database(), await debian_server.fresh_database()
    async with opened(first, tmp_path) as parts:
        made = [await parts.store.record_interaction(NewInteraction(query=f"{n}")) for n in range(700)]
        await parts.all_inserted()
    for target in (second, first, second):  # and back: there is nothing to double there
        async with opened(target, tmp_path) as parts:

            async def all_there() -> bool:
                return len(await in_database(parts)) == len(made)

            await eventually(all_there)
            await parts.all_inserted()
            assert sorted(await in_database(parts)) == sorted(one.id for one in made)
            page = await parts.store.list_interactions(ALL, page_size=1_000)
            assert [one.query for one in page.items] == [f"{n}" for n in reversed(range(700))]
            assert (page.total_size, page.stale_since) == (700, None)


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[list[int], threading.Event]:
    """Answers of a method of the journal that is done in bundles, the first one when the event is set."""
    answers: list[int] = []
    work, go_on = getattr(Journal, name), threading.Event()

    def counting(self: Journal, *arguments: int) -> int:
        assert answers or go_on.wait(30.0)
        answers.append(work(self, *arguments))
        return answers[-1]

    monkeypatch.setattr(Journal, name, counting)
    monkeypatch.setattr(facts_module, "BUNDLE", 10)
    return answers, go_on


async def recorded_meanwhile(facts: Facts, go_on: threading.Event) -> None:
    recording = asyncio.create_task(facts.record(fact("new")))
    await asyncio.sleep(0)
    await eventually(lambda: not facts._group)
    go_on.set()
    await recording


async def test_recordings_do_not_wait_until_all_that_is_old_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day after a long outage all that waited in it goes at once."""
    _fill(tmp_path, 400)
    swept, go_on = counted(monkeypatch, "sweep")
    away = Database(target_of_url("postgresql://127.0.0.1:1/none"), clock=SystemClock(), bounds=PATIENT)
    async with Facts(tmp_path, away, clock=SystemClock(), limit_bytes=LIMIT_BYTES) as facts:
        await recorded_meanwhile(facts, go_on)
        assert len(swept) < 30
        await eventually(lambda: sum(swept) == 400)
        assert (await facts.backlog()).waiting == 1


async def test_recordings_do_not_wait_until_all_waits_again_for_another_database(
    target: DatabaseTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(tmp_path, 400, SystemClock().now_ms())
    put_back, go_on = counted(monkeypatch, "wait_again")
    async with (
        Database(target, clock=SystemClock(), bounds=PATIENT) as database,
        Facts(tmp_path, database, clock=SystemClock(), limit_bytes=LIMIT_BYTES) as facts,
    ):
        await recorded_meanwhile(facts, go_on)
        assert len(put_back) < 30
        await eventually(lambda: sum(put_back) == 400)


def _fill(folder: Path, facts: int, inserted_ms: int = 0) -> None:
    """A journal with facts that another database has."""
    journal = Journal(folder / "facts.db")
    made = [Fact(kind="old", id=str(n), subject="", created_us=n, payload="{}") for n in range(facts)]
    journal.append(made, LIMIT_BYTES)
    journal.begin_identity("another")
    journal.note_inserted([waiting.sequence for waiting in journal.waiting(facts, LIMIT_BYTES)], inserted_ms)
    journal.close()


async def test_what_another_database_may_lack_is_read_before_it_is_sent_again(
    embedded_server: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await embedded_server.fresh_database(), await embedded_server.fresh_database()
    async with opened(first, tmp_path) as parts:
        made = await parts.store.record_interaction(NewInteraction(query="q"))
        rated = await parts.store.rate_interaction(made.id, 5)
        await parts.all_inserted()
    begin, go_on = Journal.begin_identity, threading.Event()

    def slow(self: Journal, identity: str, position: Position = UNSAID) -> int:
        assert go_on.wait(30.0)
        return begin(self, identity, position)

    monkeypatch.setattr(Journal, "begin_identity", slow)
    async with opened(second, tmp_path) as parts:
        try:
            assert await parts.store.get_interaction(made.id) == rated
            page = await parts.store.list_interactions(ALL)
            assert ([one.id for one in page.items], page.stale_since) == ([made.id], None)
            searching = asyncio.create_task(parts.store.search_interactions("q", ALL))
            await parts.store.probe()
            assert not searching.done()
        finally:
            go_on.set()
        assert [one.id for one in (await searching).items] == [made.id]
        await parts.all_inserted()
        assert await parts.store.get_interaction(made.id) == rated


@pytest.fixture
async def away_target(own_server: PostgresServer) -> DatabaseTarget:
    return await own_server.fresh_database()


async def test_recording_and_reading_while_the_database_is_away(
    own_server: PostgresServer, away_target: DatabaseTarget, tmp_path: Path
) -> None:
    async with opened(away_target, tmp_path) as parts:
        store = parts.store
        before = [await store.record_interaction(NewInteraction(session_id="s", query=f"b{n}")) for n in range(3)]
        await parts.all_inserted()
        own_server.stop(signal.SIGQUIT)
        made = [
            await store.record_interaction(NewInteraction(session_id="s", query=f"w{n}", user_rating=n % 5 + 1))
            for n in range(2_500)
        ]
        assert await store.get_interaction(made[7].id) == made[7]
        assert await store.get_interaction(before[0].id) == before[0], "from the journal, which keeps it for a day"
        with pytest.raises(Unavailable):
            await store.get_interaction(str(uuid4()))
        rated = await store.list_interactions(InteractionFilter(session_id="s", min_rating=5))
        assert rated.total_size == 500
        assert rated.stale_since is not None
        found, token = [], ""
        while True:
            page = await store.list_interactions(InteractionFilter(session_id="s"), page_size=1_000, page_token=token)
            assert page.stale_since is not None
            found += [one.id for one in page.items]
            token = page.next_page_token
            assert token, "the database may have older ones"
            if len(found) == 2_503:
                break
        assert found == [one.id for one in reversed([*before, *made])]
        with pytest.raises(Unavailable) as older:
            await store.list_interactions(InteractionFilter(session_id="s"), page_token=token)
        assert older.value.reason == "OLDER_UNAVAILABLE"
        probe = await store.probe()
        assert probe.down
        assert (probe.lag_points, probe.lag_seconds > 0, probe.spool_bytes > 500_000) == (2_500, True, True)
        own_server.start()

        pages = 0
        while (await parts.facts.backlog()).waiting or not pages:  # a listing is whole all the while
            page = await store.list_interactions(ALL, page_size=7)
            if page.stale_since is None:
                pages += 1
                assert [one.id for one in page.items] == [one.id for one in reversed(made[-7:])]
                assert page.total_size == 2_503
        await parts.all_inserted()
        assert sorted(await in_database(parts)) == sorted(one.id for one in [*before, *made])
        assert (await store.list_interactions(ALL)).total_size == 2_503
        with pytest.raises(NotFound):
            await store.get_interaction(str(uuid4()))


async def test_a_full_journal_refuses_by_name_and_takes_facts_again_later(
    own_server: PostgresServer, away_target: DatabaseTarget, tmp_path: Path
) -> None:
    async with opened(away_target, tmp_path, limit_bytes=1 << 20) as parts:
        own_server.stop(signal.SIGQUIT)
        large = NewInteraction(query="x" * 50_000)
        made = []
        with pytest.raises(ResourceExhausted, match="METADATA_JOURNAL_LIMIT") as full:
            for _ in range(100):
                made.append(await parts.store.record_interaction(large))  # noqa: PERF401  some are kept
        assert full.value.reason == "JOURNAL_FULL"
        assert 10 < len(made) < 25
        own_server.start()
        await parts.all_inserted()
        # What the database has gives way before its 24 hours are over: a day's worth need not fit.
        for _ in range(6):
            made += [await parts.store.record_interaction(large) for _ in range(10)]
            await parts.all_inserted()
        assert sorted(await in_database(parts)) == sorted(one.id for one in made)
        assert (await parts.facts.backlog()).bytes <= 1 << 20


async def test_recordings_at_once_share_a_sync(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = []
    append = parts.facts._writer.append

    def counted(facts: list[Fact], limit_bytes: int) -> list[Fact | OpenManagerError]:
        groups.append(len(facts))
        return append(facts, limit_bytes)

    monkeypatch.setattr(parts.facts._writer, "append", counted)
    await asyncio.gather(*(parts.store.record_interaction(NewInteraction()) for _ in range(300)))
    assert sum(groups) == 300
    assert len(groups) < 30


async def test_a_caller_that_goes_away_harms_nobody(parts: Parts) -> None:
    calls = [asyncio.create_task(parts.store.record_interaction(NewInteraction())) for _ in range(20)]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(answer, asyncio.CancelledError) for answer in answers[::2])
    kept = {one.id for one in answers[1::2] if not isinstance(one, BaseException)}
    assert len(kept) == 10
    await parts.all_inserted()
    assert kept <= set(await in_database(parts))


async def test_a_dead_letter_that_is_retried_goes_when_the_database_takes_it(parts: Parts, tmp_path: Path) -> None:
    await forbid(parts, "query <> 'refused'")
    bad = await parts.store.record_interaction(NewInteraction(query="refused"))

    async def is_dead() -> bool:
        return bad.id in await dead(tmp_path)

    await eventually(is_dead)
    other = Journal(tmp_path / "facts.db")  # as the command line does
    assert other.retry(None) == [bad.id]

    async def tried_again() -> bool:
        await parts.facts.backlog()  # the status asks every 2 s
        letters = other.dead_letters()
        return bool(letters) and letters[0].attempts == 2

    await eventually(tried_again)
    async with parts.database.connection() as connection:
        await connection.execute("ALTER TABLE ai_interactions DROP CONSTRAINT forbidden")
    assert other.retry([bad.id]) == [bad.id]
    await parts.all_inserted()
    assert await in_database(parts) == [bad.id]
    assert other.dead_letters() == []
    other.close()


async def test_a_server_that_cannot_say_which_it_is_gets_facts_all_the_same(
    debian_server: PostgresServer, tmp_path: Path
) -> None:
    target = await debian_server.fresh_database()
    name = target.address.rpartition("/")[2]
    await debian_server.execute("REVOKE EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC", database=name)
    async with opened(target, tmp_path) as parts:
        made = await parts.store.record_interaction(NewInteraction())
        await parts.all_inserted()
        assert await in_database(parts) == [made.id]
        assert parts.database.identity is None
        assert (await parts.store.probe()).server_version.startswith("PostgreSQL 15")


async def test_kinds_go_in_their_order_each_its_own_way(database: Database, tmp_path: Path) -> None:
    rating = FactKind(
        name="rating",
        insert="INSERT INTO ratings SELECT id, interaction, rating FROM json_to_recordset($1::json)"
        " AS fact (id uuid, interaction uuid, rating integer) ON CONFLICT (id) DO NOTHING",
    )
    async with database.connection() as connection:
        await connection.execute(
            "CREATE TABLE ratings (id uuid PRIMARY KEY, interaction uuid REFERENCES ai_interactions, rating integer)"
        )
    kinds = KINDS | {rating.name: rating}
    async with Facts(tmp_path, database, clock=SystemClock(), limit_bytes=LIMIT_BYTES, kinds=kinds) as facts:
        for number in range(20):  # a rating cannot be before what it rates
            rated = await facts.record(fact(f"{number}"))
            row = {"id": str(uuid4()), "interaction": rated.id, "rating": number}
            payload = orjson.dumps(row).decode()
            await facts.record(Fact(kind=rating.name, id=row["id"], subject="", created_us=0, payload=payload))
        unknown = dataclasses.replace(fact("from a newer version"), kind="newer")
        await facts.record(unknown)
        last = await facts.record(fact("last"))

        async def nothing_waits() -> bool:
            return (await facts.backlog()).waiting == 0

        await eventually(nothing_waits)
    async with database.connection() as connection:
        assert await connection.fetchval("SELECT count(*) FROM ratings") == 20
        assert await connection.fetchval("SELECT count(*) FROM ai_interactions WHERE id = $1", last.id) == 1
    assert await dead(tmp_path) == {unknown.id: "this version knows no facts of the kind newer"}
