"""kill -9 of a real process at random moments: every acknowledged row is there, once. `make crash` is the long form.

crash_writer.py is the process, crash.py what kills it and looks at what it leaves.
"""

import random
from pathlib import Path

import pytest

from tests.timeseries.engine.crash import LIVES_AT_MOST_S, Tally, crash
from tests.timeseries.engine.crash_writer import PLANTS

ROUNDS, PER_STORE = 10, 5
MOST_ATTEMPTS = 4
"""What it is doing when it dies is chance; a slow machine gets less done in a life."""
TRIES = 20
DIE_OF_IT_WITHIN_S = {"marks go first": 60.0, "old blocks go first": 60.0}
"""These end their process themselves, where they do harm; it is waited for, however slow the machine."""
KINDS_OF = {"old blocks go first": ("sparse",)}
"""Where few files are merged all the time."""
EFFECTS = {
    "acknowledge first": ("missing", "was acknowledged as"),
    "sweep past heads": ("missing", "never shipped"),
    "replay everything": ("there twice",),
    "marks go first": ("rolled up",),
    "old blocks go first": ("missing", "rolled up"),
}


def ignore(_tally: Tally) -> None:
    """Nobody watches."""


@pytest.mark.timeout(60 * MOST_ATTEMPTS)
async def test_every_acknowledged_row_is_there_once_after_kill_9(tmp_path: Path) -> None:
    died_in: set[str] = set()
    for attempt in range(MOST_ATTEMPTS):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        tally, faults = await crash(folder, ROUNDS, random.randrange(1 << 30), ignore, per_store=PER_STORE)
        assert faults == []
        assert tally.rounds == ROUNDS and tally.batches > ROUNDS and tally.points > 0, tally
        died_in |= tally.died_in.keys()
        if died_in & {"roll up", "evict", "merge"} and len(died_in) > 2:
            break
    else:
        raise AssertionError(f"it died in {died_in} only")


@pytest.mark.parametrize("bug", PLANTS)
async def test_a_planted_bug_is_found(tmp_path: Path, bug: str) -> None:
    lives_at_most_s = DIE_OF_IT_WITHIN_S.get(bug, LIVES_AT_MOST_S)
    kinds = KINDS_OF.get(bug, ("age",))
    _, faults = await crash(tmp_path, TRIES, 1, ignore, kinds=kinds, bug=bug, lives_at_most_s=lives_at_most_s)
    assert any(effect in fault for effect in EFFECTS[bug] for fault in faults), faults
