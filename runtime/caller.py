"""Who calls: what was found out where a call came in, for whoever has to know it further in.

    caller.current.set(Caller(name="ada", role="admin", address="10.0.0.7", authentication="token"))
    stub.Method(request, metadata=caller.metadata_of(caller.of(context)))      # on to an inner service
    who = caller.told(context)                                                # and there

What must stay true: the metadata keys are read only by services that let in nobody without the service secret, for
what they say is believed; a gateway never passes on what its own caller sent under these keys; values are ASCII, as
gRPC wants them, whatever the name is.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    from runtime.interception import CallContext

NAME_KEY: Final = "openmanager-caller"
ROLE_KEY: Final = "openmanager-caller-role"
ADDRESS_KEY: Final = "openmanager-caller-address"
AUTHENTICATION_KEY: Final = "openmanager-caller-authentication"
MAX_VALUE_BYTES: Final = 1_024
"""gRPC takes 8 KiB of metadata in all; a longer value is cut."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Attributes: all empty where nothing is known. fleet.access has one that knows which servers he sees.

    name: of the user or token, or what stands for it ("local-administrator").
    role: what it may do.
    address: host it calls from, without port.
    authentication: how it proved itself: "token", "session", "loopback", ...
    """

    name: str = ""
    role: str = ""
    address: str = ""
    authentication: str = ""


current: ContextVar[Caller | None] = ContextVar("openmanager_caller", default=None)
"""The caller of the running call; whoever authenticates it sets this."""


def of(context: "CallContext") -> Caller:
    """The caller of the running call: what authentication said, and where it comes from."""
    found = current.get() or Caller()
    return Caller(
        name=found.name,
        role=found.role,
        address=found.address or host(context.peer()),
        authentication=found.authentication,
    )


def host(peer: str) -> str:
    """The address in "ipv4:127.0.0.1:4711" or "ipv6:%5B::1%5D:4711"; "" of a socket file."""
    kind, _, rest = peer.partition(":")
    return unquote(rest).rpartition(":")[0].strip("[]") if kind in {"ipv4", "ipv6"} else ""


def metadata_of(caller: Caller) -> tuple[tuple[str, str], ...]:
    """The caller as metadata of a call to an inner service."""
    values = (
        (NAME_KEY, caller.name),
        (ROLE_KEY, caller.role),
        (ADDRESS_KEY, caller.address),
        (AUTHENTICATION_KEY, caller.authentication),
    )
    return tuple((key, quote(_cut(value), safe=" :@/+=,")) for key, value in values if value)


def _cut(value: str) -> str:
    raw = value.encode("utf-8", "replace")
    return raw.decode() if len(raw) <= MAX_VALUE_BYTES else raw[:MAX_VALUE_BYTES].decode("utf-8", "ignore")


def told(context: "CallContext") -> Caller:
    """The caller that the metadata of a call to an inner service names."""
    said = dict(reversed([*(context.invocation_metadata() or ())]))  # of several the first counts
    values = (said.get(key) or "" for key in (NAME_KEY, ROLE_KEY, ADDRESS_KEY, AUTHENTICATION_KEY))
    name, role, address, authentication = (unquote(str(value), errors="replace") for value in values)
    return Caller(name=name, role=role, address=address, authentication=authentication)
