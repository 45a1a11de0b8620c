"""Every command against a whole product: in a pipe, on a terminal, with nonsense."""

import csv
import io
import json
import re
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from services.timeseries.parquet.schema import POINTS
from tests.client.calling import COMMAND, OnTerminal, called, environment
from tests.harness import free_port
from tests.harness.launched import Launched, within
from tests.harness.shared_product import METRICS, SERVERS


@pytest.fixture(scope="module")
def address(product: Launched) -> Iterator[str]:
    """The gateway of the shared product, which gets rid of our servers afterwards."""
    yield product.addresses["gateway"]
    for server in product.get("/v1/servers").json["servers"]:
        if server["id"].startswith("client-"):
            product.post(f"/v1/servers/{server['id']}", None, method="DELETE")


def lines_of(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def written(name: str = "client_m", *, server: str, values: list[Any], metrics: bool = True) -> dict[str, Any]:
    now = time.time()
    body: dict[str, Any] = {
        "rows": [{"serverId": server, "time": now - len(values) + index} for index in range(len(values))],
        "values": values,
    }
    return body | ({"metrics": [{"name": name, "unit": "1", "kind": "gauge"}]} if metrics else {})


def test_servers_are_listed(address: str) -> None:
    done = called(address, "servers")
    assert (done.returncode, done.stderr) == (0, "")
    titles, *rows = lines_of(done.stdout)
    assert titles[:2] == ["ID", "STATUS"]
    simulated = [row for row in rows if row[0].startswith(("web-", "db-", "api-", "cache-"))]
    assert {row[1] for row in simulated} <= {"healthy", "warning", "critical"}
    assert "\x1b" not in done.stdout
    document = json.loads(called(address, "servers", "--output", "json").stdout)
    assert document["totalSize"] == len(document["servers"]) >= SERVERS
    assert {"id", "status", "observedTime", "metrics"} <= set(document["servers"][0])


def test_servers_are_filtered(address: str) -> None:
    webs = json.loads(called(address, "servers", "--role", "web", "--output", "json").stdout)["servers"]
    assert webs and {server["role"] for server in webs} == {"web"}
    environment_ = webs[0]["environment"]
    some = lines_of(called(address, "servers", "--environment", environment_, "--role", "web").stdout)[1:]
    assert len(some) == sum(server["environment"] == environment_ for server in webs)
    healthy = lines_of(called(address, "servers", "--status", "healthy").stdout)[1:]
    assert healthy and {row[1] for row in healthy} == {"healthy"}


def test_a_terminal_has_colours_and_no_color_has_none(address: str) -> None:
    with OnTerminal(address, "servers") as terminal:
        assert terminal.ended() == 0
        assert "\x1b[32mhealthy\x1b[0m" in terminal.shown
    with OnTerminal(address, "servers", environ={"NO_COLOR": "1"}) as terminal:
        assert terminal.ended() == 0
        assert "healthy" in terminal.shown and "\x1b" not in terminal.shown


def test_one_server_has_all_its_metrics(address: str) -> None:
    done = called(address, "server", "web-01")
    assert done.returncode == 0
    assert re.search(r"^  hostname +web-01\.", done.stdout, re.MULTILINE)
    assert len(done.stdout.split("METRIC")[1].splitlines()) == METRICS + 1
    whole = json.loads(called(address, "server", "web-01", "--output", "json").stdout)
    assert len(whole["metrics"]) == METRICS
    missing = called(address, "server", "nobody")
    assert (missing.returncode, missing.stdout) == (4, "")
    assert "there is no server 'nobody'" in missing.stderr and "openmanager servers" in missing.stderr


def test_history_as_a_table(address: str) -> None:
    def ticks() -> bool:
        return called(address, "history", "web-01", "cpu_usage", "--step", "1s").stdout.count("\n") > 5

    within(30, ticks)
    done = called(address, "history", "web-01", "cpu_usage", "load_1m", "--from", "-2m", "--step", "1s")
    assert done.returncode == 0
    titles, *rows = done.stdout.splitlines()
    assert titles.split("  ")[0] == "TIME (UTC)" and "cpu_usage (%)" in titles and "load_1m (1)" in titles
    times = [datetime.fromisoformat(row[:19]) for row in rows]
    assert times == sorted(set(times)) and len(times) >= 5
    with OnTerminal(address, "history", "web-01", "cpu_usage", "--step", "1s") as terminal:
        assert terminal.ended() == 0
        assert re.search(r"cpu_usage \(%\).*min [\d.]+  mean [\d.]+  max [\d.]+  last [\d.]+", terminal.shown)
        assert re.search("[▁▂▃▄▅▆▇█]", terminal.shown.splitlines()[-1])
    with OnTerminal(address, "history", "web-01", "cpu_usage", environ={"PYTHONUTF8": "0", "LC_ALL": "C"}) as terminal:
        assert terminal.ended() == 0, terminal.shown


def test_history_for_programs(address: str, tmp_path: Path) -> None:
    now = int(time.time())
    end = f"{now - 2}"  # what has been acknowledged by now does not change any more
    words = ("history", "web-01", "cpu_usage", "memory_usage", "--from", f"{now - 60}", "--to", end, "--step", "0")
    document = json.loads(called(address, *words, "--output", "json").stdout)
    assert document["incomplete"] == []
    points = {
        (one["metric"], time): value
        for one in document["series"]
        for time, value in zip(one["times"], one["values"], strict=True)
    }
    assert {metric for metric, _ in points} == {"cpu_usage", "memory_usage"}

    table = list(csv.DictReader(io.StringIO(called(address, *words, "--output", "csv").stdout)))
    assert list(table[0]) == ["time", "server_id", "metric", "value", "unit"]
    assert {
        (row["metric"], datetime.fromisoformat(row["time"]).timestamp()): float(row["value"]) for row in table
    } == points

    path = tmp_path / "x.parquet"
    with path.open("wb") as file:
        subprocess.run([*COMMAND, *words, "--output", "parquet"], env=environment(address), stdout=file, check=True)
    read = pyarrow.parquet.read_table(path)
    assert read.schema.equals(POINTS), "an export's columns, so that `import` takes it"
    rows = read.to_pylist()
    assert {(row["metric"], row["time"].timestamp()): row["value"] for row in rows} == points
    assert {(row["server_id"], row["labels"], row["unit"], row["kind"]) for row in rows} == {
        ("web-01", "{}", "%", "gauge")
    }


def test_parquet_is_not_for_a_terminal_and_needs_pyarrow(address: str, tmp_path: Path) -> None:
    with OnTerminal(address, "history", "web-01", "cpu_usage", "--output", "parquet") as terminal:
        assert terminal.ended() == 2
        assert "> FILE.parquet" in terminal.shown
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['pyarrow'] = None\n")
    path = f"{tmp_path}:{environment(None)['PYTHONPATH']}"
    done = called(address, "history", "web-01", "cpu_usage", "--output", "parquet", environ={"PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (3, "")
    assert "make parquet" in done.stderr


def test_history_that_is_not_there(address: str) -> None:
    done = called(address, "history", "web-01", "cpu_usage", "--from", "2001-01-01", "--to", "2001-01-02")
    assert (done.returncode, done.stdout) == (4, "")
    assert "web-01 has no points of cpu_usage in this range" in done.stderr
    done = called(address, "history", "nobody", "cpu_usage")
    assert done.returncode == 4 and "there is no server 'nobody'" in done.stderr
    done = called(address, "history", "web-01", "no_such_metric", "--output", "json")
    assert (done.returncode, done.stdout) == (2, "") and "no_such_metric" in done.stderr


def test_labelled_metrics_and_control_characters(address: str, tmp_path: Path) -> None:
    body = written(server="client-labels", values=[1.5])
    body["metrics"] = [{"name": "disk", "labels": {"mount": '/a,"b'}, "kind": "METRIC_KIND_COUNTER"}]
    assert called(address, "ingest", "-", stdin=json.dumps(body)).returncode == 0
    words = ("history", "client-labels", "disk", "--from", "-5m", "--step", "0", "--output")
    (row,) = csv.DictReader(io.StringIO(called(address, *words, "csv").stdout))
    assert row["metric"] == r'disk{mount="/a,\"b"}' and row["value"] == "1.5"
    path = tmp_path / "x.parquet"
    with path.open("wb") as file:
        subprocess.run([*COMMAND, *words, "parquet"], env=environment(address), stdout=file, check=True)
    (point,) = pyarrow.parquet.read_table(path).to_pylist()
    assert (point["metric"], json.loads(point["labels"]), point["kind"]) == ("disk", {"mount": '/a,"b'}, "counter")


def test_a_large_history_is_streamed(address: str) -> None:
    count, server = 120_000, "client-large"  # more than a unary answer may have
    start = int(time.time()) - count
    batches = [
        json.dumps(
            ({"metrics": [{"name": "big"}]} if first == 0 else {})
            | {
                "rows": [{"serverId": server, "time": start + index} for index in range(first, first + 20_000)],
                "values": list(range(first, first + 20_000)),
            }
        )
        for first in range(0, count, 20_000)
    ]
    done = called(address, "ingest", "-", stdin="\n".join(batches))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"accepted {count:,} points, rejected 0\n"
    words = ("history", server, "big", "--from", str(start), "--to", str(start + count), "--step", "0", "--output")
    rows = called(address, *words, "csv").stdout.splitlines()
    assert len(rows) == count + 1
    assert [float(row.split(",")[3]) for row in rows[1:]] == [float(index) for index in range(count)]
    document = json.loads(called(address, *words, "json").stdout)
    assert [len(series["times"]) for series in document["series"]] == [count], "its parts are one series again"
    reader = subprocess.Popen([*COMMAND, *words, "csv"], env=environment(address), stdout=subprocess.PIPE, stderr=-1)
    assert reader.stdout is not None and reader.stderr is not None
    assert reader.stdout.readline() == b"time,server_id,metric,value,unit\n"
    reader.stdout.close()
    assert (reader.wait(30), reader.stderr.read()) == (141, b""), "a reader that leaves is no reason to complain"
    reader.stderr.close()


def test_ingest_takes_a_document_and_lines(address: str, product: Launched, tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps(written(server="client-1", values=[1.0, None, "NaN", 4]), indent=2))
    done = called(address, "ingest", str(path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "accepted 2 points, rejected 0\n", "")
    lines = [written(server="client-2", values=[1.0])] + [
        written(server=f"client-{n}", values=[n], metrics=False) for n in (3, 4)
    ]
    done = called(address, "ingest", "-", stdin="\n\n".join(map(json.dumps, lines)))
    assert (done.returncode, done.stdout) == (0, "accepted 3 points, rejected 0\n")
    read = product.get("/v1/servers/client-4/history?metric=client_m&start_time=-1m").json
    assert read["series"][0]["values"] == [4.0]
    with OnTerminal(address, "ingest", str(path)) as terminal:
        assert terminal.ended() == 0
        assert re.search(r"\[#{30}\] 100% .*one\.json  2 points", terminal.shown)
        assert terminal.shown.endswith("\r\x1b[Kaccepted 2 points, rejected 0\r\n\r\x1b[K")
    empty = called(address, "ingest", "-", stdin="")
    assert (empty.returncode, empty.stdout) == (0, "accepted 0 points, rejected 0\n")


def test_ingest_says_which_row_was_rejected(address: str) -> None:
    good, bad = written(server="client-5", values=[1.0]), written(server="client-5", values=[1.0, 2.0])
    bad["rows"][1]["time"] = "+9h"
    done = called(address, "ingest", "-", stdin=f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    assert (done.returncode, done.stdout) == (1, "accepted 2 points, rejected 1\n")
    assert "standard input:2: rows[1].time: " in done.stderr and "(TIME_IN_FUTURE)" in done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", ":1: not JSON"),
        ("[]", ":1: not a JSON object"),
        ('{"rowz": []}', ":1: rowz: no such field"),
        ('{"rows": {}}', ":1: rows: not a JSON array"),
        ('{"rows": [{"serverId": "a"}]}', ":1: rows[0].time: missing"),
        ('{"rows": [{"serverId": "a", "time": "soon"}]}', ":1: rows[0].time: 'soon' is no time"),
        ('{"rows": [{"serverId": 1, "time": "now"}]}', ":1: rows[0].server_id: not a string"),
        ('{"rows": [{"id": "a", "time": "now"}]}', ":1: rows[0].id: no such field"),
        ('{"values": ["x"]}', ":1: values[0]: 'x' is not a number"),
        ('{"values": [true]}', ":1: values[0]: 'True' is not a number"),
        ('{"metrics": [{"nam": "a"}]}', ":1: metrics[0]: "),
        ('{"metrics": [{"name": "a", "kind": "wide"}]}', ":1: metrics[0]: "),
        ('{"metrics": [7]}', ":1: metrics[0]: "),
        ('{"servers": [{"serverId": "a", "reportInterval": "soon"}]}', ":1: servers[0].report_interval: 'soon' is no"),
        ('{"metricSetId": 7}', ":1: metric_set_id: not a string"),
        ('{"rows": [], "rows": 1}', ":1: rows: not a JSON array"),
        ('{"metricSetId": "a", "metric_set_id": "a"}', ":1: metric_set_id: given twice"),
        ('{"rows": [{"serverId": "a", "time": "now"}], "values": [1]}', ":1: metrics: name the columns"),
        (
            '{"metrics": [{"name": "a"}], "rows": [{"serverId": "a", "time": "now"}], "values": [1, 2]}',
            ":1: values: 1 ",
        ),
        ('{"metrics": [{"name": "a"}, {"name": "a"}], "rows": [], "values": []}', ":1: metrics[1]: the metric a is "),
    ],
)
def test_ingest_names_the_line_and_field_at_fault(address: str, text: str, told: str) -> None:
    done = called(address, "ingest", "-", stdin=text)
    assert (done.returncode, done.stdout) == (1, "accepted 0 points, rejected 0\n")
    assert told in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_what_comes_before_a_fault_is_written(address: str) -> None:
    lines = [json.dumps(written(server="client-6", values=[1.0])), '{"values": "no"}']
    done = called(address, "ingest", "-", stdin="\n".join(lines))
    assert (done.returncode, done.stdout) == (1, "accepted 1 points, rejected 0\n")
    assert "standard input:2: values: not a JSON array" in done.stderr
    lines[1] = json.dumps(written(server="client-6", values=[1.0, 2.0]) | {"values": [1.0]})
    done = called(address, "ingest", "-", stdin="\n".join(lines))
    assert (done.returncode, done.stdout) == (1, "accepted 1 points, rejected 0\n")
    assert "standard input:2: values: 2 rows x 1 metrics need 2 values, not 1" in done.stderr


def test_status_of_the_stores(address: str) -> None:
    done = called(address, "status")
    assert done.returncode == 0
    titles, *rows = lines_of(done.stdout)
    assert titles[0] == "STORE"
    assert {(row[0], row[3]) for row in rows if len(row) > 5 and row[3] in {"up", "down"}} == {
        ("postgresql", "up"),
        ("engine", "up"),
    }
    stores = json.loads(called(address, "status", "--output", "json").stdout)["stores"]
    assert {store["name"] for store in stores} == {"engine", "postgresql"}


def test_the_audit_log_is_proved_and_exported(address: str) -> None:
    done = called(address, "audit", "verify")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.startswith("nothing was altered: ")
    proof = json.loads(called(address, "audit", "verify", "--output", "json").stdout)
    assert proof["valid"] is True and proof["findings"] == []
    done = called(address, "audit", "export", "--format", "csv", "--to", "now")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("time,writer_id,seq,id,actor,")
    with OnTerminal(address, "audit", "verify") as terminal:
        terminal.until(lambda shown: "nothing was altered" in shown)


def test_a_live_table(address: str) -> None:
    with OnTerminal(address, "watch", lines=12, columns=60) as terminal:
        terminal.until(lambda shown: shown.count("\x1b[H") >= 3)
        frame = terminal.shown.split("\x1b[H")[-2]
        text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", frame).split("\r\n")
        assert len(text) <= 12 and max(map(len, text)) <= 60, "it fits the terminal"
        assert re.fullmatch(rf"{address}  [\d-]+ [\d:]+ UTC  \d+ servers: .*", text[0])
        assert text[1].startswith("ID") and re.fullmatch(r"and \d+ more", text[-1])
        terminal.resize(columns=100, lines=80)
        terminal.until(lambda shown: "web-01" in shown.rsplit("\x1b[H", 1)[-1])
        terminal.interrupt()
        assert terminal.ended() == 130
        assert terminal.shown.endswith("\x1b[?25h\x1b[?1049l"), "the terminal is as it was"
        assert "Traceback" not in terminal.shown


def test_usage(product: Launched) -> None:
    address = product.addresses["gateway"]
    for words, told in (
        ((), "COMMAND"),
        (("burn",), "invalid choice"),
        (("server",), "ID"),
        (("history", "web-01"), "METRIC"),
        (("servers", "--status", "fine"), "invalid choice: 'fine'"),
        (("history", "web-01", "m", "--from", "soon"), "'soon' is no time"),
        (("history", "web-01", "m", "--from", "now", "--to", "-1h"), "--from is not before --to"),
        (("history", "web-01", "m", "--step", "0.5s"), "--step is at least 1s"),
        (("history", "web-01", "m", "--step", "wide"), "'wide' is no duration"),
        (("history", "web-01", "m", "--aggregation", "MEAN"), "invalid choice: 'MEAN'"),
        (("history", "web-01", "cpu_usage", "--aggregation", "rate"), "RATE"),
        (("--timeout", "0", "servers"), "needs some time"),
        (("--profile", "prod", "servers"), "set OPENMANAGER_PROD_ADDRESS"),
        (("--profile", "../x", "servers"), "is no name of a profile"),
        (("--token", "a b", "servers"), "the token"),
        (("--address", "nowhere", "servers"), "'nowhere' is no address"),
        (("--address", "ftp://x:1", "servers"), "use HOST:PORT"),
        (("--ca-file", "/nowhere.pem", "servers"), "/nowhere.pem: No such file"),
        (("--ca-file", __file__, "servers"), "has no certificate"),
    ):
        done = called(address, *words)
        assert (done.returncode, done.stdout) == (2, ""), words
        assert told in done.stderr and "Traceback" not in done.stderr, (words, done.stderr)
    for name, status in (("/nowhere", "No such file"), ("/", "Is a directory")):
        done = called(address, "ingest", name)
        assert done.returncode == 1 and status in done.stderr


def test_help_says_it_all() -> None:
    shown = called(None, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    for word in ("examples:", "OPENMANAGER_TOKEN", "OPENMANAGER_PROFILE", "NO_COLOR", "exit status:", "reachable"):
        assert word in shown.stdout
    for command in ("servers", "server", "watch", "history", "ingest", "status", "audit", "completion"):
        assert command in shown.stdout
        assert "examples:" in called(None, command, "--help").stdout


def test_options_stand_before_or_after_the_command_and_win_over_the_environment(address: str) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    for words in (("--address", address, "status"), ("status", "--address", address)):
        assert called(nobody, *words).returncode == 0
    prod = {"OPENMANAGER_PROD_ADDRESS": address, "OPENMANAGER_TOKEN": "of-another-gateway"}
    assert called(nobody, "status", environ=prod | {"OPENMANAGER_PROFILE": "prod"}).returncode == 0
    assert called(nobody, "status", "--profile", "prod", environ=prod).returncode == 0
    assert called(nobody, "status", environ=prod).returncode == 6


def test_output_that_cannot_be_written(address: str) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [*COMMAND, "servers"], env=environment(address), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "openmanager: [Errno 28] No space left on device\n")


def test_nobody_is_there() -> None:
    address = f"127.0.0.1:{free_port()}"
    for words in (("servers",), ("watch",), ("status",), ("history", "a", "b"), ("audit", "verify")):
        done = called(address, *words)
        assert (done.returncode, done.stdout) == (6, ""), words
        assert f"{address} is not reachable: Connection refused" in done.stderr and "make run" in done.stderr
    done = called(address, "ingest", "-", "--retry-for", "1s", stdin='{"rows": []}')
    assert done.returncode == 6
    assert "sending again in" in done.stderr
