"""The life of every process: settings, folder, logs, telemetry, event loop, signals, and an orderly end.

    async def serve(settings: CacheSettings, process: Process) -> None:
        async with open_store(settings.redis_url) as store:
            services = [bind("openmanager.cache.v1.CacheService", Servicer(store))]
            await process.serve_grpc(settings.cache_address, services)

    if __name__ == "__main__":
        run_process("cache", CacheSettings, serve)

What must stay true: a process that cannot start says why in one message, without a traceback, and exits with 2
(settings) or 1; SIGTERM and SIGINT let calls in flight finish and exit with 0; nothing that goes wrong in the event
loop goes unlogged; a process started by the launcher does not outlive it, even a launcher killed with -9.
"""

import argparse
import asyncio
import errno
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Generic, NoReturn, TypeVar

from runtime import descriptors, folder, logs, notify, paging, tasks, telemetry, tls
from runtime.channel import Channel
from runtime.clock import Clock, SystemClock
from runtime.doorman import Knows, bearer_of
from runtime.errors import OpenManagerError
from runtime.expiry import Expiry
from runtime.folder import CannotStartError
from runtime.interception import REFLECTION_SERVICES, Interception, service_secret_authenticator
from runtime.limits import DRAIN_GRACE_S
from runtime.misspelt import misspelt
from runtime.redaction import redact
from runtime.server import AddressUnavailable, Bound, GrpcServer
from runtime.settings import CommonSettings, SettingsError

S = TypeVar("S", bound=CommonSettings)

EXIT_FAILED: Final = 1
EXIT_BAD_SETTINGS: Final = 2
NO_FORKS: Final = ("GRPC_ENABLE_FORK_SUPPORT", "0")
"""gRPC prepares each fork for a child that goes on with gRPC; ours run another program at once. In between its threads
ended 45 of 400 children of a busy process; PostgreSQL is such a child, started under another user and so by fork."""
PARENT_PID_VARIABLE: Final = folder.PARENT_PID_VARIABLE
PARENT_CHECK_INTERVAL_S: Final = 1.0
READINESS_INTERVAL_S: Final = 0.25
STOP_BOUND_S: Final = 20.0
"""How long an orderly stop may take before the rest is cut off."""

_log = logging.getLogger(__name__)


class Process(Generic[S]):
    """What a running process has, handed to its `serve`. Tests make one themselves and set `stopping` to end it."""

    def __init__(self, name: str, settings: S, *, clock: Clock | None = None, secret: str | None = None) -> None:
        self.name = name
        self.settings = settings
        self.clock: Clock = clock or SystemClock()
        self.folder: Path = settings.data_dir / name
        self.secret = folder.service_secret(settings) if secret is None else secret
        paging.sign_with(self.secret)
        self.stopping = asyncio.Event()
        self.bound_addresses: dict[str, str] = {}
        """Variable (CACHE_ADDRESS) -> the address really listened on, once it is; port 0 has become a real one."""

    async def serve_grpc(
        self,
        address: str,
        servicers: Sequence[Bound],
        *,
        address_setting: str | None = None,
        public: bool = False,
        ready: Callable[[], bool] | None = None,
        interception: Interception | None = None,
        knows: Knows | None = None,
        open_to_all: Collection[str] = (),
        share_port: bool = False,
    ) -> None:
        """Serves until `stopping`, lets calls in flight finish, returns.

        An inner server (public=False) lets in who has the service secret; a public one whom `interception` lets in,
        everyone without one, and `knows` says beforehand whom it will not (runtime.doorman), but for methods that are
        `open_to_all`. Health says SERVING while `ready()` is true. `share_port`: others like this one listen on the
        same port.
        """
        setting = address_setting or f"{self.name.upper()}_ADDRESS"
        if not public:
            interception = Interception(service_secret_authenticator(self.secret))
            knows = bearer_of(self.secret, open_services=REFLECTION_SERVICES)  # to callers on this machine
        credentials = tls.server_credentials(self.settings, address, public=public)
        interception = interception or Interception()
        server = GrpcServer(
            servicers,
            interception,
            credentials=credentials,
            share_port=share_port,
            knows=knows,
            open_to_all=open_to_all,
        )
        try:
            bound = await server.start(address)
        except AddressUnavailable as error:
            hint = f"{error.strerror} (set {setting})"
            raise type(error)(error.errno, hint) from None
        try:
            self.bound_addresses[setting] = bound
            _log.info("%s listens on %s (gRPC%s)", self.name, bound, "" if credentials is None else ", TLS")
            async with tasks.beside("readiness", _follow_readiness(server, ready or _always)):
                await self.stopping.wait()
        finally:
            await server.stop(DRAIN_GRACE_S)
            self.bound_addresses.pop(setting, None)

    def open_channel(self, target: str) -> Channel:
        """Calls to an inner service: with the service secret, and with TLS when TLS_CA_FILE is set."""
        return Channel(target, secret=self.secret, credentials=self._channel_credentials)

    @cached_property
    def _channel_credentials(self) -> Callable[[], Any] | None:
        """One for all channels, so that the files are read once when they are replaced."""
        return tls.channel_credentials(self.settings)

    @asynccontextmanager
    async def open_channels(self, targets: Sequence[str]) -> AsyncIterator[tuple[Channel, ...]]:
        """The same to each of several, closed with the block."""
        async with AsyncExitStack() as stack:
            yield tuple([await stack.enter_async_context(self.open_channel(target)) for target in targets])


def _always() -> bool:
    return True


async def _follow_readiness(server: GrpcServer, ready: Callable[[], bool]) -> None:
    """Keeps what health says equal to what the service says of itself."""
    last: bool | None = None
    while True:
        try:
            now = ready()
        except Exception:
            _log.exception("the readiness probe failed")
            now = False
        if now != last:
            await server.set_serving(now)
            if now:
                tell_ready()
            last = now
        await asyncio.sleep(READINESS_INTERVAL_S)


def tell_ready() -> None:
    """Tells whoever started this process that it serves."""
    try:
        notify.notify(notify.READY)
    except OSError as error:
        _log.warning("whoever started this process cannot be told %s: %s", notify.READY.decode(), error)


def takes_no_arguments(module: str, what: str) -> None:
    """For a process without commands: answers --help, and refuses all else, which would start it unawares."""
    epilog = "Its settings are read from the environment: docs/settings.md."
    argparse.ArgumentParser(prog=f"python -m {module}", description=what, epilog=epilog).parse_args()


def run_process(
    name: str,
    settings_class: type[S],
    serve: Callable[[S, Process[S]], Awaitable[None]],
    *,
    prometheus: bool = False,
    part: str = "",
) -> NoReturn:
    """Runs one process of the product from its settings to its exit status. What every __main__ calls.

    `prometheus`: its metrics are read by Prometheus too (prometheus_client.generate_latest). `part`: which of several
    alike it is, with a folder of its own in that of the first.
    """
    os.environ.setdefault(*NO_FORKS)
    try:
        settings = settings_class.load()
    except SettingsError as error:
        lines = "".join(f"  {problem}\n" for problem in error.problems)
        _say(f"{name}: cannot start, settings that make no sense:\n{lines}".rstrip())
        sys.exit(EXIT_BAD_SETTINGS)
    logs.configure(name, settings.log_level)
    for line in () if part else misspelt(settings_class, name, os.environ):
        _log.warning(line, extra=logs.OF_SET_UP)
    descriptors.allow_many()
    telemetry.configure(f"openmanager-{name}", settings.otel_exporter_otlp_endpoint, prometheus=prometheus)
    gc.collect()
    gc.freeze()  # of 66,000 objects of modules and messages none goes: a full collection on the loop took 30 ms
    try:
        own = f"{name}/{part}" if part else name
        with folder.locked(settings.data_dir, own), asyncio.Runner(loop_factory=_loop_factory()) as runner:
            status = runner.run(_main(name, settings, serve))
    except CannotStartError as error:
        _say(f"{name}: {error}")
        status = EXIT_FAILED
    finally:
        telemetry.shutdown()
    sys.exit(status)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    import uvloop  # noqa: PLC0415  not needed by those who only read settings

    return uvloop.new_event_loop


async def _main(name: str, settings: S, serve: Callable[[S, Process[S]], Awaitable[None]]) -> int:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_log_loop_failure)
    process = Process(name, settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, process, f"{signal.Signals(number).name} received")
    expiry = Expiry(settings, process.clock)
    async with tasks.beside("watch-parent", _watch_parent(process)), tasks.beside("certificates", expiry.watch()):
        work: asyncio.Task[None] = asyncio.create_task(_served(serve, settings, process), name="serve")
        stop = asyncio.create_task(process.stopping.wait(), name="stop")
        try:
            await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
            done, _ = await asyncio.wait({work}, timeout=STOP_BOUND_S)
        finally:
            stop.cancel()
    if not done:  # nor may a hanging thread or an uncancellable task keep the process: only this is sure
        _log.error("%s did not stop within %s s and is cut off", name, STOP_BOUND_S)
        os._exit(EXIT_FAILED)
    return _status(name, work, process)


async def _served(serve: Callable[[S, Process[S]], Awaitable[None]], settings: S, process: Process[S]) -> None:
    await serve(settings, process)


def _status(name: str, work: "asyncio.Task[None]", process: Process[Any]) -> int:
    """The exit status, after saying why where it is not 0."""
    failure = None if work.cancelled() else work.exception()
    if failure is None and process.stopping.is_set():
        _log.info("%s stopped", name)
        return 0
    if failure is None:
        _log.error("%s ended by itself", name)
        return EXIT_FAILED
    causes = list(_leaves(failure))
    if all(_is_plain(cause) for cause in causes):
        for line in dict.fromkeys(_line(cause) for cause in causes):
            _say(f"{name}: {line}")
    else:
        _log.critical("%s failed: %s", name, failure, exc_info=failure)
    return EXIT_FAILED


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _is_plain(error: BaseException) -> bool:
    """Whether an error is one the operator can act on from its text alone."""
    in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
    return in_use or isinstance(error, OpenManagerError | CannotStartError | AddressUnavailable)


def _line(error: BaseException) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _say(text: str) -> None:
    """To the operator, as plain text: what happens before there are logs, or instead of a traceback."""
    sys.stderr.write(redact(text) + "\n")
    sys.stderr.flush()


def _stop(process: Process[Any], why: str) -> None:
    if not process.stopping.is_set():
        _log.info("%s stops: %s", process.name, why)
        process.stopping.set()


async def _watch_parent(process: Process[Any]) -> None:
    """Ends the process when the launcher, its direct parent, is gone: the kernel then gives it another parent."""
    parent = os.environ.get(PARENT_PID_VARIABLE, "")
    if not parent.isdecimal():
        return
    while os.getppid() == int(parent):  # noqa: ASYNC110  nothing announces this
        await asyncio.sleep(PARENT_CHECK_INTERVAL_S)
    _stop(process, f"its launcher (pid {parent}) is gone")


def _log_loop_failure(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    details = {key: str(value) for key, value in context.items() if key not in {"message", "exception"}}
    _log.error(
        "event loop: %s: %r", context.get("message", "failure"), error, exc_info=error, extra={"context": details}
    )
