"""Builds the example clients and runs each against a live product; ``make example-clients``.

What is built and run is what each client's README says: the lines of its ``sh`` block, of which the last is the client.
Three runs have to go well: as a newcomer has it (no token, no TLS), against a gateway that wants both, and against the
same with a wrong token, which has to be shown and to fail. What the clients print is believed only as far as the
gateway has the points too. A language whose tools are missing is named and left out.
"""

import argparse
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from launcher.__main__ import environment
from tests.harness import free_port
from tests.harness.launched import Launched, within
from tests.harness.product import ROOT

FOLDER = ROOT / "examples" / "clients"
TOOLS = {"go": ("go",), "java": ("javac", "mvn"), "node": ("node", "npm"), "rust": ("cargo", "cc")}
BUILD_WITHIN_S = 900.0
RUN_WITHIN_S = 90.0
SIMULATED = 20
RECORDED = 3_000
"""So many more, with long names: a snapshot of the fleet is several messages of 1 MiB."""
TOKEN = "a-token-of-the-example-clients"
EXPECTED = (
    r"listed (\d+) servers",
    r"\S+ is SERVER_STATUS_(HEALTHY|WARNING|CRITICAL), cpu_usage \d+\.\d",
    r"watching (\d+) servers",
    r"[1-9]\d* servers changed, 0 left",
    r"read [1-9]\d* points of \S+, cpu_usage: the last is \d+\.\d %",
    r"wrote 2 points of {self}",
    r"read 1 points of {self}, cpu_usage: the last is 12\.5 %",
    r"read 1 points of {self}, sent_bytes: the last is 4096\.0 By",
)
"""Line by line, what a client prints."""


class FailedError(Exception):
    """A client did not build, or did not do what it should; the text says what was seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One client: its commands, as its README has them."""

    language: str
    build: str
    run: str
    variables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, language: str) -> "Client":
        """The client in the folder of a language."""
        (block,) = re.findall(r"```sh\n(.*?)```", (FOLDER / language / "README.md").read_text(), re.DOTALL)
        *build, run = block.strip().splitlines()
        return cls(language=language, build="\n".join(build), run=run)

    def shell(self, command: str, within_s: float, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Runs a command in the client's folder."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("OPENMANAGER_")}
        try:
            return subprocess.run(
                ["bash", "-euc", command], cwd=FOLDER / self.language, env=inherited | dict(variables),
                stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=within_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as expired:
            raise FailedError(f"{command}\nhad not ended after {within_s} s\n{expired.output}") from None

    def make(self) -> float:
        """Builds the client; returns the seconds it took."""
        started = time.monotonic()
        done = self.shell(self.build, BUILD_WITHIN_S, {})
        if done.returncode:
            raise FailedError(f"{self.build}\nfailed with {done.returncode}\n{done.stdout}{done.stderr}")
        return time.monotonic() - started

    def succeed(self, variables: Mapping[str, str]) -> None:
        """Runs the client, which must do all it is for."""
        done = self.shell(self.run, RUN_WITHIN_S, variables)
        lines = done.stdout.splitlines()
        patterns = [pattern.replace("{self}", f"example-{self.language}") for pattern in EXPECTED]
        found = [re.fullmatch(pattern, line) for pattern, line in zip(patterns, lines, strict=False)]
        right = done.returncode == 0 and len(lines) == len(patterns) and all(found)
        if not right or any(int(found[index][1]) < SIMULATED + RECORDED for index in (0, 2)):  # type: ignore[index]
            wanted = "\n".join(patterns)
            raise FailedError(
                f"{self.run}\nended with {done.returncode}\n{done.stdout}{done.stderr}instead of 0 and\n{wanted}"
            )

    def be_refused(self, variables: Mapping[str, str]) -> None:
        """Runs the client with a token that the gateway does not take: code and message must be shown."""
        done = self.shell(self.run, RUN_WITHIN_S, variables)
        if done.returncode != 1 or not re.search(
            r"(?i)^unauthenticated: the token is not valid", done.stderr, re.MULTILINE
        ):
            raise FailedError(
                f"{self.run}\nwith a wrong token: ended with {done.returncode}\n{done.stdout}{done.stderr}"
                "instead of 1 and UNAUTHENTICATED: the token is not valid"
            )


def missing(language: str) -> list[str]:
    """The tools of a language that are not on PATH."""
    return [tool for tool in TOOLS[language] if shutil.which(tool) is None]


def make_certificates(folder: Path, name: str) -> Path:
    """Writes certificate.pem and certificate.key for a host name; returns the authority that signed it."""
    authority, authority_key, request = folder / "authority.pem", folder / "authority.key", folder / "request"
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    (folder / "extensions").write_text(f"subjectAltName=DNS:{name}\nbasicConstraints=critical,CA:FALSE\n")
    for arguments in (
        ("req", "-x509", *new_key, "-days", "2", "-subj", "/CN=example authority",
         "-keyout", authority_key, "-out", authority),
        ("req", *new_key, "-subj", "/CN=example gateway", "-keyout", folder / "certificate.key", "-out", request),
        ("x509", "-req", "-days", "2", "-in", request, "-CA", authority, "-CAkey", authority_key, "-CAcreateserial",
         "-extfile", folder / "extensions", "-out", folder / "certificate.pem"),
    ):  # fmt: skip
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=20)
    return authority


@contextlib.contextmanager
def strict_gateway(product: Launched, folder: Path) -> Iterator[dict[str, str]]:
    """A second gateway before the same services, with a token and TLS; yields how to reach it.

    Clients dial the name of this machine: whatever it resolves to, it is not a name that goes without TLS.
    """
    name = socket.gethostname()
    authority = make_certificates(folder, name)
    port = free_port("0.0.0.0")
    settings = {
        "DATA_DIR": str(folder / "strict"),
        "SERVICE_SECRET": (product.data / "service-secret").read_text().strip(),
        "GATEWAY_GRPC_ADDRESS": f"0.0.0.0:{port}",
        "GATEWAY_HTTP_ADDRESS": f"127.0.0.1:{free_port()}",
        "GATEWAY_TOKEN": TOKEN,
        "TLS_CERT_FILE": str(folder / "certificate.pem"),
        "TLS_KEY_FILE": str(folder / "certificate.key"),
    }
    log = folder / "strict.txt"
    with log.open("wb") as output:
        environ = environment(product.environ | settings)  # with what the launcher tells its processes, too
        process = subprocess.Popen(
            [sys.executable, "-m", "gateway"], cwd=ROOT, env=environ, stdout=output, stderr=output
        )
    try:
        credentials = grpc.ssl_channel_credentials(authority.read_bytes())
        within(60, lambda: process.poll() is not None or serves(f"{name}:{port}", credentials))
        if process.poll() is not None:
            raise FailedError(f"the gateway with TLS ended:\n{log.read_text()}")
        yield {
            "OPENMANAGER_ADDRESS": f"{name}:{port}",
            "OPENMANAGER_TOKEN": TOKEN,
            "OPENMANAGER_CA_FILE": str(authority),
            "NO_PROXY": name,
            "no_proxy": name,
        }
    finally:
        process.terminate()
        process.wait(90)


def serves(address: str, credentials: grpc.ChannelCredentials) -> bool:
    """Whether a gateway answers its health check."""
    with grpc.secure_channel(address, credentials) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def check(client: Client, product: Launched, strict: dict[str, str]) -> float:
    """The three runs of a client, and what the gateway has of them; returns the seconds of the first."""
    started = time.monotonic()
    client.succeed({"OPENMANAGER_ADDRESS": product.addresses["gateway"]})
    took = time.monotonic() - started
    client.succeed(strict)
    client.be_refused(strict | {"OPENMANAGER_TOKEN": "a-token-of-nobody-at-all"})
    path = f"/v1/servers/example-{client.language}/history?metric=cpu_usage&metric=sent_bytes"
    series = {each["metric"]: each["values"] for each in product.get(path).json["series"]}
    if series != {"cpu_usage": [12.5, 12.5], "sent_bytes": [4096.0, 4096.0]}:
        raise FailedError(f"after two runs the gateway has {series} of example-{client.language}")
    return took


def record_many(product: Launched) -> None:
    """Adds servers that never report."""
    lines = (f"recorded-{number},{'h' * 255},{'l' * 100}\n" for number in range(RECORDED))
    body = {"format": "csv", "text": "id,hostname,location\n" + "".join(lines)}
    within(60, lambda: product.post("/v1/servers:import", body).status == 200)
    within(60, lambda: product.get("/v1/servers").json["totalSize"] == SIMULATED + RECORDED)


def run(languages: Sequence[str], folder: Path) -> int:
    """Builds and runs the clients; returns how many failed. One line a language, more where one failed."""
    clients = []
    for language in languages:
        if tools := missing(language):
            print(f"{language:<5} skipped: {' and '.join(tools)} not on PATH", flush=True)
        else:
            clients.append(Client.of(language))
    if not clients:
        return 0
    failed = 0
    # Builds wait for the network as much as for the processor.
    with ThreadPoolExecutor(len(clients)) as pool:
        builds = [pool.submit(client.make) for client in clients]
    with Launched(folder, SIMULATOR_INTERVAL="1s", SIMULATOR_SERVERS=str(SIMULATED)) as product:
        within(60, lambda: product.get("/v1/servers").json["totalSize"] == SIMULATED)
        record_many(product)
        with strict_gateway(product, folder) as strict:
            for client, build in zip(clients, builds, strict=True):
                try:
                    built_s = build.result()
                    ran_s = check(client, product, strict)
                except FailedError as failure:
                    failed += 1
                    print(f"{client.language:<5} FAILED: {failure}", flush=True)
                else:
                    print(f"{client.language:<5} passed: built in {built_s:.0f} s, ran in {ran_s:.1f} s", flush=True)
    return failed


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="make example-clients",
        description="Build the example clients and run each against a live product.",
        epilog='examples:\n  make example-clients\n  make example-clients ARGS="go rust"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("languages", nargs="*", metavar="LANGUAGE", help=f"of {', '.join(TOOLS)}; default: all")
    languages = parser.parse_args().languages or list(TOOLS)
    if unknown := [language for language in languages if language not in TOOLS]:
        parser.error(f"{', '.join(unknown)}: there is no such client; take of {', '.join(TOOLS)}")
    with tempfile.TemporaryDirectory(prefix="openmanager-clients-") as folder:
        return 1 if run(languages, Path(folder)) else 0


if __name__ == "__main__":
    sys.exit(main())
