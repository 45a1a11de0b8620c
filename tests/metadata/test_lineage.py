"""An older copy of a database is told from the database, however often it is put back."""

from pathlib import Path

import pytest

from services.metadata.interactions import NewInteraction
from services.metadata.line import UNREAD, Answer, Lineage, Position
from tests.harness.postgres import PostgresServer
from tests.metadata.parts import Parts, opened

IDENTITY = "7300000000000000000-00000001-16384"


class Answers:
    """What a server says when it has synced so much, and what all may compare then."""

    def __init__(self) -> None:
        self.lineage = Lineage()

    def identity_at(self, log: int, transactions: int = 1, mark: int = 0) -> str | None:
        before = self.lineage.before()
        return self.lineage.named(Answer("18.0", IDENTITY, Position(log, transactions, mark)), before).identity


def test_a_copy_that_is_put_back_twice_is_another_database_each_time() -> None:
    answers = Answers()
    names = [answers.identity_at(position) for position in (100, 200, 50, 150, 50, 150)]
    assert names[0] == names[1]
    assert names[2] == names[3]
    assert names[4] == names[5]
    assert len({*names}) == 3


def test_a_restart_of_the_service_keeps_the_name_of_a_copy() -> None:
    answers, later = Answers(), Answers()
    answers.identity_at(200)
    name = answers.identity_at(50)
    later.lineage.remember(name, answers.lineage.position)
    assert later.identity_at(60) == name
    assert later.identity_at(50) != name


@pytest.mark.parametrize(
    ("log", "transactions", "is_copy"),
    [(200, 10, False), (201, 11, False), (199, 10, True), (200, 9, True), (900, 9, True), (199, 11, True)],
)
def test_a_copy_that_wrote_log_by_being_read_has_fewer_transactions_all_the_same(
    log: int, transactions: int, is_copy: bool
) -> None:
    answers = Answers()
    name = answers.identity_at(200, 10)
    assert (answers.identity_at(log, transactions) != name) is is_copy


@pytest.mark.parametrize(("mark", "is_copy"), [(6, True), (7, False), (8, False)])
def test_a_copy_that_somebody_worked_with_has_fewer_marks_all_the_same(mark: int, is_copy: bool) -> None:
    answers = Answers()
    name = answers.identity_at(200, 10, 7)
    assert (answers.identity_at(10_000, 500, mark) != name) is is_copy


def test_a_mark_that_could_not_be_read_says_nothing() -> None:
    answers = Answers()
    name = answers.identity_at(200, 10, 7)
    assert answers.identity_at(201, 11, UNREAD) == name
    assert answers.identity_at(202, 12, 6) != name


async def test_another_service_that_works_with_the_same_database_is_told_of(
    embedded_server: PostgresServer, tmp_path: Path
) -> None:
    target = await embedded_server.fresh_database()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()

    async def recorded(*both: Parts) -> list[str]:
        for parts in both:
            await parts.store.record_interaction(NewInteraction(query="q"))
            await parts.all_inserted()
        return [(await parts.store.probe()).degraded for parts in both]

    async with opened(target, tmp_path / "one") as one:
        assert await recorded(one) == [""]
        async with opened(target, tmp_path / "two") as two:
            assert await recorded(two) == [""]
            for degraded in await recorded(one, two):
                assert degraded.startswith("another metadata service has given facts to this database")
    async with opened(target, tmp_path / "one") as one:
        assert await recorded(one) == [""]


async def test_a_lock_on_the_marks_is_no_outage_and_no_copy(parts: Parts) -> None:
    await parts.store.record_interaction(NewInteraction(query="before"))
    await parts.all_inserted()
    await parts.store.probe()
    identity = parts.database.identity
    async with parts.database.connection() as connection, connection.transaction():
        await connection.execute("LOCK TABLE fact_marks IN ACCESS EXCLUSIVE MODE")
        for _ in range(2):
            await parts.store.probe()
        assert parts.database.usable
        await parts.store.record_interaction(NewInteraction(query="meanwhile"))
    await parts.all_inserted()
    await parts.store.probe()
    assert parts.database.identity == identity


def test_a_position_from_before_transactions_were_noted_is_as_far_as_it_says() -> None:
    answers = Answers()
    answers.lineage.remember(IDENTITY, Position(200))
    assert answers.identity_at(200, 10) == IDENTITY
    assert answers.identity_at(199, 10) != IDENTITY
