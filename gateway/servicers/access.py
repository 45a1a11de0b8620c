"""``AccessService``: users and tokens, which metadata keeps; who the caller is, the gateway knows by itself; a person's
log-in is metadata's too, but the cookie is ours."""

from dataclasses import replace

from fleet import access
from gateway.access.sessions import Sessions, csrf_of
from gateway.access.table import SESSION
from gateway.http.exchange import Exchange
from gateway.servicers.forward import forwarded
from openmanager.access.v1 import access_pb2 as inner
from openmanager.gateway.v1 import access_pb2 as pb
from openmanager.gateway.v1 import options_pb2
from runtime import audited, caller
from runtime.channel import Channel
from runtime.errors import FailedPrecondition, Unauthenticated

SERVICE = pb.DESCRIPTOR.services_by_name["AccessService"]


def access_servicer(metadata: Channel, sessions: Sessions) -> object:
    """Answers ``openmanager.gateway.v1.AccessService``."""
    own = _Own(sessions)
    return forwarded(
        SERVICE, "metadata", metadata, own={name: getattr(own, name) for name in ("GetCaller", "LogIn", "LogOut")}
    )


class _Own:
    """What the gateway answers itself."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def GetCaller(self, _request: pb.GetCallerRequest, context: object) -> pb.GetCallerResponse:
        """What was found at the door."""
        found = access.caller()
        if found is None:
            raise Unauthenticated("nobody is known to call")
        answer = pb.GetCallerResponse(name=found.name, role=options_pb2.Role.ValueType(found.may))
        if found.scope is not None:
            for name in ("environments", "server_roles", "server_ids"):
                getattr(answer.scope, name).extend(sorted(getattr(found.scope, name)))
        if found.authentication == SESSION and isinstance(context, Exchange):
            answer.csrf_token = csrf_of(self._sessions.cookie.secret_in(context.scope["headers"]) or "")
        return answer

    async def LogIn(self, request: pb.LogInRequest, context: object) -> pb.LogInResponse:
        exchange = _browser(context)
        password = inner.Password(name=request.name, password=request.password)
        opened = await self._sessions.open(inner.OpenSessionRequest(password=password), caller.of(exchange))
        exchange.set_trailing_metadata((("set-cookie", self._sessions.kept(opened)),))
        one = opened.credential
        _tell_who(exchange, one.name, one.role)
        answer = pb.LogInResponse(
            name=one.name, role=one.role, expire_time=one.expire_time, csrf_token=csrf_of(opened.secret)
        )
        if one.HasField("scope"):
            answer.scope.CopyFrom(one.scope)
        return answer

    async def LogOut(self, _request: pb.LogOutRequest, context: object) -> pb.LogOutResponse:
        exchange = _browser(context)
        exchange.set_trailing_metadata((("set-cookie", self._sessions.cookie.clear()),))
        secret = self._sessions.cookie.secret_in(exchange.scope["headers"])
        if secret is not None and (name := await self._sessions.end(secret)):
            _tell_who(exchange, name, 0)
        else:
            audited.nothing_changed()
        return pb.LogOutResponse()


def _browser(context: object) -> Exchange:
    if not isinstance(context, Exchange):
        raise FailedPrecondition(
            "a session is for a browser; programs show a token: authorization: Bearer <token>", reason="HTTP_ONLY"
        )
    return context


def _tell_who(exchange: Exchange, name: str, role: int) -> None:
    """The audit log's event is his who came or went, not that of anybody at the door."""
    who = replace(caller.of(exchange), name=name, role=access.role_name(role) if role else "", authentication=SESSION)
    audited.note(target=name, actor=who)
