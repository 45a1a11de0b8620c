"""From path, query and body to a request message: what is accepted, and how a fault is named."""

import math
import time
from typing import Any
from urllib.parse import quote

import orjson
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813  a function, named as a class
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.http.decode import decoder_of
from gateway.http.routes import routes_for
from gateway.http.transcode import MAX_QUERY_PARAMETERS, RequestReader
from gateway.http.values import BadValue
from runtime.errors import InvalidArgument
from tests.gateway.http.messages import messages
from tests.gateway.http.serving import PACKAGE, SERVICES
from tests.gateway.http.test_encode import KINDS, public_types

NOW_MS = 1_769_860_800_500  # 2026-01-31T12:00:00.500Z


def reader(method: str, template: str | None = None) -> RequestReader:
    services = [default_pool().FindServiceByName(f"{PACKAGE}.{name}") for name in SERVICES]
    for route in routes_for(services):
        if route.method.name == method and template in {None, route.template}:
            return RequestReader(route)
    raise LookupError(method)


def read(method: str, query: str = "", body: Any = None, values: tuple[str, ...] = ()) -> Any:
    raw = body if isinstance(body, bytes) else b"" if body is None else orjson.dumps(body)
    return reader(method).read(values, query.encode(), raw, NOW_MS)


def fault(method: str, query: str = "", body: Any = None, values: tuple[str, ...] = ()) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        read(method, query, body, values)
    return caught.value


def history(query: str) -> Any:
    return read("GetServerHistory", query, values=("a",))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("now", "2026-01-31T12:00:00.500Z"),
        ("-1h", "2026-01-31T11:00:00.500Z"),
        ("-1h30m", "2026-01-31T10:30:00.500Z"),
        ("-500ms", "2026-01-31T12:00:00Z"),
        ("-7d", "2026-01-24T12:00:00.500Z"),
        ("now-5m", "2026-01-31T11:55:00.500Z"),
        ("now%2B5m", "2026-01-31T12:05:00.500Z"),
        ("now+5m", "2026-01-31T12:05:00.500Z"),
        ("%2B1h30m", "2026-01-31T13:30:00.500Z"),
        ("+1h", "2026-01-31T13:00:00.500Z"),
        ("0", "1970-01-01T00:00:00Z"),
        ("1769860800", "2026-01-31T12:00:00Z"),
        ("1769860800.25", "2026-01-31T12:00:00.250Z"),
        ("-1", "1969-12-31T23:59:59Z"),
        ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z"),
        ("2026-01-31t12:00:00.5z", "2026-01-31T12:00:00.500Z"),
        ("2026-01-31T13:00:00%2B01:00", "2026-01-31T12:00:00Z"),
        ("2026-01-31T13:00:00+01:00", "2026-01-31T12:00:00Z"),  # a plus that nobody escaped
    ],
)
def test_times(text: str, wanted: str) -> None:
    assert history(f"start_time={text}").start_time.ToJsonString() == wanted


@pytest.mark.parametrize(
    "text",
    ["yesterday", "-1y", "1h", "-", "now-", "2026-01-31", "2026-02-31T00:00:00Z", "NaN", "9" * 15, "%C3%A9"],
)
def test_bad_times(text: str) -> None:
    error = fault("GetServerHistory", f"start_time={text}", values=("a",))
    assert error.field == "start_time"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("60s", 60), ("5m", 300), ("1h", 3600), ("1h30m", 5400), ("1.5s", 1.5), ("250ms", 0.25), ("60", 60), ("-5s", -5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert history(f"step={text}").step.ToNanoseconds() == seconds * 1e9


@pytest.mark.parametrize("text", ["NaN", "inf", "5 s", "s", "5x", "1e3s", "--5s", "999999999999d"])
def test_bad_durations(text: str) -> None:
    assert fault("GetServerHistory", f"step={text.replace(' ', '%20')}", values=("a",)).field == "step"


@pytest.mark.parametrize(
    "text", ["healthy", "Healthy", "HEALTHY", "SERVER_STATUS_HEALTHY", "server_status_healthy", "1"]
)
def test_enums(text: str) -> None:
    assert read("ListServers", f"status={text}").status == 1


@pytest.mark.parametrize("text", ["fine", "99", "HEALTH", "1.0"])
def test_bad_enums_name_the_values_there_are(text: str) -> None:
    error = fault("ListServers", f"status={text}")
    assert error.field == "status"
    assert "HEALTHY, WARNING, CRITICAL, OFFLINE" in error.message


def test_repeated_parameters_and_both_cases_of_names() -> None:
    request = history("metric=a&metric=b%7Bk%3D%22v%22%7D&startTime=-1h&aggregation=max")
    assert list(request.metric) == ["a", 'b{k="v"}']
    assert request.HasField("start_time")
    assert request.aggregation == 3
    assert read("ListServers", "pageSize=5").page_size == read("ListServers", "page_size=5").page_size == 5


def test_an_empty_parameter_is_one_that_is_not_given() -> None:
    request = read("ListServers", "status=&environment=&page_size=&view=&&")
    assert request == type(request)()


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("nope=1", "nope"),
        ("=1", "query"),
        ("page_size=x", "page_size"),
        ("page_size=99999999999", "page_size"),
        ("page_size=1&page_size=2", "page_size"),
        ("page_size=1&pageSize=1", "page_size"),
        ("environment=%ff", "query"),
        ("environment=\u00e9", "query"),
        ("status.nope=1", "status.nope"),
        ("&".join(["role=a"] * (MAX_QUERY_PARAMETERS + 1)), "query"),
    ],
)
def test_bad_queries_name_the_parameter(query: str, field: str) -> None:
    assert fault("ListServers", query).field == field


def test_what_the_path_says_is_no_query_parameter() -> None:
    assert fault("GetServer", "id=b", values=("a",)).field == "id"


def test_a_method_with_its_fields_in_the_body_takes_no_query() -> None:
    assert fault("QueryHistory", "metrics=cpu", body={}).field == "metrics"


def test_nested_fields_are_dotted() -> None:
    request = read("UpdateServer", "update_mask=hostname,location", body={}, values=("a",))
    assert request.server.id == "a"
    assert list(request.update_mask.paths) == ["hostname", "location"]


def test_update_mask_defaults_to_the_fields_of_the_body() -> None:
    request = read("UpdateServer", body={"id": "a", "hostname": "h", "role": ""}, values=("a",))
    assert list(request.update_mask.paths) == ["hostname", "role"]
    given = read("UpdateServer", "updateMask=role", body={"hostname": "h"}, values=("a",))
    assert list(given.update_mask.paths) == ["role"]
    empty = read("UpdateServer", "update_mask=", body={"location": ""}, values=("a",))
    assert list(empty.update_mask.paths) == ["location"]


def test_the_body_cannot_contradict_the_path() -> None:
    assert fault("UpdateServer", body={"id": "b"}, values=("a",)).field == "server.id"


def test_relative_times_in_a_body() -> None:
    request = read("QueryHistory", body={"metrics": ["cpu"], "startTime": "-1h", "end_time": "now", "step": "5m"})
    assert request.end_time.ToMilliseconds() - request.start_time.ToMilliseconds() == 3_600_000
    assert request.step.seconds == 300


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", "body"),
        (b"[]", "body"),
        (b'"x"', "body"),
        (b'{"rows": NaN}', "body"),
        (b"\xff", "body"),
        ({"nope": 1}, "nope"),
        ({"rows": {}}, "rows"),
        ({"rows": [{"serverId": "a"}, {"serverId": 5}]}, "rows[1].server_id"),
        ({"rows": [{"time": "soon"}]}, "rows[0].time"),
        ({"rows": [{"clock": 1}]}, "rows[0].clock"),
        ({"rows": ["x"]}, "rows[0]"),
        ({"values": [1, "x"]}, "values[1]"),
        ({"values": [1, True]}, "values[1]"),
        ({"values": [[1]]}, "values[0]"),
        ({"values": 5}, "values"),
        ({"metrics": [{"name": "a", "labels": {"k": 1}}]}, "metrics[0].labels['k']"),
        ({"metrics": [{"kind": "LOUD"}]}, "metrics[0].kind"),
        ({"metricSetId": "a", "metric_set_id": "b"}, "metric_set_id"),
    ],
)
def test_bad_bodies_name_the_field(body: Any, field: str) -> None:
    assert fault("WriteMetrics", body=body).field == field


def test_a_body_field_is_named_from_the_request_down() -> None:
    assert fault("CreateServer", body={"status": "odd"}).field == "server.status"


def test_values_take_null_and_nan_and_text() -> None:
    values = read("WriteMetrics", body={"values": [1, 2.5, None, "NaN", "Infinity", "-1.5e3"]}).values
    assert math.isnan(values[2])
    assert math.isnan(values[3])
    assert [values[0], values[1], values[4], values[5]] == [1.0, 2.5, math.inf, -1500.0]


@pytest.mark.parametrize("text", ["100", "1e2", "1.0e2", "100.0", "10000e-2"])
def test_whole_numbers_may_have_an_exponent_in_quotes_too(text: str) -> None:
    assert read("ListServers", f"page_size={text}").page_size == 100


@pytest.mark.parametrize("text", ["1.5", "1e-2", "+1", "1_0", "\u0663", "1e", "1e9999", "0x10"])
def test_what_is_no_whole_number(text: str) -> None:
    assert fault("ListServers", f"page_size={quote(text)}").field == "page_size"


@pytest.mark.parametrize("value", [[], {}, [True], 1, "yes", "True"])
def test_what_is_no_boolean_is_refused_whatever_it_is(value: Any) -> None:
    message = GetMessageClass(KINDS)()
    with pytest.raises(BadValue, match="is not true or false"):
        decoder_of(KINDS).into(message, {"one8": value}, NOW_MS)


def test_a_tick_of_numbers_is_handed_over_whole() -> None:
    """Looked at one by one, as a list with a null in it is, numbers take several times as long."""
    read_body = reader("WriteMetrics")
    numbers: list[float | None] = [index * 0.1 for index in range(10_220)]

    def cpu_s(values: list[float | None]) -> float:
        body = orjson.dumps({"values": values})
        times = []
        for _ in range(7):
            started = time.thread_time()
            request: Any = read_body.read((), b"", body, NOW_MS)
            times.append(time.thread_time() - started)
            assert len(request.values) == len(values)
        return min(times)

    assert cpu_s(numbers) * 2 < cpu_s([None, *numbers])


@pytest.mark.parametrize("kind", [*public_types(), KINDS], ids=lambda kind: kind.full_name)
def test_bodies_that_json_format_writes_are_read_back(kind: Descriptor) -> None:
    @settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(message=messages(kind), names=st.booleans())
    def check(message: Any, names: bool) -> None:
        if kind.full_name.startswith("google.protobuf."):
            return
        written = json_format.MessageToDict(message, preserving_proto_field_name=names)
        again = GetMessageClass(kind)()
        try:
            decoder_of(kind).into(again, orjson.loads(orjson.dumps(written)), NOW_MS)
        except BadValue as problem:
            assert "77" in problem.message  # an enum number that we do not know: refused, where json_format lets it in
            return
        assert json_format.MessageToDict(again) == json_format.MessageToDict(message)

    check()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["metrics", "rows", "values", "servers", "metricSetId", "time", "labels", "name", "kind"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None, database=None)
@given(JSON)
def test_any_json_is_taken_or_refused_but_never_breaks(value: Any) -> None:
    try:
        read("WriteMetrics", body=value)
    except InvalidArgument as error:
        assert error.field


@settings(max_examples=100, deadline=None, database=None)
@given(
    st.sampled_from(["start_time", "step", "aggregation", "metric", "x"]), st.binary(max_size=20) | st.text(max_size=20)
)
def test_any_query_is_taken_or_refused_but_never_breaks(name: str, value: bytes | str) -> None:
    raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
    try:
        reader("GetServerHistory").read(("a",), name.encode() + b"=" + raw, b"", NOW_MS)
    except InvalidArgument as error:
        assert error.field
