"""Notes what an engine does by itself, for the oracle, and stops at the moments when a loss of power hurts most."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pytest

from fleet.model import MetricSet
from services.timeseries.engine.faults import Faults
from services.timeseries.engine.journal import Journal
from services.timeseries.engine.merge import Merger
from services.timeseries.engine.partition import Closed
from services.timeseries.engine.partitions import Partitions
from services.timeseries.engine.store import Store
from services.timeseries.engine.tiers import TIERS, Tier
from services.timeseries.engine.upkeep import Rollups
from services.timeseries.engine.writer import Append, Writer
from tests.timeseries.engine.history import Eviction, History

MOMENTS: Final[tuple[tuple[type, str], ...]] = (
    (Journal, "begin_eviction"),
    (Partitions, "evict"),
    (Journal, "finish_eviction"),
    (Partitions, "store"),
    (Journal, "sweep"),
    (Journal, "end"),
    (Partitions, "clear"),
    (Partitions, "compact"),
    (Rollups, "_roll_up"),
    (Merger, "_partition"),
)
"""Methods after which a loss of power is likely to find something."""


@dataclass(slots=True)
class Done:
    """What was seen: days that the limit took by force, how often the engine said so, groups rolled up, merges."""

    forced: int = 0
    said: int = 0
    roll_ups: int = 0
    merges: int = 0


class Watch:
    """While it is `on`, every engine of this process is watched; `moment` is called with a name after each of
    `MOMENTS`, in the thread that it happened in."""

    def __init__(self, history: History, sets: Sequence[MetricSet], moment: Callable[[str], None], done: Done) -> None:
        self._history = history
        self._sets = {of_set.id: of_set for of_set in sets}
        self._moment = moment
        self._done = done

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patches:
            self._note_batches(patches)
            self._note_evictions(patches)
            self._note_force(patches)
            self._count(patches)
            for owner, name in MOMENTS:
                patches.setattr(owner, name, self._then_moment(getattr(owner, name), name))
            yield

    def _then_moment(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            answer = real(*args, **options)
            self._moment(name)
            return answer

        return watched

    def _note_batches(self, patches: pytest.MonkeyPatch) -> None:
        """Just before they are committed, in their order; what is refused is none."""
        stage, history = Writer._stage, self._history

        def staged(writer: Writer, append: Append, sequence: int, *more: Any) -> Any:
            answer = stage(writer, append, sequence, *more)
            assert append.rows is not None and sequence == len(history.sent) + 1
            history.sent.append((self._sets[append.rows.metric_set_id], append.rows))
            return answer

        patches.setattr(Writer, "_stage", staged)

    def _note_evictions(self, patches: pytest.MonkeyPatch) -> None:
        begin_eviction, end, evict, history = Journal.begin_eviction, Journal.end, Partitions.evict, self._history
        going: dict[tuple[str, int], Eviction] = {}

        def begin(journal: Journal, days: Sequence[int], through: int) -> None:
            eviction = Eviction(range(days[0], days[-1] + 1), through)
            history.evictions.append(eviction)
            begin_eviction(journal, days, through)
            eviction.done = True

        def begin_end(journal: Journal, tier: int, day: int, through: int) -> None:
            eviction = Eviction(range(day, day + TIERS[tier].span_days), through, tier)
            history.evictions.append(eviction)
            going[TIERS[tier].folder, day] = eviction
            end(journal, tier, day, through)

        def evicted(partitions: Partitions, day: int) -> None:
            evict(partitions, day)
            if eviction := going.pop((partitions.name, day), None):
                eviction.done = True

        patches.setattr(Journal, "begin_eviction", begin)
        patches.setattr(Journal, "end", begin_end)
        patches.setattr(Partitions, "evict", evicted)

    def _note_force(self, patches: pytest.MonkeyPatch) -> None:
        """What goes by force is excused, but the engine must say so."""
        forget, end, note = Store.forget, Store.end, Faults.note

        def forgotten(store: Store, first: int, days: int, *, force: bool) -> bool:
            self._excuse(range(first, first + days), force=force)
            return forget(store, first, days, force=force)

        def ended(store: Store, tier: Tier, day: int, *, force: bool) -> bool:
            self._excuse(range(day, day + tier.kind.span_days), force=force)
            return end(store, tier, day, force=force)

        def noted(faults: Faults, message: str) -> None:
            self._done.said += "went without all of its roll-ups" in message
            note(faults, message)

        patches.setattr(Store, "forget", forgotten)
        patches.setattr(Store, "end", ended)
        patches.setattr(Faults, "note", noted)

    def _excuse(self, days: range, *, force: bool) -> None:
        if force:
            self._done.forced += 1
            self._history.excused.update(days)

    def _count(self, patches: pytest.MonkeyPatch) -> None:
        roll_up, store = Rollups._roll_up, Partitions._store

        def rolling_up(*args: Any, **options: Any) -> None:
            roll_up(*args, **options)
            self._done.roll_ups += 1

        def storing(partitions: Partitions, day: int, closed: Sequence[Closed], *more: Any) -> Any:
            self._done.merges += any(part.replaces for part in closed)
            return store(partitions, day, closed, *more)

        patches.setattr(Rollups, "_roll_up", rolling_up)
        patches.setattr(Partitions, "_store", storing)
