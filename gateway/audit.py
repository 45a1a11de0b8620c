"""Writes down who did what: the one place where calls become events of the audit log.

    services = [audited(bound, audit) for bound in services]         # calls that change or export something
    authenticator = telling(authenticator, audit.refused_call)       # calls that are refused at the door

    changes   one event each, journaled before the caller has his answer; refused beforehand when there is nothing to
              journal it in
    exports   one event each, journaled before the first byte
    streams   of metrics: counted, one event for each caller and minute in which he began some
    idle      counted likewise: a log-out of nobody, which anybody may ask for, as often as he likes
    refused   counted likewise, also those that a method itself refuses: they changed nothing; and whatever failed of
              who has not shown who he is

What must stay true: a change whose event was not journaled is not acknowledged; a call that only reads costs next to
nothing here; no request is written down as a whole, for it may hold secrets: a method says what may be known
(runtime.audited).
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, MutableMapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813  a function, named as a class
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from opentelemetry.metrics import CallbackOptions, Observation

from fleet.audit.event import Draft, Event, draft
from fleet.audit.log import FILE_NAME, UNAVAILABLE_REASON, AuditLog
from fleet.audit.wire import to_pb
from gateway.admission import RATE_LIMITED
from openmanager.gateway.v1 import options_pb2
from openmanager.metadata.v1 import audit_pb2, audit_pb2_grpc
from runtime import audited as notes
from runtime import caller, tasks, telemetry, tracing
from runtime.caller import Caller
from runtime.channel import Channel, calling
from runtime.clock import Clock
from runtime.errors import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    OpenManagerError,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    status_code,
)
from runtime.handlers import Bound
from runtime.interception import Authenticator, CallContext
from runtime.prepared import Prepared

_CHANGED_NOTHING: Final = (
    InvalidArgument,
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    PermissionDenied,
    Unauthenticated,
    ResourceExhausted,
    Unimplemented,
)
"""Failures of a method after which all is as it was; after any other something may have been done."""
_REFUSED: Final = (PermissionDenied, Unauthenticated)
SHOWN: Final = frozenset(f"openmanager.gateway.v1.{name}" for name in ("Server", "User", "Token")) | {
    "openmanager.fleet.v1.MaintenanceWindow"
}
"""Messages without secrets, nor what people said: as an answer has them they are what was there afterwards."""
_PASSING: Final = frozenset({"metrics", "status", "observedTime", "receiveTime", "clockSkew", "lastUseTime"})
"""What of them nobody changed."""
PAGE: Final = "http"
"""The action of a request that is for no method."""
_ID_FIELDS: Final = ("id", "server_id", "name", "session_id", "user_name")

log = logging.getLogger(__name__)


def sending(metadata: Channel) -> Callable[[Sequence[Event]], Any]:
    """Ships events to metadata."""
    stub = audit_pb2_grpc.AuditSinkServiceStub(metadata.grpc)

    async def ship(events: Sequence[Event]) -> None:
        async with calling("metadata"):
            await stub.AppendAuditEvents(audit_pb2.AppendAuditEventsRequest(events=map(to_pb, events)))

    return ship


def own_file(folder: Path, number: int | None) -> Path:
    """The journal of a gateway: of its folder, or of that of the worker with this number in it."""
    return (folder if number is None else folder / f"worker-{number}") / FILE_NAME


def left_behind(folder: Path, number: int | None, workers: int) -> list[Path]:
    """Journals that no process has any more since there are fewer workers, or more than one process, now; each may
    have events that wait. The first process ships them."""
    if number not in {None, 1}:
        return []
    kept = {own_file(folder, each) for each in ([None] if number is None else range(1, workers + 1))}
    found = {folder / FILE_NAME, *folder.glob(f"worker-*/{FILE_NAME}")} - kept
    return sorted(path for path in found if path.exists())


class Audit:
    """The gateway's own log, as its calls use it."""

    def __init__(self, journal: AuditLog, clock: Clock) -> None:
        self._journal = journal
        self._clock = clock
        self._later: set[asyncio.Task[Event]] = set()
        telemetry.meter("gateway").create_observable_gauge(
            "openmanager.audit.waiting",
            [self._waiting],
            unit="{event}",
            description="Audit events that metadata does not have yet.",
        )

    def _waiting(self, _options: CallbackOptions) -> Iterable[Observation]:
        return [Observation(self._journal.lag.events)]

    def check(self) -> None:
        """Whether a change could be recorded now; raises as `AuditLog.check`."""
        self._journal.check()

    async def change(
        self,
        action: str,
        who: Caller,
        *,
        target: str = "",
        failure: OpenManagerError | None = None,
        before: object = None,
        after: object = None,
    ) -> None:
        """Writes an event down, and returns when it is on disk.

        Args:
            action: the method's full name.
            who: did it.
            target: what it was done to.
            failure: None: it went well.
            before, after: what is there to know of what was changed.

        Raises:
            Unavailable: AUDIT_UNAVAILABLE; it was done, but is not recorded.
        """
        said = self._draft(action, who, failure, target=target, before=before, after=after)
        try:
            await self._journal.append(said)
        except OpenManagerError as error:
            log.error("%s by %s was done and could not be recorded: %s", action, who.name, error.message)  # noqa: TRY400
            raise Unavailable(
                "it was done, but could not be recorded in the audit log", reason=UNAVAILABLE_REASON
            ) from error

    def later(self, action: str, who: Caller, failure: OpenManagerError, *, target: str = "") -> None:
        """The same for a call whose caller does not wait any more."""
        task = tasks.start("audit-event", self._journal.append(self._draft(action, who, failure, target=target)))
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    def refused(self, action: str, who: Caller, failure: OpenManagerError) -> None:
        """Counts a refused call."""
        self._journal.count(self._draft(action, who, failure))

    def noted(self, action: str, who: Caller) -> None:
        """Counts one that went well, and is not worth an event of its own."""
        self._journal.count(self._draft(action, who, None))

    def refused_call(self, method: str, context: CallContext, who: Caller | None, failure: OpenManagerError) -> None:
        """Counts what an authenticator refused; its other failures are nobody's fault."""
        self._refused(method, who, (who and who.address) or caller.host(context.peer()), failure)

    def refused_request(
        self, method: str, scope: MutableMapping[str, Any], who: Caller | None, failure: OpenManagerError
    ) -> None:
        """The same for a request over HTTP that reached no method."""
        client = scope.get("client")
        self._refused(method, who, client[0] if client else "", failure)

    def _refused(self, method: str, who: Caller | None, address: str, failure: OpenManagerError) -> None:
        if isinstance(failure, _REFUSED) or failure.reason == RATE_LIMITED:
            known = who or Caller()
            action = method[1:].replace("/", ".", 1) or PAGE
            self.refused(
                action,
                Caller(name=known.name, role=known.role, address=address, authentication=known.authentication),
                failure,
            )

    def _draft(self, action: str, who: Caller, failure: OpenManagerError | None, **more: Any) -> Draft:
        place = tracing.place()
        return draft(
            time_us=self._clock.now_ms() * 1_000,
            actor=who.name,
            role=who.role,
            authentication=who.authentication,
            address=who.address,
            action=action,
            code="OK" if failure is None else status_code(failure).name,
            reason="" if failure is None else failure.reason,
            trace_id="" if place is None else f"{place.trace_id:032x}",
            **more,
        )


def telling(
    authenticate: Authenticator,
    refused: Callable[[str, CallContext, Caller | None, OpenManagerError], None],
    who: Callable[[CallContext], Caller | None],
) -> Authenticator:
    """An authenticator that tells of whom it refuses; `who` finds, where it can, who that is."""

    def check(method: str, context: CallContext) -> Any:
        try:
            return authenticate(method, context)
        except OpenManagerError as error:
            refused(method, context, who(context), error)
            raise

    return check


def is_audited(method: MethodDescriptor) -> bool:
    """Whether calls of a method are events: all that may change something, and exports."""
    changes = method.GetOptions().idempotency_level != MethodOptions.NO_SIDE_EFFECTS
    return bool(changes or method.name.startswith("Export"))


def audited(bound: Bound, audit: Audit) -> Bound:
    """The same service, its audited methods told of; of what only reads, what it refuses."""
    service = default_pool().FindServiceByName(bound.service)
    handlers = dict(bound.handlers)
    for method in service.methods:
        if is_audited(method):
            handlers[method.name] = _wrapped(method, handlers[method.name], audit)
        elif method.GetOptions().Extensions[options_pb2.honours_scope] and not method.server_streaming:
            raw: Any = handlers[method.name]
            behaviour = _looked_after(method.full_name, raw.unary_unary, audit)
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(
                behaviour, request_deserializer=raw.request_deserializer
            )
    return replace(bound, handlers=handlers)


def _wrapped(method: MethodDescriptor, raw: Any, audit: Audit) -> Any:
    action = method.full_name
    decode = raw.request_deserializer
    if method.client_streaming and method.server_streaming:
        return grpc.stream_stream_rpc_method_handler(
            _counted(action, raw.stream_stream, audit), request_deserializer=decode
        )
    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(
            _recorded(method, raw.stream_unary, audit), request_deserializer=decode
        )
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(
            _announced(action, raw.unary_stream, audit), request_deserializer=decode
        )
    return grpc.unary_unary_rpc_method_handler(_recorded(method, raw.unary_unary, audit), request_deserializer=decode)


def _recorded(method: MethodDescriptor, behaviour: Callable[..., Any], audit: Audit) -> Callable[..., Any]:
    """A method with one answer."""
    action, answer = method.full_name, GetMessageClass(method.output_type)
    fields = method.output_type.fields
    shown = next((f.name for f in fields if f.message_type is not None and f.message_type.full_name in SHOWN), "")

    async def record(request: Any, context: Any) -> Any:
        audit.check()
        who = caller.of(context)
        is_nobody = not who.authentication  # he may log in as often as he likes, also while metadata is away
        note = notes.Note(target=target_of(request))
        token = notes.current.set(note)
        try:
            response = await behaviour(request, context)
        except _CHANGED_NOTHING as error:
            audit.refused(action, who, error)
            raise
        except OpenManagerError as error:
            if is_nobody:
                audit.refused(action, who, error)
                raise
            await audit.change(action, who, target=note.target, failure=error, before=note.before, after=note.after)
            raise
        except Exception:  # interception answers it with INTERNAL; what was done meanwhile, nobody knows
            await audit.change(action, who, target=note.target, failure=Internal(""), before=note.before)
            raise
        except asyncio.CancelledError:
            left = Unavailable("", reason="CALLER_LEFT")
            if is_nobody:
                audit.refused(action, who, left)
            else:
                audit.later(action, who, left, target=note.target)
            raise
        finally:
            notes.current.reset(token)
        if note.idle:
            audit.noted(action, who)
            return response
        who = note.actor or who
        target, after = note.target, note.after
        if shown:
            found, said = _shown(response, answer, shown)
            target, after = found or target, said if after is None else after
        await audit.change(action, who, target=target, before=note.before, after=after)
        return response

    return record


def _shown(response: Any, answer: type[Message], field: str) -> tuple[str, dict[str, Any]]:
    """Name and content of the one message in an answer that may be known."""
    raw = response.data if isinstance(response, Prepared) else response
    message = getattr(answer.FromString(raw) if isinstance(raw, bytes) else raw, field)
    return target_of(message), shown_of(message)


def shown_of(message: Message) -> dict[str, Any]:
    """A message of `SHOWN` as an event has it."""
    return {key: value for key, value in MessageToDict(message).items() if key not in _PASSING}


def _announced(action: str, behaviour: Callable[..., Any], audit: Audit) -> Callable[..., Any]:
    """A method that answers with a stream: what it gives away is recorded before it does."""

    async def announce(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        audit.check()
        await audit.change(action, caller.of(context), target=target_of(request))
        async with aclosing(behaviour(request, context)) as responses:
            async for response in responses:
                yield response

    return announce


def _counted(action: str, behaviour: Callable[..., Any], audit: Audit) -> Callable[..., Any]:
    """A stream both ways, of metrics: it is told that it began."""

    async def count(requests: AsyncIterator[Any], context: Any) -> AsyncGenerator[Any, None]:
        who = caller.of(context)
        audit.noted(action, who)
        try:
            async with aclosing(behaviour(requests, context)) as responses:
                async for response in responses:
                    yield response
        except _CHANGED_NOTHING as error:
            audit.refused(action, who, error)
            raise

    return count


def _looked_after(action: str, behaviour: Callable[..., Any], audit: Audit) -> Callable[..., Any]:
    """A method that only reads, but may itself refuse a caller who sees some servers only."""

    async def answer(request: Any, context: Any) -> Any:
        try:
            return await behaviour(request, context)
        except _REFUSED as error:
            audit.refused(action, caller.of(context), error)
            raise

    return answer


def target_of(request: Any) -> str:
    """What a request is about: its first field that names something, or that of the message in it."""
    if not isinstance(request, Message):
        return ""
    for name in _ID_FIELDS:
        field = request.DESCRIPTOR.fields_by_name.get(name)
        if field is not None and field.type == field.TYPE_STRING and not field.is_repeated and getattr(request, name):
            return str(getattr(request, name))
    for field in request.DESCRIPTOR.fields:
        if field.message_type is not None and not field.is_repeated and request.HasField(field.name):
            inner = getattr(request, field.name)
            if not inner.DESCRIPTOR.full_name.startswith("google.") and (found := target_of(inner)):
                return found
    return ""
