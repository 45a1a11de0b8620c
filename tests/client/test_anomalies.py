"""Findings as the command says them, from a gateway that answers as a test wants."""

import asyncio
import math
import re
import time
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from openmanager.fleet.v1 import anomaly_pb2
from openmanager.gateway.v1 import analytics_pb2 as pb
from tests.client.calling import called, serving


def finding(number: int, detector: str, metric: str = "", **fields: Any) -> anomaly_pb2.Anomaly:
    made = anomaly_pb2.Anomaly(
        id=f"{number:032x}", server_id=f"web-{number}", detector=detector, metric=metric, score=0.5, **fields
    )
    made.start_time.seconds = 1_796_000_000
    return made


def at(ahead_s: float) -> Timestamp:
    made = Timestamp()
    made.FromMilliseconds(round((time.time() + ahead_s) * 1_000))
    return made


def part(metric: str, value: float) -> anomaly_pb2.AnomalyContribution:
    return anomaly_pb2.AnomalyContribution(
        metric=metric, value=value, expected_low=math.nan, expected_high=math.nan, score=0.5
    )


class FakeAnalytics:
    """These findings on one page."""

    def __init__(self, *told: anomaly_pb2.Anomaly, learned: float = 1.0, partly_judged: bool = False) -> None:
        self.told = told
        self.known: dict[str, Any] = {"learned": learned, "partly_judged": partly_judged}

    async def ListAnomalies(self, _request: Any, _context: object) -> pb.ListAnomaliesResponse:
        return pb.ListAnomaliesResponse(anomalies=self.told, total_size=len(self.told), **self.known)

    async def GetAnomaly(self, request: Any, _context: object) -> pb.GetAnomalyResponse:
        (one,) = (one for one in self.told if one.id == request.id)
        return pb.GetAnomalyResponse(anomaly=one)


async def test_what_was_found_is_said_for_each_detector() -> None:
    parts = [part("cpu_usage", 97.5), part("load\x1b[31m", math.nan)]
    told = {
        "silent for 93 s": finding(1, "silence", value=92.6),
        "silent": finding(2, "silence", value=math.nan),
        "silent for 2h": finding(6, "silence", value=40.0, peak_time=at(-7_190)),
        "silent for 3h": finding(7, "silence", value=10_800.0, peak_time=at(-86_400), end_time=at(-86_400)),
        "likely to fail: disk_usage": finding(3, "prediction", "disk_usage"),
        "likely to fail": finding(4, "prediction"),  # that it falls again and again has no metric
        "cpu_usage and 1 more": finding(5, "departure", "cpu_usage", contributions=parts),
    }
    async with serving(FakeAnalytics(*told.values())) as address:
        listed = await asyncio.to_thread(called, address, "anomalies")
        assert (listed.returncode, listed.stderr) == (0, "")
        _, *rows = listed.stdout.splitlines()
        for row, (words, one) in zip(rows, told.items(), strict=True):
            assert re.split(r"  +", row)[2:5] == [one.server_id, "0.50", words]
            shown = await asyncio.to_thread(called, address, "anomaly", one.id)
            assert shown.stdout.splitlines()[0] == f"{one.server_id}: {words}"
        assert [line.split() for line in shown.stdout.splitlines()[-2:]] == [
            ["cpu_usage", "97.5", "-", "to", "-", "0.50"],
            ["load\N{REPLACEMENT CHARACTER}[31m", "-", "-", "to", "-", "0.50"],
        ]


async def test_that_not_all_is_judged_is_said() -> None:
    beyond = "not all metrics are judged: analytics watches as many as it may (ANALYTICS_SERIES_LIMIT)"
    learning = "still learning what is usual, 50% done: what is not known yet is not found"
    for learned, partly_judged, said in (
        (1.0, True, [beyond]),
        (0.5, True, [beyond, learning]),
        (0.0, True, [beyond]),  # of a server none of whose metrics is judged
        (0.5, False, [learning]),
    ):
        async with serving(FakeAnalytics(learned=learned, partly_judged=partly_judged)) as address:
            listed = await asyncio.to_thread(called, address, "anomalies")
            assert listed.stdout.splitlines() == ["nothing was found", *said]
