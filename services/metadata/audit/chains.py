"""Holds chains to their hashes, their checkpoints and their known ends, one row after another.

    chains = Chains(proofs, ends, end_now, findings)
    for rows in pages:                  # ordered by (writer_id, seq), a duplicate number beside its like
        chains.feed(rows)
    chains.finish()

A row is right when its hash is that of its fields and it names the hash of the row before. Where it is not:

    the fields do not give the hash                     ALTERED; REORDERED where they do under another row's number
    they do, but the next row names another hash        ALTERED: the row was made anew
    a number is missing                                 REMOVED, unless a checkpoint says that it went by age
    a number is there twice, or behind what was taken    INSERTED
    all is well, but a checkpoint has another hash      RECOMPUTED

What must stay true: each fault is told once, for the event that is at fault and not for its neighbours; memory does not
grow with the log.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple
from uuid import UUID

from fleet.audit.event import GENESIS, Link, digest
from services.metadata.audit.findings import ALTERED, INSERTED, RECOMPUTED, REMOVED, REORDERED, Finding, Findings
from services.metadata.audit.proofs import Proofs

MAX_SUSPECTS: Final = 200
"""So many rows of a chain whose fields do not give their hash are tried at each other's places."""


class Row(NamedTuple):
    """An event as it is stored; the texts as `digest` takes them."""

    seq: int
    time_us: int
    calls: int
    prev_hash: bytes
    id: UUID
    texts: tuple[str | None, ...]
    hash: bytes

    @property
    def writer_id(self) -> str:
        """Its chain."""
        return str(self.texts[0])

    def digest_at(self, seq: int) -> bytes:
        """What its hash would be under a number."""
        return digest(seq, self.time_us, self.calls, self.prev_hash, self.id.bytes, self.texts)


class Chain(NamedTuple):
    """What there is of a writer's events, and up to where a checkpoint proves them."""

    writer_id: str
    first_seq: int
    last_seq: int
    proved_seq: int


class Chains:
    """Goes over all chains."""

    def __init__(
        self,
        proofs: Proofs,
        ends: Mapping[str, Link],
        end_now: Callable[[str], Link],
        findings: Findings,
    ) -> None:
        """Prepares it.

        Args:
            proofs: of the checkpoints.
            ends: writer -> how far its chain went before the first row was read; it must reach so far.
            end_now: how far what was accepted of it goes now; START for one that is not known.
            findings: gets what is wrong.
        """
        self._proofs = proofs
        self._ends = ends
        self._end_now = end_now
        self._findings = findings
        self.chains: list[Chain] = []
        self.events = 0
        self._writer = ""
        self._begin("")

    def _begin(self, writer: str) -> None:
        self._writer = writer
        self._limit = self._end_now(writer).seq if writer else 0  # what is behind it was never taken from a writer
        self._seq, self._hash = 0, GENESIS
        self._first = 0
        self._last: Row | None = None
        self._twin: Row | None = None  # another row with the number of the last one, as right as that
        self._suspects: list[Row] = []
        self._at_fault: set[int] = set()
        self._signed: Mapping[int, bytes] = self._proofs.ends.get(writer, {})
        self._marks = dict(self._signed)
        if writer in self._ends:
            self._marks.setdefault(*self._ends[writer])
        self._proved = 0
        self._broken: list[int] = []  # first and last number of a run of checkpoints that have other hashes

    def feed(self, rows: Sequence[Row]) -> None:
        """The next rows."""
        for row in rows:
            self.events += 1
            seq, writer = row.seq, row.texts[0]
            if writer != self._writer:
                self._end_chain()
                self._begin(str(writer))
            if seq > self._limit and self._is_foreign(row):
                continue
            if seq != self._seq + 1 or row.prev_hash != self._hash or self._twin is not None:
                self._look(row)
            elif digest(seq, row.time_us, row.calls, row.prev_hash, row.id.bytes, row.texts) != row.hash:
                self._suspect(row)
                self._pass(row)
            else:
                self._seq, self._hash, self._last = seq, row.hash, row
                self._first = self._first or seq
                if seq in self._marks:
                    self._mark(row)

    def _is_foreign(self, row: Row) -> bool:
        self._limit = self._end_now(self._writer).seq
        if row.seq <= self._limit:
            return False
        message = f"event {row.seq} was put in: its writer's chain ends with {self._limit}"
        self._add(INSERTED, message, row.seq, row.seq, row)
        return True

    def _pass(self, row: Row) -> None:
        self._seq, self._hash, self._last = row.seq, row.hash, row
        self._first = self._first or row.seq
        if row.seq in self._marks:
            self._mark(row)

    def _look(self, row: Row) -> None:
        """A row that does not simply follow."""
        if self._last is not None and row.seq <= self._seq:
            self._look_at_twin(row)
            return
        self._choose_twin(row)
        if row.seq > self._seq + 1:
            self._gap(row.seq - 1, row)
        right = _is_right(row)
        if row.prev_hash != self._hash and right and self._last is not None and self._last.seq == row.seq - 1:
            self._accuse(self._last, "the event after it follows another one: it was made anew")
        elif row.prev_hash != self._hash and right:  # the first of a chain, or behind a gap: nobody else to blame
            self._accuse(row, "it does not follow the event before: it was made anew")
        elif not right:
            self._suspect(row)
        self._pass(row)

    def _look_at_twin(self, row: Row) -> None:
        last = self._last
        assert last is not None
        if not _is_right(row) or row.prev_hash != last.prev_hash:
            self._tell_inserted(row)
        elif last.seq in self._at_fault:
            self._tell_inserted(last)
            self._hash, self._last = row.hash, row
        else:
            self._twin = row  # the next event says which of the two it follows

    def _choose_twin(self, following: Row | None) -> None:
        twin, last = self._twin, self._last
        if twin is None or last is None:
            return
        self._twin = None
        wanted = self._marks.get(last.seq, b"") if following is None else following.prev_hash
        if twin.hash == wanted:
            self._tell_inserted(last)
            self._hash, self._last = twin.hash, twin
        else:
            self._tell_inserted(twin)

    def _gap(self, through: int, row: Row | None) -> None:
        """Numbers from the next one to `through` are not there."""
        first = self._seq + 1
        gone = self._proofs.gone(self._writer, first, self._hash, through)
        if gone is not None:
            self._seq, self._hash, self._last, self._proved = gone.seq, gone.hash, None, gone.seq
            first = self._seq + 1
        if first > through:
            return
        what = f"event {first} is" if first == through else f"events {first} to {through} are"
        place = " at the end" if row is None else ""
        self._add(REMOVED, f"{what} missing{place}", first, through)
        self._seq, self._last = through, None
        self._hash = self._marks.get(through, b"") if row is None else row.prev_hash

    def _mark(self, row: Row) -> None:
        """A checkpoint has this number."""
        if self._marks[row.seq] == self._hash:
            self._tell_broken()
            self._proved = row.seq if row.seq in self._signed else self._proved
        elif row.seq not in self._at_fault:
            self._broken = [self._broken[0] if self._broken else self._proved + 1, row.seq]

    def _tell_broken(self) -> None:
        if self._broken:
            first, last = self._broken
            message = f"events {first} to {last} are a chain, but not the one that was signed: it was computed anew"
            self._add(RECOMPUTED, message, first, last)
            self._broken = []

    def _end_chain(self) -> None:
        if not self._writer:
            return
        self._choose_twin(None)
        known = max(self._marks, default=0)
        if self._seq < known:
            self._gap(known, None)
        self._tell_broken()
        self._tell_suspects()
        self.chains.append(Chain(self._writer, self._first, self._seq, self._proved))

    def finish(self) -> None:
        """The end of all, and the chains of which there is no row."""
        self._end_chain()
        seen = {chain.writer_id for chain in self.chains}
        for writer in sorted({*self._proofs.ends, *self._ends} - seen):
            self._begin(writer)
            self._end_chain()
        self._begin("")
        self.chains.sort()

    def _suspect(self, row: Row) -> None:
        self._at_fault.add(row.seq)
        if len(self._suspects) < MAX_SUSPECTS:
            self._suspects.append(row)
        else:
            self._add(ALTERED, f"event {row.seq} is not what it was", row.seq, row.seq, row)

    def _tell_suspects(self) -> None:
        numbers = [row.seq for row in self._suspects]
        for row in self._suspects:
            real = next((seq for seq in numbers if seq != row.seq and row.digest_at(seq) == row.hash), None)
            if real is None:
                self._add(ALTERED, f"event {row.seq} is not what it was", row.seq, row.seq, row)
            else:
                self._add(REORDERED, f"what is number {row.seq} is event {real}", row.seq, row.seq, row)

    def _accuse(self, row: Row, why: str) -> None:
        if row.seq not in self._at_fault:
            self._at_fault.add(row.seq)
            self._add(ALTERED, f"event {row.seq} is not what it was: {why}", row.seq, row.seq, row)

    def _tell_inserted(self, row: Row) -> None:
        self._add(INSERTED, f"there is a second event {row.seq}, which was put in", row.seq, row.seq, row)

    def _add(self, kind: str, message: str, first: int, last: int, row: Row | None = None) -> None:
        event_id = "" if row is None else str(row.id)
        self._findings.add(Finding(kind, message, self._writer, first, last, event_id))


def _is_right(row: Row) -> bool:
    return row.digest_at(row.seq) == row.hash
