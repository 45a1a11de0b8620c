"""The errors that domain code raises, and the one table that joins them to gRPC and HTTP statuses.

    OpenManagerError            anything the product says about a call that did not work
      InvalidArgument           the request is wrong whatever the state is; names the field
      NotFound                  the thing named is not here
      AlreadyExists             the thing to create is here already
      FailedPrecondition        right request, wrong state: change the state first (a metric set is unknown, ...)
      Unauthenticated           no caller, or one that could not be proved
      PermissionDenied          a known caller that may not do this
      ResourceExhausted         a named bound was reached
      Aborted                   lost a race; the whole operation may be tried again
      Unavailable               not now; the same call may work soon
      DeadlineExceeded          time ran out
      Cancelled                 the caller went away
      Unimplemented             no such method, or not built here
      DataLoss                  stored data cannot be read back
      Internal                  a fault of ours; the text is in the log under the id the caller got

What must stay true: domain code knows no transport, so it raises only these; an error that crosses a process is the
same class, with the same reason and field, on the other side (`to_status` and `from_rpc_error` are inverse); the text
of an exception that is not one of these never reaches a caller (`mask`).
"""

# ruff: noqa: N818  the classes are named as the gRPC codes they stand for, not ...Error

import secrets
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration as DurationMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

ERROR_DOMAIN: Final = "openmanager"
STATUS_DETAILS_KEY: Final = "grpc-status-details-bin"

# gRPC refuses trailing metadata over 8 KiB. The text travels twice (percent-encoded, at worst 3 bytes for one, and
# base64 inside the details), so these bounds keep the worst case under 7 KiB.
MAX_MESSAGE_TEXT_BYTES: Final = 1_024
MAX_METADATA_ENTRIES: Final = 8
MAX_METADATA_VALUE_BYTES: Final = 128


class OpenManagerError(Exception):
    """One failed call. `reason` is UPPER_SNAKE and stable for programs; `message` is for people and may change."""

    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.field = field
        self.metadata: dict[str, str] = dict(metadata or {})
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


class InvalidArgument(OpenManagerError):
    default_reason = "INVALID_ARGUMENT"


class NotFound(OpenManagerError):
    default_reason = "NOT_FOUND"


class AlreadyExists(OpenManagerError):
    default_reason = "ALREADY_EXISTS"


class FailedPrecondition(OpenManagerError):
    default_reason = "FAILED_PRECONDITION"


class Unauthenticated(OpenManagerError):
    default_reason = "UNAUTHENTICATED"


class PermissionDenied(OpenManagerError):
    default_reason = "PERMISSION_DENIED"


class ResourceExhausted(OpenManagerError):
    default_reason = "RESOURCE_EXHAUSTED"


class Aborted(OpenManagerError):
    default_reason = "ABORTED"


class Unavailable(OpenManagerError):
    default_reason = "UNAVAILABLE"


class DeadlineExceeded(OpenManagerError):
    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(OpenManagerError):
    default_reason = "CANCELLED"


class Unimplemented(OpenManagerError):
    default_reason = "UNIMPLEMENTED"


class DataLoss(OpenManagerError):
    default_reason = "DATA_LOSS"


class Internal(OpenManagerError):
    default_reason = "INTERNAL"


# The one status table: class, gRPC code, HTTP status (as google.rpc.Code documents them).
STATUS_TABLE: Final[tuple[tuple[type[OpenManagerError], grpc.StatusCode, int], ...]] = (
    (InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT, 400),
    (FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION, 400),
    (Unauthenticated, grpc.StatusCode.UNAUTHENTICATED, 401),
    (PermissionDenied, grpc.StatusCode.PERMISSION_DENIED, 403),
    (NotFound, grpc.StatusCode.NOT_FOUND, 404),
    (AlreadyExists, grpc.StatusCode.ALREADY_EXISTS, 409),
    (Aborted, grpc.StatusCode.ABORTED, 409),
    (ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
    (Cancelled, grpc.StatusCode.CANCELLED, 499),
    (Internal, grpc.StatusCode.INTERNAL, 500),
    (DataLoss, grpc.StatusCode.DATA_LOSS, 500),
    (Unimplemented, grpc.StatusCode.UNIMPLEMENTED, 501),
    (Unavailable, grpc.StatusCode.UNAVAILABLE, 503),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED, 504),
)
_ROW_OF_CLASS: Final = {row[0]: row for row in STATUS_TABLE}
_CLASS_OF_CODE: Final[dict[grpc.StatusCode, type[OpenManagerError]]] = {row[1]: row[0] for row in STATUS_TABLE} | {
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.UNKNOWN: Internal,
}


def _row(error: OpenManagerError) -> tuple[type[OpenManagerError], grpc.StatusCode, int]:
    for base in type(error).__mro__:
        if base in _ROW_OF_CLASS:
            return _ROW_OF_CLASS[base]
    return _ROW_OF_CLASS[Internal]


def status_code(error: OpenManagerError) -> grpc.StatusCode:
    """The gRPC code of an error; a subclass has its parent's."""
    return _row(error)[1]


def http_status(error: OpenManagerError) -> int:
    """The HTTP status of an error; a subclass has its parent's."""
    return _row(error)[2]


def mask(_error: BaseException) -> Internal:
    """What a caller may know of an exception that is not ours: an id under which the log has the text."""
    error_id = secrets.token_hex(6)
    return Internal(f"internal error, id {error_id}", metadata={"error_id": error_id})


def clip(text: str, max_bytes: int = MAX_MESSAGE_TEXT_BYTES) -> str:
    """`text`, cut to at most `max_bytes` of UTF-8 with a mark where something was cut."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= max_bytes:
        return raw.decode()
    return raw[: max_bytes - 3].decode("utf-8", "ignore") + "..."


def to_status(error: OpenManagerError) -> status_pb2.Status:
    """The error as google.rpc.Status: ErrorInfo always, BadRequest when a field is at fault, RetryInfo when known."""
    message = clip(str(error))
    entries = list(error.metadata.items())[:MAX_METADATA_ENTRIES]
    details = [
        error_details_pb2.ErrorInfo(
            reason=clip(error.reason, MAX_METADATA_VALUE_BYTES),
            domain=ERROR_DOMAIN,
            metadata={
                clip(key, MAX_METADATA_VALUE_BYTES): clip(value, MAX_METADATA_VALUE_BYTES) for key, value in entries
            },
        ),
    ]
    status = status_pb2.Status(code=status_code(error).value[0], message=message)
    status.details.extend(_packed(detail) for detail in details)
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=clip(error.field, MAX_METADATA_VALUE_BYTES), description=clip(error.message)
        )
        status.details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_s is not None:
        delay = DurationMessage()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status


def _packed(detail: object) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(detail)  # type: ignore[arg-type]  # every generated message is a Message; the stubs know no common type
    return packed


def from_status(status: status_pb2.Status) -> OpenManagerError:
    """The inverse of `to_status`. Details of unknown types are ignored."""
    kind = next((row[0] for row in STATUS_TABLE if row[1].value[0] == status.code), Internal)
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for known in (info, bad, retry):
            if detail.Is(known.DESCRIPTOR):
                detail.Unpack(known)
    field, message = None, status.message
    if bad.field_violations:
        field, message = bad.field_violations[0].field, bad.field_violations[0].description
    return kind(
        message,
        reason=info.reason or None,
        field=field,
        metadata=dict(info.metadata),
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
    )


def from_rpc_error(error: grpc.RpcError) -> OpenManagerError:
    """The typed error behind a failed gRPC call: same class, reason and field as the other side raised.

    A status that does not come from OpenManager (gRPC's own, a proxy's) keeps its code; UNKNOWN and INTERNAL ones lose
    their text, since nobody has vouched for it.
    """
    typed = carried_error(error)
    if typed is not None:
        return typed
    is_call = isinstance(error, grpc.Call | grpc.aio.AioRpcError)
    text = (error.details() if is_call else None) or ""
    kind = _CLASS_OF_CODE.get(error.code(), Internal) if is_call else Internal
    if kind is Internal:
        return Internal("internal error of a peer", reason="PEER_INTERNAL")
    if kind is ResourceExhausted and "larger than max" in text:
        return ResourceExhausted(f"a message is over MAX_MESSAGE_BYTES: {text}", reason="MESSAGE_TOO_LARGE")
    return kind(text or kind.default_reason)


def carried_error(error: grpc.RpcError) -> OpenManagerError | None:
    """The error that an OpenManager process put into the trailing metadata; None when there is none."""
    return error_in(error.trailing_metadata() if isinstance(error, grpc.Call | grpc.aio.AioRpcError) else None)


def error_in(trailers: Iterable[tuple[str, Any]] | None) -> OpenManagerError | None:
    """The same of the trailing metadata of a call that has ended."""
    for key, value in trailers or ():
        if key == STATUS_DETAILS_KEY:
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                return None
            return from_status(status) if _is_ours(status) else None
    return None


def _is_ours(status: status_pb2.Status) -> bool:
    info = error_details_pb2.ErrorInfo()
    return any(detail.Unpack(info) and info.domain == ERROR_DOMAIN for detail in status.details)
