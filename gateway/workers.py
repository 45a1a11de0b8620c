"""Several gateway processes on one port, for machines with more processors than one process can use.

The first process has the addresses and serves nobody: it starts the others, which listen with SO_REUSEPORT, so that the
kernel spreads connections over them, and starts again whichever dies. All answer alike: what a caller may come back
with to another one (page tokens, entity tags, event ids) comes from the cache or is signed with the common secret.

What must stay true: an address that somebody else has is refused before anything starts; one that dies takes only its
own connections with it; one that cannot start ends all with its own words; none outlives the first.
"""

import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from gateway.http.server import bound_socket, listen
from gateway.settings import GatewaySettings
from gateway.siblings import RUN_VARIABLE, Page, Siblings
from runtime import notify
from runtime.errors import Unavailable
from runtime.folder import CannotStartError
from runtime.notifications import NotifySocket
from runtime.process import PARENT_PID_VARIABLE, Process, tell_ready
from runtime.tasks import Backoff, run_forever

NUMBER_VARIABLE: Final = "OPENMANAGER_GATEWAY_WORKER"
RESTART: Final = Backoff(initial_s=0.2, max_s=10.0)
STOP_BOUND_S: Final = 15.0
"""After that what is left of a worker is killed; it has bounds of its own, which are shorter."""

_log = logging.getLogger(__name__)


def own_number() -> int | None:
    """Which worker this process is, from 1 on; None: it is none."""
    text = os.environ.get(NUMBER_VARIABLE, "")
    return int(text) if text.isdecimal() else None


def siblings(settings: GatewaySettings, page: Page) -> Siblings | None:
    """What this worker has in common with the others, when it is one; `page` makes its own page of metrics."""
    number = own_number()
    return None if number is None else Siblings(os.environ.get(RUN_VARIABLE, ""), number, settings.workers, page)


async def serve_by_workers(settings: GatewaySettings, process: Process[GatewaySettings]) -> None:
    """Runs until the process is told to stop.

    Raises:
        AddressUnavailable: naming the setting.
        CannotStartError: a worker ended before it ever served.
    """
    with (
        reserved(settings.grpc_address, "GATEWAY_GRPC_ADDRESS") as grpc_address,
        reserved(settings.http_address, "GATEWAY_HTTP_ADDRESS") as http_address,
    ):
        process.bound_addresses |= {"GATEWAY_GRPC_ADDRESS": grpc_address, "GATEWAY_HTTP_ADDRESS": http_address}
        environ = os.environ | {
            "GATEWAY_GRPC_ADDRESS": grpc_address,
            "GATEWAY_HTTP_ADDRESS": http_address,
            PARENT_PID_VARIABLE: str(os.getpid()),
            RUN_VARIABLE: secrets.token_hex(16),
        }
        workers = [Worker(number, environ) for number in range(1, settings.workers + 1)]
        try:
            async with asyncio.TaskGroup() as group:
                keepers = [group.create_task(worker.keep(), name=f"keep-{worker.name}") for worker in workers]
                started = group.create_task(_all_served(workers), name="workers-start")
                stop = group.create_task(process.stopping.wait(), name="workers-stop")
                await asyncio.wait({started, stop}, return_when=asyncio.FIRST_COMPLETED)
                if started.done() and not started.exception():
                    _log.info("%d workers serve %s (gRPC) and %s (HTTP)", len(workers), grpc_address, http_address)
                    tell_ready()
                    await stop
                for task in (*keepers, started):
                    task.cancel()
        finally:
            await asyncio.gather(*(worker.stop() for worker in workers))


@contextmanager
def reserved(address: str, setting: str) -> Iterator[str]:
    """Keeps an address that workers will listen on, and says which it is; raises AddressUnavailable."""
    listen(address, setting, share_port=False).close()  # or another program of this user would share it
    with bound_socket(address, setting, share_port=True) as holder:  # which does not listen, so gets no connection
        host, port = holder.getsockname()[:2]
        yield f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Worker:
    """One of them, started again for as long as `keep` runs."""

    def __init__(self, number: int, environ: dict[str, str]) -> None:
        self.name = f"worker {number}"
        self._environ = environ | {NUMBER_VARIABLE: str(number)}
        self._process: asyncio.subprocess.Process | None = None
        self._served: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def served(self) -> None:
        """Returns once it has served for the first time; raises CannotStartError."""
        await self._served

    async def keep(self) -> None:
        """Keeps it running."""
        await run_forever(self.name, self._run_once, RESTART)

    async def _run_once(self) -> None:
        with NotifySocket() as notifications:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "gateway",
                stdin=asyncio.subprocess.DEVNULL,
                env=self._environ | {notify.VARIABLE: notifications.address},
                start_new_session=True,  # a signal from the terminal reaches the first process, which stops the others
            )
            ready = asyncio.create_task(_until_ready(notifications, self._note_served))
            try:
                status = await self._process.wait()
            finally:
                ready.cancel()
        if not self._served.done():
            self._served.set_exception(CannotStartError(f"{self.name} could not start, for the reason above"))
            await asyncio.get_running_loop().create_future()  # everything ends now
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        raise Unavailable(f"it {how} and is started again")

    def _note_served(self) -> None:
        if not self._served.done():
            self._served.set_result(None)
        else:
            _log.info("%s is back", self.name)

    async def stop(self) -> None:
        """Stops it in order."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_BOUND_S):
                await process.wait()
        except TimeoutError:
            _log.error("%s did not stop within %s s and is killed", self.name, STOP_BOUND_S)
            process.kill()
            await process.wait()


async def _all_served(workers: Sequence[Worker]) -> None:
    await asyncio.gather(*(worker.served() for worker in workers))


async def _until_ready(notifications: NotifySocket, tell: Callable[[], None]) -> None:
    while notify.READY not in await notifications.receive():
        pass
    tell()
