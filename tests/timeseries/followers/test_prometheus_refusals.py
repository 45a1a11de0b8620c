"""What a Prometheus-compatible store refuses for good: found, counted exactly, told, and in nobody's way."""

from pathlib import Path

import pytest

from services.timeseries.followers import prometheus as adapter
from services.timeseries.followers.remote_write_labels import Version
from tests.harness.prometheus import PrometheusServer
from tests.timeseries.followers.prometheus_parts import SET, WIDE, backend, following, tagged
from tests.timeseries.followers.samples import CLOCK, caught_up, rows


@pytest.mark.parametrize("version", [None, Version.V1], ids=["counted by the answer", "searched for"])
async def test_what_is_refused_for_good_is_counted_exactly_and_stops_nobody(
    strict: PrometheusServer, version: Version | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = backend(strict.write_url)
    monkeypatch.setattr(store, "_version", version)
    now_ms = CLOCK.now_ms()
    a, b, late, new = (f"{name}-{version}" for name in ("a", "b", "late", "new"))
    await store.ship([tagged([(a, now_ms, [1.0, 2.0, 3.0]), (b, now_ms, [1.0, 2.0, 3.0]), (late, now_ms, [1.0] * 3)])])
    receipt = await store.ship(
        [
            tagged([(late, now_ms - 90_000 + at, [1.0, 2.0, 3.0]) for at in range(5)]),
            tagged([(a, now_ms, [1.0, 7.0, 3.0]), (b, now_ms, [1.0, 2.0, 3.0])]),
            tagged([(new, now_ms + at, [1.0, 2.0, 3.0]) for at in range(4)]),
        ]
    )
    assert dict(receipt.refused) == {"OUT_OF_ORDER": 15, "DUPLICATE_TIMESTAMP": 1}
    assert receipt.shipped == 5 + 12
    receipt = await store.ship([tagged([(late, now_ms - 2 * 86_400_000, [1.0] * 3), (new, now_ms + 9, [1.0] * 3)])])
    assert (receipt.shipped, dict(receipt.refused)) == (3, {"TOO_OLD": 3})
    assert store._version is (version or Version.V2)
    counts = await strict.points(now_ms + 1_000)
    assert [counts[name, "production", "web"] for name in (a, b, late, new)] == [3, 3, 3, 15]
    await store.close()


async def test_the_search_for_refused_samples_has_a_bound(
    strict: PrometheusServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "MAX_SEARCH_REQUESTS", 8)
    store = backend(strict.write_url)
    monkeypatch.setattr(store, "_version", Version.V1)
    now_ms = CLOCK.now_ms()
    await store.ship([tagged([("bound", now_ms, [1.0] * 511)], WIDE)])
    late = tagged([("bound", now_ms - 5_000, [1.0] * 511), ("bound-new", now_ms, [1.0] * 511)], WIDE)
    receipt = await store.ship([late])
    assert receipt.refused["OUT_OF_ORDER"] >= 511 and receipt.shipped + receipt.refused["OUT_OF_ORDER"] == 2 * 511
    await store.close()


@pytest.mark.parametrize("answer_bytes", [adapter.MAX_ANSWER_BYTES, 20_000])
async def test_an_answer_that_names_every_refused_sample_may_be_long(
    strict: PrometheusServer, monkeypatch: pytest.MonkeyPatch, answer_bytes: int
) -> None:
    monkeypatch.setattr(adapter, "MAX_ANSWER_BYTES", answer_bytes)
    store, now_ms = backend(strict.write_url), CLOCK.now_ms()
    ids = [f"long-{answer_bytes}-{number}" for number in range(8)]
    await store.ship([tagged([(name, now_ms, [1.0] * 511) for name in ids], WIDE)])
    late = [(name, now_ms - 9_000 + at, [1.0] * 511) for name in ids for at in range(5)]
    twice = [(ids[0], now_ms, [2.0, 2.0, *[1.0] * 509])]
    receipt = await store.ship([tagged(late, WIDE), tagged(twice, WIDE)])
    assert dict(receipt.refused) == {"OUT_OF_ORDER": 8 * 5 * 511, "DUPLICATE_TIMESTAMP": 2}
    assert receipt.shipped == 509
    await store.close()


async def test_refusals_reach_the_follower_with_reason_and_time(
    strict: PrometheusServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now_ms = CLOCK.now_ms()
    async with following(tmp_path, strict.write_url) as (engine, follower):
        for at in (0, -50_000, 1):
            await engine.append(rows(SET, [("told", now_ms + at, [1.0, 2.0, 3.0])]), metric_sets=(SET,))
            await caught_up(engine)
        refusal = follower.refusals["OUT_OF_ORDER"]
        assert refusal.points == 3 and now_ms <= refusal.first_ms <= refusal.last_ms
        assert follower.shipped_points == 6
    assert len([record for record in caplog.records if "OUT_OF_ORDER" in record.message]) == 1
