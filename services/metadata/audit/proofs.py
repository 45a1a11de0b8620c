"""Which checkpoints are right, and what they say of every chain.

There are two copies, one under DATA_DIR and one in the database. What must stay true: nothing is believed of a
checkpoint unless its signature is right, or a right one behind it names its hash; each copy is held to the other, so
that neither loses one unseen.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count, takewhile

from fleet.audit.event import Link
from services.metadata.audit.checkpoint import NOTHING, Checkpoint, Dropped, Said, is_signed
from services.metadata.audit.findings import (
    CHECKPOINT_ALTERED,
    CHECKPOINT_REMOVED,
    PARTITION_REMOVED,
    Finding,
    Findings,
)


@dataclass(slots=True, kw_only=True)
class Proofs:
    """What is proved.

    Attributes:
        number: how many checkpoints are right.
        last: the last of them; None: there is none.
        ends: writer -> {number of an event: its hash}, from all of them.
        dropped: writer -> what went by age, by first number.
    """

    number: int = 0
    last: Said | None = None
    ends: dict[str, dict[int, bytes]] = field(default_factory=dict)
    dropped: dict[str, list[Dropped]] = field(default_factory=dict)

    def gone(self, writer_id: str, first: int, before: bytes, through: int) -> Link | None:
        """The last event that went by age when those from `first` on, after the hash `before`, did; None: they did not.

        `through`: at most up to this number.
        """
        reached: Link | None = None
        for one in self.dropped.get(writer_id, ()):
            wanted = (first, before.hex()) if reached is None else (reached.seq + 1, reached.hash.hex())
            if (one.first_seq, one.before) == wanted and one.last_seq <= through:
                reached = Link(one.last_seq, bytes.fromhex(one.after))
        return reached

    def proved_seq(self, writer_id: str) -> int:
        """Up to which number the last checkpoint proves a chain."""
        end = None if self.last is None else self.last.chains.get(writer_id)
        return 0 if end is None else end.seq


def judge(
    ours: Iterable[Checkpoint],
    theirs: Iterable[Checkpoint],
    on_the_way: Collection[int],
    public_key: str,
    findings: Findings,
) -> Proofs:
    """Judges the checkpoints.

    Args:
        ours: those under DATA_DIR.
        theirs: the database's.
        on_the_way: numbers that the database does not have yet.
        public_key: what they are signed with.
        findings: gets what is wrong.
    """
    mine = {one.number: one for one in ours}
    other = {one.number: one for one in theirs}
    missing_here = [number for number in other if number not in mine]
    missing_there = [number for number in mine if number not in other and number not in on_the_way]
    last = max((*mine, *other), default=0)
    nowhere = [number for number in range(1, last + 1) if number not in mine and number not in other]
    for numbers, where in ((missing_here, "DATA_DIR"), (missing_there, "the database"), (nowhere, "both places")):
        _tell_missing(sorted(numbers), where, findings)
    proofs, wanted = Proofs(), ""
    right: list[Said] = []
    for number in range(last, 0, -1):
        pair = [one for one in (mine.get(number), other.get(number)) if one is not None]
        chosen = _chosen(number, pair, wanted, public_key, findings)
        wanted = ""
        if chosen is None:
            continue
        try:
            said = chosen.said()
        except ValueError:
            _altered(number, "it cannot be read", findings)
            continue
        right.append(said)
        wanted = said.previous
    if last and wanted and wanted != NOTHING:
        _altered(1, "the first one names another before it", findings)
    for said in reversed(right):
        _take(proofs, said)
    return proofs


def _chosen(
    number: int, pair: Sequence[Checkpoint], wanted: str, public_key: str, findings: Findings
) -> Checkpoint | None:
    """The one to believe: that with the hash which the next one names, or else one with a right signature."""
    chosen = next((one for one in pair if one.hash == wanted), None)
    if chosen is None:
        chosen = next((one for one in pair if is_signed(one, public_key)), None)
        if chosen is not None and wanted:
            _altered(number, "the one after it names another", findings)
        elif chosen is None and pair:
            _altered(number, "its signature is wrong", findings)
    if chosen is not None and any(one != chosen for one in pair):
        _altered(number, "DATA_DIR and the database have different ones", findings)
    return chosen


def _take(proofs: Proofs, said: Said) -> None:
    proofs.number += 1
    proofs.last = said
    for writer, end in said.chains.items():
        proofs.ends.setdefault(writer, {})[end.seq] = end.hash
    for one in said.dropped:
        proofs.dropped.setdefault(one.writer_id, []).append(one)
        proofs.dropped[one.writer_id].sort(key=lambda dropped: dropped.first_seq)


def judge_months(proofs: Proofs, partitions: Collection[str], on_the_way: Collection[str], findings: Findings) -> None:
    """Whether the months of the last checkpoint are there."""
    if proofs.last is None:
        return
    gone_by_age = {one.month for dropped in proofs.dropped.values() for one in dropped}
    for month in proofs.last.months:
        if month not in partitions and month not in on_the_way and month not in gone_by_age:
            message = f"the partition of {month} is gone, and no checkpoint says that it went by age"
            findings.add(Finding(PARTITION_REMOVED, message))


def _altered(number: int, why: str, findings: Findings) -> None:
    message = f"checkpoint {number}: {why}"
    findings.add(Finding(CHECKPOINT_ALTERED, message, first_seq=number, last_seq=number))


def _tell_missing(numbers: Sequence[int], where: str, findings: Findings) -> None:
    rest = list(numbers)
    while rest:
        first = rest[0]
        run = list(takewhile(lambda pair: pair[0] == pair[1], zip(rest, count(first), strict=False)))
        last = run[-1][0]
        rest = rest[len(run) :]
        text = f"checkpoint {first} is" if first == last else f"checkpoints {first} to {last} are"
        message = f"{text} missing in {where}"
        findings.add(Finding(CHECKPOINT_REMOVED, message, first_seq=first, last_seq=last))
