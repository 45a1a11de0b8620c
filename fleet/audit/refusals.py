"""Refused calls while they are counted: one event for each caller, address, method, outcome and minute.

What must stay true: a flood costs a bounded number of entries; beyond it calls are counted all the same, without who
and where, by method and outcome; what is counted was counted once.
"""

from dataclasses import asdict
from typing import Final

import orjson

from fleet.audit.event import Draft
from fleet.audit.journal import Counted

MINUTE_US: Final = 60_000_000
MAX_KINDS: Final = 1_000
"""So many combinations a minute are told apart."""
OTHERS: Final = "(others)"
"""The actor of those beyond."""

_APART: Final = ("id", "time_us", "count")


class Refusals:
    """What was refused since it was last taken."""

    def __init__(self) -> None:
        self._counted: dict[Counted, int] = {}
        self._minute_us = 0
        self._kinds: set[str] = set()

    def add(self, said: Draft) -> None:
        """Counts one call."""
        minute_us = said.time_us // MINUTE_US * MINUTE_US
        if minute_us != self._minute_us:
            self._minute_us = minute_us
            self._kinds.clear()
        kind = _kind(said)
        if kind not in self._kinds:
            if len(self._kinds) >= MAX_KINDS:
                others = Draft(id="", time_us=0, actor=OTHERS, action=said.action, code=said.code, reason=said.reason)
                kind = _kind(others)
            else:
                self._kinds.add(kind)
        key = (minute_us, kind)
        self._counted[key] = self._counted.get(key, 0) + said.count

    def take(self) -> dict[Counted, int]:
        """What was counted since the last time."""
        taken, self._counted = self._counted, {}
        return taken

    def put_back(self, taken: dict[Counted, int]) -> None:
        """What could not be stored."""
        for key, count in taken.items():
            self._counted[key] = self._counted.get(key, 0) + count


def _kind(said: Draft) -> str:
    """What calls that are one event have in common. Their targets and traces differ, so they have none."""
    common = {name: value for name, value in asdict(said).items() if name not in _APART}
    return orjson.dumps(common | {"target": "", "trace_id": "", "before": None, "after": None}).decode()
