"""The follower's store on Redis, with the exact keys that other programs rely on.

    servers:all      JSON array, every server with its headline metrics        60 s
    servers:count    number                                                   300 s
    servers:healthy  number                                                    60 s
    server:{id}      JSON object, one server with all its metrics             300 s

What must stay true: a write is one round trip (a further one for each 100 servers beyond the first 100); commands touch
one key each, so that they work on a cluster; JSON that would hold the event loop up is made in a thread; redis-py's own
retries are off, because a failed write is how an outage is noticed (one too short for that shows by a missing count).
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import orjson
from opentelemetry.trace import Span
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from fleet.model import MetricSet
from runtime import telemetry
from runtime.errors import Unavailable
from runtime.redaction import redact, remember_secret
from services.cache.documents import basic_document, full_document, parse_document
from services.cache.model import Fleet, ServerState
from services.cache.store import LIFETIMES, Lifetimes, StoreIdentity

ALL_KEY: Final = "servers:all"
COUNT_KEY: Final = "servers:count"
HEALTHY_KEY: Final = "servers:healthy"
SERVER_KEY_PREFIX: Final = "server:"

CONNECT_TIMEOUT_S: Final = 1.0
SOCKET_TIMEOUT_S: Final = 2.0
MAX_CONNECTIONS: Final = 8
SERVERS_PER_PIPELINE: Final = 100
"""About 1.3 MB of JSON with 511 metrics each: the driver packs and sends a pipeline in one go, 5 ms."""
SERVERS_PER_READ: Final = 100
MAX_KEYS_PER_SCAN: Final = 1_000
CELLS_ON_LOOP: Final = 25_000
STATES_ON_LOOP: Final = 500
"""JSON of more values (5 ms), of more servers' headlines (3 ms), is made in a thread."""

_Sets = dict[tuple[str, ...], MetricSet]

_log = logging.getLogger(__name__)


def server_key(server_id: str) -> str:
    """The key of one server."""
    return f"{SERVER_KEY_PREFIX}{server_id}"


class RedisStateStore:
    """A StateStore on one Redis server."""

    def __init__(self, url: str, lifetimes: Lifetimes = LIFETIMES) -> None:
        """Prepares connections; none is made before the first call.

        Args:
            url: redis:// or rediss://, checked by the settings.
            lifetimes: how long keys live, to the millisecond.
        """
        parts = urlsplit(url)
        if parts.password:
            remember_secret(unquote(parts.password))
        self._address = f"{parts.hostname}:{parts.port or 6379}{parts.path if parts.path != '/' else ''}"
        self._lifetimes = lifetimes
        self._basic: dict[str, tuple[ServerState, bytes]] = {}  # the part of servers:all that each state made
        self._client = _connect(url)

    @property
    def address(self) -> str:
        return self._address

    async def write(self, changed: Sequence[ServerState], removed: Sequence[str], fleet: Fleet) -> bool:
        answers: list[Any] = []
        parts = [changed[at : at + SERVERS_PER_PIPELINE] for at in range(0, len(changed), SERVERS_PER_PIPELINE)] or [()]
        with _as_ours():
            for part in parts:
                documents = await _encoded(part)
                pipeline = self._client.pipeline(transaction=False)
                pipeline.exists(COUNT_KEY)
                for state, document in zip(part, documents, strict=True):
                    pipeline.set(server_key(state.server_id), document, px=_ms(self._lifetimes.server_s))
                if part is parts[-1]:
                    await self._add_fleet(pipeline, removed, fleet)
                answers = await pipeline.execute(raise_on_error=False)
                for answer in answers:
                    if isinstance(answer, Exception):
                        raise answer
        return bool(answers[0])

    async def get(self, server_id: str) -> ServerState | None:
        with _as_ours():
            raw = await self._client.get(server_key(server_id))
        return None if raw is None else _parsed(raw, {})

    async def list_basic(self) -> Sequence[ServerState] | None:
        with _as_ours():
            raw = await self._client.get(ALL_KEY)
        return None if raw is None else _parsed_all(raw)

    async def count(self) -> int | None:
        with _as_ours():
            return _number(await self._client.get(COUNT_KEY))

    async def healthy(self) -> int | None:
        with _as_ours():
            return _number(await self._client.get(HEALTHY_KEY))

    async def load(self) -> AsyncGenerator[Sequence[ServerState], None]:
        basic = {state.server_id: state for state in await self.list_basic() or ()}
        sets: _Sets = {}
        ids = list(basic) or await self._scan()  # servers:all lives 60 s, server:{id} 300 s
        for at in range(0, len(ids), SERVERS_PER_READ):
            part = ids[at : at + SERVERS_PER_READ]
            with _as_ours():
                pipeline = self._client.pipeline(transaction=False)
                for server_id in part:
                    pipeline.get(server_key(server_id))
                found = await pipeline.execute(raise_on_error=False)
            states = []
            for server_id, raw in zip(part, found, strict=True):
                state = _readable(server_key(server_id), raw, sets) or basic.get(server_id)
                if state is not None and state.server_id == server_id:
                    states.append(state)
            yield states

    async def ping(self) -> StoreIdentity:
        with _as_ours():
            info: dict[str, Any] = await self._client.info("server")
        return StoreIdentity(version=f"Redis {info.get('redis_version', '?')}", life=str(info.get("run_id", "")))

    async def close(self) -> None:
        await self._client.aclose()

    async def _add_fleet(self, pipeline: Any, removed: Sequence[str], fleet: Fleet) -> None:
        lives = self._lifetimes
        for server_id in removed:
            pipeline.unlink(server_key(server_id))
        pipeline.set(ALL_KEY, await self._all(fleet), px=_ms(lives.all_s))
        pipeline.set(COUNT_KEY, fleet.summary.total, px=_ms(lives.count_s))
        pipeline.set(HEALTHY_KEY, fleet.summary.healthy, px=_ms(lives.healthy_s))

    async def _all(self, fleet: Fleet) -> bytes:
        """servers:all, of which only the states that changed are encoded again (3 us each)."""
        known = self._basic

        def encode() -> dict[str, tuple[ServerState, bytes]]:
            fresh = {}
            for state in fleet.states:
                kept = known.get(state.server_id)
                fresh[state.server_id] = kept if kept and kept[0] is state else (state, basic_document(state))
            return fresh

        self._basic = encode() if len(fleet.states) <= STATES_ON_LOOP else await asyncio.to_thread(encode)
        return b"[" + b",".join(document for _, document in self._basic.values()) + b"]"

    async def _scan(self) -> list[str]:
        with _as_ours():
            match = f"{SERVER_KEY_PREFIX}*"
            keys = [key async for key in self._client.scan_iter(match=match, count=MAX_KEYS_PER_SCAN)]
        return [key.decode("utf-8", "replace").removeprefix(SERVER_KEY_PREFIX) for key in keys]


def _readable(key: str, answer: bytes | Exception | None, sets: _Sets) -> ServerState | None:
    """A server read back; None, and said so, for what somebody else may have put there."""
    try:
        if isinstance(answer, Exception):
            raise answer
        return None if answer is None else _parsed(answer, sets)
    except (Unavailable, ResponseError) as error:
        _log.warning("%s in Redis cannot be read back: %s", key, error)
        return None


def _parsed_all(raw: bytes | str) -> list[ServerState]:
    sets: _Sets = {}
    documents = _json(raw)
    return [_parsed(document, sets) for document in documents] if isinstance(documents, list) else []


def _parsed(document: Any, sets: _Sets) -> ServerState:
    try:
        return parse_document(_json(document) if isinstance(document, bytes | str) else document, sets)
    except ValueError as error:
        raise Unavailable(f"Redis holds what is not ours: {error}", reason="STORE_UNREADABLE") from error


def _json(raw: bytes | str) -> Any:
    try:
        return orjson.loads(raw)
    except ValueError as error:
        raise Unavailable(f"Redis holds what is not JSON: {error}", reason="STORE_UNREADABLE") from error


def _connect(url: str) -> "Redis":
    """The client, traced when tracing is on."""
    client = Redis.from_url(
        url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=SOCKET_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
        max_connections=MAX_CONNECTIONS,
        client_name="openmanager-cache",
        protocol=2,
    )
    if telemetry.tracing_enabled():
        from opentelemetry.instrumentation.redis import RedisInstrumentor  # noqa: PLC0415  only when tracing

        RedisInstrumentor.instrument_client(client, response_hook=_name_span)
    return client


def _name_span(span: Span, instance: object, _response: object) -> None:
    """The instrumentation names the span of a pipeline by all its commands, which may be a hundred."""
    if isinstance(instance, Pipeline):
        span.update_name("PIPELINE")


async def _encoded(states: Sequence[ServerState]) -> list[bytes]:
    def encode() -> list[bytes]:
        return [full_document(state) for state in states]

    return encode() if sum(state.cells for state in states) <= CELLS_ON_LOOP else await asyncio.to_thread(encode)


@contextmanager
def _as_ours() -> Iterator[None]:
    """The border where the driver's exceptions become ours.

    On Python 3.11 asyncio.wait_for, which the driver uses, returns normally when it is cancelled in the very moment
    that it is done. A task that lost its cancellation this way would never end, so what was lost is raised here.
    """
    task = asyncio.current_task()
    cancelled_before = task.cancelling() if task is not None else 0
    try:
        yield
        if task is not None and task.cancelling() > cancelled_before:
            raise asyncio.CancelledError
    except ResponseError as error:
        text = redact(f"Redis refuses: {type(error).__name__}: {error}")
        raise Unavailable(text, reason="STORE_REFUSED") from error
    except (RedisError, OSError) as error:
        raise Unavailable(redact(f"{type(error).__name__}: {error}"), reason="STORE_UNAVAILABLE") from error


def _ms(seconds: float) -> int:
    return round(seconds * 1_000)


def _number(raw: bytes | str | None) -> int | None:
    return None if raw is None else int(raw)
