"""The curl and grpcurl examples of the pages: found in them, told apart, and run on a product.

An example is a line that begins with `$` in a console block, with its continuation lines; what is below it is its
answer. Inline code that begins with `curl` is one, too. What is substituted, and nothing else is: 127.0.0.1:8080 and
127.0.0.1:50050, by where the product listens, and how long an endless one is listened to, which is ended here.
"""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813  a function, named as a class

from gateway.http.routes import RouteTable, routes_for
from openmanager.gateway.v1 import options_pb2
from tests.gateway.http.serving import PACKAGE, SERVICES
from tests.harness.launched import Launched
from tests.harness.product import ROOT

TABLE = RouteTable(routes_for(default_pool().FindServiceByName(f"{PACKAGE}.{name}") for name in SERVICES))
FIRST_ANSWER_S = 60.0


def pages() -> list[Path]:
    """Every page that people read."""
    clients = ROOT / "examples" / "clients"
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(clients.glob("**/README.md"))]


def examples(page: Path) -> list[tuple[str, str]]:
    """(command, answer) of each example of a page."""
    found = []
    for block in console_blocks(page.read_text()):
        for example in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = example.rstrip().splitlines()
            end = next(index for index in range(1, len(lines) + 1) if "\n".join(lines[:index]).count("'") % 2 == 0)
            found.append(("\n".join(lines[:end]), "\n".join(lines[end:])))
    return found + [(command, "") for command in re.findall(r"`((?:curl|grpcurl) [^`\n]+)`", page.read_text())]


def console_blocks(text: str) -> list[str]:
    return re.findall(r"```console\n(.*?)```", text, re.DOTALL)


def names(text: str) -> set[str]:
    """The JSON names and the symbols in an answer, whatever their values."""
    return set(re.findall(r'"([A-Za-z_]+)":', text)) | set(re.findall(r"^[a-z]+(?:\.\w+)+$", text, re.MULTILINE))


@dataclass(frozen=True, slots=True)
class Call:
    """What an example calls."""

    by: str
    """curl or grpcurl."""
    method: MethodDescriptor
    verb: str = ""
    path: str = ""
    """As sent, without the query."""
    subject: str = ""
    """The id or name of what it is about."""

    @property
    def name(self) -> str:
        """Service/Method."""
        return f"{self.method.containing_service.name}/{self.method.name}"

    @property
    def is_file(self) -> bool:
        """Whether the answer over HTTP is a file."""
        return _is_file(self.method)

    @property
    def is_endless(self) -> bool:
        """Whether the answer goes on for as long as somebody listens."""
        wanted = self.method.GetOptions().Extensions[options_pb2.http_stream_format]
        return bool(wanted == options_pb2.HTTP_STREAM_FORMAT_SERVER_SENT_EVENTS)


def _is_file(method: MethodDescriptor) -> bool:
    return bool(method.GetOptions().Extensions[options_pb2.http_stream_format] == options_pb2.HTTP_STREAM_FORMAT_TEXT)


def call_of(command: str) -> Call | None:
    """The call of a command; None when it is no API call. LookupError: it calls what does not exist."""
    words = shlex.split(re.sub(r"\$\([^)]*\)", "2026-01-31T12:00:00Z", command))  # what the shell puts in is a time
    if words[0] == "grpcurl":
        (symbol,) = [word for word in words if "/" in word and word.count(".") >= 3 and ":" not in word] or [""]
        service, _, name = symbol.rpartition("/")
        if not service.startswith("openmanager."):
            return None
        if service.removeprefix(f"{PACKAGE}.") not in SERVICES:
            raise LookupError(command)
        try:
            method = default_pool().FindServiceByName(service).methods_by_name[name]
        except KeyError:
            raise LookupError(command) from None
        body = _body(words)
        return Call("grpcurl", method, subject=_subject(body))
    url = next(word for word in words if re.match(r"(https?://)?(127\.0\.0\.1|localhost):8080", word))
    path = "/" + url.partition(":8080")[2].partition("?")[0].removeprefix("/")
    if not path.startswith(("/v1/", "/api/")):
        return None
    verb = words[words.index("-X") + 1] if "-X" in words else "POST" if "-d" in words else "GET"
    match = TABLE.find(verb, path)
    if match is None or match.route is None:
        raise LookupError(f"{verb} {path}")
    subject = match.values[0] if match.values else _subject(_body(words))
    return Call("curl", match.route.method, verb, path, subject)


def _subject(body: dict[str, Any]) -> str:
    inner = next((body[name] for name in ("server", "interaction", "user", "token") if name in body), body)
    return str(inner.get("id") or inner.get("name") or "")


def _body(words: list[str]) -> dict[str, Any]:
    if "-d" not in words:
        return {}
    found: dict[str, Any] = orjson.loads(words[words.index("-d") + 1])
    return found


def run(product: Launched, command: str, call: Call | None) -> str:
    """What an example prints. AssertionError when it fails; one that is endless is ended after its first answer."""
    command = command.replace("127.0.0.1:8080", product.http_address)
    command = command.replace("127.0.0.1:50050", product.addresses["gateway"])
    if call is not None and call.is_endless:
        return _first_answer(re.sub(r"(-max-time) \d+", rf"\1 {FIRST_ANSWER_S:.0f}", command))
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def _first_answer(command: str) -> str:
    """Of Server-Sent Events all up to the first with data; of grpcurl the first message."""
    with subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        said = ""
        ends = time.monotonic() + FIRST_ANSWER_S
        for line in _lines(process.stdout):
            said += line
            if re.search(r'^data: \{"[^\n]*\n\n|^\}\n', said, re.MULTILINE):
                break
            assert time.monotonic() < ends, said
        else:
            return said
        os.killpg(process.pid, signal.SIGTERM)
    return said


def _lines(stream: Any) -> Iterator[str]:
    for line in stream:
        yield line.decode()
