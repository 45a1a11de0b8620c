"""Completion as a shell does it."""

import argparse
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from client.command.arguments import SHELLS, parser
from client.command.completion import nodes, script
from tests.client.calling import called
from tests.harness.commands import require_command

COMMANDS = {
    "servers",
    "server",
    "watch",
    "history",
    "trend",
    "anomalies",
    "anomaly",
    "capacity",
    "predictions",
    "ingest",
    "status",
    "audit",
    "certs",
    "setup",
    "token",
    "user",
    "completion",
}
GATEWAY = {"--help", "--address", "--token", "--ca-file", "--profile", "--timeout"}


def completed(line: str, folder: Path) -> set[str]:
    """What bash offers where the line ends: its words are split as readline splits them, at `=` too."""
    words = [part for word in line.split(" ") for part in word.replace("=", " = ").split(" ") if part or not word]
    typed = f"COMP_WORDS=({' '.join(map(shlex.quote, words))}) COMP_CWORD={len(words) - 1}"
    asked = f'source <(cat)\n{typed}\n_openmanager\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        [require_command("bash"), "--norc", "-c", asked],
        input=script(parser(), "bash"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert done.stderr == ""
    return set(done.stdout.split("\n")) - {""}


def test_bash_completes(tmp_path: Path) -> None:
    (tmp_path / "metrics one.json").touch()
    (tmp_path / "other.pem").touch()
    for line, offered in (
        ("openmanager ", COMMANDS | GATEWAY),
        ("openmanager c", {"capacity", "certs", "completion"}),
        ("openmanager capacity --wi", {"--within"}),
        ("openmanager trend web-01 cpu_usage --output ", {"table", "json"}),
        ("openmanager s", {"servers", "server", "setup", "status"}),
        ("openmanager servers --st", {"--status"}),
        ("openmanager servers e", {"export"}),
        ("openmanager servers import m", {"metrics one.json"}),
        ("openmanager servers --status ", {"healthy", "warning", "critical", "offline"}),
        ("openmanager servers --status w", {"warning"}),
        ("openmanager servers --status=w", {"warning"}),
        ("openmanager servers --status=", {"healthy", "warning", "critical", "offline"}),
        ("openmanager --address history:1 servers --ro", {"--role"}),
        ("openmanager --profile status servers --ro", {"--role"}),
        ("openmanager --token ", set()),
        ("openmanager history web-01 cpu_usage --output p", {"parquet"}),
        ("openmanager history web-01 cpu_usage --aggregation M", {"MIN", "MAX"}),
        ("openmanager audit ", {"verify", "export"} | GATEWAY),
        ("openmanager audit verify --a", {"--address"}),
        ("openmanager audit export --format ", {"jsonl", "csv"}),
        ("openmanager completion ", set(SHELLS) | GATEWAY),
        ("openmanager ingest m", {"metrics one.json"}),
        ("openmanager ingest --ca-file o", {"other.pem"}),
        ("openmanager ingest --retry-for ", set()),
        ("openmanager watch x", set()),
    ):
        assert completed(line, tmp_path) == offered, line


def test_scripts_are_printed() -> None:
    for shell in SHELLS:
        done = called(None, "completion", shell)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == script(parser(), shell)
    subprocess.run([require_command("bash"), "-n"], input=script(parser(), "bash"), text=True, check=True)
    assert called(None, "completion", "cmd").returncode == 2


@pytest.mark.parametrize("shell", SHELLS)
def test_nothing_of_the_tree_is_missing(shell: str) -> None:
    text = script(parser(), shell)
    found = list(nodes(parser()))
    assert {node.path for node in found} == {
        "",
        "audit verify",
        "audit export",
        "certs init",
        "token create",
        "token list",
        "token rotate",
        "token revoke",
        "user create",
        "user list",
        "user change",
        "user password",
        "user delete",
        "servers export",
        "servers import",
    } | COMMANDS
    for node in found:
        for option in node.options:
            name = option.name.removeprefix("--") if shell == "fish" else option.name
            assert name in text
            assert all(choice in text for choice in option.choices)
        assert all(word in text for word in node.words)


@pytest.mark.parametrize("shell", SHELLS)
def test_texts_of_help_cannot_break_out_of_the_script(shell: str) -> None:
    tree = argparse.ArgumentParser(prog="openmanager")
    below = tree.add_subparsers()
    below.add_parser("run", help="it's $(touch pwned) `touch pwned` \\ : [x]").add_argument("--now", help="don't; 'x'")
    text = script(tree, shell)
    assert ("pwned" in text) == (shell != "bash"), "bash shows no help"
    quoted = r"'(?:\\.|[^'\\])*'" if shell == "fish" else r"'[^']*'"
    assert "pwned" not in re.sub(quoted, "", text.replace("'\"'\"'", "") if shell == "zsh" else text)
