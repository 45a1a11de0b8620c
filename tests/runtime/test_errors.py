"""Errors keep their class, reason and field across a call, and unknown ones keep their text to themselves."""

import logging
import re

import grpc
import pytest
from google.rpc import status_pb2

from runtime import errors
from runtime.channel import calling
from runtime.errors import OpenManagerError, from_rpc_error, from_status, http_status, to_status
from tests.runtime.conftest import serving
from tests.runtime.echo import Echo, EchoServicer, EchoStub, unary

ALL = [row[0] for row in errors.STATUS_TABLE]


def raising(error: BaseException) -> EchoServicer:
    def get(request: object, context: object) -> object:
        raise error

    return EchoServicer(get)


def test_the_table_holds_every_class_once() -> None:
    assert sorted(kind.__name__ for kind in ALL) == sorted(kind.__name__ for kind in OpenManagerError.__subclasses__())
    assert len({row[1] for row in errors.STATUS_TABLE}) == len(errors.STATUS_TABLE)
    assert http_status(errors.NotFound("x")) == 404
    assert http_status(errors.InvalidArgument("x")) == 400
    assert http_status(errors.Unavailable("x")) == 503
    assert http_status(errors.ResourceExhausted("x")) == 429


def test_a_subclass_has_its_parents_status() -> None:
    class SeriesNotFound(errors.NotFound):
        default_reason = "SERIES_NOT_FOUND"

    assert http_status(SeriesNotFound("x")) == 404
    assert from_status(to_status(SeriesNotFound("x"))).reason == "SERIES_NOT_FOUND"


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
async def test_every_class_comes_back_typed_over_grpc(kind: type[OpenManagerError]) -> None:
    sent = kind("nö, thank you", reason="SOME_REASON", field="rows[3].time", metadata={"k": "v"}, retry_after_s=1.5)
    async with serving(raising(sent)) as server, server.channel() as channel:
        with pytest.raises(kind) as caught:
            async with calling("echo"):
                await EchoStub(channel.grpc).Get(Echo())
    got = caught.value
    assert type(got) is kind
    assert (got.message, got.reason, got.field) == ("nö, thank you", "SOME_REASON", "rows[3].time")
    assert (got.metadata, got.retry_after_s) == ({"k": "v"}, 1.5)


async def test_the_wire_has_code_message_and_standard_details() -> None:
    sent = errors.InvalidArgument("is not a time", field="start_time")
    async with serving(raising(sent)) as server, server.raw() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(channel)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "start_time: is not a time"
    trailers = dict(caught.value.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    assert [detail.TypeName() for detail in status.details] == ["google.rpc.ErrorInfo", "google.rpc.BadRequest"]


async def test_an_unknown_error_is_masked_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(raising(ZeroDivisionError("the password is hunter2"))) as server, server.raw() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught, caplog.at_level(logging.ERROR):
            await unary(channel)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    match = re.fullmatch(r"internal error, id ([0-9a-f]{12})", caught.value.details() or "")
    assert match is not None
    assert "hunter2" not in repr(caught.value.trailing_metadata())
    lines = [record for record in caplog.records if match[1] in record.getMessage()]
    assert len(lines) == 1
    assert "hunter2" in lines[0].getMessage()
    assert lines[0].exc_info is not None


@pytest.mark.parametrize("method", ["Watch", "Collect", "Chat"])
async def test_streams_map_and_mask_errors_too(method: str) -> None:
    servicer = raising(errors.NotFound("no such server", reason="SERVER_UNKNOWN"))
    servicer.hold.set()
    async with serving(servicer) as server, server.channel() as channel:
        request = iter([Echo()]) if method != "Watch" else Echo()
        call = getattr(EchoStub(channel.grpc), method)(request)
        with pytest.raises(errors.NotFound, match="no such server") as caught:
            async with calling("echo"):
                if method == "Collect":
                    await call
                else:
                    _ = [response async for response in call]
    assert caught.value.reason == "SERVER_UNKNOWN"


async def test_a_response_that_cannot_be_serialized_is_masked() -> None:
    async with serving(EchoServicer(lambda request, context: None)) as server, server.raw() as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="internal error, id") as caught:
            await unary(channel)
    assert "NoneType" not in str(caught.value.details())


async def test_a_request_that_is_no_protobuf_is_invalid() -> None:
    async with serving() as server, server.raw() as channel:
        for kind, path in (("unary_unary", "Get"), ("stream_stream", "Chat")):
            call = getattr(channel, kind)(f"/openmanager.test.v1.EchoService/{path}", None, None)
            with pytest.raises(grpc.aio.AioRpcError, match=r"not a serialized openmanager\.test\.v1\.Echo") as caught:
                if kind == "unary_unary":
                    await call(b"\xff\xff")
                else:
                    _ = [response async for response in call(iter([b"\xff\xff"]))]
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_longest_text_still_arrives() -> None:
    """Trailing metadata over 8 KiB would turn any error into RESOURCE_EXHAUSTED."""
    long = "ü" * 100_000
    sent = errors.NotFound(long, field=long, metadata={f"{n}{long}": long for n in range(50)})
    async with serving(raising(sent)) as server, server.raw() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unary(channel)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert from_rpc_error(caught.value).reason == "NOT_FOUND"


def test_a_foreign_status_keeps_its_code_but_not_an_unvouched_text() -> None:
    def foreign(code: grpc.StatusCode) -> OpenManagerError:
        nothing = grpc.aio.Metadata()
        return from_rpc_error(
            grpc.aio.AioRpcError(code, nothing, nothing, details="stack trace", debug_error_string="")
        )

    assert isinstance(foreign(grpc.StatusCode.UNKNOWN), errors.Internal)
    assert "stack trace" not in str(foreign(grpc.StatusCode.UNKNOWN))
    assert isinstance(foreign(grpc.StatusCode.OUT_OF_RANGE), errors.InvalidArgument)
    assert str(foreign(grpc.StatusCode.NOT_FOUND)) == "stack trace"
