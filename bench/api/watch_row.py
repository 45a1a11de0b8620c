"""Row `watch`: 2,000 subscribers of WatchFleet (BASIC) at one tick, each with a connection of its own.

From the acknowledgement of a tick that was written through the gateway until the last subscriber has all of it; and
how much larger the gateway is with them than without.
"""

import statistics
from typing import Final

import psutil

from bench.api.judged import Judged, within
from bench.api.product import gateway, tell
from bench.api.size import Bench
from bench.api.subscribers import subscribed
from bench.api.turn import Found, now_ms

ROW: Final = "watch"
LIMIT_S: Final = 1.0
LIMIT_BYTES: Final = 100_000.0
LEAST_S: Final = 0.001
"""A tick may be with all before its sender hears of the acknowledgement; that counts as this."""


def measure(bench: Bench) -> Found:
    """Seconds of each tick, and bytes a subscriber."""
    waited: list[float] = []
    medians: list[float] = []
    count = bench.size.subscribers
    with gateway(bench.inner, "gateway-watch") as front:
        servers = len(front.mix.servers)
        tell(front, 0, now_ms())
        with subscribed(front.address, 1, servers):
            tell(front, 1, now_ms())  # what the first one costs is no part of what each costs
        process = psutil.Process(front.server.process.pid)
        before = process.memory_info().rss
        with subscribed(front.address, count, servers) as subscribers:
            for number in range(bench.size.rounds):
                time_ms = now_ms()
                subscribers.expect(time_ms)
                acknowledged_s = tell(front, number, time_ms)
                arrivals = subscribers.arrivals()
                waited.append(max(one.last_s for one in arrivals) - acknowledged_s)
                medians.append(statistics.median(one.median_s for one in arrivals) - acknowledged_s)
                said = f"{waited[-1]:.3f} s from the acknowledgement to the last of {count}"
                bench.say(f"{ROW} tick {number + 1}/{bench.size.rounds}: {said}")
            after = process.memory_info().rss
    return {
        "subscribers": count,
        "last_s": waited,
        "half_s": medians,
        "memory_before_bytes": before,
        "memory_after_bytes": after,
        "bytes_a_subscriber": (after - before) / count,
    }


def judged(found: Found) -> list[Judged]:
    """The median tick, with the slowest beside it; and memory."""
    work = f"{found['subscribers']:,} WatchFleet subscribers (BASIC)"
    last = statistics.median(found["last_s"])
    return [
        within(
            ROW,
            f"{work}, acknowledgement to the last one's tick",
            "s",
            max(last, LEAST_S),
            LIMIT_S,
            remark=f"slowest tick {max(found['last_s']):.2f} s",
        ),
        within(ROW, f"{work}, memory each", "bytes", max(found["bytes_a_subscriber"], 1.0), LIMIT_BYTES),
    ]
