-- A record may be moved on by more than one revision: where an older copy of the database, or one that a fail-over left
-- behind, would give numbers again that stood for something else.
CREATE OR REPLACE FUNCTION servers_next_revision() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.revision := greatest(NEW.revision, OLD.revision + 1);
    RETURN NEW;
END
$$;
