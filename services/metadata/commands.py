"""What `python -m services.metadata COMMAND` does: look after the facts that PostgreSQL refused.

What must stay true: it works whether the service runs or not; nothing is retried or dropped that was not named, or
`--all` said; the exit status is 0 when all is well, 1 when something named is not there or the file cannot be used, 2
for a command or settings that make no sense.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import apsw

from runtime.errors import OpenManagerError
from runtime.settings import SettingsError
from services.metadata.journal import FILE_NAME, DeadLetter, Journal
from services.metadata.settings import MetadataSettings

NAME: Final = "metadata"
_EXIT_OK, _EXIT_FAILED, _EXIT_USAGE = 0, 1, 2
_SHOWN_CHARACTERS: Final = 200

_EXAMPLES: Final = """\
examples:
  python -m services.metadata                                   serve, as `make run` does
  python -m services.metadata dead-letters list                 what PostgreSQL refused, and why
  python -m services.metadata dead-letters list --payload       with the whole content, as JSON
  python -m services.metadata dead-letters retry --all          after what refused them was mended
  python -m services.metadata dead-letters drop 3f2b7c1e-8c1d-4f0e-9a53-0a4b6f0c2d11

The journal is DATA_DIR/metadata/facts.db (DATA_DIR is ./data when unset); the service may run or not. Exit status:
0 all is well, 1 an id is no dead letter's or the file cannot be used, 2 a command or settings that make no sense.
"""


def main(arguments: Sequence[str]) -> int:
    """Runs a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        settings = MetadataSettings.load()
    except SettingsError as error:
        _complain("settings that make no sense: " + "; ".join(error.problems))
        return _EXIT_USAGE
    path = settings.data_dir / NAME / FILE_NAME
    if not path.exists():
        _complain(f"there is no {path}: set DATA_DIR to the folder of the service")
        return _EXIT_FAILED
    try:
        return _run(options, path)
    except (OpenManagerError, apsw.Error, OSError) as error:
        _complain(f"{path}: {error}")
        return _EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    layout: dict[str, Any] = {"epilog": _EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    whole = argparse.ArgumentParser(
        prog="python -m services.metadata",
        description="The record of servers and AI interactions. Without a command: serves it.",
        **layout,
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    text = "look after facts that were acknowledged and that PostgreSQL refused"
    letters = commands.add_parser("dead-letters", help=text, description=_sentence(text), **layout)
    actions = letters.add_subparsers(dest="action", required=True, metavar="ACTION")
    text = "show each with its reason"
    listing = actions.add_parser("list", help=text, description=_sentence(text), **layout)
    listing.add_argument("--payload", action="store_true", help="with its whole content, which may be confidential")
    for name, text in (
        ("retry", "send to PostgreSQL again; the service does it within seconds, or when it starts"),
        ("drop", "delete for good, and print what is deleted"),
    ):
        action = actions.add_parser(name, help=text, description=_sentence(text), **layout)
        which = action.add_mutually_exclusive_group(required=True)
        which.add_argument("ids", metavar="ID", nargs="*", default=[], help="as `list` shows them")
        which.add_argument("--all", action="store_true", help="all of them")
    return whole


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _run(options: argparse.Namespace, path: Path) -> int:
    journal = Journal(path)
    try:
        letters = {letter.fact.id: letter for letter in journal.dead_letters()}
        if options.action == "list":
            for letter in letters.values():
                _say(_shown(letter, payload=options.payload))
            _say(f"{len(letters)} dead letters in {path}")
            return _EXIT_OK
        ids = None if options.all else options.ids
        done = journal.retry(ids) if options.action == "retry" else journal.drop(ids)
        for text in done:
            _say(f"waits again: {text}" if options.action == "retry" else f"dropped: {letters[text].fact.payload}")
    finally:
        journal.close()
    missing = sorted(set(ids or ()) - set(done))
    if missing:
        _complain(f"no dead letters: {', '.join(missing)}")
    return _EXIT_FAILED if missing else _EXIT_OK


def _shown(letter: DeadLetter, *, payload: bool) -> str:
    fact = letter.fact
    times = "once" if letter.attempts == 1 else f"{letter.attempts} times"
    lines = [
        f"{fact.id}  {fact.kind}  of {_time(fact.created_us / 1e6)}, {len(fact.payload)} characters",
        f"  refused {times}, first {_time(letter.first_ms / 1e3)}, last {_time(letter.last_ms / 1e3)}",
        f"  {letter.reason[:_SHOWN_CHARACTERS]}",
    ]
    return "\n".join([*lines, f"  {fact.payload}"] if payload else lines)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _complain(text: str) -> None:
    sys.stderr.write(f"{NAME}: {text}\n")
