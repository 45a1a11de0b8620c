"""This machine's own metrics as a data set: what is recorded is what is replayed, and times are stretched openly."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench import host
from bench.peers import BenchError
from tests.bench.recordings import FULL_SET, OTHER_SET, START_MS, recording


async def test_this_machine_is_recorded_and_read_again(tmp_path: Path) -> None:
    path, told = tmp_path / "host.npz", []
    await host.record(path, ticks=3, interval_s=0.1, say=told.append)
    assert [one.name for one in tmp_path.iterdir()] == ["host.npz"], "nothing half-written is left"
    with np.load(path) as file:
        assert set(file.files) == {"metrics_0", "times_0", "values_0"}
        metrics, times, values = json.loads(file["metrics_0"].tobytes()), file["times_0"], file["values_0"]
    assert times.dtype == np.int64
    assert (np.diff(times) >= 100).all()
    assert values.shape == (3, len(metrics))
    assert ["cpu_usage", "%", 1, []] in metrics
    parts = list(host.read(path).parts())
    assert np.array_equal(np.concatenate([part.values for part in parts]), values, equal_nan=True)
    assert "3 ticks" in told[-1]
    with pytest.raises(BenchError, match="is there already"):
        await host.record(path, ticks=3, interval_s=0.1, say=told.append)


def test_a_recording_of_1_s_is_replayed_as_10_s_and_says_so(tmp_path: Path) -> None:
    found = host.read(recording(tmp_path / "host.npz", 50, 1_000))
    assert found.remark == "0.1 h, recorded every 1 s, replayed as every 10 s"
    times = np.concatenate([part.times_ms for part in found.parts()])
    assert (np.diff(times) == 10_000).all()
    assert times[-1] == START_MS + 49 * 1_000, "the end stays, so that nothing lies in the future"
    assert [part.metric_set for part in found.parts()] == [FULL_SET, OTHER_SET]


def test_a_recording_of_10_s_keeps_its_times(tmp_path: Path) -> None:
    found = host.read(recording(tmp_path / "host.npz", 361, 10_000))
    assert found.remark == "1.0 h, recorded every 10 s"
    assert next(found.parts()).times_ms[0] == START_MS


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"times_0"])
def test_what_is_no_recording_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "host.npz"
    path.write_bytes(content)
    with pytest.raises(BenchError, match=r"host\.npz is no recording"):
        host.read(path)
