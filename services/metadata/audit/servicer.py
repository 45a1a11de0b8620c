"""gRPC to the audit log: what the gateway forwards byte for byte, and what its writers ship to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import datetime
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp

from fleet.audit.wire import from_pb, to_pb
from openmanager.gateway.v1 import audit_pb2 as public
from openmanager.metadata.v1 import audit_pb2 as pb
from runtime import paging
from runtime.errors import InvalidArgument
from services.metadata import checks
from services.metadata.audit.keeper import Keeper, Proof
from services.metadata.audit.store import AuditStore, EventFilter, event_of_row
from services.metadata.queries import instant_of, place_in, times_of, window_of

AUDIT: Final = "openmanager.gateway.v1.AuditService"
AUDIT_SINK: Final = "openmanager.metadata.v1.AuditSinkService"
MAX_FILTER_CHARACTERS: Final = 512
MAX_PAGE_BYTES: Final = 8 << 20
"""A page ends before it is larger: a message holds 16 MiB."""
PROGRESS_INTERVAL_S: Final = 1.0


class AuditSinkServicer:
    """``AuditSinkService``."""

    def __init__(self, keeper: Keeper) -> None:
        self._sink = keeper.sink

    async def AppendAuditEvents(
        self, request: pb.AppendAuditEventsRequest, _context: object
    ) -> pb.AppendAuditEventsResponse:
        try:
            events = [from_pb(message) for message in request.events]
        except ValueError as error:
            raise InvalidArgument(f"is no event: {error}", field="events") from error
        await self._sink.append(events)
        return pb.AppendAuditEventsResponse()


class AuditServicer:
    """``AuditService``, the public one."""

    def __init__(self, keeper: Keeper, store: AuditStore) -> None:
        self._keeper = keeper
        self._store = store

    async def ListAuditEvents(
        self, request: public.ListAuditEventsRequest, _context: object
    ) -> public.ListAuditEventsResponse:
        texts = {name: _text(request, name) for name in ("actor", "action", "target", "code")}
        size = paging.page_size(request.page_size)
        bound = list(texts.values())
        asked = window_of(_time(request, "start_time"), _time(request, "end_time"))
        window, last = paging.continued("audit", bound, asked, request.page_token, (int, str))
        start, end = times_of(window)
        filters = EventFilter(start=start, end=end, **texts)
        found = await self._store.newest(filters, place_in(last), size + 1)
        response = public.ListAuditEventsResponse()
        room = MAX_PAGE_BYTES
        for event in found[:size]:
            message = to_pb(event)
            room -= message.ByteSize()
            if response.events and room < 0:
                break
            response.events.append(message)
        shown = len(response.events)
        if len(found) > shown:
            response.next_page_token = paging.page_token(
                "audit", bound, [found[shown - 1].time_us, found[shown - 1].id], window
            )
        return response

    async def VerifyAuditLog(
        self, request: public.VerifyAuditLogRequest, _context: object
    ) -> AsyncIterator[public.VerifyAuditLogResponse]:
        read = 0

        def told(events: int) -> None:
            nonlocal read
            read = events

        work = asyncio.create_task(self._keeper.verify(told), name="verify-audit-log")
        try:
            while not (await asyncio.wait({work}, timeout=PROGRESS_INTERVAL_S))[0]:
                if request.progress:
                    yield public.VerifyAuditLogResponse(events=read)
            proof = await work
        finally:
            work.cancel()
        yield public.VerifyAuditLogResponse(events=proof.events, proof=_proof(proof))

    async def ExportAuditLog(
        self, request: public.ExportAuditLogRequest, _context: object
    ) -> AsyncIterator[public.ExportAuditLogResponse]:
        start, end = _time(request, "start_time"), _time(request, "end_time")
        async with aclosing(self._store.rows(start, end)) as pages:
            async for rows in pages:
                for row in rows:
                    yield public.ExportAuditLogResponse(event=to_pb(event_of_row(row)))
        for checkpoint in await self._store.checkpoints():
            message = public.AuditCheckpoint(
                number=checkpoint.number, body=checkpoint.body, signature=checkpoint.signature.hex()
            )
            yield public.ExportAuditLogResponse(checkpoint=message)


def _time(request: public.ListAuditEventsRequest | public.ExportAuditLogRequest, field: str) -> datetime | None:
    if not request.HasField(field):  # type: ignore[arg-type]
        return None
    try:
        return instant_of(getattr(request, field).ToMicroseconds())
    except (OverflowError, ValueError):
        raise InvalidArgument("the time is outside of the years 1 to 9999", field=field) from None


def _text(request: public.ListAuditEventsRequest, field: str) -> str:
    return checks.check_text(getattr(request, field), field, max_characters=MAX_FILTER_CHARACTERS)


def _proof(proof: Proof) -> public.AuditProof:
    message = public.AuditProof(
        valid=not proof.total,
        events=proof.events,
        checkpoints=proof.checkpoints,
        findings_count=proof.total,
        unproved_events=proof.unproved_events,
        public_key=proof.public_key,
        findings=[
            public.AuditFinding(
                kind=public.AuditFindingKind.Value(f"AUDIT_FINDING_KIND_{finding.kind}"),
                writer_id=finding.writer_id,
                first_seq=finding.first_seq,
                last_seq=finding.last_seq,
                event_id=finding.event_id,
                message=finding.message,
            )
            for finding in proof.findings
        ],
        chains=[
            public.AuditChain(
                writer_id=chain.writer_id,
                first_seq=chain.first_seq,
                last_seq=chain.last_seq,
                proved_seq=chain.proved_seq,
            )
            for chain in proof.chains
        ],
    )
    if proof.last is not None:
        stamp = Timestamp()
        stamp.FromMicroseconds(proof.last.time_us)
        message.proved_until.CopyFrom(stamp)
    return message
