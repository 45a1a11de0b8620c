"""Every command that the README shows works on a running product, and answers what the README says it answers."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.harness.commands import require_command
from tests.harness.launched import Launched

README = Path(__file__).resolve().parents[2] / "README.md"


def examples(page: Path = README) -> list[tuple[str, str]]:
    """(command, answer) of every line that begins with `$` in a console block, continuation lines included."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL):
        for example in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = example.rstrip().splitlines()
            end = next(index for index in range(1, len(lines) + 1) if "\n".join(lines[:index]).count("'") % 2 == 0)
            found.append(("\n".join(lines[:end]), "\n".join(lines[end:])))
    return found


def names(text: str) -> set[str]:
    """The JSON names and the symbols in an answer, whatever their values."""
    return set(re.findall(r'"([A-Za-z_]+)":', text)) | set(re.findall(r"^[a-z]+(?:\.\w+)+$", text, re.MULTILINE))


@pytest.mark.parametrize(("command", "answer"), examples(), ids=lambda text: text.split("\n")[0][:60])
def test_readme_examples_work(product: Launched, command: str, answer: str) -> None:
    require_command(command.split(maxsplit=1)[0])
    command = command.replace("127.0.0.1:8080", product.http_address)
    command = command.replace("127.0.0.1:50050", product.addresses["gateway"])
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout, done.stderr
    assert names(answer) <= names(done.stdout), done.stdout
    assert '"code"' not in done.stdout.split("\n")[0]


def test_the_readme_has_examples_of_both_kinds() -> None:
    commands = [command for command, _ in examples()]
    assert sum(command.startswith("curl") for command in commands) >= 3
    assert sum(command.startswith("grpcurl") for command in commands) >= 2
