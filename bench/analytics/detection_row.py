"""Events found at 1 and at .25 false alarms per server and day, one level for all servers of a set.

The level is the one that finds most at that rate; the judge that comes with the recordings chooses it, for us and for
the yardsticks alike. What is told is the mean of the sets, each weighing the same.
"""

from typing import Any, Final

import numpy as np

from bench.analytics import yardsticks
from bench.analytics.limits import at_least
from bench.analytics.recordings import NOT_THERE, STEPS_S, Floats, Judge, judge
from bench.analytics.scored import Scored, scored
from bench.analytics.size import Bench
from bench.api.judged import Judged, absent
from bench.api.judged import judge as compare

ROW: Final = "detection"
OURS, KMEANS, EWMA = "ours", "k-means", "EWMA"
NAMES: Final = {KMEANS: "k-means as in Netdata", EWMA: "EWMA"}
RATES: Final = {1.0: (0.80, 0.85), 0.25: (0.55, 0.70)}
"""False alarms per server and day: what must be found there, and what is aimed at."""
TIMES_BETTER: Final = 1.1


def measure(bench: Bench) -> dict[str, Any]:
    """Events found by everybody, by set and rate."""
    if bench.data is None:
        return {"absent": NOT_THERE}
    servers = scored(bench, bench.data)
    others = {KMEANS: _by_setting(servers, bench, KMEANS), EWMA: _by_setting(servers, bench, EWMA)}
    judging = judge(bench.data)
    ours = _found(judging, servers, [one.scores for one in servers])
    settings = {
        name: {setting: _found(judging, servers, scores) for setting, scores in by_setting.items()}
        for name, by_setting in others.items()
    }
    for name, found in {OURS: {"as shipped": ours}, **settings}.items():
        for setting, by_set in found.items():
            bench.say(f"{ROW}, {name}, {setting}: {_told(by_set)}")
    return {"servers": [one.server.name for one in servers], OURS: ours, "yardsticks": settings}


def _by_setting(servers: list[Scored], bench: Bench, name: str) -> dict[str, list[Floats]]:
    """For each setting the scores of the tested rows of each server."""
    found: dict[str, list[Floats]] = {}
    for one in servers:
        server = one.server
        values = np.concatenate((server.learnt, server.tested))
        scores = yardsticks.kmeans(values, server.step_s) if name == KMEANS else yardsticks.ewma(values)
        for setting, whole in scores.items():
            found.setdefault(setting, []).append(whole[len(server.learnt) :])
    bench.say(f"{ROW}: {name} has scored {len(servers)} servers")
    return found


def _found(judging: Judge, servers: list[Scored], scores: list[Floats]) -> dict[str, list[float]]:
    """For each set, and their average, the part of the events that is found at each rate."""
    found: dict[str, list[float]] = {}
    for kind in STEPS_S:
        places = [place for place, one in enumerate(servers) if one.server.kind == kind]
        labels = [servers[place].server.label for place in places]
        rows_a_day = servers[places[0]].server.rows_a_day
        best = judging.score([scores[place] for place in places], labels, rows_a_day, tuple(RATES))
        found[kind] = [float(best[rate][0]) for rate in RATES]
    found["average"] = [sum(found[kind][place] for kind in STEPS_S) / len(STEPS_S) for place in range(len(RATES))]
    return found


def _told(by_set: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {' / '.join(f'{part:.2f}' for part in parts)}" for name, parts in by_set.items())


def judged(found: dict[str, Any]) -> list[Judged]:
    """For each rate: the limit, and each yardstick by the setting that finds most there."""
    if "absent" in found:
        return [absent(ROW, "events found", found["absent"])]
    lines = []
    for place, (rate, (limit, aim)) in enumerate(RATES.items()):
        ours = found[OURS]["average"][place]
        work = f"events found at {rate:g} false a day"
        sets = ", ".join(f"{kind} {found[OURS][kind][place]:.2f}" for kind in STEPS_S)
        lines.append(at_least(ROW, work, "share", ours, limit, remark=f"{sets}; aim {aim:g}"))
        for name, by_setting in found["yardsticks"].items():
            setting = max(by_setting, key=lambda one: by_setting[one]["average"][place])
            best = by_setting[setting]
            remark = f"{setting}: " + ", ".join(f"{kind} {best[kind][place]:.2f}" for kind in STEPS_S)
            theirs = best["average"][place]
            lines.append(compare(ROW, work, NAMES[name], "share", [ours], [theirs], TIMES_BETTER, remark=remark))
    return lines
