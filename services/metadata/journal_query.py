"""Which facts are asked of the journal, and how SQLite is told."""

from typing import Final, NamedTuple

UNWRITTEN: Final = "facts INDEXED BY facts_unwritten"
"""Where `state <> 1` is asked for. SQLite would rather go through all of a kind: of 150,000 that PostgreSQL has had for
less than a day, in 40 to 90 ms each time."""


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


def asked(wanted: Newest) -> tuple[str, tuple[str | int | float, ...]]:
    """What stands in a SELECT from FROM on, and its parameters."""
    table, pieces = (UNWRITTEN, ["kind = ?", "state <> 1"]) if wanted.unwritten else ("facts", ["kind = ?"])
    pieces += [one.sql for one in wanted.conditions]
    return f"FROM {table} WHERE {' AND '.join(pieces)}", (wanted.kind, *(one.value for one in wanted.conditions))
