"""What callers are told of what is foretold, and what they may not ask."""

import math
from typing import Any

import pytest

from openmanager.analytics.v1 import prediction_pb2 as pb
from openmanager.fleet.v1 import prediction_pb2 as words
from runtime.clock import ManualClock
from runtime.errors import InvalidArgument, ResourceExhausted
from services.analytics.prediction.foresight import Foresight
from services.analytics.prediction.servicer import MAX_SERVERS, STALE_MS, PredictionServicer
from tests.analytics.prediction.made import MINUTE, MINUTE_MS, SERVERS, climb, foretold, new_predictor


def troubled() -> Foresight:
    """Server a is well, b's disk fills by 20 % an hour, c has errors and flaps."""
    predictor = new_predictor()
    for minute, disk in enumerate(climb(40.0, 20.0, 100)):
        values = [[50.0, 40.0, 0.5, 0.5], [disk, 40.0, 0.5, 0.5], [50.0, 40.0, 9.0, 0.5]]
        foresight = foretold(predictor, minute, values, falls=[0.0, 0.0, 2.0])
    return foresight


async def answered(
    foresight: Foresight | None, *server_ids: str, least: float = 0.0, later_ms: int = 0
) -> pb.ListPredictionsResponse:
    clock = ManualClock(later_ms + (0 if foresight is None else foresight.end_ms))
    servicer = PredictionServicer(lambda: foresight, clock)
    request = pb.ListPredictionsRequest(server_ids=server_ids, min_probability=least)
    return await servicer.ListPredictions(request, None)


async def test_predictions_come_with_numbers_that_are_there() -> None:
    answer = await answered(troubled(), "c", "nobody", "b", "a", "b")
    assert answer.servers == 3
    full, flaps, well = answer.predictions
    assert [one.server_id for one in answer.predictions] == ["b", "c", "a"]
    assert full.horizon.seconds == 8 * 3_600
    assert full.probability == pytest.approx(0.9)
    assert full.compute_time.ToMilliseconds() == (MINUTE + 100) * MINUTE_MS
    assert full.low.ToMilliseconds() <= full.date.ToMilliseconds() <= full.high.ToMilliseconds()
    left_minutes = (full.date.ToMilliseconds() - full.compute_time.ToMilliseconds()) / MINUTE_MS
    assert left_minutes == pytest.approx((95.0 - 73.0) / 20.0 * 60.0, abs=2)
    (reason,) = full.reasons
    assert (reason.kind, reason.metric) == (words.PREDICTION_REASON_KIND_SATURATION, "disk")
    assert (reason.limit, reason.value, reason.share) == (95.0, pytest.approx(73.0), 1.0)
    assert reason.slope_per_hour == pytest.approx(20.0)
    assert reason.date == full.date
    assert [words.PredictionReasonKind.Name(one.kind) for one in flaps.reasons] == [
        "PREDICTION_REASON_KIND_FLAPPING",
        "PREDICTION_REASON_KIND_ERRORS",
    ]
    assert not flaps.HasField("date")
    assert not flaps.reasons[0].HasField("limit")
    assert (flaps.reasons[1].metric, flaps.reasons[1].value, flaps.reasons[1].limit) == ("fails", 9.0, 1.0)
    assert (well.probability, len(well.reasons), well.HasField("date")) == (0.0, 0, False)


async def test_only_those_that_are_likely_enough_are_told() -> None:
    answer = await answered(troubled(), *SERVERS, least=0.8)
    assert ([one.server_id for one in answer.predictions], answer.servers) == (["b"], 3)
    assert list((await answered(troubled(), least=0.0)).predictions) == []


async def test_before_the_first_minute_nothing_is_foretold() -> None:
    answer = await answered(None, *SERVERS)
    assert (list(answer.predictions), answer.servers) == ([], 0)


async def test_what_was_foretold_long_ago_is_not_told_any_more() -> None:
    told = troubled()
    assert (await answered(told, *SERVERS, later_ms=STALE_MS - 1)).servers == 3
    answer = await answered(told, *SERVERS, later_ms=STALE_MS)
    assert (list(answer.predictions), answer.servers) == ([], 0)


@pytest.mark.parametrize("least", [-0.1, 1.1, math.nan, math.inf])
async def test_what_is_no_probability_is_refused(least: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await answered(troubled(), "a", least=least)
    assert caught.value.field == "min_probability"


async def test_too_many_servers_are_refused() -> None:
    many: list[Any] = [str(number) for number in range(MAX_SERVERS + 1)]
    with pytest.raises(ResourceExhausted) as caught:
        await answered(troubled(), *many)
    assert caught.value.reason == "MAX_SERVERS"
