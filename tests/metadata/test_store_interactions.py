"""The contract of the store for AI interactions, held by PostgreSQL 18 and 15 alike."""

import asyncio
import math
from uuid import uuid4

import pytest

from runtime import paging
from runtime.errors import InvalidArgument, NotFound
from services.metadata.interaction_query import bound
from services.metadata.store import InteractionFilter, MetadataStore, NewInteraction
from tests.metadata.parts import Parts


async def test_an_interaction_comes_back_as_it_was_recorded(store: MetadataStore) -> None:
    given = NewInteraction(
        id=str(uuid4()), session_id="s", query="why?\n\ttabs", response="because", confidence=0.25, user_rating=4
    )
    recorded = await store.record_interaction(given)
    for name in ("id", "session_id", "query", "response", "confidence", "user_rating"):
        assert getattr(recorded, name) == getattr(given, name)
    assert await store.get_interaction(given.id) == recorded
    assert await store.get_interaction(given.id.upper()) == recorded
    bare = await store.record_interaction(NewInteraction())
    assert (bare.session_id, bare.query, bare.confidence, bare.user_rating) == ("", "", None, None)
    assert bare.id != recorded.id


async def test_recording_is_idempotent_by_id_even_at_once(store: MetadataStore) -> None:
    chosen = str(uuid4())
    calls = [store.record_interaction(NewInteraction(id=chosen, query=f"q{n}")) for n in range(20)]
    answers = await asyncio.gather(*calls)
    assert len(set(answers)) == 1
    again = await store.record_interaction(NewInteraction(id=chosen, query="other", user_rating=5))
    assert again == answers[0]
    assert (await store.list_interactions(InteractionFilter())).total_size == 1


async def test_interactions_are_listed_newest_first_by_session_and_rating(parts: Parts) -> None:
    store, database = parts.store, parts.database
    made = []
    for number in range(30):
        rating = (number % 6) or None
        new = NewInteraction(session_id=f"s{number % 2}", query=str(number), user_rating=rating)
        made.append(await store.record_interaction(new))
    await parts.all_inserted()
    async with database.connection() as connection:  # the same instant for some: the id decides
        await connection.execute(
            "UPDATE ai_interactions SET created_at = '2026-01-01T00:00:00.123456Z' WHERE query < '2'"
        )
    found, token = [], ""
    while True:
        page = await store.list_interactions(InteractionFilter(), page_size=4, page_token=token)
        found += list(page.items)
        assert page.total_size == 30
        if not (token := page.next_page_token):
            break
    assert sorted(i.id for i in found) == sorted(i.id for i in made)
    assert found == sorted(found, key=lambda i: (i.create_time, i.id), reverse=True)
    rated = await store.list_interactions(InteractionFilter(session_id="s1", min_rating=4))
    assert {i.query for i in rated.items} == {str(n) for n in range(30) if n % 2 and n % 6 >= 4}
    assert rated.total_size == len(rated.items)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"id": "x"}, "id"),
        ({"id": "{3f2b7c1e-8c1d-4f0e-9a53-0a4b6f0c2d11}"}, "id"),
        ({"id": "3f2b7c1e8c1d4f0e9a530a4b6f0c2d11"}, "id"),
        ({"session_id": "x" * 256}, "session_id"),
        ({"session_id": "\0"}, "session_id"),
        ({"query": "a\0b"}, "query"),
        ({"query": "\ud800"}, "query"),
        ({"query": "é" * 524_289}, "query"),
        ({"response": "a\0b"}, "response"),
        ({"response": "x" * 1_048_577}, "response"),
        ({"confidence": math.nan}, "confidence"),
        ({"confidence": -0.1}, "confidence"),
        ({"confidence": 1.1}, "confidence"),
        ({"confidence": math.inf}, "confidence"),
        ({"user_rating": 0}, "user_rating"),
        ({"user_rating": 6}, "user_rating"),
        ({"user_rating": 2**40}, "user_rating"),
    ],
)
async def test_bad_interactions_are_refused_by_name(
    blind_store: MetadataStore, bad: dict[str, object], field: str
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        await blind_store.record_interaction(NewInteraction(**bad))  # type: ignore[arg-type]
    assert refused.value.field == field


async def test_the_largest_interaction_fits(store: MetadataStore) -> None:
    largest = NewInteraction(session_id="é" * 255, query="x" * 1_048_576, response="é" * 524_288, confidence=1.0)
    assert len((await store.record_interaction(largest)).query) == 1_048_576


async def test_bad_lookups_of_interactions_are_told(store: MetadataStore) -> None:
    with pytest.raises(NotFound):
        await store.get_interaction(str(uuid4()))
    with pytest.raises(InvalidArgument) as refused:
        await store.get_interaction("1")
    assert refused.value.field == "id"
    for filters, field in (
        (InteractionFilter(min_rating=6), "min_rating"),
        (InteractionFilter(min_rating=-1), "min_rating"),
        (InteractionFilter(session_id="\0"), "session_id"),
    ):
        with pytest.raises(InvalidArgument) as refused:
            await store.list_interactions(filters)
        assert refused.value.field == field


@pytest.mark.parametrize("key", [[10**30, str(uuid4())], [1, "no uuid"], ["1", str(uuid4())], [1]])
async def test_a_forged_interaction_token_is_refused_like_any_input(
    blind_store: MetadataStore, key: list[str | int]
) -> None:
    if isinstance(key[0], int) and key[0] > 2**63:
        key[0] = 2**63 - 1
    with pytest.raises(InvalidArgument) as refused:
        await blind_store.list_interactions(
            InteractionFilter(), page_token=paging.page_token("interactions", bound(InteractionFilter()), key)
        )
    assert refused.value.field == "page_token"
