"""What an audit event says, and its hash: SHA-256 over a versioned layout of bytes (docs/formats/audit.md).

     0      4    5        8        16          24         32           64       80            128
     +------+----+--------+--------+-----------+----------+------------+--------+-------------+---------------
     | OMAE | 1  | 0 0 0  | seq    | time      | count    | prev_hash  | id     | 12 lengths  | the 12 texts
     |      | u8 |        | u64    | i64, us   | u64      | 32 bytes   | 16     | u32 each    | UTF-8
     +------+----+--------+--------+-----------+----------+------------+--------+-------------+---------------

Integers are big-endian. What must stay true: every field is in the bytes, and no two events have the same bytes; a
layout never changes once events were written in it, another one gets another number; texts are such that PostgreSQL
gives them back as they were (no NUL, valid Unicode).
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, NamedTuple
from uuid import UUID, uuid4

import orjson

LAYOUT: Final = 1
GENESIS: Final = bytes(32)
"""The hash before a chain's first event."""
MAX_TEXT_CHARACTERS: Final = 512
MAX_STATE_BYTES: Final = 32 << 10
"""Of each of `before` and `after`; what is larger is replaced by its size and hash."""

_HEAD: Final = struct.Struct(">4sB3xQqQ32s16s12I")
_MAGIC: Final = b"OMAE"
_ABSENT: Final = 0xFFFFFFFF


class Link(NamedTuple):
    """A place in a chain: the number and hash of an event."""

    seq: int
    hash: bytes


START: Final = Link(0, GENESIS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What happened, before it has its place in a chain; `draft` makes one that can be kept.

    Attributes:
        id: UUID.
        time_us: when, UTC, microseconds since the Unix epoch; of an aggregated one the beginning of its minute.
        actor, role, authentication: who, what it may do, how it proved itself.
        address: host it called from.
        action: the RPC's full name, or what a service did by itself.
        target: what was acted upon.
        code: outcome as gRPC calls it: "OK", "PERMISSION_DENIED".
        reason: UPPER_SNAKE where it did not go well.
        trace_id: 32 hexadecimal digits, or empty.
        before, after: JSON of what was changed; None: not said.
        count: how many calls it stands for.
    """

    id: str
    time_us: int
    actor: str = ""
    role: str = ""
    authentication: str = ""
    address: str = ""
    action: str = ""
    target: str = ""
    code: str = "OK"
    reason: str = ""
    trace_id: str = ""
    before: str | None = None
    after: str | None = None
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Event(Draft):
    """A draft at its place: number `seq` of `writer_id`, after the event whose hash is `prev_hash`."""

    writer_id: str
    seq: int
    prev_hash: bytes
    hash: bytes

    @property
    def link(self) -> Link:
        """Its place."""
        return Link(self.seq, self.hash)


_TEXTS: Final = ("actor", "role", "authentication", "address", "action", "target", "code", "reason", "trace_id")
_DRAFT_FIELDS: Final = tuple(field.name for field in fields(Draft))


def draft(*, time_us: int, before: object = None, after: object = None, **said: Any) -> Draft:
    """A draft with a new id, its texts cleaned and cut, its states as JSON."""
    texts: dict[str, Any] = {name: _clean(said.pop(name)) for name in _TEXTS if name in said}
    return Draft(id=str(uuid4()), time_us=time_us, before=_state(before), after=_state(after), **texts, **said)


def _clean(text: str) -> str:
    cut = text[:MAX_TEXT_CHARACTERS].replace("\0", "\N{REPLACEMENT CHARACTER}")
    return cut.encode("utf-8", "replace").decode()


def _state(value: object) -> str | None:
    if value is None:
        return None
    raw = orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS)
    if b"\\u0000" in raw:  # JSON may have it, PostgreSQL's may not
        raw = raw.replace(b"\\u0000", b"\\ufffd")
    if len(raw) > MAX_STATE_BYTES:
        raw = orjson.dumps({"omitted_bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()})
    return raw.decode()


def placed(said: Draft, writer_id: str, last: Link) -> Event:
    """The draft as the event after `last` of a chain."""
    values: dict[str, Any] = {name: getattr(said, name) for name in _DRAFT_FIELDS}
    seq = last.seq + 1
    texts = (writer_id, *(values[name] for name in _TEXTS), said.before, said.after)
    found = digest(seq, said.time_us, said.count, last.hash, UUID(said.id).bytes, texts)
    return Event(**values, writer_id=writer_id, seq=seq, prev_hash=last.hash, hash=found)


def digest(
    seq: int, time_us: int, count: int, prev_hash: bytes, event_id: bytes, texts: tuple[str | None, ...]
) -> bytes:
    """SHA-256 of an event in layout 1.

    Args:
        seq, time_us, count, prev_hash, event_id: as in the event; the id as 16 bytes.
        texts: writer_id, actor, role, authentication, address, action, target, code, reason, trace_id, before, after.

    Raises:
        struct.error, UnicodeEncodeError: what cannot be an event's.
    """
    raw = [b"" if text is None else text.encode() for text in texts]
    sizes = [_ABSENT if text is None else len(data) for text, data in zip(texts, raw, strict=True)]
    head = _HEAD.pack(_MAGIC, LAYOUT, seq, time_us, count, prev_hash, event_id, *sizes)
    return hashlib.sha256(head + b"".join(raw)).digest()


def digest_of(event: Event) -> bytes:
    """What its hash must be."""
    texts = (event.writer_id, *(getattr(event, name) for name in _TEXTS), event.before, event.after)
    return digest(event.seq, event.time_us, event.count, event.prev_hash, UUID(event.id).bytes, texts)


def to_json(event: Event) -> str:
    """An event as it lies in journals."""
    row = {name: getattr(event, name) for name in (*_DRAFT_FIELDS, "writer_id", "seq")}
    return orjson.dumps(row | {"prev_hash": event.prev_hash.hex(), "hash": event.hash.hex()}).decode()


def from_json(text: str) -> Event:
    """The inverse."""
    row: Mapping[str, Any] = orjson.loads(text)
    return Event(**{**row, "prev_hash": bytes.fromhex(row["prev_hash"]), "hash": bytes.fromhex(row["hash"])})
