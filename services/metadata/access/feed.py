"""What gateways are told: everybody who may come in, from PostgreSQL while it answers, else as it was last known.

What must stay true: a change that this process made is told at once, one that another made within CHECK_INTERVAL_S,
also when our own disk fails: a revoked token must not live on because it is full, nor because PostgreSQL went away as
soon as it was revoked; what is told of a database that is away says so; the copy on disk is read by nobody but this
service (0600), and holds hashes only.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Final

import orjson

from runtime.clock import Clock
from runtime.errors import Unavailable
from runtime.folder import write_private
from services.metadata.access.model import Credential, Known, Scope
from services.metadata.access.store import AccessStore
from services.metadata.queries import instant_of

CHECK_INTERVAL_S: Final = 1.0
"""PostgreSQL is asked so often whether another process changed something; a revoked token is to end within 5 s."""
COPY: Final = "access.json"

log = logging.getLogger(__name__)


class AccessFeed:
    """Follows the record for as long as `follow` runs."""

    def __init__(self, folder: Path, store: AccessStore, clock: Clock) -> None:
        """Takes the folder of the copy, which is read now."""
        self._path = folder / COPY
        self._store = store
        self._clock = clock
        self._wake = asyncio.Event()
        self._news = asyncio.Event()
        self.known: Known | None = _read(self._path)
        """None: nothing was ever known."""
        self._identity: str | None = None
        self._record: Known | None = None  # what is known without what the database's absence adds
        self._copied: Known | None = None
        self._copying = asyncio.Lock()

    def changed(self) -> None:
        """Something was changed by this process: it is looked at now."""
        self._wake.set()

    def take(self, known: Known) -> None:
        """Tells what a change of this process came to; what was looked up since holds."""
        now = self.known
        if now is None or now.stale_since is not None or now.revision < known.revision:
            self._tell(known)

    async def kept(self) -> None:
        """Returns when the copy on disk has what was told, if the disk takes it: a restart may come any time."""
        self.changed()
        await self._copy()

    async def follow(self) -> None:
        """Never ends; while PostgreSQL is away it goes on asking."""
        while True:
            self._wake.clear()
            try:
                await self._look()
            except Unavailable:
                if self.known is not None and self.known.stale_since is None:
                    self._tell(replace(self.known, stale_since=instant_of(self._clock.now_ms() * 1_000)))
            await self._copy()
            wait = asyncio.create_task(self._wake.wait(), name="access-wake")
            pause = asyncio.create_task(self._clock.sleep(CHECK_INTERVAL_S), name="access-pause")
            try:
                await asyncio.wait({wait, pause}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                wait.cancel()
                pause.cancel()

    async def _look(self) -> None:
        """Tells what is known now, if it is something else."""
        known, identity = self.known, self._store.identity
        if (
            known is None
            or known.stale_since is not None
            or identity != self._identity
            or await self._store.revision() != known.revision
        ):
            found = await self._store.known()
            if self.known is not known:  # a change came first, and what was found may be from before it
                self._wake.set()
                return
            self._tell(found)
            self._identity = identity

    async def watch(self) -> AsyncGenerator[Known, None]:
        """What is known, again whenever that changes."""
        told: Known | None = None
        while True:
            news = self._news
            if self.known is not None and self.known is not told:
                told = self.known
                yield told
            else:
                await news.wait()

    async def _copy(self) -> None:
        """Writes what is known to disk; where that fails, the next one does."""
        async with self._copying:
            record = self._record
            if record is self._copied or record is None:
                return
            try:
                await asyncio.to_thread(_write, self._path, record, instant_of(self._clock.now_ms() * 1_000))
            except OSError as error:
                log.error("who may come in is told, but cannot be kept for an outage: %s", error)  # noqa: TRY400
            else:
                self._copied = record

    def _tell(self, known: Known) -> None:
        self.known = known
        if known.stale_since is None:
            self._record = known
        news, self._news = self._news, asyncio.Event()
        news.set()


def _write(path: Path, known: Known, now: datetime) -> None:
    credentials = [asdict(one) | {"hash": one.hash.hex()} for one in known.credentials]
    made = orjson.dumps({"revision": known.revision, "at": now, "credentials": credentials})
    write_private(path, made)


def _read(path: Path) -> Known | None:
    """What was last known; a copy that cannot be read is no copy."""
    try:
        found = orjson.loads(path.read_bytes())
        credentials = tuple(_credential(one) for one in found["credentials"])
        return Known(
            revision=found["revision"], credentials=credentials, stale_since=datetime.fromisoformat(found["at"])
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s); it is made anew when PostgreSQL answers", path, error)
        return None


def _credential(found: dict[str, object]) -> Credential:
    ends = found["expire_time"]
    return Credential(
        hash=bytes.fromhex(str(found["hash"])),
        id=str(found["id"]),
        name=str(found["name"]),
        role=int(str(found["role"])),
        scope=Scope.of(found["scope"]),
        expire_time=None if ends is None else datetime.fromisoformat(str(ends)),
        is_session=found.get("is_session") is True,  # a copy of an earlier version has none
    )
