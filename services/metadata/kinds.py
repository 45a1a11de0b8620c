# ruff: noqa: S608  every statement is put together from constant texts
"""The kinds of append-only facts, and how PostgreSQL is given facts of each: one statement for any number of them.

A new kind is a table and an entry here. What must stay true: a statement takes a JSON array of payloads as its one
parameter, and sending a fact again, also after later ones, is a no-op (ON CONFLICT).
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class FactKind:
    """How facts of a kind are inserted.

    Attributes:
        insert: has one parameter, a JSON array of the payloads.
        some: with the same parameter, does a part of what one statement may have no time for, and gives back how much
            that was; repeated before `insert` until there is nothing left. Empty: all is done at once.
    """

    name: str
    insert: str
    some: str = ""


# What was said of an interaction that PostgreSQL has only now (it had refused it, or was another one) counts, too.
AI_INTERACTION: Final = FactKind(
    name="ai_interaction",
    insert="""WITH fact AS MATERIALIZED (SELECT * FROM json_to_recordset($1::json) AS said (id uuid, session_id text,
        query text, response text, confidence float, user_rating integer, created_at timestamptz, model text,
        prompt_hash text, prompt_tokens integer, response_tokens integer, latency_ms integer, server_ids text[],
        anomaly_ids text[], tags text[], correction text, rating_comment text, embedding real[])),
    kept AS (INSERT INTO ai_interactions (id, session_id, query, response, confidence, user_rating, created_at, model,
        prompt_hash, prompt_tokens, response_tokens, latency_ms, server_ids, anomaly_ids, tags, correction,
        rating_comment, rated_at, corrected_at)
    SELECT fact.id, nullif(session_id, ''), query, response, confidence, coalesce(rated.rating, user_rating),
        fact.created_at, model, prompt_hash, prompt_tokens, response_tokens, latency_ms, server_ids, anomaly_ids, tags,
        coalesce(corrected.correction, fact.correction),
        CASE WHEN rated.id IS NULL THEN rating_comment ELSE rated.comment END,
        coalesce(rated.created_at, CASE WHEN user_rating IS NOT NULL THEN fact.created_at END),
        coalesce(corrected.created_at, CASE WHEN fact.correction IS NOT NULL THEN fact.created_at END)
    FROM fact LEFT JOIN LATERAL (SELECT * FROM ai_feedback AS said WHERE said.interaction_id = fact.id
        AND said.rating IS NOT NULL ORDER BY said.created_at DESC, said.id DESC LIMIT 1) AS rated ON true
    LEFT JOIN LATERAL (SELECT * FROM ai_feedback AS said WHERE said.interaction_id = fact.id
        AND said.correction IS NOT NULL ORDER BY said.created_at DESC, said.id DESC LIMIT 1) AS corrected ON true
        ON CONFLICT (id) DO NOTHING RETURNING id)
    INSERT INTO ai_embeddings (interaction_id, embedding)
        SELECT id, embedding FROM fact JOIN kept USING (id) WHERE embedding IS NOT NULL""",
)

# The parts of one statement do not see what the others do: the latest of these facts is compared with the latest
# before them, which the interaction has.
AI_FEEDBACK: Final = FactKind(
    name="ai_feedback",
    insert="""WITH fact AS MATERIALIZED (SELECT * FROM json_to_recordset($1::json) AS said (id uuid,
        interaction_id uuid, rating integer, comment text, correction text, created_at timestamptz)),
    kept AS (INSERT INTO ai_feedback (id, interaction_id, rating, comment, correction, created_at)
        SELECT id, interaction_id, rating, nullif(comment, ''), correction, created_at FROM fact
        ON CONFLICT (id) DO NOTHING),
    rated AS (SELECT DISTINCT ON (interaction_id) interaction_id, rating, comment, created_at AS rated_at
        FROM fact WHERE rating IS NOT NULL ORDER BY interaction_id, created_at DESC, id DESC),
    corrected AS (SELECT DISTINCT ON (interaction_id) interaction_id, correction, created_at AS corrected_at
        FROM fact WHERE correction IS NOT NULL ORDER BY interaction_id, created_at DESC, id DESC),
    latest AS (SELECT *, rating IS NOT NULL AS is_rated, correction IS NOT NULL AS is_corrected
        FROM rated FULL JOIN corrected USING (interaction_id))
    UPDATE ai_interactions AS old SET
        user_rating = CASE WHEN is_rated AND (old.rated_at IS NULL OR old.rated_at <= latest.rated_at)
            THEN rating ELSE old.user_rating END,
        rating_comment = CASE WHEN is_rated AND (old.rated_at IS NULL OR old.rated_at <= latest.rated_at)
            THEN nullif(comment, '') ELSE old.rating_comment END,
        rated_at = CASE WHEN is_rated THEN greatest(old.rated_at, latest.rated_at) ELSE old.rated_at END,
        correction = CASE WHEN is_corrected AND (old.corrected_at IS NULL OR old.corrected_at <= latest.corrected_at)
            THEN latest.correction ELSE old.correction END,
        corrected_at = CASE WHEN is_corrected THEN greatest(old.corrected_at, latest.corrected_at)
            ELSE old.corrected_at END
    FROM latest WHERE old.id = latest.interaction_id""",
)

# What was recorded after it stays, also when this is sent again. `ids` are of interactions that PostgreSQL did not
# have, whose ratings it may have. A session may have any number of them: 200,000 take longer than a statement may.
_ERASED: Final = """fact AS MATERIALIZED (SELECT * FROM json_to_recordset($1::json) AS said (session_id text,
        created_at timestamptz, ids uuid[]))"""
AI_ERASURE: Final = FactKind(
    name="ai_erasure",
    some=f"""WITH {_ERASED},
    old AS MATERIALIZED (SELECT id FROM ai_interactions JOIN fact USING (session_id)
        WHERE ai_interactions.created_at <= fact.created_at LIMIT 500),
    unsaid AS (DELETE FROM ai_feedback WHERE interaction_id IN (SELECT id FROM old)),
    gone AS (DELETE FROM ai_interactions WHERE id IN (SELECT id FROM old) RETURNING id)
    SELECT count(*) FROM gone""",
    insert=f"""WITH {_ERASED},
    gone AS (DELETE FROM ai_interactions AS old USING fact
        WHERE old.session_id = fact.session_id AND old.created_at <= fact.created_at RETURNING old.id)
    DELETE FROM ai_feedback WHERE interaction_id IN (SELECT id FROM gone UNION ALL SELECT unnest(ids) FROM fact)""",
)

AUDIT_EVENT: Final = FactKind(name="audit_event", insert="SELECT audit_insert($1::json)")

AUDIT_CHECKPOINT: Final = FactKind(
    name="audit_checkpoint",
    insert="""INSERT INTO audit_checkpoints (number, body, signature)
    SELECT number, body, decode(signature, 'hex')
    FROM json_to_recordset($1::json) AS fact (number bigint, body text, signature text)
    ON CONFLICT (number) DO NOTHING""",
)

# Of what was told of a finding the later revision holds, and one with an end against any without.
ANOMALY: Final = FactKind(
    name="anomaly",
    insert="""INSERT INTO anomalies AS old (id, server_id, detector, metric, started_at, ended_at, peaked_at, score,
        value, expected_low, expected_high, contributions, revision, told_at)
    SELECT DISTINCT ON (id) id, server_id, detector, metric, started_at, ended_at, peaked_at, score, value,
        expected_low, expected_high, contributions, revision, told_at
    FROM json_to_recordset($1::json) AS said (id text, server_id text, detector text, metric text,
        started_at timestamptz, ended_at timestamptz, peaked_at timestamptz, score float, value float,
        expected_low float, expected_high float, contributions jsonb, revision integer, told_at timestamptz)
    ORDER BY id, ended_at IS NOT NULL DESC, revision DESC
    ON CONFLICT (id) DO UPDATE SET metric = excluded.metric, ended_at = excluded.ended_at,
        peaked_at = excluded.peaked_at, score = excluded.score, value = excluded.value,
        expected_low = excluded.expected_low, expected_high = excluded.expected_high,
        contributions = excluded.contributions, revision = excluded.revision, told_at = excluded.told_at
    WHERE (excluded.ended_at IS NOT NULL, excluded.revision) > (old.ended_at IS NOT NULL, old.revision)""",
)

ANOMALY_REMARK: Final = FactKind(
    name="anomaly_remark",
    insert="""INSERT INTO anomaly_remarks (id, anomaly_id, author, comment, is_real, said_at)
    SELECT id, anomaly_id, author, comment, is_real, said_at
    FROM json_to_recordset($1::json) AS said (id uuid, anomaly_id text, author text, comment text, is_real boolean,
        said_at timestamptz)
    ON CONFLICT (id) DO NOTHING""",
)

_ALL: Final = (AI_INTERACTION, AI_FEEDBACK, AI_ERASURE, AUDIT_EVENT, AUDIT_CHECKPOINT, ANOMALY, ANOMALY_REMARK)
KINDS: Final = {kind.name: kind for kind in _ALL}
