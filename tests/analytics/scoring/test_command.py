"""`python -m services.analytics score`: what it reads, what it writes, and that it never looks ahead."""

import argparse
import io
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from services.analytics.scoring import command

START_S = 1_600_041_600


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers(required=True))
    return command.run(parser.parse_args(["score", *map(str, arguments)]))


def rows_of(rows: int, step_s: float = 300.0, metrics: int = 3, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    day = 86_400 / step_s
    wave = 10 * np.sin(2 * np.pi * np.arange(rows) / day)
    values = 50 + wave[:, None] + rng.normal(size=(rows, metrics))
    return [
        f"{START_S + place * step_s:.0f}," + ",".join(f"{value:.4f}" for value in row)
        for place, row in enumerate(values.tolist())
    ]


def file_of(folder: Path, rows: list[str], name: str = "in.csv", header: str = "timestamp,a,b,c") -> Path:
    path = folder / name
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def scored(folder: Path, rows: list[str], *arguments: object, header: str = "timestamp,a,b,c") -> list[str]:
    output = folder / "out.csv"
    assert run(file_of(folder, rows, header=header), "--output", output, *arguments) == 0
    return output.read_text().splitlines()


def test_one_line_for_each_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(700)
    lines = scored(tmp_path, rows)
    assert lines[0] == "timestamp,score,alarm" and len(lines) == 701
    for row, line in zip(rows, lines[1:], strict=True):
        timestamp, score, alarm = line.split(",")
        assert timestamp == row.split(",", maxsplit=1)[0]
        assert 0 <= float(score) <= 1 and alarm in ("0", "1")
    assert {line.split(",")[1] for line in lines[1:200]} == {"0.000000"}
    assert run(tmp_path / "in.csv") == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_per_metric_there_is_a_column_each(tmp_path: Path) -> None:
    rows = rows_of(400)
    rows[390] = ",".join([rows[390].split(",", maxsplit=1)[0], "9000", "50", ""])
    lines = scored(tmp_path, rows, "--per-metric")
    assert lines[0] == "timestamp,score,alarm,score_a,score_b,score_c"
    _, _, _, a, b, c = map(float, lines[391].split(","))
    assert a > 0.5 > b and c == 0


@pytest.mark.parametrize("step_s", [10, pytest.param(60, marks=pytest.mark.full), 300, 3600])
def test_no_answer_depends_on_what_comes_later(tmp_path: Path, step_s: int) -> None:
    count = {10: 2500, 60: 1800, 300: 700, 3600: 400}[step_s]
    known = count - 60
    rows = rows_of(count, step_s)
    rows[known - 30 : known - 20] = [f"{row.split(',', maxsplit=1)[0]},0,0,0" for row in rows[known - 30 : known - 20]]
    whole = scored(tmp_path, rows, "--per-metric")
    times = [row.split(",", maxsplit=1)[0] for row in rows]
    values = [row.split(",", maxsplit=1)[1] for row in rows]
    shuffled = np.random.default_rng(0).permutation(values[known:]).tolist()
    mixed = rows[:known] + [f"{time},{value}" for time, value in zip(times[known:], shuffled, strict=True)]
    other_sampling = rows[:known] + [f"{int(times[known]) + 7 * place},1e9,,-5" for place in range(300)]
    for changed in (mixed, other_sampling, rows[:known]):
        assert scored(tmp_path, changed, "--per-metric")[: known + 1] == whole[: known + 1]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("2026-03-01T00:00:00Z", "2026-03-01T01:05:00+01:00"),
        ("2026-03-01 00:00:00", "2026-03-01 00:05:00"),
        ("2026-03-01t00:00:00z", "2026-03-01T00:05:00Z"),
        ("0", "60.5"),
    ],
)
def test_times_as_they_are_written(tmp_path: Path, first: str, second: str) -> None:
    lines = scored(tmp_path, [f"{first},1,2,3", f"{second},1,2,3"])
    assert [line.split(",")[0] for line in lines[1:]] == [first, second]


def test_an_hour_that_comes_twice_is_no_error(tmp_path: Path) -> None:
    rows = rows_of(400)
    twice = rows[:300] + rows[288:300] + rows[300:]
    assert len(scored(tmp_path, twice)) == len(twice) + 1


@pytest.mark.parametrize("step_s", [10, *(pytest.param(long_s, marks=pytest.mark.full) for long_s in (60, 300))])
def test_gaps_and_empty_cells_raise_no_alarm(tmp_path: Path, step_s: int) -> None:
    day = 86_400 // step_s
    rows = rows_of(int(3.2 * day), step_s)
    at = int(2.5 * day)
    rows[at] = ",".join((rows[at].split(",", maxsplit=1)[0], "", "NaN", ""))
    del rows[at + 5], rows[at + 20 : at + 20 + day // 24]
    lines = scored(tmp_path, rows)
    assert all(line.endswith(",0") for line in lines[at - 2 : at + 60])


def test_below_a_minute_a_row_has_the_score_of_the_last_whole_minute(tmp_path: Path) -> None:
    lines = scored(tmp_path, rows_of(9000, 10))
    scores = np.array([float(line.split(",")[1]) for line in lines[1:]])
    changes = np.flatnonzero(np.diff(scores))
    assert len(changes) > 20 and set((changes + 1) % 6) == {0}


@pytest.mark.parametrize("hours", [1, 6, 24])
def test_slow_rows_do_not_all_raise_an_alarm(tmp_path: Path, hours: int) -> None:
    lines = scored(tmp_path, rows_of(500, hours * 3600.0))
    judged = [line for line in lines[1:] if line.split(",")[1] != "0.000000"]
    alarms = [line for line in judged if line.endswith(",1")]
    assert len(judged) > 350 and 0 < len(alarms) < 0.2 * len(judged)


def test_what_was_learnt_first_is_known(tmp_path: Path) -> None:
    rows = rows_of(1200)
    whole = scored(tmp_path, rows)
    train = file_of(tmp_path, rows[:600], "train.csv")
    assert scored(tmp_path, rows[600:], "--train", train)[1:] == whole[601:]
    swapped = [",".join(np.array(row.split(","))[[3, 0, 2, 1]]) for row in rows[:600]]
    train = file_of(tmp_path, swapped, "train.csv", header="c,timestamp,b,a")
    assert scored(tmp_path, rows[600:], "--train", train)[1:] == whole[601:]
    # two files that begin at the same time: the second is taken to be a whole number of weeks later
    assert len(scored(tmp_path, rows[:600], "--train", train)) == 601


def test_until_a_time_there_is_no_alarm(tmp_path: Path) -> None:
    rows = rows_of(1200)
    rows[700:1150:15] = [f"{row.split(',', maxsplit=1)[0]},0,0,0" for row in rows[700:1150:15]]
    alarms = [line for line in scored(tmp_path, rows)[1:] if line.endswith(",1")]
    until = int(alarms[0].split(",")[0]) + 1
    later = [line for line in scored(tmp_path, rows, "--train-until", until)[1:] if line.endswith(",1")]
    assert later == alarms[1:]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("time,a\n1,2\n", "row 1: there must be one column named timestamp"),
        ("timestamp\n1\n", "row 1: there must be 1 to"),
        ("timestamp,a,a\n1,2,3\n", "row 1: column 3: the name a is there twice"),
        ("timestamp,a,\n1,2,3\n", "row 1: column 3: it has no name"),
        ("timestamp,a\n1,2\n2,high\n", "row 3: column a: 'high' is not a number"),
        ("timestamp,a,b\n1,2,3\n2,inf,3\n", "row 3: column a: inf is not finite"),
        ("timestamp,a\n1,2\n2\n", "row 3: it has 1 fields, the header has 2"),
        ("timestamp,a\nyesterday,2\n", "row 2: column timestamp: 'yesterday' is neither"),
        ("timestamp,a\n1600000000000,2\n", "row 2: column timestamp: 1600000000000 is no time"),
        ("timestamp,a\nnan,2\n", "row 2: column timestamp"),
        ("timestamp,a\n,2\n", "row 2: column timestamp"),
        ("timestamp,a\n90000,2\n1,2\n", "row 3: column timestamp: 1 lies before the row above"),
        ("timestamp,a\n9000,2\n7000,2\n5000,2\n", "row 4: column timestamp: 5000 lies before the row above"),
        ("timestamp,a\n9999-12-31T00:00:00Z,2\n", "row 2: column timestamp: '9999-12-31T00:00:00Z' lies outside"),
        ("timestamp,a\n-62135596801,2\n", "row 2: column timestamp: -62135596801 is no time"),
        ('timestamp,a\n1,"2\n', "it is no CSV"),
        ("timestamp,a\n1,\xff\n", "row 2: it is not UTF-8"),
        ("timestamp,\xff\n1,2\n", "row 1: it is not UTF-8"),
        ("timestamp,a\n\xff,2\n", "row 2: it is not UTF-8"),
        ("timestamp,a\n1,2\n\xff\n", "row 3: it is not UTF-8"),
    ],
)
def test_bad_input_is_said_with_its_row_and_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(text.encode("latin-1"))
    assert run(path) == 2
    assert said in capsys.readouterr().err


def test_what_is_not_utf_8_is_said_with_its_row_and_the_rows_before_it_are_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = file_of(tmp_path, rows_of(40))
    path.write_bytes(path.read_bytes() + b"\xe4,1,2,3\n")
    assert run(path) == 2
    written = capsys.readouterr()
    assert len(written.out.splitlines()) == 41
    assert written.err.endswith("row 42: it is not UTF-8\n")


def test_commands_that_make_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file_of(tmp_path, rows_of(3))
    other = file_of(tmp_path, ["1,2"], "other.csv", header="timestamp,d")
    for arguments, said in (
        ((tmp_path / "none.csv",), "No such file"),
        ((path, "--train", tmp_path / "none.csv"), "No such file"),
        ((path, "--train", other), "its metrics are not those"),
        ((path, "--train-until", "soon"), "--train-until: 'soon'"),
        ((path, "--output", tmp_path / "none" / "out.csv"), "No such file"),
    ):
        assert run(*arguments) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(path, "--train", other, "--train-until", "1")


def test_the_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(20)
    lines = scored(tmp_path, rows)
    monkeypatch.setattr("sys.stdin", io.StringIO((tmp_path / "in.csv").read_text()))
    assert run("-", "--output", tmp_path / "again.csv") == 0
    assert (tmp_path / "again.csv").read_text().splitlines() == lines


@pytest.mark.full
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    peaks = []
    for count in (300, 2000):
        path = file_of(tmp_path, rows_of(count))
        tracemalloc.start()
        assert run(path, "--output", tmp_path / "out.csv") == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000


def test_a_recording_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, train = file_of(tmp_path, rows_of(300)), file_of(tmp_path, rows_of(200), "train.csv")
    (tmp_path / "link.csv").symlink_to(kept)
    before = kept.read_bytes(), train.read_bytes()
    for output in (kept, train, tmp_path / "link.csv"):
        assert run(kept, "--train", train, "--output", output) == 2
        assert "is a recording that is read" in capsys.readouterr().err
    assert (kept.read_bytes(), train.read_bytes()) == before
