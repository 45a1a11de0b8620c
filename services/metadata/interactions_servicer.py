"""The public ``AiInteractionService`` on the store: decode, call, encode. Every rule is in the store.

The gateway forwards its calls as they are (`gateway.servicers.forward`).
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from openmanager.gateway.v1 import ai_pb2 as pb
from openmanager.metadata.v1 import interaction_pb2
from runtime.errors import InvalidArgument
from services.metadata.store import Interaction, InteractionFilter, MetadataStore, NewInteraction

MIN_TIMESTAMP_S, MAX_TIMESTAMP_S = -62_135_596_800, 253_402_300_799
"""What a Timestamp may say; over gRPC it may be anything."""
_OPTIONAL: Final = ("confidence", "user_rating", "prompt_tokens", "response_tokens")
_TEXTS: Final = ("id", "session_id", "query", "response", "model", "prompt_hash", "correction", "rating_comment")
_LISTS: Final = ("server_ids", "anomaly_ids", "tags", "embedding")


class AiInteractionServicer:
    """``openmanager.gateway.v1.AiInteractionService`` on a store."""

    def __init__(self, store: MetadataStore) -> None:
        self._store = store

    async def RecordInteraction(
        self, request: pb.RecordInteractionRequest, _context: object
    ) -> pb.RecordInteractionResponse:
        try:
            stored = await self._store.record_interaction(_new(request.interaction))
        except InvalidArgument as error:
            error.field = f"interaction.{error.field}" if error.field else None
            raise
        return pb.RecordInteractionResponse(interaction=_interaction(stored))

    async def GetInteraction(self, request: pb.GetInteractionRequest, _context: object) -> pb.GetInteractionResponse:
        return pb.GetInteractionResponse(interaction=_interaction(await self._store.get_interaction(request.id)))

    async def ListInteractions(
        self, request: pb.ListInteractionsRequest, _context: object
    ) -> pb.ListInteractionsResponse:
        page = await self._store.list_interactions(
            filters_of(request), page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListInteractionsResponse(
            interactions=[_interaction(interaction) for interaction in page.items],
            next_page_token=page.next_page_token,
            total_size=page.total_size,
            stale_since=_maybe_time(page.stale_since),
        )

    async def RateInteraction(self, request: pb.RateInteractionRequest, _context: object) -> pb.RateInteractionResponse:
        rated = await self._store.rate_interaction(request.id, request.rating, request.comment)
        return pb.RateInteractionResponse(interaction=_interaction(rated))

    async def CorrectInteraction(
        self, request: pb.CorrectInteractionRequest, _context: object
    ) -> pb.CorrectInteractionResponse:
        corrected = await self._store.correct_interaction(request.id, request.correction)
        return pb.CorrectInteractionResponse(interaction=_interaction(corrected))

    async def ExportInteractions(
        self, request: pb.ExportInteractionsRequest, _context: object
    ) -> AsyncIterator[pb.ExportInteractionsResponse]:
        redact = request.redact if request.HasField("redact") else True
        async with aclosing(self._store.export_interactions(filters_of(request), redact=redact)) as examples:
            async for example in examples:
                asked = pb.ChatMessage(role="user", content=example.query)
                answered = pb.ChatMessage(role="assistant", content=example.answer)
                yield pb.ExportInteractionsResponse(messages=[asked, answered])

    async def SearchInteractions(
        self, request: pb.SearchInteractionsRequest, _context: object
    ) -> pb.SearchInteractionsResponse:
        page = await self._store.search_interactions(
            request.query, filters_of(request), page_size=request.page_size, page_token=request.page_token
        )
        return pb.SearchInteractionsResponse(
            interactions=[_interaction(one) for one in page.items], next_page_token=page.next_page_token
        )

    async def FindSimilarInteractions(
        self, request: pb.FindSimilarInteractionsRequest, _context: object
    ) -> pb.FindSimilarInteractionsResponse:
        found = await self._store.similar_interactions(tuple(request.embedding), request.limit)
        near = [pb.SimilarInteraction(interaction=_interaction(one), distance=distance) for one, distance in found]
        return pb.FindSimilarInteractionsResponse(interactions=near)

    async def GetCalibrationReport(
        self, request: pb.GetCalibrationReportRequest, _context: object
    ) -> pb.GetCalibrationReportResponse:
        filters = filters_of(request)
        found = await self._store.calibration(filters, bins=request.bins, right_rating=request.right_rating)
        return pb.GetCalibrationReportResponse(
            bins=[pb.CalibrationBin(**asdict(one)) for one in found.bins],
            expected_calibration_error=found.expected_error,
            maximum_calibration_error=found.maximum_error,
            count=found.count,
            unrated=found.unrated,
            without_confidence=found.without_confidence,
        )

    async def EraseSession(self, request: pb.EraseSessionRequest, _context: object) -> pb.EraseSessionResponse:
        erased = await self._store.erase_session(request.session_id)
        return pb.EraseSessionResponse(erased=erased.interactions, pending=erased.pending)


def filters_of(request: Any) -> InteractionFilter:
    """The filters that a request has fields for; raises InvalidArgument for a time that is none."""
    given: dict[str, Any] = {}
    for field in request.DESCRIPTOR.fields:
        name = field.name
        if name not in InteractionFilter.__slots__ or (field.has_presence and not request.HasField(name)):
            continue
        value = getattr(request, name)
        given[name] = _instant(value, name) if isinstance(value, Timestamp) else value
    return InteractionFilter(**given)


def _instant(message: Timestamp, field: str) -> datetime:
    if not MIN_TIMESTAMP_S <= message.seconds <= MAX_TIMESTAMP_S or not 0 <= message.nanos < 1_000_000_000:
        raise InvalidArgument("the time is outside of the years 1 to 9999", field=field)
    return message.ToDatetime(tzinfo=UTC)


def _new(said: interaction_pb2.Interaction) -> NewInteraction:
    values: dict[str, Any] = {name: getattr(said, name) for name in _TEXTS}
    values |= {name: getattr(said, name) for name in _OPTIONAL if said.HasField(name)}
    values |= {name: tuple(getattr(said, name)) for name in _LISTS}
    if said.HasField("latency"):
        values["latency_ms"] = said.latency.seconds * 1_000 + round(said.latency.nanos / 1e6)
    return NewInteraction(**values)


def _interaction(interaction: Interaction) -> interaction_pb2.Interaction:
    message = interaction_pb2.Interaction(
        create_time=_maybe_time(interaction.create_time),
        rate_time=_maybe_time(interaction.rate_time),
        correct_time=_maybe_time(interaction.correct_time),
        **{name: getattr(interaction, name) for name in (*_TEXTS, *_OPTIONAL, *_LISTS)},
    )
    if interaction.latency_ms is not None:
        message.latency.CopyFrom(Duration())
        message.latency.FromMilliseconds(interaction.latency_ms)
    return message


def _maybe_time(instant: datetime | None) -> Timestamp | None:
    if instant is None:
        return None
    message = Timestamp()
    message.FromDatetime(instant)
    return message
