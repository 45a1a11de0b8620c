-- What detectors found, as they told it last.
CREATE TABLE anomalies (
    id varchar(32) PRIMARY KEY,
    server_id varchar(255) NOT NULL,
    detector varchar(63) NOT NULL,
    metric text NOT NULL,
    started_at timestamptz NOT NULL,
    ended_at timestamptz,
    peaked_at timestamptz NOT NULL,
    score float NOT NULL CHECK (score BETWEEN 0 AND 1),
    value float,
    expected_low float,
    expected_high float,
    contributions jsonb NOT NULL,
    revision integer NOT NULL,
    told_at timestamptz NOT NULL
);
-- Listings are newest first, of all or of one server; the id makes the order total.
CREATE INDEX anomalies_newest ON anomalies (started_at DESC, id DESC);
CREATE INDEX anomalies_server ON anomalies (server_id, started_at DESC, id DESC);
CREATE INDEX anomalies_open ON anomalies (started_at DESC, id DESC) WHERE ended_at IS NULL;
CREATE INDEX anomalies_told ON anomalies (told_at);
-- What people said of findings, append-only; without a verdict: that they take care of it. No foreign key: a finding that
-- PostgreSQL refused may be sent again after its remarks.
CREATE TABLE anomaly_remarks (
    id uuid PRIMARY KEY,
    anomaly_id varchar(32) NOT NULL,
    author varchar(512) NOT NULL,
    comment text NOT NULL,
    is_real boolean,
    said_at timestamptz NOT NULL
);
CREATE INDEX anomaly_remarks_latest ON anomaly_remarks (anomaly_id, said_at DESC) INCLUDE (is_real);
CREATE INDEX anomaly_remarks_said ON anomaly_remarks (said_at);
-- Findings with the latest remark of each kind.
CREATE VIEW anomalies_judged AS
    SELECT anomaly.*, acknowledged.author AS acknowledged_by, acknowledged.comment AS acknowledged_comment,
        acknowledged.said_at AS acknowledged_at, verdict.is_real, verdict.author AS verdict_by,
        verdict.comment AS verdict_comment, verdict.said_at AS verdict_at,
        greatest(anomaly.told_at, acknowledged.said_at, verdict.said_at) AS changed_at
    FROM anomalies AS anomaly
    LEFT JOIN LATERAL (SELECT * FROM anomaly_remarks AS said WHERE said.anomaly_id = anomaly.id AND said.is_real IS NULL
        ORDER BY said.said_at DESC LIMIT 1) AS acknowledged ON true
    LEFT JOIN LATERAL (SELECT * FROM anomaly_remarks AS said WHERE said.anomaly_id = anomaly.id
        AND said.is_real IS NOT NULL ORDER BY said.said_at DESC LIMIT 1) AS verdict ON true;
