"""What a query API answers, as numpy columns.

What must stay true: an answer that lacks something, since a part of the store is away, is none; NaN is no value.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray

from runtime.errors import ResourceExhausted, Unavailable
from services.timeseries.prometheus.client import Answer, shown
from services.timeseries.prometheus.labels import SERVER_ID, key_of

HARMLESS: Final = ("PromQL ", "No StoreAPIs matched", "not implemented")
"""How warnings begin that tell of nothing that is lacking: of the query's text, of a range in which no part of Thanos
has anything, and of names, which Prometheus' remote read never tells."""

_TOO_LARGE: Final = re.compile(
    r"too (?:many|large|long)|limit|more than|maximum|exceeds|-search\.max|enough memory", re.IGNORECASE
)
"""What stores say of bounds of theirs, in words that they do not use of a part that is away."""

Points = tuple[NDArray[np.int64], NDArray[np.float64]]


class Found(NamedTuple):
    """A series of an answer."""

    labels: Mapping[str, str]
    times_ms: NDArray[np.int64]
    values: NDArray[np.float64]

    @property
    def identity(self) -> tuple[str, str]:
        return self.labels.get(SERVER_ID, ""), key_of(self.labels)


def data_of(answer: Answer) -> Any:
    """The `data` of an answer."""
    status = answer.status
    if status in {401, 403}:
        raise Unavailable(
            f"PROMETHEUS_QUERY_URL refuses PROMETHEUS_BEARER_TOKEN or PROMETHEUS_TENANT: {status} {answer.text}",
            reason="STORE_REFUSED",
        )
    if status == 422:  # of all that goes wrong while a query runs
        if not _TOO_LARGE.search(answer.text):
            raise Unavailable(f"the store cannot answer: {answer.text}", reason="STORE_UNAVAILABLE")
        raise ResourceExhausted(f"the store does not answer so large a query: {answer.text}", reason="MAX_POINTS")
    try:
        found = orjson.loads(answer.data)
        data = found["data"] if status == 200 and found["status"] == "success" else None
        lacking = ["isPartial"] if found.get("isPartial") else []
        lacking += [text for text in map(str, found.get("warnings") or ()) if not text.startswith(HARMLESS)]
    except (ValueError, LookupError, TypeError, AttributeError):
        found = data = None
        lacking = []
    if lacking and status == 200:
        said = shown(lacking[0].encode())
        raise Unavailable(f"a part of the store at PROMETHEUS_QUERY_URL is away: {said}", reason="STORE_UNAVAILABLE")
    if found is None or status != 200:
        raise Unavailable(
            f"PROMETHEUS_QUERY_URL is no base of a query API: it answers {status} {answer.text}",
            reason="STORE_UNREADABLE",
        )
    return data


def decoded(data: Any) -> list[Found]:
    """The series that have numbers; native histograms, which are none of ours, are left out.

    Raises Unavailable: STORE_UNREADABLE, it is no answer to a query, but of something else that speaks JSON.
    """
    try:
        return list(_series(data["result"]))
    except (ValueError, LookupError, TypeError) as error:
        raise unreadable(f"{type(error).__name__}: {error}") from error


def texts(data: Any) -> list[str]:
    """The values of a label; null for none. Raises as `decoded`."""
    if data is not None and not (isinstance(data, list) and all(isinstance(one, str) for one in data)):
        raise unreadable("no list of texts")
    return data or []


def unreadable(why: str) -> Unavailable:
    """The outage that such an answer is."""
    said = shown(why.encode())
    return Unavailable(f"PROMETHEUS_QUERY_URL does not answer as a query API does: {said}", reason="STORE_UNREADABLE")


def _series(result: Any) -> Iterator[Found]:
    for series in result:
        pairs = series["values"] if "values" in series else [series["value"]] if "value" in series else []
        times = np.rint(np.array([pair[0] for pair in pairs], np.float64) * 1_000).astype(np.int64)
        values = np.array([float(pair[1]) for pair in pairs])
        labels = series["metric"]
        if not isinstance(labels, dict):
            raise TypeError("labels that are none")
        there = ~np.isnan(values)
        if there.any():
            yield Found(labels, times[there], values[there])


def in_order(pieces: Sequence[Points]) -> Points:
    """All points in order of time; equal times keep their order."""
    times, values = joined(pieces)
    if (times[1:] < times[:-1]).any():
        order = np.argsort(times, kind="stable")
        times, values = times[order], values[order]
    return times, values


def joined(pieces: Sequence[Points]) -> Points:
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate([times for times, _ in pieces]), np.concatenate([values for _, values in pieces])


def distinct(times: NDArray[np.int64], values: NDArray[np.float64]) -> Points:
    """One point of equal times, which a row has that was sent again after its server's tags changed."""
    if (times[1:] == times[:-1]).any():
        last = np.append(times[1:] != times[:-1], True)
        return times[last], values[last]
    return times, values
