"""`openmanager predictions`."""

import json
import sys
from argparse import Namespace
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from client.api import OpenManager
from client.command import exits
from client.command.fleet import as_json
from client.command.tables import Column, table
from client.command.terminal import Terminal
from client.command.values import number_text, time_text
from client.predictions import predictions
from openmanager.fleet.v1 import prediction_pb2 as pb

_COLUMNS: Final = (
    Column("SERVER"),
    Column("FAILS", right=True),
    Column("WHY"),
    Column("METRIC"),
    Column("NOW", right=True),
    Column("AN HOUR", right=True),
    Column("DATE (UTC)"),
    Column("NOT BEFORE"),
    Column("NOT AFTER"),
)
_PREFIX: Final = "PREDICTION_REASON_KIND_"


async def run(manager: OpenManager, options: Namespace) -> int:
    """Runs the command; returns the exit status."""
    terminal = Terminal(sys.stdout)
    answer = await predictions(
        manager, min_probability=options.min_probability, environment=options.environment, role=options.role
    )
    if options.output == "json":
        terminal.line(json.dumps(as_json(answer)))
        return exits.OK
    shown = answer.predictions
    terminal.line(
        f"{len(shown)} of {answer.servers} servers are likely to fail, by {options.min_probability:.0%} or more"
    )
    if shown:
        for line in table(terminal, _COLUMNS, [_row(one) for one in shown]):
            terminal.line(line)
    return exits.OK


def _row(prediction: pb.Prediction) -> tuple[str, ...]:
    kinds = dict.fromkeys(_word(reason) for reason in prediction.reasons)
    first = next((reason for reason in prediction.reasons if reason.metric), None)
    return (
        prediction.server_id,
        f"{prediction.probability:.0%}",
        ", ".join(kinds) or "-",
        first.metric if first else "-",
        number_text(first.value) if first else "-",
        number_text(first.slope_per_hour) if first and first.HasField("slope_per_hour") else "-",
        *(
            _minute(getattr(prediction, field)) if prediction.HasField(field) else "-"
            for field in ("date", "low", "high")
        ),
    )


def _word(reason: pb.PredictionReason) -> str:
    """A reason's kind as people read it; the number of one that is newer than this program."""
    kind = pb.PredictionReasonKind.DESCRIPTOR.values_by_number.get(reason.kind)
    return str(reason.kind) if kind is None else kind.name.removeprefix(_PREFIX).lower().replace("_", " ")


def _minute(time: Timestamp) -> str:
    return time_text(time.seconds)[:16]
