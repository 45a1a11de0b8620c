"""A finding, as its detector tells it and as it is recorded: a stretch of time in which a server was not as usual.

What must stay true: a finding has the same id whenever and wherever it is found; of what is told of it the later
revision holds, and one with an end holds against any without, in whatever order they come.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Final, Self

from fleet.codec import ms_from_timestamp, timestamp_from_ms
from openmanager.fleet.v1 import anomaly_pb2 as pb

ID_CHARACTERS: Final = 32
"""Of a finding's id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """How one metric had a part in a finding.

    Attributes:
        value: its mean over the minute of the peak, in the metric's unit; of a counter, its rate a second.
        expected_low, expected_high: the range that was expected then.
        score: how far from normal that was, 0 to 1.
    """

    metric: str
    value: float
    expected_low: float
    expected_high: float
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Anomaly:
    """A finding; times are milliseconds since the Unix epoch.

    Attributes:
        metric: the metric that departed furthest; empty where the server fell silent.
        start_ms, end_ms: when it was abnormal; end_ms is None while it goes on.
        peak_ms: when it was furthest from normal.
        score: how far that was, 0 to 1.
        value: what was measured then, in the metric's unit; where the server fell silent, for how many seconds.
        expected_low, expected_high: the range that was expected then.
        contributions: the metrics that were most abnormal then, most abnormal first.
        revision: how often it has been told, from 1.
    """

    id: str
    server_id: str
    metric: str
    start_ms: int
    end_ms: int | None
    peak_ms: int
    score: float
    value: float
    expected_low: float
    expected_high: float
    detector: str
    contributions: tuple[Contribution, ...] = ()
    revision: int = 1

    @property
    def rank(self) -> tuple[bool, int]:
        """Of two that tell of the same finding the one with the higher rank holds."""
        return self.end_ms is not None, self.revision

    def changed(self, **fields: Any) -> Self:
        """The next revision, with other values."""
        return replace(self, revision=self.revision + 1, **fields)


def finding_id(server_id: str, detector: str, start_ms: int) -> str:
    """32 hexadecimal digits made from what a finding is about; neither text can hold a NUL."""
    about = "\0".join((server_id, detector, str(start_ms)))
    return hashlib.sha256(about.encode()).hexdigest()[:ID_CHARACTERS]


def anomaly_to_pb(anomaly: Anomaly) -> pb.Anomaly:
    """Encodes a finding, of which nobody has said anything."""
    return pb.Anomaly(
        id=anomaly.id,
        server_id=anomaly.server_id,
        metric=anomaly.metric,
        start_time=timestamp_from_ms(anomaly.start_ms),
        end_time=None if anomaly.end_ms is None else timestamp_from_ms(anomaly.end_ms),
        peak_time=timestamp_from_ms(anomaly.peak_ms),
        score=anomaly.score,
        value=anomaly.value,
        expected_low=anomaly.expected_low,
        expected_high=anomaly.expected_high,
        detector=anomaly.detector,
        contributions=[
            pb.AnomalyContribution(
                metric=part.metric,
                value=part.value,
                expected_low=part.expected_low,
                expected_high=part.expected_high,
                score=part.score,
            )
            for part in anomaly.contributions
        ],
        revision=anomaly.revision,
    )


def anomaly_from_pb(message: pb.Anomaly) -> Anomaly:
    """Decodes a finding, without what people said of it."""
    return Anomaly(
        id=message.id,
        server_id=message.server_id,
        metric=message.metric,
        start_ms=ms_from_timestamp(message.start_time),
        end_ms=ms_from_timestamp(message.end_time) if message.HasField("end_time") else None,
        peak_ms=ms_from_timestamp(message.peak_time),
        score=message.score,
        value=message.value,
        expected_low=message.expected_low,
        expected_high=message.expected_high,
        detector=message.detector,
        contributions=tuple(
            Contribution(
                metric=part.metric,
                value=part.value,
                expected_low=part.expected_low,
                expected_high=part.expected_high,
                score=part.score,
            )
            for part in message.contributions
        ),
        revision=message.revision,
    )
