"""How much of what was labelled is found, on a part of the recordings; docs/accuracy.md has all of them."""

import importlib.util
from types import ModuleType

import numpy as np
import pytest

from services.analytics.scoring.server import FleetScorer
from tests.harness.data import recording

START_S = 1_600_041_600.0
SERVERS = ("asd-omi-1", "asd-omi-2", "asd-omi-3", "asd-omi-4", "asd-omi-5", "asd-omi-6")
STEP_S = 300.0
A_DAY = 288


pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def judge() -> ModuleType:
    spec = importlib.util.spec_from_file_location("score_events", recording("score_events.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def found() -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """(scores, alarms, labels) of the test part of each server, learnt on its train part without labels."""
    recordings = [np.load(recording(f"{name}.npz")) for name in SERVERS]
    rows = [np.concatenate((one["train"], one["test"])).astype(float) for one in recordings]
    values = np.concatenate(rows, axis=1)
    learnt = len(recordings[0]["train"])
    scorer = FleetScorer([one.shape[1] for one in rows])
    windows = [scorer.update(START_S + place * STEP_S, row) for place, row in enumerate(values)]
    scores = np.array([window.score for window in windows])[learnt:]
    alarms = np.array([window.alarm for window in windows])[learnt:]
    places = range(len(SERVERS))
    return [scores[:, at] for at in places], [alarms[:, at] for at in places], [one["label"] for one in recordings]


def test_events_found_with_one_level_for_all(judge: ModuleType, found: tuple[list[np.ndarray], ...]) -> None:
    scores, _, labels = found
    best = judge.score(scores, labels, A_DAY)
    assert best[1.0][0] >= 0.87 and best[0.25][0] >= 0.66, best  # measured: .92 and .74


def test_the_shipped_alarm_of_every_server(judge: ModuleType, found: tuple[list[np.ndarray], ...]) -> None:
    _, alarms, labels = found
    events = hits = 0
    for alarm, label in zip(alarms, labels, strict=True):
        false_a_day = judge.false_alarms(alarm, label, A_DAY) / (len(label) / A_DAY)
        assert 0.3 <= false_a_day <= 2.0
        spans = judge.events(label)
        events += len(spans)
        hits += sum(bool(alarm[first : last + 1].any()) for first, last in spans)
    assert hits / events >= 0.82  # measured: .89
