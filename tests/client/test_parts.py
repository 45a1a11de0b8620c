"""The parts of the client and its command that need no gateway."""

import argparse
import csv
import io
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from client import BadAddress, OpenManagerError, Series
from client.backoff import Backoff
from client.channel import endpoint, service_config
from client.command import documents as documents_module
from client.command.access import _read
from client.command.arguments import parse
from client.command.audit import CSV_COLUMNS
from client.command.audit import _row as audit_row
from client.command.body import BadBody, batch_of
from client.command.documents import Documents
from client.command.exits import UsageError, of
from client.command.history_formats import CsvWriter
from client.command.profile import Connection, connection
from client.command.sparkline import BARS, sparkline
from client.command.status import _row as status_row
from client.command.tables import Cell, Column, table
from client.command.terminal import Terminal, clean, clip, width
from client.command.values import age_text, moment_s, number_text, size_text, span_s, time_text
from client.errors import from_rpc_error
from client.history import Joiner
from gateway.http.values import timestamp as http_timestamp
from openmanager.fleet.v1.audit_pb2 import AuditEvent
from openmanager.fleet.v1.status_pb2 import StoreStatus
from runtime.errors import STATUS_TABLE, NotFound, ResourceExhausted, to_status
from tests.client.calling import environment
from tests.harness.product import ROOT


def failed(code: grpc.StatusCode, details: str, status: status_pb2.Status | None = None) -> grpc.aio.AioRpcError:
    trailers = grpc.aio.Metadata()
    if status is not None:
        trailers.add("grpc-status-details-bin", status.SerializeToString())
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers, details)


def test_an_error_is_what_the_gateway_said() -> None:
    for kind, code, _ in STATUS_TABLE:
        said = to_status(kind("no", reason="BECAUSE", field="rows[1].time", retry_after_s=1.5))
        heard = from_rpc_error(failed(code, "other", said), "a:1")
        assert (heard.code, heard.reason, heard.field, heard.message) == (code, "BECAUSE", "rows[1].time", "no")
        assert (heard.retry_after_s, heard.from_gateway, str(heard)) == (1.5, True, "rows[1].time: no")
    assert (
        "openmanager servers"
        in from_rpc_error(
            failed(grpc.StatusCode.NOT_FOUND, "", to_status(NotFound("no", reason="SERVER_NOT_FOUND"))), "a:1"
        ).hint
    )
    too_large = to_status(ResourceExhausted("no", reason="MESSAGE_TOO_LARGE"))
    assert not from_rpc_error(failed(grpc.StatusCode.RESOURCE_EXHAUSTED, "", too_large), "a:1").is_transient


def test_the_gateways_own_hint_is_preferred() -> None:
    status = to_status(NotFound("no", reason="SERVER_NOT_FOUND"))
    packed = AnyMessage()
    packed.Pack(error_details_pb2.Help(links=[error_details_pb2.Help.Link(description="ask Bob")]))
    status.details.append(packed)
    assert from_rpc_error(failed(grpc.StatusCode.NOT_FOUND, "", status), "a:1").hint == "ask Bob"


def test_an_error_of_the_connection() -> None:
    refused = "failed to connect to all addresses; last error: UNKNOWN: ipv4:1.2.3.4:5: Failed to connect to remote host: Connection refused"  # noqa: E501
    heard = from_rpc_error(failed(grpc.StatusCode.UNAVAILABLE, refused), "a:1")
    assert str(heard) == "a:1 is not reachable: Connection refused"
    assert heard.is_transient and not heard.from_gateway
    broken = from_rpc_error(failed(grpc.StatusCode.INTERNAL, "RST_STREAM"), "a:1")
    assert broken.is_transient
    assert not from_rpc_error(failed(grpc.StatusCode.UNIMPLEMENTED, "no"), "a:1").is_transient
    garbage = failed(grpc.StatusCode.NOT_FOUND, "text")
    garbage.trailing_metadata().add("grpc-status-details-bin", b"\xff\xff")
    assert from_rpc_error(garbage, "a:1").message == "text"


def test_every_code_has_an_exit_status() -> None:
    statuses = {code: of(OpenManagerError(code, "")) for code in grpc.StatusCode}
    assert set(statuses.values()) == {1, 2, 3, 4, 5, 6}
    assert statuses[grpc.StatusCode.INTERNAL] == 1


@pytest.mark.parametrize(
    ("address", "target", "secure"),
    [
        ("127.0.0.1:50050", "127.0.0.1:50050", False),
        ("localhost:1", "localhost:1", False),
        ("[::1]:1", "[::1]:1", False),
        ("gateway.example:50050", "gateway.example:50050", True),
        ("10.0.0.1:50050", "10.0.0.1:50050", True),
        ("http://gateway:50050", "gateway:50050", False),
        ("https://gateway.example", "gateway.example:443", True),
        ("https://127.0.0.1:50050/", "127.0.0.1:50050", True),
        ("unix:/run/x.sock", "unix:/run/x.sock", False),
    ],
)
def test_a_token_crosses_no_network_in_clear(address: str, target: str, secure: bool) -> None:
    assert endpoint(address) == (target, secure)


@pytest.mark.parametrize(
    "address", ["", "host", ":1", "host:0", "host:65536", "host:x", "ftp://host:1", "a b:1", "https://u:p@h:1", "h:1/x"]
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(BadAddress):
        endpoint(address)


def test_only_what_may_be_repeated_is_retried() -> None:
    (config,) = service_config()["methodConfig"]
    names = {name["method"] for name in config["name"]}
    assert {"GetServer", "ListServers", "QueryHistory", "GetStorageStatus"} <= names
    assert not names & {"CreateServer", "DeleteServer", "WriteMetrics"}


def test_the_pause_grows_is_capped_and_heeds_the_gateway() -> None:
    backoff = Backoff(initial_s=1.0, max_s=8.0, rng=random.Random(1))
    error = OpenManagerError(grpc.StatusCode.UNAVAILABLE, "")
    for failures, full in enumerate((1.0, 2.0, 4.0, 8.0, 8.0)):
        assert full / 2 <= backoff.delay_s(failures, error) <= full
    error.retry_after_s = 60.0
    assert backoff.delay_s(1_000, error) == 60.0


def test_profiles_take_nothing_from_outside() -> None:
    def found(environ: dict[str, str], *words: str) -> tuple[str, str | None, str | None]:
        to = connection(parse([*words, "status"]), environ)
        return to.address, to.token, to.ca_file

    plain = {"OPENMANAGER_ADDRESS": "a:1", "OPENMANAGER_TOKEN": "t", "OPENMANAGER_CA_FILE": "c"}
    prod = {"OPENMANAGER_MY_PROD_ADDRESS": "b:2"}
    assert found({}) == ("127.0.0.1:50050", None, None)
    assert found(plain | prod) == ("a:1", "t", "c")
    assert found(plain | prod, "--profile", "my-prod") == ("b:2", None, None)
    assert found(plain | prod | {"OPENMANAGER_PROFILE": "my-prod"}, "--token", "u") == ("b:2", "u", None)
    assert found(plain, "--address", "c:3") == ("c:3", "t", "c")
    with pytest.raises(UsageError, match="set OPENMANAGER_MY_PROD_ADDRESS"):
        found(plain, "--profile", "my-prod")
    assert "secret" not in repr(Connection(address="a:1", token="secret", ca_file=None))


def test_times_and_spans() -> None:
    now = 1_795_393_800.0
    relative = ("-1h", "now", "now-5m", "-1h30m", "+10s")
    for text in (*relative, "2026-11-23T00:30:30Z", "2026-11-23T00:30:30+02:00", "1795393800"):
        assert moment_s(text, now) == http_timestamp(text, int(now * 1_000)).ToMilliseconds() / 1_000, text
    assert moment_s("2026-11-23", now) == moment_s("2026-11-23T00:00:00Z", now)
    assert [span_s(text) for text in ("60s", "1.5s", "250ms", "5m", "1h30m", "7d", "0", "90")] == [
        60, 1.5, 0.25, 300, 5_400, 604_800, 0, 90,
    ]  # fmt: skip
    for text in ("", "soon", "1y", "-", "2026-13-01", "-1x", "now-", "999999999999d"):
        with pytest.raises(argparse.ArgumentTypeError):
            moment_s(text, now)
    for text in ("", "h", "-1h", "1e3", "1 h"):
        with pytest.raises(argparse.ArgumentTypeError):
            span_s(text)


def test_texts_for_people() -> None:
    numbers = {42.5: "42.5", 35.254: "35.25", 1234567.0: "1234567", 1234.567: "1234.57", 0.001234: "0.001234"}
    assert {value: number_text(value) for value in numbers} == numbers
    assert [number_text(value) for value in (math.nan, math.inf, -math.inf, 0.0, 1e300)] == [
        "nan", "inf", "-inf", "0", f"{1e300:.2f}",
    ]  # fmt: skip
    assert [size_text(count) for count in (0, 1023, 1536, 8 << 30)] == ["0 B", "1023 B", "1.5 KiB", "8.0 GiB"]
    assert [age_text(s) for s in (-1, 59, 119, 120, 7_200, 172_800)] == ["0s", "59s", "119s", "2m", "2h", "2d"]
    assert [time_text(s) for s in (0, 1795393830.5)] == ["1970-01-01 00:00:00", "2026-11-23 00:30:30.500"]


def test_a_sparkline() -> None:
    def line(values: list[float], cells: int = 8) -> str:
        times = np.arange(len(values), dtype=np.float64)
        return sparkline(times, np.array(values), start=0.0, end=float(len(values)), width=cells)

    assert line([0, 1, 2, 3, 4, 5, 6, 7]) == BARS
    assert line([5.0] * 8) == BARS[4] * 8, "one that does not change is in the middle"
    assert line([0, math.nan, math.nan, 3, 4, 5, 6, 7]) == "▁  ▄▅▆▇█", "a gap is a blank"
    assert line([0, 0, 7, 7], 2) == "▁█", "a cell is the mean of its values"
    assert line([math.inf, 0, 1, -math.inf], 4) == " ▁█ "
    assert line([math.nan] * 4, 4) == "    "
    assert line([1e308, -1e308], 2).strip(), "a range that overflows"
    assert len(line([1.0], 1)) == 1 and line([], 3) == "   "
    times = np.array([-5.0, 5.0, 50.0])
    assert sparkline(times, np.array([9.0, 1.0, 9.0]), start=0, end=10, width=2) == f" {BARS[4]}", "only the range"


def test_columns_line_up_whatever_is_in_them() -> None:
    terminal = Terminal(io.StringIO(), {})
    rows = [("é", "1"), ("日本語", "22"), ("e\u0301x", "333"), ("a\x1b[31mb\n", "4")]
    lines = table(terminal, [Column("NAME"), Column("N", right=True)], rows)
    assert {width(line) for line in lines} == {width(lines[0])}
    assert lines[2] == "日本語     22"
    assert "\x1b" not in "".join(lines) and "\n" not in "".join(lines), "nobody's name moves the cursor"
    assert table(terminal, [Column("A")], []) == ["A"]


class Colourful(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_table_fits_where_it_must() -> None:
    terminal = Terminal(Colourful(), {"TERM": "xterm"})
    columns = [Column("NAME"), Column("VALUE", right=True), Column("PLACE")]
    rows = [("日本語のサーバー", Cell("12.5", "red"), "somewhere"), ("a", "1", "b")]
    whole = [plain(line) for line in table(terminal, columns, rows)]
    for fit in range(1, max(map(width, whole)) + 2):
        for line, uncut in zip(table(terminal, columns, rows, fit=fit), whole, strict=True):
            assert width(plain(line)) <= fit
            assert uncut.startswith(plain(line).removesuffix("…"))
            assert width(uncut) > fit or plain(line) == uncut
            assert line.count("\x1b[") % 2 == 0, "every colour ends"


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_widths() -> None:
    assert [width(text) for text in ("", "abc", "日本", "e\u0301", "🙂")] == [0, 3, 4, 1, 2]
    assert [clip("日本語", columns) for columns in (6, 5, 4, 1, 0)] == ["日本語", "日本…", "日…", "…", ""]
    assert clean("a\tb\x07\u202ec") == "a�b��c"


def test_colours_only_where_they_are_seen() -> None:
    seen = Terminal(Colourful(), {"TERM": "xterm"})
    assert seen.coloured("x", "red") == "\x1b[31mx\x1b[0m" and seen.coloured("x", None) == "x"
    for out, environ in ((Colourful(), {"NO_COLOR": "1"}), (Colourful(), {"TERM": "dumb"}), (io.StringIO(), {})):
        assert Terminal(out, environ).coloured("x", "red") == "x"
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert not Terminal(ascii_only, {}).shows_unicode
    Terminal(ascii_only, {}).line("日")


def test_parts_of_a_series_are_joined() -> None:
    def part(metric: str, *times: float) -> Series:
        values = np.array(times)
        return Series(server_id="a", metric=metric, unit="", times=values, values=values * 2, resolution_s=len(times))

    joiner = Joiner()
    assert joiner.add([part("m", 1, 2)]) == []
    (whole,) = joiner.add([part("m", 3), part("n", 1)])
    assert (whole.metric, whole.times.tolist(), whole.values.tolist()) == ("m", [1, 2, 3], [2, 4, 6])
    assert whole.resolution_s == 2
    (last,) = joiner.end()
    assert (last.metric, joiner.end()) == ("n", [])


def test_a_document_becomes_a_batch() -> None:
    made = batch_of(
        b'{"metrics": [{"name": "a", "kind": "counter", "labels": {"k": "v"}}, {"name": "b"}],'
        b'"servers": [{"serverId": "s", "reportInterval": "1m30s"}],'
        b'"rows": [{"server_id": "s", "time": "2026-11-22T10:00:00.5Z"}, {"serverId": "t", "time": 1795393800}],'
        b'"values": [1, null, "NaN", "-Infinity"], "metricSetId": null}'
    )
    assert [(metric.name, metric.kind) for metric in made.metrics] == [("a", 2), ("b", 0)]
    assert made.servers[0].report_interval.ToMilliseconds() == 90_000
    assert [(row.server_id, row.time.ToMilliseconds()) for row in made.rows] == [
        ("s", 1795341600500),
        ("t", 1795393800000),
    ]
    assert made.values[0] == 1 and all(map(math.isnan, made.values[1:3])) and made.values[3] == -math.inf
    with pytest.raises(BadBody, match="not a JSON object"):
        batch_of(b"7")


async def test_documents_are_told_apart(tmp_path: Path) -> None:
    async def read(text: bytes) -> list[int]:
        path = tmp_path / "x"
        path.write_bytes(text)
        with path.open("rb") as file:
            documents = Documents(file.fileno(), "x")
            return [len(request.values) async for request in documents.batches()]

    assert await read(b"") == [] == await read(b"\n\n  \n")
    assert await read(b'{"values": [1]}') == [1]
    assert await read(b'\n{"values": [1]}\r\n\n{"values": [1, 2]}\n') == [1, 2]
    assert await read(b'{\n"values":\n [1,\n\n 2]}\n') == [2]
    long = b'{"values": [' + b"1," * 1_500_000 + b"1]}\n"
    assert await read(long * 2) == [1_500_001] * 2, "lines longer than what is read at once"
    with pytest.raises(BadBody, match="2: not JSON"):
        await read(b'{"values": [1]}\n{"values": [1]\n')


def test_the_installed_command_runs_from_anywhere(tmp_path: Path) -> None:
    command = tmp_path / "bin" / "openmanager"
    command.parent.mkdir()
    shutil.copy(ROOT / "tools" / "openmanager", command)
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "client.py").write_text("raise SystemExit('what lies in the current folder was run')\n")
    (elsewhere / "openmanager").symlink_to(command)
    done = subprocess.run(
        [elsewhere / "openmanager", "--help"],
        cwd=elsewhere,
        env=environment(None),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: openmanager ")


def test_csv_has_no_cell_that_a_spreadsheet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    evil, numbers = '=HYPERLINK("http://x")', np.array([-1.5, -math.inf, 2.0])
    writer = CsvWriter()
    writer.begin()
    times = np.array([0.0, 1.0, 2.0])
    writer.add(Series(server_id="@web", metric=evil, unit="-x", times=times, values=numbers, resolution_s=0.0))
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert {(row["server_id"], row["metric"], row["unit"]) for row in rows} == {("'@web", "'" + evil, "'-x")}
    assert [float(row["value"]) for row in rows] == numbers.tolist()
    event = AuditEvent(actor=evil, target="-5", action="\tx", reason="'+1-1", seq=7)
    cells = dict(zip(CSV_COLUMNS, audit_row(event), strict=True))
    named = {name: cells[name] for name in ("actor", "target", "action", "reason", "seq")}
    assert named == {"actor": "'" + evil, "target": "-5", "action": "'\tx", "reason": "''+1-1", "seq": "7"}


def test_a_file_that_holds_no_set_up_token_is_told(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="token holds no set-up token"):
        _read(tmp_path / "token")


async def test_a_bad_first_line_has_not_all_of_a_file_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(documents_module, "MAX_DOCUMENT_BYTES", 1_000)
    lines = [b"\n", b"{broken\n", *[b'{"values": [1]}\n'] * 1_000]
    (tmp_path / "x").write_bytes(b"".join(lines))
    with (tmp_path / "x").open("rb") as file, pytest.raises(BadBody, match="2: not JSON, nor the beginning"):
        async for _ in Documents(file.fileno(), "x").batches():
            pass


@pytest.mark.parametrize(
    ("store", "free", "latency"),
    [
        ({"name": "engine", "role": "primary", "server_version": "engine 1", "latency_p50_ms": 0.5}, "0 B", "0.5"),
        ({"name": "postgresql", "role": "embedded", "server_version": "PostgreSQL 18.4"}, "0 B", "-"),
        ({"name": "engine", "role": "primary"}, "-", "-"),
        ({"name": "postgresql", "role": "primary", "server_version": "PostgreSQL 18.4"}, "-", "-"),
        ({"name": "redis", "role": "follower", "disk_free_bytes": 1 << 30}, "1.0 GiB", "-"),
    ],
)
def test_a_full_disk_is_shown_as_one_and_not_as_one_that_cannot_be_seen(
    store: dict[str, Any], free: str, latency: str
) -> None:
    row = status_row(StoreStatus(**store))
    assert (row[7], row[8]) == (free, latency)
