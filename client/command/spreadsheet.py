"""Cells of CSV files that a spreadsheet shows and does not run.

It takes a cell that begins with `=`, `+`, `-`, `@`, a tab or a line's end for a formula, and those who name metrics and
servers, or are refused under a name of their choice, are not those who open the file. An apostrophe before it makes it
text. The gateway's files of servers have the same, and its import takes the apostrophe away.

What must stay true: a number stays one; what was written can be told from what begins with an apostrophe itself.
"""

import re
from typing import Final

_FORMULA: Final = re.compile(r"'*[=+\-@\t\r\n]")
_NUMBER: Final = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


def cell(text: str) -> str:
    """A text that others chose, as it is written; one apostrophe less is what it was, if such a thing follows it."""
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text
