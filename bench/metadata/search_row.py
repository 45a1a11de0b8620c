"""How long a search takes among many interactions: of words that are everywhere, rare, together, and nowhere."""

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any, Final

from bench.api.judged import Judged, within
from bench.metadata.size import Bench
from bench.peers import BenchError
from openmanager.gateway.v1 import ai_pb2, ai_pb2_grpc
from runtime.channel import Channel

ROW: Final = "search"
LIMIT_MS: Final = 50.0
PAGE: Final = 20
WORDS: Final = 20_000
"""The n-th most frequent of so many words is in about 1 of n interactions, as in what people write."""
WORDS_EACH: Final = 12
# A power of a random number in [0, 1) has the distribution wanted: most words are rare.
_FILL: Final = """INSERT INTO ai_interactions (session_id, query, response, confidence, user_rating, created_at)
    SELECT 'searched-' || n / 100,
        'word' || floor(power($2::float, random()))::integer || ' why ' || (SELECT string_agg('word' ||
            floor(power($2::float, random()))::integer, ' ') FROM generate_series(1, $3::integer) WHERE n > 0),
        'because of word' || floor(power($2::float, random()))::integer || ' on web-' || n % 500,
        random(), 1 + n % 5, now() - n * interval '7 s'
    FROM generate_series($1::bigint, $1::bigint + $4::bigint - 1) AS n"""
BATCH: Final = 50_000


def measure(bench: Bench) -> dict[str, Any]:
    """Fills the table and asks one question after the other."""
    return asyncio.run(_measure(bench))


async def _measure(bench: Bench) -> dict[str, Any]:
    connection = await bench.connect()
    # What the rows before have recorded has other words, and is newer: see docs/benchmarks.md for what that costs.
    await connection.execute("TRUNCATE ai_interactions CASCADE")
    started = time.perf_counter()
    for first in range(1, bench.size.searched + 1, BATCH):
        rows = min(BATCH, bench.size.searched + 1 - first)
        await connection.execute(_FILL, first, float(WORDS), WORDS_EACH, rows)
    await connection.execute("VACUUM ANALYZE ai_interactions")  # as autovacuum does some minutes later
    total = await connection.fetchval("SELECT count(*) FROM ai_interactions")
    await connection.close()
    if total < bench.size.searched:
        raise BenchError(f"{total} interactions are there")
    bench.say(f"{ROW}: {bench.size.searched:,} interactions made in {time.perf_counter() - started:.0f} s")
    rng = random.Random(1)
    took: dict[str, list[float]] = {}
    async with Channel(bench.service.address, secret=bench.secret) as channel:
        stub = ai_pb2_grpc.AiInteractionServiceStub(channel.grpc)
        for _ in range(bench.size.searches):
            kind, words = _question(rng)
            begun = time.perf_counter()
            await stub.SearchInteractions(ai_pb2.SearchInteractionsRequest(query=words, page_size=PAGE))
            took.setdefault(kind, []).append((time.perf_counter() - begun) * 1e3)
    for kind, times in sorted(took.items()):
        bench.say(f"{ROW}, {kind}: p50 {_at(times, 0.5):.1f} ms, p95 {_at(times, 0.95):.1f} ms, {len(times)} questions")
    return {"total": total, "took_ms": took}


def _question(rng: random.Random) -> tuple[str, str]:
    """What kind of question, and its words."""
    kind = rng.choice(("frequent", "usual", "rare", "two", "phrase", "none"))
    frequent, usual, rare = rng.randrange(1, 20), rng.randrange(20, 1_000), rng.randrange(1_000, WORDS)
    words = {
        "frequent": f"word{frequent}",
        "usual": f"word{usual}",
        "rare": f"word{rare}",
        "two": f"word{frequent} word{usual}",
        "phrase": f'"because of word{usual}"',
        "none": f"nothing{rare}",
    }
    return kind, words[kind]


def _at(times: Sequence[float], share: float) -> float:
    return sorted(times)[int(len(times) * share)]


def judged(found: dict[str, Any]) -> list[Judged]:
    """One line, of all questions."""
    times = [one for kind in found["took_ms"].values() for one in kind]
    slowest = max(found["took_ms"], key=lambda kind: _at(found["took_ms"][kind], 0.95))
    remark = f"p50 {_at(times, 0.5):.1f} ms; slowest: {slowest}, {_at(found['took_ms'][slowest], 0.95):.1f} ms"
    work = f"search over {found['total']:,} interactions, p95"
    return [within(ROW, work, "ms", _at(times, 0.95), LIMIT_MS, remark=remark)]
