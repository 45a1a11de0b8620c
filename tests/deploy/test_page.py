"""The curl and grpcurl commands of docs/deployment.md get in through TLS with the token of a fresh installation."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from tests.deploy.conftest import Installation, need
from tests.deploy.test_compose import MODULES
from tests.docs.examples import ROOT, console_blocks
from tests.harness import eventually, free_port
from tests.harness.product import KEPT_VARIABLES


async def shell(script: str, folder: Path) -> tuple[int, str]:
    """Exit status and output of the lines, which stop at the first that fails."""
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", f"set -e\n{script}", cwd=folder, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_the_commands_of_the_page_work(installation: Installation, tmp_path: Path) -> None:
    need("grpcurl")
    ports = {name: free_port() for name in ("gateway", "http", "cache")}
    environ = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    environ |= installation.environment("cache") | installation.environment("gateway")
    environ |= {
        "DATA_DIR": str(tmp_path),
        "GATEWAY_GRPC_ADDRESS": f"localhost:{ports['gateway']}",
        "GATEWAY_HTTP_ADDRESS": f"localhost:{ports['http']}",
        "CACHE_ADDRESS": f"localhost:{ports['cache']}",
        "CACHE_TARGET": f"localhost:{ports['cache']}",
        "REDIS_URL": "",
    }
    (block,) = console_blocks((ROOT / "docs" / "deployment.md").read_text())
    script = block.replace("$ ", "").replace("localhost:8080", environ["GATEWAY_HTTP_ADDRESS"])
    script = script.replace("localhost:50050", environ["GATEWAY_GRPC_ADDRESS"]).replace("curl --", "curl -sf --")
    with (tmp_path / "log").open("wb") as log:
        running = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", MODULES[name], cwd=ROOT, env=environ, stdout=log, stderr=log
            )
            for name in ("cache", "gateway")
        ]
    try:

        async def works() -> str:
            status, said = await shell(script, installation.root)
            assert status == 0, said + (tmp_path / "log").read_text()[-2000:]
            return said

        said = await eventually(works, within_s=80)
        assert '"totalSize":0' in said and "openmanager.gateway.v1.FleetService" in said, said
        strangers = script.replace("$token", "wrong")
        assert (await shell(strangers, installation.root))[0] != 0
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)
        for process in running:
            await process.wait()
