"""The kinds of append-only facts, and how PostgreSQL is given facts of each: one statement for any number of them.

A new kind is a table and an entry here. What must stay true: a statement takes a JSON array of payloads as its one
parameter, and ON CONFLICT DO NOTHING makes sending a fact again a no-op.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class FactKind:
    """`insert` has one parameter, a JSON array of the payloads."""

    name: str
    insert: str


AI_INTERACTION: Final = FactKind(
    name="ai_interaction",
    insert="""INSERT INTO ai_interactions (id, session_id, query, response, confidence, user_rating, created_at)
    SELECT id, nullif(session_id, ''), query, response, confidence, user_rating, created_at
    FROM json_to_recordset($1::json) AS fact (id uuid, session_id text, query text, response text,
        confidence float, user_rating integer, created_at timestamptz)
    ON CONFLICT (id) DO NOTHING""",
)

AUDIT_EVENT: Final = FactKind(name="audit_event", insert="SELECT audit_insert($1::json)")

AUDIT_CHECKPOINT: Final = FactKind(
    name="audit_checkpoint",
    insert="""INSERT INTO audit_checkpoints (number, body, signature)
    SELECT number, body, decode(signature, 'hex')
    FROM json_to_recordset($1::json) AS fact (number bigint, body text, signature text)
    ON CONFLICT (number) DO NOTHING""",
)

KINDS: Final = {kind.name: kind for kind in (AI_INTERACTION, AUDIT_EVENT, AUDIT_CHECKPOINT)}
