"""Every command and the program that docs/client.md shows work on a running product, and print what the page says."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.client.calling import environment
from tests.docs.examples import examples, names
from tests.harness.findings import finding, tell
from tests.harness.launched import Launched

PAGE = Path(__file__).resolve().parents[2] / "docs" / "client.md"


def shape(line: str) -> str:
    """A line without what differs from run to run."""
    return re.sub(r"[\d.:,-]+", "0", line)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH with the command on it."""
    command = tmp_path / "openmanager"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m client "$@"\n')
    command.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


@pytest.mark.parametrize(("command", "answer"), examples(PAGE), ids=lambda text: text.split("\n")[0][:60])
def test_the_commands_of_the_page_work(product: Launched, path: str, command: str, answer: str) -> None:
    if "anomalies" in command:
        tell(product, finding("web-01", int(time.time() * 1_000) - 60_000))
    environ = environment(product.addresses["gateway"], PATH=path)
    done = subprocess.run(["bash", "-c", command], env=environ, capture_output=True, text=True, timeout=60, check=False)
    forget(product)
    assert (done.returncode, done.stderr) == (0, "")
    said, printed = answer.split("\n", maxsplit=1)[0], done.stdout.split("\n")[0]
    if said.startswith("{"):
        assert names(answer) <= names(done.stdout)
    else:
        assert " ".join(shape(printed).split()) == " ".join(shape(said).split())


def test_the_page_has_an_example_of_each_command() -> None:
    shown = PAGE.read_text()
    commands = (
        "servers",
        "server",
        "watch",
        "history",
        "anomalies",
        "anomaly",
        "trend",
        "capacity",
        "predictions",
        "ingest",
        "status",
        "audit verify",
        "completion",
    )
    assert [command for command in commands if f"openmanager {command}" not in shown] == []


def test_the_program_of_the_page_runs(product: Launched) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    program = program.replace("127.0.0.1:50050", product.addresses["gateway"])
    run = [sys.executable, "-"]
    environ = environment(None)
    done = subprocess.run(run, input=program, env=environ, capture_output=True, text=True, timeout=60, check=False)
    forget(product)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^1 \[\]$", done.stdout, re.MULTILINE), "written"
    assert "StatusCode.NOT_FOUND SERVER_NOT_FOUND id there is no server 'nobody' `openmanager servers`" in done.stdout
    assert re.search(r"^True \[.*'web-01'", done.stdout, re.MULTILINE), "watched"


def forget(product: Launched) -> None:
    """Takes the server out of the fleet that the page writes to."""
    product.post("/v1/servers/client-mine", None, method="DELETE")
