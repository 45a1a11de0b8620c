"""A real Prometheus that a test may kill and start again, and the questions that tests ask any store with its API.

Found on the PATH; where it is missing the test is skipped, visibly, and in CI fails. What it acknowledged is in its
folder, so that a killed one comes back with it, on the same port.
"""

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import urllib3
from urllib3.exceptions import HTTPError

from tests.harness import eventually, free_port

START_BOUND_S: Final = 30.0
PORT_ATTEMPTS: Final = 3


def required(program: str) -> str:
    """The path of a program."""
    path = shutil.which(program)
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{program} is not on the PATH, and CI may not skip")
        pytest.skip(f"{program} is not on the PATH")
    return path


class PrometheusApi:
    """The query API below an address, asked as another program would."""

    def __init__(self) -> None:
        self._http = urllib3.PoolManager(retries=False, timeout=30.0)

    def query_url(self) -> str:
        raise NotImplementedError

    async def ask(self, promql: str, at_ms: int) -> list[dict[str, Any]]:
        """The result of an instant query."""

        def ask() -> list[dict[str, Any]]:
            fields = {"query": promql, "time": f"{at_ms / 1000:.3f}", "nocache": "1"}
            answer = self._http.request(
                "POST", f"{self.query_url()}/api/v1/query", fields=fields, encode_multipart=False
            )
            assert answer.status == 200, answer.data
            found: list[dict[str, Any]] = answer.json()["data"]["result"]
            return found

        return await asyncio.to_thread(ask)

    async def points(self, end_ms: int, range_s: int = 3_600) -> dict[tuple[str, str, str], int]:
        """How many raw samples there are by (server_id, environment, role) up to a time; an absent label is empty."""
        newest = await self.ask(f'last_over_time({{server_id!=""}}[{range_s}s])', end_ms)
        names = {series["metric"]["__name__"] for series in newest}
        found: Counter[tuple[str, str, str]] = Counter()
        ordered = sorted(names)
        for some in (ordered[at : at + 50] for at in range(0, len(ordered), 50)):
            counts = (f'count_over_time({{__name__="{name}",server_id!=""}}[{range_s}s])' for name in some)
            text = " or ".join(
                f'label_replace(sum by (server_id, environment, role) ({count}), "number", "{number}", "", "")'
                for number, count in enumerate(counts)
            )
            for series in await self.ask(text, end_ms):
                labels = series["metric"]
                found[labels["server_id"], labels.get("environment", ""), labels.get("role", "")] += int(
                    series["value"][1]
                )
        return dict(found)

    async def answers(self, url: str, within_s: float = 2.0) -> bool:
        """Whether a GET is answered with 2xx."""

        def get() -> bool:
            try:
                return 200 <= self._http.request("GET", url, timeout=within_s).status < 300
            except HTTPError:
                return False

        return await asyncio.to_thread(get)


class StoreServer(PrometheusApi):
    """One process on one port of 127.0.0.1."""

    program: str
    ready_path: str
    write_path: str

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._path = required(self.program)
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def write_url(self) -> str:
        return self.url + self.write_path

    def query_url(self) -> str:
        return self.url

    def arguments(self) -> Sequence[str]:
        raise NotImplementedError

    async def start(self) -> None:
        """Starts the server, on the same port as before when there was one, and returns once it is ready."""
        again = self.port != 0
        for _ in range(PORT_ATTEMPTS):
            self.port = self.port if again else free_port()
            self.launch()
            await eventually(self._ended_or_ready, within_s=START_BOUND_S)
            if self.runs:
                return
            self.end()
        raise AssertionError(f"{self.program} did not start: {self._log.read_text()[-1000:]}")

    def launch(self) -> None:
        """Starts the process and waits for nothing."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([self._path, *self.arguments()], cwd=self.folder, stdout=log, stderr=log)

    def kill(self) -> None:
        """SIGKILL: connections are reset."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._process = None

    def end(self) -> None:
        """Kills the server if it runs."""
        if self._process is not None:
            self.kill()

    @property
    def _log(self) -> Path:
        return self.folder / f"{self.program}.log"

    async def _ended_or_ready(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None or await self.answers(self.url + self.ready_path)


class PrometheusServer(StoreServer):
    """Prometheus, which takes remote write and scrapes nobody."""

    program = "prometheus"
    ready_path = "/-/ready"
    write_path = "/api/v1/write"

    def __init__(self, folder: Path, out_of_order: str = "30d") -> None:
        """`out_of_order` is how late samples may be; `0s`, the default of Prometheus: not at all."""
        super().__init__(folder)
        storage = f"storage: {{tsdb: {{out_of_order_time_window: {out_of_order}}}}}\n"
        (folder / "prometheus.yml").write_text(f"global: {{scrape_interval: 1h}}\n{storage}")

    def arguments(self) -> Sequence[str]:
        return (
            f"--config.file={self.folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.folder / 'data'}",
            "--storage.tsdb.retention.time=100y",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--web.enable-remote-write-receiver",
            "--log.level=error",
        )


@contextlib.asynccontextmanager
async def prometheus_server(out_of_order: str = "30d") -> AsyncIterator[PrometheusServer]:
    """A running server, ended with the block."""
    required(PrometheusServer.program)
    with tempfile.TemporaryDirectory(prefix="openmanager-prometheus-") as folder:
        server = PrometheusServer(Path(folder), out_of_order)
        try:
            await server.start()
            yield server
        finally:
            server.end()
