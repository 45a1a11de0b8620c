"""Contenders that are loaded in turn: who, for how long, and what it came to.

What must stay true: the turns are interleaved, and who has none stands still, a gateway with all that is behind it; the
fleet is told a tick before each turn of a gateway, so that nobody falls silent and nothing is ingested meanwhile.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bench.api.generators import Counted
from bench.api.product import Gateway, paused, tell, tree_cpu_s
from bench.api.size import Bench
from bench.peers import Server
from bench.queries import turns

IN_FLIGHT: Final = 50
GATEWAY: Final = "gateway"
BARE: Final = "bare"

Found = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Who is loaded.

    Attributes:
        load: one turn; returns what was counted, every reply known to be right.
        processes: what runs during its turns only; the first one's processor time is told.
        before: called at the beginning of a turn.
    """

    load: Callable[[], Counted]
    processes: Sequence[Server]
    before: Callable[[], object] | None = None


def compete(bench: Bench, row: str, contenders: Mapping[str, Contender]) -> Found:
    """Rounds of turns: calls a second and processor time a call, all and the medians."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    costs: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(bench.size.rounds):
        for name in turns(list(contenders), number):
            one = contenders[name]
            with paused([server for other in contenders.values() if other is not one for server in other.processes]):
                if one.before is not None:
                    one.before()
                used_s = tree_cpu_s(one.processes[:1])
                counted = one.load()
                cost = (tree_cpu_s(one.processes[:1]) - used_s) * 1e6 / counted.replies
            rates[name].append(counted.per_second)
            costs[name].append(cost)
            said = f"{name} {counted.per_second:,.0f}/s, {cost:.0f} us of its processor a call"
            bench.say(f"{row} round {number + 1}/{bench.size.rounds}: {said}")
    return {
        "in_flight": IN_FLIGHT,
        "rates": rates,
        "median": {name: statistics.median(found) for name, found in rates.items()},
        "server_cpu_us_a_call": {name: statistics.median(found) for name, found in costs.items()},
    }


def now_ms() -> int:
    """By the wall clock."""
    return time.time_ns() // 1_000_000


def tell_again(front: Gateway, tick: int = 0) -> Callable[[], object]:
    """Tells a gateway the values of a tick with the time of now, when called."""
    return lambda: tell(front, tick, now_ms())
