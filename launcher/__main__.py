"""``python -m launcher``: the six processes, their addresses, and what a terminal shows of them."""

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from launcher.supervisor import ProcessSpec, Say, StartFailedError, Supervisor
from launcher.terminal import Terminal
from runtime import notify
from runtime.clock import SystemClock
from runtime.settings import split_address

EXAMPLES = """examples:
  make run                                         all defaults, data in ./data
  DATA_DIR=/srv/openmanager make run               data elsewhere
  REDIS_URL=redis://127.0.0.1:6379/0 make run      the live state also in Redis
  SIMULATOR_MODE=host make run                     watch this machine instead of a made-up fleet
  GATEWAY_HTTP_ADDRESS=127.0.0.1:9000 make run     another port
Every process reads its settings from the environment; docs/settings.md lists them."""


_ADDRESSES = {
    "GATEWAY_HTTP_ADDRESS": "127.0.0.1:8080",
    "GATEWAY_GRPC_ADDRESS": "127.0.0.1:50050",
    "CACHE_ADDRESS": "127.0.0.1:50051",
    "TIMESERIES_ADDRESS": "127.0.0.1:50052",
    "METADATA_ADDRESS": "127.0.0.1:50053",
    "SIMULATOR_ADDRESS": "127.0.0.1:50054",
    "ANALYTICS_ADDRESS": "127.0.0.1:50055",
}
"""What the processes take by default; they check what is set, and all of them say what is wrong."""

_ANY_HOST = {"0.0.0.0", "::"}  # noqa: S104 - compared with, not listened on

_TRUE = {"true", "1", "yes", "on", "t", "y"}
"""What the gateway takes for true."""

_PROCESSES = (
    ProcessSpec(name="metadata", module="services.metadata", stop_wave=2),
    ProcessSpec(name="timeseries", module="services.timeseries", stop_wave=2),
    ProcessSpec(name="cache", module="services.cache", stop_wave=2),
    ProcessSpec(name="analytics", module="services.analytics", stop_wave=1),
    ProcessSpec(name="simulator", module="services.simulator", stop_wave=0),
    ProcessSpec(name="gateway", module="gateway", stop_wave=1),
)


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher",
        description="Starts OpenManager's six processes and keeps them running; Ctrl-C stops them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    terminal = Terminal(sys.stdout)
    try:
        return asyncio.run(_run(Path(os.environ.get("DATA_DIR") or "data"), terminal.say))
    finally:
        terminal.close()


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """What the processes are started with: `given`, and a *_TARGET for each that listens elsewhere and has none.

    Otherwise the others would dial the default: nobody, or the process of another install.
    """
    found = dict(given)
    for name in _ADDRESSES:
        target = name.replace("_ADDRESS", "_TARGET")
        if name.startswith("GATEWAY_") or not given.get(name) or given.get(target):
            continue
        with contextlib.suppress(ValueError):  # no address: the process itself says so
            host, port = split_address(given[name])
            if port:
                found[target] = f"127.0.0.1:{port}" if host in _ANY_HOST else given[name]
    return found


async def _run(data: Path, say: Say) -> int:
    given = environment(os.environ)
    supervisor = Supervisor(_PROCESSES, environ=given, logs=data / "logs", clock=SystemClock(), say=say)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _stop, supervisor, say)
    say("starting OpenManager ...")
    try:
        await supervisor.run(lambda: _tell_ready(data, say))
    except StartFailedError as error:
        say(f"could not start:\n{error}")
        return 1
    say("stopped")
    return 0


def _stop(supervisor: Supervisor, say: Say) -> None:
    say("stopping ... (once more to kill)")
    supervisor.stop()


def _tell_ready(data: Path, say: Say) -> None:
    say(_welcome(data))
    try:
        notify.notify(notify.READY)
    except OSError as error:
        say(f"whoever started this cannot be told {notify.READY.decode()}: {error}")


def _welcome(data: Path) -> str:
    at = {name: os.environ.get(name) or default for name, default in _ADDRESSES.items()}
    tls = bool(os.environ.get("TLS_CERT_FILE"))
    lines = [
        "OpenManager is running",
        f"  page        http{'s' * tls}://{at['GATEWAY_HTTP_ADDRESS']}/",
        f"  HTTP        http{'s' * tls}://{at['GATEWAY_HTTP_ADDRESS']}/v1/servers   (API: /docs, /openapi.json)",
        f"  gRPC        {at['GATEWAY_GRPC_ADDRESS']}{'   (TLS)' * tls}",
        f"  services    cache {at['CACHE_ADDRESS']}, timeseries {at['TIMESERIES_ADDRESS']},",
        f"              metadata {at['METADATA_ADDRESS']}, simulator {at['SIMULATOR_ADDRESS']},",
        f"              analytics {at['ANALYTICS_ADDRESS']}",
        f"  data        {data}   logs in {data / 'logs'}",
    ]
    if os.environ.get("GATEWAY_ACCOUNTS", "").lower() in _TRUE:
        token_file = shlex.quote(str(data / "metadata" / "setup-token"))
        setup = f"openmanager setup NAME --setup-token-file {token_file}"
        if tls or at["GATEWAY_GRPC_ADDRESS"] != _ADDRESSES["GATEWAY_GRPC_ADDRESS"]:
            setup += f" --address {'https://' * tls}{at['GATEWAY_GRPC_ADDRESS']}"
        lines += ["  access      whoever has a token; while there is no user yet:", f"              {setup}"]
    elif not os.environ.get("GATEWAY_TOKEN"):
        until = "until you set GATEWAY_TOKEN or GATEWAY_ACCOUNTS=true"
        lines.append(f"  access      whoever is on this machine is administrator, {until}")
    lines.append("Ctrl-C stops everything.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
