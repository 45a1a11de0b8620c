"""A whole process for the tests: `python -m tests.runtime.echo_process`, as every __main__ of the product is made.

A text of "slow" is answered some time after the process was told to stop, "crash" in the event loop, by a callback
that fails.
"""

import asyncio
import logging
import time
from typing import Any

import runtime.process
from runtime.process import Process, run_process
from runtime.server import bind
from runtime.settings import Address, CommonSettings, setting
from tests.runtime.echo import SERVICE, EchoServicer


class Settings(CommonSettings):
    echo_address: Address = setting("ECHO_ADDRESS", "127.0.0.1:0", "Where it listens.")
    fail: str = setting("ECHO_FAIL", "", "How to fail at the start.")


async def serve(settings: Settings, process: Process[Settings]) -> None:
    if settings.fail == "bug":
        raise ZeroDivisionError("a bug")
    if settings.fail == "return":
        return
    log = logging.getLogger("echo")
    if settings.fail == "hang":
        log.info("will hang")
        runtime.process.STOP_BOUND_S = 0.2  # type: ignore[misc]
        await process.stopping.wait()
        await asyncio.to_thread(time.sleep, 60)

    async def answer(request: Any, context: Any) -> Any:
        if request.text == "slow":
            log.info("a slow call has begun")
            await process.stopping.wait()
            await asyncio.sleep(0.2)
        if request.text == "crash":
            asyncio.get_running_loop().call_soon(lambda: 1 / 0)
        return request

    log.info("secret is %s", process.secret)
    async with asyncio.TaskGroup() as group:
        group.create_task(process.serve_grpc(settings.echo_address, [bind(SERVICE, EchoServicer(answer))]))


if __name__ == "__main__":
    run_process("echo", Settings, serve)
