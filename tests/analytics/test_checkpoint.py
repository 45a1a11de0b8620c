"""The checkpoint: what was saved comes back to the bit, and what cannot be used never stops the service."""

import asyncio
import hashlib
import io
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fleet.anomaly import Anomaly
from runtime.clock import ManualClock
from services.analytics import checkpoint
from services.analytics.checkpoint import Checkpointer, CheckpointFile, UnusableCheckpointError
from services.analytics.core import Analysis, Batch, Snapshot
from services.analytics.fleet_detector import FleetDetector
from services.analytics.outbox import Outbox
from tests.analytics.fakes import batch_of, fleet_ticks, same_state, trained_snapshot, trained_state, written
from tests.harness import eventually


def new_analysis(clock: ManualClock | None = None) -> Analysis:
    return Analysis(FleetDetector(), Outbox(), clock or ManualClock())


def batches(ticks: int) -> list[Batch]:
    return [batch_of(rows, sequence) for sequence, rows in enumerate(fleet_ticks(ticks), start=1)]


async def fed(ticks: int) -> Analysis:
    """An analysis that has learnt what is usual, and then seen ticks."""
    analysis = new_analysis()
    analysis.restore(trained_snapshot())
    for batch in batches(ticks):
        await analysis.apply(batch)
    return analysis


def found(analysis: Analysis) -> dict[str, Anomaly]:
    """All that was ever found, as nobody takes it."""
    return {finding.id: finding for finding in analysis.outbox.all()}


def same(left: Analysis, right: Analysis) -> None:
    assert left.next_sequence == right.next_sequence
    assert found(left) == found(right)
    same_state(left.detector.state(), right.detector.state())


@pytest.mark.parametrize("stop_at", [pytest.param(1, marks=pytest.mark.full), 21, 22, 25, 40, 99])
async def test_going_on_from_disk_equals_an_uninterrupted_run(tmp_path: Path, stop_at: int) -> None:
    file = CheckpointFile(tmp_path)
    whole, first, second = await fed(120), await fed(stop_at), new_analysis()
    file.save(await first.snapshot())
    await Checkpointer(file, second, ManualClock(), 30).restore()
    same(second, first)
    for batch in batches(120)[stop_at:]:
        await second.apply(batch)
    assert len(whole.outbox) == 2
    assert all(len(finding.contributions) == 10 for finding in whole.outbox.all())
    same(second, whole)


async def test_a_batch_that_comes_again_whole_or_in_part_changes_nothing() -> None:
    whole, torn = await fed(30), await fed(25)
    for batch in batches(30)[25:]:
        torn.outbox.put(torn.detector.advance(batch.received_ms))
        torn._apply_part(batch, np.array([0, 1]))  # interrupted here
        await torn.apply(batch)
        await torn.apply(batch)
    same(torn, whole)


async def test_what_is_judged_in_a_thread_is_judged_to_its_end_whoever_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.analytics.core.JUDGED_IN_THREAD", 0)
    whole, torn = await fed(40), await fed(10)
    advance, cancelled = torn.detector.advance, 0
    started, may_end = threading.Event(), threading.Event()

    def slow(now_ms: int) -> list[Anomaly]:
        started.set()
        may_end.wait(60)
        return advance(now_ms)

    for batch in batches(40)[10:]:
        if torn.detector.due(batch.received_ms):
            monkeypatch.setattr(torn.detector, "advance", slow)
            started.clear()
            may_end.clear()
            applying = asyncio.create_task(torn.apply(batch))
            await eventually(started.is_set)
            applying.cancel()
            snapshot = asyncio.create_task(torn.snapshot())
            await asyncio.sleep(0)
            applying.cancel()
            await asyncio.sleep(0)
            assert not applying.done()
            assert not snapshot.done()
            may_end.set()
            with pytest.raises(asyncio.CancelledError):
                await applying
            assert (await snapshot).next_sequence == batch.sequence
            cancelled += 1
            monkeypatch.setattr(torn.detector, "advance", advance)
        await torn.apply(batch)
    assert cancelled > 20
    assert len(whole.outbox) == 1
    same(torn, whole)


async def test_a_snapshot_does_not_change_after_it_was_taken() -> None:
    analysis = await fed(24)
    snapshot = await analysis.snapshot()
    content = written(snapshot)
    for batch in batches(40)[24:]:
        await analysis.apply(batch)
    assert written(snapshot) == content


def _cut(content: bytes) -> bytes:
    return content[:-1]


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes((content[middle] ^ 1,)) + content[middle + 1 :]


def _newer(content: bytes) -> bytes:
    return content.replace(b"checkpoint 3 ", b"checkpoint 4 ", 1)


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
    file.save(await (await fed(3)).snapshot())
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
    file, state = CheckpointFile(tmp_path), trained_state()
    for wrong in (
        replace(state, detector="other"),
        replace(state, arrays={**state.arrays, "series.level": state.arrays["series.level"][1:]}),
        replace(state, arrays={name: array for name, array in state.arrays.items() if name != "silence.heard_ms"}),
        replace(state, texts={**state.texts, "servers": state.texts["servers"][1:]}),
    ):
        file.save(Snapshot(next_sequence=5, verdicts_until=0, detector=wrong, waiting=()))
        fresh = new_analysis()
        await Checkpointer(file, fresh, ManualClock(), 30).restore()
        assert (fresh.next_sequence, fresh.detector.state().texts["servers"]) == (0, ())
        assert not file.path.exists()


async def test_a_checkpoint_of_the_detector_before_is_refused_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As version 1 wrote it."""
    buffer = io.BytesIO()
    about = b'{"next_sequence":7,"detector":"ewma","server_ids":["a"],"finding_fields":["id"],"findings":[["x"]]}'
    np.savez(buffer, about=np.frombuffer(about, np.uint8), **{"detector.mean": np.zeros(3)})
    body = buffer.getvalue()
    header = f"{checkpoint.MAGIC} 1 {hashlib.sha256(body).hexdigest()} {len(body)}\n".encode()
    file, analysis = CheckpointFile(tmp_path), new_analysis()
    file.path.write_bytes(header + body)
    await Checkpointer(file, analysis, ManualClock(), 30).restore()
    assert (analysis.next_sequence, len(analysis.outbox)) == (0, 0)
    (record,) = caplog.records
    assert "it is of format 1, not 3" in record.getMessage()
    assert (tmp_path / "checkpoint.unusable").exists()


async def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file, analysis = CheckpointFile(tmp_path), await fed(5)
    keeper = Checkpointer(file, analysis, ManualClock(), 30)
    await keeper.save()
    before = file.path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    analysis.pass_to(7)
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
    assert loaded.next_sequence == 7


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
    file.save(await (await fed(2)).snapshot())
    assert file.path.stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
