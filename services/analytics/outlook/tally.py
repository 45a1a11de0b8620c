"""How good the answers were that were given: the back-test of each metric that was asked about, the latest one.

What must stay true: what is kept is bounded, and the metrics that were asked about longest ago go first.
"""

import statistics
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final, TypeVar

from openmanager.fleet.v1 import outlook_pb2, report_pb2

MAX_METRICS: Final = 10_000
_Key = tuple[str, str]
Test = TypeVar("Test")


class Tally:
    """The back-tests of forecasts and of dates."""

    def __init__(self) -> None:
        self._forecasts: OrderedDict[_Key, outlook_pb2.ForecastBacktest] = OrderedDict()
        self._capacities: OrderedDict[_Key, outlook_pb2.CapacityBacktest] = OrderedDict()

    def add(self, answer: outlook_pb2.Forecast | outlook_pb2.Capacity) -> None:
        """Takes an answer's."""
        if not answer.backtest.trials:
            return
        key = answer.server_id, answer.metric
        if isinstance(answer, outlook_pb2.Forecast):
            _put(self._forecasts, key, answer.backtest)
        else:
            _put(self._capacities, key, answer.backtest)

    def forecasts(self) -> report_pb2.ForecastReport:
        """Of all of them together."""
        tests = list(self._forecasts.values())
        errors = [test.mase for test in tests if test.HasField("mase")]
        return report_pb2.ForecastReport(
            metrics=len(tests),
            mase=statistics.median(errors) if errors else None,
            coverage80=_mean(test.coverage80 for test in tests if test.HasField("coverage80")),
            coverage95=_mean(test.coverage95 for test in tests if test.HasField("coverage95")),
        )

    def capacities(self) -> report_pb2.CapacityReport:
        """Of all of them together."""
        tests = list(self._capacities.values())
        coverage = _mean(test.coverage for test in tests if test.HasField("coverage"))
        return report_pb2.CapacityReport(metrics=len(tests), coverage=coverage)


def _put(kept: "OrderedDict[_Key, Test]", key: _Key, test: Test) -> None:
    kept.pop(key, None)
    kept[key] = test
    while len(kept) > MAX_METRICS:
        kept.popitem(last=False)


def _mean(values: Iterable[float]) -> float | None:
    given = list(values)
    return statistics.fmean(given) if given else None
