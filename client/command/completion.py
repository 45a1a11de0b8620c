"""Completion for bash, zsh and fish, generated from the tree of arguments: nothing is listed twice.

One function of the shell walks the words before the cursor to find the command that they belong to, then offers what
the tree has there. The gateway is not asked: pressing a key must not wait for a network.
"""

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

FILES: Final = "FILE"
"""The metavar of what is a file."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option, what it is for, and what its value may be; `takes_value` without choices or files: anything."""

    name: str
    help: str
    takes_value: bool
    choices: tuple[str, ...]
    is_file: bool


@dataclass(frozen=True, slots=True)
class Node:
    """A command: `history`, `audit verify`; the whole is "".

    `words` are subcommands, or choices of a positional argument, with what they are for.
    """

    path: str
    options: tuple[Option, ...]
    words: dict[str, str] = field(default_factory=dict)
    subcommands: tuple[str, ...] = ()
    files: bool = False


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """What the shell is to source."""
    found = tuple(nodes(parser))
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](found)


def nodes(parser: argparse.ArgumentParser, path: str = "") -> Iterator[Node]:
    """The commands of a tree, depth first."""
    options, words, below, files = [], {}, {}, False
    for action in parser._actions:
        choices = tuple(str(choice) for choice in action.choices or ())
        is_file = action.metavar == FILES
        if isinstance(action, argparse._SubParsersAction):
            below = dict(action.choices)
            words = {one.dest: one.help or "" for one in action._choices_actions}
        elif not action.option_strings:
            words |= dict.fromkeys(choices, "")
            files |= is_file
        else:
            summary = "" if action.help in (None, argparse.SUPPRESS) else str(action.help)
            long = max(action.option_strings, key=len)
            options.append(Option(long, summary, action.nargs != 0, choices, is_file))
    yield Node(path, tuple(options), words, tuple(below), files)
    for name, child in below.items():
        yield from nodes(child, f"{path} {name}".strip())


def _value_options(found: tuple[Node, ...]) -> str:
    return "|".join(sorted({option.name for node in found for option in node.options if option.takes_value}))


def _walk(found: tuple[Node, ...], indent: str) -> str:
    """Cases of a shell's `case "$path:$word"` that step down into subcommands."""
    return "\n".join(
        f"{indent}{shlex.quote(f'{node.path}:{name}')}) path={shlex.quote(f'{node.path} {name}'.strip())} ;;"
        for node in found
        for name in node.subcommands
    )


def _bash(found: tuple[Node, ...]) -> str:
    values, words = [], []
    for node in found:
        for option in node.options:
            key = shlex.quote(f"{node.path}:{option.name}")
            if option.choices:
                values.append(f"        {key}) choices={shlex.quote(' '.join(option.choices))} ;;")
            elif option.is_file:
                values.append(f"        {key}) files=1 ;;")
        offered = shlex.quote(" ".join((*node.words, *(option.name for option in node.options))))
        words.append(f"            {shlex.quote(node.path)}) choices={offered}{' files=1' if node.files else ''} ;;")
    return f"""\
# bash completion of openmanager: source <(openmanager completion bash)
_openmanager() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} path='' skip='' word
    local choices='' files=''
    if [[ $current == '=' ]]; then
        current=''
    elif [[ $previous == '=' ]]; then
        previous=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        if [[ $word == '=' ]]; then
            continue
        elif [[ $skip ]]; then
            skip=''
            continue
        fi
        case $word in
            {_value_options(found)}) skip=1; continue ;;
        esac
        case "$path:$word" in
{_walk(found, "            ")}
        esac
    done
    case "$path:$previous" in
{chr(10).join(values)}
        *)
            case $previous in
                {_value_options(found)}) return ;;
            esac
            case "$path" in
{chr(10).join(words)}
            esac
            ;;
    esac
    COMPREPLY=($(compgen -W "$choices" -- "$current"))
    if [[ $files ]]; then
        compopt -o filenames 2> /dev/null
        mapfile -t -O "${{#COMPREPLY[@]}}" COMPREPLY < <(compgen -f -- "$current")
    fi
}}
complete -F _openmanager openmanager
"""


def _described(name: str, summary: str) -> str:
    """A word for zsh's _describe, whose colons divide."""
    return shlex.quote(name.replace(":", "\\:") + (f":{summary}" if summary else ""))


def _zsh(found: tuple[Node, ...]) -> str:
    values, words = [], []
    for node in found:
        for option in node.options:
            key = shlex.quote(f"{node.path}:{option.name}")
            if option.choices:
                values.append(f"        {key}) candidates=({' '.join(option.choices)}) ;;")
            elif option.is_file:
                values.append(f"        {key}) _files; return ;;")
        offered = [_described(name, summary) for name, summary in node.words.items()]
        offered += [_described(option.name, option.help) for option in node.options]
        files = " _files;" if node.files else ""
        words.append(f"            {shlex.quote(node.path)}){files} candidates=({' '.join(offered)}) ;;")
    return f"""\
#compdef openmanager
# zsh completion of openmanager: source <(openmanager completion zsh)
_openmanager() {{
    local word skip='' cmd=''
    local previous=${{words[CURRENT-1]}}
    local -a candidates
    local path_=''
    for word in ${{words[2,CURRENT-1]}}; do
        if [[ -n $skip ]]; then
            skip=''
            continue
        fi
        case $word in
            ({_value_options(found)}) skip=1; continue ;;
        esac
        case "$path_:$word" in
{_walk(found, "            ").replace(") path=", ") path_=")}
        esac
    done
    case "$path_:$previous" in
{chr(10).join(values)}
        *)
            case $previous in
                ({_value_options(found)}) return ;;
            esac
            case "$path_" in
{chr(10).join(words)}
            esac
            ;;
    esac
    _describe 'openmanager' candidates
}}
compdef _openmanager openmanager
"""


def _fish(found: tuple[Node, ...]) -> str:
    lines = [
        "# fish completion of openmanager: openmanager completion fish | source",
        "function __openmanager_path",
        "    set -l path ''",
        "    set -l skip 0",
        "    for word in (commandline -opc)[2..-1]",
        "        if test $skip = 1",
        "            set skip 0",
        "            continue",
        "        end",
        '        switch "$path:$word"',
        f"            case {' '.join(repr('*:' + name) for name in _value_options(found).split('|'))}",
        "                set skip 1",
    ]
    for node in found:
        for name in node.subcommands:
            lines += [
                f"            case {shlex.quote(f'{node.path}:{name}')}",
                f"                set path {shlex.quote(f'{node.path} {name}'.strip())}",
            ]
    lines += [
        "        end",
        "    end",
        '    echo "$path"',
        "end",
        "complete -c openmanager -e",
        "complete -c openmanager -f",
    ]
    for node in found:
        here = f"complete -c openmanager -n {_fish_quoted(f'test (__openmanager_path) = {_fish_quoted(node.path)}')}"
        for name, summary in node.words.items():
            lines.append(f"{here} -a {name}" + (f" -d {_fish_quoted(summary)}" if summary else ""))
        if node.files:
            lines.append(f"{here} -F")
        for option in node.options:
            value = (" -r -F" if option.is_file else " -x") if option.takes_value else ""
            value += f" -a {_fish_quoted(' '.join(option.choices))}" if option.choices else ""
            lines.append(f"{here} -l {option.name.removeprefix('--')}{value} -d {_fish_quoted(option.help)}")
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
