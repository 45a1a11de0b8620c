"""A real single-node VictoriaMetrics, set up as docs/operations.md says, that a test may kill and start again."""

import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from tests.harness.prometheus import StoreServer, required


class VictoriaServer(StoreServer):
    """VictoriaMetrics, which keeps one sample of equal times."""

    program = "victoria-metrics"
    ready_path = "/health"
    write_path = "/api/v1/write"

    def arguments(self) -> Sequence[str]:
        return (
            f"-storageDataPath={self.folder / 'data'}",
            f"-httpListenAddr=127.0.0.1:{self.port}",
            "-retentionPeriod=100y",
            "-dedup.minScrapeInterval=1ms",
            "-loggerLevel=ERROR",
        )

    async def flush(self) -> None:
        """Makes what was written visible to queries, which otherwise takes a second or two."""
        assert await self.answers(self.url + "/internal/force_flush", within_s=30.0)


@contextlib.asynccontextmanager
async def victoria_server() -> AsyncIterator[VictoriaServer]:
    """A running server, ended with the block."""
    required(VictoriaServer.program)
    with tempfile.TemporaryDirectory(prefix="openmanager-victoria-") as folder:
        server = VictoriaServer(Path(folder))
        try:
            await server.start()
            yield server
        finally:
            server.end()
