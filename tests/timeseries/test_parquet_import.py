"""Import from Parquet: files of any tool, in any order; what is wrong is named, what was killed is repeated."""

import asyncio
import dataclasses
import itertools
import random
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleet.codec import metric_set_to_pb, rows_to_pb
from fleet.model import Metric, ServerDescriptor
from openmanager.timeseries.v1 import timeseries_pb2
from runtime.clock import ManualClock, SystemClock
from runtime.errors import Unavailable
from runtime.sqlite import fetch
from services.timeseries.engine import Engine
from services.timeseries.engine.database import connect_read_only
from tests.harness import free_port
from tests.timeseries.engine.model import NAN, rows
from tests.timeseries.parquet_files import (
    DESCRIPTOR,
    WILD,
    bits,
    command,
    contents,
    importing,
    millis,
    pa,
    parts,
    pq,
    reading,
    run_to_signal,
    running,
    wild_store,
    write,
)
from tests.timeseries.stores import DAY_MS, NOON, OTHER_SET, QUIET, SET, fill, ignore


def count(store: Path, table: str) -> int:
    with closing(connect_read_only(store / "journal.db")) as journal:
        ((number,),) = fetch(journal, f"SELECT count(*) FROM {table}")
    return int(number)


def foreign(
    path: Path, *, servers: int = 3, metrics: int = 200, ticks: int = 40
) -> dict[tuple[str, str], dict[int, float]]:
    """As another tool may write it: no labels, units or kinds, plain text, microseconds without a zone, whole numbers
    of 32 bits, in order of time."""
    lines = [
        (f"server-{server}", f"metric_{metric}", (NOON + tick * 1_000) * 1_000, tick * 1_000 + metric)
        for tick in range(ticks)
        for server in range(servers)
        for metric in range(metrics)
    ]
    columns = list(zip(*lines, strict=True))
    write(
        path,
        note=pa.nulls(len(lines)),
        server_id=pa.array(columns[0], pa.large_string()),
        metric=columns[1],
        time=pa.array(columns[2], pa.timestamp("us")),
        value=pa.array(columns[3], pa.int32()),
    )
    wanted: dict[tuple[str, str], dict[int, float]] = {}
    for server_id, metric_name, at, value in lines:
        wanted.setdefault((server_id, metric_name), {})[at // 1_000] = float(value)
    return wanted


async def test_a_foreign_file_in_order_of_time_becomes_one_set(tmp_path: Path) -> None:
    wanted = foreign(tmp_path / "some.parquet")
    assert await command("import", tmp_path / "some.parquet", data=tmp_path) == 0
    found, metrics, _ = await contents(tmp_path / "timeseries")
    assert {name: dict(series) for name, series in found.items()} == wanted
    assert metrics["metric_7"] == Metric(name="metric_7")
    assert (count(tmp_path / "timeseries", "metric_sets"), count(tmp_path / "timeseries", "cohorts")) == (1, 3)
    assert await command("import", tmp_path / "some.parquet", data=tmp_path) == 0
    assert (await contents(tmp_path / "timeseries"))[0] == found


async def test_every_type_a_column_may_have(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    (folder / "date=2023-12-09").mkdir(parents=True)
    (folder / "_delta_log").mkdir()
    (folder / "_delta_log" / "x.parquet").write_bytes(b"not data")
    numbers = {
        "half": pa.array(np.array([1.5, 2.5], np.float16)),
        "single": pa.array([1.5, 2.5], pa.float32()),
        "decimal": pa.array(["1.50", "2.50"]).cast(pa.decimal128(9, 2)),
        "unsigned": pa.array([1, 2], pa.uint64()),
        "double": pa.array([1.5, None], pa.float64()),
    }
    units = {"s": 1_000, "ms": 1, "us": 0.001, "ns": 0.000001}
    for number, (name, values) in enumerate(numbers.items()):
        unit, per = list(units.items())[number % 4]
        times = pa.array([int((NOON + 7_000 * at) / per) for at in range(2)], pa.int64())
        write(
            folder / "date=2023-12-09" / f"{name}.parquet",
            server_id=pa.array(["s", "s"]).dictionary_encode(),
            metric=pa.array([name, name], pa.string_view()),
            time=times.cast(pa.timestamp(unit, "Europe/Berlin" if number % 2 else None)),
            value=values,
        )
    assert await command("import", folder, data=tmp_path) == 0
    found, _, _ = await contents(tmp_path / "timeseries")
    whole = [(NOON, 1.5), (NOON + 7_000, 2.5)]
    assert {key: series for (_, key), series in found.items()} == {
        "half": whole,
        "single": whole,
        "decimal": whole,
        "unsigned": [(NOON, 1.0), (NOON + 7_000, 2.0)],
        "double": whole[:1],
    }


async def test_a_column_that_does_not_fit_refuses_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"server_id": ["s"], "metric": ["m"], "time": millis(NOON), "value": [1.0]}
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "a.parquet", **good)
    bad = tmp_path / "files" / "b.parquet"
    for change, words in (
        ({"value": None}, "b.parquet: column value is missing. It has the columns server_id, metric, time"),
        ({"value": ["1"]}, "column value is string, it must be a number"),
        ({"time": [NOON]}, "column time is int64, it must be a timestamp"),
        ({"metric": [7], "time": None}, "column metric is int64, it must be text; column time is missing"),
        ({"labels": [{"a": "b"}]}, "it must be text (labels: a JSON object as text)"),
    ):
        write(bad, **{name: column for name, column in {**good, **change}.items() if column is not None})
        assert await command("import", tmp_path / "files", data=tmp_path) == 1
        assert words in capsys.readouterr().err
    bad.write_bytes(b"PAR1, or not")
    assert await command("import", tmp_path / "files", data=tmp_path) == 1
    assert f"{bad}: it cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "timeseries").exists()
    assert await command("import", tmp_path / "nothing", data=tmp_path) == 1
    assert f"there is no {tmp_path / 'nothing'}: name an export" in capsys.readouterr().err


async def test_bad_rows_are_named_and_the_others_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"server_id": "s", "metric": "m", "labels": "{}", "unit": "", "kind": "gauge", "time": NOON, "value": 1.0}
    ahead = SystemClock().now_ms() + 2 * 3_600_000
    changes: list[tuple[dict[str, Any], str]] = [
        ({"server_id": None}, "column server_id: the server id is empty"),
        ({"server_id": "a/b"}, "column server_id: the server id has a '/'"),
        ({"metric": ""}, "column metric: the text is empty"),
        ({"metric": "x" * 300}, "column metric: the text is longer than 255 bytes"),
        ({"labels": "mount=/"}, "column labels: it is no JSON object of texts"),
        ({"labels": '{"a": 1}'}, "column labels: it is no JSON object of texts"),
        ({"labels": '{"a": "\\ud800"}'}, "column labels: "),
        ({"unit": "\n"}, "column unit: the text has a character that cannot be shown, U+000A, at its beginning"),
        ({"kind": "level"}, "column kind: it is none of counter, gauge, unspecified"),
        ({"time": None}, "column time: it is missing"),
        ({"time": -1}, "column time: it lies outside 1970-01-01 to 2262-04-11"),
        ({"time": ahead}, "column time: it lies more than 1 h ahead of our clock"),
        ({"value": None}, ""),
        ({"value": NAN}, ""),
    ]
    lines = [good]
    for change, _ in changes:
        lines += [{**good, **change}, {**good, "time": NOON + len(lines)}]
    lines += [{**good, "value": 2.0}, {**good, "server_id": None}]
    columns: dict[str, Any] = {name: [line[name] for line in lines] for name in good}
    path = write(tmp_path / "x.parquet", **{**columns, "time": millis(*columns["time"])})
    assert await command("import", path, data=tmp_path) == 1
    out, err = capsys.readouterr()
    reported = out.splitlines()
    for number, (_, words) in enumerate(changes):
        if words:
            (line,) = (one for one in reported if words in one and f"{path} row {2 * number + 2}" in one)
            assert "rows not taken" in line
    assert f"2 rows not taken, column server_id: the server id is empty: {path} row 2, {path} row {len(lines)}" in out
    taken = len(changes) + 1
    assert f"{taken} points of {len(lines)} rows, 2 without a value, 1 repeated, into" in out
    assert "13 rows were not taken" in err
    found, _, _ = await contents(tmp_path / "timeseries")
    series = found["s", "m"]
    assert len(series) == taken and series[0] == (NOON, 2.0)


async def test_rows_older_than_retention_are_too_late(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for tier in ("RAW", "5M", "1H"):
        monkeypatch.setenv(f"TIMESERIES_RETENTION_{tier}", "2d")
    now = SystemClock().now_ms()
    times = [now - 10 * DAY_MS + n for n in range(150)] + [now - 1_000]
    two = [f"m{n}" for n in range(2) for _ in times]
    path = write(
        tmp_path / "x.parquet",
        server_id=["s"] * len(two),
        metric=two,
        time=millis(*times, *times),
        value=[1.0] * len(two),
    )
    assert await command("import", path, data=tmp_path) == 1
    out, _ = capsys.readouterr()
    assert "2 points of 302 rows, into" in out
    assert f"300 rows not taken, column time: the service says TOO_LATE: {path} row" in out
    assert len((await contents(tmp_path / "timeseries"))[0]["s", "m0"]) == 1


async def test_rotten_bytes_are_named_and_the_rest_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await fill(tmp_path / "timeseries")
    await command("export", tmp_path / "out", data=tmp_path)
    first = parts(tmp_path / "out")[0]
    column = pq.ParquetFile(first).metadata.row_group(0).column(6)
    data = bytearray(first.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 0x10
    first.write_bytes(data)
    assert await command("import", tmp_path / "out", data=tmp_path / "new") == 1
    out, err = capsys.readouterr()
    assert f"{first}: it cannot be read" in out and "CRC" in out and "everything else is stored" in err
    found, _, _ = await contents(tmp_path / "new" / "timeseries")
    assert {at // DAY_MS for series in found.values() for at, _ in series} == {NOON // DAY_MS + 1}


def small(monkeypatch: pytest.MonkeyPatch, rows_at_once: int = 50) -> None:
    """Bounds so small that few points fill many buffers."""
    monkeypatch.setattr(reading, "BATCH_ROWS", rows_at_once)
    monkeypatch.setattr(importing, "BUFFER_ROWS", 3 * rows_at_once)
    monkeypatch.setattr(importing, "REQUEST_VALUES", 40)


async def test_a_server_is_not_cut_between_two_buffers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)  # 150 points
    lines = [
        (server, metric, NOON + tick * 1_000)
        for server in "abcdefg"
        for metric in ("m", "n", "o")
        for tick in range(20)
    ]
    columns = [list(column) for column in zip(*lines, strict=True)]
    path = tmp_path / "x.parquet"
    write(path, server_id=columns[0], metric=columns[1], time=millis(*columns[2]), value=[1.0] * len(lines))
    assert await command("import", path, data=tmp_path) == 0
    assert (count(tmp_path / "timeseries", "metric_sets"), count(tmp_path / "timeseries", "cohorts")) == (1, 7)


@pytest.mark.parametrize("seed", range(3))
async def test_rows_in_any_order_and_buffers_of_any_size(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shuffled, repeated, with series that share times and others that do not: the last row of each point is there."""
    small(monkeypatch)
    rng = random.Random(seed)
    lines = []
    for server, metric in itertools.product("ab", range(12)):
        shift = 0 if metric < 8 else rng.randrange(1, 900)
        for tick in rng.choices(range(60), k=70):
            lines.append((server, f"m{metric}", NOON + tick * 1_000 + shift, rng.choice(WILD[:-1])))  # noqa: PERF401
    if seed:
        rng.shuffle(lines) if seed == 1 else lines.sort(key=lambda line: line[2])
    columns = [list(column) for column in zip(*lines, strict=True)]
    path = write(
        tmp_path / "x.parquet", server_id=columns[0], metric=columns[1], time=millis(*columns[2]), value=columns[3]
    )
    assert await command("import", path, data=tmp_path) == 0
    wanted: dict[tuple[str, str], dict[int, float]] = {}
    for server_id, name, at, value in lines:
        wanted.setdefault((server_id, name), {})[at] = value
    found, _, _ = await contents(tmp_path / "timeseries")
    assert bits(found) == bits({name: sorted(series.items()) for name, series in wanted.items()})


async def test_a_target_that_is_named_is_the_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign(tmp_path / "some.parquet", metrics=2, ticks=2)
    monkeypatch.setenv("TIMESERIES_TARGET", f"127.0.0.1:{free_port()}")
    assert await command("import", tmp_path / "some.parquet", data=tmp_path) == 1
    err = capsys.readouterr().err
    assert "timeseries is not reachable. 0 points were taken and stay; import again to go on" in err
    assert not (tmp_path / "timeseries").exists()


class Impatient:
    """A clock on which waiting takes no time."""

    def __init__(self) -> None:
        self.slept = 0.0

    def now_ms(self) -> int:
        return NOON

    def monotonic(self) -> float:
        return self.slept

    async def sleep(self, seconds: float) -> None:
        self.slept += seconds


class Flaky:
    """A target that is away for some calls after the first."""

    def __init__(self, away: int) -> None:
        self.away, self.calls, self.rows = away, 0, 0

    async def ListMetrics(self, _request: Any) -> Any:
        return timeseries_pb2.ListMetricsResponse()

    async def Append(self, request: timeseries_pb2.AppendRequest) -> timeseries_pb2.AppendResponse:
        self.calls += 1
        if 1 < self.calls <= 1 + self.away:
            raise Unavailable("away")
        self.rows += len(request.batch.rows)
        return timeseries_pb2.AppendResponse(accepted_points=len(request.batch.values))


async def test_a_service_that_is_restarted_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    foreign(tmp_path / "some.parquet", metrics=5, ticks=20)
    for away, calls in ((3, None), (10**6, 62)):
        target, clock = Flaky(away), Impatient()
        importer = importing.Importer(tmp_path / "some.parquet", clock, ignore)  # type: ignore[arg-type]
        if calls is None:
            await importer.run(target)
            assert target.rows == 60 and importer.book.taken == 300
        else:
            with pytest.raises(Unavailable):
                await importer.run(target)
            assert target.calls == calls
    refusing = Flaky(10**6)
    refusing.calls = 1
    with pytest.raises(Unavailable):
        await importing.Importer(tmp_path / "some.parquet", Impatient(), ignore).run(refusing)  # type: ignore[arg-type]
    assert refusing.calls == 2


async def test_an_interrupted_import_says_how_far_it_came(tmp_path: Path) -> None:
    wanted = foreign(tmp_path / "some.parquet", servers=1)
    for attempt in range(5):  # the import may end before the signal is looked at: then once more
        data = tmp_path / str(attempt)
        broken = await asyncio.to_thread(
            run_to_signal, signal.SIGINT, "importing.Importer._send", 2, "import", tmp_path / "some.parquet", data=data
        )
        if broken.returncode:
            break
    assert broken.returncode == 1 and "Traceback" not in broken.stderr, broken
    assert "timeseries: interrupted. 5,000 points were taken and stay; import again to go on" in broken.stderr
    assert await command("import", tmp_path / "some.parquet", data=data) == 0
    assert {name: dict(series) for name, series in (await contents(data / "timeseries"))[0].items()} == wanted


async def test_what_the_service_knows_of_a_server_is_newer(tmp_path: Path) -> None:
    await wild_store(tmp_path / "old" / "timeseries")
    assert await command("export", tmp_path / "out", data=tmp_path / "old") == 0
    newer = dataclasses.replace(DESCRIPTOR, role="database")
    async with Engine.open(tmp_path / "new" / "timeseries", clock=ManualClock(NOON), settings=QUIET) as engine:
        await engine.append(rows(SET, [("a", NOON, [1.0, 2.0, 3.0])]), metric_sets=(SET,), servers=(newer,))
    assert await command("import", tmp_path / "out", data=tmp_path / "new") == 0
    servers = (await contents(tmp_path / "new" / "timeseries"))[2]
    assert servers["a"] == newer and servers["told"] == ServerDescriptor(server_id="told", hostname="only")


async def test_beside_a_running_service_killed_and_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, wanted = tmp_path / "data", foreign(tmp_path / "some.parquet")
    total = sum(map(len, wanted.values()))
    async with running(data) as (stub, address):
        monkeypatch.setenv("TIMESERIES_ADDRESS", address)
        live = rows(OTHER_SET, [("s", NOON, [4.5])])
        request = timeseries_pb2.AppendRequest(metric_sets=[metric_set_to_pb(OTHER_SET)], batch=rows_to_pb(live))
        await stub.Append(request)
        killed = await asyncio.to_thread(
            run_to_signal, signal.SIGKILL, "importing.Importer._send", 3, "import", tmp_path / "some.parquet", data=data
        )
        assert killed.returncode == -signal.SIGKILL, killed
        assert await command("export", tmp_path / "half", data=data) == 0
        assert 1 < pq.read_table(tmp_path / "half" / "points").num_rows < 1 + total
        for _ in range(2):
            assert await command("import", tmp_path / "some.parquet", data=data) == 0
            out = capsys.readouterr().out
            assert f"{total:,} points of {total:,} rows, into the service at {address}," in out
        assert await command("export", tmp_path / "whole", data=data) == 0
        assert pq.read_table(tmp_path / "whole" / "points").num_rows == 1 + total
    found, _, _ = await contents(data / "timeseries")
    wanted["s", "load_1m"] = {NOON: 4.5}
    assert {name: dict(series) for name, series in found.items()} == wanted
