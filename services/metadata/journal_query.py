"""Which facts are asked of the journal, and how SQLite is told."""

from typing import NamedTuple


class Condition(NamedTuple):
    """A constant piece of SQL about the columns of facts, and the value of its one parameter."""

    sql: str
    value: str | int | float


class Newest(NamedTuple):
    """A question for facts, newest first.

    Attributes:
        kind: of which kind.
        conditions: what must hold for each.
        unwritten: only those that PostgreSQL does not have.
    """

    kind: str
    conditions: tuple[Condition, ...] = ()
    unwritten: bool = True


def condition_of(wanted: Newest) -> tuple[str, tuple[str | int | float, ...]]:
    """The condition for a WHERE and its parameters."""
    pieces = ["kind = ?", *(["state <> 1"] if wanted.unwritten else []), *(one.sql for one in wanted.conditions)]
    return " AND ".join(pieces), (wanted.kind, *(one.value for one in wanted.conditions))
