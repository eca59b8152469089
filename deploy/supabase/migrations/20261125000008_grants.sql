-- What an agent may touch in Storage. Agents hold no key: an attempt asks here
-- for single objects of its own, a dispatcher that holds the key signs a URL or
-- an upload token for each, and the attempt reads it. Dispatchers
-- sweep the rows of attempts that are over; a token opens one object and lives
-- for hours at most.

CREATE TABLE IF NOT EXISTS lorayard.grants (
  id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  job_id   uuid NOT NULL REFERENCES lorayard.jobs (job_id) ON DELETE CASCADE,
  attempt  integer NOT NULL,
  verb     text NOT NULL CHECK (verb IN ('read', 'write')),  -- read: what is known of it and a URL; write: an upload token
  bucket   text NOT NULL,
  key      text NOT NULL,
  asked_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  taken_at timestamptz,                -- a dispatcher is at it
  serial   integer NOT NULL DEFAULT 0, -- answers so far
  answer   jsonb,                      -- NULL: not yet
  UNIQUE (job_id, attempt, verb, bucket, key)
);
CREATE INDEX IF NOT EXISTS grants_asked_idx ON lorayard.grants (asked_at) WHERE answer IS NULL;

-- The id of the artifact that an attempt may publish. The agent draws the same:
-- internal/attempt, artifactID.
CREATE OR REPLACE FUNCTION lorayard.artifact_of(p_job uuid, p_attempt integer, p_nonce uuid) RETURNS uuid
LANGUAGE plpgsql IMMUTABLE SET search_path = '' AS $$
DECLARE
  b bytea := substring(pg_catalog.sha256(pg_catalog.convert_to('lorayard:artifact:' || p_job || ':' || p_attempt || ':' || p_nonce, 'UTF8')) FROM 1 FOR 16);
BEGIN
  b := pg_catalog.set_byte(b, 6, (pg_catalog.get_byte(b, 6) & 15) | 128);
  b := pg_catalog.set_byte(b, 8, (pg_catalog.get_byte(b, 8) & 63) | 128);
  RETURN pg_catalog.encode(b, 'hex')::uuid;
END $$;

-- What was granted of p_wanted, [{verb, bucket, key, after}], in its order:
-- {serial, answer}, or null for what is not answered yet. Asking again changes
-- nothing, and is how an agent waits; `after` is the serial of an answer that
-- does not work any more. NULL: the attempt is stale. What the attempt may not
-- touch (lorayard.may_touch, migration 11) is answered with {"refused": words}.
CREATE OR REPLACE FUNCTION lorayard.grants(p_job uuid, p_attempt integer, p_nonce uuid, p_wanted jsonb)
RETURNS jsonb LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
DECLARE
  v_asked   bigint;
  v_answers jsonb;
BEGIN
  IF NOT lorayard.may_write(p_job, p_attempt, p_nonce) THEN
    RETURN NULL;
  END IF;
  WITH wanted AS (
    SELECT * FROM pg_catalog.jsonb_to_recordset(p_wanted) AS w(verb text, bucket text, key text, after integer)
  ), asked AS (
    INSERT INTO lorayard.grants AS g (job_id, attempt, verb, bucket, key)
    SELECT DISTINCT p_job, p_attempt, w.verb, w.bucket, w.key FROM wanted w
    WHERE lorayard.may_touch(w.verb, p_job, p_attempt, p_nonce, w.bucket, w.key)
      AND NOT EXISTS (SELECT 1 FROM lorayard.grants o
                      WHERE o.job_id = p_job AND o.attempt = p_attempt AND o.verb = w.verb AND o.bucket = w.bucket AND o.key = w.key
                        AND (o.answer IS NULL OR o.serial > coalesce(w.after, 0)))
    ON CONFLICT (job_id, attempt, verb, bucket, key) DO UPDATE SET answer = NULL, taken_at = NULL, asked_at = pg_catalog.clock_timestamp()
    RETURNING 1
  )
  SELECT count(*) INTO v_asked FROM asked;
  IF v_asked > 0 THEN
    PERFORM pg_catalog.pg_notify('lorayard', 'grants:' || p_job);
  END IF;
  SELECT pg_catalog.jsonb_agg(CASE
      WHEN NOT lorayard.may_touch(w.verb, p_job, p_attempt, p_nonce, w.bucket, w.key)
        THEN pg_catalog.jsonb_build_object('serial', 0, 'answer', pg_catalog.jsonb_build_object('refused', 'it is not this attempt''s to ' || w.verb))
      WHEN g.answer IS NOT NULL THEN pg_catalog.jsonb_build_object('serial', g.serial, 'answer', g.answer)
    END ORDER BY w.n)
  INTO v_answers
  FROM ROWS FROM (pg_catalog.jsonb_to_recordset(p_wanted) AS (verb text, bucket text, key text, after integer)) WITH ORDINALITY AS w(verb, bucket, key, after, n)
  LEFT JOIN lorayard.grants g ON g.job_id = p_job AND g.attempt = p_attempt AND g.verb = w.verb AND g.bucket = w.bucket AND g.key = w.key;
  RETURN coalesce(v_answers, '[]');
END $$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA lorayard FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA lorayard FROM PUBLIC;
GRANT EXECUTE ON FUNCTION lorayard.grants(uuid, integer, uuid, jsonb) TO lorayard_agent;
