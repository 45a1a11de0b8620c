"""Which servers, metric sets and cohorts exist: the words that journal and blocks refer to by small numbers.

A cohort is the columns that share the times of their rows: the metrics of one set on one server. Heads and blocks
belong to a cohort; a series (one metric key on one server) may lie in several, since a server may change its set.

What must stay true: an entry becomes visible here only after the transaction that stored it; numbers are never given
twice; readers hold the engine's lock while they iterate.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field

from fleet.model import Metric, MetricKind, MetricSet, ServerDescriptor
from runtime.errors import FailedPrecondition, InvalidArgument


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredSet:
    """A metric set and its number; `columns` gives a metric key's place."""

    id: int
    metric_set: MetricSet
    columns: dict[str, int]

    @classmethod
    def of(cls, number: int, metric_set: MetricSet) -> "StoredSet":
        columns = {key: column for column, key in enumerate(metric_set.keys)}
        if len(columns) != len(metric_set):
            raise InvalidArgument("the set names a metric twice", field="metric_sets")
        return cls(id=number, metric_set=metric_set, columns=columns)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Cohort:
    """The columns of one server that share their times."""

    id: int
    server_id: str
    stored_set: StoredSet


def said_gauge(holders: Iterable[tuple[Cohort, int]]) -> bool:
    """Whether one of the sets that hold a metric says that it is a gauge, whose roll-ups hold no increase."""
    return any(cohort.stored_set.metric_set.metrics[column].kind is MetricKind.GAUGE for cohort, column in holders)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricInfo:
    """A metric that exists and how many servers have it."""

    metric: Metric
    key: str
    servers: int


def encode_set(metric_set: MetricSet) -> str:
    """JSON: a list of [name, unit, kind, [[label, value], ...]]."""
    return json.dumps([[m.name, m.unit, int(m.kind), m.labels] for m in metric_set.metrics])


def decode_set(text: str) -> MetricSet:
    return MetricSet(
        metrics=tuple(
            Metric(name=name, unit=unit, kind=MetricKind(kind), labels=tuple((k, v) for k, v in labels))
            for name, unit, kind, labels in json.loads(text)
        )
    )


def encode_descriptor(descriptor: ServerDescriptor) -> str:
    """JSON: an object with the fields of the descriptor."""
    return json.dumps(asdict(descriptor))


def decode_descriptor(text: str) -> ServerDescriptor:
    return ServerDescriptor(**json.loads(text))


@dataclass(slots=True)
class Catalog:
    """Everything that is stored. `servers`: id to number; `server_ids`: the inverse.

    `last_set`, `last_server`, `last_cohort`: the highest numbers that were given.
    """

    sets: dict[str, StoredSet] = field(default_factory=dict)
    sets_by_id: dict[int, StoredSet] = field(default_factory=dict)
    servers: dict[str, int] = field(default_factory=dict)
    server_ids: dict[int, str] = field(default_factory=dict)
    cohorts: dict[tuple[int, int], Cohort] = field(default_factory=dict)
    cohorts_by_id: dict[int, Cohort] = field(default_factory=dict)
    cohorts_of: dict[str, list[Cohort]] = field(default_factory=dict)
    descriptors: dict[str, ServerDescriptor] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    keys_of_name: dict[str, set[str]] = field(default_factory=dict)
    last_set: int = 0
    last_server: int = 0
    last_cohort: int = 0

    def add_set(self, stored: StoredSet) -> None:
        self.last_set = max(self.last_set, stored.id)
        self.sets[stored.metric_set.id] = stored
        self.sets_by_id[stored.id] = stored
        for metric, key in zip(stored.metric_set.metrics, stored.metric_set.keys, strict=True):
            self.metrics[key] = metric
            self.keys_of_name.setdefault(metric.name, set()).add(key)

    def add_server(self, server_id: str, number: int) -> None:
        self.last_server = max(self.last_server, number)
        self.servers[server_id] = number
        self.server_ids[number] = server_id

    def add_cohort(self, cohort: Cohort) -> None:
        self.last_cohort = max(self.last_cohort, cohort.id)
        self.cohorts[self.servers[cohort.server_id], cohort.stored_set.id] = cohort
        self.cohorts_by_id[cohort.id] = cohort
        self.cohorts_of.setdefault(cohort.server_id, []).append(cohort)

    def match(self, selectors: Iterable[str]) -> set[str]:
        """The metric keys that selectors name: a selector is an exact key, or a name, which matches all its labels."""
        keys: set[str] = set()
        for selector in selectors:
            keys |= self.keys_of_name.get(selector, set())
            if selector in self.metrics:
                keys.add(selector)
        return keys

    def columns(self, server_id: str, keys: set[str] | None) -> dict[str, list[tuple[Cohort, int]]]:
        """For each wanted metric of a server (None: all), the cohorts that hold it and the column there."""
        found: dict[str, list[tuple[Cohort, int]]] = {}
        for cohort in self.cohorts_of.get(server_id, ()):
            columns = cohort.stored_set.columns
            for key in columns if keys is None else keys & columns.keys():
                found.setdefault(key, []).append((cohort, columns[key]))
        return found

    def list_metrics(self, server_id: str | None = None) -> list[MetricInfo]:
        """The metrics that rows were written for, by key."""
        holders: dict[int, set[str]] = {}
        for cohort in self._cohorts(server_id):
            holders.setdefault(cohort.stored_set.id, set()).add(cohort.server_id)
        servers_of: dict[str, set[str]] = {}
        for set_id, servers in holders.items():
            for key in self.sets_by_id[set_id].columns:
                known = servers_of.get(key)
                servers_of[key] = servers if known is None else known | servers
        return [
            MetricInfo(metric=self.metrics[key], key=key, servers=len(servers_of[key])) for key in sorted(servers_of)
        ]

    def _cohorts(self, server_id: str | None) -> Iterator[Cohort]:
        if server_id is not None:
            yield from self.cohorts_of.get(server_id, ())
        else:
            yield from self.cohorts.values()


class Additions:
    """What one transaction will add to a catalog, and lookups that see it before it is published."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self.sets: dict[str, StoredSet] = {}
        self.servers: dict[str, int] = {}
        self.cohorts: dict[tuple[int, int], Cohort] = {}
        self.descriptors: list[tuple[int, int, ServerDescriptor]] = []
        self._described: dict[str, ServerDescriptor] = {}

    @property
    def unpublished(self) -> bool:
        """Whether there is anything that is not stored yet."""
        return bool(self.sets or self.servers or self.cohorts or self.descriptors)

    def add_set(self, metric_set: MetricSet) -> None:
        if metric_set.id not in self._catalog.sets and metric_set.id not in self.sets:
            number = self._catalog.last_set + len(self.sets) + 1
            self.sets[metric_set.id] = StoredSet.of(number, metric_set)

    def stored_set(self, content_id: str) -> StoredSet:
        stored = self._catalog.sets.get(content_id) or self.sets.get(content_id)
        if stored is None:
            raise FailedPrecondition(
                f"metric set {content_id!r} is not known here: send it", reason="METRIC_SET_UNKNOWN"
            )
        return stored

    def server(self, server_id: str) -> int:
        number = self._catalog.servers.get(server_id) or self.servers.get(server_id)
        if number is None:
            server_id.encode()  # refused here, alone, and not by SQLite with all that is in the transaction
            number = self._catalog.last_server + len(self.servers) + 1
            self.servers[server_id] = number
        return number

    def cohort(self, server: int, server_id: str, stored: StoredSet) -> Cohort:
        key = (server, stored.id)
        cohort = self._catalog.cohorts.get(key) or self.cohorts.get(key)
        if cohort is None:
            number = self._catalog.last_cohort + len(self.cohorts) + 1
            cohort = self.cohorts[key] = Cohort(id=number, server_id=server_id, stored_set=stored)
        return cohort

    def describe(self, sequence: int, descriptor: ServerDescriptor) -> None:
        """Notes a descriptor as valid from `sequence` on; one that says nothing new is not stored again."""
        server_id = descriptor.server_id
        if descriptor != (self._described.get(server_id) or self._catalog.descriptors.get(server_id)):
            self._described[server_id] = descriptor
            self.descriptors.append((self.server(server_id), sequence, descriptor))

    def publish(self) -> None:
        """Makes all of it visible; call it after the commit, holding the engine's lock."""
        for stored in self.sets.values():
            self._catalog.add_set(stored)
        for server_id, number in self.servers.items():
            self._catalog.add_server(server_id, number)
        for cohort in self.cohorts.values():
            self._catalog.add_cohort(cohort)
        self._catalog.descriptors.update(self._described)
