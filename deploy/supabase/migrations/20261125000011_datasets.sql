-- Data sets are validated by the dispatchers. A row that is `validating` is due
-- until somebody has a verdict: the notification (migration 3) only makes it
-- quick. Each try has a number, the fence: what comes from an older one changes
-- nothing, and a try whose lease runs out is given to somebody else.

CREATE TABLE IF NOT EXISTS lorayard.validations (
  dataset_id  uuid PRIMARY KEY REFERENCES public.datasets (id) ON DELETE CASCADE,
  run         bigint NOT NULL DEFAULT 0,      -- tries so far
  send        integer NOT NULL DEFAULT 0,     -- tasks sent for the next one
  sent_at     timestamptz,
  lease_until timestamptz,                    -- NULL: nobody is at it
  not_before  timestamptz,                    -- of the next try
  failures    integer NOT NULL DEFAULT 0,     -- in a row, of tries without a verdict
  trouble     text NOT NULL DEFAULT '',       -- of the last of them, for operators
  verdict     text CHECK (verdict IN ('ready', 'error')),
  finished_at timestamptz,
  report      jsonb,                          -- all of it; what the app shows is in public.datasets
  source      text,                           -- bucket and path of what was judged
  bucket      text,                           -- the normalised file, which is what the trainer gets
  path        text,
  bytes       bigint,
  sha256      text
);
CREATE INDEX IF NOT EXISTS lorayard_datasets_validating_idx ON public.datasets (updated_at) WHERE status = 'validating';

-- Data sets that wait for a try and for which no task was sent lately. They are
-- marked as sent: several dispatchers may ask.
CREATE OR REPLACE FUNCTION lorayard.due_datasets(p_n integer, p_again interval) RETURNS TABLE (dataset_id uuid, run bigint, send integer)
LANGUAGE sql SECURITY DEFINER SET search_path = '' AS $$
  INSERT INTO lorayard.validations AS v (dataset_id, send, sent_at)
  SELECT d.id, 1, pg_catalog.clock_timestamp()
  FROM public.datasets d LEFT JOIN lorayard.validations o ON o.dataset_id = d.id
  WHERE d.status = 'validating' AND d.deleted_at IS NULL
    AND coalesce(o.lease_until < pg_catalog.clock_timestamp(), true)
    AND coalesce(o.not_before <= pg_catalog.clock_timestamp(), true)
    AND coalesce(o.sent_at < pg_catalog.clock_timestamp() - p_again, true)
  ORDER BY d.updated_at LIMIT p_n
  ON CONFLICT (dataset_id) DO UPDATE SET send = v.send + 1, sent_at = pg_catalog.clock_timestamp()
    WHERE coalesce(v.sent_at < pg_catalog.clock_timestamp() - p_again, true)
  RETURNING v.dataset_id, v.run, v.send
$$;

-- Begins a try and says what is to be judged; NULL: there is nothing to do, or
-- somebody is at it.
CREATE OR REPLACE FUNCTION lorayard.begin_validation(p_dataset uuid, p_lease interval) RETURNS jsonb
LANGUAGE sql SECURITY DEFINER SET search_path = '' AS $$
  UPDATE lorayard.validations v
  SET run = v.run + 1, send = 0, lease_until = pg_catalog.clock_timestamp() + p_lease
  FROM public.datasets d
  WHERE v.dataset_id = p_dataset AND d.id = p_dataset AND d.status = 'validating' AND d.deleted_at IS NULL
    AND coalesce(v.lease_until < pg_catalog.clock_timestamp(), true) AND coalesce(v.not_before <= pg_catalog.clock_timestamp(), true)
  RETURNING pg_catalog.jsonb_build_object('dataset', d.id, 'run', v.run, 'user', d.user_id, 'name', d.name,
    'bucket', d.storage_bucket, 'path', d.storage_path, 'failures', v.failures)
$$;

-- Keeps a try; false: it is not wanted any more.
CREATE OR REPLACE FUNCTION lorayard.renew_validation(p_dataset uuid, p_run bigint, p_lease interval) RETURNS boolean
LANGUAGE sql SECURITY DEFINER SET search_path = '' AS $$
  WITH kept AS (
    UPDATE lorayard.validations v SET lease_until = pg_catalog.clock_timestamp() + p_lease
    FROM public.datasets d
    WHERE v.dataset_id = p_dataset AND v.run = p_run AND v.lease_until IS NOT NULL
      AND d.id = p_dataset AND d.status = 'validating' AND d.deleted_at IS NULL
    RETURNING 1
  ) SELECT EXISTS (SELECT 1 FROM kept)
$$;

-- Ends a try without a verdict. The next one comes after p_delay. An empty
-- p_trouble is no failure: the dispatcher stopped.
CREATE OR REPLACE FUNCTION lorayard.postpone_validation(p_dataset uuid, p_run bigint, p_delay interval, p_trouble text) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = '' AS $$
  UPDATE lorayard.validations v
  SET lease_until = NULL, sent_at = NULL, not_before = pg_catalog.clock_timestamp() + p_delay,
      failures = v.failures + (p_trouble <> '')::integer, trouble = p_trouble
  WHERE v.dataset_id = p_dataset AND v.run = p_run AND v.lease_until IS NOT NULL
$$;

-- The verdict of a try, with everything that follows from it, once: false when
-- the try is not the last one, was ended, or nobody waits for it.
CREATE OR REPLACE FUNCTION lorayard.finish_validation(p_dataset uuid, p_run bigint, p_verdict jsonb) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
DECLARE
  v_ready boolean := (p_verdict ->> 'ready')::boolean;
  v_type  text := CASE WHEN v_ready THEN 'dataset_ready' ELSE 'dataset_error' END;
  v_set   public.datasets;
BEGIN
  UPDATE lorayard.validations v
  SET lease_until = NULL, sent_at = NULL, not_before = NULL, failures = 0, trouble = '', finished_at = pg_catalog.clock_timestamp(),
      verdict = CASE WHEN v_ready THEN 'ready' ELSE 'error' END, report = p_verdict -> 'report', source = p_verdict ->> 'source',
      bucket = p_verdict -> 'file' ->> 'bucket', path = p_verdict -> 'file' ->> 'path',
      bytes = (p_verdict -> 'file' ->> 'bytes')::bigint, sha256 = p_verdict -> 'file' ->> 'sha256'
  WHERE v.dataset_id = p_dataset AND v.run = p_run AND v.lease_until IS NOT NULL;
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  UPDATE public.datasets d SET
    status = CASE WHEN v_ready THEN 'ready' ELSE 'error' END,
    training_ready = v_ready,
    validated_at = pg_catalog.clock_timestamp(),
    updated_at = pg_catalog.clock_timestamp(),
    error_message = p_verdict ->> 'message',
    validation_errors = nullif(p_verdict -> 'errors', 'null'),
    sample_data = nullif(p_verdict -> 'samples', 'null'),
    total_training_pairs = (p_verdict ->> 'training_pairs')::integer,
    total_validation_pairs = (p_verdict ->> 'validation_pairs')::integer,
    total_tokens = (p_verdict ->> 'tokens')::bigint,
    avg_turns_per_conversation = least((p_verdict ->> 'turns_per_conversation')::numeric, 99999999),
    avg_tokens_per_turn = least((p_verdict ->> 'tokens_per_turn')::numeric, 99999999)
  WHERE d.id = p_dataset AND d.status = 'validating' AND d.deleted_at IS NULL
  RETURNING * INTO v_set;
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  INSERT INTO public.notifications (id, user_id, type, title, message, priority, action_url, metadata)
  VALUES (lorayard.id_of('notification', v_type, p_dataset::text, p_run::text), v_set.user_id, v_type,
    CASE WHEN v_ready THEN 'Dataset ready' ELSE 'Dataset has errors' END, p_verdict ->> 'notice',
    CASE WHEN v_ready THEN 'medium' ELSE 'high' END, '/datasets/' || p_dataset, pg_catalog.jsonb_build_object('dataset_id', p_dataset))
  ON CONFLICT (id) DO NOTHING;
  PERFORM pg_catalog.pg_notify('lorayard', 'validated:' || p_dataset);
  RETURN true;
END $$;

-- The file that an attempt trains on: what the validation wrote of it, or the
-- user's own when nobody validated what lies there. NULL: the attempt is stale.
CREATE OR REPLACE FUNCTION lorayard.data_file(p_job uuid, p_attempt integer, p_nonce uuid) RETURNS jsonb
LANGUAGE sql SECURITY DEFINER SET search_path = '' AS $$
  SELECT CASE WHEN v.path IS NULL
    THEN pg_catalog.jsonb_build_object('bucket', d.storage_bucket, 'path', d.storage_path, 'bytes', d.file_size, 'sha256', '')
    ELSE pg_catalog.jsonb_build_object('bucket', v.bucket, 'path', v.path, 'bytes', v.bytes, 'sha256', v.sha256) END
  FROM public.training_jobs t JOIN public.datasets d ON d.id = t.dataset_id
  LEFT JOIN lorayard.validations v ON v.dataset_id = d.id AND v.verdict = 'ready' AND v.source = d.storage_bucket || '/' || d.storage_path
  WHERE t.id = p_job AND lorayard.may_write(p_job, p_attempt, p_nonce)
$$;

-- Whether an attempt may write an object: under its own two folders alone.
-- Whether it may read one: its data set and what the validation wrote of it, its
-- job's checkpoints, and what it wrote itself.
CREATE OR REPLACE FUNCTION lorayard.may_touch(p_verb text, p_job uuid, p_attempt integer, p_nonce uuid, p_bucket text, p_key text) RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = '' AS $$
DECLARE
  v_user uuid;
BEGIN
  IF p_key ~ '(^|/)\.{0,2}(/|$)' THEN
    RETURN false;
  END IF;
  SELECT j.user_id INTO v_user FROM lorayard.jobs j WHERE j.job_id = p_job;
  IF p_bucket = 'lora-models' AND (
    pg_catalog.starts_with(p_key, v_user || '/' || p_job || '/a' || p_attempt || '-' || p_nonce || '/')
    OR pg_catalog.starts_with(p_key, v_user || '/' || lorayard.artifact_of(p_job, p_attempt, p_nonce) || '/')) THEN
    RETURN true;
  END IF;
  RETURN p_verb = 'read' AND (
    EXISTS (SELECT 1 FROM public.training_jobs t JOIN public.datasets d ON d.id = t.dataset_id
            WHERE t.id = p_job AND d.storage_bucket = p_bucket AND d.storage_path = p_key)
    OR EXISTS (SELECT 1 FROM public.training_jobs t JOIN lorayard.validations v ON v.dataset_id = t.dataset_id
               WHERE t.id = p_job AND v.bucket = p_bucket AND v.path = p_key)
    OR EXISTS (SELECT 1 FROM public.checkpoints c
               WHERE c.job_id = p_job AND c.bucket = p_bucket AND pg_catalog.starts_with(p_key, c.path || '/')));
END $$;

REVOKE ALL ON lorayard.validations FROM PUBLIC;
REVOKE ALL ON FUNCTION
  lorayard.due_datasets(integer, interval),
  lorayard.begin_validation(uuid, interval),
  lorayard.renew_validation(uuid, bigint, interval),
  lorayard.postpone_validation(uuid, bigint, interval, text),
  lorayard.finish_validation(uuid, bigint, jsonb),
  lorayard.data_file(uuid, integer, uuid),
  lorayard.may_touch(text, uuid, integer, uuid, text, text)
FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
  lorayard.due_datasets(integer, interval),
  lorayard.begin_validation(uuid, interval),
  lorayard.renew_validation(uuid, bigint, interval),
  lorayard.postpone_validation(uuid, bigint, interval, text),
  lorayard.finish_validation(uuid, bigint, jsonb)
TO lorayard_dispatcher;
GRANT EXECUTE ON FUNCTION lorayard.data_file(uuid, integer, uuid) TO lorayard_agent;
