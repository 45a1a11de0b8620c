"""One version of one server, with what readers are given of it, made when first read and then kept.

What must stay true: an entry never changes; equal versions have equal bytes in every gateway process.
"""

import math
from collections.abc import Sequence

import numpy as np

from fleet.codec import delimited
from fleet.model import HEADLINE_METRICS, MetricSet, etag_of
from openmanager.cache.v1 import cache_pb2
from openmanager.fleet.v1 import status_pb2
from openmanager.gateway.v1 import fleet_pb2
from runtime.prepared import Prepared

Sets = dict[str, MetricSet]
Places = frozenset[tuple[str, str]]
"""Environments and roles."""

BASIC, FULL = fleet_pb2.SERVER_VIEW_BASIC, fleet_pb2.SERVER_VIEW_FULL


class ServerEntry:
    """A server as it was at `version`; `placed_at` is the sequence at which it came to its environment and role, and
    `places` are those that it had in this epoch; `sets` are those of its samples, by id."""

    __slots__ = ("_answers", "_noted", "_servers", "epoch", "has_notes", "id", "placed_at", "places", "sets", "state")

    def __init__(
        self,
        state: cache_pb2.ServerState,
        sets: Sets,
        epoch: str,
        before: "ServerEntry | None",
        places: Places = frozenset(),
    ) -> None:
        """Takes a state.

        Args:
            state: from the cache.
            sets: those that its samples need.
            epoch: of the cache's life; the state's sequence counts in it.
            before: the server's entry before, if any.
            places: that it had before it was removed, if it was.
        """
        self.id = state.descriptor.server_id
        self.state = state
        self.epoch = epoch
        self.has_notes: bool = state.details.has_notes  # of its record, the notes are not here; asked at every read
        self.placed_at: int = state.sequence
        self.places: Places = places | {self.place}
        if before is not None and before.epoch == epoch:
            if before.place == self.place:
                self.placed_at = before.placed_at
                self.places = before.places
            else:
                self.places |= before.places
        self.sets: Sets = {sample.metric_set_id: sets[sample.metric_set_id] for sample in state.samples}
        self._servers: dict[fleet_pb2.ServerView.ValueType, bytes] = {}
        self._answers: dict[fleet_pb2.ServerView.ValueType, Prepared] = {}
        self._noted: Prepared | None = None

    @property
    def status(self) -> status_pb2.ServerStatus.ValueType:
        """How it is."""
        return self.state.status

    @property
    def sequence(self) -> int:
        """Orders it among all entries of its epoch."""
        return self.state.sequence

    @property
    def place(self) -> tuple[str, str]:
        """Environment and role."""
        return self.state.descriptor.environment, self.state.descriptor.role

    @property
    def revision(self) -> int:
        """Of its record; 0: not known."""
        return self.state.details.revision

    def has_labels(self, wanted: Sequence[tuple[str, str | None]]) -> bool:
        """Whether it has all of these; None: whatever the value is."""
        labels = self.state.details.labels
        return all(key in labels and value in {None, labels[key]} for key, value in wanted)

    def has_metric(self, selector: str) -> bool:
        """Whether it has reported a metric of this key, or of this name."""
        return any(
            selector in {key, metric.name}
            for one in self.sets.values()
            for key, metric in zip(one.keys, one.metrics, strict=True)
        )

    def server(self, view: fleet_pb2.ServerView.ValueType) -> bytes:
        """A serialized Server."""
        made = self._servers.get(view)
        if made is None:
            made = self._servers[view] = self._made(view)
        return made

    def message(self, view: fleet_pb2.ServerView.ValueType) -> fleet_pb2.Server:
        """The same as a message."""
        return fleet_pb2.Server.FromString(self.server(view))

    def answer(self, view: fleet_pb2.ServerView.ValueType) -> Prepared:
        """A GetServerResponse."""
        made = self._answers.get(view)
        if made is None:
            data = delimited(fleet_pb2.GetServerResponse.SERVER_FIELD_NUMBER, self.server(view))
            made = self._answers[view] = Prepared(data, etag=f"{self.epoch}-{self.sequence}")
        return made

    def answer_with(self, notes: str, *, is_current: bool) -> Prepared:
        """A GetServerResponse of the FULL view with notes; `is_current`: they are of the revision that this is of.

        Notes that are not have no entity tag, nor are they kept.
        """
        if self._noted is not None and is_current:
            return self._noted
        data = self.server(FULL) + fleet_pb2.Server(notes=notes).SerializeToString()
        data = delimited(fleet_pb2.GetServerResponse.SERVER_FIELD_NUMBER, data)
        made = Prepared(data, etag=f"{self.epoch}-{self.sequence}" if is_current else "")
        if is_current:
            self._noted = made
        return made

    def _made(self, view: fleet_pb2.ServerView.ValueType) -> bytes:
        state, descriptor = self.state, self.state.descriptor
        message = fleet_pb2.Server(
            id=descriptor.server_id,
            hostname=descriptor.hostname,
            environment=descriptor.environment,
            role=descriptor.role,
            location=descriptor.location,
            status=state.status,
            labels=state.details.labels,
            in_maintenance=state.in_maintenance,
        )
        if state.HasField("observed_time"):
            message.observed_time.CopyFrom(state.observed_time)
        values = self._values()
        if view == BASIC:
            message.metrics.update({name: values[name] for name in HEADLINE_METRICS if name in values})
        else:
            message.metrics.update(values)
            if self.revision:
                message.etag = etag_of(self.revision)
            if state.HasField("receive_time"):
                message.receive_time.CopyFrom(state.receive_time)
                message.clock_skew.CopyFrom(state.clock_skew)
        return message.SerializeToString(deterministic=True)

    def _values(self) -> dict[str, float]:
        merged: dict[str, float] = {}
        for sample in self.state.samples:
            keys = self.sets[sample.metric_set_id].keys
            values = np.array(sample.values).tolist()
            known = zip(keys, values, strict=True)
            if math.isnan(sum(values)):  # of infinities, too; most samples have all their values: 63 us became 35
                merged.update((key, value) for key, value in known if not math.isnan(value))
            else:
                merged.update(known)
        return merged
