"""Reads docker-compose.yml without a YAML library: the few forms that the file uses, and an error for any other.

Known: block mappings and sequences by two spaces, one-line JSON sequences and mappings, plain and double-quoted
scalars, anchors on mappings, aliases, merge keys, whole-line comments. So the file stays one that everyone can read and
the tests need nothing that the product does not. Compose's own part, the filling in of variables, is here too.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
REQUIRED: Final = "run deploy/compose/make-env first"

_KEY: Final = re.compile(r"([A-Za-z_<][\w.<-]*):(?: (.+))?")
_VARIABLE: Final = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<name>\w+):\?(?P<message>[^}]*)\}|(?P<bad>.|$))")


@dataclass(slots=True)
class _Line:
    number: int
    indent: int
    text: str


class _Reader:
    """One pass over the lines; `anchors` are known from where they stand on, as YAML has it."""

    def __init__(self, text: str) -> None:
        self.lines = [
            _Line(number, len(line) - len(line.lstrip(" ")), line.strip())
            for number, line in enumerate(text.splitlines(), start=1)
            if line.strip() and not line.lstrip().startswith("#")
        ]
        self.position = 0
        self.anchors: dict[str, Any] = {}

    def peek(self) -> _Line | None:
        return self.lines[self.position] if self.position < len(self.lines) else None

    def block(self, indent: int) -> Any:
        line = self.peek()
        assert line is not None and line.indent == indent, f"line {line}: not indented by {indent}"
        return self.sequence(indent) if line.text.startswith("- ") else self.mapping(indent)

    def sequence(self, indent: int) -> list[Any]:
        items: list[Any] = []
        while (line := self.peek()) and line.indent == indent and line.text.startswith("- "):
            rest = line.text[2:]
            if _KEY.fullmatch(rest):  # a mapping that begins behind the dash
                line.indent, line.text = indent + 2, rest
                items.append(self.mapping(indent + 2))
            else:
                self.position += 1
                items.append(self.scalar(rest, line))
        return items

    def mapping(self, indent: int) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        while (line := self.peek()) and line.indent == indent:
            match = _KEY.fullmatch(line.text)
            assert match, f"line {line.number}: not a form this reader knows: {line.text}"
            key, rest = match[1], match[2] or ""
            assert key not in own, f"line {line.number}: {key} twice"
            self.position += 1
            if key == "<<":
                merged |= self.scalar(rest, line)
                continue
            anchor = rest[1:] if rest.startswith("&") else None
            own[key] = self.scalar(rest, line) if rest and anchor is None else self.block(indent + 2)
            if anchor is not None:
                self.anchors[anchor] = own[key]
        following = self.peek()
        assert following is None or following.indent < indent, f"line {following}: indented too far"
        return merged | own

    def scalar(self, text: str, line: _Line) -> Any:
        if text.startswith("*"):
            return self.anchors[text[1:]]
        if text[0] in '["{':
            return json.loads(text)
        plain = text[0] not in "&!|>'%@`#,]}?" and ": " not in text and " #" not in text and not text.endswith(":")
        assert plain, f"line {line.number}: not a form this reader knows: {text}"
        if text in {"true", "false"}:
            return text == "true"
        return int(text) if text.isdecimal() else text


def read(path: Path) -> dict[str, Any]:
    """The file as dicts, lists, strings, integers and booleans."""
    text = path.read_text()
    assert "\t" not in text
    reader = _Reader(text)
    document: dict[str, Any] = reader.block(0)
    assert reader.peek() is None
    return document


def fill_in(value: Any, variables: Mapping[str, str]) -> Any:
    """`value` with every ${NAME:?message} replaced and every $$ a dollar, as Compose does it; KeyError: not set."""
    if isinstance(value, dict):
        return {key: fill_in(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [fill_in(item, variables) for item in value]
    if not isinstance(value, str):
        return value

    def replacement(match: re.Match[str]) -> str:
        assert match["bad"] is None, f"a variable that may be missing without a word: {value}"
        return "$" if match["dollar"] else variables[match["name"]]

    return _VARIABLE.sub(replacement, value)


def variables_of(text: str) -> dict[str, set[str]]:
    """Name -> what is said when it is missing, of every variable in `text`."""
    found: dict[str, set[str]] = {}
    for match in _VARIABLE.finditer(text):
        if match["name"]:
            found.setdefault(match["name"], set()).add(match["message"])
    return found


def read_env(path: Path) -> dict[str, str]:
    """The variables of a .env file as make-env writes it: NAME=value, no quotes, no spaces."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)
