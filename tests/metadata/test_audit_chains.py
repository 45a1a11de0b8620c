"""What verifying finds, in memory: every way to tamper with a chain, alone and together, and nothing in a whole one."""

import random
from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID, uuid4

import pytest

from fleet.audit.event import START, Event, Link, draft, placed
from services.metadata.audit.chains import Chains, Row
from services.metadata.audit.checkpoint import Dropped
from services.metadata.audit.findings import Finding, Findings
from services.metadata.audit.proofs import Proofs

EVENTS = 200


def chain(writer: str, length: int = EVENTS, last: Link = START) -> list[Event]:
    events = []
    for number in range(length):
        event = placed(draft(time_us=1_000 * number, actor="ada", action=f"/a.B/{number}"), writer, last)
        events.append(event)
        last = event.link
    return events


def row(event: Event) -> Row:
    texts = (event.writer_id, event.actor, event.role, event.authentication, event.address, event.action, event.target)
    texts += (event.code, event.reason, event.trace_id, event.before, event.after)  # type: ignore[assignment]
    return Row(event.seq, event.time_us, event.count, event.prev_hash, UUID(event.id), texts, event.hash)


def anew(events: Sequence[Event], first: int) -> list[Event]:
    """The chain with all hashes from a place on computed anew."""
    made = list(events[:first])
    last = made[-1].link if made else START
    for event in events[first:]:
        made.append(placed(event, event.writer_id, last))
        last = made[-1].link
    return [replace(done, id=event.id) for done, event in zip(made, events, strict=True)]


def found(rows: Sequence[Event], real: Sequence[Event], marks: Sequence[int] = (), **dropped: object) -> list[Finding]:
    """What is found in rows where the real chain, signed at the marks, was another."""
    findings = Findings()
    ends = {real[-1].writer_id: real[-1].link}
    proofs = Proofs(ends={real[-1].writer_id: {number: real[number - 1].hash for number in marks}}, **dropped)  # type: ignore[arg-type]
    chains = Chains(proofs, ends, lambda writer: ends.get(writer, START), findings)
    shown = [row(event) for event in rows]
    for start in range(0, len(shown), 7):
        chains.feed(shown[start : start + 7])
    chains.finish()
    assert findings.total == len(findings.told)
    return findings.told


def told(findings: Sequence[Finding]) -> set[tuple[str, int, int]]:
    return {(finding.kind, finding.first_seq, finding.last_seq) for finding in findings}


def test_a_whole_chain_has_no_findings() -> None:
    real = chain("w")
    assert found(real, real) == []
    assert found(real, real, [1, 50, 200]) == []


@pytest.mark.parametrize("number", [1, 2, 100, 199, 200])
@pytest.mark.parametrize("with_hash", [False, True])
def test_an_altered_event_is_named(number: int, with_hash: bool) -> None:
    real = chain("w")
    rows = list(real)
    altered = replace(rows[number - 1], actor="mallory")
    if with_hash:
        before = START if number == 1 else rows[number - 2].link
        altered = replace(placed(altered, "w", before), id=altered.id)
    rows[number - 1] = altered
    (finding,) = found(rows, real, [150])
    last_with_hash = number == EVENTS and with_hash  # nothing follows it: the chain is right, but its end is known
    assert (finding.kind, finding.last_seq) == ("RECOMPUTED" if last_with_hash else "ALTERED", number)
    assert last_with_hash or finding.event_id == real[number - 1].id


@pytest.mark.parametrize(("first", "last"), [(1, 1), (1, 3), (77, 77), (50, 60), (200, 200), (190, 200), (1, 200)])
def test_removed_events_are_named(first: int, last: int) -> None:
    real = chain("w")
    assert told(found(real[: first - 1] + real[last:], real, [150])) == {("REMOVED", first, last)}


def test_an_event_that_was_put_in_is_named() -> None:
    real = chain("w")
    forged = placed(draft(time_us=5, actor="mallory"), "w", real[99].link)
    (finding,) = found([*real[:101], forged, *real[101:]], real)
    assert (finding.kind, finding.first_seq, finding.event_id) == ("INSERTED", 101, forged.id)
    (finding,) = found([*real[:100], forged, *real[100:]], real)  # before its twin
    assert (finding.kind, finding.first_seq, finding.event_id) == ("INSERTED", 101, forged.id)
    behind = placed(draft(time_us=5, actor="mallory"), "w", real[-1].link)
    (finding,) = found([*real, behind], real)
    assert (finding.kind, finding.first_seq, finding.event_id) == ("INSERTED", 201, behind.id)
    no_link = replace(behind, seq=10)
    (finding,) = found([*real[:10], no_link, *real[10:]], real)
    assert (finding.kind, finding.first_seq, finding.event_id) == ("INSERTED", 10, behind.id)


def test_a_chain_that_nobody_shipped_is_named() -> None:
    real, forged = chain("w"), chain("v", 3)
    assert {(one.kind, one.writer_id) for one in found([*forged, *real], real)} == {("INSERTED", "v")}


@pytest.mark.parametrize(("one", "other"), [(5, 6), (5, 7), (1, 200), (100, 199)])
def test_swapped_events_are_named(one: int, other: int) -> None:
    real = chain("w")
    rows = list(real)
    rows[one - 1], rows[other - 1] = replace(real[other - 1], seq=one), replace(real[one - 1], seq=other)
    assert told(found(rows, real, [150])) == {("REORDERED", one, one), ("REORDERED", other, other)}


@pytest.mark.parametrize("first", [0, 60, 199])
def test_a_chain_that_was_computed_anew_is_named_from_the_last_good_checkpoint_on(first: int) -> None:
    real = chain("w")
    changed = [replace(event, actor="mallory") if event.seq == first + 1 else event for event in real]
    after = {0: 1, 60: 51, 199: 151}[first]
    assert told(found(anew(changed, first), real, [50, 100, 150, 200])) == {("RECOMPUTED", after, 200)}


def test_events_that_went_by_age_are_not_missed_and_others_are() -> None:
    real = chain("w")
    gone = Dropped(
        month="2026-01",
        writer_id="w",
        first_seq=1,
        last_seq=80,
        before=real[0].prev_hash.hex(),
        after=real[79].hash.hex(),
    )
    next_gone = replace(gone, first_seq=81, last_seq=90, before=gone.after, after=real[89].hash.hex())
    dropped = {"w": [gone, next_gone]}
    assert found(real[90:], real, [50, 150], dropped=dropped) == []
    assert found(real[80:], real, [50, 150], dropped=dropped) == []
    assert told(found(real[95:], real, [50, 150], dropped=dropped)) == {("REMOVED", 91, 95)}
    assert told(found(real[70:], real, [50, 150], dropped={"w": [next_gone]})) == {("REMOVED", 1, 70)}
    later = anew([replace(event, actor="mallory") if event.seq == 91 else event for event in real], 90)
    assert told(found(later[90:], real, [50, 150], dropped=dropped)) == {("RECOMPUTED", 91, 200)}


@pytest.mark.parametrize("seed", range(20))
def test_several_faults_at_once_are_each_named(seed: int) -> None:
    rng = random.Random(seed)
    real = chain("w")
    places = sorted(rng.sample(range(5, 195, 5), 6))
    altered, removed, swapped = places[:2], places[2:4], places[4:]
    rows = {event.seq: event for event in real}
    for number in altered:
        rows[number] = replace(rows[number], target=str(uuid4()))
    one, other = swapped
    rows[one], rows[other] = replace(real[other - 1], seq=one), replace(real[one - 1], seq=other)
    for number in removed:
        del rows[number]
    expected = {("ALTERED", number, number) for number in altered} | {("REMOVED", number, number) for number in removed}
    expected |= {("REORDERED", number, number) for number in swapped}
    assert told(found(list(rows.values()), real, [199])) == expected
