"""How long a page of the record of many servers takes: all, of an environment, of a label, with deleted ones."""

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any, Final

from bench.api.judged import Judged, within
from bench.metadata.size import Bench
from bench.peers import BenchError
from openmanager.metadata.v1 import metadata_pb2, metadata_pb2_grpc
from runtime.channel import Channel

ROW: Final = "servers"
LIMIT_MS: Final = 20.0
_FILL: Final = """INSERT INTO servers (id, hostname, environment, role, location, labels, notes, deleted_at)
    SELECT 'listed-' || lpad(n::text, 6, '0'), 'listed-' || n || '.example.net',
        (ARRAY['production', 'staging', 'test'])[1 + n % 3], (ARRAY['web', 'db', 'cache', 'api'])[1 + n % 4],
        'eu-' || n % 7, jsonb_build_object('team', 'team-' || n % 50, 'rack', 'rack-' || n % 400),
        CASE WHEN n % 10 = 0 THEN repeat('Ask Ann before a restart. ', 20) ELSE '' END,
        CASE WHEN n % 100 = 0 THEN now() END
    FROM generate_series(1, $1::integer) AS n ON CONFLICT (id) DO NOTHING"""


def measure(bench: Bench) -> dict[str, Any]:
    """Fills the table and asks for one page after the other."""
    return asyncio.run(_measure(bench))


async def _measure(bench: Bench) -> dict[str, Any]:
    connection = await bench.connect()
    await connection.execute(_FILL, bench.size.servers)
    await connection.execute("VACUUM ANALYZE servers")  # as autovacuum does a minute later
    total = await connection.fetchval("SELECT count(*) FROM servers")
    await connection.close()
    if total < bench.size.servers:
        raise BenchError(f"{total} servers are there")
    rng = random.Random(1)
    took: dict[str, list[float]] = {}
    async with Channel(bench.service.address, secret=bench.secret) as channel:
        stub = metadata_pb2_grpc.ServerRegistryServiceStub(channel.grpc)
        for _ in range(bench.size.searches):
            kind, request = _question(rng, bench.size.servers)
            begun = time.perf_counter()
            answer = await stub.ListServerRecords(request)
            took.setdefault(kind, []).append((time.perf_counter() - begun) * 1e3)
            if not answer.servers or answer.HasField("stale_since"):
                raise BenchError(f"a page of {kind}: {len(answer.servers)} servers")
    for kind, times in sorted(took.items()):
        bench.say(f"{ROW}, {kind}: p50 {_at(times, 0.5):.1f} ms, p95 {_at(times, 0.95):.1f} ms, {len(times)} pages")
    return {"total": total, "took_ms": took}


def _question(rng: random.Random, servers: int) -> tuple[str, metadata_pb2.ListServerRecordsRequest]:
    """What kind of question, and a page of its answer from anywhere but the end."""
    kind = rng.choice(("all", "environment", "role", "label", "deleted"))
    request = metadata_pb2.ListServerRecordsRequest(after_id=f"listed-{rng.randrange(servers // 2):06}")
    if kind == "environment":
        request.environment = "production"
    elif kind == "role":
        request.environment, request.role = "staging", "db"
    elif kind == "label":
        request.labels["team"] = f"team-{rng.randrange(1, 50)}"
    elif kind == "deleted":
        request.only_deleted = True
    return kind, request


def _at(times: Sequence[float], share: float) -> float:
    return sorted(times)[int(len(times) * share)]


def judged(found: dict[str, Any]) -> list[Judged]:
    """One line, of all questions."""
    times = [one for kind in found["took_ms"].values() for one in kind]
    slowest = max(found["took_ms"], key=lambda kind: _at(found["took_ms"][kind], 0.95))
    remark = f"p50 {_at(times, 0.5):.1f} ms; slowest: {slowest}, {_at(found['took_ms'][slowest], 0.95):.1f} ms"
    work = f"page of 100 of {found['total']:,} servers, p95"
    return [within(ROW, work, "ms", _at(times, 0.95), LIMIT_MS, remark=remark)]
