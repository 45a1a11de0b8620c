"""Heads answer from what they keep in order what looking at every head would answer, and no row is lost or moved."""

import random

import numpy as np
import pytest

from services.timeseries.engine.catalog import Cohort, StoredSet
from services.timeseries.engine.head import Chunk, Head, Heads, row_bytes
from services.timeseries.engine.settings import DAY_MS, EngineSettings
from tests.timeseries.engine.model import metric_set

SET = StoredSet.of(1, metric_set("cpu_usage", "memory_usage", "requests_total"))
COHORTS = [Cohort(id=number, server_id=f"s{number}", stored_set=SET) for number in range(1, 9)]
SETTINGS = EngineSettings(head_rows=12, head_age_s=50.0, head_bytes_limit=40 * row_bytes(3))
Rows = list[tuple[Cohort, int, list[float]]]


def apply(heads: Heads, rows: Rows, sequence: int, now: float, *, distinct: bool = False) -> bool:
    return heads.apply(
        [cohort for cohort, _, _ in rows],
        np.array([time for _, time, _ in rows], np.int64),
        np.array([values for _, _, values in rows], np.float64),
        sequence,
        now,
        distinct=distinct,
    )


def contents(chunks: list[Chunk]) -> list[tuple[int, int, list[float]]]:
    return [
        (int(sequence), int(time), row.tolist())
        for chunk in chunks
        for time, sequence, row in zip(chunk.times_ms, chunk.sequences, chunk.values, strict=True)
    ]


class Slow:
    """What is due, and from where on the journal is needed, found by looking at every head."""

    def __init__(self, heads: Heads) -> None:
        self._heads = heads

    def floor(self, last_sequence: int) -> int:
        firsts = [sequence for head in self._heads for sequence, _, _ in contents(head.chunks())]
        return min(firsts, default=last_sequence + 1) - 1

    def must(self, now: float) -> set[Head]:
        """Those that no room for choice is left for: failed, full, aged."""
        return {
            head
            for head in self._heads
            if head.closing is not None
            or head.size >= SETTINGS.head_rows
            or (head.size and now - head.opened_at >= SETTINGS.head_age_s)
        }

    @property
    def bytes(self) -> int:
        return sum(len(contents(head.chunks())) for head in self._heads) * row_bytes(3)

    @property
    def points(self) -> int:
        return sum(not np.isnan(v) for h in self._heads for _, _, row in contents(h.chunks()) for v in row)


def check(heads: Heads, now: float, last_sequence: int) -> None:
    slow, due = Slow(heads), heads.due(now)
    assert heads.floor(last_sequence) == slow.floor(last_sequence)
    assert (heads.bytes, heads.points) == (slow.bytes, slow.points)
    assert len(set(due)) == len(due)
    assert slow.must(now) <= set(due)
    chosen = [head for head in due if head not in slow.must(now)]
    others = [head for head in heads if head.size and head not in due]
    half = SETTINGS.head_bytes_limit // 2
    left = heads.bytes - sum(head.bytes for head in due)
    assert left <= half, "as many close as are too much"
    if chosen:
        assert left + chosen[-1].bytes > half, "and not one more"
        assert all(mine.opened_at <= other.opened_at for mine in chosen for other in others), "the oldest ones"
    assert set(heads.due(now, everything=True)) == {head for head in heads if head.chunks()}


@pytest.mark.parametrize("seed", range(30))
def test_what_is_asked_often_equals_looking_at_every_head(seed: int) -> None:
    rng, heads, now, sequence = random.Random(seed), Heads(SETTINGS), 0.0, 0
    for _ in range(120):
        now += rng.random() * 10
        step = rng.random()
        if step < 0.6:
            sequence += 1
            nan = float("nan")
            rows = [
                (cohort, rng.randrange(3 * DAY_MS), [rng.choice([1.0, nan]) for _ in range(3)])
                for cohort in rng.sample(COHORTS, rng.randrange(1, 8))
            ]
            apply(heads, rows, sequence, now, distinct=rng.random() < 0.5)
        elif step < 0.9:
            for head in heads.due(now, everything=rng.random() < 0.2):
                chunk = heads.begin_close(head)
                if rng.random() < 0.7:  # else its block could not be stored
                    heads.finish_close(head, int(np.count_nonzero(~np.isnan(chunk.values))))
        else:
            gone = heads.drop(rng.randrange(3))
            heads.points -= sum(not np.isnan(v) for h in gone for _, _, row in contents(h.chunks()) for v in row)
        check(heads, now, sequence)


@pytest.mark.parametrize("distinct", [False, True])
def test_rows_are_kept_in_order_and_a_view_of_them_never_changes(distinct: bool) -> None:
    heads, expected = Heads(SETTINGS), dict[tuple[int, int], list[tuple[int, int, list[float]]]]()
    held: list[tuple[Chunk, list[tuple[int, int, list[float]]]]] = []
    for sequence in range(1, 60):
        rows = [(c, sequence * 7_919_000 % (2 * DAY_MS), [sequence + c.id / 8, 0.0, -1.0]) for c in COHORTS]
        full = apply(heads, rows, sequence, 0.0, distinct=distinct)
        for cohort, time, values in rows:
            expected.setdefault((time // DAY_MS, cohort.id), []).append((sequence, time, values))
        for head in heads:
            assert contents(head.chunks()) == expected[head.day, head.cohort.id]
            held.extend((chunk, contents([chunk])) for chunk in head.chunks())
        assert full == any(len(rows) == SETTINGS.head_rows for rows in expected.values())
        if full:
            for head in heads.due(0.0):
                closed = contents([heads.begin_close(head)])
                heads.finish_close(head, 3 * len(closed))
                assert closed == expected.pop((head.day, head.cohort.id))
    assert all(contents([chunk]) == then for chunk, then in held)


def test_two_rows_of_one_cohort_go_in_as_they_came() -> None:
    heads, a, b = Heads(SETTINGS), COHORTS[0], COHORTS[1]
    apply(heads, [(a, 5, [1.0] * 3), (b, 5, [2.0] * 3), (a, 5, [3.0] * 3), (a, DAY_MS, [4.0] * 3)], 1, 0.0)
    found = {(head.day, head.cohort.id): [row[0] for _, _, row in contents(head.chunks())] for head in heads}
    assert found == {(0, a.id): [1.0, 3.0], (0, b.id): [2.0], (1, a.id): [4.0]}


def test_room_is_reserved_once_and_for_all_heads_within_half_the_limit() -> None:
    settings = EngineSettings(head_rows=720, head_bytes_limit=8 * 2 * 24 * row_bytes(3))
    heads, arrays = Heads(settings), set()
    for sequence in range(1, 25):
        apply(heads, [(cohort, sequence, [1.0] * 3) for cohort in COHORTS], sequence, 0.0, distinct=True)
        arrays.update((head.cohort.id, head.capacity) for head in heads)
    assert len(arrays) == 2 * len(COHORTS), "for the first row, and for all that follow"
    assert sum(head.capacity for head in heads) * row_bytes(3) <= settings.head_bytes_limit // 2 == heads.bytes
