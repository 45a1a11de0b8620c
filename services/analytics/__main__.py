"""The analytics service: settings -> detector and findings, from disk -> the tail -> gRPC."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from runtime import tasks
from runtime.process import Process, run_process
from runtime.server import bind
from runtime.tasks import Backoff, run_forever
from services.analytics import commands
from services.analytics.checkpoint import Checkpointer, CheckpointFile
from services.analytics.core import Analysis
from services.analytics.fleet_detector import FleetDetector
from services.analytics.follow import TailFollower
from services.analytics.outbox import Outbox, Reporter
from services.analytics.outlook.measurements import Source
from services.analytics.outlook.ranking import CAPACITY_SERVICE, CapacityServicer
from services.analytics.outlook.servicer import PUBLIC_SERVICE, OutlookServicer
from services.analytics.outlook.tally import Tally
from services.analytics.outlook.workers import Workers
from services.analytics.prediction.servicer import PREDICTION_SERVICE, PredictionServicer
from services.analytics.registry import Limits
from services.analytics.scores import ScoreWriter
from services.analytics.servicer import DETECTION_SERVICE, DetectionServicer
from services.analytics.settings import AnalyticsSettings
from services.analytics.verdicts import VerdictFollower

BACKOFF = Backoff(max_s=2.0)
"""A service that was away is talked to again within this time."""


@asynccontextmanager
async def analysing(settings: AnalyticsSettings, process: Process[AnalyticsSettings]) -> AsyncIterator[Analysis]:
    """The analysis, fed and saved for as long as this is entered, and saved once more at the end."""
    detector = FleetDetector(silence_ms=round(settings.silence_s * 1000), limits=Limits(series=settings.series_limit))
    async with (
        process.open_channel(settings.timeseries_target) as timeseries,
        process.open_channel(settings.metadata_target) as metadata,
    ):
        scores = ScoreWriter(timeseries, process.clock)
        analysis = Analysis(detector, Outbox(), process.clock, scores)
        file = CheckpointFile(process.folder)
        checkpointer = Checkpointer(file, analysis, process.clock, settings.checkpoint_interval_s)
        await checkpointer.restore()
        work = {
            "tail": TailFollower(timeseries, analysis).follow,
            "checkpoint": checkpointer.run,
            "findings": Reporter(metadata, analysis.outbox).run,
            "verdicts": VerdictFollower(metadata, analysis).follow,
            "scores": scores.run,
        }
        running = [
            tasks.start(name, run_forever(name, run, BACKOFF, clock=process.clock)) for name, run in work.items()
        ]
        try:
            yield analysis
        finally:
            await tasks.cancel(*running)
            await checkpointer.save_last()


async def serve(settings: AnalyticsSettings, process: Process[AnalyticsSettings]) -> None:
    """Serves until the process stops; timeseries may come and go meanwhile."""
    async with analysing(settings, process) as analysis, process.open_channel(settings.timeseries_target) as timeseries:
        source, tally = Source(timeseries), Tally()
        with Workers() as workers:
            await process.serve_grpc(
                settings.analytics_address,
                [
                    bind(DETECTION_SERVICE, DetectionServicer(analysis, tally, process.clock)),
                    bind(PUBLIC_SERVICE, OutlookServicer(source, workers, process.clock, tally)),
                    bind(CAPACITY_SERVICE, CapacityServicer(source, workers, process.clock, tally)),
                    bind(PREDICTION_SERVICE, PredictionServicer(lambda: analysis.detector.foresight, process.clock)),
                ],
                address_setting="ANALYTICS_ADDRESS",
            )


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit(commands.main(sys.argv[1:]))
    run_process("analytics", AnalyticsSettings, serve)
