"""Export to Parquet: every bit, of one moment, whole or not at all, in spite of writers, kills and damage."""

import asyncio
import dataclasses
import datetime
import errno
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pytest

from runtime.clock import ManualClock, SystemClock
from services.timeseries import commands
from services.timeseries.archive.excerpt import Excerpt, copy_range
from services.timeseries.engine import Engine, EngineSettings
from services.timeseries.engine.store import Store
from tests.harness import eventually
from tests.harness.launched import within
from tests.timeseries.engine.model import metric_set, rows
from tests.timeseries.parquet_files import (
    DESCRIPTOR,
    KEPT,
    bits,
    command,
    contents,
    exporting,
    layout,
    pa,
    parts,
    pq,
    run_to_signal,
    wild_store,
)
from tests.timeseries.stores import DAY_MS, NOON, QUIET, ROOT, SET, fill, ignore

DAYS_APART = 100
"""Days so far apart are never in one partition."""


def export(store: Path, target: Path, *, copying: Callable[..., None] = ignore, **wanted: Any) -> layout.Manifest:
    chosen = exporting.Wanted(**wanted)
    return exporting.export(store, target, chosen, clock=ManualClock(NOON), copying=copying, progress=ignore)


async def test_every_bit_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await wild_store(tmp_path / "old" / "timeseries")
    assert await command("export", tmp_path / "out", data=tmp_path / "old") == 0
    found, metrics, servers = await contents(tmp_path / "old" / "timeseries")
    assert await command("import", tmp_path / "out", data=tmp_path / "new") == 0
    again, same_metrics, same_servers = await contents(tmp_path / "new" / "timeseries")
    assert bits(again) == bits(found) and len(found) == 13
    assert same_metrics == metrics
    assert same_servers == {**servers, "c-ü": None} and same_servers["a"] == DESCRIPTOR
    points = sum(map(len, found.values()))
    out, err = capsys.readouterr()
    assert f"import {tmp_path / 'out'}: {points:,} points of {points:,} rows, into {tmp_path / 'new'}" in out
    assert f"part-0.parquet  {points:,} points\n" in err
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out" / "store").exists()


async def test_what_lies_where(tmp_path: Path) -> None:
    await wild_store(tmp_path / "store")
    manifest = await asyncio.to_thread(export, tmp_path / "store", tmp_path / "out")
    days = [datetime.date(2023, 12, 6), *(datetime.date(2023, 12, day) for day in (9, 10, 11))]
    assert [str(path.relative_to(tmp_path / "out")) for path in parts(tmp_path / "out")] == [
        f"points/date={day}/part-0.parquet" for day in days
    ]
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (listed["format"], listed["version"], listed["points"]) == ("openmanager-parquet", 1, manifest.points)
    assert (listed["start_time"], listed["servers"], listed["left_out"]) == (None, None, [])
    assert listed["first_time"] == "2023-12-06T12:00:00.000Z" and listed["last_time"] == "2023-12-11T12:01:39.000Z"
    for entry, path in zip(listed["files"], parts(tmp_path / "out"), strict=True):
        assert (path.stat().st_size, pq.ParquetFile(path).metadata.num_rows) == (entry["bytes"], entry["points"])
    table = pq.read_table(tmp_path / "out" / "points")
    text = pa.dictionary(pa.int32(), pa.string())
    assert [(field.name, field.type) for field in table.schema][:7] == [
        *((name, text) for name in ("server_id", "metric", "labels", "unit", "kind")),
        ("time", pa.timestamp("ms", "UTC")),
        ("value", pa.float64()),
    ]
    for path in parts(tmp_path / "out"):
        lines = pq.ParquetFile(path).read().select(["server_id", "metric", "labels", "time"]).to_pylist()
        assert lines == sorted(lines, key=lambda line: tuple(line.values()))
    labels = {row["labels"] for row in table.select(["labels"]).to_pylist()}
    assert labels == {"{}", '{"mount":"/"}', '{"mount":"/a \\"b\\", {ü}\\\\","z":""}'}
    servers = pq.read_table(tmp_path / "out" / "servers.parquet").to_pylist()
    assert [server["server_id"] for server in servers] == ["a", "b", "c-ü", "told"]
    assert servers[0] == dataclasses.asdict(DESCRIPTOR) and servers[1]["hostname"] is None


async def test_a_part_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await wild_store(tmp_path / "timeseries")
    found, _, _ = await contents(tmp_path / "timeseries")
    second = '{mount="/a \\"b\\", {ü}\\\\",z=""}'
    arguments = ("--servers", "b,a,b", "--metrics", f"cpu_usage,disk_used{second}", "--start", "2023-12-10")
    arguments = (*arguments, "--end", "2023-12-10T12:00:30+00:00")
    assert await command("export", tmp_path / "out", *arguments, data=tmp_path) == 0
    assert await command("import", tmp_path / "out", data=tmp_path / "new") == 0
    again, _, _ = await contents(tmp_path / "new" / "timeseries")
    start, end = NOON + DAY_MS // 2, NOON + DAY_MS + 30_000
    wanted = {
        name: inside
        for name, series in found.items()
        if name[0] in "ab" and name[1] in ("cpu_usage", f"disk_used{second}")
        if (inside := [point for point in series if start <= point[0] < end])
    }
    assert bits(again) == bits(wanted) and len(wanted) == 4
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert listed["start_time"] == "2023-12-10T00:00:00.000Z" and listed["servers"] == ["b", "a", "b"]
    assert listed["points"] == sum(map(len, wanted.values()))
    capsys.readouterr()
    for options, words in (
        (("--servers", "aa"), "there is no server 'aa' in the store; 4 are there, such as a"),
        (("--metrics", "cpu_usag"), "no server has a metric 'cpu_usag'; 7 are there, such as cpu_usage"),
        (("--start", "2024-01-01"), "there are no points of these servers and metrics in that range"),
    ):
        assert await command("export", tmp_path / "none", *options, data=tmp_path) == 1
        assert words in capsys.readouterr().err
        assert not list(tmp_path.glob("none*"))
    assert await command("export", tmp_path / "out", data=tmp_path) == 1
    assert "is there already and not an empty folder: name a new one" in capsys.readouterr().err
    for arguments in (("--start", "soon"), ("--start", "now-7"), ("--start", "now", "--end", "now-1d")):
        with pytest.raises(SystemExit) as usage:
            commands.main(["export", "x", *arguments])
        assert usage.value.code == 2


async def test_days_that_are_not_wanted_are_not_read_from_the_journal_either(tmp_path: Path) -> None:
    """The journal keeps the rows of blocks for an hour; without its day's file a replay would take them for new."""
    settings = EngineSettings(maintenance_interval_s=1e9)
    async with Engine.open(tmp_path / "store", clock=ManualClock(NOON), settings=settings) as engine:
        for day in (0, DAYS_APART):
            lines = [("a", NOON + day * DAY_MS + n, [1.0, 2.0, 3.0]) for n in range(30)]
            await engine.append(rows(SET, lines), metric_sets=(SET,))
        await engine.maintain(everything=True)
    with closing(Store(tmp_path / "store", QUIET, ManualClock(NOON))) as store:
        assert store.heads.points == 0
    (tmp_path / "copy").mkdir()
    second = NOON // DAY_MS + DAYS_APART
    copied = copy_range(tmp_path / "store", tmp_path / "copy", range(second, second + 1), ignore)
    assert copied == Excerpt(days={second}, left_out=[])
    with closing(Store(tmp_path / "copy", QUIET, ManualClock(NOON))) as store:
        assert (store.heads.points, store.partitions.points) == (0, 90)


async def test_an_export_under_constant_writes_has_all_that_was_acknowledged(tmp_path: Path) -> None:
    """Heads close and the journal is swept all the time."""
    settings = EngineSettings(head_rows=20, maintenance_interval_s=0.01, journal_keep_s=0.0, sweep_rows=7)
    acknowledged: list[int] = []

    def at(number: int) -> int:
        return NOON + number * 1_000 - (DAY_MS if number % 5 == 0 else 0)

    async with Engine.open(tmp_path / "live", clock=SystemClock(), settings=settings) as engine:

        async def append_forever() -> None:
            for number in itertools.count():
                lines = [(server, at(number), [number / 7, number / 9, number / 11]) for server in "abc"]
                await engine.append(rows(SET, lines), metric_sets=(SET,))
                acknowledged.append(number)

        writer = asyncio.create_task(append_forever())
        await eventually(lambda: len(acknowledged) > 100, within_s=60)
        before = list(acknowledged)

        def copying(*_: object) -> None:
            within(60, lambda: len(acknowledged) > len(before))  # they go on in the midst of it

        await asyncio.to_thread(export, tmp_path / "live", tmp_path / "out", copying=copying)
        assert len(acknowledged) > len(before)
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)
    points = {
        (row["server_id"], row["metric"], int(row["time"].timestamp() * 1_000)): row["value"]
        for path in parts(tmp_path / "out")
        for row in pq.ParquetFile(path).read().to_pylist()
    }
    for number, server, (metric, by) in itertools.product(before, "abc", zip(SET.metrics, (7, 9, 11), strict=True)):
        assert points[server, metric.name, at(number)] == number / by


async def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    await fill(tmp_path / "store")

    def interrupt(_name: str, _points: int, share: float) -> None:
        if share < 1:
            raise KeyboardInterrupt

    def broken() -> None:
        with pytest.raises(KeyboardInterrupt):
            exporting.export(
                tmp_path / "store",
                tmp_path / "out",
                exporting.Wanted(),
                clock=ManualClock(NOON),
                copying=ignore,
                progress=interrupt,
            )

    await asyncio.to_thread(broken)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]


async def test_an_export_that_finds_no_room_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await fill(tmp_path / "timeseries")

    def full(_file: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(exporting, "_sync", full)
    assert await command("export", tmp_path / "out", data=tmp_path) == 1
    assert "the export failed and was removed: " in (err := capsys.readouterr().err) and "No space left" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["timeseries"]


async def test_a_killed_export_is_not_taken_for_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    await fill(tmp_path / "timeseries")
    killed = await asyncio.to_thread(
        run_to_signal, signal.SIGKILL, "exporting._Part.write", 2, "export", tmp_path / "out", data=tmp_path
    )
    assert killed.returncode == -signal.SIGKILL, killed
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "points").exists()
    assert await command("import", tmp_path / "out.partial", data=tmp_path / "new") == 1
    assert "is an export that was not finished" in capsys.readouterr().err
    assert await command("export", tmp_path / "out", data=tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "timeseries"]
    assert layout.files_to_import(tmp_path / "out")[0] == parts(tmp_path / "out")


async def test_a_day_that_is_gone_is_named_by_who_exports_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await fill(tmp_path / "timeseries")
    first, second = sorted((tmp_path / "timeseries" / "blocks").glob("*.db"))
    first.unlink()
    assert await command("export", tmp_path / "out", data=tmp_path) == 1
    assert f"left out, because they cannot be read or are gone: blocks/{first.name}, and 0" in capsys.readouterr().err
    assert await command("export", tmp_path / "other", "--start", second.stem, data=tmp_path) == 0


@pytest.mark.parametrize("what", ["missing", "short"])
async def test_an_export_of_which_something_is_gone_is_refused(
    tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await fill(tmp_path / "timeseries")
    await command("export", tmp_path / "out", data=tmp_path)
    first = parts(tmp_path / "out")[0]
    first.unlink() if what == "missing" else first.write_bytes(first.read_bytes()[:-1])
    assert await command("import", tmp_path / "out", data=tmp_path / "new") == 1
    assert f"{first} is {'missing' if what == 'missing' else 'of '}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert await command("import", parts(tmp_path / "out")[-1], data=tmp_path / "new") == 0


async def test_a_damaged_store_is_exported_but_for_what_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Engine.open(tmp_path / "timeseries", clock=ManualClock(NOON), settings=QUIET) as engine:
        for day, server in itertools.product((0, DAYS_APART), "abc"):
            values = np.random.default_rng(ord(server) + day).random((50, 3)).tolist()
            lines = [(server, NOON + day * DAY_MS + n * 1_000, row) for n, row in enumerate(values)]
            await engine.append(rows(SET, lines), metric_sets=(SET,))
        await engine.maintain(everything=True)
        await engine.append(rows(SET, [("a", NOON - 1_000, [1.0, 2.0, 3.0])]))
    path, other = sorted((tmp_path / "timeseries" / "blocks").glob("*.db"))
    path.write_bytes(b"no database" * 999)
    with closing(apsw.Connection(str(other))) as partition:
        partition.execute("UPDATE blocks SET payload = zeroblob(length(payload)) WHERE cohort = 2")
    assert await command("export", tmp_path / "out", data=tmp_path) == 1
    reason = f"left out, because they cannot be read or are gone: blocks/{path.name}, and 1 blocks of other days"
    assert reason in capsys.readouterr().err
    rest = [pq.ParquetFile(part).metadata.num_rows for part in parts(tmp_path / "out")]
    assert rest[0] == 3 and 300 <= rest[1] < 450  # a row of a head, and what is not damaged


async def test_without_pyarrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "import sys, services.timeseries.__main__; sys.exit('pyarrow' in sys.modules)"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"}
    served = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program], cwd=ROOT, env=environment, check=False
    )
    assert served.returncode == 0
    for name in [name for name in sys.modules if name.startswith("services.timeseries.parquet.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for arguments in (("export", tmp_path / "out"), ("import", tmp_path)):
        assert await command(*arguments, data=tmp_path) == 1
        err = capsys.readouterr().err
        assert "need pyarrow" in err and "make parquet" in err and "requirements-parquet.txt" in err


MEASURED = """
import atexit, pathlib, runpy, sys
noted = pathlib.Path(sys.argv.pop(1))
atexit.register(lambda: noted.write_text(pathlib.Path("/proc/self/status").read_text()))
runpy.run_module("services.timeseries", run_name="__main__", alter_sys=True)
"""


def peak_mib(*arguments: object, data: Path) -> float:
    """Runs a command of its own; its largest memory. It is the process that says so: what the system counts for a child
    begins with what its parent, here all tests before this one, held when it was started."""
    environment = {**os.environ, **KEPT, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", "DATA_DIR": str(data)}
    noted = data / "status"
    command_line = [sys.executable, "-c", MEASURED, str(noted), *map(str, arguments)]
    subprocess.run(command_line, cwd=ROOT, env=environment, check=True)
    (peak,) = re.findall(r"^VmHWM:\s+(\d+) kB$", noted.read_text(), re.MULTILINE)
    return int(peak) / 1_024


@pytest.mark.full
@pytest.mark.timeout(900)
async def test_memory_is_bounded_on_twenty_million_points(tmp_path: Path) -> None:
    """Measured: export 230 MiB, import with an engine of its own 490; of four times the points 255 and 554."""
    of_set, rng, total = metric_set(*(f"metric_{number}" for number in range(511))), np.random.default_rng(1), 0
    level = rng.normal(50, 10, (4, 511))
    async with Engine.open(tmp_path / "timeseries", clock=SystemClock(), settings=QUIET) as engine:
        while total < 20_000_000:
            lines = []
            for _ in range(72):
                level += rng.normal(0, 0.1, level.shape)
                at = NOON + total // (4 * 511) * 10_000
                lines += [(server, at, row) for server, row in zip("abcd", level.round(2).tolist(), strict=True)]
                total += level.size
            await engine.append(rows(of_set, lines), metric_sets=(of_set,))
    (tmp_path / "new").mkdir()
    assert await asyncio.to_thread(peak_mib, "export", tmp_path / "out", data=tmp_path) < 400
    assert await asyncio.to_thread(peak_mib, "import", tmp_path / "out", data=tmp_path / "new") < 800
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["points"] == total
    assert await command("export", tmp_path / "again", data=tmp_path / "new") == 0
    assert [part.read_bytes() for part in parts(tmp_path / "again")] == [
        part.read_bytes() for part in parts(tmp_path / "out")
    ]
