"""From measurements to a judged table: what was compared, the target, and by how much a row misses it."""

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import psutil

from bench.peers import INFLUX, OURS, ROOT, VICTORIA

FORMAT: Final = 1

LIMIT: Final = "limit"
"""The peer of rows that have none: what they may be."""
YEAR_LIMIT_MS: Final = 100.0
COST_LIMIT: Final = 1.5
COSTS: Final = {"bytes written": "written_bytes_a_point", "processor time": "cpu_ns_a_point"}
SUSTAINED_SHARE: Final = 0.99
"""Of the points that were due: the last tick may be on its way."""
MEMORY_LIMIT_GIB: Final = 6.0
RESTART_LIMIT_S: Final = 60.0
BACKLOG_SLACK: Final = 1.1
"""So much more than at one third is none; nor is one tick, which is on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One comparison. `ratio` is better/worse turned so that larger is better for us; None: not measured.

    Attributes:
        work: what was done.
        peer: against whom.
        unit: of `ours` and `theirs`.
        ratio: how many times better we are.
        target: the ratio wanted.
        met: whether it is reached; None when not measured.
        note: why it was not measured, or by how much it is missed.
    """

    work: str
    peer: str
    unit: str
    ours: float | None
    theirs: float | None
    ratio: float | None
    target: float
    met: bool | None
    note: str = ""


def rows(results: dict[str, Any]) -> list[Row]:
    """The table of what was measured."""
    found: list[Row] = []
    if ingest := results.get("ingest"):
        rates = ingest["median"]
        for peer, target in ((VICTORIA, 3.0), (INFLUX, 10.0)):
            found.append(_row("ingest, acknowledged", peer, "points/s", rates, target, more_is_better=True))
    for name, sizes in results.get("storage", {}).items():
        if isinstance(sizes, str):
            found.append(_absent(f"disk, {name}", VICTORIA, "bytes/point", 1.0, sizes))
        else:
            values = {server: one["bytes_a_point"] for server, one in sizes.items()}
            work = f"disk, {name}" + (f" ({remark})" if (remark := sizes[OURS].get("remark")) else "")
            found.append(_row(work, VICTORIA, "bytes/point", values, 1.0, more_is_better=False))
    for kind, times in results.get("queries", {}).items():
        for percentile in ("p50", "p95"):
            values = {server: one[f"{percentile}_ms"] for server, one in times.items()}
            found += [
                _row(f"{kind}, {percentile}", peer, "ms", values, 1.0, more_is_better=False)
                for peer in (VICTORIA, INFLUX)
            ]
    return found + _year(results.get("year")) + _cost(results.get("cost")) + _scale(results.get("scale"))


def _year(found: dict[str, Any] | None) -> list[Row]:
    if not found:
        return []
    work = f"1 metric, {found['window_days']} days by 1 h"
    return [_within(f"{work}, p95", "ms", found["p95_ms"], YEAR_LIMIT_MS)]


def _cost(found: dict[str, Any] | None) -> list[Row]:
    if not found:
        return []
    fleets, rows = found["fleets"], []
    names = f"{' to '.join((min(fleets, key=int), max(fleets, key=int)))} servers"
    for work, key in COSTS.items():
        values = [fleet[key] for fleet in fleets.values()]
        spread = max(values) / max(min(values), 1e-9)
        rows.append(_within(f"{work} a point, {names}", "largest / smallest", spread, COST_LIMIT))
    memory = [fleets[name]["peak_bytes_a_series"] for name in sorted(fleets, key=int)]
    growth = max(later / before for before, later in pairwise(memory)) if len(memory) > 1 else 1.0
    rows.append(_within(f"peak memory a series, {names}", "larger fleet / smaller", growth, COST_LIMIT))
    return rows


def _scale(found: dict[str, Any] | None) -> list[Row]:
    if not found:
        return []
    work = f"{found['servers']:,} servers for {found['minutes']:g} min"
    rates = {OURS: found["points_a_second"], LIMIT: found["wanted_points_a_second"] * SUSTAINED_SHARE}
    rows = [_row(f"{work}, acknowledged", LIMIT, "points/s", rates, 1.0, more_is_better=True)]
    for key, sizes in found["backlog"].items():
        unit, tick = ("points", 511) if key.endswith("points") else ("bytes", 511 * 8)
        limit = max(sizes["third"] * BACKLOG_SLACK, found["servers"] * tick)
        rows.append(_within(f"{work}, {key} at the end, limit of one third", unit, sizes["end"], limit))
    rows.append(_within(f"{work}, peak memory", "GiB", found["peak_bytes"] / (1 << 30), MEMORY_LIMIT_GIB))
    rows.append(_within(f"{work}, kill -9 to the first answer", "s", found["restart_answer_s"], RESTART_LIMIT_S))
    rows.append(_within(f"{work}, acknowledged rows that are gone", "rows", found["rows_missing"], 0.0))
    return rows


def _within(work: str, unit: str, ours: float, limit: float) -> Row:
    """Something that may be so much and no more."""
    if ours <= limit:
        ratio, note = limit / ours if ours > 0 else 1.0, ""
    else:
        ratio, note = limit / ours, f"misses: {number(ours)} instead of {number(limit)}"
    met = not note
    return Row(work=work, peer=LIMIT, unit=unit, ours=ours, theirs=limit, ratio=ratio, target=1.0, met=met, note=note)


def _row(work: str, peer: str, unit: str, values: dict[str, float], target: float, *, more_is_better: bool) -> Row:
    ours, theirs = values[OURS], values.get(peer)
    if theirs is None:
        row = _absent(work, peer, unit, target, f"{peer} is not on the PATH")
        return Row(**(asdict(row) | {"ours": ours}))
    ratio = ours / theirs if more_is_better else theirs / ours
    met = ratio >= target
    note = "" if met else f"misses: {ratio:.2f}x instead of {target:g}x"
    return Row(
        work=work, peer=peer, unit=unit, ours=ours, theirs=theirs, ratio=ratio, target=target, met=met, note=note
    )


def _absent(work: str, peer: str, unit: str, target: float, why: str) -> Row:
    return Row(
        work=work,
        peer=peer,
        unit=unit,
        ours=None,
        theirs=None,
        ratio=None,
        target=target,
        met=None,
        note=f"not measured: {why}",
    )


def table(found: list[Row]) -> str:
    """As Markdown, for a terminal and docs/benchmarks.md."""
    head = "| work | peer | unit | ours | peer's | times better | target | |"
    lines = [head, "|---|---|---|---:|---:|---:|---:|---|"]
    for row in found:
        verdict = row.note or "met"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        numbers = f"{number(row.ours)} | {number(row.theirs)} | {ratio} | {row.target:g}x"
        lines.append(f"| {row.work} | {row.peer} | {row.unit} | {numbers} | {verdict} |")
    return "\n".join(lines)


def number(value: float | None) -> str:
    """For people; empty when there is none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1_000 else f"{value:.3g}" if value < 1 else f"{value:.2f}"


def machine() -> dict[str, Any]:
    """On what; the load is that of the last minute, of others too."""
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_1m": os.getloadavg()[0],
    }


def commit() -> str:
    """The commit that was measured, "+" when files differ from it; empty without git."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
