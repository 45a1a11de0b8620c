-- Who may do what: people and programs. Secrets are not here: of passwords argon2id, of tokens SHA-256.
CREATE TABLE access_users (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name varchar(255) COLLATE "C" NOT NULL,
    role smallint NOT NULL CHECK (role BETWEEN 1 AND 4),
    scope jsonb,
    disabled boolean NOT NULL DEFAULT false,
    password_hash text,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
-- Two names that differ in the case of their letters are one.
CREATE UNIQUE INDEX access_users_name ON access_users (lower(name));
CREATE TABLE access_tokens (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    name varchar(255) NOT NULL,
    role smallint NOT NULL CHECK (role BETWEEN 1 AND 4),
    scope jsonb,
    hash bytea NOT NULL UNIQUE CHECK (length(hash) = 32),
    user_id uuid REFERENCES access_users ON DELETE CASCADE,
    expires_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    last_used_at timestamptz,
    revoked_at timestamptz
);
CREATE INDEX access_tokens_newest ON access_tokens (created_at DESC, id DESC);
CREATE INDEX access_tokens_user ON access_tokens (user_id);
-- One row. Whoever watches looks at the revision only.
CREATE TABLE access_state (
    only_one boolean PRIMARY KEY DEFAULT true CHECK (only_one),
    revision bigint NOT NULL DEFAULT 1,
    setup_hash bytea
);
INSERT INTO access_state DEFAULT VALUES;
CREATE FUNCTION access_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE access_state SET revision = revision + 1;
    RETURN NULL;
END $$;
CREATE TRIGGER access_users_changed AFTER INSERT OR UPDATE OR DELETE ON access_users
    FOR EACH STATEMENT EXECUTE FUNCTION access_changed();
-- That a token was used changes nothing for who watches.
CREATE TRIGGER access_tokens_changed
    AFTER INSERT OR DELETE OR UPDATE OF name, role, scope, hash, user_id, expires_at, revoked_at ON access_tokens
    FOR EACH STATEMENT EXECUTE FUNCTION access_changed();
