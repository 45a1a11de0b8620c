"""Real redis-servers that belong together: a primary with replicas and Sentinels, and a cluster.

Every server is a process of its own on a port of 127.0.0.1, and a test may kill any of them and start it again.
"""

import contextlib
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.harness import eventually, free_port
from tests.harness.redis import RedisServer, found_program

SERVICE: Final = "openmanager-test"
SLOTS: Final = 16_384
FORM_BOUND_S: Final = 30.0
DOWN_AFTER_MS: Final = 1_000
"""A server that is silent for so long is taken for dead."""


class SentinelServer(RedisServer):
    """A Sentinel: a redis-server that keeps what it knows in its configuration file."""

    def __init__(self, program: str, folder: Path, primary_port: int) -> None:
        super().__init__(program, folder)
        self._primary_port = primary_port

    def _launch(self) -> None:
        file = self._folder / "sentinel.conf"
        if not file.exists():
            lines = (
                f"port {self.port}",
                "bind 127.0.0.1",
                f"dir {self._folder}",
                f"logfile {self._folder / 'redis.log'}",
                f"sentinel monitor {SERVICE} 127.0.0.1 {self._primary_port} 2",
                f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}",
                f"sentinel failover-timeout {SERVICE} 3000",
            )
            file.write_text("\n".join(lines) + "\n")
        self._start([self._program, str(file), "--sentinel"])


class SentinelGroup:
    """A primary, its replicas, and three Sentinels that watch them."""

    def __init__(self, servers: list[RedisServer], sentinels: list[SentinelServer]) -> None:
        self.servers = servers
        self.sentinels = sentinels

    @property
    def url(self) -> str:
        """The REDIS_URL."""
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{SERVICE}"

    async def primary(self) -> RedisServer:
        """The one that the first Sentinel names, once it says itself that it is the primary."""

        async def found() -> RedisServer | None:
            async with self.sentinels[0].client() as sentinel:
                _, port = await sentinel.sentinel_get_master_addr_by_name(SERVICE)
            server = next(one for one in self.servers if one.port == port)
            return server if await _says(server, "role", "master") else None

        return await eventually(found, within_s=FORM_BOUND_S)


class Cluster:
    """Primaries with a replica each, or none, that share the slots."""

    def __init__(self, nodes: list[RedisServer], primaries: int) -> None:
        self.nodes = nodes
        self._primaries = primaries

    @property
    def url(self) -> str:
        """The REDIS_URL, naming two of the nodes."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:2])

    async def form(self) -> None:
        """Makes the servers a cluster and returns once every one of them says that it is whole."""
        replicas = (len(self.nodes) - self._primaries) // self._primaries
        command = ["redis-cli", "--cluster", "create", *(f"127.0.0.1:{node.port}" for node in self.nodes)]
        command += ["--cluster-replicas", str(replicas), "--cluster-yes"]
        subprocess.run(command, check=True, capture_output=True, timeout=FORM_BOUND_S)
        for node in self.nodes:
            await self.is_whole(node)
        if replicas:
            await eventually(self._all_follow, within_s=FORM_BOUND_S)

    async def _all_follow(self) -> bool:
        roles = [(await _facts(node, "INFO", "replication")) for node in self.nodes]
        following = [role for role in roles if role.get("master_link_status") == "up"]
        return len(following) == len(self.nodes) - self._primaries

    async def is_whole(self, node: RedisServer) -> None:
        """Waits until a node says that all slots are served."""
        await eventually(lambda: _says(node, "cluster_state", "ok"), within_s=FORM_BOUND_S)

    async def primary_of(self, key: str) -> RedisServer:
        """The node that serves a key now."""

        async def found() -> RedisServer | None:
            for node in self.nodes:
                if await _says(node, "role", "master") and await _has_slot(node, key):
                    return node
            return None

        return await eventually(found, within_s=FORM_BOUND_S)


@contextlib.asynccontextmanager
async def sentinel_group(replicas: int = 1) -> AsyncIterator[SentinelGroup]:
    """A primary with replicas and three Sentinels that know each other, ended with the block."""
    program = found_program()
    with tempfile.TemporaryDirectory(prefix="openmanager-sentinel-") as name, contextlib.ExitStack() as running:
        primary = await _started(program, Path(name) / "server-0", running)
        servers = [primary]
        for index in range(replicas):
            options = ("--replicaof", f"127.0.0.1 {primary.port}")
            servers.append(await _started(program, Path(name) / f"server-{index + 1}", running, options))
        sentinels = []
        for index in range(3):
            folder = Path(name) / f"sentinel-{index}"
            folder.mkdir()
            sentinel = SentinelServer(program, folder, primary.port)
            running.callback(sentinel.end)
            await sentinel.start()
            sentinels.append(sentinel)
        for sentinel in sentinels:
            await eventually(lambda sentinel=sentinel: _knows(sentinel, replicas), within_s=FORM_BOUND_S)
        yield SentinelGroup(servers, sentinels)


@contextlib.asynccontextmanager
async def redis_cluster(primaries: int = 3, replicas: int = 0, *options: str) -> AsyncIterator[Cluster]:
    """A cluster that is whole, with extra options of its servers, ended with the block."""
    program = found_program()
    with tempfile.TemporaryDirectory(prefix="openmanager-cluster-") as name, contextlib.ExitStack() as running:
        nodes = []
        for index in range(primaries * (1 + replicas)):
            own = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(DOWN_AFTER_MS), *options)
            bus = ("--cluster-port", str(free_port()))
            nodes.append(await _started(program, Path(name) / f"node-{index}", running, own + bus))
        cluster = Cluster(nodes, primaries)
        await cluster.form()
        yield cluster


async def _started(
    program: str, folder: Path, running: contextlib.ExitStack, options: tuple[str, ...] = ()
) -> RedisServer:
    folder.mkdir()
    server = RedisServer(program, folder, options)
    running.callback(server.end)
    await server.start()
    return server


async def _facts(server: RedisServer, *command: str) -> dict[str, str]:
    """What a server says of itself, as text; AssertionError while it says nothing."""
    async with server.client() as client:
        try:
            raw: Any = await client.execute_command(*command)
        except (RedisError, OSError) as error:
            raise AssertionError(f"{server.port}: {error}") from error
    if isinstance(raw, dict):
        return {str(key): str(value) for key, value in raw.items()}
    text = raw.decode() if isinstance(raw, bytes) else str(raw)
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


async def _says(server: RedisServer, fact: str, value: str) -> bool:
    command = ("CLUSTER INFO",) if fact.startswith("cluster_") else ("INFO", "replication")
    try:
        return (await _facts(server, *command)).get(fact) == value
    except AssertionError:
        return False


async def _has_slot(node: RedisServer, key: str) -> bool:
    async with node.client() as client:
        try:
            await client.exists(key)
        except RedisError:
            return False
    return True


async def _knows(sentinel: SentinelServer, replicas: int) -> bool:
    async with sentinel.client() as client:
        state = await client.sentinel_master(SERVICE)
    return bool(state["num-other-sentinels"] == 2 and state["num-slaves"] == replicas)


async def dump(client: Redis, pattern: str = "*") -> dict[str, Any]:
    """What a server holds under keys of strings."""
    return {key.decode(): await client.get(key) async for key in client.scan_iter(match=pattern)}
