"""What a session asked is gone when it is erased, and what is too old when its time is over: nothing brings it back."""

import asyncio
import signal
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from runtime.clock import SystemClock
from runtime.errors import InvalidArgument, NotFound, Unavailable
from services.metadata import interactions_local
from services.metadata.journal import Journal
from services.metadata.store import InteractionFilter, MetadataStore, NewInteraction
from services.metadata.store_local import LocalFirstStore
from services.metadata.target import DatabaseTarget
from tests.harness import eventually
from tests.harness.postgres import PostgresServer
from tests.metadata.parts import PATIENT, Parts, opened
from tests.metadata.test_migrate import connect

ALL = InteractionFilter()
SECRET = "between you and me 7261"
MANY = """INSERT INTO ai_interactions (session_id, created_at)
    SELECT 's0', now() - interval '1 day' FROM generate_series(1, 2500);
CREATE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.001); RETURN OLD; END';
CREATE TRIGGER slow BEFORE DELETE ON ai_interactions FOR EACH ROW EXECUTE FUNCTION be_slow()"""
"""A statement has no time for all of them."""


async def sessions_in(parts: Parts) -> list[str]:
    async with parts.database.connection() as connection:
        rows = await connection.fetch("SELECT session_id FROM ai_interactions ORDER BY created_at")
        return [row["session_id"] for row in rows]


async def counts(parts: Parts) -> tuple[int, int, int]:
    """Interactions, what was said of them, embeddings in the database."""
    async with parts.database.connection() as connection:
        row = await connection.fetchrow(
            "SELECT (SELECT count(*) FROM ai_interactions), (SELECT count(*) FROM ai_feedback),"
            " (SELECT count(*) FROM ai_embeddings)"
        )
    return tuple(row)  # type: ignore[return-value]


async def fill(store: LocalFirstStore) -> list[str]:
    """Ten interactions of each of two sessions, all rated and corrected; the ids of the first session's."""
    mine = []
    for number in range(20):
        session = f"s{number % 2}"
        padding = "x" * (number * 400)  # from several in a page to several pages
        query = f"{padding} {SECRET} {session} {padding}"
        new = NewInteraction(session_id=session, query=query, response="r", embedding=(1.0, number))
        made = await store.record_interaction(new)
        await store.rate_interaction(made.id, 3, f"{SECRET} {session}")
        await store.correct_interaction(made.id, f"{SECRET} {session}")
        mine += [made.id] if session == "s0" else []
    return mine


def bytes_of(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in folder.glob("facts.db*"))


async def test_an_erased_session_is_gone_from_everywhere(parts: Parts, tmp_path: Path) -> None:
    store = parts.store
    mine = await fill(store)
    erased = await store.erase_session("s0")
    assert (erased.interactions, erased.pending) == (10, False)
    assert await counts(parts) == (10, 20, 10)
    for one in mine:
        with pytest.raises(NotFound):
            await store.get_interaction(one)
    listed = await store.list_interactions(ALL)
    assert {one.session_id for one in listed.items} == {"s1"}
    assert listed.total_size == 10
    left = await asyncio.to_thread(bytes_of, tmp_path)
    assert f"{SECRET} s1".encode() in left
    assert f"{SECRET} s0".encode() not in left
    assert (await store.erase_session("s0")).interactions == 0
    again = await store.record_interaction(NewInteraction(session_id="s0", query="later"))
    await parts.all_inserted()
    assert await store.get_interaction(again.id) == again


@pytest.mark.full
async def test_a_session_of_any_size_is_erased_and_holds_up_nothing(target: DatabaseTarget, tmp_path: Path) -> None:
    async with opened(target, tmp_path, bounds=replace(PATIENT, command_s=2.0)) as parts:
        async with parts.database.connection() as connection:
            await connection.execute(MANY, timeout=60.0)
        await parts.store.erase_session("s0")
        await parts.store.record_interaction(NewInteraction(session_id="s1"))
        await parts.all_inserted()
        assert await sessions_in(parts) == ["s1"]


async def test_what_waits_to_be_erased_is_read_by_nobody_and_may_be_recorded_again(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interactions_local, "CAUGHT_UP_WITHIN_S", 0.2)
    store = parts.store
    mine = await store.record_interaction(NewInteraction(session_id="s0", query=SECRET, response="r"))
    other = await store.record_interaction(NewInteraction(session_id="s1", query="q", response="r"))
    await parts.all_inserted()
    async with parts.database.connection() as connection, connection.transaction():
        await connection.execute("SELECT FROM ai_interactions FOR UPDATE")
        assert (await store.erase_session("s0")).pending
        with pytest.raises(NotFound):
            await store.get_interaction(mine.id)
        with pytest.raises(NotFound):
            await store.rate_interaction(mine.id, 5)
        listed = await store.list_interactions(ALL)
        assert ([one.id for one in listed.items], listed.total_size) == ([other.id], 1)
        with pytest.raises(Unavailable) as refused:
            await store.search_interactions("between", ALL)
        assert refused.value.reason == "CATCHING_UP"
        with pytest.raises(Unavailable):
            [example async for example in store.export_interactions(ALL)]
        again = await store.record_interaction(NewInteraction(id=mine.id, session_id="s0", query="again"))
        assert again.query == "again"
        listed = await store.list_interactions(ALL)
        assert ([one.query for one in listed.items], listed.total_size) == (["again", "q"], 2)
    await parts.all_inserted()
    assert await store.get_interaction(mine.id) == again
    assert await sessions_in(parts) == ["s1", "s0"]


async def test_bad_sessions_are_refused_by_name(blind_store: MetadataStore) -> None:
    for bad in ("", "s" * 256, "\0", "\ud800"):
        with pytest.raises(InvalidArgument) as refused:
            await blind_store.erase_session(bad)
        assert refused.value.field == "session_id"


async def test_a_session_is_erased_while_the_database_is_away(own_server: PostgresServer, tmp_path: Path) -> None:
    target = await own_server.fresh_database()
    async with opened(target, tmp_path) as parts:
        store = parts.store
        await fill(store)
        await parts.all_inserted()
        own_server.stop(signal.SIGQUIT)
        await fill(store)
        erased = await store.erase_session("s0")
        assert (erased.interactions, erased.pending) == (10, True)
        later = await store.record_interaction(NewInteraction(session_id="s0", query="later"))
        listed = await store.list_interactions(ALL)
        assert [one.session_id for one in listed.items].count("s0") == 1
        assert f"{SECRET} s0".encode() not in await asyncio.to_thread(bytes_of, tmp_path)
        own_server.start()
        await parts.all_inserted()
        assert await counts(parts) == (21, 40, 20)
        assert (await sessions_in(parts)).count("s0") == 1
        assert await store.get_interaction(later.id) == later


async def test_another_database_that_has_it_still_or_again_loses_it(
    embedded_server: PostgresServer, debian_server: PostgresServer, tmp_path: Path
) -> None:
    """A standby that took over without the deletion; what was recorded under the same session later stays there."""
    first, second = await embedded_server.fresh_database(), await debian_server.fresh_database()
    for target in (first, second):
        async with opened(target, tmp_path) as parts:
            if target is first:
                await fill(parts.store)
            await eventually(lambda parts=parts: has_all(parts))
    async with opened(first, tmp_path) as parts:
        await parts.all_inserted()
        await parts.store.erase_session("s0")
        await parts.store.record_interaction(NewInteraction(session_id="s0", query="later"))
        await parts.all_inserted()
        assert await counts(parts) == (11, 20, 10)
    other = await connect(second)  # recorded later by somebody who is not in this journal
    await other.execute("INSERT INTO ai_interactions (session_id, query) VALUES ('s0', 'elsewhere')")
    await other.close()
    async with opened(second, tmp_path) as parts:

        async def erased() -> bool:
            return await counts(parts) == (12, 20, 10)

        await eventually(erased)
        await parts.all_inserted()
        assert (await sessions_in(parts)).count("s0") == 2


async def has_all(parts: Parts) -> bool:
    return await counts(parts) == (20, 40, 20)


async def test_what_is_on_its_way_to_the_database_does_not_come_back(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, goes_on, arrived = asyncio.Event(), asyncio.Event(), asyncio.Event()
    insert = parts.facts._insert

    async def slow(*arguments: Any) -> None:
        reached.set()
        await goes_on.wait()
        await insert(*arguments)
        arrived.set()

    monkeypatch.setattr(parts.facts, "_insert", slow)
    await parts.store.record_interaction(NewInteraction(session_id="s0", query="on its way"))
    await reached.wait()
    erasing = asyncio.create_task(parts.store.erase_session("s0"))
    await asyncio.sleep(0.05)
    goes_on.set()
    await arrived.wait()
    await erasing
    await parts.all_inserted()
    assert await counts(parts) == (0, 0, 0)


async def test_dead_letters_of_a_session_are_erased_with_what_was_said_of_them(parts: Parts, tmp_path: Path) -> None:
    async with parts.database.connection() as connection:
        await connection.execute("ALTER TABLE ai_interactions ADD CONSTRAINT forbidden CHECK (query <> 'refused')")
    bad = await parts.store.record_interaction(NewInteraction(session_id="s0", query="refused"))
    await parts.store.rate_interaction(bad.id, 1)
    await parts.all_inserted()
    assert await counts(parts) == (0, 1, 0)
    assert (await parts.store.erase_session("s0")).interactions == 1
    assert await counts(parts) == (0, 0, 0)
    journal = await asyncio.to_thread(Journal, tmp_path / "facts.db")
    assert await asyncio.to_thread(journal.dead_letters) == []
    await asyncio.to_thread(journal.close)


async def test_a_clock_that_was_set_back_erases_all_the_same(parts: Parts) -> None:
    made = await parts.store.record_interaction(NewInteraction(session_id="s0"))
    await parts.all_inserted()
    async with parts.database.connection() as connection:
        await connection.execute("UPDATE ai_interactions SET created_at = $1", made.create_time + timedelta(days=3))
    assert (await parts.store.erase_session("s0")).interactions == 1
    assert await counts(parts) == (0, 0, 0)


class Ahead(SystemClock):
    """Of a machine whose clock is wrong."""

    def now_ms(self) -> int:
        return super().now_ms() + 3 * 86_400_000


async def test_a_clock_that_was_set_back_erases_all_the_same_once_the_database_is_back(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    target = await own_server.fresh_database()
    async with opened(target, tmp_path, clock=Ahead()) as parts:
        await fill(parts.store)
        await parts.all_inserted()
    async with opened(target, tmp_path) as parts:
        own_server.stop(signal.SIGQUIT)
        assert (await parts.store.erase_session("s0")).pending
        own_server.start()
        await parts.all_inserted()
        assert await counts(parts) == (10, 20, 10)
        assert await sessions_in(parts) == ["s1"] * 10


async def test_what_is_too_old_goes_and_is_not_sent_again(
    embedded_server: PostgresServer, debian_server: PostgresServer, tmp_path: Path
) -> None:
    first, second = await embedded_server.fresh_database(), await debian_server.fresh_database()
    async with opened(first, tmp_path) as parts:
        store = parts.store
        await fill(store)
        await parts.all_inserted()
        assert await store.forget_interactions(3_600.0) == 0
        assert await counts(parts) == (20, 40, 20)
        async with parts.database.connection() as connection:
            await connection.execute("UPDATE ai_interactions SET created_at = created_at - interval '2 h'")
            await connection.execute("DELETE FROM ai_interactions WHERE session_id = 's1'")  # by hand; ratings are left
            await connection.execute("UPDATE ai_feedback SET created_at = created_at - interval '2 h'")
        assert await store.forget_interactions(3_600.0) == 10
        assert await counts(parts) == (0, 0, 0)
        assert (await store.list_interactions(ALL)).items == ()
        await store.record_interaction(NewInteraction(query="later"))
        await parts.all_inserted()
    async with opened(first, tmp_path) as parts:
        await parts.store.forget_interactions(-60.0)  # what is a minute ahead and before: everything
        assert await counts(parts) == (0, 0, 0)
    async with opened(second, tmp_path) as parts:
        marker = await parts.store.record_interaction(NewInteraction(query="marker"))
        await parts.all_inserted()
        page = await parts.store.list_interactions(ALL)
        assert [one.id for one in page.items] == [marker.id], "nothing of what was forgotten is sent again"
