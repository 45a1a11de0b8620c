"""The checkpoint: what was saved comes back to the bit, and what cannot be used never stops the service."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from runtime.clock import ManualClock
from services.analytics import checkpoint
from services.analytics.checkpoint import Checkpointer, CheckpointFile, UnusableCheckpointError
from services.analytics.core import Analysis, Batch, Snapshot
from services.analytics.detect import DetectorState, EwmaDetector, EwmaRules
from services.analytics.findings import FindingStore
from services.analytics.follow import parts_of
from tests.analytics.fakes import METRIC_SET, fleet_ticks
from tests.harness import eventually


def new_analysis(clock: ManualClock | None = None) -> Analysis:
    return Analysis(EwmaDetector(EwmaRules()), FindingStore(), clock or ManualClock())


def batches(ticks: int, columns: EwmaDetector) -> list[Batch]:
    return [
        Batch(
            sequence=sequence,
            received_ms=int(rows.times_ms[-1]),
            columns=columns.columns_of(METRIC_SET),
            rows=rows,
            parts=parts_of(rows.server_ids, rows.times_ms),
        )
        for sequence, rows in enumerate(fleet_ticks(ticks), start=1)
    ]


async def fed(ticks: int) -> Analysis:
    analysis = new_analysis()
    for batch in batches(ticks, EwmaDetector(EwmaRules())):
        await analysis.apply(batch)
    return analysis


def same(left: Analysis, right: Analysis) -> None:
    assert left.next_sequence == right.next_sequence
    assert left.findings.all() == right.findings.all()
    mine, other = left.detector.state(), right.detector.state()
    assert mine.server_ids == other.server_ids
    for name, array in mine.arrays.items():
        np.testing.assert_allclose(array, other.arrays[name], rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("stop_at", [1, 30, 102, 105, 113, 299])
async def test_going_on_from_disk_equals_an_uninterrupted_run(tmp_path: Path, stop_at: int) -> None:
    file = CheckpointFile(tmp_path)
    whole, first, second = await fed(400), await fed(stop_at), new_analysis()
    file.save(first.snapshot())
    await Checkpointer(file, second, ManualClock(), 30).restore()
    same(second, first)
    for batch in batches(400, EwmaDetector(EwmaRules()))[stop_at:]:
        await second.apply(batch)
    assert len(whole.findings) == 2
    same(second, whole)


async def test_a_batch_that_comes_again_whole_or_in_part_changes_nothing() -> None:
    whole, torn = await fed(110), await fed(105)
    torn_batches = batches(110, EwmaDetector(EwmaRules()))[105:]
    for batch in torn_batches:
        torn._apply_part(batch, np.array([0, 1]))  # interrupted here
        await torn.apply(batch)
        await torn.apply(batch)
    same(torn, whole)


async def test_a_snapshot_does_not_change_after_it_was_taken() -> None:
    analysis = await fed(104)
    snapshot = analysis.snapshot()
    content = checkpoint.encode(snapshot)
    for batch in batches(120, EwmaDetector(EwmaRules()))[104:]:
        await analysis.apply(batch)
    assert checkpoint.encode(snapshot) == content


def _cut(content: bytes) -> bytes:
    return content[:-1]


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes((content[middle] ^ 1,)) + content[middle + 1 :]


def _newer(content: bytes) -> bytes:
    return content.replace(b"checkpoint 1 ", b"checkpoint 2 ", 1)


def _other_digest(content: bytes) -> bytes:
    digest = content.split(b" ")[2]
    return content.replace(digest, digest[::-1], 1)


def _empty(_content: bytes) -> bytes:
    return b""


def _noise(content: bytes) -> bytes:
    return np.random.default_rng(1).bytes(len(content))


def _longer(content: bytes) -> bytes:
    return content + b"\0"


@pytest.mark.parametrize("damage", [_cut, _flip, _other_digest, _newer, _empty, _noise, _longer])
async def test_an_unusable_checkpoint_is_set_aside_and_told(
    tmp_path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    file = CheckpointFile(tmp_path)
    file.save((await fed(100)).snapshot())
    damaged = damage(file.path.read_bytes())  # type: ignore[operator]
    file.path.write_bytes(damaged)
    with pytest.raises(UnusableCheckpointError):
        file.load()
    analysis = new_analysis()
    keeper = Checkpointer(file, analysis, ManualClock(), 30)
    await keeper.restore()
    assert analysis.next_sequence == 0
    assert "cannot be used" in caplog.text
    assert not file.path.exists()
    assert (tmp_path / "checkpoint.unusable").read_bytes() == damaged
    analysis.pass_to(7)
    await keeper.save()
    loaded = file.load()
    assert loaded is not None
    assert loaded.next_sequence == 7


async def test_a_checkpoint_of_another_detector_is_set_aside(tmp_path: Path) -> None:
    file, analysis = CheckpointFile(tmp_path), await fed(100)
    state = analysis.detector.state()
    for arrays, detector in (
        (state.arrays, "other"),
        ({**state.arrays, "mean": state.arrays["mean"][1:]}, "ewma"),
        ({name: array for name, array in state.arrays.items() if name != "heard_ms"}, "ewma"),
    ):
        wrong = DetectorState(detector=detector, server_ids=state.server_ids, arrays=arrays)
        file.save(Snapshot(next_sequence=5, detector=wrong, findings=()))
        fresh = new_analysis()
        await Checkpointer(file, fresh, ManualClock(), 30).restore()
        assert (fresh.next_sequence, fresh.detector.state().server_ids) == (0, ())
        assert not file.path.exists()


async def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file, analysis = CheckpointFile(tmp_path), await fed(50)
    keeper = Checkpointer(file, analysis, ManualClock(), 30)
    await keeper.save()
    before = file.path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    analysis.pass_to(51 + 1)
    with monkeypatch.context() as patched:
        patched.setattr("services.analytics.checkpoint.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            await keeper.save()
        await keeper.save_last()
    assert "No space left" in caplog.text
    assert file.path.read_bytes() == before
    await keeper.save_last()
    loaded = file.load()
    assert loaded is not None
    assert loaded.next_sequence == 52


async def test_it_saves_once_there_is_a_place_and_then_at_every_interval(tmp_path: Path) -> None:
    clock, file = ManualClock(), CheckpointFile(tmp_path)
    analysis = new_analysis(clock)
    keeper = Checkpointer(file, analysis, clock, 30)

    def saved() -> int:
        snapshot = file.load()
        return 0 if snapshot is None else snapshot.next_sequence

    task = asyncio.create_task(keeper.run())
    try:
        analysis.pass_to(5)
        await eventually(lambda: saved() == 5)
        analysis.pass_to(6)
        await eventually(lambda: clock.sleepers == 1)
        clock.advance(29.9)
        assert saved() == 5
        clock.advance(0.1)
        await eventually(lambda: saved() == 6)
        await eventually(lambda: clock.sleepers == 1)
        written = file.path.stat().st_mtime_ns
        clock.advance(30)  # nothing new
        await eventually(lambda: clock.sleepers == 1)
        assert file.path.stat().st_mtime_ns == written
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_file_is_for_its_owner_only(tmp_path: Path) -> None:
    file = CheckpointFile(tmp_path)
    file.save((await fed(2)).snapshot())
    assert file.path.stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
