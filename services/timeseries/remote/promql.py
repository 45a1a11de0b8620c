"""PromQL of a query of ours: selectors that no name can break out of, and expressions that give our windows.

A range selector looks at `(t - d, t]` and times are whole milliseconds, so that the window `[a, b)` is all of
`d = b - a` at `t = b - 1 ms`. Windows that the range cuts are asked for one by one, each with a `d` of its own.

What must stay true: a server whose tags changed is one series, so everything is put together over `environment` and
`role`; functions over time drop a metric's name, and `or` does not look at it, so it is told by a label of its own, or
metrics would be taken for each other.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple, TypeVar

from services.timeseries.engine.aggregate import Aggregation
from services.timeseries.prometheus.labels import ENVIRONMENT, METRIC, NAME, ROLE, SERVER_ID

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_STRING_ESCAPES: Final = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
_REGEX_ESCAPES: Final = str.maketrans({character: f"\\{character}" for character in r"\.+*?()|[]{}^$"})
_TOGETHER: Final = f"sum without ({ENVIRONMENT}, {ROLE}) "
_FUNCTIONS: Final = {
    Aggregation.MIN: f"min without ({ENVIRONMENT}, {ROLE}) (min_over_time(%s))",
    Aggregation.MAX: f"max without ({ENVIRONMENT}, {ROLE}) (max_over_time(%s))",
    Aggregation.SUM: _TOGETHER + "(sum_over_time(%s))",
    Aggregation.COUNT: _TOGETHER + "(count_over_time(%s))",
}
_EXPRESSION_BYTES: Final = 260
"""Of what stands around a selector, at most."""
_T = TypeVar("_T")
PUSHED_DOWN: Final = frozenset({*_FUNCTIONS, Aggregation.AVG})
"""What the store computes; all else is made of points that are read back, LAST of each series' last ones."""


class Term(NamedTuple):
    """A metric to ask for, by its escaped name; `labels` are those that it must have, empty for any."""

    name: str
    labels: tuple[tuple[str, str], ...] = ()

    @property
    def matchers(self) -> list[str]:
        """It alone."""
        return [equal(label, value) for label, value in ((NAME, self.name), *self.labels)]

    @property
    def bytes(self) -> int:
        """Of its matchers."""
        return sum(len(matcher.encode()) + 1 for matcher in self.matchers)


@dataclass(frozen=True, slots=True)
class Part:
    """Windows that one request can answer: `count` of them, `step_ms` apart, the first over `[start_ms, stop_ms)`.

    `label_ms` is the first one's, which the range may have cut.
    """

    label_ms: int
    start_ms: int
    stop_ms: int
    step_ms: int
    count: int = 1

    @property
    def at_ms(self) -> int:
        """When the first one is evaluated."""
        return self.stop_ms - 1

    @property
    def width_ms(self) -> int:
        return self.stop_ms - self.start_ms


def parts(start_ms: int, end_ms: int, step_ms: int, most: int) -> list[Part]:
    """The windows of a range: cut ones alone, whole ones at most `most` together."""
    found = []
    whole_from, whole_to = -(-start_ms // step_ms) * step_ms, end_ms // step_ms * step_ms
    if start_ms < whole_from:
        found.append(Part(whole_from - step_ms, start_ms, min(whole_from, end_ms), step_ms))
    for label in range(whole_from, whole_to, most * step_ms):
        count = min(most, (whole_to - label) // step_ms)
        found.append(Part(label, label, label + step_ms, step_ms, count))
    if whole_from <= whole_to < end_ms:
        found.append(Part(whole_to, whole_to, end_ms, step_ms))
    return found


def quoted(text: str) -> str:
    """A string of PromQL."""
    return f'"{text.translate(_STRING_ESCAPES)}"'


def equal(label: str, value: str) -> str:
    return f"{label}={quoted(value)}"


def any_of(label: str, values: Sequence[str]) -> str:
    """A matcher of exactly these values."""
    if len(values) == 1:
        return equal(label, values[0])
    return f"{label}=~{quoted('|'.join(value.translate(_REGEX_ESCAPES) for value in values))}"


def of_servers(server_ids: Sequence[str] | None) -> str:
    """A matcher of these servers; None: of all, and of nothing that is no server's."""
    return f'{SERVER_ID}!=""' if server_ids is None else any_of(SERVER_ID, server_ids)


def selector(matchers: Iterable[str]) -> str:
    return "{" + ",".join(matchers) + "}"


def ranged(matchers: Iterable[str], width_ms: int) -> str:
    return f"{selector(matchers)}[{width_ms}ms]"


def windows(terms: Sequence[Term], servers: str, aggregation: Aggregation, width_ms: int) -> str:
    """One value of each series of each term, with the metric's name in the label METRIC."""
    return " or ".join(
        _named(term.name, _aggregated(ranged([*term.matchers, servers], width_ms), aggregation)) for term in terms
    )


def total(terms: Sequence[Term], servers: str, width_ms: int) -> str:
    """How many samples there are, of each term; several may have one name, so they are numbered."""
    counts = (f"sum(count_over_time({ranged([*term.matchers, servers], width_ms)}))" for term in terms)
    return " or ".join(f'label_replace({count}, "term", "{number}", "", "")' for number, count in enumerate(counts))


def instant(time_ms: int) -> str:
    """A time as every server reads it to the millisecond; as a number of seconds it may lose one."""
    return (_EPOCH + timedelta(milliseconds=time_ms)).strftime("%Y-%m-%dT%H:%M:%S.") + f"{time_ms % 1000:03}Z"


def _aggregated(over: str, aggregation: Aggregation) -> str:
    if aggregation is Aggregation.AVG:
        return f"{_TOGETHER}(sum_over_time({over})) / {_TOGETHER}(count_over_time({over}))"
    return _FUNCTIONS[aggregation] % over


def _named(name: str, expression: str) -> str:
    return f'label_replace({expression}, "{METRIC}", {quoted(name)}, "", "")'


def servers_together(server_ids: Sequence[str], most: int, max_bytes: int) -> Iterator[Sequence[str]]:
    """Servers whose matcher is no longer than that, or one."""
    return _together(server_ids, most, max_bytes, lambda server_id: 2 * len(server_id.encode()) + 1)


def terms_together(terms: Sequence[Term], most: int, max_bytes: int, servers: str) -> Iterator[Sequence[Term]]:
    """Terms whose expression is no longer than that, or one: each names the servers once or, for AVG, twice."""
    each = 2 * len(servers.encode()) + _EXPRESSION_BYTES
    return _together(terms, most, max_bytes, lambda term: each + 2 * term.bytes)


def selections(terms: Sequence[Term], most: int, max_bytes: int) -> Iterator[tuple[list[str], int]]:
    """Matchers of all terms, as few as there can be, and how many metrics each is about."""
    names = [term.name for term in terms if not term.labels]
    for some in _together(names, most, max_bytes, len):
        yield [any_of(NAME, some)], len(some)
    for term in terms:
        if term.labels:
            yield term.matchers, 1


def _together(things: Sequence[_T], most: int, max_bytes: int, size_of: Callable[[_T], int]) -> Iterator[Sequence[_T]]:
    start = size = 0
    for at, thing in enumerate(things):
        more = size_of(thing)
        if at > start and (size + more > max_bytes or at - start >= most):
            yield things[start:at]
            start, size = at, 0
        size += more
    if start < len(things):
        yield things[start:]
