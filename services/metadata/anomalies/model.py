"""A finding as callers get it: what its detector told last, and what people said of it last.

Parts of it may come from PostgreSQL and from the journal, in any order and more than once. What must stay true: put
together they give the same whatever the order is.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

from fleet.anomaly import Anomaly, anomaly_to_pb
from fleet.codec import timestamp_from_us
from openmanager.fleet.v1 import anomaly_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class Remark:
    """That somebody said something of a finding.

    Attributes:
        is_real: whether something was wrong; None: that they take care of it.
        time_us: microseconds since the Unix epoch; no two are of the same.
    """

    anomaly_id: str
    author: str
    comment: str
    time_us: int
    is_real: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What is known of a finding.

    Attributes:
        anomaly: as its detector told it last; None where only remarks are known.
        told_us: when that was recorded.
        acknowledged, verdict: the latest remark of each kind.
    """

    anomaly: Anomaly | None = None
    told_us: int = 0
    acknowledged: Remark | None = None
    verdict: Remark | None = None

    @property
    def changed_us(self) -> int:
        """When any of it changed last."""
        said = (0 if one is None else one.time_us for one in (self.acknowledged, self.verdict))
        return max(self.told_us, *said)

    @property
    def place(self) -> tuple[int, str]:
        """Its place in listings, which are descending; microseconds and id."""
        assert self.anomaly is not None
        return self.anomaly.start_ms * 1_000, self.anomaly.id

    def joined(self, other: "Recorded | None") -> Self:
        """With what another place knows."""
        if other is None:
            return self
        told: Recorded = self if _rank(self) >= _rank(other) else other
        return replace(
            self,
            anomaly=told.anomaly,
            told_us=told.told_us,
            acknowledged=_latest(self.acknowledged, other.acknowledged),
            verdict=_latest(self.verdict, other.verdict),
        )

    def to_pb(self) -> pb.Anomaly:
        """As callers get it."""
        assert self.anomaly is not None
        message = anomaly_to_pb(self.anomaly)
        message.update_time.CopyFrom(timestamp_from_us(self.changed_us))
        if self.acknowledged is not None:
            message.acknowledgement.CopyFrom(_remark_to_pb(self.acknowledged))
        if self.verdict is not None:
            real, false = pb.ANOMALY_VERDICT_REAL, pb.ANOMALY_VERDICT_FALSE
            message.verdict = real if self.verdict.is_real else false
            message.verdict_remark.CopyFrom(_remark_to_pb(self.verdict))
        return message


def of_remark(remark: Remark) -> Recorded:
    """What is known by a remark alone."""
    return Recorded(acknowledged=remark) if remark.is_real is None else Recorded(verdict=remark)


def together(parts: Iterable[tuple[str, Recorded]]) -> dict[str, Recorded]:
    """What is known of each finding, by its id."""
    known: dict[str, Recorded] = {}
    for anomaly_id, part in parts:
        known[anomaly_id] = part.joined(known.get(anomaly_id))
    return known


def _rank(known: Recorded) -> tuple[bool, bool, int]:
    return (False, False, 0) if known.anomaly is None else (True, *known.anomaly.rank)


def _latest(one: Remark | None, other: Remark | None) -> Remark | None:
    said = [remark for remark in (one, other) if remark is not None]
    return max(said, key=lambda remark: remark.time_us, default=None)


def _remark_to_pb(remark: Remark) -> pb.AnomalyRemark:
    return pb.AnomalyRemark(author=remark.author, comment=remark.comment, time=timestamp_from_us(remark.time_us))
