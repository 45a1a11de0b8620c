"""A recording is read whatever its order, its compression and its bad lines."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from fleet.model import Metric, MetricKind
from runtime.errors import InvalidArgument
from services.simulator import recording as recording_module
from services.simulator.recording import Block, Recording, RecordingReader, metric_of_column, read_header
from tests.harness.data import recording as recording_file

HEAD = "time,server_id,cpu_usage,disk_read_bytes_per_second\n"


def _read(tmp_path: Path, text: str, *, zipped: bool = False) -> Recording:
    path = tmp_path / ("recording.csv.gz" if zipped else "recording.csv")
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    return RecordingReader(path, tmp_path / "runs").read()


def _rows(recording: Recording) -> list[tuple[int, str, list[float]]]:
    return [
        (int(time_ms), recording.server_ids[server], values)
        for block in recording.blocks()
        for time_ms, server, values in zip(
            block.times_ms, block.servers.tolist(), np.nan_to_num(block.values, nan=-1.0).tolist(), strict=True
        )
    ]


@pytest.mark.parametrize("zipped", [False, True])
def test_rows_come_in_the_order_of_time_and_empty_cells_are_no_values(tmp_path: Path, zipped: bool) -> None:
    text = HEAD + "1000,a,1.5,10\n1300,a,,30\n1600,a,3.5,\n1000,b,4,40\n1300.25,b,5,50\n\n"
    recording = _read(tmp_path, text, zipped=zipped)
    assert _rows(recording) == [
        (1_000_000, "a", [1.5, 10.0]),
        (1_000_000, "b", [4.0, 40.0]),
        (1_300_000, "a", [-1.0, 30.0]),
        (1_300_250, "b", [5.0, 50.0]),
        (1_600_000, "a", [3.5, -1.0]),
    ]
    assert (recording.rows, recording.first_ms, recording.last_ms) == (5, 1_000_000, 1_600_000)
    assert recording.interval_ms == 300_000
    assert recording.bad_lines == 0


def test_times_may_be_rfc_3339_and_columns_in_any_order(tmp_path: Path) -> None:
    text = "memory_usage,time,server_id\n7,2026-01-01T00:00:00Z,a\n8,2026-01-01T02:00:00+01:00,a\n"
    assert [row[0] for row in _rows(_read(tmp_path, text))] == [1_767_225_600_000, 1_767_229_200_000]


def test_many_runs_merge_into_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_module, "CHUNK_ROWS", 7)
    monkeypatch.setattr(recording_module, "MERGE_ROWS", 60)
    lines = [f"{1000 + 60 * step},s{server},{step},{server}\n" for server in range(5) for step in range(40)]
    recording = _read(tmp_path, HEAD + "".join(lines))
    assert len(recording.runs) == 29
    rows = _rows(recording)
    assert len(rows) == 200
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert sorted((row[1], row[2][0]) for row in rows) == sorted(
        (f"s{s}", float(t)) for s in range(5) for t in range(40)
    )
    largest = max(len(block) for block in recording.blocks())
    assert largest <= 60


def test_of_many_columns_fewer_rows_are_held_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording_module, "CHUNK_CELLS", 10 * 42)
    monkeypatch.setattr(recording_module, "MERGE_CELLS", 24 * 40)
    head = "time,server_id," + ",".join(f"m{column}" for column in range(40)) + "\n"
    lines = [f"{1000 + 60 * step},s{server}" + f",{step}" * 40 + "\n" for step in range(8) for server in range(15)]
    recording = _read(tmp_path, head + "".join(lines))
    assert [path.stat().st_size for path in recording.runs] == [10 * (8 + 4 + 8 * 40)] * 12
    assert recording.interval_ms == 60_000, "no chunk has a server twice"
    assert [row[0] for row in _rows(recording)] == sorted(
        1000 * (1000 + 60 * step) for step in range(8) for _ in range(15)
    )
    assert max(len(block) for block in recording.blocks()) <= 24


def test_bad_lines_are_counted_and_named_and_never_fatal(tmp_path: Path) -> None:
    bad = [
        "yesterday,a,1,2",
        "1000,a,high,2",
        "1000,a,1",
        "1000,,1,2",
        "1000,a,inf,2",
        "1372629804000,a,1,2",
        "nan,a,1,2",
        "1000,a/b,1,2",
    ]
    recording = _read(tmp_path, HEAD + "1000,a,1,2\n" + "\n".join(bad) + "\n2000,a,3,4\n")
    assert [row[0] for row in _rows(recording)] == [1_000_000, 2_000_000]
    assert recording.bad_lines == len(bad)
    named = "\n".join(sorted(recording.named_lines))
    for line, words in {
        3: "'yesterday' is neither seconds",
        4: "'high' is not a number",
        5: "3 cells instead of 4",
        6: "the server id is empty",
        7: "not finite",
        8: "milliseconds?",
        9: "1970",
        10: "'/'",
    }.items():
        assert any(name.startswith(f"line {line}:") and words in name for name in recording.named_lines), named


def test_only_the_first_bad_lines_are_named(tmp_path: Path) -> None:
    recording = _read(tmp_path, HEAD + "1000,a,1,2\n" + "x\n" * 1000)
    assert recording.bad_lines == 1000
    assert len(recording.named_lines) == recording_module.MAX_NAMED_LINES


def test_a_file_cut_short_is_played_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "cut.csv.gz"
    text = HEAD + "".join(f"{1000 + step},a,{step % 97},{step * 31 % 1009}\n" for step in range(20_000))
    path.write_bytes(gzip.compress(text.encode())[:-2000])
    recording = RecordingReader(path, tmp_path / "runs").read()
    assert 1_000 < recording.rows < 20_000
    assert any("ends too early" in name for name in recording.named_lines)


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("timestamp,server_id,cpu_usage", "'time' is missing"),
        ("time,host,cpu_usage", "'server_id' is missing"),
        ("time,server_id", "no column of a metric"),
        ("time,server_id,cpu_usage,cpu_usage", "'cpu_usage' is there twice"),
        ("time,server_id,cpu usage", "column 3, 'cpu usage'"),
        ("", "'time' is missing"),
        ("time,server_id,a," + "b" * 256, "column 4, 'bbb.* is a name of over 255 bytes"),
        ("time,server_id" + "".join(f",m{column}" for column in range(100_001)), "100001 metrics; at most 100000"),
    ],
    ids=lambda text: text[:40],
)
def test_a_wrong_header_names_the_column(tmp_path: Path, head: str, words: str) -> None:
    path = tmp_path / "wrong.csv"
    path.write_text(f"{head}\n1,a,2\n")
    with pytest.raises(InvalidArgument, match=words) as caught:
        read_header(path)
    assert caught.value.field == "SIMULATOR_REPLAY_FILE"
    with pytest.raises(InvalidArgument, match=words):
        RecordingReader(path, tmp_path / "runs").read()


def test_a_recording_without_a_row_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no row that can be read; line 2"):
        _read(tmp_path, HEAD + "x,y\n")


def test_what_is_no_gzip_file_but_looks_like_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "broken.csv.gz"
    path.write_bytes(b"\x1f\x8b" + b"nonsense" * 10)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        read_header(path)


@pytest.mark.parametrize(
    ("name", "unit", "kind"),
    [
        ("cpu_usage", "%", MetricKind.GAUGE),
        ("disk_read_bytes_per_second", "By/s", MetricKind.GAUGE),
        ("requests_per_second", "1/s", MetricKind.GAUGE),
        ("memory_used_bytes", "By", MetricKind.GAUGE),
        ("network_receive_bytes_total", "By", MetricKind.COUNTER),
        ("requests_total", "1", MetricKind.COUNTER),
        ("queue_depth", "", MetricKind.GAUGE),
    ],
)
def test_units_are_taken_from_the_names(name: str, unit: str, kind: MetricKind) -> None:
    assert metric_of_column(name) == Metric(name=name, unit=unit, kind=kind)


@pytest.mark.full
def test_three_months_of_twenty_real_machines(tmp_path: Path) -> None:
    path = recording_file("bitbrains-20.csv.gz")
    recording = RecordingReader(path, tmp_path / "runs").read()
    assert (recording.rows, len(recording.server_ids), recording.bad_lines) == (513_319, 20, 0)
    assert recording.interval_ms == 300_000
    last, rows, missing = 0, 0, 0
    blocks: list[Block] = []
    for block in recording.blocks():
        assert block.times_ms[0] >= last
        assert (np.diff(block.times_ms) >= 0).all()
        last, rows, missing = int(block.times_ms[-1]), rows + len(block), missing + int(np.isnan(block.values).sum())
        blocks.append(block)
    assert rows == 513_319
    assert missing == 19_226  # empty cells of the file
    assert max(len(block) for block in blocks) <= recording_module.MERGE_ROWS
