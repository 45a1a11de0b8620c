"""h2load and wrk: load generators in C, which cost a tenth of what they load.

h2load sees no gRPC status: it counts HTTP 200, which a failed call has too. So a run counts only when nothing failed,
and as many bytes of data came as that many right replies have; `bench.api.checks` decodes some meanwhile.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.peers import BenchError

PACKAGES: Final = {"h2load": "nghttp2-client", "wrk": "wrk"}
"""Program -> Debian's package."""
SLACK_S: Final = 30.0
CONNECTIONS: Final = 10
"""Of h2load; the calls in flight are spread over them."""
FRAME_HEAD: Final = 5
"""Bytes before a gRPC message."""

_H2LOAD: Final = {
    "rate": re.compile(r"finished in [\d.]+\w+, ([\d.]+) req/s"),
    "done": re.compile(r"(\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout"),
    "codes": re.compile(r"status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx"),
    "data": re.compile(r"\((\d+)\) data"),
}
_WRK_SCRIPT: Final = """done = function(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format("bench %.0f %.0f %.0f %.0f\\n", summary.requests, summary.duration, summary.bytes,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""
_WRK: Final = re.compile(r"^bench (\d+) (\d+) (\d+) (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What a generator counted; every reply was whole."""

    replies: int
    per_second: float


def missing(*programs: str) -> str:
    """Which are not on the PATH and how to install them; empty when all are there."""
    lacking = [program for program in programs if shutil.which(program) is None]
    if not lacking:
        return ""
    packages = " ".join(PACKAGES.get(program, program) for program in lacking)
    debian = all(program in PACKAGES for program in lacking)
    hint = f" (Debian: apt-get install {packages})" if debian else ""
    return f"{' and '.join(lacking)} not on the PATH{hint}"


def h2load(
    address: str,
    path: str,
    message: bytes,
    headers: Mapping[str, str],
    *,
    in_flight: int,
    seconds: float,
    reply_bytes: int,
    scratch: Path,
) -> Counted:
    """Unary gRPC calls in a closed loop: a call is made when one has been answered.

    Args:
        address: host:port.
        path: /package.Service/Method.
        message: the serialized request.
        headers: beside those of gRPC.
        in_flight: calls that wait at once.
        seconds: how long.
        reply_bytes: of a right reply, serialized.
        scratch: a folder for a file.
    """
    data = scratch / "h2load.request"
    data.write_bytes(b"\0" + len(message).to_bytes(4, "big") + message)
    connections = min(CONNECTIONS, in_flight)
    command = ["h2load", "-D", _whole(seconds), "-c", str(connections), "-m", str(in_flight // connections)]
    command += ["-d", str(data), *_headers({"content-type": "application/grpc", "te": "trailers", **headers})]
    text = _run([*command, f"http://{address}{path}"], seconds)
    rate, done, codes, size = (_found(pattern, text) for pattern in _H2LOAD.values())
    _, succeeded, failed, errored, timeout = map(int, done)
    wrong = failed + errored + timeout + sum(map(int, codes[1:]))
    if wrong or not succeeded or int(codes[0]) < succeeded:
        raise BenchError(f"h2load counted {wrong} failures and {succeeded} replies: {text.strip()}")
    if int(size[0]) < succeeded * (FRAME_HEAD + reply_bytes):
        raise BenchError(f"{succeeded} replies of {reply_bytes} bytes were {size[0]} bytes: some were something else")
    return Counted(replies=succeeded, per_second=float(rate[0]))


def wrk(
    url: str, headers: Mapping[str, str], *, connections: int, seconds: float, body_bytes: int, scratch: Path
) -> Counted:
    """GET over HTTP/1.1 in a closed loop; `body_bytes` is the least that a right answer's body has."""
    script = scratch / "wrk.lua"
    script.write_text(_WRK_SCRIPT)
    command = ["wrk", "-t", "1", "-c", str(connections), "-d", f"{_whole(seconds)}s", "--timeout", "10s"]
    text = _run([*command, "-s", str(script), *_headers(headers), url], seconds)
    replies, duration_us, size, wrong = map(int, _found(_WRK, text))
    if wrong or not replies:
        raise BenchError(f"wrk counted {wrong} failures and {replies} replies: {text.strip()}")
    if size < replies * body_bytes:
        raise BenchError(f"{replies} answers of {body_bytes} bytes were {size} bytes: some were something else")
    return Counted(replies=replies, per_second=replies / (duration_us / 1e6))


def _whole(seconds: float) -> str:
    """Neither program takes parts of a second."""
    return str(max(1, round(seconds)))


def _headers(headers: Mapping[str, str]) -> list[str]:
    return [word for name, value in headers.items() for word in ("-H", f"{name}: {value}")]


def _run(command: Sequence[str], seconds: float) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + SLACK_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{command[0]} did not end within {SLACK_S:g} s of its time") from error
    if done.returncode:
        raise BenchError(f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def _found(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    match = pattern.search(text)
    if match is None:
        raise BenchError(f"the generator's output has no {pattern.pattern}: {text.strip()[-1000:]}")
    return match.groups()
