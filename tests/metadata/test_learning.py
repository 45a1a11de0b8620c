"""The learning set: what is in it, what is taken out of it, and that it is of one moment and of bounded size."""

import asyncio
import signal
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from runtime.errors import Aborted, InvalidArgument, ResourceExhausted, Unavailable
from services.metadata import interactions_export
from services.metadata.personal import redacted
from services.metadata.store import Example, InteractionFilter, MetadataStore, NewInteraction
from tests.harness import eventually
from tests.harness.postgres import PostgresServer
from tests.metadata.parts import Parts, opened

ALL = InteractionFilter()


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("write to ann.o+x@mail.example.com.", "write to [email]."),
        ("<jürgen@exämple.org>, b@c.de", "<[email]>, [email]"),
        ("from 10.0.0.1:8080 to 192.168.255.7.", "from [ip]:8080 to [ip]."),
        ("ip_10.0.0.1 10.0.0.0/8", "ip_[ip] [ip]/8"),
        ("999.0.0.1 and 1.2.3 and 1.2.3.4.5 are none", "999.0.0.1 and 1.2.3 and 1.2.3.4.5 are none"),
        ("2001:db8::8a2e:370:7334, [::1]:50050, fe80::1%eth0", "[ip], [[ip]]:50050, [ip]%eth0"),
        ("::ffff:10.0.0.1 and 2001:DB8:0:0:8:800:200C:417A", "[ip] and [ip]"),
        ("fe80::1: no route to fe80::2.", "[ip]: no route to [ip]."),
        ("at 12:30:45 std::vector :: 00:1a:2b:3c:4d:5e a:b", "at 12:30:45 std::vector :: 00:1a:2b:3c:4d:5e a:b"),
        ("Authorization: Bearer abc.DEF-123_456~+/==", "Authorization: Bearer [token]"),
        ("curl -u ann https://ann:pa55@db.example/x", "curl -u ann https://[token]@db.example/x"),
        (
            "password=hunter22, API-Key: 'abcd1234'; api_key = x1y2z3",
            "password=[token], API-Key: '[token]'; api_key = [token]",
        ),
        ('{"token": "s3cr3t"}', '{"token": "[token]"}'),
        ("ghp_16C7e42F292c6912E7710c838347Ae178B4a", "[token]"),
        ("sk-proj-abcdefghijklmnop AKIAIOSFODNN7EXAMPLE", "[token] [token]"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P", "[token]"),
        ("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "[token]"),
        ("d41d8cd98f00b204e9800998ecf8427e", "[token]"),
        ("id 6b9f4c1e-2d3a-4f5b-8c7d-9e0f1a2b3c4d", "id 6b9f4c1e-2d3a-4f5b-8c7d-9e0f1a2b3c4d"),
        ("/usr/local/lib/python3/site-packages/x", "/usr/local/lib/python3/site-packages/x"),
        ("the token was refused; load 0.93, 95.5 % of 1,000", "the token was refused; load 0.93, 95.5 % of 1,000"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY----- end", "[token] end"),
        ("", ""),
    ],
)
def test_what_is_taken_out_and_what_stays(text: str, clean: str) -> None:
    assert redacted(text) == clean


@pytest.mark.parametrize(
    "piece",
    ["a", "a@", "a.", "1.", "a:", ":", "-", "://a:", "a@b.", "password=", "-----BEGIN ", "9" * 31 + " ", "Bearer "],
)
@pytest.mark.full
def test_no_text_makes_it_slow(piece: str) -> None:
    took_s = []
    for length in (1 << 18, 1 << 20):
        started = time.process_time()
        redacted(piece * (length // len(piece)))
        took_s.append(time.process_time() - started)
    print(took_s)
    assert took_s[1] < 10 * max(took_s[0], 0.05)  # four times the text; sixteen times the work, were it the square


async def exported(store: MetadataStore, filters: InteractionFilter = ALL, *, redact: bool = True) -> list[Example]:
    async with aclosing(store.export_interactions(filters, redact=redact)) as examples:
        return [example async for example in examples]


async def test_the_correction_is_the_answer_and_what_teaches_nothing_is_left_out(parts: Parts) -> None:
    store = parts.store
    for number in range(40):
        new = NewInteraction(
            query=f"q{number} to ann@example.com", response=f"r{number}", user_rating=number % 5 + 1, confidence=0.5
        )
        made = await store.record_interaction(new)
        if number % 10 == 0:
            await store.correct_interaction(made.id, f"c{number} at 10.0.0.1")
            await store.rate_interaction(made.id, 5)
    await store.record_interaction(NewInteraction(query="no answer"))
    await store.record_interaction(NewInteraction(response="no question"))
    only_corrected = await store.record_interaction(NewInteraction(query="late", confidence=0.9))
    await store.correct_interaction(only_corrected.id, "answer")
    found = await exported(store)  # all of it, though nobody waited for PostgreSQL
    assert len(found) == 41
    assert found[:2] == [
        Example(query="q0 to [email]", answer="c0 at [ip]"),
        Example(query="q1 to [email]", answer="r1"),
    ]
    assert found[-1] == Example(query="late", answer="answer")
    plain = await exported(store, InteractionFilter(min_rating=5, max_confidence=0.5), redact=False)
    expected = [n for n in range(40) if n % 5 == 4 or n % 10 == 0]
    assert [one.query for one in plain] == [f"q{n} to ann@example.com" for n in expected]
    with pytest.raises(InvalidArgument) as refused:
        await exported(store, InteractionFilter(min_rating=6))
    assert refused.value.field == "min_rating"


async def test_an_export_is_of_one_moment_and_holds_little(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    render = interactions_export._examples

    def counted(rows: list[object], redact: bool) -> list[Example]:
        held.append(len(rows))
        return render(rows, redact)

    monkeypatch.setattr(interactions_export, "_examples", counted)
    async with parts.database.connection() as connection:
        await connection.execute(
            "INSERT INTO ai_interactions (query, response, created_at) SELECT 'q' || n, 'r',"
            " '2026-01-01T00:00:00Z'::timestamptz + n * interval '1 second' FROM generate_series(1, 2000) AS n"
        )
    async with aclosing(parts.store.export_interactions(ALL)) as examples:
        first = await anext(examples)
        assert sum(held) == interactions_export.BATCH_ROWS
        async with parts.database.connection() as connection:
            await connection.execute("DELETE FROM ai_interactions WHERE query > 'q5'")
            await connection.execute("UPDATE ai_interactions SET response = 'changed'")
            await connection.execute("INSERT INTO ai_interactions (query, response) VALUES ('new', 'r')")
        found = [first, *[example async for example in examples]]
    assert [one.query for one in found] == [f"q{n}" for n in range(1, 2_001)]
    assert {one.answer for one in found} == {"r"}
    assert max(held) <= interactions_export.BATCH_ROWS


async def test_few_exports_run_at_once_and_those_that_were_left_count_no_more(parts: Parts) -> None:
    for number in range(40):
        await parts.store.record_interaction(NewInteraction(query=f"q{number}", response="r"))
    running = [parts.store.export_interactions(ALL) for _ in range(interactions_export.MAX_EXPORTS)]
    for one in running:
        await anext(one)
    with pytest.raises(ResourceExhausted) as refused:
        await exported(parts.store)
    assert refused.value.reason == "TOO_MANY_EXPORTS"
    for one in running:
        await one.aclose()
    assert len(await exported(parts.store)) == 40
    callers = [asyncio.create_task(exported(parts.store)) for _ in range(2)]
    await asyncio.sleep(0)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    assert len(await exported(parts.store)) == 40


@pytest.mark.full
async def test_a_reader_who_stops_is_told_so_and_not_that_the_database_is_away(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interactions_export, "READER_WITHIN_S", 1)
    for number in range(2 * interactions_export.BATCH_ROWS):
        await parts.store.record_interaction(NewInteraction(query=f"q{number}", response="r"))

    before_s = 0.0

    async def is_late() -> bool:
        return time.monotonic() - before_s > 1.0

    async def is_left() -> bool:
        async with parts.database.connection() as connection:
            mine = "datname = current_database() AND state = 'idle in transaction'"
            return not await connection.fetchval(f"SELECT count(*) FROM pg_stat_activity WHERE {mine}")

    for enough in (is_left, is_left, is_late):  # PostgreSQL has ended it, or will
        async with aclosing(parts.store.export_interactions(ALL)) as examples:
            await anext(examples)
            before_s = time.monotonic()
            await eventually(enough)
            with pytest.raises(Aborted) as told:
                async for _example in examples:
                    pass
        assert told.value.reason == "EXPORT_TOO_SLOW"
    assert parts.database.circuit.last_error == ""
    monkeypatch.undo()
    assert len(await exported(parts.store)) == 2 * interactions_export.BATCH_ROWS


async def test_without_the_database_there_is_no_learning_set(own_server: PostgresServer, tmp_path: Path) -> None:
    target = await own_server.fresh_database()
    async with opened(target, tmp_path) as parts:
        await parts.store.record_interaction(NewInteraction(query="q", response="r"))
        assert len(await exported(parts.store)) == 1
        own_server.stop(signal.SIGQUIT)
        with pytest.raises(Unavailable):
            await exported(parts.store)
        await parts.store.record_interaction(NewInteraction(query="q", response="r"))
        with pytest.raises(Unavailable) as lacking:
            await exported(parts.store)
        assert lacking.value.reason in {"CATCHING_UP", "CIRCUIT_OPEN"}
        own_server.start()
        await parts.all_inserted()
        assert len(await exported(parts.store)) == 2
