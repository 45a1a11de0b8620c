"""What the back-tests of given answers say together."""

import pytest

from openmanager.fleet.v1 import outlook_pb2 as pb
from services.analytics.outlook import tally as module
from services.analytics.outlook.tally import Tally


def forecast(server_id: str, mase: float | None, inside: float, trials: int = 3) -> pb.Forecast:
    test = pb.ForecastBacktest(trials=trials, mase=mase, coverage80=inside, coverage95=(1 + inside) / 2)
    return pb.Forecast(server_id=server_id, metric="m", backtest=test)


def test_each_metric_counts_once_with_its_latest_test() -> None:
    tally = Tally()
    assert (tally.forecasts().metrics, tally.forecasts().HasField("mase")) == (0, False)
    for one in (
        forecast("a", 9.0, 0.1),
        forecast("b", 0.5, 0.8),
        forecast("c", None, 0.6),
        forecast("d", 7.0, 0.9, trials=0),
        forecast("a", 0.7, 0.7),
    ):
        tally.add(one)
    report = tally.forecasts()
    assert report.metrics == 3
    assert report.mase == pytest.approx(0.6)
    assert report.coverage80 == pytest.approx(0.7)
    assert report.coverage95 == pytest.approx(0.85)
    tally.add(pb.Capacity(server_id="a", metric="m", backtest=pb.CapacityBacktest(trials=4, coverage=0.75)))
    tally.add(pb.Capacity(server_id="b", metric="m"))
    assert (tally.capacities().metrics, tally.capacities().coverage) == (1, 0.75)


def test_those_asked_about_longest_ago_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_METRICS", 2)
    tally = Tally()
    for server_id, mase in (("a", 1.0), ("b", 2.0), ("a", 1.0), ("c", 3.0)):
        tally.add(forecast(server_id, mase, 0.8))
    assert (tally.forecasts().metrics, tally.forecasts().mase) == (2, 2.0)
