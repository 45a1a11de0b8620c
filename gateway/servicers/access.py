"""``AccessService``: users and tokens, which metadata keeps; who the caller is, the gateway knows by itself."""

from fleet import access
from gateway.servicers.forward import forwarded
from openmanager.gateway.v1 import access_pb2 as pb
from openmanager.gateway.v1 import options_pb2
from runtime.channel import Channel
from runtime.errors import Unauthenticated

SERVICE = pb.DESCRIPTOR.services_by_name["AccessService"]


def access_servicer(metadata: Channel) -> object:
    """Answers ``openmanager.gateway.v1.AccessService``."""
    return forwarded(SERVICE, "metadata", metadata, own={"GetCaller": _get_caller})


async def _get_caller(_servicer: object, _request: pb.GetCallerRequest, _context: object) -> pb.GetCallerResponse:
    """What was found at the door."""
    caller = access.caller()
    if caller is None:
        raise Unauthenticated("nobody is known to call")
    found = pb.GetCallerResponse(name=caller.name, role=options_pb2.Role.ValueType(caller.may))
    if caller.scope is not None:
        for name in ("environments", "server_roles", "server_ids"):
            getattr(found.scope, name).extend(sorted(getattr(caller.scope, name)))
    return found
