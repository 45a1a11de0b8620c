"""The proof that nobody altered the audit log.

The method is part of the public contract (`AuditService.VerifyAuditLog`), but no gateway that this client knows has it
yet, and so there is no proto. What must stay true until then: whatever cannot be read as a proof is none.
"""

from typing import Final

import grpc

from client.api import OpenManager
from client.errors import OpenManagerError

METHOD: Final = "/openmanager.gateway.v1.AuditService/VerifyAuditLog"


async def verify(manager: OpenManager) -> None:
    """Asks the gateway for the proof.

    Raises:
        OpenManagerError: UNIMPLEMENTED, in words of its own, where the gateway has no audit log, or answers what this
            client cannot read; what else the gateway says.
    """
    try:
        await manager.call(METHOD)
    except OpenManagerError as error:
        if error.code is not grpc.StatusCode.UNIMPLEMENTED:
            raise
        raise OpenManagerError(
            error.code,
            f"the gateway at {manager.address} has no audit log",
            reason=error.reason,
            hint="nothing was verified; a gateway with AuditService is needed",
        ) from error
    raise OpenManagerError(
        grpc.StatusCode.UNIMPLEMENTED,
        f"the gateway at {manager.address} has an audit log, but this client cannot read its proof",
        hint="nothing was verified: update the client",
    )
