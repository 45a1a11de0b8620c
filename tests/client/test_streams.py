"""Where the command's output goes: streams that are closed, encodings, and files that are none."""

import os
import shlex
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from tests.client.calling import COMMAND, called, environment
from tests.harness.launched import Launched, within

NAME = "streams-日本"


@pytest.fixture
def address(product: Launched) -> str:
    body = {"metrics": [{"name": "m"}], "rows": [{"serverId": NAME, "time": "now"}], "values": [1]}
    assert product.post("/v1/metrics:write", body).status == 200
    within(30, lambda: NAME in product.get("/v1/servers:export?format=json_lines").body.decode())
    return product.addresses["gateway"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_the_caller_has_closed_are_as_if_they_led_to_nothing(address: str, closed: str) -> None:
    for words, status in ((["servers"], 0), (["ingest", "-"], 0), (["server", "nobody"], 4)):
        line = f"{shlex.join([*COMMAND, *words])} {closed}"
        done = subprocess.run(
            ["/bin/bash", "-c", line], env=environment(address), capture_output=True, timeout=60, check=False
        )
        assert done.returncode == status, done.stderr
        assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [("servers", "export", "-"), ("audit", "export", "--format", "csv"), ("history", NAME, "m", "--output", "csv")],
)
def test_what_programs_read_is_utf8_whatever_the_terminal_shows(address: str, words: tuple[str, ...]) -> None:
    done = called(address, *words, environ={"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert NAME in done.stdout or "audit" in words


def test_an_argument_of_other_bytes_is_refused(address: str) -> None:
    done = called(address, "server", os.fsdecode(b"\xff"))
    assert done.returncode == 2
    assert "is not UTF-8" in done.stderr and "Traceback" not in done.stderr


def test_an_export_replaces_a_file_and_nothing_else(address: str, tmp_path: Path) -> None:
    private = tmp_path / "private.csv"
    private.touch(mode=0o600)
    link = tmp_path / "link.csv"
    link.symlink_to(private.name)
    assert called(address, "servers", "export", str(link)).returncode == 0
    assert link.is_symlink() and NAME in private.read_text()
    assert stat.S_IMODE(private.stat().st_mode) == 0o600

    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    read: list[str] = []
    holder = os.open(pipe, os.O_RDWR)  # so that neither side waits for the other to open it
    reader = threading.Thread(target=lambda: read.append(os.read(holder, 1 << 20).decode()))
    reader.start()
    assert called(address, "servers", "export", str(pipe)).returncode == 0
    if not pipe.is_fifo():
        os.write(holder, b"\n")
    reader.join(30)
    os.close(holder)
    assert pipe.is_fifo() and read[0].startswith("id,hostname,")


def test_nobody_becomes_a_user_without_a_password_because_nothing_came_in(address: str, product: Launched) -> None:
    done = called(address, "user", "create", "passwordless", "--role", "viewer", stdin="")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no password of passwordless was given" in done.stderr
    assert "passwordless" not in [user["name"] for user in product.get("/v1/users").json["users"]]
