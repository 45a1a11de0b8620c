"""A gateway that cannot start says why, in one line, and nothing else."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

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
