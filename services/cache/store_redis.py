"""The follower's store on Redis, with the exact keys that other programs rely on.

    servers:all                  JSON array, every server with its headline metrics        60 s
    servers:count                number                                                   300 s
    servers:healthy              number                                                    60 s
    server:{id}                  JSON object, one server with all its metrics             300 s
    openmanager:{<a key>}        our note beside that key, in its slot: its version
    openmanager:changes          the channel on which replicas tell what they wrote

A server's note is compared and replaced in one script with the document (services.cache.documents has its form): a
writer that has not seen what is there gets it back instead. The three keys of the fleet are compared likewise: whoever
has not heard of the fleet that is there, with all that it was made of, leaves it.

What must stay true: a write is one round trip (a further one for each 100 servers beyond the first 100); a command
touches keys of one slot, so that they work on a cluster; JSON that would hold the event loop up is made in a thread;
an outage too short for a failed command shows by a missing note or count.
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import lru_cache
from typing import Any, Final

import orjson
from redis.crc import key_slot

from runtime.errors import OpenManagerError, Unavailable
from services.cache.documents import (
    Sets,
    basic_document,
    full_document,
    note_version,
    parse_document,
    parse_stored,
    removal_note,
)
from services.cache.model import Fleet, Removal, ServerState, Stored
from services.cache.redis_link import Answer, Command, connect
from services.cache.redis_url import parse_redis_url
from services.cache.store import LIFETIMES, Difference, Heard, Lifetimes, StoreIdentity, Written

ALL_KEY: Final = "servers:all"
COUNT_KEY: Final = "servers:count"
HEALTHY_KEY: Final = "servers:healthy"
SERVER_KEY_PREFIX: Final = "server:"
CHANNEL: Final = "openmanager:changes"

SERVERS_PER_PIPELINE: Final = 100
"""About 1.3 MB of JSON with 511 metrics each: the driver packs and sends a pipeline in one go, 5 ms."""
SERVERS_PER_READ: Final = 50
"""Documents that are parsed before other calls get their turn; 8 ms."""
NOTES_PER_READ: Final = 500
MAX_KEYS_PER_SCAN: Final = 1_000
CELLS_ON_LOOP: Final = 25_000
STATES_ON_LOOP: Final = 500
"""JSON of more values (5 ms), of more servers' headlines (3 ms), is made in a thread."""

_WRITE_SERVER: Final = """
local note = redis.call('MGET', KEYS[2])[1]
local seen = note and string.match(note, '^%S*') or ''
if seen ~= '' and seen ~= ARGV[1] and not (string.sub(seen, 14) == ARGV[3] and seen <= ARGV[2]) then
  return {note, redis.call('MGET', KEYS[1])[1]}
end
if ARGV[5] == '' then
  redis.call('UNLINK', KEYS[1])
else
  redis.call('SET', KEYS[1], ARGV[5], 'PX', ARGV[6])
end
redis.call('SET', KEYS[2], ARGV[4], 'PX', ARGV[7])
return seen == '' and ARGV[1] ~= '' and 0 or 1
"""
"""Document and note; KEYS document, note; ARGV base, version, writer, note, document, their lifetimes in ms. Answers 1;
0 when a note should have been there; or note and document that the writer has not seen. MGET, here as elsewhere: what
is there of another type is nothing to it, and SET replaces it. EVAL and not EVALSHA: Redis keeps the compiled script
either way, the text is 4 % of a document, and no server can be without it."""
_WRITE_FLEET: Final = """
local seen = redis.call('MGET', KEYS[2])[1]
local may = not seen or string.sub(seen, 14) == string.sub(ARGV[1], 14) and seen <= ARGV[1]
for place = 4, #ARGV do
  may = may or seen == ARGV[place]
end
if not may then
  return 0
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[3])
return 1
"""
"""One key of the fleet and its note; KEYS key, note; ARGV version, value, lifetime in ms, bases. Answers 0 for what the
writer has not seen."""

_BASE_AT: Final = 5
"""Where the base stands in the command of a server's write."""
_NOTE_VERSION: Final = re.compile(rb"\S*")
"""As the scripts find it."""

_log = logging.getLogger(__name__)


def server_key(server_id: str) -> str:
    """The key of one server."""
    return f"{SERVER_KEY_PREFIX}{server_id}"


def note_key(key: str) -> str:
    """The key of the note beside a key, in the same slot of a cluster."""
    if "}" not in key:
        return f"openmanager:{{{key}}}"
    return _note_key_of_braces(key)


@lru_cache(maxsize=10_000)
def _note_key_of_braces(key: str) -> str:
    """Redis hashes what stands in the first braces, so a key that has some cannot be put into others: the first number
    that lies in its slot takes their place (10 ms)."""
    slot = key_slot(key.encode())
    number = next(number for number in range(1 << 24) if key_slot(b"%d" % number) == slot)
    return f"openmanager:{{{number}}}:{key}"


class RedisStateStore:
    """A StateStore on one Redis server, behind Sentinels or on a cluster."""

    def __init__(self, url: str, lifetimes: Lifetimes = LIFETIMES) -> None:
        """Prepares connections; none is made before the first call.

        Args:
            url: REDIS_URL, checked by the settings.
            lifetimes: how long keys live, to the millisecond.
        """
        target = parse_redis_url(url)
        self._address = target.address
        self._link = connect(target)
        self._lifetimes = lifetimes
        self._basic: dict[str, tuple[ServerState, bytes]] = {}  # the part of servers:all that each state made

    @property
    def address(self) -> str:
        return self._address

    async def write(self, changed: Sequence[Stored], bases: Mapping[str, str], fleet: Fleet | None) -> Written:
        parts = [changed[at : at + SERVERS_PER_PIPELINE] for at in range(0, len(changed), SERVERS_PER_PIPELINE)] or [()]
        intact, lost, listed, error = True, False, True, ""
        newer: list[Stored] = []
        failed: list[str] = []
        for part in parts:
            commands: list[Command] = [(COUNT_KEY, ("EXISTS", COUNT_KEY))]
            commands += await self._server_commands(part, bases)
            if fleet is not None and part is parts[-1]:
                commands += await self._fleet_commands(fleet)
            is_last = fleet is not None and part is parts[-1]
            versions = {stored.server_id: stored.version for stored in part}
            commands.append(_told_command(versions, fleet.version if fleet is not None and is_last else ""))
            answers = await self._link.run(commands)
            servers = slice(1, 1 + len(part))
            answers[servers] = await self._settled(part, commands[servers], answers[servers])
            refusal = next((one for one in answers if isinstance(one, OpenManagerError)), None)
            if refusal is not None:
                if not isinstance(refusal, Unavailable):
                    raise refusal
                error = refusal.message
            intact &= answers[0] != 0
            lost |= 0 in answers[servers]
            listed &= 0 not in answers[1 + len(part) : -1]
            is_untold = isinstance(answers[-1], OpenManagerError)
            for stored, answer in zip(part, answers[1:], strict=False):
                if is_untold or isinstance(answer, OpenManagerError | list):
                    failed.append(stored.server_id)
                elif not isinstance(answer, int):
                    newer.append(answer)
        return Written(intact=intact, lost=lost, listed=listed, newer=newer, failed=failed, error=error)

    async def read(self, server_ids: Sequence[str]) -> Sequence[Stored]:
        sets: Sets = {}
        found: list[Stored] = []
        for at in range(0, len(server_ids), SERVERS_PER_READ):
            part = server_ids[at : at + SERVERS_PER_READ]
            keys = [server_key(server_id) for server_id in part]
            answers = await self._link.run([(key, ("MGET", note_key(key), key)) for key in keys])
            for server_id, answer in zip(part, answers, strict=True):
                if isinstance(answer, OpenManagerError):
                    raise answer
                stored = _parsed(server_id, answer, sets)
                if stored is not None:
                    found.append(stored)
            await asyncio.sleep(0)
        return found

    async def differences(self, versions: Mapping[str, str]) -> AsyncGenerator[Difference, None]:
        fleets = [await self._get(note_key(key)) for key in (ALL_KEY, COUNT_KEY, HEALTHY_KEY)]
        yield Difference(fleets=[note_version(note) for note in fleets if note is not None])
        basic = await self._listed()
        there = list(basic) or await self._scan()  # servers:all lives 60 s, server:{id} 300 s
        ids = list(dict.fromkeys((*there, *versions)))
        for at in range(0, len(ids), NOTES_PER_READ):
            part = ids[at : at + NOTES_PER_READ]
            missing: list[str] = []
            differs = [server_id for server_id in part if server_id not in versions]
            known = [server_id for server_id in part if server_id in versions]
            keys = [server_key(server_id) for server_id in known]
            answers = await self._link.run([(key, ("MGET", note_key(key))) for key in keys]) if known else []
            for server_id, answer in zip(known, answers, strict=True):
                if isinstance(answer, OpenManagerError):
                    raise answer
                (note,) = answer
                if note is None:
                    missing.append(server_id)
                elif note_version(note) != versions[server_id]:
                    differs.append(server_id)
            found = {stored.server_id: stored for stored in await self.read(differs)}
            for server_id in differs:
                if server_id not in found and server_id in versions:
                    missing.append(server_id)  # what is there has expired, or is not ours
                elif server_id not in found and (listed := _parsed_basic(basic.get(server_id))) is not None:
                    found[server_id] = listed
            yield Difference(found=list(found.values()), missing=missing)

    async def heard(self) -> AsyncGenerator[Heard, None]:
        async with aclosing(self._link.listen(CHANNEL)) as messages:
            async for message in messages:
                yield Heard() if message is None else _told(message)

    async def list_basic(self) -> Sequence[ServerState] | None:
        raw = await self._get(ALL_KEY)
        return None if raw is None else _parsed_all(raw)

    async def count(self) -> int | None:
        return _number(await self._get(COUNT_KEY))

    async def healthy(self) -> int | None:
        return _number(await self._get(HEALTHY_KEY))

    async def ping(self) -> StoreIdentity:
        version, life, trouble = await self._link.info()
        return StoreIdentity(version=f"Redis {version}", life=life, trouble=trouble)

    async def close(self) -> None:
        await self._link.close()

    async def _server_commands(self, part: Sequence[Stored], bases: Mapping[str, str]) -> list[Command]:
        lives = _ms(self._lifetimes.server_s), _ms(self._lifetimes.note_s)
        commands: list[Command] = []
        for stored, (document, note) in zip(part, await _encoded(part), strict=True):
            key = server_key(stored.server_id)
            base = bases.get(stored.server_id, "")
            arguments = (base, stored.version, stored.writer, note, document, *lives)
            commands.append((key, ("EVAL", _WRITE_SERVER, 2, key, note_key(key), *arguments)))
        return commands

    async def _settled(
        self, part: Sequence[Stored], commands: Sequence[Command], answers: Sequence[Answer]
    ) -> list[Answer]:
        """The answers, with what the store has instead already parsed. Where that cannot be taken in, since its
        document has expired or is not ours, the command is given again as by one who has seen it."""
        settled = [_seen(stored, answer) for stored, answer in zip(part, answers, strict=True)]
        again = [place for place, answer in enumerate(settled) if isinstance(answer, list)]
        if again:
            repeated = [_knowing(commands[place], settled[place][0]) for place in again]
            versions = {part[place].server_id: part[place].version for place in again}
            *last, told = await self._link.run([*repeated, _told_command(versions)])
            for place, answer in zip(again, last, strict=True):
                settled[place] = told if isinstance(told, OpenManagerError) else _seen(part[place], answer)
        return settled

    async def _fleet_commands(self, fleet: Fleet) -> list[Command]:
        lives = self._lifetimes
        values = (
            (ALL_KEY, await self._all(fleet), lives.all_s),
            (COUNT_KEY, fleet.summary.total, lives.count_s),
            (HEALTHY_KEY, fleet.summary.healthy, lives.healthy_s),
        )
        return [
            (key, ("EVAL", _WRITE_FLEET, 2, key, note_key(key), fleet.version, value, _ms(life_s), *fleet.bases))
            for key, value, life_s in values
        ]

    async def _all(self, fleet: Fleet) -> bytes:
        """servers:all, of which only the states that changed are encoded again (3 us each)."""
        known = self._basic

        def encode() -> dict[str, tuple[ServerState, bytes]]:
            fresh = {}
            for state in fleet.states:
                kept = known.get(state.server_id)
                fresh[state.server_id] = kept if kept and kept[0] is state else (state, basic_document(state))
            return fresh

        self._basic = encode() if len(fleet.states) <= STATES_ON_LOOP else await asyncio.to_thread(encode)
        return b"[" + b",".join(document for _, document in self._basic.values()) + b"]"

    async def _get(self, key: str) -> bytes | None:
        (answer,) = await self._link.run([(key, ("MGET", key))])
        if isinstance(answer, OpenManagerError):
            raise answer
        found: bytes | None = answer[0]
        return found

    async def _listed(self) -> dict[str, Any]:
        """The documents in servers:all by id, as they lie there; none where they are not ours."""
        raw = await self._get(ALL_KEY)
        if raw is None:
            return {}
        try:
            return {str(one["id"]): one for one in await asyncio.to_thread(orjson.loads, raw)}
        except (ValueError, KeyError, TypeError):
            _log.warning("%s in Redis is not ours, and will be replaced", ALL_KEY)
            return {}

    async def _scan(self) -> list[str]:
        keys = await self._link.scan(f"{SERVER_KEY_PREFIX}*", MAX_KEYS_PER_SCAN)
        return [key.decode("utf-8", "replace").removeprefix(SERVER_KEY_PREFIX) for key in keys]


def _told_command(versions: Mapping[str, str], fleet: str = "") -> Command:
    """Tells other replicas what was written."""
    return None, ("PUBLISH", CHANNEL, orjson.dumps({"servers": versions, "fleet": fleet}))


def _seen(stored: Stored, answer: Answer) -> Answer:
    """What came of a server's write: the note and the document that stood in the way as what they were made from."""
    return (_parsed(stored.server_id, answer, {}) or answer) if isinstance(answer, list) else answer


def _knowing(command: Command, note: bytes) -> Command:
    """A server's write of one who has seen the note that is there, whatever it is."""
    key, arguments = command
    return key, (*arguments[:_BASE_AT], _NOTE_VERSION.match(note)[0], *arguments[_BASE_AT + 1 :])  # type: ignore[index]


def _parsed(server_id: str, answer: Answer, sets: Sets) -> Stored | None:
    """A note and its document; None, and said so, for what somebody else may have put there."""
    note, raw = answer
    if note is None and raw is None:
        return None
    try:
        found = parse_stored(server_id, note, None if raw is None else orjson.loads(raw), sets)
        if found is not None and found.server_id != server_id:
            raise ValueError(f"the document is of {found.server_id[:100]!r}")
    except ValueError as error:
        _log.warning("%s in Redis cannot be read back: %s", server_key(server_id), error)
        return None
    return found


def _parsed_basic(document: Any) -> ServerState | None:
    """An entry of servers:all; None, and said so, for one that is not ours."""
    try:
        return None if document is None else parse_document(document, {})
    except ValueError as error:
        _log.warning("an entry of %s in Redis cannot be read back: %s", ALL_KEY, error)
        return None


def _told(message: bytes) -> Heard:
    """What is in a message."""
    try:
        told = orjson.loads(message)
        versions = {str(server_id): str(version) for server_id, version in told["servers"].items()}
        return Heard(versions=versions, fleet=str(told["fleet"]))
    except (ValueError, AttributeError, KeyError, TypeError):
        _log.warning("a message on %s is not one of ours", CHANNEL)
        return Heard()


def _parsed_all(raw: bytes) -> list[ServerState]:
    sets: Sets = {}
    try:
        documents = orjson.loads(raw)
        return [parse_document(document, sets) for document in documents] if isinstance(documents, list) else []
    except ValueError as error:
        raise Unavailable(f"Redis holds what is not ours: {error}", reason="STORE_UNREADABLE") from error


async def _encoded(part: Sequence[Stored]) -> list[tuple[bytes, bytes]]:
    """Document and note of each; no document for a removal."""

    def encode() -> list[tuple[bytes, bytes]]:
        return [(b"", removal_note(one)) if isinstance(one, Removal) else full_document(one) for one in part]

    cells = sum(stored.cells for stored in part if isinstance(stored, ServerState))
    return encode() if cells <= CELLS_ON_LOOP else await asyncio.to_thread(encode)


def _ms(seconds: float) -> int:
    return round(seconds * 1_000)


def _number(raw: bytes | None) -> int | None:
    return None if raw is None else int(raw)
