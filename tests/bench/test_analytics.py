"""`make bench-analytics` works from end to end with little of everything; yardsticks are what they say they are."""

import asyncio
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from bench.__main__ import Progress
from bench.analytics import command, exhaustion_row, forecast_row, operating_row, scored, yardsticks
from bench.analytics.limits import at_least, at_most, between
from bench.analytics.recordings import JUDGE, Labelled
from bench.analytics.rows import ROWS
from bench.analytics.size import QUICK
from bench.api import reported
from tests.harness.data import recording

TINY = replace(QUICK, learnt=700, tested=800)
OF_RECORDINGS = ("detection", "operating", "forecast")
OF_NOTHING = ("exhaustion", "cost")
OF_THE_SIMULATOR = ("quiet", "scenarios", "restart")
"""See test_simulated."""


async def measured(folder: Path, *only: str) -> Any:
    """The report as it is written and read again."""
    found = await asyncio.to_thread(command.run, TINY, only, folder, Progress())
    return orjson.loads(orjson.dumps(found))


@pytest.mark.full
@pytest.mark.timeout(60)
async def test_every_row_runs_on_recordings(tmp_path: Path) -> None:
    recording(JUDGE)
    found = await measured(tmp_path, *OF_RECORDINGS)
    assert [row["row"] for row in found["table"]] == ["detection"] * 6 + ["operating"] * 3 + ["forecast"] * 3
    assert not [result["void"] for result in found["results"].values() if "void" in result]
    for row in found["table"]:
        assert row["row"] == "detection" or (row["ratio"] is not None and math.isfinite(row["ratio"])), row
    assert set(found["results"]["detection"]["yardsticks"]) == {"k-means", "EWMA"}
    assert found["results"]["forecast"]["origins"] == [3, 3]
    assert "| bitbrains-20, CPU and memory, 7 days ahead, MASE | as 24 h before |" in reported.show(found)


@pytest.mark.timeout(60)
async def test_rows_without_recordings_say_so_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENMANAGER_TEST_DATA", str(tmp_path))
    assert sorted(ROWS) == sorted(OF_RECORDINGS + OF_NOTHING + OF_THE_SIMULATOR)
    found = await measured(tmp_path, *OF_RECORDINGS, *OF_NOTHING)
    told = {row["row"]: row["note"] for row in found["table"] if row["met"] is None}
    assert set(told) == set(OF_RECORDINGS)
    assert all(note.startswith("not measured: the recordings are neither") for note in told.values())
    assert {row["row"] for row in found["table"] if row["ratio"] is not None} == set(OF_NOTHING)
    assert not [result for result in found["results"].values() if "void" in result]


async def test_a_difference_from_the_command_voids_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording(JUDGE)
    real = scored.score

    def other(server: Labelled) -> scored.Scored:
        one = real(server)
        return replace(one, scores=one.scores + 1e-5)

    monkeypatch.setattr(scored, "score", other)
    found = await measured(tmp_path, "detection")
    assert "the command prints" in found["results"]["detection"]["void"]
    assert found["table"][0]["note"].startswith("void: ")


def test_limits_are_met_or_missed_by_so_much() -> None:
    assert at_most("row", "work", "share", 0.0, 0.01).met
    missed = at_most("row", "work", "share", 0.32, 0.21)
    assert not missed.met and missed.note == "misses: 0.32 instead of 0.21"
    assert at_least("row", "work", "share", 0.8, 0.8).met
    assert [between("row", "work", "share", ours, 0.74, 0.88).met for ours in (0.7, 0.74, 0.8, 0.88, 0.9)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert at_most("row", "work", "share", math.nan, 1.0).met is None


def test_the_quietest_and_the_loudest_server_are_judged() -> None:
    servers = {
        "smd-a": {"kind": "smd", "false_a_day": 0.1, "events": 10, "found": 5},
        "asd-b": {"kind": "asd", "false_a_day": 1.0, "events": 2, "found": 2},
    }
    least, most, recall = operating_row.judged({"servers": servers})
    assert (least.met, most.met, recall.met) == (False, True, True)
    assert recall.ours == 0.75  # each set weighs the same


def test_yardsticks_do_not_look_ahead_and_see_what_stands_out() -> None:
    rng = np.random.default_rng(1)
    values = np.sin(np.arange(600) / 20)[:, None] + 0.1 * rng.standard_normal((600, 7))
    values[500:503] += 8
    later = values.copy()
    later[550:] = rng.standard_normal((50, 7)) * 100
    for whole, other in (
        (yardsticks.kmeans(values, 300), yardsticks.kmeans(later, 300)),
        (yardsticks.ewma(values), yardsticks.ewma(later)),
    ):
        for setting, scores in whole.items():
            np.testing.assert_array_equal(scores[:550], other[setting][:550])
            assert 499 < int(scores[100:].argmax()) + 100 < 510, setting


def test_kmeans_scores_are_those_of_the_plain_calculation() -> None:
    rng = np.random.default_rng(2)
    points = rng.standard_normal((50, 3, yardsticks.LAGS))
    centres, (low, high) = yardsticks._model(points)
    found = yardsticks._least(points, centres[None], np.stack((low, high))[None])
    for series in range(3):
        mean = [np.mean([np.linalg.norm(one - centre[series]) for centre in centres]) for one in points[:, series]]
        np.testing.assert_allclose(found[:, series], (np.array(mean) - min(mean)) / (max(mean) - min(mean)), atol=1e-12)
        nearer = [np.argmin([np.linalg.norm(one - centre[series]) for centre in centres]) for one in points[:, series]]
        for place in (0, 1):
            members = points[[near == place for near in nearer], series]
            np.testing.assert_allclose(centres[place, series], members.mean(axis=0))


def test_predict_linear_and_the_naive_forecast_are_what_they_say() -> None:
    assert exhaustion_row.predict_linear(50 + np.arange(200) / 24, 168) == pytest.approx((40 - 199 / 24), rel=1e-6)
    assert exhaustion_row.predict_linear(50 - np.arange(200) / 24, 6) == math.inf
    history = np.arange(72.0)[None].repeat(2, axis=0)
    history[1, 50] = np.nan
    found = forecast_row.as_24_hours_before(history, 30)
    np.testing.assert_array_equal(found[0], [*range(48, 72), *range(48, 54)])
    assert found[1, 2] == 26
