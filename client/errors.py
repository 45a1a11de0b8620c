"""The one exception of the client: what the gateway said, or what its silence means.

What must stay true: no grpc.RpcError leaves the client; `reason` and `field` are the gateway's, unchanged, so that
programs can rely on docs/errors.md; `hint` says what to do next, in the gateway's words where it sends some.
"""

import re
from typing import Final

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

STATUS_DETAILS_KEY: Final = "grpc-status-details-bin"

_TRANSIENT: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
    }
)
_TOO_LARGE: Final = frozenset({"MESSAGE_TOO_LARGE", "BATCH_TOO_LARGE"})
_DROPPED: Final = frozenset({grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})
"""What a connection that breaks off in the middle looks like, when no gateway vouches for the code."""

_HINTS: Final = {
    "METRIC_SET_UNKNOWN": "send the batch again, with its metrics",
    "SERVER_NOT_FOUND": "`openmanager servers` lists those that there are",
    "TOKEN_REQUIRED": "pass a token: token=, --token or OPENMANAGER_TOKEN",
    "TOKEN_INVALID": "this token is not known: ask an administrator for another one",
    "MESSAGE_TOO_LARGE": "send, or ask for, less at once",
    "BATCH_TOO_LARGE": "send smaller batches",
    "MAX_SERIES": "name fewer servers or metrics",
    "MAX_POINTS": "ask for a shorter range or a longer step",
    "MAX_SCANNED_POINTS": "ask for a shorter range",
    "DISK_FULL": "make room on the disk of DATA_DIR",
}
_HINTS_BY_CODE: Final = {
    grpc.StatusCode.UNAUTHENTICATED: "pass the right token: token=, --token or OPENMANAGER_TOKEN",
    grpc.StatusCode.PERMISSION_DENIED: "ask an administrator for a token that may do this",
    grpc.StatusCode.UNIMPLEMENTED: "this gateway is older than the client: update it",
    grpc.StatusCode.DEADLINE_EXCEEDED: "try again, or give it more time",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "try again later, or ask for less at once",
    grpc.StatusCode.INTERNAL: "the gateway's log has more under this id",
}
_UNREACHABLE: Final = (
    "look whether the gateway runs there (`make run` starts one), and whether the address is right; one with TLS wants"
    " https://HOST:PORT, and --ca-file where its authority is not a public one"
)
_PREAMBLE: Final = re.compile(
    r".*last error: (?:UNKNOWN: |UNAVAILABLE: )?(?:\S+: )?(?:Failed to connect to remote host: )?", re.DOTALL
)
"""What gRPC puts before the one thing that is of interest, such as `Connection refused`."""


class OpenManagerError(Exception):
    """One failed call.

    Attributes:
        code: gRPC's.
        reason: UPPER_SNAKE, stable; the code's name where nothing more is to be said.
        field: the field of the request that is at fault; None: none is.
        message: for people; it may change.
        hint: what to do next; empty: nothing is known.
        retry_after_s: when the gateway wants to be asked again; None: it did not say.
        from_gateway: whether a gateway said so, and not the connection to it.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        field: str | None = None,
        hint: str = "",
        retry_after_s: float | None = None,
        from_gateway: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason or code.name
        self.field = field
        self.message = message
        self.hint = hint or _HINTS.get(self.reason, "") or _HINTS_BY_CODE.get(code, "")
        self.retry_after_s = retry_after_s
        self.from_gateway = from_gateway

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message

    @property
    def is_transient(self) -> bool:
        """Whether the same call may work soon."""
        if self.reason in _TOO_LARGE:
            return False
        return self.code in _TRANSIENT or (self.code in _DROPPED and not self.from_gateway)


def from_rpc_error(error: grpc.aio.AioRpcError, address: str) -> OpenManagerError:
    """What a failed call to the gateway at `address` means."""
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            try:
                return _from_status(error.code(), status_pb2.Status.FromString(value))
            except DecodeError:
                break
    return _from_transport(error.code(), error.details() or "", address)


def _from_status(code: grpc.StatusCode, status: status_pb2.Status) -> OpenManagerError:
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry, help_ = error_details_pb2.RetryInfo(), error_details_pb2.Help()
    for detail in status.details:
        for known in (info, bad, retry, help_):
            if detail.Is(known.DESCRIPTOR):
                detail.Unpack(known)
    field, message = None, status.message
    if bad.field_violations:
        field, message = bad.field_violations[0].field, bad.field_violations[0].description
    return OpenManagerError(
        code,
        message,
        reason=info.reason,
        field=field,
        hint=next((link.description for link in help_.links if link.description), ""),
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if retry.HasField("retry_delay") else None,
        from_gateway=True,
    )


def _from_transport(code: grpc.StatusCode, text: str, address: str) -> OpenManagerError:
    if code is grpc.StatusCode.UNAVAILABLE:
        why = _PREAMBLE.sub("", text) or "no answer"
        return OpenManagerError(code, f"{address} is not reachable: {why}", hint=_UNREACHABLE)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return OpenManagerError(code, f"{address} did not answer in time")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return OpenManagerError(code, f"a message is too large: {text}", reason="MESSAGE_TOO_LARGE")
    return OpenManagerError(code, text or code.name, hint="" if code in _HINTS_BY_CODE else f"asked was {address}")
