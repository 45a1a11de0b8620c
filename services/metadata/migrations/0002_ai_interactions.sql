-- All columns are a public contract.
CREATE TABLE IF NOT EXISTS ai_interactions (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    session_id varchar(255),
    query text,
    response text,
    confidence float CHECK (confidence BETWEEN 0 AND 1),
    user_rating integer CHECK (user_rating BETWEEN 1 AND 5),
    created_at timestamptz NOT NULL DEFAULT now()
);
-- Listings are newest first, of all or of one session; the id makes the order total.
CREATE INDEX IF NOT EXISTS ai_interactions_newest ON ai_interactions (created_at DESC, id DESC);
CREATE INDEX IF NOT EXISTS ai_interactions_session ON ai_interactions (session_id, created_at DESC, id DESC);
