-- The audit log: only ever added to. Rights, triggers and the chains of hashes (docs/formats/audit.md) each say so; who
-- owns the tables can still drop a month, which is how old ones go, after a signed checkpoint of its end.
CREATE TABLE audit_events (
    writer_id text COLLATE "C" NOT NULL,
    seq bigint NOT NULL CHECK (seq > 0),
    time timestamptz NOT NULL,
    id uuid NOT NULL,
    actor text NOT NULL,
    role text NOT NULL,
    authentication text NOT NULL,
    address text NOT NULL,
    action text NOT NULL,
    target text NOT NULL,
    code text NOT NULL,
    reason text NOT NULL,
    trace_id text NOT NULL,
    before json,
    after json,
    count bigint NOT NULL,
    prev_hash bytea NOT NULL,
    hash bytea NOT NULL,
    PRIMARY KEY (writer_id, seq, time)
) PARTITION BY RANGE (time);
CREATE INDEX audit_events_newest ON audit_events (time DESC, id DESC);

CREATE TABLE audit_checkpoints (
    number bigint PRIMARY KEY,
    body text NOT NULL,
    signature bytea NOT NULL
);

CREATE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the audit log is only ever added to' USING ERRCODE = 'insufficient_privilege';
END $$;
-- Of a partitioned table, so its partitions get it too. TRUNCATE knows no rows: each partition has one of its own.
CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE ON audit_events
    FOR EACH ROW EXECUTE FUNCTION audit_refuse();
CREATE TRIGGER audit_not_emptied BEFORE TRUNCATE ON audit_events
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse();
CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE ON audit_checkpoints
    FOR EACH ROW EXECUTE FUNCTION audit_refuse();
CREATE TRIGGER audit_not_emptied BEFORE TRUNCATE ON audit_checkpoints
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse();
REVOKE UPDATE, DELETE, TRUNCATE ON audit_events, audit_checkpoints FROM PUBLIC, CURRENT_USER;

-- Makes the partition of a month, unless it is there. Attached and not made in its place: that waits for no reader.
CREATE FUNCTION audit_month(month timestamptz) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    partition text := 'audit_events_' || to_char(month AT TIME ZONE 'UTC', 'YYYY_MM');
BEGIN
    IF to_regclass(partition) IS NOT NULL THEN
        RETURN;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('openmanager audit partitions'));
    IF to_regclass(partition) IS NOT NULL THEN
        RETURN;
    END IF;
    EXECUTE format('CREATE TABLE %I (LIKE audit_events INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', partition);
    EXECUTE format('CREATE TRIGGER audit_not_emptied BEFORE TRUNCATE ON %I
        FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()', partition);
    EXECUTE format('REVOKE UPDATE, DELETE, TRUNCATE ON %I FROM PUBLIC, CURRENT_USER', partition);
    EXECUTE format('ALTER TABLE audit_events ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', partition, month,
        (month AT TIME ZONE 'UTC' + interval '1 month') AT TIME ZONE 'UTC');
END $$;

-- Adds events, a JSON array of them; what is there already stays as it is.
CREATE FUNCTION audit_insert(events json) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    PERFORM audit_month(month) FROM (
        SELECT DISTINCT date_trunc('month', (event ->> 'time')::timestamptz AT TIME ZONE 'UTC') AT TIME ZONE 'UTC'
        FROM json_array_elements(events) AS event
    ) AS months (month);
    INSERT INTO audit_events (writer_id, seq, time, id, actor, role, authentication, address, action, target, code,
        reason, trace_id, before, after, count, prev_hash, hash)
    SELECT writer_id, seq, time, id, actor, role, authentication, address, action, target, code, reason, trace_id,
        before::json, after::json, count, decode(prev_hash, 'hex'), decode(hash, 'hex')
    FROM json_to_recordset(events) AS event (writer_id text, seq bigint, time timestamptz, id uuid, actor text,
        role text, authentication text, address text, action text, target text, code text, reason text, trace_id text,
        before text, after text, count bigint, prev_hash text, hash text)
    ON CONFLICT (writer_id, seq, time) DO NOTHING;
END $$;
