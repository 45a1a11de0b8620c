"""One run of judged rows as a report: what was measured, by what, when and where; for `bench api`, `metadata` and
`analytics`.

What must stay true: a row in which something went wrong is void and says why, and the others are measured all the same.
"""

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from bench import report
from bench.api.judged import Judged, table, void
from bench.peers import BenchError


class Reported:
    """A run, from when it is made."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._started, self._machine = datetime.now(UTC), report.machine()
        self._say = say
        self.results: dict[str, Any] = {}
        self.judged: list[Judged] = []

    def row(
        self, name: str, measure: Callable[[], dict[str, Any]], judged: Callable[[dict[str, Any]], list[Judged]]
    ) -> None:
        """Measures a row and judges it."""
        try:
            self.results[name] = measure()
            self.judged += judged(self.results[name])
        except BenchError as error:
            self._say(f"{name}: void: {error}")
            self.results[name] = {"void": str(error)}
            self.judged.append(void(name, name, str(error)))

    def whole(self, size: Any, **more: Any) -> dict[str, Any]:
        """Ready for JSON. `size`: a dataclass of how much was done."""
        return {
            "format": report.FORMAT,
            "started": self._started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
            "commit": report.commit(),
            "machine": self._machine | {"load_1m_at_the_end": os.getloadavg()[0]},
            "size": asdict(size),
            **more,
            "results": self.results,
            "table": [asdict(row) for row in self.judged],
        }


def delivered(found: dict[str, Any], path: Path, say: Callable[[str], None]) -> int:
    """Writes a whole report as JSON and prints it for people; the exit status, 1 when a row is void."""
    path.write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    print(f"\n{show(found)}")
    say(f"written to {path}")
    return int(failed(found))


def failed(found: dict[str, Any]) -> bool:
    """Whether a row is void."""
    return any("void" in result for result in found["results"].values())


def show(found: dict[str, Any]) -> str:
    """A whole report for people."""
    mix = f"{found['mix']}\n" if "mix" in found else ""
    when = f"{found['started']} to {found['finished']}, commit {found['commit']}"
    return f"{mix}{found['machine']}\n{when}\n\n{table([Judged(**row) for row in found['table']])}"
