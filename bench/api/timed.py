"""`python -m bench.api.timed`: the gateway on a loop that notes how long each of its callbacks took.

On asyncio's own loop, since uvloop's callbacks cannot be looked at; what runs in them is the same. Processor time of
the loop's thread, since the machine is shared. SIGUSR1 begins anew, which leaves out what happens only once at the
start; the longest are written to the file that LOOP_REPORT names when the process ends.
"""

import asyncio
import json
import os
import signal
import time
from asyncio import events
from pathlib import Path
from typing import Any, Final

import uvloop

from gateway import __main__ as product
from gateway.settings import GatewaySettings
from runtime.process import run_process

REPORT: Final = "LOOP_REPORT"
KEPT: Final = 50
NOTED_MS: Final = 0.5

_noted: list[tuple[float, str]] = []
_run = events.Handle._run


def _timed(self: Any) -> None:
    before = time.thread_time()
    _run(self)
    taken_ms = (time.thread_time() - before) * 1e3
    if taken_ms > NOTED_MS:
        owner = getattr(self._callback, "__self__", None)
        what = repr(owner.get_coro()) if isinstance(owner, asyncio.Task) else repr(self._callback)
        _noted.append((taken_ms, what))
        if len(_noted) > 4 * KEPT:
            _noted.sort(reverse=True)
            del _noted[KEPT:]


def _begin_anew(*_: object) -> None:
    _noted.clear()


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _begin_anew)
    events.Handle._run = _timed  # type: ignore[method-assign]
    uvloop.new_event_loop = asyncio.new_event_loop  # type: ignore[assignment]
    try:
        run_process("gateway", GatewaySettings, product.serve, prometheus=True)
    finally:
        Path(os.environ[REPORT]).write_text(json.dumps(sorted(_noted, reverse=True)[:KEPT]))
