"""Users, tokens and their rights as values, with the rules that hold for them."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Self

from fleet.access import ADMIN, AGENT, OPERATOR, VIEWER
from fleet.validation import server_id_fault
from runtime.errors import InvalidArgument
from services.metadata import checks

MAX_NAME_CHARACTERS: Final = 255
MAX_SCOPE_ENTRIES: Final = 10_000
MIN_PASSWORD_CHARACTERS: Final = 12
MAX_PASSWORD_BYTES: Final = 1_024
NOBODY: Final = ("",)
"""What is left where two scopes share nothing: no server has an empty id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Which servers: all conditions that are given hold together."""

    environments: tuple[str, ...] = ()
    server_roles: tuple[str, ...] = ()
    server_ids: tuple[str, ...] = ()

    @classmethod
    def of(cls, stored: Any) -> Self | None:
        """From what is stored; None: every server, also where what is stored restricts nothing."""
        return (
            cls(**{name: tuple(found) for name, found in stored.items()}) if stored and any(stored.values()) else None
        )

    def stored(self) -> dict[str, list[str]]:
        """As it is stored."""
        return {name: list(getattr(self, name)) for name in self.__slots__}

    def checked(self, field_name: str) -> Self:
        """Itself; raises InvalidArgument."""
        checked = (
            ("environments", checks.MAX_ENVIRONMENT_CHARACTERS),
            ("server_roles", checks.MAX_ROLE_CHARACTERS),
            ("server_ids", MAX_NAME_CHARACTERS),
        )
        for name, most in checked:
            entries: tuple[str, ...] = getattr(self, name)
            if len(entries) > MAX_SCOPE_ENTRIES:
                raise InvalidArgument(f"more than {MAX_SCOPE_ENTRIES} entries", field=f"{field_name}.{name}")
            for index, entry in enumerate(entries):
                where = f"{field_name}.{name}[{index}]"
                checks.check_text(entry, where, max_characters=most)
                if not entry:
                    raise InvalidArgument("empty", field=where)
                if name == "server_ids" and (fault := server_id_fault(entry)):
                    raise InvalidArgument(fault, field=where)
        return self

    def within(self, other: "Scope | None") -> "Scope":
        """Both at once."""
        if other is None:
            return self
        shared = {name: _both(getattr(self, name), getattr(other, name)) for name in self.__slots__}
        if None in shared.values():  # an empty environment or role would be that of servers which have none
            return Scope(server_ids=NOBODY)
        return Scope(**{name: entries or () for name, entries in shared.items()})


def _both(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...] | None:
    """What two conditions allow, empty: everything; None: nothing."""
    if not one or not other:
        return one or other
    return tuple(entry for entry in one if entry in other) or None


def check_role(role: int, field_name: str) -> int:
    """The role; raises InvalidArgument when it is none."""
    if role not in {VIEWER, OPERATOR, ADMIN, AGENT}:
        raise InvalidArgument("a role is one of VIEWER, AGENT, OPERATOR, ADMIN", field=field_name)
    return role


def check_name(name: str, field_name: str) -> str:
    """The name; raises InvalidArgument when it is none."""
    checks.check_text(name, field_name, max_characters=MAX_NAME_CHARACTERS)
    if not name.strip() or name != name.strip() or not name.isprintable() or "/" in name:
        text = "1 to 255 printable characters, none of them a slash, without spaces around them"
        raise InvalidArgument(f"a name has {text}", field=field_name)
    return name


def check_password(password: str, field_name: str = "password") -> str:
    """The password; raises InvalidArgument when it is too short or too long."""
    if len(password) < MIN_PASSWORD_CHARACTERS or len(password.encode()) > MAX_PASSWORD_BYTES:
        raise InvalidArgument(
            f"a password has {MIN_PASSWORD_CHARACTERS} characters or more, {MAX_PASSWORD_BYTES} bytes at most",
            field=field_name,
        )
    return password


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Somebody who logs in."""

    name: str
    role: int
    scope: Scope | None = None
    disabled: bool = False
    create_time: datetime | None = None
    update_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """What a program shows; `user` is whose it is, empty: nobody's."""

    id: str = ""
    name: str
    role: int
    scope: Scope | None = None
    user: str = ""
    expire_time: datetime | None = None
    create_time: datetime | None = None
    last_use_time: datetime | None = None
    revoke_time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    """A token as gateways know it: what it may do in the end, its user's rights considered."""

    hash: bytes
    id: str
    name: str
    role: int
    scope: Scope | None
    expire_time: datetime | None
    is_session: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """Everybody who may come in at a revision; `stale_since` None: it is the record."""

    revision: int
    credentials: tuple[Credential, ...] = field(repr=False)
    stale_since: datetime | None = None
