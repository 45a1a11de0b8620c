"""The product as a user starts it: the launcher and what it prints, on free ports, in a folder of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from tests.harness import free_port
from tests.harness.cluster import begin_with_cluster
from tests.harness.product import ADDRESSES, KEPT_VARIABLES, ROOT, Answer, http

START_WITHIN_S = 90.0


def within(bound_s: float, condition: Callable[[], Any]) -> Any:
    """Waits for a condition in a synchronous test; returns its value."""
    ends = time.monotonic() + bound_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < ends, f"not true within {bound_s} s; last value: {value!r}"
        time.sleep(0.05)


class Launched:
    """``python -m launcher`` with free ports."""

    def __init__(self, folder: Path, *, first_start: bool = False, **settings: str) -> None:
        """`first_start`: with no cluster of PostgreSQL, as a user's; see tests.harness.cluster."""
        self._first_start = first_start
        self.folder = folder
        self.data = folder / "data"
        self.addresses = {name: f"127.0.0.1:{free_port()}" for name in ADDRESSES}
        self.http_address = f"127.0.0.1:{free_port()}"
        self.environ = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        self.environ |= {"DATA_DIR": str(self.data), "GATEWAY_HTTP_ADDRESS": self.http_address}
        self.environ |= {variable: self.addresses[name] for name, variable in ADDRESSES.items()}
        self.environ |= settings
        self._output = folder / "launcher.txt"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        if not self._first_start and "DATABASE_URL" not in self.environ:
            begin_with_cluster(self.data)
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "launcher"], cwd=ROOT, env=self.environ, stdout=output, stderr=output
            )
        try:
            within(START_WITHIN_S, lambda: self.says("OpenManager is running"))
        except AssertionError:
            self.stop(signal.SIGKILL)
            raise AssertionError(self.printed) from None
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGINT)

    def stop(self, how: signal.Signals) -> int:
        """Sends a signal and waits for the end; returns the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(90)

    @property
    def printed(self) -> str:
        """What the terminal shows so far."""
        return self._output.read_text()

    def says(self, text: str) -> bool:
        """Whether the terminal shows a text; fails when the launcher has ended without it."""
        assert self.process is not None
        shown = text in self.printed
        assert shown or self.process.poll() is None, self.printed
        return shown

    def pid_of(self, name: str) -> int:
        """The process id of a process of the product."""
        module = "gateway" if name == "gateway" else f"services.{name}"
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    environ = (entry / "environ").read_bytes()
                except OSError:
                    continue
                ours = f"DATA_DIR={self.data}".encode() in environ.split(b"\0")
                if ours and module.encode() in words and b"-m" in words:
                    return int(entry.name)
        raise AssertionError(f"{name} does not run")

    def processes(self) -> list[str]:
        """Command lines of everything that runs with our data, the embedded PostgreSQL included."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    environ = (entry / "environ").read_bytes().decode(errors="replace")
                except OSError:
                    continue
                if str(self.data) in line or re.search(rf"DATA_DIR={re.escape(str(self.data))}\0", environ):
                    found.append(line)
        return found

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        """GET over HTTP."""
        return http(f"http://{self.http_address}{path}", headers=headers)

    def post(
        self, path: str, body: Any, *, method: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """POST (or another method with a body) over HTTP."""
        return http(f"http://{self.http_address}{path}", body, method, headers)
