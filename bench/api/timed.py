"""`python -m bench.api.timed`: the gateway on a loop that notes how long each of its callbacks took.

On asyncio's own loop, since uvloop's callbacks cannot be looked at; what runs in them is the same. Processor time of
the loop's thread, since the machine is shared. SIGUSR1 begins anew, which leaves out what happens only once at the
start. When the process ends, the longest of each SLICE_S is written to the file that LOOP_REPORT names: a virtual
machine now and then counts milliseconds to a callback that does nothing, and what really takes long takes long again
and again.
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
SLICE_S: Final = 0.025
"""About as long as one round of questions (`loop_row`); a tick comes in every 40th."""

_slices: dict[int, tuple[float, str]] = {}
_run = events.Handle._run


def _timed(self: Any) -> None:
    before = time.thread_time()
    _run(self)
    taken_ms = (time.thread_time() - before) * 1e3
    part = int(time.monotonic() / SLICE_S)
    if taken_ms > _slices.get(part, (0.0, ""))[0]:
        owner = getattr(self._callback, "__self__", None)
        _slices[part] = (taken_ms, repr(owner.get_coro()) if isinstance(owner, asyncio.Task) else repr(self._callback))


def _begin_anew(*_: object) -> None:
    _slices.clear()


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, _begin_anew)
    events.Handle._run = _timed  # type: ignore[method-assign]
    uvloop.new_event_loop = asyncio.new_event_loop  # type: ignore[assignment]
    try:
        run_process("gateway", GatewaySettings, product.serve, prometheus=True)
    finally:
        Path(os.environ[REPORT]).write_text(json.dumps([(part, *longest) for part, longest in _slices.items()]))
