"""The audit log: what is in it, and the proof that nobody altered it.

What must stay true: whatever cannot be read as a proof is none.
"""

import contextlib
from collections.abc import AsyncGenerator, Callable
from datetime import datetime
from typing import Final

import grpc

from client.api import OpenManager
from client.errors import OpenManagerError
from client.history import timestamp
from openmanager.gateway.v1 import audit_pb2

SERVICE: Final = "/openmanager.gateway.v1.AuditService"


async def verify(manager: OpenManager, told: Callable[[int], None] | None = None) -> audit_pb2.AuditProof:
    """Has the gateway read the whole log, and returns what came of it; `valid` says whether nothing was found.

    Args:
        manager: the gateway.
        told: is told about once a second how many events were read.

    Raises:
        OpenManagerError: UNIMPLEMENTED where the gateway has no audit log; DATA_LOSS where it ends without a proof;
            what else the gateway says.
    """
    request = audit_pb2.VerifyAuditLogRequest(progress=told is not None)
    proof: audit_pb2.AuditProof | None = None
    async with contextlib.aclosing(_stream(manager, "VerifyAuditLog", request.SerializeToString())) as answers:
        async for raw in answers:
            answer = audit_pb2.VerifyAuditLogResponse.FromString(raw)
            if answer.HasField("proof"):
                proof = answer.proof
            elif told is not None:
                told(answer.events)
    if proof is None:
        raise OpenManagerError(
            grpc.StatusCode.DATA_LOSS,
            f"the gateway at {manager.address} ended without a proof",
            hint="nothing was verified: try again",
        )
    return proof


async def export(
    manager: OpenManager, *, start: datetime | float | None = None, end: datetime | float | None = None
) -> AsyncGenerator[audit_pb2.ExportAuditLogResponse, None]:
    """Every event of `[start, end)`, chain by chain in order of their numbers, and then the signed checkpoints."""
    request = audit_pb2.ExportAuditLogRequest(
        start_time=None if start is None else timestamp(start), end_time=None if end is None else timestamp(end)
    )
    async with contextlib.aclosing(_stream(manager, "ExportAuditLog", request.SerializeToString())) as answers:
        async for raw in answers:
            yield audit_pb2.ExportAuditLogResponse.FromString(raw)


async def _stream(manager: OpenManager, method: str, request: bytes) -> AsyncGenerator[bytes, None]:
    try:
        async with contextlib.aclosing(manager.stream(f"{SERVICE}/{method}", request)) as answers:
            async for answer in answers:
                yield answer
    except OpenManagerError as error:
        if error.code is not grpc.StatusCode.UNIMPLEMENTED:
            raise
        raise OpenManagerError(
            error.code,
            f"the gateway at {manager.address} has no audit log",
            reason=error.reason,
            hint="nothing was verified; a gateway with AuditService is needed",
        ) from error
