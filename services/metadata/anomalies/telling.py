"""Findings and remarks as facts, and back.

The id of a fact says what it is of, `<finding>/<revision>`, with a dot where it has an end, and `<finding>/<uuid>`, so
that the journal finds all that was told of a finding, and sending the same again is known. What must stay true: what
is not finite is NULL in the table, and NaN again outside.
"""

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final
from uuid import uuid4

import orjson

from fleet.anomaly import ID_CHARACTERS, Anomaly, Contribution, finding_id
from fleet.validation import MAX_TIME_MS
from runtime.errors import InvalidArgument
from services.metadata import checks
from services.metadata.anomalies.model import Recorded, Remark, of_remark
from services.metadata.journal import Fact
from services.metadata.kinds import ANOMALY, ANOMALY_REMARK
from services.metadata.queries import instant_of, microseconds_of

TOLD: Final = ANOMALY.name
SAID: Final = ANOMALY_REMARK.name

MAX_CONTRIBUTIONS: Final = 10
MAX_DETECTOR_CHARACTERS: Final = 63
MAX_METRIC_BYTES: Final = 128 << 10
"""An identity with 32 labels of 1 KiB, and as many values, may be that long where much is escaped."""
MAX_AUTHOR_CHARACTERS: Final = 512
MAX_REVISION: Final = (1 << 31) - 1
TIMES: Final = ("started_at", "ended_at", "peaked_at")
_NUMBERS: Final = ("value", "expected_low", "expected_high")


def check_anomaly(anomaly: Anomaly, field: str) -> Anomaly:
    """Refuses what no detector tells; raises InvalidArgument naming the field."""
    checks.check_server_id(anomaly.server_id, f"{field}.server_id")
    checks.check_text(anomaly.detector, f"{field}.detector", max_characters=MAX_DETECTOR_CHARACTERS)
    if anomaly.id != finding_id(anomaly.server_id, anomaly.detector, anomaly.start_ms):
        raise InvalidArgument("is not that of its server, detector and start", field=f"{field}.id")
    for name in ("start", "peak", "end"):
        time_ms = getattr(anomaly, f"{name}_ms")
        if time_ms is not None and not 0 <= time_ms <= MAX_TIME_MS:
            raise InvalidArgument("is no time from 1970 to 2262", field=f"{field}.{name}_time")
    if anomaly.end_ms is not None and anomaly.end_ms < anomaly.start_ms:
        raise InvalidArgument("lies before the start", field=f"{field}.end_time")
    if len(anomaly.contributions) > MAX_CONTRIBUTIONS:
        raise InvalidArgument(f"are more than {MAX_CONTRIBUTIONS}", field=f"{field}.contributions")
    parts = [(anomaly.metric, anomaly.score), *((part.metric, part.score) for part in anomaly.contributions)]
    for metric, score in parts:
        checks.check_text(metric, f"{field}.metric", max_bytes=MAX_METRIC_BYTES)
        if not 0.0 <= score <= 1.0:
            raise InvalidArgument("lies outside of 0 to 1", field=f"{field}.score")
    if not 1 <= anomaly.revision <= MAX_REVISION:
        raise InvalidArgument(f"lies outside of 1 to {MAX_REVISION}", field=f"{field}.revision")
    return anomaly


def check_id(anomaly_id: str, field: str = "id") -> str:
    """The id of a finding, which there need not be."""
    if len(anomaly_id) != ID_CHARACTERS or set(anomaly_id) - set("0123456789abcdef"):
        raise InvalidArgument(f"is not the id of a finding: {ID_CHARACTERS} hexadecimal digits", field=field)
    return anomaly_id


def told_fact(anomaly: Anomaly, now_us: int) -> Fact:
    """The fact that a detector told a finding."""
    row = {
        "id": anomaly.id,
        "server_id": anomaly.server_id,
        "detector": anomaly.detector,
        "metric": anomaly.metric,
        "started_at": _time(anomaly.start_ms),
        "ended_at": None if anomaly.end_ms is None else _time(anomaly.end_ms),
        "peaked_at": _time(anomaly.peak_ms),
        "contributions": [
            {"metric": part.metric, "score": part.score, **_numbers(part)} for part in anomaly.contributions
        ],
        "score": anomaly.score,
        "revision": anomaly.revision,
        "told_at": instant_of(now_us).isoformat(),
        **_numbers(anomaly),
    }
    is_over = "" if anomaly.end_ms is None else "."
    return Fact(
        kind=TOLD,
        id=f"{anomaly.id}/{anomaly.revision}{is_over}",
        subject=anomaly.server_id,
        created_us=now_us,
        payload=orjson.dumps(row).decode(),
    )


def said_fact(remark: Remark, server_id: str) -> Fact:
    """The fact that somebody said something of a finding."""
    own = str(uuid4())
    row = {
        "id": own,
        "anomaly_id": remark.anomaly_id,
        "author": remark.author,
        "comment": remark.comment,
        "is_real": remark.is_real,
        "said_at": instant_of(remark.time_us).isoformat(),
    }
    return Fact(
        kind=SAID,
        id=f"{remark.anomaly_id}/{own}",
        subject=server_id,
        created_us=remark.time_us,
        payload=orjson.dumps(row).decode(),
    )


def part_of(fact: Fact) -> tuple[str, Recorded]:
    """The finding that a fact is about, and what it tells of it."""
    row = orjson.loads(fact.payload)
    if fact.kind == SAID:
        remark = Remark(
            anomaly_id=row["anomaly_id"],
            author=row["author"],
            comment=row["comment"],
            time_us=fact.created_us,
            is_real=row["is_real"],
        )
        return remark.anomaly_id, of_remark(remark)
    times = {name: None if row[name] is None else datetime.fromisoformat(row[name]) for name in TIMES}
    return row["id"], Recorded(anomaly=anomaly_of(row | times), told_us=fact.created_us)


def anomaly_of(row: Mapping[str, Any]) -> Anomaly:
    """The finding of a row; `contributions` are objects."""
    return Anomaly(
        id=row["id"],
        server_id=row["server_id"],
        metric=row["metric"],
        start_ms=_ms(row["started_at"]),
        end_ms=None if row["ended_at"] is None else _ms(row["ended_at"]),
        peak_ms=_ms(row["peaked_at"]),
        score=row["score"],
        detector=row["detector"],
        contributions=tuple(
            Contribution(metric=part["metric"], score=part["score"], **_read(part)) for part in row["contributions"]
        ),
        revision=row["revision"],
        **_read(row),
    )


def _time(time_ms: int) -> str:
    return instant_of(time_ms * 1_000).isoformat()


def _ms(instant: datetime) -> int:
    return microseconds_of(instant) // 1_000


def _numbers(of: Anomaly | Contribution) -> dict[str, float | None]:
    named = ((name, getattr(of, name)) for name in _NUMBERS)
    return {name: number if math.isfinite(number) else None for name, number in named}


def _read(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: math.nan if row[name] is None else row[name] for name in _NUMBERS}
