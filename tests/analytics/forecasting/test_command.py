"""`forecast` and `exhaust` on files: what they write, and what they say about files and options that make no sense."""

import argparse
import csv
import gzip
import io
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from services.analytics.forecasting import command
from services.analytics.forecasting.table import read_table
from services.analytics.recording import BadRecordingError

START_S = 1_750_032_000
HOUR_S = 3600


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="python -m services.analytics")
    command.add(whole.add_subparsers(dest="command", required=True))
    return whole


def run(*arguments: str | Path) -> int:
    return command.run(parser().parse_args([str(argument) for argument in arguments]))


def file(folder: Path, text: str, name: str = "some.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def hourly_file(folder: Path, days: int = 21) -> Path:
    rng = np.random.default_rng(1)
    rows = [
        f"{START_S + hour * HOUR_S},{50 + 20 * (hour % 24 > 12) + rng.standard_normal():.3f},{hour}"
        for hour in range(days * 24)
    ]
    return file(folder, "timestamp,cpu_usage,bytes\n" + "\n".join(rows) + "\n")


def test_each_step_after_the_last_row_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("forecast", hourly_file(tmp_path), "--horizon", "7d", "--step", "1h") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["timestamp", "metric", "value", "low80", "high80", "low95", "high95"]
    assert [row["metric"] for row in rows] == ["cpu_usage"] * 168 + ["bytes"] * 168
    last = START_S + (21 * 24 - 1) * HOUR_S
    assert [int(row["timestamp"]) for row in rows[:168]] == [last + hour * HOUR_S for hour in range(1, 169)]
    for row in rows:
        low95, low80, value, high80, high95 = (
            float(row[name]) for name in ("low95", "low80", "value", "high80", "high95")
        )
        assert low95 <= low80 <= value <= high80 <= high95
    assert float(rows[2]["value"]) == pytest.approx(50, abs=2)
    assert float(rows[15]["value"]) == pytest.approx(70, abs=2)
    assert float(rows[-1]["value"]) == pytest.approx(21 * 24 + 167, rel=0.05)


def test_one_metric_in_other_steps_and_the_same_answer_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = hourly_file(tmp_path)
    texts = []
    for _ in range(2):
        assert run("forecast", path, "--metric", "cpu_usage", "--horizon", "2d", "--step", "1d") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 3
    assert run("forecast", path, "--metric", "cpu_usage", "--horizon", "1h", "--step", "5m") == 0
    assert len(capsys.readouterr().out.splitlines()) == 13


@pytest.mark.parametrize(
    ("write", "read"),
    [
        ("%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"),
        ("%Y-%m-%dT%H:%M:%SZ", "%Y-%m-%dT%H:%M:%SZ"),
        ("%Y-%m-%dT%H:%M:%S.000+00:00", "%Y-%m-%dT%H:%M:%SZ"),
    ],
)
def test_times_may_be_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str], write: str, read: str) -> None:
    rows = [f"{datetime.fromtimestamp(START_S + HOUR_S * hour, UTC).strftime(write)},1" for hour in range(48)]
    assert run("forecast", file(tmp_path, "timestamp,load\n" + "\n".join(rows)), "--horizon", "1h") == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line == datetime.fromtimestamp(START_S + HOUR_S * 48, UTC).strftime(read) + ",load,1,1,1,1,1"


def test_gaps_disorder_and_compression_are_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "some.csv.gz"
    with gzip.open(path, "wt") as opened:
        opened.write("\ufefftimestamp,a,b\n30,1,\n\n10,nan,5\n20.5,3,7\n20.5,4,6\n")
    table = read_table(path)
    assert table.times_ms.tolist() == [10_000, 20_500, 30_000]
    np.testing.assert_array_equal(table.values, [[np.nan, 5], [4, 6], [1, np.nan]])
    assert table.time_text(20_500) == "20.500"
    assert read_table(path, ["b"]).metrics == ("b",)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "the file is empty"),
        (" \n\n", "the file is empty"),
        ("\n\ntimestamp,a\n1,x\n", "row 4: column a: 'x' is not a number"),
        ("\n,\ntime,a\n1,2\n", "row 3: there must be one column named timestamp"),
        ("time,a\n1,2\n", "row 1: there must be one column named timestamp"),
        ("timestamp\n1\n", "row 1: there must be 1 to"),
        ("timestamp,a,a\n1,2,3\n", "row 1: column 3: the name a is there twice"),
        ("timestamp,a\n", "there are no rows"),
        ("timestamp,a\n1,2\n2\n", "row 3: it has 1 fields, the header has 2"),
        ("timestamp,a\n1,2\n2,x\n", "row 3: column a: 'x' is not a number"),
        ("timestamp,a\n\n\nyesterday,2\n", "row 4: column timestamp: 'yesterday' is neither epoch seconds"),
        ("timestamp,a\n1750032000000,2\n", "row 2: column timestamp: 1750032000000 is no time"),
        ("timestamp,a\n1,2\n3,inf\n", "row 3: column a: inf is not finite"),
        ("timestamp,a\n,2\n", "row 2: column timestamp: '' is neither"),
    ],
)
def test_bad_files_are_told_with_row_and_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, where: str
) -> None:
    path = file(tmp_path, text)
    assert run("forecast", path) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"{path}: {where}")


def test_what_is_in_the_columns_that_are_not_asked_about_is_no_trouble(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"web-1,{START_S + hour * HOUR_S},{hour % 24},inf" for hour in range(24 * 8)]
    path = file(tmp_path, "host,timestamp,load,peak\n" + "\n".join(rows) + "\n")
    assert run("forecast", path, "--metric", "load", "--horizon", "1h") == 0
    assert capsys.readouterr().out.splitlines()[1].split(",")[:3] == [str(START_S + 24 * 8 * HOUR_S), "load", "0"]
    assert run("exhaust", path, "--metric", "load", "--limit", "20") == 0
    assert capsys.readouterr().out.splitlines()[1] == ",,,already past the limit"
    assert run("exhaust", path, "--metric", "peak", "--limit", "20") == 2
    assert "row 2: column peak: inf is not finite" in capsys.readouterr().err
    assert run("forecast", path) == 2
    assert "row 2: column host: 'web-1' is not a number" in capsys.readouterr().err


def test_files_that_are_not_there_or_no_text_are_told(tmp_path: Path) -> None:
    binary = tmp_path / "some.csv"
    binary.write_bytes(b"\xff\xfe\x00\x01\n")
    for path, why in ((tmp_path / "none.csv", "No such file"), (tmp_path, "Is a directory"), (binary, "not UTF-8")):
        with pytest.raises(BadRecordingError, match=why):
            read_table(path)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--horizon", "731d"], "--horizon: a forecast beyond 2 years"),
        (["--horizon", "30m"], "--horizon: the horizon is shorter"),
        (["--step", "7m"], "--step: a step is hours"),
        (["--step", "90m"], "--step: a step is hours"),
        (["--metric", "disk"], "there is no column disk"),
        (["--metric", "timestamp"], "there is no column timestamp"),
        (["--rate", "disk"], "--rate: there is no column disk"),
    ],
)
def test_options_that_make_no_sense_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    assert run("forecast", hourly_file(tmp_path, 3), *options) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["forecast", "x", "--horizon", "soon"],
        ["forecast", "x", "--horizon", "0s"],
        ["forecast", "x", "--hor", "7d"],
        ["exhaust", "x", "--metric", "a"],
        ["exhaust", "x", "--limit", "90"],
        ["exhaust", "x", "--metric", "a", "--limit", "nan"],
        ["exhaust", "x", "--metric", "a", "--limit", "90", "--growth", "-100%"],
        ["exhaust", "x", "--metric", "a", "--limit", "90", "--output", "xml"],
    ],
)
def test_words_that_make_no_sense_end_with_2(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(*options)
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "limit"), [("-5", -5.0), ("-1e9", -1e9), ("-.5e-3", -0.0005)])
def test_values_may_be_negative(text: str, limit: float) -> None:
    options = parser().parse_args(["exhaust", "x", "--metric", "a", "--limit", text, "--growth", "-20%"])
    assert (options.limit, options.growth) == (limit, -0.2)


def test_a_percentage_and_a_counter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    rows = [
        f"{START_S + hour * HOUR_S},{90 + 5 * rng.random() * (hour % 24 < 12):.3f},{hour * 7200}"
        for hour in range(14 * 24)
    ]
    path = file(tmp_path, "timestamp,cpu_usage,sent\n" + "\n".join(rows))
    assert run("forecast", path, "--rate", "sent") == 0
    rows_out = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert max(float(row["high95"]) for row in rows_out if row["metric"] == "cpu_usage") <= 100
    assert {row["value"] for row in rows_out if row["metric"] == "sent"} == {"2"}


def test_the_date_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{START_S + hour * HOUR_S},{40 + hour / 48},{60 - hour / 48}" for hour in range(30 * 24)]
    path = file(tmp_path, "timestamp,disk_usage,disk_free\n" + "\n".join(rows))
    assert run("exhaust", path, "--metric", "disk_usage", "--limit", "90") == 0
    (answer,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    date = datetime.fromisoformat(answer["date"])
    assert date.timestamp() == pytest.approx(START_S + 100 * 86_400, abs=43_200)
    assert datetime.fromisoformat(answer["low"]) < date < datetime.fromisoformat(answer["high"])
    assert answer["reason"] == ""
    assert run("exhaust", path, "--metric", "disk_usage", "--limit", "90", "--growth", "25%", "--output", "json") == 0
    faster = json.loads(capsys.readouterr().out)
    assert datetime.fromisoformat(faster["date"]) < date
    assert faster["reason"] is None
    assert faster["rate_per_day"] == pytest.approx(0.5)
    assert run("exhaust", path, "--metric", "disk_free", "--limit", "10", "--falling") == 0
    assert datetime.fromisoformat(capsys.readouterr().out.splitlines()[1].split(",")[0]).date() == date.date()
    assert run("exhaust", path, "--metric", "disk_free", "--limit", "90") == 0
    assert capsys.readouterr().out.splitlines()[1] == ",,,falling away from the limit"
    assert run("exhaust", path, "--metric", "disk_usage", "--limit", "45", "--output", "json") == 0
    assert json.loads(capsys.readouterr().out)["reason"] == "already past the limit"


def test_the_last_times_that_are_taken_have_dates_after_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = 253_086_767_999
    rows = [f"{last - HOUR_S * (30 * 24 - hour)},{40 + hour / 480}" for hour in range(1, 30 * 24 + 1)]
    path = file(tmp_path, "timestamp,disk_usage\n" + "\n".join(rows))
    assert run("exhaust", path, "--metric", "disk_usage", "--limit", "75") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("9991-")


def test_times_of_early_years_are_written_so_that_they_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file(tmp_path, "timestamp,load\n0987-01-01T00:00:00Z,1\n0987-01-01T00:05:00Z,1\n")
    assert run("forecast", path, "--horizon", "1h") == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("0987-01-01T01:00:00Z,load,1")
