"""A gateway that cannot start says why, in one line, and nothing else; one that starts is ready when it can work."""

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness import eventually
from tests.harness.product import Product


@pytest.mark.parametrize("setting", ["GATEWAY_HTTP_ADDRESS", "GATEWAY_GRPC_ADDRESS"])
def test_an_address_that_is_taken_is_all_that_is_told(tmp_path: Path, setting: str) -> None:
    """One of the two servers fails while the other one is starting."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        environ = Product(tmp_path, **{setting: taken}).environ
        ended = subprocess.run(
            [sys.executable, "-m", "gateway"], env=environ, capture_output=True, timeout=60, check=False, text=True
        )
    assert ended.returncode == 1
    lines = ended.stderr.splitlines()
    assert [line for line in lines if not line.startswith("{")] == [
        f"gateway: address {taken} is already in use (set {setting})"
    ]
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    assert [line for line in logged if line["level"] in {"WARNING", "ERROR", "CRITICAL"}] == []


async def test_a_gateway_is_ready_when_it_knows_who_may_come_in(tmp_path: Path) -> None:
    token = "token-of-the-operators"
    async with Product(tmp_path, GATEWAY_ACCOUNTS="true", GATEWAY_TOKEN=token) as product:
        starting = asyncio.create_task(product.start("timeseries", "cache", "gateway"))

        async def told() -> dict[str, Any] | None:
            try:
                answer = await product.http("/readyz", headers={"authorization": f"Bearer {token}"})
            except OSError:  # it does not listen yet
                return None
            return {"status": answer.status} | answer.json

        lacks = {"ready": False, "reasons": ["who may come in is not known yet: metadata has not been reached"]}

        async def lacks_it() -> bool:
            return await told() == {"status": 503} | lacks

        await eventually(lacks_it, 30.0)
        await product.start("metadata")
        await starting
        assert await told() == {"status": 200, "ready": True}
