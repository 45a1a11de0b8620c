"""Small recordings of a machine, as `python -m bench record-host` writes them."""

from pathlib import Path

import numpy as np

from bench.host import Recorder
from fleet.model import Metric, MetricKind, MetricSet

FULL_SET = MetricSet(
    (
        Metric(name="cpu_usage", unit="%", kind=MetricKind.GAUGE),
        Metric(name="disk_reads", kind=MetricKind.COUNTER, labels=(("disk", "sda"),)),
        Metric(name="disk_reads", kind=MetricKind.COUNTER, labels=(("disk", "sdb"),)),
    )
)
OTHER_SET = MetricSet((*FULL_SET.metrics[:2], Metric(name="filesystem_usage", labels=(("mount", '/a "b"'),))))
START_MS = 1_760_000_000_000


def recording(path: Path, ticks: int, interval_ms: int) -> Path:
    """So many ticks, a disk replaced by a mount in the middle; four series, one value is not there."""
    recorder = Recorder(path)
    values = np.random.default_rng(3).normal(50, 5, (ticks, 3)).round(2)
    values[1, 0] = np.nan
    for tick in range(ticks):
        metric_set = FULL_SET if tick < ticks // 2 else OTHER_SET
        recorder.add(metric_set, START_MS + tick * interval_ms, values[tick])
    recorder.save()
    return path
