"""The JSON that other programs read from Redis: part of the public contract, so keys and forms may only be added to.

`server:{id}` is one flat object: who the server is, its status in lower case, and each metric under its identity as
text. `servers:all` is an array of the same objects with only the headline metrics. Times are RFC 3339 in UTC.

Beside each document lies a note of ours, which other programs need not read: the document's version, a space, and JSON
with what two replicas need to join what they know:

    {"life": .., "described": .., "sets": [[metric set id, metrics of it in the document, time, receive time], ..]}
    {"removed": life, "revision": of the deleted record}                                              no document

The metrics of a document are in the order of `sets`, each with the newest set that has a value for it.

What must stay true: reading a document back gives what it was made from, but for the units and kinds of metrics, which
documents do not hold; without its note also for how metrics were split into sets. A metric that is called like one of
our own keys is left out.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Final

import numpy as np
import orjson

from fleet.health import ServerStatus
from fleet.model import HEADLINE_METRICS, NO_DETAILS, Metric, MetricSet, ServerDescriptor, ServerDetails
from services.cache.model import STAMP_DIGITS, Removal, Sample, ServerState, Stored, headline_columns, headline_of

_OWN_KEYS: Final = frozenset(
    (
        "id",
        "hostname",
        "environment",
        "role",
        "location",
        "status",
        "observed_time",
        "receive_time",
        "report_interval_ms",
    )
)
_STATUS_TEXT: Final = {status: status.name.lower() for status in ServerStatus}
_STATUS_OF_TEXT: Final = {text: status for status, text in _STATUS_TEXT.items()}
_FIRST_MS: Final = -62_135_596_800_000  # the years 1
_LAST_MS: Final = 253_402_300_799_999  # and 9999, between which a Timestamp lies


Sets = dict[tuple[str, ...], MetricSet]
"""Sets made of documents, by their keys: servers with the same metrics share one."""


def full_document(state: ServerState) -> tuple[bytes, bytes]:
    """The object of `server:{id}` and its note; 0.1 to 0.2 ms for 511 metrics, by their digits."""
    document: dict[str, Any] = _identity(state)
    if state.received_ms is not None:
        document["receive_time"] = _time_text(state.received_ms)
    if state.descriptor.report_interval_ms:
        document["report_interval_ms"] = state.descriptor.report_interval_ms
    metrics, counts = _grouped(state)
    document.update(metrics)
    sets = [
        [sample.set_id, count, sample.time_ms, sample.received_ms]
        for sample, count in zip(state.samples, counts, strict=True)
    ]
    facts = {"life": state.life, "described": state.described, "sets": sets}
    if state.details.revision:
        facts["record"] = _recorded(state.details)
    return orjson.dumps(document), _note(state, facts)


def removal_note(removal: Removal) -> bytes:
    """The note where there is no document."""
    return _note(removal, {"removed": removal.life, "revision": removal.revision})


def note_version(note: bytes | None) -> str:
    """The version of what a note lies beside; empty without a note."""
    return note.partition(b" ")[0].decode("utf-8", "replace") if note else ""


def parse_stored(server_id: str, note: bytes | None, document: Any, sets: Sets) -> Stored | None:
    """What a note and its document were made from; None for a state that has expired; ValueError for what is not ours.

    Args:
        server_id: whose they are.
        note: as it lies there; without it the document has no version.
        document: the parsed JSON object, or None.
        sets: sets made before; new ones are added.
    """
    version, _, text = (note or b"").partition(b" ")
    stamp, _, writer = version.decode().partition(".")
    if note is not None and (len(stamp) != STAMP_DIGITS or not writer):
        raise ValueError("not the note of a server's document")
    try:
        facts: dict[str, Any] = dict(orjson.loads(text)) if text else {}
        if "removed" in facts:
            life, revision = _whole(facts["removed"]), _whole(facts.get("revision", 0))
            return Removal(server_id=server_id, stamp=int(stamp, 16), writer=writer, life=life, revision=revision)
        if document is None:
            return None
        state = parse_document(document, sets)
        if not facts:
            return state
        pairs = [(key, value * 1.0) for key, value in document.items() if key not in _OWN_KEYS]
        return replace(
            state,
            samples=tuple(_split(pairs, facts["sets"], sets)),
            stamp=int(stamp, 16),
            writer=writer,
            life=_whole(facts["life"]),
            described=_whole(facts["described"]),
            details=_details(facts["record"]) if "record" in facts else NO_DETAILS,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the note of a server's document: {error!r}") from error


def basic_document(state: ServerState) -> bytes:
    """The object of one server in `servers:all`."""
    document = _identity(state)
    for name, value in zip(HEADLINE_METRICS, state.headline(), strict=True):
        if not math.isnan(value):
            document[name] = value
    return orjson.dumps(document)


def parse_document(document: dict[str, Any], sets: Sets) -> ServerState:
    """The state that a document was made from; ValueError when it is not one of ours.

    Args:
        document: the parsed JSON object.
        sets: sets made before; new ones are added.
    """
    try:
        descriptor = ServerDescriptor(
            server_id=_text(document["id"]),
            hostname=_text(document["hostname"]),
            environment=_text(document["environment"]),
            role=_text(document["role"]),
            location=_text(document["location"]),
            report_interval_ms=_whole(document.get("report_interval_ms", 0)),
        )
        status = _STATUS_OF_TEXT[document["status"]]
        observed_ms = _time_ms(document.get("observed_time"))
        received_ms = _time_ms(document.get("receive_time", document.get("observed_time")))
        pairs = {key: value * 1.0 for key, value in document.items() if key not in _OWN_KEYS}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a server's document: {error!r}") from error
    samples: tuple[Sample, ...] = ()
    if pairs and observed_ms is not None and received_ms is not None:
        samples = (_restored(pairs, observed_ms, received_ms, sets),)
    return ServerState(
        descriptor=descriptor,
        status=status,
        observed_ms=observed_ms,
        received_ms=received_ms,
        heard_s=0.0,
        samples=samples,
        sequence=0,
    )


def parse_metric_key(key: str) -> Metric:
    """The metric of an identity as text: the inverse of `Metric.key`. What is not of that form is a bare name."""
    name, brace, rest = key.partition("{")
    labels: list[tuple[str, str]] = []
    while brace and rest not in ("", "}"):
        label, equals, rest = rest.partition('="')
        value, end = _unescaped(rest)
        if not equals or end < 0 or rest[end + 1 : end + 2] not in (",", "}"):
            return Metric(name=key)
        labels.append((label, value))
        separator, rest = rest[end + 1], rest[end + 2 :]
        if separator == "}":
            return Metric(name=name, labels=tuple(labels)) if not rest else Metric(name=key)
    return Metric(name=key)


def _recorded(details: ServerDetails) -> list[Any]:
    return [details.revision, dict(details.labels), details.has_notes, details.maintenance]


def _details(recorded: list[Any]) -> ServerDetails:
    revision, labels, has_notes, maintenance = recorded
    return ServerDetails(
        revision=_whole(revision),
        labels=tuple((str(key), str(value)) for key, value in labels.items()),
        has_notes=bool(has_notes),
        maintenance=tuple((_whole(start, _FIRST_MS), _whole(end, _FIRST_MS)) for start, end in maintenance),
    )


def _note(stored: Stored, facts: dict[str, Any]) -> bytes:
    return stored.version.encode() + b" " + orjson.dumps(facts)


def _grouped(state: ServerState) -> tuple[dict[str, float], list[int]]:
    """The metrics in the order of the samples that their values are of, and how many are of each."""
    if len(state.samples) == 1:
        metrics = state.metrics()
        for key in _OWN_KEYS:
            metrics.pop(key, None)
        return metrics, [len(metrics)]
    groups: list[dict[str, float]] = []
    taken: set[str] = set(_OWN_KEYS)
    for sample in reversed(state.samples):
        pairs = zip(sample.metric_set.keys, sample.values.tolist(), strict=True)
        groups.append({key: value for key, value in pairs if math.isfinite(value) and key not in taken})
        taken.update(groups[-1])
    groups.reverse()
    return {key: value for group in groups for key, value in group.items()}, [len(group) for group in groups]


def _split(pairs: list[tuple[str, float]], facts: list[list[Any]], sets: Sets) -> Iterator[Sample]:
    """The samples that a document's metrics are of, the newest last."""
    start = 0
    for set_id, count, time_ms, received_ms in facts:
        sample = _restored(dict(pairs[start : start + count]), _whole(time_ms), _whole(received_ms), sets)
        yield replace(sample, origin=str(set_id))
        start += count


def _restored(pairs: dict[str, float], observed_ms: int, received_ms: int, sets: Sets) -> Sample:
    keys = tuple(pairs)
    metric_set = sets.get(keys)
    if metric_set is None:
        metric_set = sets[keys] = MetricSet(tuple(parse_metric_key(key) for key in keys))
    values = np.fromiter(pairs.values(), np.float64, len(pairs))
    return Sample(
        metric_set=metric_set,
        time_ms=observed_ms,
        received_ms=received_ms,
        received_s=0.0,
        values=values,
        headline=headline_of(values, headline_columns(metric_set)),
        restored=True,
    )


def _identity(state: ServerState) -> dict[str, Any]:
    descriptor = state.descriptor
    document: dict[str, Any] = {
        "id": descriptor.server_id,
        "hostname": descriptor.hostname,
        "environment": descriptor.environment,
        "role": descriptor.role,
        "location": descriptor.location,
        "status": _STATUS_TEXT[state.status],
    }
    if state.observed_ms is not None:
        document["observed_time"] = _time_text(state.observed_ms)
    return document


def _time_text(ms: int) -> str:
    seconds, rest = divmod(ms, 1_000)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:03d}Z"


def _time_ms(text: str | None) -> int | None:
    if text is None:
        return None
    time = datetime.fromisoformat(text)
    return _whole(round(time.timestamp() * 1_000))


def _whole(number: Any, least: int = 0) -> int:
    """A time or number that can be written and told again."""
    if not least <= number <= _LAST_MS:
        raise ValueError(f"{number!r} is no time or number of ours")
    return int(number)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _unescaped(text: str) -> tuple[str, int]:
    """The label's value at the start of `text` and where its closing quote is (-1: nowhere)."""
    out: list[str] = []
    escaped = False
    for index, character in enumerate(text):
        if escaped:
            out.append("\n" if character == "n" else character)
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == '"':
            return "".join(out), index
        else:
            out.append(character)
    return "", -1
