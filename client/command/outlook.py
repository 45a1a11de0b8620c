"""`openmanager trend ID METRIC` and `openmanager capacity [ID]`."""

import json
import sys
from argparse import Namespace
from typing import Final

import numpy as np
from google.protobuf.timestamp_pb2 import Timestamp

from client import outlook
from client.api import OpenManager
from client.command import exits
from client.command.fleet import as_json
from client.command.sparkline import ASCII_BARS, BARS, sparkline
from client.command.tables import Column, table
from client.command.terminal import Terminal, clean, complain
from client.command.values import number_text, time_text
from openmanager.fleet.v1 import outlook_pb2 as pb
from openmanager.gateway.v1.analytics_pb2 import ListCapacityResponse

_COLUMNS: Final = (
    Column("SERVER"),
    Column("METRIC"),
    Column("NOW", right=True),
    Column("A DAY", right=True),
    Column("DATE (UTC)"),
    Column("NOT BEFORE"),
    Column("NOT AFTER"),
)
_SECONDS_AN_HOUR: Final = 3_600.0
MAX_VAIN: Final = 5
"""So many answers in a row without a server more, and the list is given up."""


async def run(manager: OpenManager, options: Namespace) -> int:
    """Runs the command; returns the exit status."""
    terminal = Terminal(sys.stdout)
    if options.command == "trend":
        trend = await outlook.trend(manager, options.id, options.metric, start=options.start, end=options.end)
        return _shown(terminal, options, trend, has_data=trend.HasField("level"))
    what = {"limit": options.limit, "falling": options.falling, "growth": options.growth}
    if options.id is not None:
        one = await outlook.capacity(manager, options.id, options.metric, **what)
        return _shown(terminal, options, one, has_data=one.reason != pb.CAPACITY_REASON_NO_DATA)
    answer = await _fleet(manager, options, **what)
    for text in answer.incomplete:
        complain(f"measurements may be missing: {text}")
    if options.output == "json":
        terminal.line(json.dumps(as_json(answer)))
    else:
        _show_fleet(terminal, options, answer)
    return exits.OK


async def _fleet(
    manager: OpenManager, options: Namespace, *, limit: float | None, falling: bool, growth: float
) -> ListCapacityResponse:
    """Asks until all servers have been looked at."""
    progress = Terminal(sys.stderr)
    looked_at, vain = 0, 0
    while True:
        answer = await outlook.fleet_capacity(
            manager,
            options.metric,
            limit=limit,
            falling=falling,
            growth=growth,
            within_s=options.within,
            environment=options.environment,
            role=options.role,
        )
        if progress.is_terminal:
            total = answer.servers + answer.pending_servers
            said = f"{answer.servers:,} of {total:,} servers looked at" if answer.pending_servers else ""
            progress.out.write(f"\r\x1b[K{said}")
            progress.out.flush()
        if not answer.pending_servers:
            return answer
        vain = vain + 1 if answer.servers <= looked_at else 0  # others' lists are made first, too
        looked_at = answer.servers
        if vain == MAX_VAIN:
            raise exits.CommandFailed(
                f"{answer.pending_servers:,} servers could not be looked at: allow more than --timeout "
                f"{options.timeout:g}s, or try again later"
            )


def _shown(terminal: Terminal, options: Namespace, one: pb.Trend | pb.Capacity, *, has_data: bool) -> int:
    for text in one.incomplete:
        complain(f"measurements may be missing: {text}")
    if options.output == "json":
        terminal.line(json.dumps(as_json(one)))
    elif isinstance(one, pb.Capacity):
        _show_capacity(terminal, one)
    elif has_data:
        _show_trend(terminal, one)
    if not has_data:
        complain(f"{one.server_id} has no points of {one.metric} in this time")
    return exits.OK if has_data else exits.NOT_FOUND


def _show_trend(terminal: Terminal, trend: pb.Trend) -> None:
    terminal.line(terminal.coloured(_title(trend), "bold"))
    facts = {"level": number_text(trend.level)}
    if trend.HasField("slope_per_day"):
        interval = f"{number_text(trend.slope_low)} to {number_text(trend.slope_high)}"
        facts["a day"] = f"{number_text(trend.slope_per_day)} ({interval}), {_word(trend, 'direction')}"
    if trend.HasField("year_over_year"):
        year = trend.year_over_year
        share = f" ({year.share:+.0%})" if year.HasField("share") else ""
        facts["year before"] = f"{number_text(year.then)}, now {number_text(year.now)}{share}"
    facts["measured"] = f"{trend.days} day{'s' * (trend.days != 1)}, {trend.coverage:.0%} of the hours"
    facts["day, UTC"] = _bars(terminal, list(trend.daily))
    facts["changes"] = ", ".join(
        f"{_day(change.time)}: {number_text(change.before)} -> {number_text(change.after)}" for change in trend.changes
    )
    _lines(terminal, facts)


def _show_capacity(terminal: Terminal, capacity: pb.Capacity) -> None:
    limit = number_text(capacity.limit)
    if capacity.HasField("date"):
        when = f"on {_day(capacity.date)}, between {_day(capacity.low)} and {_day(capacity.high)}"
    else:
        when = f"no date: {_word(capacity, 'reason')}"
    terminal.line(f"{terminal.coloured(_title(capacity), 'bold')} reaches {limit}: {when}")
    facts = {}
    if capacity.HasField("level"):
        facts["daily peak"] = number_text(capacity.level)
    if capacity.HasField("rate_per_day"):
        facts["a day"] = number_text(capacity.rate_per_day)
    if capacity.HasField("probability_within_30_days"):
        within = (capacity.probability_within_30_days, capacity.probability_within_90_days)
        facts["probability"] = f"{within[0]:.0%} within 30 days, {within[1]:.0%} within 90"
    if capacity.backtest.HasField("error"):
        test = capacity.backtest
        facts["back-test"] = f"error {number_text(test.error)}, 80 % interval held {test.coverage:.0%}"
    _lines(terminal, facts)


def _show_fleet(terminal: Terminal, options: Namespace, answer: ListCapacityResponse) -> None:
    servers = len({capacity.server_id for capacity in answer.capacities})
    days = number_text(round(options.within / 86_400, 1))
    limit = "its limit" if options.limit is None else number_text(options.limit)
    terminal.line(f"{options.metric} reaches {limit} within {days} days: {servers} of {answer.servers} servers")
    others = [f"{count.series} {_word(count, 'reason') or 'later'}" for count in answer.others]
    if others:
        terminal.line(f"the others: {', '.join(others)}")
    rows = [
        (
            capacity.server_id,
            capacity.metric,
            number_text(capacity.level),
            number_text(capacity.rate_per_day) if capacity.HasField("rate_per_day") else "-",
            *(
                (_day(capacity.date), _day(capacity.low), _day(capacity.high))
                if capacity.HasField("date")
                else ("past", "-", "-")
            ),
        )
        for capacity in answer.capacities
    ]
    for line in table(terminal, _COLUMNS, rows) if rows else ():
        terminal.line(line)


def _title(one: pb.Trend | pb.Capacity) -> str:
    return clean(f"{one.server_id} {one.metric}" + (f" ({one.unit})" if one.unit else ""))


def _lines(terminal: Terminal, facts: dict[str, str]) -> None:
    for name, value in facts.items():
        if value:
            terminal.line(f"  {name:<12}{value}")


def _bars(terminal: Terminal, hours: list[float]) -> str:
    """The hours of the day as a line of bars."""
    if not hours or not terminal.is_terminal:
        return ""
    times = [_SECONDS_AN_HOUR * (hour + 0.5) for hour in range(len(hours))]
    bars = BARS if terminal.shows_unicode else ASCII_BARS
    end = _SECONDS_AN_HOUR * len(hours)
    return sparkline(np.array(times), np.array(hours), start=0.0, end=end, width=len(hours), bars=bars)


def _word(message: pb.Trend | pb.Capacity | pb.CapacityCount, field: str) -> str:
    """An enum's name as people read it; empty: it says nothing."""
    kind = message.DESCRIPTOR.fields_by_name[field].enum_type
    assert kind is not None
    value = kind.values_by_number.get(getattr(message, field))
    name = value.name if value is not None else str(getattr(message, field))
    prefix = kind.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return name.removeprefix(prefix).lower().replace("_", " ").replace("unspecified", "")


def _day(time: Timestamp) -> str:
    return time_text(time.seconds)[:10]
