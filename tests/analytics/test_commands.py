"""`python -m services.analytics COMMAND` as a process: what all commands have in common."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = (
    ["score"],
    pytest.param(["forecast"], marks=pytest.mark.full),
    pytest.param(["exhaust", "--metric", "cpu_usage", "--limit", "90"], marks=pytest.mark.full),
)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "services.analytics", *map(str, arguments)]


def recording(folder: Path, rows: int) -> Path:
    path = folder / "some.csv"
    lines = (f"{1_750_032_000 + row * 60},{row % 97}" for row in range(rows))
    path.write_text("\n".join(["timestamp,cpu_usage", *lines]) + "\n")
    return path


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_whoever_reads_may_leave(arguments: list[str], tmp_path: Path) -> None:
    running = subprocess.Popen(
        command(*arguments, recording(tmp_path, 3_000)), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    assert running.stderr.read() == b""
    assert running.wait(30) == 0
    running.stderr.close()


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_a_damaged_file_is_told_in_one_line(arguments: list[str], tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(recording(tmp_path, 3_000).read_bytes()))
    whole[10:14] = b"\xff" * 4  # no kind of block that there is
    damaged = tmp_path / "damaged.csv.gz"
    damaged.write_bytes(whole)
    done = subprocess.run(command(*arguments, damaged), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert "damaged.csv.gz: row 1: it cannot be read" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_the_standard_input_is_read_as_files_are(arguments: list[str], tmp_path: Path) -> None:
    text = recording(tmp_path, 300).read_bytes()
    answers = [
        subprocess.run(command(*arguments, "-"), input=given, capture_output=True, check=False)
        for given in (text, b"\xef\xbb\xbf" + text, text + b"\xe4,1\n")
    ]
    assert [done.returncode for done in answers] == [0, 0, 2]
    assert answers[1].stdout == answers[0].stdout
    assert answers[2].stderr.decode().endswith("it is not UTF-8\n")


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
@pytest.mark.parametrize("rows", [3, 3_000])
def test_an_output_that_is_full_is_told_in_one_line(arguments: list[str], rows: int, tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command(*arguments, recording(tmp_path, rows)), stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (2, "the standard output: No space left on device\n")


@pytest.mark.parametrize("arguments", [["score", "--per-metric"], ["forecast"]], ids=lambda arguments: arguments[0])
def test_names_are_written_as_they_are_read_whatever_the_locale(arguments: list[str], tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text("timestamp,größe\n1750032000,1\n", encoding="utf-8")
    narrow = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command(*arguments, path), capture_output=True, env=narrow, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "größe" in done.stdout.decode("utf-8")


def test_a_closed_standard_input_is_told_in_one_line() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *command("score", "-")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "score: -: the standard input is closed\n")
