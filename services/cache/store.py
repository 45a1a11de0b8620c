"""Where the current state is also kept: the contract of the follower's store.

Memory is the truth (services.cache.state); a store is a copy that others read and that a restarted process starts from.
Every adapter passes tests/cache/test_store_contract.py.

What must stay true: whatever goes wrong with a store is a runtime.errors error, within its time bounds; values that are
not finite are not stored, so that a metric is a finite number or absent.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from services.cache.model import Fleet, ServerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """How long what was written is readable, in seconds: strictly before it is there, from then on it is not."""

    all_s: float = 60.0
    count_s: float = 300.0
    healthy_s: float = 60.0
    server_s: float = 300.0


LIFETIMES: Final = Lifetimes()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreIdentity:
    """What a store says it is.

    Attributes:
        version: for people, for example `Redis 7.0.15`.
        life: another one means that the store was started again and may have lost what it held.
    """

    version: str
    life: str


class StateStore(Protocol):
    """A copy of the current state. Every method may raise Unavailable; readers and one writer may run at once."""

    @property
    def address(self) -> str:
        """Where it is, without user or password; empty for this process's memory."""

    async def write(self, changed: Sequence[ServerState], removed: Sequence[str], fleet: Fleet) -> bool:
        """Replaces the states of `changed`, deletes those of `removed`, and replaces what is known of all servers.

        Order: a later write wins over an earlier one; a reader may see a write half done, but each of its parts
        whole. Every part lives from this write on for its lifetime, also where it did not change. A removed server
        that is not there is no error. When this raises, any part of it may have been written: write it again.

        Returns whether the count that the write before left was still there; where it should have been, the store has
        lost what it held.
        """

    async def get(self, server_id: str) -> ServerState | None:
        """One server with all its metrics; None when it is unknown, removed or expired.

        Its samples may be joined into one. `heard_s` and `sequence` mean nothing.
        """

    async def list_basic(self) -> Sequence[ServerState] | None:
        """All servers of the last write in order of id, with only the headline metrics; None when that expired."""

    async def count(self) -> int | None:
        """How many servers the last write knew; None when that expired."""

    async def healthy(self) -> int | None:
        """How many of them were healthy; None when that expired."""

    def load(self) -> AsyncGenerator[Sequence[ServerState], None]:
        """Everything there is, in parts: each server as `get` has it or, where that is gone, as `list_basic` has it."""

    async def ping(self) -> StoreIdentity:
        """Asks for a sign of life."""

    async def close(self) -> None:
        """Lets go of connections. Nothing else may be called then."""
