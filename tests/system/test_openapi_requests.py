"""Requests that schemathesis makes of /openapi.json get no 5xx, and answers that are what the document says.

It is run as its users run it, on a product of its own, which it may fill, stop and empty as it likes; openapi_hooks.py
tells it what exists. What it is not asked to judge, and why:

    positive_data_acceptance   limits (a page size below 0, a name that is not printable) are in comments, not in types
    negative_data_rejection    proto3 JSON takes more than a schema can say: null, "5" for 5, `healthy`
    unsupported_method         PUT without a JSON content type is refused for that (415) before its path is looked at
    allow_header_conformance   /v1/servers/a:undelete is also, with GET, PATCH and DELETE, the server `a:undelete`
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.launched import Launched
from tests.harness.product import ROOT
from tests.harness.shared_product import unharmed

NOT_JUDGED = "positive_data_acceptance,negative_data_rejection,unsupported_method,allow_header_conformance"
PHASES = "examples,coverage,fuzzing,stateful"
# A watcher's stream ends with its Request-Timeout.
CONFIG = """
headers = { "Request-Timeout" = "30s" }
[[operations]]
include-name = "GET /v1/fleet/watch"
headers = { "Request-Timeout" = "100ms" }
[[operations]]
include-name = "GET /v1/anomalies:watch"
headers = { "Request-Timeout" = "100ms" }
"""


def requests(product: Launched, folder: Path) -> str:
    """What schemathesis says of a run without failures."""
    config = folder / "schemathesis.toml"
    config.write_text(CONFIG)
    servers = [server["id"] for server in product.get("/v1/servers").json["servers"]]
    environ = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "SCHEMATHESIS_HOOKS": "tests.system.openapi_hooks",
        "KNOWN_SERVERS": ",".join(servers),
    }
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(config), "run"]
    command += [f"http://{product.http_address}/openapi.json", "--checks", "all", "--exclude-checks", NOT_JUDGED]
    command += ["--phases", PHASES, "--max-examples", "60", "--seed", os.environ.get("FUZZ_SEED", "1")]
    command += ["--request-timeout", "30", "--continue-on-failure", "--generation-database", "none", "--no-color"]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.full
@pytest.mark.timeout(600)
def test_no_request_breaks_it_and_answers_are_as_described(abused: Launched, tmp_path: Path) -> None:
    verbs = abused.get("/openapi.json").json["paths"].values()
    said = requests(abused, tmp_path)
    assert f"Tested: {sum(map(len, verbs))}\n" in said, said
    unharmed(abused)
