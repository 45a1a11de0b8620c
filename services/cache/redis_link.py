"""The connections to one Redis, to the primary that Sentinel names, or to a cluster.

A link runs batches of commands, each command on one key, and says for each what came of it. Behind a cluster a batch is
one pipeline for each node; a node that does not answer fails its own commands and nobody else's, and a circuit keeps
the next batches from waiting for it.

What must stay true: whatever the driver raises leaves here as one of our errors; every wait is bounded by the driver's
time-outs; redis-py's own retries are off, because a failed command is how an outage is noticed and because the follower
is the one layer that tries again; after a failure no idle connection of before is used again.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

from opentelemetry.trace import Span
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.client import Pipeline
from redis.asyncio.cluster import ClusterNode, ClusterPipeline
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ClusterError,
    MasterDownError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from runtime import telemetry
from runtime.circuit import Circuit
from runtime.clock import SystemClock
from runtime.errors import FailedPrecondition, OpenManagerError, Unavailable
from runtime.redaction import redact, remember_secret
from runtime.tasks import Backoff
from services.cache.redis_url import RedisUrl, Topology

CONNECT_TIMEOUT_S: Final = 1.0
SOCKET_TIMEOUT_S: Final = 2.0
SENTINEL_TIMEOUT_S: Final = 0.5
"""They are asked one after the other, so that two silent ones still leave time for the third."""
MAX_CONNECTIONS: Final = 8
LISTEN_PING_S: Final = 1.0
"""A subscription on which nothing came for so long is asked for a sign of life, and given up after as long again."""
NODE_PAUSES: Final = Backoff(initial_s=0.2, max_s=2.0)

Command = tuple[str | None, tuple[Any, ...]]
"""A command and the key that it touches; None for one that any node takes."""
Answer = Any
"""What Redis answered, or the OpenManagerError that came instead."""

_UNANSWERED: Final = (RedisConnectionError, RedisTimeoutError)
_NOT_NOW: Final = (ClusterError, RedisClusterException, MasterDownError, ReadOnlyError, TryAgainError)
"""Refusals of a server that is not, or not yet, the one to ask."""


class Link(Protocol):
    """How to reach Redis, whatever it consists of."""

    async def run(self, commands: Sequence[Command]) -> list[Answer]:
        """Runs commands, in order for each node, and those without a key after all others; raises only when none was
        answered."""

    async def scan(self, match: str, count: int) -> list[bytes]:
        """All keys that match."""

    async def info(self) -> tuple[str, str, str]:
        """Version, life, and what is wrong with a part of it; raises when nobody answers."""

    def listen(self, channel: str) -> AsyncGenerator[bytes | None, None]:
        """What is published from now on: None once when the subscription stands, then each message; raises when the
        connection is lost, and a silent one counts as lost."""

    async def close(self) -> None:
        """Lets go of connections."""


def connect(url: RedisUrl) -> Link:
    """The link for a URL; nothing is connected before the first call."""
    for secret in (url.password, url.options.get("sentinel_password")):
        if secret:
            remember_secret(secret)
    return ClusterLink(url) if url.topology is Topology.CLUSTER else ServerLink(url)


class ServerLink:
    """A link to one server, named by address or by Sentinels."""

    def __init__(self, url: RedisUrl) -> None:
        self._sentinel: Sentinel | None = None
        if url.topology is Topology.SENTINEL:
            timeouts = {"socket_connect_timeout": SENTINEL_TIMEOUT_S, "socket_timeout": SENTINEL_TIMEOUT_S}
            sentinel_options: dict[str, Any] = {**_common(url), **timeouts}
            sentinel_options["username"] = url.options.get("sentinel_username")
            sentinel_options["password"] = url.options.get("sentinel_password")
            self._sentinel = Sentinel(url.hosts, sentinel_kwargs=sentinel_options)  # type: ignore[no-untyped-call]
            self._client: Redis = self._sentinel.master_for(
                url.service, db=url.database, max_connections=MAX_CONNECTIONS, **_options(url)
            )
        else:
            host, port = url.hosts[0]
            self._client = Redis(
                host=host, port=port, db=url.database, max_connections=MAX_CONNECTIONS, **_options(url)
            )
        _trace(self._client)

    async def run(self, commands: Sequence[Command]) -> list[Answer]:
        try:
            with as_ours():
                pipeline = self._client.pipeline(transaction=False)
                for _, arguments in commands:
                    pipeline.execute_command(*arguments)
                found = await pipeline.execute(raise_on_error=False)
        except OpenManagerError:
            await self._leave()
            raise
        if any(isinstance(one, _NOT_NOW) for one in found):  # the address may lead to another one by now
            await self._leave()
        return [_answer(one) for one in found]

    async def _leave(self) -> None:
        with as_ours():
            await self._client.connection_pool.disconnect(inuse_connections=False)

    async def scan(self, match: str, count: int) -> list[bytes]:
        with as_ours():
            return [key async for key in self._client.scan_iter(match=match, count=count)]

    async def info(self) -> tuple[str, str, str]:
        with as_ours():
            found: dict[str, Any] = await self._client.info("server")
        return str(found.get("redis_version", "?")), str(found.get("run_id", "")), ""

    async def listen(self, channel: str) -> AsyncGenerator[bytes | None, None]:
        async for message in _listen(self._client, channel):
            yield message

    async def close(self) -> None:
        await self._client.aclose()
        if self._sentinel is not None:
            await self._sentinel.aclose()


class ClusterLink:
    """A link to a cluster, of which some nodes may be away."""

    def __init__(self, url: RedisUrl) -> None:
        self._options = _options(url)
        self._client = RedisCluster(
            startup_nodes=[ClusterNode(host, port) for host, port in url.hosts],
            require_full_coverage=False,  # the cluster's own setting decides; what is there is to be used
            cluster_error_retry_attempts=0,
            max_connections=MAX_CONNECTIONS,
            **self._options,
        )
        self._circuits: dict[str, Circuit] = {}
        self._is_stale = True
        self._refreshing = asyncio.Lock()
        _trace(self._client)

    async def run(self, commands: Sequence[Command]) -> list[Answer]:
        await self._refresh()
        answers: list[Answer] = [None] * len(commands)
        keyed = [place for place, (key, _) in enumerate(commands) if key is not None]
        await self._run_some(commands, keyed, answers)
        if len(keyed) < len(commands) and not all(isinstance(answers[place], Unavailable) for place in keyed):
            await self._run_some(commands, sorted(set(range(len(commands))) - set(keyed)), answers)
        failures = [one for one in answers if isinstance(one, Unavailable)]
        if any(one.reason == "STORE_MOVED" for one in failures):
            self._is_stale = True
        if keyed and all(isinstance(answers[place], Unavailable) for place in keyed):
            raise failures[0]
        return answers

    async def _run_some(self, commands: Sequence[Command], places: Sequence[int], answers: list[Answer]) -> None:
        groups: dict[str, tuple[ClusterNode, list[int]]] = {}
        for place in places:
            key = commands[place][0]
            try:
                node = self._node_of(key) if key is not None else self._any_node()
            except OpenManagerError as error:
                answers[place] = error
            else:
                groups.setdefault(node.name, (node, []))[1].append(place)

        async def ask(node: ClusterNode, places: list[int]) -> None:
            try:
                found = await self._run_on(node, [commands[place][1] for place in places])
            except OpenManagerError as error:
                found = [error] * len(places)
            for place, one in zip(places, found, strict=True):
                answers[place] = _answer(one)

        await asyncio.gather(*(ask(node, its_places) for node, its_places in groups.values()))

    async def scan(self, match: str, count: int) -> list[bytes]:
        await self._refresh()
        with as_ours():
            return [key async for key in self._client.scan_iter(match=match, count=count)]

    async def info(self) -> tuple[str, str, str]:
        await self._refresh()
        nodes = sorted(self._client.get_primaries(), key=lambda node: str(node.name))
        found = await asyncio.gather(*(self._info_of(node) for node in nodes))
        infos = [one for one in found if not isinstance(one, OpenManagerError)]
        errors = [f"{node.name}: {one}" for node, one in zip(nodes, found, strict=True) if one not in infos]
        if not infos:
            raise Unavailable(errors[0] if errors else "no node of the cluster answers", reason="STORE_UNAVAILABLE")
        life = " ".join(str(one.get("run_id", "")) for one in infos)
        trouble = f"{len(infos)} of {len(nodes)} primaries answer: {errors[0]}" if errors else ""
        return str(infos[0].get("redis_version", "?")), life, trouble

    async def listen(self, channel: str) -> AsyncGenerator[bytes | None, None]:
        await self._refresh()
        node = self._any_node()  # what is published anywhere in a cluster is heard everywhere
        async with Redis(host=node.host, port=int(node.port), **self._options) as client:
            async for message in _listen(client, channel):
                yield message

    async def close(self) -> None:
        await self._client.aclose()

    async def _refresh(self) -> None:
        """Learns which node has what, at first and after a failure."""
        async with self._refreshing:
            if not self._is_stale:
                return
            with as_ours():
                if self._client._initialize:
                    await self._client.initialize()
                else:
                    await self._client.nodes_manager.initialize()
            self._is_stale = False

    def _node_of(self, key: str) -> ClusterNode:
        with as_ours():
            node: ClusterNode | None = self._client.get_node_from_key(key)
        if node is None:
            raise Unavailable("no node of the cluster has this slot", reason="STORE_MOVED")
        return node

    def _any_node(self) -> ClusterNode:
        """Any that answered last; another one each time."""
        nodes = self._client.get_primaries()
        alive = [node for node in nodes if not self._circuit(node).last_error] or nodes
        if not alive:
            raise Unavailable("no node of the cluster is known", reason="STORE_MOVED")
        return random.choice(alive)  # noqa: S311  spreads, protects nothing

    def _circuit(self, node: ClusterNode) -> Circuit:
        found = self._circuits.get(node.name)
        if found is None:
            found = Circuit(f"Redis {node.name}", SystemClock(), pauses=NODE_PAUSES, failures_to_open=1)
            self._circuits[node.name] = found
        return found

    async def _run_on(self, node: ClusterNode, commands: list[tuple[Any, ...]]) -> list[Any]:
        async def pipelined() -> list[Any]:
            pipeline = self._client.pipeline()
            for arguments in commands:
                pipeline.execute_command(*arguments, target_nodes=node)
            found: list[Any] = await pipeline.execute(raise_on_error=False)
            if isinstance(found[-1], _UNANSWERED):
                raise found[-1]
            return found

        answers: list[Any] = await self._attempt(node, pipelined)
        return answers

    async def _info_of(self, node: ClusterNode) -> dict[str, Any] | OpenManagerError:
        async def info() -> dict[str, Any]:
            found: dict[str, Any] = await self._client.info("server", target_nodes=node)
            return found

        try:
            answer: dict[str, Any] = await self._attempt(node, info)
        except OpenManagerError as error:
            return error
        return answer

    async def _attempt(self, node: ClusterNode, call: Callable[[], Any]) -> Any:
        with self._circuit(node).attempt():
            try:
                with as_ours():
                    return await call()
            except Unavailable:
                self._is_stale = True
                with as_ours():
                    await node.disconnect_free_connections()
                raise


async def _listen(client: Redis, channel: str) -> AsyncGenerator[bytes | None, None]:
    subscription = client.pubsub()
    try:
        with as_ours():
            await subscription.subscribe(channel)
        asked = False
        while True:
            with as_ours():
                message = await subscription.get_message(timeout=LISTEN_PING_S)
                if message is None and not asked:
                    await subscription.ping()
            if message is None and asked:
                raise Unavailable(f"no answer within {LISTEN_PING_S:g} s", reason="STORE_UNAVAILABLE")
            asked = message is None
            if message is not None and message["type"] == "subscribe":
                yield None
            elif message is not None and message["type"] == "message":
                yield message["data"]
    finally:
        with as_ours():
            await subscription.aclose()  # type: ignore[no-untyped-call]


@contextmanager
def as_ours() -> Iterator[None]:
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
    except (RedisError, RedisClusterException, OSError) as error:
        raise ours(error) from error


def ours(error: Exception) -> OpenManagerError:
    """One of the driver's exceptions as ours: Unavailable for what may pass, FailedPrecondition for a refusal."""
    text = redact(f"{type(error).__name__}: {error}")
    if isinstance(error, MasterNotFoundError):
        return Unavailable("no Sentinel that answers knows a primary of this service", reason="STORE_UNAVAILABLE")
    if isinstance(error, AuthenticationError):
        return Unavailable(f"REDIS_URL: user or password are wrong: {text}", reason="STORE_UNAVAILABLE")
    if isinstance(error, _NOT_NOW):
        return Unavailable(text, reason="STORE_MOVED")
    if isinstance(error, ResponseError):
        return FailedPrecondition(f"Redis refuses: {text}", reason="STORE_REFUSED")
    return Unavailable(text, reason="STORE_UNAVAILABLE")


def _answer(answer: Any) -> Answer:
    return ours(answer) if isinstance(answer, RedisError | RedisClusterException | OSError) else answer


def _common(url: RedisUrl) -> dict[str, Any]:
    """What each connection of each client is told."""
    options: dict[str, Any] = {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": SOCKET_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        "client_name": "openmanager-cache",
        "protocol": 2,
    }
    if url.tls:
        options["ssl"] = True
        options |= {name: value for name, value in url.options.items() if name.startswith("ssl_")}
        if "ssl_check_hostname" in options:
            options["ssl_check_hostname"] = options["ssl_check_hostname"].lower() in ("1", "true", "yes", "on")
    return options


def _options(url: RedisUrl) -> dict[str, Any]:
    """The same for servers with data."""
    return {**_common(url), "username": url.username, "password": url.password}


def _trace(client: Redis | RedisCluster) -> None:
    """Traces a client when tracing is on."""
    if telemetry.tracing_enabled():
        from opentelemetry.instrumentation.redis import RedisInstrumentor  # noqa: PLC0415  only when tracing

        RedisInstrumentor.instrument_client(client, response_hook=_name_span)


def _name_span(span: Span, instance: object, _response: object) -> None:
    """The instrumentation names the span of a pipeline by all its commands, which may be a hundred."""
    if isinstance(instance, Pipeline | ClusterPipeline):
        span.update_name("PIPELINE")
