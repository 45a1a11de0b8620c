"""Series that say the same thing: how they are weighed in turns that cost little."""

import numpy as np
import pytest

from services.analytics.scoring import copies as module
from services.analytics.scoring import parameters as p
from services.analytics.scoring.copies import Copies, turns

SIZES = (511, 0, 1, 700, 20_000)
STARTS = np.concatenate(([0], np.cumsum(SIZES)))


def learnt(starts: np.ndarray) -> Copies:
    """With sketches of which every third is a copy of the one before."""
    copies = Copies(starts)
    sketch = np.random.default_rng(1).standard_normal(copies.state.sketch.shape)
    sketch[:, 2::3] = -3 * sketch[:, 1::3][:, : sketch[:, 2::3].shape[1]]
    copies.state.sketch[:] = sketch
    copies.state.count[:] = p.LEARN_WINDOWS
    return copies


def test_no_turn_compares_more_than_it_may_and_all_have_one() -> None:
    parts = list(turns(STARTS))
    for server, part in parts:
        assert (server.stop - server.start) * (part.stop - part.start) <= module._COMPARED
        assert server.start <= part.start < part.stop <= server.stop
    weighed = np.concatenate([np.arange(part.start, part.stop) for _, part in parts])
    assert np.array_equal(weighed, np.arange(STARTS[-1]))
    assert [part for _, part in parts[:2]] == [slice(0, 511), slice(511, 512)], "a server of 511 series has one"


def test_weights_found_in_parts_are_those_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = np.array([0, 40, 340])
    weights = []
    for compared in (1 << 30, 2_000):
        monkeypatch.setattr(module, "_COMPARED", compared)
        copies = learnt(starts)
        for server, part in turns(starts):
            copies._weigh(server, part)
        weights.append(copies.state.weight)
    assert len(list(turns(starts))) == 51
    assert np.array_equal(*weights)
    assert set(weights[0]) == {0.5, 1.0}
