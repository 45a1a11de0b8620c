"""`python -m services.analytics score FILE.csv`: the detector on a recording, so that anybody can judge it.

What must stay true: one line for each row of the input, in its order; a line depends on the rows up to it and on
nothing that comes later, nor on how many there are; memory does not grow with the file; the exit status is 0, or 2
where the input or the command makes no sense, with the row and column said.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TextIO

import numpy as np

from services.analytics.recording import BadRecordingError, Recording, Row, epoch_s
from services.analytics.scoring import parameters as p
from services.analytics.scoring.arrays import Floats
from services.analytics.scoring.server import FleetScorer, ServerWindow
from services.analytics.scoring.windows import Windows

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXIT_OK, _EXIT_USAGE = 0, 2
_WEEK_S: Final = 7 * p.DAY_S

_EXAMPLES: Final = """\
examples:
  python -m services.analytics score server.csv > scores.csv
  python -m services.analytics score server.csv --train last-month.csv --per-metric --output scores.csv
  python -m services.analytics score server.csv --train-until 2026-03-01T00:00:00Z

The file has a header with `timestamp` (epoch seconds, RFC 3339, or YYYY-MM-DD HH:MM:SS in UTC) and a column for each
metric; rows in order of time, at any interval; an empty cell is no value. The output is timestamp,score,alarm: the
score is from 0 to 1 and 0 for the first day and 100 rows, which are learnt; the alarm is 1 where the score is above the
server's own level, which is held at about two openings a day (in 24 rows, where they are over an hour apart), incidents
included. With --per-metric a column score_METRIC follows for each. A single metric's score is near 0 for 100 rows after
one of .5.
"""


def add(subparsers: "Subparsers") -> None:
    """Adds the command to a parser."""
    text = "score a recording: how abnormal is each row"
    parser = subparsers.add_parser(
        "score",
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE.csv", help="the recording; - is the standard input")
    parser.add_argument("--per-metric", action="store_true", help="with a score for each metric")
    learn = parser.add_mutually_exclusive_group()
    learn.add_argument("--train", metavar="FILE", help="a recording of the same metrics that is learnt first")
    learn.add_argument("--train-until", metavar="T", help="rows before this time are learnt and raise no alarm")
    parser.add_argument("--output", metavar="FILE", help="instead of the standard output")


def run(options: argparse.Namespace) -> int:
    """Scores; returns the exit status."""
    try:
        until_s = epoch_s(options.train_until) if options.train_until else -np.inf
    except ValueError as error:
        return _complain(f"--train-until: {error}")
    if options.output is not None and any(_is_same(options.output, path) for path in (options.file, options.train)):
        return _complain(f"--output: {options.output} is a recording that is read")
    try:
        with Recording(options.file) as recording:
            scorer = RowScorer(len(recording.metrics))
            if options.train:
                _train(scorer, options.train, recording)
            if options.output is None:
                _score(recording, scorer, until_s, options.per_metric, sys.stdout)
            else:
                with Path(options.output).open("w", encoding="utf-8", newline="") as output:
                    _score(recording, scorer, until_s, options.per_metric, output)
    except BadRecordingError as error:
        return _complain(str(error))
    except BrokenPipeError:  # nobody reads the output any more
        raise
    except OSError as error:
        if options.output is None:  # whoever called tells of the standard output
            raise
        return _complain(f"{error.filename or options.output}: {error.strerror}")
    return _EXIT_OK


class RowScorer:
    """Scores the rows of one server."""

    def __init__(self, metrics: int) -> None:
        self._scorer = FleetScorer([metrics])
        self._windows = Windows(metrics)
        self._shift_s = 0.0
        self._last_s = -np.inf
        self._nothing: Floats = np.zeros(metrics)
        self._window: ServerWindow | None = None

    def add(self, row: Row) -> None:
        """Judges and learns a row."""
        time_s = row.time_s + self._shift_s
        self._last_s = time_s
        for start_s, values in self._windows.add(time_s, row.values):
            self._window = self._scorer.update(start_s, values)

    def begin_after(self, first_s: float) -> None:
        """What follows begins at that time; where that is not later than what was learnt, it is taken to be so many
        whole weeks later, so that hours and weekdays stay what they are."""
        if first_s <= self._last_s:
            self._shift_s = _WEEK_S * np.ceil((self._last_s - first_s + 1.0) / _WEEK_S)

    @property
    def score(self) -> float:
        """Of the last window that is complete."""
        return float(self._window.score[0]) if self._window is not None else 0.0

    @property
    def alarm(self) -> bool:
        """Of the last window that is complete."""
        return self._window is not None and bool(self._window.alarm[0])

    @property
    def metric_scores(self) -> Floats:
        """Of the last window that is complete."""
        return self._window.series.rested if self._window is not None else self._nothing


def _train(scorer: RowScorer, path: str, recording: Recording) -> None:
    with Recording(path) as history:
        if set(history.metrics) != set(recording.metrics):
            odd = sorted(set(history.metrics) ^ set(recording.metrics))
            raise BadRecordingError(f"{path}: its metrics are not those of {recording.name}: {', '.join(odd[:5])}")
        order = [history.metrics.index(metric) for metric in recording.metrics]
        for row in history:
            scorer.add(Row(row.text, row.time_s, row.values[order]))


def _score(recording: Recording, scorer: RowScorer, until_s: float, per_metric: bool, output: TextIO) -> None:
    writer = csv.writer(output, lineterminator="\n")
    header = ["timestamp", "score", "alarm"]
    writer.writerow(header + [f"score_{metric}" for metric in recording.metrics] * per_metric)
    is_first = True
    for row in recording:
        if is_first:
            scorer.begin_after(row.time_s)
            is_first = False
        scorer.add(row)
        line: list[Any] = [row.text, f"{scorer.score:.6f}", int(scorer.alarm and row.time_s >= until_s)]
        if per_metric:
            line += [f"{score:.6f}" for score in scorer.metric_scores.tolist()]
        writer.writerow(line)


def _is_same(output: str, path: str | None) -> bool:
    return path is not None and Path(output).exists() and Path(path).exists() and Path(output).samefile(path)


def _complain(what: str) -> int:
    sys.stderr.write(f"score: {what}\n")
    return _EXIT_USAGE
