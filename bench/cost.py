"""Row 5: what a point costs the server in bytes written, processor time and memory, at fleets of several sizes.

So many points for each size, and so many rows of each series at least: of fewer the columns would cost more than the
points. Each tick goes in requests of at most 500 rows, one tick after the other as fast as they are taken: rows are
10 s apart whatever the wall clock. Then everything is maintained (heads become blocks, the journal is swept), so that
each point is paid for from its journal row to its last block. The engine keeps no swept batch for tails here
(`journal_keep_s`): in a run so short nothing would be swept otherwise. A fleet too large for that is in the report of
`bench.scale`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bench import meter
from bench.observed import Observed, observed
from bench.player import Play, player, start_before

ENGINE: Final = {"journal_keep_s": 0.0}
HOURS_BEFORE: Final = 96.0
"""Ticks begin so long ago: 20 servers need 1.2 days for 100 M points."""
REST_BOUND_S: Final = 600.0

Say = Callable[[str], None]


def measure(
    folder: Path, *, servers: Sequence[int], points: int, rows: int, bound_s: float, say: Say
) -> dict[str, Any]:
    """Returns what was measured for each number of servers; sending ends after `points`, and `rows` of each series, or
    after `bound_s`."""
    ticks = {count: max(rows, round(points / (count * 511))) for count in servers}
    return {
        "engine": ENGINE,
        "fleets": {str(count): _fleet(folder / str(count), count, ticks[count], bound_s, say) for count in servers},
    }


def of_scale(found: dict[str, Any]) -> dict[str, Any]:
    """The same of a run of `bench.scale`, which is paid for as far as it went."""
    peak_bytes = found["peak_bytes_before_restart"]
    return {
        str(found["servers"]): {
            "written_bytes_a_point": found["written_bytes_a_point"],
            "cpu_ns_a_point": found["cpu_ns_a_point"],
            "peak_bytes_a_series": peak_bytes / (found["servers"] * 511),
            "peak_bytes": peak_bytes,
            "points": found["points"],
        }
    }


def _fleet(folder: Path, servers: int, ticks: int, bound_s: float, say: Say) -> dict[str, Any]:
    play = Play(
        servers=servers, start_ms=start_before(int(time.time() * 1_000), HOURS_BEFORE), ticks=ticks, seconds=bound_s
    )
    with observed(folder, engine=ENGINE) as ours:
        pid, before = ours.server.process.pid, meter.usage(ours.server.process.pid)
        with player(play, ours.server.address, ours.server.secret) as playing:
            sent = playing.wait()
        after_sending = meter.usage(pid)
        in_heads = ours.fresh_status()["head_points"]
        started = time.monotonic()
        rested = _rest(ours)
        rest_s, after = time.monotonic() - started, meter.usage(pid)
        status, sizes, counts = ours.fresh_status(), meter.sizes(ours.store), meter.counts(ours.store)
    count = max(1, sent.points)
    found = {
        "points": sent.points,
        "ticks": sent.ticks,
        "of_ticks": ticks,
        "seconds": sent.seconds,
        "rest_seconds": rest_s,
        "rested": rested,
        "sent_again": sent.sent_again,
        "points_in_heads_after_sending": in_heads,
        "written_bytes_a_point": (after.write_bytes - before.write_bytes) / count,
        "cpu_ns_a_point": (after.cpu_s - before.cpu_s) * 1e9 / count,
        "peak_bytes_a_point": after.peak_bytes / count,
        "peak_bytes_a_series": after.peak_bytes / (servers * 511),
        "while_sending": {
            "written_bytes_a_point": (after_sending.write_bytes - before.write_bytes) / count,
            "cpu_ns_a_point": (after_sending.cpu_s - before.cpu_s) * 1e9 / count,
        },
        "peak_bytes": after.peak_bytes,
        "bytes_a_point": {kind: size / count for kind, size in sizes.items()},
        "counts": counts,
        "status": status,
        "player": {key: asdict(sent)[key] for key in ("cpu_s", "peak_bytes", "unsure")},
    }
    say(f"cost: {servers} servers: {describe(found)}")
    return found


def _rest(ours: Observed) -> bool:
    """Has everything maintained until the files change no more; whether that was reached in time."""
    ends = time.monotonic() + REST_BOUND_S
    before: dict[str, int] = {}
    while before != (before := meter.sizes(ours.store)):
        if not ours.rest(max(1.0, ends - time.monotonic())):
            return False
    return True


def describe(found: dict[str, Any]) -> str:
    """One line."""
    whole = "" if found["ticks"] == found["of_ticks"] else f" ({found['ticks']} of {found['of_ticks']} ticks)"
    whole += "" if found["rested"] else f", not at rest after {found['rest_seconds']:.0f} s"
    disk = ", ".join(f"{kind} {size:.2f}" for kind, size in sorted(found["bytes_a_point"].items()) if size >= 0.005)
    passed = f"{found['seconds']:.0f} + {found['rest_seconds']:.0f} s"
    return (
        f"{found['points'] / 1e6:.1f} M points{whole} in {passed}; a point:"
        f" {found['written_bytes_a_point']:.1f} bytes written, {found['cpu_ns_a_point']:.0f} ns,"
        f" peak {found['peak_bytes_a_point']:.1f} bytes ({found['peak_bytes'] / (1 << 20):.0f} MiB); on disk: {disk}"
    )
