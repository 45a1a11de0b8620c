"""OpenManager from Python: the public gRPC API, with reconnecting, re-sending and errors that say what to do.

    async with OpenManager.connect("127.0.0.1:50050") as manager:
        async for server in manager.servers(status="critical"):
            print(server.id, server.metrics["cpu_usage"])
        history = await manager.history("web-01", ["cpu_usage"], step_s=60)
        history.series[0].values.mean()

Answers are the messages of the API themselves (`openmanager.gateway.v1`, `openmanager.fleet.v1`): they are typed, a
field that a newer gateway adds is there without a change here, and nobody has to learn every name twice. The one
exception is history, whose columns become numpy arrays.

What must stay true: this package speaks the public API only, so it knows nothing else of the product (a lint contract);
the `openmanager` command (`client.command`) uses nothing but this package.
"""

from client.api import OpenManager
from client.channel import BadAddress
from client.errors import OpenManagerError
from client.history import History, Series
from client.writing import Totals, batch
from openmanager.fleet.v1.metric_pb2 import Metric, RowError, ServerDescriptor
from openmanager.fleet.v1.status_pb2 import StoreStatus
from openmanager.gateway.v1.fleet_pb2 import FleetSummary, Server, WatchFleetResponse
from openmanager.gateway.v1.history_pb2 import MetricDescription
from openmanager.gateway.v1.ingest_pb2 import WriteMetricsRequest, WriteMetricsResponse

__all__ = [
    "BadAddress",
    "FleetSummary",
    "History",
    "Metric",
    "MetricDescription",
    "OpenManager",
    "OpenManagerError",
    "RowError",
    "Series",
    "Server",
    "ServerDescriptor",
    "StoreStatus",
    "Totals",
    "WatchFleetResponse",
    "WriteMetricsRequest",
    "WriteMetricsResponse",
    "batch",
]
