-- How many batches of facts each service's journal has given this database: a copy from before the last of them has
-- fewer than the journal knows of.
CREATE TABLE fact_marks (journal uuid PRIMARY KEY, mark bigint NOT NULL);
