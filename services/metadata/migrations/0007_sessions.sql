-- People who log in: a session is a token of theirs that only a cookie may carry.
ALTER TABLE access_tokens ADD COLUMN is_session boolean NOT NULL DEFAULT false;
CREATE INDEX access_sessions ON access_tokens (user_id, created_at) WHERE is_session;
-- Whom an OpenID provider knows by these is this user, whatever he is called there later.
ALTER TABLE access_users ADD COLUMN issuer text;
ALTER TABLE access_users ADD COLUMN subject text;
ALTER TABLE access_users ADD CONSTRAINT access_users_identity CHECK ((issuer IS NULL) = (subject IS NULL));
CREATE UNIQUE INDEX access_users_identity_once ON access_users (issuer, subject);
