"""`make bench` works from end to end: a tiny load through every row, and a report of the shape that is documented."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import orjson
import pytest

from bench import peers, report
from bench.__main__ import Progress, Size, run
from bench.load import START_MS, Mix
from bench.peers import INFLUX, OURS, PROGRAMS, ROOT, VICTORIA
from bench.queries import ROUNDS, questions
from tests.bench.recordings import recording

TINY = Size(
    servers=2,
    ingest_ticks=20,
    ingest_rounds=2,
    storage_ticks=60,
    recordings=False,
    query_ticks=60,
    query_share=0.01,
    year_days=3,
    year_window_days=2,
    year_questions=5,
    cost_servers=(2, 4),
    cost_points=100_000,
    cost_rows=60,
    cost_bound_s=10.0,
)
HALF_AN_HOUR = 180


async def measured(folder: Path, *only: str, recorded: Path | None = None) -> Any:
    """The report as it is written and read again."""
    found = await asyncio.to_thread(run, TINY, only, folder, Progress(), recorded=recorded)
    return orjson.loads(orjson.dumps(found))


def check_shape(found: Any, only: set[str]) -> None:
    """What readers of the JSON rely on."""
    assert found["format"] == report.FORMAT
    assert {"started", "finished", "command", "commit", "machine", "size", "mix", "results", "table"} <= set(found)
    assert {"cores", "processor", "load_1m", "load_1m_at_the_end"} <= set(found["machine"])
    assert set(found["results"]) == only
    for row in found["table"]:
        assert set(row) == {"work", "peer", "unit", "ours", "theirs", "ratio", "target", "met", "note"}
        assert (row["met"] is None) == (row["ratio"] is None) == row["note"].startswith("not measured")
        assert row["met"] is not False or row["note"].startswith("misses")


@pytest.mark.full
async def test_every_row_is_measured_beside_the_peers(tmp_path: Path) -> None:
    if missing := peers.missing():
        pytest.skip(f"{' and '.join(PROGRAMS[name] for name in missing)} not on the PATH")
    recorded = recording(tmp_path / "host.npz", 50, 1_000)
    found = await measured(tmp_path, "ingest", "storage", "queries", recorded=recorded)
    check_shape(found, {"ingest", "storage", "queries"})
    assert set(found["results"]["ingest"]["median"]) == {OURS, VICTORIA, INFLUX}
    mix = found["results"]["storage"]["mix"]
    assert mix[OURS]["points"] == mix[VICTORIA]["points"] == 2 * 511 * 60
    asked = found["results"]["queries"]
    assert set(asked) == set(ROUNDS)
    assert all(set(times) == {OURS, VICTORIA, INFLUX} for times in asked.values())
    unmeasured = {row["work"] for row in found["table"] if row["met"] is None}
    assert unmeasured == {"disk, bitbrains-20"}
    host = found["results"]["storage"]["host"]
    assert host[OURS]["series"] == host[VICTORIA]["series"] == 4
    assert host[OURS]["points"] == host[VICTORIA]["points"] == 3 * 50 - 1
    assert "disk, host (0.1 h, recorded every 1 s, replayed as every 10 s)" in [row["work"] for row in found["table"]]


async def test_without_peers_our_side_is_measured_and_the_rest_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = await measured(tmp_path / "data", "storage")
    check_shape(found, {"storage"})
    mix = next(row for row in found["table"] if row["work"] == "disk, mix")
    assert mix["ours"] > 0
    assert mix["note"] == "not measured: victoriametrics is not on the PATH"
    host = next(row for row in found["table"] if row["work"] == "disk, host")
    assert host["note"] == "not measured: no recording of this machine was given (--host)"


def test_a_missed_target_says_by_how_much() -> None:
    sizes = {OURS: {"bytes_a_point": 2.0}, VICTORIA: {"bytes_a_point": 1.0}}
    rates = {"median": {OURS: 9.0, VICTORIA: 3.0, INFLUX: 1.0}}
    found = report.rows({"ingest": rates, "storage": {"mix": sizes}})
    assert [(row.met, row.note) for row in found] == [
        (True, ""),
        (False, "misses: 9.00x instead of 10x"),
        (False, "misses: 0.50x instead of 1x"),
    ]


def test_the_load_is_the_same_in_every_run_and_on_both_wires() -> None:
    one, other = Mix(2), Mix(2)
    values = one.values(7)
    assert values.tobytes() == other.values(7).tobytes()
    assert one.lines(7, values) == other.lines(7, values)
    lines = one.lines(7, values).decode().splitlines()
    for line, row in zip(lines, values.tolist(), strict=True):
        _, fields, time_ms = line.split(" ")
        assert int(time_ms) == START_MS + 7 * 10_000
        assert [float(text.partition("=")[2]) for text in fields.split(",")] == row


@pytest.mark.parametrize("kind", ROUNDS)
def test_questions_stay_within_what_is_loaded(kind: str) -> None:
    mix = Mix(2)
    for asked in questions(kind, 50, mix, HALF_AN_HOUR):
        assert START_MS // 1000 <= asked.start_s < asked.end_s <= START_MS // 1000 + HALF_AN_HOUR * 10
    series = {"1 server, 1 ": 1, "20 servers, ": 2, "1 server, 511": 511, "last values ": 2 * 511}
    windows = 1 if kind.startswith("last") else 15
    assert questions(kind, 1, mix, HALF_AN_HOUR)[0].points == windows * next(
        count for begin, count in series.items() if kind.startswith(begin)
    )


async def test_the_command_explains_itself() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench", "--help", cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    text, _ = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
    assert b"examples:" in text
    assert b"--quick" in text
