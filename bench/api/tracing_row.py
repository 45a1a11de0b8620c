"""Row `tracing`: GetServer with tracing on against off, as `bench.tracing` measures it, where that is there."""

import importlib
import importlib.util
import statistics
from typing import Any, Final

from bench.api.generators import missing
from bench.api.judged import Judged, judge
from bench.api.size import Bench
from bench.api.turn import Found

ROW: Final = "tracing"
MODULE: Final = "bench.tracing"
OFF: Final = "off"
AT_LEAST: Final = {"all sampled": 0.65, "1 % sampled": 0.95}
"""Of the calls a second that there are with tracing off."""


def lacking() -> str:
    """What has to be there first."""
    return missing("h2load") if importlib.util.find_spec(MODULE) else f"there is no {MODULE}"


def measure(bench: Bench) -> Found:
    """Calls a second of each mode, in each round."""
    module: Any = importlib.import_module(MODULE)
    found = module.measure(bench.size.rounds, bench.size.seconds)
    rates = {name: list(one.rates) for name, one in found.items()}
    for name, all_of in rates.items():
        bench.say(f"{ROW}: {name} {statistics.median(all_of):,.0f}/s")
    return {
        "rates": rates,
        "median": {name: statistics.median(all_of) for name, all_of in rates.items()},
        "server_cpu_us_a_call": {name: 1e6 * statistics.median(one.cpu_s) for name, one in found.items()},
    }


def judged(found: Found) -> list[Judged]:
    """So little may be lost."""
    rates, costs = found["rates"], found["server_cpu_us_a_call"]
    return [
        judge(
            ROW,
            f"GetServer, {name}",
            "tracing off",
            "calls/s",
            rates[name],
            rates[OFF],
            bound,
            remark=f"{costs[name]:.0f} us of processor a call, {costs[OFF]:.0f} off",
        )
        for name, bound in AT_LEAST.items()
    ]
