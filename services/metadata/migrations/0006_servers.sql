-- What people say of a server beside what its sender says, and the revision that a change is compared with.
ALTER TABLE servers ADD COLUMN IF NOT EXISTS revision bigint NOT NULL DEFAULT 1;
ALTER TABLE servers ADD COLUMN IF NOT EXISTS labels jsonb NOT NULL DEFAULT '{}' CHECK (jsonb_typeof(labels) = 'object');
ALTER TABLE servers ADD COLUMN IF NOT EXISTS notes text NOT NULL DEFAULT '';

-- Every change of a row is a revision of its own, whoever makes it: also one by hand.
CREATE OR REPLACE FUNCTION servers_next_revision() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.revision := OLD.revision + 1;
    RETURN NEW;
END
$$;
CREATE OR REPLACE TRIGGER servers_next_revision BEFORE UPDATE ON servers
    FOR EACH ROW EXECUTE FUNCTION servers_next_revision();

-- Windows during which a server is not counted unhealthy. A change of one is a change of its server's row, too.
CREATE TABLE maintenance_windows (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    server_id varchar(255) COLLATE "C" NOT NULL REFERENCES servers (id) ON DELETE CASCADE,
    starts_at timestamptz NOT NULL,
    ends_at timestamptz NOT NULL CHECK (ends_at > starts_at),
    reason text NOT NULL DEFAULT '',
    created_by text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX maintenance_windows_of_server ON maintenance_windows (server_id, ends_at);
