"""The labelled recordings as the product scores them: what `python -m services.analytics score` prints, row by row.

Each server is scored alone, its `train` learnt first and its `test` judged, by the class that the command uses; on a
slice the command itself is run and its lines compared with what this makes, digit by digit.

What must stay true: no label and no later row is seen by the scorer; a difference from the command voids the row.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bench.analytics import recordings
from bench.analytics.recordings import Floats, Labelled
from bench.analytics.size import Bench
from bench.peers import ROOT, BenchError
from services.analytics.recording import Row
from services.analytics.scoring.command import RowScorer

START_S: Final = 1_600_041_600
"""When each recording is taken to begin, a midnight: they tell no times. The weekday is as good as any other."""
SLICE: Final = (600, 300)
"""Rows that are learnt and judged by the command."""
COMMAND_BOUND_S: Final = 120.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scored:
    """Scores and alarms of the tested rows of a server."""

    server: Labelled
    scores: Floats
    alarms: NDArray[np.bool_]


def scored(bench: Bench, data: Path) -> list[Scored]:
    """All servers; scored once a run, whichever row asks first."""
    if not bench.scored:
        size = bench.size
        servers = recordings.labelled(data, size.servers, size.learnt, size.tested)
        if {server.kind for server in servers} != set(recordings.STEPS_S):
            raise BenchError(f"{data} has recordings of {sorted({server.kind for server in servers})} only")
        compared = _compared_with_the_command(servers[-1], bench.folder)
        bench.say(f"scoring: {compared} lines of {servers[-1].name} are what the command prints")
        for server in servers:
            started = time.monotonic()
            one = score(server)
            bench.scored.append(one)
            rows = len(server.learnt) + len(server.tested)
            took = time.monotonic() - started
            bench.say(f"scoring: {server.name}, {rows:,} rows x {server.tested.shape[1]} metrics in {took:.0f} s")
    return bench.scored


def score(server: Labelled) -> Scored:
    """One server, as the command does with --train."""
    scorer = RowScorer(server.tested.shape[1])
    for row in _rows(server.learnt, START_S, server.step_s):
        scorer.add(row)
    start_s = START_S + len(server.learnt) * server.step_s
    scorer.begin_after(start_s)
    scores, alarms = np.zeros(len(server.tested)), np.zeros(len(server.tested), np.bool_)
    for place, row in enumerate(_rows(server.tested, start_s, server.step_s)):
        scorer.add(row)
        scores[place], alarms[place] = scorer.score, scorer.alarm
    return Scored(server=server, scores=scores, alarms=alarms)


def _rows(values: Floats, start_s: int, step_s: int) -> Iterable[Row]:
    for place, row in enumerate(values):
        time_s = start_s + place * step_s
        yield Row(str(time_s), float(time_s), row)


def _compared_with_the_command(server: Labelled, folder: Path) -> int:
    """How many lines of the command were compared; BenchError when one differs."""
    learnt, tested = SLICE
    part = Labelled(
        name=server.name,
        kind=server.kind,
        learnt=server.learnt[-learnt:],
        tested=server.tested[:tested],
        label=server.label[:tested],
    )
    ours = score(part)
    start_s = START_S + len(part.learnt) * part.step_s
    expected = [
        f"{row.text},{value:.6f},{int(alarm)}"
        for row, value, alarm in zip(
            _rows(part.tested, start_s, part.step_s), ours.scores.tolist(), ours.alarms.tolist(), strict=True
        )
    ]
    learn_from, judge_on = folder / "learnt.csv", folder / "tested.csv"
    _write(learn_from, _rows(part.learnt, START_S, part.step_s))
    _write(judge_on, _rows(part.tested, start_s, part.step_s))
    command = [sys.executable, "-m", "services.analytics", "score", str(judge_on), "--train", str(learn_from)]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "gen")))}
    try:
        run = subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=COMMAND_BOUND_S
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"the command has not scored {tested} rows within {COMMAND_BOUND_S:.0f} s") from None
    if run.returncode:
        _, _, reason = run.stderr.strip().rpartition("\n")
        raise BenchError(f"the command failed: {reason}")
    printed = run.stdout.splitlines()[1:]
    if printed != expected:
        odd = next((two for two in zip(printed, expected, strict=False) if two[0] != two[1]), ("", ""))
        raise BenchError(f"the command prints {len(printed)} lines of {len(expected)}, {odd[0]!r} for {odd[1]!r}")
    if not ours.scores.any():
        raise BenchError("the slice compared with the command was all learning")
    return len(printed)


def _write(path: Path, rows: Iterable[Row]) -> None:
    """A file as the command reads it; values in digits that give the same double again."""
    with path.open("w", encoding="utf-8") as file:
        for place, row in enumerate(rows):
            if not place:
                file.write("timestamp," + ",".join(f"metric_{metric}" for metric in range(len(row.values))) + "\n")
            file.write(f"{row.text}," + ",".join(map(repr, row.values.tolist())) + "\n")
