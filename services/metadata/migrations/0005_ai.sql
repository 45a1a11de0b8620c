-- Our own columns beside the contract's. Times of a rating and a correction decide which one is the latest; a rating of
-- before this migration has none and is the oldest.
ALTER TABLE ai_interactions
    ADD COLUMN IF NOT EXISTS model varchar(100),
    ADD COLUMN IF NOT EXISTS prompt_hash varchar(128),
    ADD COLUMN IF NOT EXISTS prompt_tokens integer CHECK (prompt_tokens >= 0),
    ADD COLUMN IF NOT EXISTS response_tokens integer CHECK (response_tokens >= 0),
    ADD COLUMN IF NOT EXISTS latency_ms integer CHECK (latency_ms >= 0),
    ADD COLUMN IF NOT EXISTS server_ids text[],
    ADD COLUMN IF NOT EXISTS anomaly_ids text[],
    ADD COLUMN IF NOT EXISTS tags text[],
    ADD COLUMN IF NOT EXISTS correction text,
    ADD COLUMN IF NOT EXISTS rating_comment text,
    ADD COLUMN IF NOT EXISTS rated_at timestamptz,
    ADD COLUMN IF NOT EXISTS corrected_at timestamptz;
-- For searches, of the first characters only: a text of 1 MiB has more words than a tsvector can hold. Without a
-- language: the words are names of servers and metrics, and what people write in any language.
ALTER TABLE ai_interactions ADD COLUMN IF NOT EXISTS words tsvector GENERATED ALWAYS AS (to_tsvector('simple',
    left(coalesce(query, ''), 40000) || ' ' || left(coalesce(response, ''), 40000) || ' ' ||
    left(coalesce(correction, ''), 40000))) STORED;
CREATE INDEX IF NOT EXISTS ai_interactions_text ON ai_interactions USING gin (words);
-- As plain numbers, so that they are kept where pgvector is missing; its index is made when it is there. A table of
-- their own: a rating rewrites the interaction, and must not touch that index.
CREATE TABLE IF NOT EXISTS ai_embeddings (
    interaction_id uuid PRIMARY KEY REFERENCES ai_interactions ON DELETE CASCADE,
    embedding real[] NOT NULL
);
-- What people said of interactions, append-only; the latest is copied to the interaction. No foreign key: an interaction
-- that PostgreSQL refused may be sent again after its ratings.
CREATE TABLE IF NOT EXISTS ai_feedback (
    id uuid PRIMARY KEY,
    interaction_id uuid NOT NULL,
    rating integer CHECK (rating BETWEEN 1 AND 5),
    comment text,
    correction text,
    created_at timestamptz NOT NULL,
    CHECK ((rating IS NULL) <> (correction IS NULL))
);
CREATE INDEX IF NOT EXISTS ai_feedback_latest ON ai_feedback (interaction_id, created_at DESC, id DESC);
-- One index for both lists; pending entries are merged in bulk, so that recording stays cheap.
CREATE INDEX IF NOT EXISTS ai_interactions_words ON ai_interactions USING gin (tags, server_ids);
