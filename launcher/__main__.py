"""``python -m launcher``: the six processes, their addresses, and what a terminal shows of them."""

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from launcher.supervisor import ProcessSpec, Ready, StartFailedError, Supervisor
from runtime.clock import SystemClock
from runtime.settings import Address, CommonSettings, SettingsError, load, setting
from runtime.tls import channel_credentials

HEALTH_TIMEOUT_S = 1.0

EXAMPLES = """examples:
  make run                                         all defaults, data in ./data
  DATA_DIR=/srv/openmanager make run               data elsewhere
  REDIS_URL=redis://127.0.0.1:6379/0 make run      the live state also in Redis
  SIMULATOR_MODE=host make run                     watch this machine instead of a made-up fleet
  GATEWAY_HTTP_ADDRESS=127.0.0.1:9000 make run     another port
Every process reads its settings from the environment; docs/settings.md lists them."""


class LauncherSettings(CommonSettings):
    """Where the processes listen, to ask whether they serve; the same variables as theirs."""

    gateway: Address = setting("GATEWAY_GRPC_ADDRESS", "127.0.0.1:50050", "gRPC address of the gateway.")
    gateway_http: Address = setting("GATEWAY_HTTP_ADDRESS", "127.0.0.1:8080", "HTTP address of the gateway.")
    cache: Address = setting("CACHE_ADDRESS", "127.0.0.1:50051", "Address of the cache.")
    timeseries: Address = setting("TIMESERIES_ADDRESS", "127.0.0.1:50052", "Address of timeseries.")
    metadata: Address = setting("METADATA_ADDRESS", "127.0.0.1:50053", "Address of metadata.")
    simulator: Address = setting("SIMULATOR_ADDRESS", "127.0.0.1:50054", "Address of the simulator.")
    analytics: Address = setting("ANALYTICS_ADDRESS", "127.0.0.1:50055", "Address of analytics.")


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher",
        description="Starts OpenManager's six processes and keeps them running; Ctrl-C stops them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    try:
        settings = load(LauncherSettings)
    except SettingsError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the terminal is this program's interface
        return 2
    return asyncio.run(_run(settings))


async def _run(settings: LauncherSettings) -> int:
    supervisor = Supervisor(
        _processes(settings), environ=os.environ, logs=settings.data_dir / "logs", clock=SystemClock(), say=_say
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _stop, supervisor)
    _say("starting OpenManager ...")
    try:
        await supervisor.run(lambda: _say(_welcome(settings)))
    except StartFailedError as error:
        _say(f"could not start:\n{error}")
        return 1
    _say("stopped")
    return 0


def _stop(supervisor: Supervisor) -> None:
    _say("stopping ... (once more to kill)")
    supervisor.stop()


def _processes(settings: LauncherSettings) -> list[ProcessSpec]:
    def spec(name: str, module: str, address: str, stop_wave: int) -> ProcessSpec:
        return ProcessSpec(name=name, module=module, ready=_health_check(address, settings), stop_wave=stop_wave)

    return [
        spec("metadata", "services.metadata", settings.metadata, 2),
        spec("timeseries", "services.timeseries", settings.timeseries, 2),
        spec("cache", "services.cache", settings.cache, 2),
        spec("analytics", "services.analytics", settings.analytics, 1),
        spec("simulator", "services.simulator", settings.simulator, 0),
        spec("gateway", "gateway", settings.gateway, 1),
    ]


def _health_check(address: str, settings: LauncherSettings) -> Ready:
    async def ready() -> bool:
        credentials = channel_credentials(settings)
        channel = (
            grpc.aio.insecure_channel(address) if credentials is None else grpc.aio.secure_channel(address, credentials)
        )
        async with channel:
            try:
                stub = health_pb2_grpc.HealthStub(channel)
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    return ready


def _welcome(settings: LauncherSettings) -> str:
    folder = Path(os.path.relpath(settings.data_dir))
    lines = [
        "OpenManager is running",
        f"  HTTP        http://{settings.gateway_http}/v1/servers   (API: /docs, /openapi.json)",
        f"  gRPC        {settings.gateway}",
        f"  services    cache {settings.cache}, timeseries {settings.timeseries}, metadata {settings.metadata},",
        f"              simulator {settings.simulator}, analytics {settings.analytics}",
        f"  data        {folder}   logs in {folder / 'logs'}",
        "  access      whoever is on this machine is administrator, until you configure authentication",
        "Ctrl-C stops everything.",
    ]
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the terminal is this program's interface


if __name__ == "__main__":
    sys.exit(main())
