"""What `openmanager ingest` reads is what the gateway would have read of it over HTTP."""

import json
from typing import Any

import pytest
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813  a function, named as a class

from client.command.body import BadBody, batch_of
from gateway.http.routes import routes_for
from gateway.http.transcode import RequestReader
from openmanager.gateway.v1 import ingest_pb2
from runtime.errors import InvalidArgument

SERVICE = default_pool().FindServiceByName(f"{ingest_pb2.DESCRIPTOR.package}.IngestService")


@pytest.mark.parametrize(
    "part",
    [
        *({"rows": [{"serverId": "s", "time": time}]} for time in ("2026-01-02t03:04:05.5z", -5, "-5", 20261122, 1.25)),
        *({"values": [value]} for value in ("1.5", "-2e3", "Infinity", 10**30)),
        *({"metrics": [{"name": "m", "kind": kind}]} for kind in ("1", " Gauge ", "METRIC-KIND-COUNTER", 2, None)),
        {"rows": [{"serverId": "s", "server_id": "t", "time": 1}]},
        {"metrics": [[]]},
        {"servers": [[]]},
        {"values": ["1e999"]},
    ],
)
def test_a_document_means_what_it_means_over_http(part: dict[str, Any]) -> None:
    whole = {"metrics": [{"name": "m"}], "rows": [{"serverId": "s", "time": 1_700_000_000}], "values": [1]}
    text = json.dumps(whole | part).encode()
    try:
        wanted = RequestReader(routes_for([SERVICE])[0]).read((), b"", text, 0)
    except InvalidArgument:
        with pytest.raises(BadBody):
            batch_of(text)
    else:
        assert batch_of(text) == wanted
