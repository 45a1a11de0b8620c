"""The alarm as it is shipped: the column `alarm`, whose level each server learns by itself from what it has seen.

No label and no level of ours: what somebody gets who only starts the service. `train` is learnt first, `test` is
counted.
"""

from typing import Any, Final

from bench.analytics.limits import at_least, at_most
from bench.analytics.recordings import NOT_THERE, STEPS_S, judge
from bench.analytics.scored import scored
from bench.analytics.size import Bench
from bench.api.judged import Judged, absent

ROW: Final = "operating"
LEAST_A_DAY, MOST_A_DAY = 0.3, 2.0
RECALL: Final = 0.70


def measure(bench: Bench) -> dict[str, Any]:
    """False alarms a day and events found, of each server."""
    if bench.data is None:
        return {"absent": NOT_THERE}
    judging, servers = judge(bench.data), {}
    for one in scored(bench, bench.data):
        server = one.server
        days = len(server.label) / server.rows_a_day
        false_a_day = judging.false_alarms(one.alarms, server.label, server.rows_a_day) / days
        events = judging.events(server.label)
        found = sum(bool(one.alarms[first : last + 1].any()) for first, last in events)
        servers[server.name] = {
            "kind": server.kind,
            "false_a_day": false_a_day,
            "events": len(events),
            "found": found,
        }
        bench.say(f"{ROW}, {server.name}: {false_a_day:.2f} false a day, {found} of {len(events)} events found")
    return {"servers": servers}


def judged(found: dict[str, Any]) -> list[Judged]:
    """The quietest server, the loudest, and the events of both sets."""
    if "absent" in found:
        return [absent(ROW, "the shipped alarm", found["absent"])]
    servers = found["servers"]
    rates = {name: one["false_a_day"] for name, one in servers.items()}
    quiet, loud = min(rates, key=rates.__getitem__), max(rates, key=rates.__getitem__)
    recalls = {kind: _recall([one for one in servers.values() if one["kind"] == kind]) for kind in STEPS_S}
    worst = min(servers, key=lambda name: _recall([servers[name]]))
    sets = ", ".join(f"{kind} {recall:.2f}" for kind, recall in recalls.items())
    remark = f"{sets}; all events {_recall(list(servers.values())):.2f}; least {_recall([servers[worst]]):.2f}, {worst}"
    work, average = f"false alarms a day, of {len(servers)} servers", sum(recalls.values()) / len(recalls)
    return [
        at_least(ROW, f"{work} the least", "a day", rates[quiet], LEAST_A_DAY, remark=quiet),
        at_most(ROW, f"{work} the most", "a day", rates[loud], MOST_A_DAY, remark=loud),
        at_least(ROW, "events found by the alarm", "share", average, RECALL, remark=remark),
    ]


def _recall(servers: list[dict[str, Any]]) -> float:
    """Of the events of some servers together; those without any have nothing to find."""
    events = sum(one["events"] for one in servers)
    return float(sum(one["found"] for one in servers) / events) if events else 1.0
