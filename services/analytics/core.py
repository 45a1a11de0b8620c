"""The analysis: a detector, what it found and metadata has not yet, the scores that timeseries has not yet, and the
place in the tail up to which it has seen the rows.

What must stay true: the four belong together, so a batch is applied while nobody takes a snapshot, and a snapshot is
taken while no batch is applied. What takes long is done in a thread, to its end, whoever is cancelled meanwhile: a
window that was judged and whose findings or scores are lost would be gone for good. A batch that was interrupted comes
again, as its sequence was not passed, and the detector passes over what it knows of it.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from fleet.anomaly import Anomaly
from fleet.model import Rows
from runtime import telemetry
from runtime.clock import Clock
from services.analytics import silence
from services.analytics.detect import Detector, DetectorState, SetColumns
from services.analytics.outbox import Outbox
from services.analytics.scores import Scored
from services.analytics.scoring.arrays import Integers

Result = TypeVar("Result")

YIELD_AFTER_S = 0.005
"""Applying a large batch lets others run this often."""
JUDGED_IN_THREAD: Final = 2_000
"""More series than this are judged in a thread: these take 1 ms, and 4 ms where they are new; 10,220 take 3 and 30 ms.
With 102,200 the event loop's longest turn is 9 ms."""

STRAY_AFTER_MS: Final = 120_000
"""The tail must be further than metadata's list by this: a minute and its grace."""
STRAYS_EVERY_MS: Final = 10_000
SILENT_FOR_MS: Final = 8 * 86_400_000
"""Whoever found a server silent forgets it after a week and ends that at the next hour, so no silence is older."""
_MINUTE_MS: Final = 60_000

_log = logging.getLogger(__name__)
_meter = telemetry.meter(__name__)
_rows = _meter.create_counter("openmanager.analytics.rows", unit="{row}", description="Rows shown to the detector.")
_lost = _meter.create_counter(
    "openmanager.analytics.lost_batches", unit="{batch}", description="Batches that were gone before they were read."
)
_unwatched = _meter.create_counter(
    "openmanager.analytics.unwatched_rows", unit="{row}", description="Rows of servers beyond the bounds."
)
_untimely = _meter.create_counter(
    "openmanager.analytics.untimely_rows", unit="{row}", description="Rows that came too late, or ahead of time."
)
_skipped = _meter.create_counter(
    "openmanager.analytics.skipped_batches", unit="{batch}", description="Batches that could not be decoded."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One journaled batch, ready to be judged.

    Attributes:
        sequence: its place in the journal.
        received_ms: when it was journaled.
        columns: what the detector said of the rows' set.
        rows: the rows.
        parts: indices of rows; in each a server is there at most once, over all each server's are in order of time.
    """

    sequence: int
    received_ms: int
    columns: SetColumns
    rows: Rows
    parts: Sequence[Integers]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What somebody said of a finding."""

    finding: Anomaly
    is_real: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a restart needs; nothing in it changes any more.

    Attributes:
        next_sequence: the first batch that is not in the state.
        verdicts_until: up to when verdicts are in the state, microseconds since the epoch; 0: none was followed.
        waiting: findings that metadata has not acknowledged, the longest waiting first.
        scores: those that timeseries has not acknowledged, in the order in which they came.
    """

    next_sequence: int
    verdicts_until: int
    detector: DetectorState
    waiting: tuple[Anomaly, ...]
    scores: tuple[Scored, ...] = ()


@dataclass(slots=True, kw_only=True)
class Counters:
    """What happened since the process started; `judged_s` is how long judging `minutes` took."""

    minutes: int = 0
    judged_s: float = 0.0
    batches: int = 0
    rows: int = 0
    lost_batches: int = 0
    skipped_batches: int = 0


class ScoreOutbox(Protocol):
    """Scores on their way to timeseries."""

    def put(self, scored: Iterable[Scored]) -> None:
        """Takes minutes."""

    def all(self) -> tuple[Scored, ...]:
        """All that wait, in the order in which they came."""


class Analysis:
    """Applies batches in order; see the module."""

    def __init__(self, detector: Detector, outbox: Outbox, clock: Clock, scores: ScoreOutbox | None = None) -> None:
        """`scores` takes those of the minutes that were judged; None: nobody wants them."""
        self.detector = detector
        self.outbox = outbox
        self._scores = scores
        self.counters = Counters()
        self.next_sequence = 0
        """The batch to ask for; 0 while there is no place yet: what comes from now on."""
        self.has_place = asyncio.Event()
        self.verdicts_until = 0
        """Up to when verdicts were taken, by metadata's clock; 0: none was followed yet."""
        self._strays: dict[str, tuple[Anomaly, int]] = {}  # open in metadata, and since when that is known
        self._strays_judged_ms = 0
        self._clock = clock
        self._applying = asyncio.Lock()

    async def apply(self, batch: Batch) -> None:
        """Judges the rows of a batch and goes on to the next; one that was applied before changes nothing."""
        async with self._applying:
            now_ms, count = batch.received_ms, len(batch.rows.server_ids)
            before, minutes = (self.detector.unwatched_rows, self.detector.untimely_rows), self.counters.minutes
            began_s = self._clock.monotonic()
            if self.detector.due(now_ms) > JUDGED_IN_THREAD:
                await finished(lambda: self.detector.advance(now_ms), self._take_judged)
            else:
                self._take_judged(self.detector.advance(now_ms))
            if self.counters.minutes > minutes:
                self.counters.judged_s += self._clock.monotonic() - began_s
            free_at = self._clock.monotonic() + YIELD_AFTER_S
            for part in batch.parts:
                self._apply_part(batch, part)
                if self._clock.monotonic() >= free_at:
                    await asyncio.sleep(0)
                    free_at = self._clock.monotonic() + YIELD_AFTER_S
            self.outbox.put(self.detector.settle(now_ms))
            self._end_strays(now_ms)
            self.counters.batches += 1
            self.counters.rows += count
            _rows.add(count)
            _unwatched.add(self.detector.unwatched_rows - before[0])
            _untimely.add(self.detector.untimely_rows - before[1])
            self.pass_to(batch.sequence + 1)

    def _take_judged(self, found: Sequence[Anomaly]) -> None:
        """What came of the minutes that `advance` has closed, which are not judged again."""
        self.outbox.put(found)
        scored = self.detector.take_scores()
        self.counters.minutes += len(scored)
        if self._scores is not None:
            self._scores.put(scored)

    def _apply_part(self, batch: Batch, part: Integers) -> None:
        rows = batch.rows
        if len(part) == len(rows.server_ids):
            servers, times, values = rows.server_ids, rows.times_ms, rows.values
        else:
            servers = tuple(rows.server_ids[row] for row in part.tolist())
            times, values = rows.times_ms[part], rows.values[part]
        self.outbox.put(self.detector.observe(batch.columns, servers, times, values, batch.received_ms))

    async def take_verdicts(self, verdicts: Sequence[Verdict], until: int) -> None:
        """Has the detector take what was said, up to a time."""
        async with self._applying:
            for verdict in verdicts:
                self.detector.judge(verdict.finding, is_real=verdict.is_real)
            self.verdicts_until = max(self.verdicts_until, until)

    def take_going_on(self, findings: Iterable[Anomaly]) -> None:
        """Notes which findings metadata takes for open; what is not open here once the tail is past now is ended."""
        self._strays = {}
        self.take_open(findings)

    def take_open(self, findings: Iterable[Anomaly]) -> None:
        """The same of some more of them."""
        now_ms = self._clock.now_ms()
        self._strays.update((finding.id, (finding, now_ms)) for finding in findings)

    def take_over(self, finding_ids: Iterable[str]) -> None:
        """Notes that these do not go on."""
        for finding_id in finding_ids:
            self._strays.pop(finding_id, None)

    def _end_strays(self, now_ms: int) -> None:
        """Of servers that are heard here; others' are others' findings, but for silence that nobody waits any longer to
        end: of a server that was gone for good when its detector lost its memory."""
        if not self._strays or 0 <= now_ms - self._strays_judged_ms < STRAYS_EVERY_MS:
            return
        self._strays_judged_ms, here = now_ms, self.detector.open_ids()
        for finding, known_ms in list(self._strays.values()):
            if now_ms < known_ms + STRAY_AFTER_MS:
                continue
            if finding.id in here or finding.id in self.outbox:
                del self._strays[finding.id]
            elif self.detector.hears(finding.server_id) or (
                finding.detector == silence.DETECTOR and now_ms >= finding.start_ms + SILENT_FOR_MS
            ):
                end_ms = max(finding.start_ms, finding.peak_ms + _MINUTE_MS)
                self.outbox.put([finding.changed(end_ms=end_ms)])
                del self._strays[finding.id]

    def pass_to(self, sequence: int) -> None:
        """Says that everything before `sequence` is in the state."""
        self.next_sequence = sequence
        self.has_place.set()

    def lose(self, first: int, end: int) -> None:
        """Counts and tells batches `[first, end)` that were gone before they could be read."""
        self.counters.lost_batches += end - first
        _lost.add(end - first)
        _log.warning(
            "the tail begins at sequence %d, %d was asked for: the rows of %d batches are not judged",
            end,
            first,
            end - first,
            extra={"first_sequence": end, "asked_sequence": first, "lost_batches": end - first},
        )

    def skip(self, sequence: int, why: Exception) -> None:
        """Counts and tells a batch that cannot be judged, and goes on behind it."""
        self.counters.skipped_batches += 1
        _skipped.add(1)
        _log.error("batch %d cannot be judged and is passed over: %s", sequence, why, extra={"sequence": sequence})
        self.pass_to(sequence + 1)

    async def snapshot(self) -> Snapshot:
        """The state as it is between two batches; copied in a thread, at 20 MB for 10,000 series."""
        async with self._applying:
            waiting, scores = self.outbox.all(), self._scores.all() if self._scores is not None else ()
            state = await finished(self.detector.state)
            return Snapshot(
                next_sequence=self.next_sequence,
                verdicts_until=self.verdicts_until,
                detector=state,
                waiting=waiting,
                scores=scores,
            )

    def restore(self, snapshot: Snapshot) -> None:
        """Takes over a snapshot; ValueError, and nothing changed, when it is not of this detector."""
        self.detector.restore(snapshot.detector)
        self.outbox.put(snapshot.waiting)
        if self._scores is not None:
            self._scores.put(snapshot.scores)
        self.verdicts_until = snapshot.verdicts_until
        self.pass_to(snapshot.next_sequence)


async def finished(work: Callable[[], Result], take: Callable[[Result], None] | None = None) -> Result:
    """What `work` returns, done in a thread and handed to `take`; cancelled meanwhile, both are done first."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.wait([running])
    except asyncio.CancelledError:
        while not running.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        if take is not None and running.exception() is None:
            take(running.result())
        raise
    result = running.result()
    if take is not None:
        take(result)
    return result
