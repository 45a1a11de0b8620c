"""What each role may call: read from the options that stand beside each RPC in the protos."""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from google.protobuf.descriptor_pool import Default as default_pool  # noqa: N813  a function, named as a class

from fleet.access import AGENT, VIEWER, Caller, includes, role_name
from openmanager.gateway.v1 import options_pb2
from runtime.errors import PermissionDenied
from runtime.handlers import Bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Who may call a method. `role` 0: nobody, unless it is open to all."""

    role: int = 0
    agents: bool = False
    open_to_all: bool = False
    honours_scope: bool = False


NOBODY = Rule()


class Policy:
    """The rules of every method that is served."""

    def __init__(self, services: Iterable[Bound]) -> None:
        descriptors = [default_pool().FindServiceByName(bound.service) for bound in services]
        self._rules = {
            f"/{service.full_name}/{method.name}": _rule(method.GetOptions())
            for service in descriptors
            for method in service.methods
        }

    def rule(self, method: str) -> Rule:
        """Of "/pkg.Service/Method"; what is not known is for nobody."""
        return self._rules.get(method, NOBODY)

    def check(self, method: str, caller: Caller) -> None:
        """Raises PermissionDenied when the caller may not call the method."""
        rule = self._rules.get(method, NOBODY)
        if rule.open_to_all:
            return
        if not rule.role or not (includes(caller.may, rule.role) or (rule.agents and caller.may == AGENT)):
            needed = "nobody may call this" if not rule.role else f"this needs the role {role_name(rule.role)}"
            raise PermissionDenied(f"{needed}; {caller.name} has the role {caller.role}", reason="ROLE_REQUIRED")
        if caller.scope is not None and not rule.honours_scope:
            raise PermissionDenied(
                f"this is about all servers, and {caller.name} sees some only", reason="SCOPE_TOO_NARROW"
            )

    def open_to(self, caller: Caller) -> frozenset[str]:
        """The methods that a caller may call because of who he is, and not because all may."""
        found = set()
        for method, rule in self._rules.items():
            if not rule.open_to_all:
                with suppress(PermissionDenied):
                    self.check(method, caller)
                    found.add(method)
        return frozenset(found)

    def open_to_all(self) -> frozenset[str]:
        """The methods that everybody may call, whoever he is."""
        return frozenset(method for method, rule in self._rules.items() if rule.open_to_all)

    def check_page(self, caller: Caller) -> None:
        """Raises PermissionDenied for who may not read what is about the whole fleet: metrics, the web page."""
        if not includes(caller.may, VIEWER):
            raise PermissionDenied(
                f"this needs the role VIEWER; {caller.name} has the role {caller.role}",
                reason="ROLE_REQUIRED",
            )
        if caller.scope is not None:
            raise PermissionDenied(
                f"this is about all servers, and {caller.name} sees some only", reason="SCOPE_TOO_NARROW"
            )


def _rule(options: object) -> Rule:
    extensions = options.Extensions  # type: ignore[attr-defined]
    return Rule(
        role=extensions[options_pb2.required_role],
        agents=extensions[options_pb2.agents_may],
        open_to_all=extensions[options_pb2.open_to_all],
        honours_scope=extensions[options_pb2.honours_scope],
    )
