"""Where the current state is also kept: the contract of the follower's store.

Memory is the truth (services.cache.state); a store is a copy that others read, that a restarted process starts from,
and through which replicas hear of each other. Every adapter passes tests/cache/test_store_contract.py.

What must stay true: whatever goes wrong with a store is a runtime.errors error, within its time bounds; values that are
not finite are not stored, so that a metric is a finite number or absent; a write never replaces what its writer has not
seen.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from services.cache.model import Fleet, ServerState, Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetimes:
    """How long what was written is readable, in seconds: strictly before it is there, from then on it is not."""

    all_s: float = 60.0
    count_s: float = 300.0
    healthy_s: float = 60.0
    server_s: float = 300.0
    note_s: float = 86_400.0
    """Versions, and that a server was removed. A replica that comes back after longer may bring a removed server back,
    unless another one still remembers."""


LIFETIMES: Final = Lifetimes()


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreIdentity:
    """What a store says it is.

    Attributes:
        version: for people, for example `Redis 7.0.15`.
        life: another one means that the store was started again, or is another server now, and may have lost what it
            held.
        trouble: what is wrong with a part of it; empty when nothing is.
    """

    version: str
    life: str
    trouble: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What came of a write.

    Attributes:
        intact: the count that the write before left was still there; where it should have been, the store has lost it.
        lost: a server was not there although its base says that it was.
        listed: the fleet was written, where there was one to write, and not refused for what its writer has not seen.
        newer: what the store has instead of what was to be written, since the writer had not seen it.
        failed: servers that a part of the store which does not answer should have; write them again.
        error: why.
    """

    intact: bool
    lost: bool = False
    listed: bool = True
    newer: Sequence[Stored] = ()
    failed: Sequence[str] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What of the store is not what the reader knows.

    Attributes:
        found: of other versions than the reader's.
        missing: what the reader knows and the store does not.
        fleets: versions of the fleet that were there before anything was compared; in the first part only.
    """

    found: Sequence[Stored] = ()
    missing: Sequence[str] = ()
    fleets: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What somebody wrote.

    Attributes:
        versions: of servers, by id; they are there when this is heard.
        fleet: the version of the fleet, made of those and of what was heard before; empty when that was not written.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    fleet: str = ""


class StateStore(Protocol):
    """A copy of the current state. Every method may raise an error; readers and one writer may run at once."""

    @property
    def address(self) -> str:
        """Where it is, without user or password; empty for this process's memory."""

    async def write(self, changed: Sequence[Stored], bases: Mapping[str, str], fleet: Fleet | None) -> Written:
        """Replaces the states of `changed` and deletes the removed among them, where the store's version is the one in
        `bases`, none, or an older one of the same writer, or where its state has expired or cannot be read; replaces
        what is known of all servers by `fleet` in the same way (None leaves that as it is); and tells other replicas.

        Order: a later write of one writer wins over an earlier one, also when they arrive the other way round. A reader
        may see a write half done, but each of its parts whole. Every part lives from this write on for its lifetime,
        also where it did not change. A removed server that is not there is no error. When this raises, any part of it
        may have been written: write it again.
        """

    async def read(self, server_ids: Sequence[str]) -> Sequence[Stored]:
        """What is there of these servers, in any order; a removal where one is known; nothing for the others.

        Samples of a set that is not known here may lack its units. `heard_s` and `sequence` mean nothing.
        """

    def differences(self, versions: Mapping[str, str]) -> AsyncGenerator[Difference, None]:
        """In parts, all that is not of the version that the reader knows, by id; with none known everything."""

    def heard(self) -> AsyncGenerator[Heard, None]:
        """What is written from now on, by anyone: first nothing, once it listens, then as it comes.

        Raises:
            Unavailable: it does not listen any more, and may have missed some.
        """

    async def list_basic(self) -> Sequence[ServerState] | None:
        """All servers of the last write in order of id, with only the headline metrics; None when that expired."""

    async def count(self) -> int | None:
        """How many servers the last write knew; None when that expired."""

    async def healthy(self) -> int | None:
        """How many of them were healthy; None when that expired."""

    async def ping(self) -> StoreIdentity:
        """Asks for a sign of life."""

    async def close(self) -> None:
        """Lets go of connections. Nothing else may be called then."""
