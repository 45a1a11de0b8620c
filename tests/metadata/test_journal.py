"""The journal of facts by itself: loss of power, its states, its bounds, and the commands that operators type."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

from runtime.errors import DataLoss, FailedPrecondition, ResourceExhausted
from runtime.local_file import connect
from services.metadata import commands, erasing, interactions
from services.metadata import journal as journal_module
from services.metadata.journal import KEPT_MS, Fact, Journal
from services.metadata.journal_query import Condition, Newest
from services.metadata.store import NewInteraction
from tests.harness.power import Disk
from tests.metadata.service import ROOT

NOW_MS = 1_700_000_000_000
LIMIT = 1 << 30
LOSSES = 25
TRIES = 40


def fact(number: int, text: str = "why?", session: str = "") -> Fact:
    return interactions.checked_fact(NewInteraction(query=text, session_id=session), NOW_MS * 1_000 + number)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "facts.db")


class PowerLostError(Exception):
    """The test has seen enough of this life."""


def lose_power_once(folder: Path, seed: int) -> list[str]:
    """Appends facts until the power goes at a random step; returns what was acknowledged and is not there."""
    rng = random.Random(seed)
    store, left = folder / f"{seed}", folder / f"{seed}-left"
    store.mkdir()
    steps = rng.randrange(20, 400)
    acknowledged: list[str] = []

    def step(_kind: str, _path: Path) -> None:
        nonlocal steps
        steps -= 1
        if steps == 0:
            known = list(acknowledged)
            disk.lose_power(left, random.Random(seed))
            seen.append(known)

    seen: list[list[str]] = []
    disk = Disk(store, step)
    with disk:
        living = Journal(store / "facts.db")
        number = 0
        while not seen:
            group = [fact(number + n, "x" * rng.randrange(3_000)) for n in range(rng.randrange(1, 6))]
            number += len(group)
            living.append(group, LIMIT)
            acknowledged += [one.id for one in group]
            if rng.random() < 0.2:
                waiting = living.waiting(10, 1 << 20)
                living.note_inserted([one.sequence for one in waiting], NOW_MS)
        living.close()
    if not (left / "facts.db").exists():
        return seen[0]
    found = Journal(left / "facts.db")
    missing = [one for one in seen[0] if found.find(interactions.KIND, one) is None]
    found.close()
    return missing


def test_what_was_acknowledged_survives_a_loss_of_power(tmp_path: Path) -> None:
    first = random.randrange(1 << 30)
    for seed in range(first, first + LOSSES):
        assert lose_power_once(tmp_path, seed) == [], f"seed {seed}"


def plant_normal(patches: pytest.MonkeyPatch) -> None:
    def relaxed(path: Path, *, durable: bool = True) -> apsw.Connection:
        made = connect(path, durable=False)
        assert durable
        return made

    patches.setattr(journal_module, "connect", relaxed)


def plant_unsynced_name(patches: pytest.MonkeyPatch) -> None:
    patches.setattr("runtime.local_file.sync_folder", lambda _folder: None)
    patches.setattr("tests.harness.power.Disk.folder_synced", lambda _disk, _path: None)


@pytest.mark.parametrize("plant", [plant_normal, plant_unsynced_name])
def test_the_check_finds_an_acknowledgement_before_the_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    assert any(lose_power_once(tmp_path, seed) for seed in range(TRIES))


def test_the_first_id_counts(journal: Journal) -> None:
    first = fact(1)
    other = interactions.checked_fact(NewInteraction(id=first.id, query="other"), NOW_MS * 1_000)
    assert journal.append([first], LIMIT) == [first]
    assert journal.append([other, first], LIMIT) == [first, first]
    assert [waiting.fact for waiting in journal.waiting(10, LIMIT)] == [first]
    assert journal.append([fact(2)], 1)[0].__class__ is ResourceExhausted
    assert journal.append([other], 1) == [first], "known already, so it needs no room"


def test_what_was_inserted_goes_after_a_day_and_nothing_else(journal: Journal) -> None:
    facts = [fact(n) for n in range(6)]
    journal.append(facts, LIMIT)
    sequences = [waiting.sequence for waiting in journal.waiting(10, LIMIT)]
    journal.note_inserted(sequences[:2], NOW_MS)
    journal.note_inserted(sequences[2:3], NOW_MS + 3_600_000)
    journal.note_refused(sequences[3], "no", NOW_MS)
    assert journal.sweep(NOW_MS + KEPT_MS) == 0
    assert journal.sweep(NOW_MS + KEPT_MS + 1) == 2
    assert journal.sweep(NOW_MS + 100 * KEPT_MS) == 1
    assert journal.backlog()[:3] == (2, facts[4].created_us, 1)
    assert len(journal.dead_letters()) == 1
    journal.append([fact(9)], LIMIT)
    assert journal.waiting(10, LIMIT)[-1].sequence == 7, "no sequence is used again"


def test_another_database_has_what_was_inserted_wait_again(journal: Journal) -> None:
    facts = [fact(n) for n in range(4)]
    journal.append(facts, LIMIT)
    assert journal.begin_identity("one") == 0
    sequences = [waiting.sequence for waiting in journal.waiting(10, LIMIT)]
    journal.note_inserted(sequences[:3], NOW_MS)
    assert journal.begin_identity("one") == 0
    assert journal.begin_identity("two") == 3
    assert [waiting.fact for waiting in journal.waiting(10, LIMIT)] == facts
    assert journal.identity == "two"


def test_batches_are_bounded_in_number_and_bytes(journal: Journal) -> None:
    journal.append([fact(n, "x" * 10_000) for n in range(10)], LIMIT)
    assert len(journal.waiting(4, LIMIT)) == 4
    assert len(journal.waiting(10, 25_000)) == 2
    assert len(journal.waiting(10, 1)) == 1


def test_space_is_given_back(journal: Journal, tmp_path: Path) -> None:
    journal.append([fact(n, "x" * 10_000) for n in range(300)], LIMIT)
    grown = journal.used_bytes
    journal.note_inserted([waiting.sequence for waiting in journal.waiting(1_000, LIMIT)], NOW_MS)
    journal.sweep(NOW_MS + 2 * KEPT_MS)
    assert journal.used_bytes < grown / 10
    journal.close()
    assert (tmp_path / "facts.db").stat().st_size < grown / 2


def test_reading_newest_first_by_subject(journal: Journal) -> None:
    facts = [fact(n, session=f"s{n % 3}") for n in range(30)]
    journal.append(facts, LIMIT)
    wanted = Newest(interactions.KIND, (Condition("subject = ?", "s1"),))
    expected = [one for one in reversed(facts) if one.subject == "s1"]
    assert journal.newest(wanted, None, 100) == expected
    assert journal.newest(wanted, (expected[3].created_us, expected[3].id), 2) == expected[4:6]
    assert journal.count(wanted) == 10
    sequences = [waiting.sequence for waiting in journal.waiting(100, LIMIT)]
    journal.note_inserted(sequences[:20], NOW_MS)
    assert journal.count(wanted) == 3
    assert journal.count(wanted._replace(unwritten=False)) == 10


def test_what_postgresql_lacks_is_found_without_looking_at_what_it_has(journal: Journal) -> None:
    """An installation that is used has a day's worth of facts in here."""
    journal.append([fact(number, session=f"s{number % 9}") for number in range(5_000)], LIMIT)
    journal.note_inserted(range(1, 5_001), NOW_MS)
    journal.append([fact(5_001, session="s1")], LIMIT)
    steps = 0

    def thousand() -> bool:
        nonlocal steps
        steps += 1
        return False

    kind, of_session = interactions.KIND, (Condition("subject = ?", "s1"),)
    reads: dict[str, Callable[[], object]] = {
        "first waiting": lambda: journal.first_waiting(kind),
        "last waiting": lambda: journal.last_waiting(kind),
        "unwritten": lambda: len(journal.unwritten(kind)),
        "count": lambda: journal.count(Newest(kind)),
        "count of one session": lambda: journal.count(Newest(kind, of_session)),
        "newest": lambda: len(journal.newest(Newest(kind, of_session), None, 10)),
        "first ids": lambda: len(journal.first_ids(Newest(kind), 10)),
        "to be erased": lambda: len(erasing.unwritten(journal.db, kind, "s1")),
    }
    journal.db.set_progress_handler(thousand, 1_000)
    for name, read in reads.items():
        assert read() in {1, 5_001}, name
        assert steps == 0, name
    journal.count(Newest(kind, unwritten=False))
    assert steps > 0


def test_a_file_that_is_none_or_anothers_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "facts.db"
    path.write_bytes(b"nothing of a database" * 300)
    with pytest.raises(DataLoss, match=r"facts\.db is damaged"):
        Journal(path)
    path.unlink()
    Journal(path).close()
    with apsw.Connection(str(path)) as db:
        db.execute("UPDATE meta SET value = 99 WHERE key = 'format_version'")
    db.close()
    with pytest.raises(FailedPrecondition, match="format 99"):
        Journal(path)


class Commands:
    """Commands as typed, in this process: starting one takes two seconds."""

    def __init__(self, data_dir: Path, patches: pytest.MonkeyPatch, printed: pytest.CaptureFixture[str]) -> None:
        patches.setenv("DATA_DIR", str(data_dir))
        self._printed = printed

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, what was printed, what was complained of."""
        try:
            status = commands.main(arguments)
        except SystemExit as ended:
            status = int(str(ended.code))
        return status, *self._printed.readouterr()


def test_dead_letters_are_listed_retried_and_dropped_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = Commands(tmp_path, monkeypatch, capsys)
    status, _, complaint = command("dead-letters", "list")
    assert (status, "DATA_DIR" in complaint) == (1, True)
    (tmp_path / "metadata").mkdir()
    journal = Journal(tmp_path / "metadata" / "facts.db")
    facts = [fact(n, f"secret words {n}") for n in range(3)]
    journal.append(facts, LIMIT)
    for waiting in journal.waiting(10, LIMIT):
        journal.note_refused(waiting.sequence, "CheckViolationError: forbidden", NOW_MS)
    status, listed, _ = command("dead-letters", "list")
    assert status == 0
    for text in (
        *(one.id for one in facts),
        "CheckViolationError: forbidden",
        "2023-11-14T22:13:20Z",
        "3 dead letters",
    ):
        assert text in listed
    assert "secret words" not in listed
    assert "secret words 2" in command("dead-letters", "list", "--payload")[1]
    status, _, complaint = command("dead-letters", "retry", facts[0].id, "none-such")
    assert (status, "none-such" in complaint) == (1, True)
    assert [waiting.fact for waiting in journal.waiting(10, LIMIT)] == facts[:1]
    status, dropped, _ = command("dead-letters", "drop", facts[1].id)
    assert (status, "secret words 1" in dropped) == (0, True)
    assert journal.find(interactions.KIND, facts[1].id) is None
    assert command("dead-letters", "drop")[0] == 2
    assert command("dead-letters", "retry", "--all")[0] == 0
    assert [waiting.fact for waiting in journal.waiting(10, LIMIT)] == [facts[0], facts[2]]
    assert journal.dead_letters() == []
    journal.close()


def test_the_command_line_says_how_it_is_used() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "services.metadata", "dead-letters", "--help"],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", "PATH": os.environ["PATH"]},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "examples:" in shown.stdout
    assert "dead-letters retry --all" in shown.stdout
