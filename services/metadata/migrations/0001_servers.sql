-- The columns from id to updated_at are a public contract; the others are ours. IF NOT EXISTS lets a database that
-- already has the table of the contract be taken over with its rows.
-- Collation "C" (byte order) makes listings sort alike on every machine; indexes survive upgrades of the C library.
CREATE TABLE IF NOT EXISTS servers (
    id varchar(255) COLLATE "C" PRIMARY KEY,
    hostname varchar(255) NOT NULL,
    environment varchar(50),
    role varchar(50),
    location varchar(100),
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE servers ADD COLUMN IF NOT EXISTS deleted_at timestamptz;
ALTER TABLE servers ADD COLUMN IF NOT EXISTS report_interval_ms integer CHECK (report_interval_ms > 0);
