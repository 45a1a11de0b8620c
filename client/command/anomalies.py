"""`openmanager anomalies [SERVER]` and `openmanager anomaly ID`."""

import json
import math
import sys
import time
from argparse import Namespace
from contextlib import aclosing
from typing import Any, Final

from client import anomalies
from client.api import OpenManager
from client.command import exits
from client.command.fleet import as_json
from client.command.tables import Column, table
from client.command.terminal import Terminal, clean, complain
from client.command.values import age_text, number_text, time_text
from openmanager.fleet.v1 import anomaly_pb2 as pb
from openmanager.gateway.v1.analytics_pb2 import ListAnomaliesResponse

_COLUMNS: Final = (
    Column("SINCE (UTC)"),
    Column("UNTIL"),
    Column("SERVER"),
    Column("SCORE", right=True),
    Column("WHAT"),
    Column("ID"),
    Column("SAID"),
)
_PARTS: Final = (
    Column("METRIC"),
    Column("VALUE", right=True),
    Column("EXPECTED", right=True),
    Column("SCORE", right=True),
)

_SILENCE: Final = "silence"
_PREDICTION: Final = "prediction"


async def run(manager: OpenManager, options: Namespace) -> int:
    """Runs the command; returns the exit status."""
    terminal = Terminal(sys.stdout)
    if options.command == "anomaly":
        one = await _one(manager, options)
        if options.output == "json":
            terminal.line(json.dumps(as_json(one)))
        else:
            _show(terminal, one)
        return exits.OK
    await _list(manager, options, terminal)
    return exits.OK


async def _one(manager: OpenManager, options: Namespace) -> pb.Anomaly:
    if options.acknowledge:
        return await anomalies.acknowledge(manager, options.id, options.comment)
    if options.real or options.false:
        return await anomalies.judge(manager, options.id, is_real=options.real, comment=options.comment)
    if options.comment:
        raise exits.CommandFailed("a comment goes with --acknowledge, --real or --false")
    return await anomalies.anomaly(manager, options.id)


async def _list(manager: OpenManager, options: Namespace, terminal: Terminal) -> None:
    found, last = await _found(manager, options)
    shown = found[: options.count] if options.count else found
    if options.output == "json":
        for one in shown:
            terminal.line(json.dumps(as_json(one)))
        return
    for line in table(terminal, _COLUMNS, [_row(one) for one in shown]) if shown else ("nothing was found",):
        terminal.line(line)
    if last.total_size > len(shown):
        complain(f"{last.total_size - len(shown):,} more: --count 0 lists all")
    if last.partly_judged:
        terminal.line("not all metrics are judged: analytics watches as many as it may (ANALYTICS_SERIES_LIMIT)")
    if last.HasField("learned") and last.learned < 1 and not (last.partly_judged and not last.learned):
        terminal.line(f"still learning what is usual, {last.learned:.0%} done: what is not known yet is not found")


async def _found(manager: OpenManager, options: Namespace) -> tuple[list[pb.Anomaly], ListAnomaliesResponse]:
    """As many as are wanted, and the last page."""
    filters: dict[str, Any] = {"server_id": options.id}
    filters |= {name: getattr(options, name) for name in ("metric", "detector", "min_score", "environment", "role")}
    if options.open:
        filters["open"] = True
    if options.unacknowledged:
        filters["acknowledged"] = False
    found: list[pb.Anomaly] = []
    last = ListAnomaliesResponse()
    async with aclosing(anomalies.anomalies(manager, start=options.start, end=options.end, **filters)) as pages:
        async for last in pages:
            found += last.anomalies
            if last.HasField("stale_since"):
                complain("the metadata database is away: only what was found in the last day is listed")
                break
            if options.count and len(found) >= options.count:
                break
    return found, last


def _row(one: pb.Anomaly) -> tuple[str, ...]:
    until = time_text(one.end_time.seconds) if one.HasField("end_time") else "goes on"
    said = []
    if one.HasField("acknowledgement"):
        said.append(one.acknowledgement.author)
    if one.verdict:
        said.append("real" if one.verdict == pb.ANOMALY_VERDICT_REAL else "false")
    return (
        time_text(one.start_time.seconds),
        until,
        one.server_id,
        f"{one.score:.2f}",
        _what(one),
        one.id,
        ", ".join(said),
    )


def _what(one: pb.Anomaly) -> str:
    if one.detector == _SILENCE:
        return _silence(one)
    others = len(one.contributions) - 1
    metrics = one.metric + (f" and {others} more" if others > 0 else "")
    if one.detector == _PREDICTION:  # of what is to come: nothing need be abnormal yet
        return ": ".join(filter(None, ("likely to fail", metrics)))
    return metrics or one.detector


def _silence(one: pb.Anomaly) -> str:
    """For how long: what was found when it began stays as it is until it ends."""
    if not math.isfinite(one.value):
        return "silent"
    goes_on = one.HasField("peak_time") and not one.HasField("end_time")
    since_s = max(0.0, time.time() - one.peak_time.ToMilliseconds() / 1_000) if goes_on else 0.0
    seconds = one.value + since_s
    return f"silent for {seconds:.0f} s" if seconds < 120 else f"silent for {age_text(seconds)}"


def _show(terminal: Terminal, one: pb.Anomaly) -> None:
    terminal.line(terminal.coloured(clean(f"{one.server_id}: {_what(one)}"), "bold"))
    until = f"until {time_text(one.end_time.seconds)}" if one.HasField("end_time") else "goes on"
    facts = {
        "when": f"{time_text(one.start_time.seconds)} {until}, peak {time_text(one.peak_time.seconds)} (UTC)",
        "score": f"{one.score:.2f} ({one.detector})",
        "taken care": _remark(one.acknowledgement) if one.HasField("acknowledgement") else "",
    }
    if one.verdict:
        word = "real" if one.verdict == pb.ANOMALY_VERDICT_REAL else "false"
        facts["verdict"] = f"{word}, {_remark(one.verdict_remark)}"
    for name, value in facts.items():
        if value:
            terminal.line(f"  {name:<12}{value}")
    rows = [
        (
            part.metric,
            _number(part.value),
            f"{_number(part.expected_low)} to {_number(part.expected_high)}",
            f"{part.score:.2f}",
        )
        for part in one.contributions
    ]
    for line in table(terminal, _PARTS, rows) if rows else ():
        terminal.line(line)


def _number(value: float) -> str:
    """A dash for one that is not known."""
    return number_text(value) if math.isfinite(value) else "-"


def _remark(remark: pb.AnomalyRemark) -> str:
    comment = f": {remark.comment}" if remark.comment else ""
    return clean(f"{remark.author}, {time_text(remark.time.seconds)}{comment}")
