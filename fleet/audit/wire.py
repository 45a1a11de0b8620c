"""Audit events as messages and back."""

from fleet.audit.event import Event
from openmanager.fleet.v1 import audit_pb2

_SAME = ("actor", "role", "authentication", "address", "action", "target", "code", "reason", "trace_id", "count")


def to_pb(event: Event) -> audit_pb2.AuditEvent:
    """The message."""
    message = audit_pb2.AuditEvent(
        id=event.id,
        writer_id=event.writer_id,
        seq=event.seq,
        prev_hash=event.prev_hash.hex(),
        hash=event.hash.hex(),
        before=event.before,
        after=event.after,
        **{name: getattr(event, name) for name in _SAME},
    )
    message.time.FromMicroseconds(event.time_us)
    return message


def from_pb(message: audit_pb2.AuditEvent) -> Event:
    """The event; raises ValueError where the message is none."""
    return Event(
        id=message.id,
        writer_id=message.writer_id,
        seq=message.seq,
        prev_hash=bytes.fromhex(message.prev_hash),
        hash=bytes.fromhex(message.hash),
        time_us=message.time.ToMicroseconds(),
        before=message.before if message.HasField("before") else None,
        after=message.after if message.HasField("after") else None,
        **{name: getattr(message, name) for name in _SAME},
    )
