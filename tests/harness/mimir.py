"""A real Mimir of three nodes, every sample on all three, of which a test may kill some and start them again.

Each node is one process that does everything, so any of them takes writes and answers queries. They find each other by
memberlist and share the folder of long-term blocks. About 120 MB each; a cluster is ready some 40 s after its start.
"""

import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

from tests.harness import eventually, free_port
from tests.harness.prometheus import PrometheusApi, StoreServer, required

NODES: Final = 3
READY_BOUND_S: Final = 150.0

_CONFIG: Final = """\
multitenancy_enabled: false
common: {{storage: {{backend: filesystem, filesystem: {{dir: {folder}/shared}}}}}}
blocks_storage:
  storage_prefix: blocks
  tsdb: {{dir: {folder}/{name}/tsdb}}
  bucket_store: {{sync_dir: {folder}/{name}/sync}}
compactor: {{data_dir: {folder}/{name}/compactor}}
server:
  http_listen_address: 127.0.0.1
  http_listen_port: {http}
  grpc_listen_address: 127.0.0.1
  grpc_listen_port: {grpc}
  log_level: error
memberlist:
  bind_addr: [127.0.0.1]
  bind_port: {gossip}
  advertise_addr: 127.0.0.1
  advertise_port: {gossip}
  join_members: [{members}]
ingester:
  ring:
    replication_factor: 3
    instance_addr: 127.0.0.1
    instance_id: {name}
    min_ready_duration: 0s
    final_sleep: 0s
store_gateway: {{sharding_ring: {{replication_factor: 1, instance_addr: 127.0.0.1, instance_id: {name}}}}}
distributor: {{ring: {{instance_addr: 127.0.0.1, instance_id: {name}}}}}
ruler_storage: {{backend: local, local: {{directory: {folder}/rules}}}}
limits:
  ingestion_rate: 10000000
  ingestion_burst_size: 20000000
  max_global_series_per_user: 0
  max_label_names_per_series: 40
  out_of_order_time_window: 30d
  creation_grace_period: 1h
  query_ingesters_within: 0s
usage_stats: {{enabled: false}}
"""


class MimirNode(StoreServer):
    """One node."""

    program = "mimir"
    ready_path = "/ready"
    write_path = "/api/v1/push"

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__(folder / name)
        self.name = name
        self.grpc_port, self.gossip_port, self.port = free_port(), free_port(), free_port()

    def query_url(self) -> str:
        return f"{self.url}/prometheus"

    def configure(self, members: Sequence[int]) -> None:
        """Writes the node's configuration; `members` are the gossip ports of all."""
        text = _CONFIG.format(
            folder=self.folder.parent,
            name=self.name,
            http=self.port,
            grpc=self.grpc_port,
            gossip=self.gossip_port,
            members=", ".join(f"127.0.0.1:{port}" for port in members),
        )
        (self.folder / "mimir.yml").write_text(text)

    def arguments(self) -> Sequence[str]:
        parts = ("query-frontend", "query-scheduler.ring", "compactor.ring", "ruler.ring")
        return (f"-config.file={self.folder / 'mimir.yml'}", *(f"-{part}.instance-addr=127.0.0.1" for part in parts))

    async def ready(self) -> bool:
        """Whether it takes part."""
        return await self.answers(self.url + self.ready_path)


class MimirCluster(PrometheusApi):
    """Three nodes. Questions of the tests go to the first node that is ready."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        (folder / "rules" / "anonymous").mkdir(parents=True)
        self.nodes = []
        for number in range(1, NODES + 1):
            (folder / f"n{number}").mkdir()
            self.nodes.append(MimirNode(folder, f"n{number}"))
        for node in self.nodes:
            node.configure([other.gossip_port for other in self.nodes])
        self._asked = self.nodes[0]

    @property
    def write_urls(self) -> list[str]:
        return [node.write_url for node in self.nodes]

    @property
    def query_urls(self) -> list[str]:
        return [node.query_url() for node in self.nodes]

    def query_url(self) -> str:
        return self._asked.query_url()

    async def start(self) -> None:
        """Starts the nodes that do not run and returns when all are ready and the ring is whole."""
        for node in self.nodes:
            if not node.runs:
                node.launch()
        await eventually(self._all_ready, within_s=READY_BOUND_S)

    async def choose(self) -> None:
        """Has the test's questions asked of a node that is ready."""

        async def found() -> bool:
            for node in self.nodes:
                if node.runs and await node.ready():
                    self._asked = node
                    return True
            return False

        await eventually(found, within_s=READY_BOUND_S)

    def end(self) -> None:
        """Kills all nodes."""
        for node in self.nodes:
            node.end()

    async def _all_ready(self) -> bool:
        for node in self.nodes:
            assert node.runs, f"{node.name} ended"
            if not await node.ready():
                return False
        return True


@contextlib.asynccontextmanager
async def mimir_cluster() -> AsyncIterator[MimirCluster]:
    """A cluster that is ready, ended with the block."""
    required(MimirNode.program)
    with tempfile.TemporaryDirectory(prefix="openmanager-mimir-") as folder:
        cluster = MimirCluster(Path(folder))
        try:
            await cluster.start()
            yield cluster
        finally:
            cluster.end()
