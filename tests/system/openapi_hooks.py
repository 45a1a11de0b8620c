"""What schemathesis is told of the product, so that its requests get past the first check: loaded by the command.

The document says what types are; here requests are told what exists: where a string is an id, it is one of those named
in the environment (KNOWN_SERVERS, separated by commas), and so with metrics, times and durations; among them are some
that do not exist or make no sense. Requests that keep to no schema at all are schemathesis's own. Only servers that it
made itself are deleted. Answers are held to stricter schemas than the document's: a field that no proto has is a fault.
"""

import json
import os
from typing import Any

import schemathesis

SERVERS = [*os.environ.get("KNOWN_SERVERS", "").split(","), "nobody"]
MADE = ["made-1", "made-2"]
METRICS = ["cpu_usage", "load_1m", "disk_usage", 'disk_used{mount="/"}', "no_such_metric", ""]
TIMES = ["-1h", "-10s", "now", "now-5m", "0", "1769860800.5", "2026-01-31T12:00:00Z", "9999-12-31T23:59:59Z"]
SPANS = ["1s", "10s", "60s", "5m", "0s", "7d", "-1s", "9999999999s"]
UUIDS = ["0191d5b2-7c1e-4f0e-9a53-0a4b6f0c2d11", "3f2b7c1e-8c1d-4f0e-9a53-0a4b6f0c2d12", "no-uuid"]
# Name of a field or parameter -> what it may well be.
KNOWN: dict[str, list[Any]] = {
    "server_id": SERVERS,
    "serverId": SERVERS,
    "serverIds": SERVERS,
    "metric": METRICS,
    "metrics": METRICS,
    "start_time": TIMES,
    "end_time": TIMES,
    "startTime": TIMES,
    "endTime": TIMES,
    "time": TIMES,
    "step": SPANS,
    "duration": SPANS,
    "reportInterval": SPANS,
    "update_mask": ["hostname", "role,location", "id", "nope"],
    "page_size": [0, 1, 2, 1000, 1001, -1],
    "top": [0, 3, 1001],
    "name": ["cpu-spike", "disk-fill", "outage", "cpu_usage", ""],
    "after_version": ["", "0-0", "nonsense"],
}
NEEDED = {"serverId", "id", "name", "metrics", "time"}
PREFIX = "#/components/schemas/"

Schema = dict[str, Any]


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: Schema) -> None:
    """Makes schemas of their own for requests, and those of answers stricter."""
    schemas = raw_schema["components"]["schemas"]
    ours = [name for name in schemas if name.startswith("openmanager.") and "properties" in schemas[name]]
    for name in ours:
        schemas[name]["additionalProperties"] = False
    asked = {name: f"asked.{name}" for name in ours}
    for name in ours:
        ids = UUIDS if name.endswith(".Interaction") else [*SERVERS, *MADE]
        fields = {field: _likely(field, inner, asked, ids) for field, inner in schemas[name]["properties"].items()}
        schemas[asked[name]] = schemas[name] | {"properties": fields, "required": sorted(NEEDED & fields.keys())}
    for path, verbs in raw_schema["paths"].items():
        for verb, operation in verbs.items():
            ids = UUIDS if path.startswith("/v1/ai/") else MADE if verb == "delete" else [*SERVERS, *MADE]
            for parameter in operation["parameters"]:
                if "schema" in parameter:
                    parameter["required"] |= parameter["name"] == "metric"
                    parameter["schema"] = _likely(parameter["name"], parameter["schema"], asked, ids)
            for media in operation.get("requestBody", {}).get("content", {}).values():
                media["schema"] = _likely("", media["schema"], asked, ids)
            lines = operation["responses"]["200"]["content"].get("application/x-ndjson")
            if lines is not None:  # whose schema is that of one
                lines["schema"] = {"type": "array", "items": lines["schema"]}


def _likely(name: str, schema: Schema, asked: dict[str, str], ids: list[str]) -> Schema:
    """The schema of what may well be sent under a name."""
    if "items" in schema:
        return schema | {"items": _likely(name, schema["items"], asked, ids), "maxItems": 5}
    if "$ref" in schema:
        kind = schema["$ref"].removeprefix(PREFIX)
        return {"$ref": PREFIX + asked.get(kind, kind)}
    if schema.get("type") not in {"string", "integer"}:
        return schema
    return {"enum": ids} if name == "id" else {"enum": KNOWN[name]} if name in KNOWN else schema


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Gives every second batch as many values as its rows and metrics need."""
    if context.operation.path == "/v1/metrics:write" and isinstance(body, dict):
        rows, metrics, values = (body.get(name) for name in ("rows", "metrics", "values"))
        if isinstance(rows, list) and isinstance(metrics, list) and isinstance(values, list) and len(values) % 2 == 0:
            wanted = len(rows) * len(metrics)
            body["values"] = [*values, *[1.5] * wanted][:wanted]
    return body


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Lets two bodies of three say of their server what the path says."""
    if isinstance(case.body, dict) and "id" in case.path_parameters and "id" in case.body and len(repr(case.body)) % 3:
        case.body["id"] = case.path_parameters["id"]
    return case


@schemathesis.deserializer("application/x-ndjson")
def read_lines(context: Any, response: Any) -> Any:
    """JSON lines, so that each is held to its schema."""
    return [json.loads(line) for line in response.content.splitlines()]
