-- Hand-over, mended and faster: what tests of faults and of speed taught about
-- the functions of migrations 4 and 5. Every one stands here whole.

ALTER TABLE lorayard.agents
  ADD COLUMN IF NOT EXISTS generation bigint NOT NULL DEFAULT 0;  -- counts the processes on the agent's data directory

-- A process registers as the one that runs an agent. What an earlier process of
-- this agent ran goes on when this one lists it with the right nonce
-- (p_adopt), and is lost otherwise. The answer lists what goes on.
--   LY001: a later process of the same data directory is there, this is a
--   registration that was long under way; LY002: the id is in use on another
--   host; LY003: a device is.
CREATE OR REPLACE FUNCTION lorayard.register_agent(p_agent text, p_boot uuid, p_info jsonb, p_ttl interval, p_adopt jsonb)
RETURNS jsonb LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
DECLARE
  r          record;
  v_now      timestamptz := pg_catalog.clock_timestamp();
  v_instance text := coalesce(p_info ->> 'instance', '');
  v_generation bigint := coalesce((p_info ->> 'generation')::bigint, 0);
  v_kept     jsonb := '[]';
BEGIN
  SELECT a.hostname, a.lease_until INTO r FROM lorayard.agents a
  WHERE a.id = p_agent AND a.boot <> p_boot AND a.instance <> v_instance AND a.lease_until > v_now FOR UPDATE;
  IF FOUND THEN
    RAISE EXCEPTION 'agent id % is in use on host %, which holds its lease', p_agent, r.hostname USING ERRCODE = 'LY002';
  END IF;
  PERFORM 1 FROM lorayard.agents a
  WHERE a.id = p_agent AND a.instance = v_instance AND a.generation > v_generation FOR UPDATE;
  IF FOUND THEN
    RAISE EXCEPTION 'agent % is run by a later process now', p_agent USING ERRCODE = 'LY001';
  END IF;
  SELECT d.uuid, a.id INTO r FROM lorayard.devices d JOIN lorayard.agents a ON a.id = d.agent_id
  WHERE a.id <> p_agent AND a.lease_until > v_now
    AND d.uuid IN (SELECT x ->> 'uuid' FROM pg_catalog.jsonb_array_elements(p_info -> 'devices') x) LIMIT 1;
  IF FOUND THEN
    RAISE EXCEPTION 'device % is run by agent %, which holds its lease', r.uuid, r.id USING ERRCODE = 'LY003';
  END IF;
  INSERT INTO lorayard.agents AS a (id, boot, instance, generation, hostname, version, base_models, labels, lease_until)
  VALUES (p_agent, p_boot, v_instance, v_generation, coalesce(p_info ->> 'hostname', ''), coalesce(p_info ->> 'version', ''),
    ARRAY(SELECT pg_catalog.jsonb_array_elements_text(p_info -> 'base_models')), coalesce(p_info -> 'labels', '{}'), v_now + p_ttl)
  ON CONFLICT (id) DO UPDATE SET boot = excluded.boot, instance = excluded.instance, generation = excluded.generation, hostname = excluded.hostname,
    version = excluded.version, base_models = excluded.base_models, labels = excluded.labels, draining = false, drain_by = NULL,
    lease_until = greatest(a.lease_until, excluded.lease_until), registered_at = v_now;
  DELETE FROM lorayard.devices d
  WHERE d.agent_id = p_agent OR d.uuid IN (SELECT x ->> 'uuid' FROM pg_catalog.jsonb_array_elements(p_info -> 'devices') x);
  INSERT INTO lorayard.devices AS d (uuid, agent_id, index, name, class, memory_bytes, pretend, fault)
  SELECT x.uuid, p_agent, x.index, x.name, x.class, x.memory_bytes, x.pretend, x.fault
  FROM pg_catalog.jsonb_to_recordset(p_info -> 'devices')
    AS x(uuid text, index integer, name text, class text, memory_bytes bigint, pretend boolean, fault text);
  FOR r IN SELECT j.job_id, j.attempt, j.nonce, adopt.job IS NOT NULL AS kept
           FROM lorayard.jobs j
           JOIN lorayard.attempts a ON a.job_id = j.job_id AND a.attempt = j.attempt
           LEFT JOIN pg_catalog.jsonb_to_recordset(p_adopt) AS adopt(job uuid, attempt integer, nonce uuid)
             ON adopt.job = j.job_id AND adopt.attempt = j.attempt AND adopt.nonce = j.nonce
           WHERE j.agent_id = p_agent AND j.state = 'accepted' AND a.boot IS DISTINCT FROM p_boot
           ORDER BY j.job_id LOOP
    IF r.kept THEN
      UPDATE lorayard.attempts a SET boot = p_boot WHERE a.job_id = r.job_id AND a.attempt = r.attempt;
    ELSE
      PERFORM lorayard.lose_attempt(r.job_id, r.attempt, 'agent ' || p_agent || ' was started anew');
    END IF;
  END LOOP;
  -- Asked again by the same process, the answer is the same.
  SELECT coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object('job', j.job_id, 'attempt', j.attempt, 'nonce', j.nonce)), '[]') INTO v_kept
  FROM lorayard.jobs j JOIN lorayard.attempts a ON a.job_id = j.job_id AND a.attempt = j.attempt
  WHERE j.agent_id = p_agent AND j.state = 'accepted' AND a.boot = p_boot;
  PERFORM pg_catalog.pg_notify('lorayard', 'agent:' || p_agent);
  RETURN v_kept;
END $$;

-- Appends samples and lines (each exactly once by attempt and seq) and the
-- newest progress. False: stale.
CREATE OR REPLACE FUNCTION lorayard.append(p_job uuid, p_attempt integer, p_nonce uuid, p_samples jsonb, p_lines jsonb, p_progress jsonb)
RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
DECLARE
  v_every integer;
  v_util  float8 := (p_progress ->> 'gpu_utilization')::float8;
BEGIN
  IF NOT lorayard.may_write(p_job, p_attempt, p_nonce) THEN
    RETURN false;
  END IF;
  -- The job page draws the first 100 rows: long jobs publish every n-th step.
  IF coalesce((p_progress ->> 'total_steps')::integer, 0) > 0 THEN
    v_every := greatest(1, pg_catalog.ceil((p_progress ->> 'total_steps')::numeric / 80)::integer);
    UPDATE lorayard.jobs j SET publish_every = v_every WHERE j.job_id = p_job AND j.publish_every <> v_every;
  END IF;
  SELECT j.publish_every INTO v_every FROM lorayard.jobs j WHERE j.job_id = p_job;

  WITH fresh AS (
    INSERT INTO lorayard.samples (job_id, attempt, seq, at, step, epoch, loss, validation_loss, learning_rate, grad_norm, tokens_per_second, skipped)
    SELECT p_job, p_attempt, s.seq, s.at, s.step, s.epoch::float8, s.loss::float8, s.validation_loss::float8, s.learning_rate::float8,
      s.grad_norm::float8, s.tokens_per_second::float8, s.skipped
    FROM pg_catalog.jsonb_to_recordset(p_samples) AS s(seq bigint, at timestamptz, step integer, epoch text, loss text,
      validation_loss text, learning_rate text, grad_norm text, tokens_per_second text, skipped boolean)
    ON CONFLICT DO NOTHING RETURNING *
  ), steps AS ( -- one row per step: an evaluation joins the sample of its step
    SELECT f.step, coalesce(max(f.seq) FILTER (WHERE f.validation_loss IS NULL), max(f.seq)) AS seq, max(f.at) AS at, max(f.epoch) AS epoch, max(f.validation_loss) AS validation_loss
    FROM fresh f WHERE NOT f.skipped AND f.loss NOT IN ('NaN'::float8, 'Infinity'::float8, '-Infinity'::float8) AND f.step >= 1
    GROUP BY f.step
  )
  INSERT INTO public.metrics_points AS m (id, job_id, timestamp, epoch, step, training_loss, validation_loss, learning_rate, gradient_norm, throughput, gpu_utilization)
  SELECT lorayard.id_of('metrics', p_job::text, s.step::text), p_job, s.at, greatest(1, pg_catalog.ceil(s.epoch)::integer), s.step,
    lorayard.fit(f.loss, 9999.999999, 6), lorayard.fit(s.validation_loss, 9999.999999, 6),
    coalesce(lorayard.fit(f.learning_rate, 99.9999999999, 10), 0), lorayard.fit(f.grad_norm, 9999.999999, 6),
    lorayard.fit(f.tokens_per_second, 99999999.99, 2), lorayard.fit(v_util, 100, 2)
  FROM steps s JOIN fresh f ON f.step = s.step AND f.seq = s.seq
  WHERE s.step = 1 OR s.step % v_every = 0 OR s.validation_loss IS NOT NULL
  -- A step that is done again keeps its time: the steps after it, which still
  -- stand from the attempt before, would be older than it.
  ON CONFLICT (id) DO UPDATE SET training_loss = excluded.training_loss,
    validation_loss = coalesce(excluded.validation_loss, m.validation_loss), learning_rate = excluded.learning_rate,
    gradient_norm = coalesce(excluded.gradient_norm, m.gradient_norm), throughput = coalesce(excluded.throughput, m.throughput),
    gpu_utilization = coalesce(excluded.gpu_utilization, m.gpu_utilization);

  INSERT INTO public.job_logs (id, user_id, job_id, attempt, seq, timestamp, level, message, metadata)
  SELECT lorayard.id_of('line', p_job::text, p_attempt::text, l.seq::text), j.user_id, p_job, p_attempt, l.seq, l.at, l.level, l.message,
    CASE WHEN l.code = '' THEN '{}'::jsonb ELSE pg_catalog.jsonb_build_object('code', l.code) END
  FROM pg_catalog.jsonb_to_recordset(p_lines) AS l(seq bigint, at timestamptz, level text, message text, code text), lorayard.jobs j
  WHERE j.job_id = p_job
  ON CONFLICT DO NOTHING;

  IF p_progress IS NOT NULL THEN
    UPDATE public.training_jobs t SET
      status = CASE WHEN t.status = 'initializing' AND p_progress ->> 'status' = 'running' THEN 'running' ELSE t.status END,
      current_stage = coalesce(p_progress ->> 'stage', t.current_stage),
      progress = least(greatest(coalesce((p_progress ->> 'percent')::numeric, t.progress), 0), 100),
      current_step = coalesce((p_progress ->> 'step')::integer, t.current_step),
      total_steps = coalesce((p_progress ->> 'total_steps')::integer, t.total_steps),
      current_epoch = coalesce((p_progress ->> 'epoch')::integer, t.current_epoch),
      total_epochs = coalesce((p_progress ->> 'total_epochs')::integer, t.total_epochs),
      current_metrics = t.current_metrics || coalesce(p_progress -> 'metrics', '{}'),
      estimated_completion_at = CASE WHEN p_progress ? 'remaining_seconds'
        THEN pg_catalog.clock_timestamp() + pg_catalog.make_interval(secs => (p_progress ->> 'remaining_seconds')::float8) ELSE t.estimated_completion_at END,
      current_cost = pg_catalog.round(lorayard.cost_of(p_job) / 1000000.0, 2)
    WHERE t.id = p_job AND t.status IN ('initializing', 'running');
  END IF;
  RETURN true;
END $$;

-- A function in SQL that is not inlined (one that writes, or that sets its
-- search_path) is planned anew at every call; one in PL/pgSQL keeps its plans
-- for the session. So these are, also those of migration 4; and a settlement
-- writes each of its rows once.
CREATE OR REPLACE FUNCTION lorayard.id_of(VARIADIC parts text[]) RETURNS uuid
LANGUAGE plpgsql IMMUTABLE SET search_path = '' AS $$
BEGIN
  RETURN pg_catalog.md5('lorayard:' || pg_catalog.array_to_string(parts, ':'))::uuid;
END $$;

CREATE OR REPLACE FUNCTION lorayard.fit(v float8, ceiling numeric, digits integer) RETURNS numeric
LANGUAGE plpgsql IMMUTABLE SET search_path = '' AS $$
BEGIN
  RETURN CASE
    WHEN v IS NULL OR v = 'NaN'::float8 THEN NULL
    WHEN v >= ceiling::float8 THEN ceiling
    WHEN v <= -ceiling::float8 THEN -ceiling
    ELSE pg_catalog.round(v::numeric, digits)
  END;
END $$;

CREATE OR REPLACE FUNCTION lorayard.cost_of(p_job uuid) RETURNS bigint
LANGUAGE plpgsql STABLE SET search_path = '' AS $$
BEGIN
  RETURN (SELECT coalesce(sum(pg_catalog.trunc(
      u.micro_usd_per_hour * extract(epoch FROM upper(u.during) - lower(u.during)) / 3600)), 0)::bigint
    FROM lorayard.usage_intervals u WHERE u.job_id = p_job AND u.billable);
END $$;

CREATE OR REPLACE FUNCTION lorayard.tell_user(p_user uuid, p_job uuid, p_type text, p_title text, p_message text, p_priority text, p_url text)
RETURNS void LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
  INSERT INTO public.notifications (id, user_id, type, title, message, priority, action_url, metadata)
  VALUES (lorayard.id_of('notification', p_type, p_job::text), p_user, p_type, p_title, p_message, p_priority, p_url,
          pg_catalog.jsonb_build_object('job_id', p_job))
  ON CONFLICT (id) DO NOTHING;
END $$;

CREATE OR REPLACE FUNCTION lorayard.notify_user(p_job uuid, p_type text, p_title text, p_message text, p_priority text, p_url text)
RETURNS void LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
  PERFORM lorayard.tell_user(t.user_id, p_job, p_type, p_title, p_message, p_priority, p_url)
  FROM public.training_jobs t WHERE t.id = p_job;
END $$;

-- Ends a job: artifact (NULL for none), final status, cost and notifications in
-- the caller's transaction. A cancel that came first wins. The caller has locked
-- the job's row t, and closed the attempt.
CREATE OR REPLACE FUNCTION lorayard.end_job(t public.training_jobs, p_status text, p_message text, p_detail text, p_artifact jsonb)
RETURNS text LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
  p_job    uuid := t.id;
  v_now    timestamptz := pg_catalog.clock_timestamp();
  v_micro  bigint;
  v_used   numeric;
  v_class  text;
  v_rate   bigint;
  v_amount numeric(10,2);
  v_art    uuid;
BEGIN
  IF t.status IN ('completed', 'failed', 'cancelled') THEN
    p_status := t.status;
  END IF;
  SELECT coalesce(sum(pg_catalog.trunc(u.micro_usd_per_hour * s.seconds / 3600)) FILTER (WHERE u.billable), 0)::bigint,
         sum(s.seconds) FILTER (WHERE u.billable), min(u.class), max(u.micro_usd_per_hour)
  INTO v_micro, v_used, v_class, v_rate
  FROM lorayard.usage_intervals u, LATERAL (SELECT extract(epoch FROM upper(u.during) - lower(u.during)) AS seconds) s
  WHERE u.job_id = p_job;
  v_amount := pg_catalog.round(v_micro / 1000000.0, 2);
  IF p_artifact IS NOT NULL THEN
    v_art := (p_artifact ->> 'id')::uuid;
    INSERT INTO public.model_artifacts (id, user_id, job_id, dataset_id, name, description, quality_metrics, training_summary, configuration, artifacts)
    SELECT v_art, t.user_id, t.id, t.dataset_id, left(d.name || ' (' || t.preset_id || ')', 200), p_artifact ->> 'description',
      p_artifact -> 'quality_metrics',
      (p_artifact -> 'training_summary') || pg_catalog.jsonb_build_object(
        'total_cost', v_amount,
        'training_duration_hours', pg_catalog.round((extract(epoch FROM v_now - t.started_at) / 3600)::numeric, 4)),
      pg_catalog.jsonb_build_object('preset_id', t.preset_id, 'hyperparameters', t.hyperparameters, 'gpu_config', t.gpu_config),
      p_artifact -> 'files'
    FROM public.datasets d WHERE d.id = t.dataset_id;
  END IF;
  UPDATE lorayard.jobs j SET state = 'settled', waiting = '' WHERE j.job_id = p_job;
  UPDATE public.training_jobs x SET
    status = p_status,
    current_stage = CASE WHEN p_status = 'completed' THEN 'completed' ELSE x.current_stage END,
    progress = CASE WHEN p_status = 'completed' THEN 100 ELSE x.progress END,
    completed_at = coalesce(x.completed_at, v_now),
    estimated_completion_at = NULL,
    current_cost = v_amount,
    final_cost = v_amount,
    error_message = CASE WHEN p_status = 'failed' THEN p_message ELSE x.error_message END,
    error_stack = CASE WHEN p_status = 'failed' THEN nullif(p_detail, '') ELSE x.error_stack END,
    artifact_id = coalesce(v_art, x.artifact_id),
    current_metrics = CASE WHEN v_art IS NULL THEN x.current_metrics ELSE x.current_metrics || coalesce(p_artifact -> 'metrics', '{}') END
  WHERE x.id = p_job;

  IF v_used > 0 THEN
    INSERT INTO public.cost_records (id, user_id, job_id, cost_type, amount, details, billing_period)
    VALUES (lorayard.id_of('cost', 'compute', p_job::text), t.user_id, p_job, 'compute', v_amount,
      pg_catalog.jsonb_build_object('micro_usd', v_micro, 'gpu_seconds', pg_catalog.round(v_used, 3),
        'gpu_class', v_class, 'micro_usd_per_gpu_hour', v_rate,
        'attempts', (SELECT count(*) FROM lorayard.attempts a WHERE a.job_id = p_job AND a.accepted_at IS NOT NULL)),
      pg_catalog.date_trunc('month', pg_catalog.now())::date)
    ON CONFLICT (id) DO NOTHING;
  END IF;

  IF p_status = 'failed' THEN
    PERFORM lorayard.tell_user(t.user_id, p_job, 'job_failed', 'Training failed', coalesce(p_message, 'The training failed.'), 'high', '/training/jobs/' || p_job);
  ELSIF p_status = 'completed' THEN
    PERFORM lorayard.tell_user(t.user_id, p_job, 'job_completed', 'Training completed', 'Your model has been trained. Cost: $' || v_amount || '.', 'medium', '/training/jobs/' || p_job);
    IF v_art IS NOT NULL THEN
      PERFORM lorayard.tell_user(t.user_id, p_job, 'artifact_ready', 'Model ready', 'Your trained adapter is ready to download.', 'medium', '/models/' || v_art);
    END IF;
  END IF;
  RETURN p_status;
END $$;

CREATE OR REPLACE FUNCTION lorayard.finish_job(p_job uuid, p_status text, p_message text, p_detail text)
RETURNS text LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
  t public.training_jobs;
BEGIN
  SELECT * INTO t FROM public.training_jobs x WHERE x.id = p_job FOR UPDATE;
  RETURN lorayard.end_job(t, p_status, p_message, p_detail, NULL);
END $$;

-- Closes an attempt and, where it is due, the job. The
-- answer is the job's status, or 'stale'. A lost acknowledgement may be asked
-- for again.
CREATE OR REPLACE FUNCTION lorayard.settle(p_job uuid, p_attempt integer, p_nonce uuid, p_end jsonb)
RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
DECLARE
  v_job     lorayard.jobs;
  v_row     public.training_jobs;
  v_outcome text := p_end ->> 'outcome';
  v_status  text;
  v_final   text;
  v_idle    interval := pg_catalog.make_interval(secs => coalesce((p_end ->> 'idle_seconds')::float8, 0));
BEGIN
  SELECT * INTO v_job FROM lorayard.jobs j WHERE j.job_id = p_job FOR UPDATE;
  IF NOT FOUND OR v_job.attempt <> p_attempt OR v_job.nonce IS DISTINCT FROM p_nonce OR v_job.state <> 'accepted' THEN
    SELECT t.status INTO v_status FROM lorayard.attempts a JOIN public.training_jobs t ON t.id = a.job_id
    WHERE a.job_id = p_job AND a.attempt = p_attempt AND a.nonce = p_nonce AND a.outcome = v_outcome;
    RETURN coalesce(v_status, 'stale');
  END IF;
  SELECT * INTO v_row FROM public.training_jobs t WHERE t.id = p_job FOR UPDATE;
  IF v_row.status = 'cancelled' THEN
    v_outcome := 'cancelled';
  END IF;
  PERFORM lorayard.close_attempt(p_job, p_attempt, v_outcome, coalesce(p_end ->> 'kind', ''), coalesce(p_end ->> 'message', ''),
    v_outcome = 'cancelled' OR coalesce((p_end ->> 'billable')::boolean, false), true);
  IF v_idle > interval '1 second' THEN
    -- Its devices have been free for so long: it waited for us.
    UPDATE lorayard.usage_intervals u
    SET during = pg_catalog.tstzrange(lower(u.during), greatest(lower(u.during) + interval '1 microsecond', least(upper(u.during), pg_catalog.clock_timestamp() - v_idle)))
    WHERE u.job_id = p_job AND u.attempt = p_attempt;
    UPDATE lorayard.attempts a SET ended_at = greatest(a.accepted_at, least(a.ended_at, pg_catalog.clock_timestamp() - v_idle))
    WHERE a.job_id = p_job AND a.attempt = p_attempt;
  END IF;
  IF v_outcome = 'completed' THEN
    v_final := lorayard.end_job(v_row, 'completed', '', '', p_end -> 'artifact');
  ELSIF v_outcome = 'cancelled' THEN
    v_final := lorayard.end_job(v_row, 'cancelled', '', '', NULL);
  ELSIF v_outcome = 'handed_back' OR (p_end ->> 'retryable')::boolean THEN
    v_final := lorayard.requeue_job(p_job, coalesce((p_end ->> 'counted')::boolean, false), v_outcome = 'failed' AND NOT coalesce((p_end ->> 'counted')::boolean, false),
      pg_catalog.make_interval(secs => coalesce((p_end ->> 'delay_seconds')::float8, 0)), p_end ->> 'kind', p_end ->> 'message', p_end ->> 'detail');
  ELSE
    v_final := lorayard.end_job(v_row, 'failed', p_end ->> 'message', p_end ->> 'detail', NULL);
  END IF;
  PERFORM pg_catalog.pg_notify('lorayard', 'settled:' || p_job);
  RETURN v_final;
END $$;

-- Takes an assigned attempt. NULL: stale. The answer of a lost acknowledgement
-- can be asked for again with the same nonce.
-- A row is found by its key alone and judged after: asked with its status as
-- well, a plan from when few rows had that status walked all of those that have
-- it now, two milliseconds an accept with thousands queued.
CREATE OR REPLACE FUNCTION lorayard.accept(p_agent text, p_boot uuid, p_job uuid, p_attempt integer, p_nonce uuid)
RETURNS jsonb LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
DECLARE
  v_job    lorayard.jobs;
  v_now    timestamptz;
  v_doc    jsonb;
BEGIN
  -- Held until the commit: a new process of this agent registers before, and
  -- this one is refused, or after, and finds what was accepted.
  PERFORM 1 FROM lorayard.agents a WHERE a.id = p_agent AND a.boot = p_boot FOR SHARE;
  IF NOT FOUND THEN
    RETURN NULL;
  END IF;
  SELECT * INTO v_job FROM lorayard.jobs j WHERE j.job_id = p_job FOR UPDATE;
  IF NOT FOUND OR v_job.attempt <> p_attempt OR v_job.agent_id IS DISTINCT FROM p_agent THEN
    RETURN NULL;
  END IF;
  IF v_job.state = 'assigned' THEN
    PERFORM 1 FROM lorayard.jobs o
    WHERE o.agent_id = p_agent AND o.state = 'accepted' AND o.job_id <> p_job AND o.devices && v_job.devices;
    IF FOUND THEN
      RETURN NULL; -- a device has an owner
    END IF;
    v_now := pg_catalog.clock_timestamp();
    -- Nothing is written before this. The empty string keeps the planner from
    -- the index by status.
    UPDATE public.training_jobs t SET status = 'initializing', current_stage = 'initializing',
      started_at = coalesce(t.started_at, v_now), error_message = NULL, retry_count = p_attempt - 1
    WHERE t.id = p_job AND t.status || '' = 'queued';
    IF NOT FOUND THEN
      RETURN NULL; -- cancelled meanwhile
    END IF;
    UPDATE lorayard.jobs j SET state = 'accepted', nonce = p_nonce, waiting = '', start_earliest = NULL, start_latest = NULL WHERE j.job_id = p_job;
    UPDATE lorayard.attempts a SET nonce = p_nonce, boot = p_boot, accepted_at = v_now, renewed_at = v_now
    WHERE a.job_id = p_job AND a.attempt = p_attempt;
    INSERT INTO lorayard.usage_intervals (job_id, attempt, device, user_id, class, micro_usd_per_hour, during)
    SELECT p_job, p_attempt, d.uuid, v_job.user_id, d.class,
      coalesce((SELECT r.micro_usd_per_hour FROM lorayard.rates r
                WHERE r.class = d.class AND r.effective_from <= v_now ORDER BY r.effective_from DESC LIMIT 1), 0),
      pg_catalog.tstzrange(v_now, v_now + interval '1 microsecond')
    FROM lorayard.devices d WHERE d.uuid = ANY (v_job.devices);
    PERFORM lorayard.tell_user(v_job.user_id, p_job, 'job_started', 'Training started', 'Your training job has started.', 'low', '/training/jobs/' || p_job);
  ELSIF v_job.state <> 'accepted' OR v_job.nonce IS DISTINCT FROM p_nonce THEN
    RETURN NULL;
  END IF;
  SELECT pg_catalog.jsonb_build_object(
    'user', v_job.user_id, 'devices', v_job.devices, 'spec', v_job.spec,
    'dataset', pg_catalog.jsonb_build_object('id', d.id, 'name', d.name, 'bucket', d.storage_bucket, 'path', d.storage_path, 'bytes', d.file_size),
    'checkpoints', coalesce((
      SELECT pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object('step', c.step, 'epoch', c.epoch, 'bucket', c.bucket, 'path', c.path,
               'manifest_sha256', c.manifest_sha256, 'files', c.files) ORDER BY c.step DESC, c.attempt DESC)
      FROM (SELECT * FROM public.checkpoints c WHERE c.job_id = p_job ORDER BY c.step DESC, c.attempt DESC LIMIT 4) c), '[]'))
  INTO v_doc
  FROM public.training_jobs t JOIN public.datasets d ON d.id = t.dataset_id WHERE t.id = p_job;
  RETURN v_doc;
END $$;

CREATE OR REPLACE FUNCTION lorayard.may_write(p_job uuid, p_attempt integer, p_nonce uuid) RETURNS boolean
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
  v_job lorayard.jobs;
BEGIN
  SELECT * INTO v_job FROM lorayard.jobs j WHERE j.job_id = p_job FOR SHARE;
  RETURN FOUND AND v_job.attempt = p_attempt AND v_job.nonce IS NOT DISTINCT FROM p_nonce AND v_job.state = 'accepted';
END $$;

-- One renewal of an agent: its lease, the usage of its attempts, and what is
-- wanted of it and of each of them. An attempt that does not come back is not
-- the agent's, and one that the agent does not list is lost. p_state:
-- {draining}. The answer: {cordoned, drain_in (seconds), dispatchers
-- [address], attempts [{job, attempt, nonce, desired}]}.
-- A plan that was made while the tables were small reads all of them, as long
-- as the connection lives; this one never does.
CREATE OR REPLACE FUNCTION lorayard.renew(p_agent text, p_boot uuid, p_ttl interval, p_state jsonb, p_refs jsonb)
RETURNS jsonb LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' SET enable_seqscan = off AS $$
DECLARE
  v_now      timestamptz := pg_catalog.clock_timestamp();
  v_agent    lorayard.agents;
  v_was      boolean;
  v_attempts jsonb := '[]';
  r          record;
BEGIN
  -- A lease that a crash of the database forgets is waited out by the reaper:
  -- no need for every agent to wait for the disk once a second.
  PERFORM pg_catalog.set_config('synchronous_commit', 'off', true);
  SELECT a.draining INTO v_was FROM lorayard.agents a WHERE a.id = p_agent AND a.boot = p_boot FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'agent % is run by another process now', p_agent USING ERRCODE = 'LY001';
  END IF;
  -- The lock may have been waited for: the lease counts from now.
  v_now := pg_catalog.clock_timestamp();
  UPDATE lorayard.agents a SET lease_until = greatest(a.lease_until, v_now + p_ttl), draining = coalesce((p_state ->> 'draining')::boolean, false)
  WHERE a.id = p_agent RETURNING * INTO v_agent;
  IF v_was <> v_agent.draining THEN
    PERFORM pg_catalog.pg_notify('lorayard', 'agent:' || p_agent);
  END IF;
  IF pg_catalog.jsonb_array_length(p_refs) > 0 THEN
    -- Jobs first, in order: a settlement under way is waited for before any of
    -- its rows is touched. Without it, the two locked usage and attempts in
    -- turns and deadlocked.
    PERFORM 1 FROM lorayard.jobs j
    WHERE j.job_id = ANY (ARRAY(SELECT l.job FROM pg_catalog.jsonb_to_recordset(p_refs) AS l(job uuid)))
    ORDER BY j.job_id FOR KEY SHARE;
    WITH mine AS (
      SELECT j.job_id, j.attempt, j.nonce,
        CASE WHEN t.status = 'cancelled' THEN 'cancel' ELSE j.desired END AS desired
      FROM pg_catalog.jsonb_to_recordset(p_refs) AS l(job uuid, attempt integer, nonce uuid)
      JOIN lorayard.jobs j ON j.job_id = l.job AND j.attempt = l.attempt AND j.nonce = l.nonce AND j.state = 'accepted' AND j.agent_id = p_agent
      JOIN public.training_jobs t ON t.id = j.job_id
    ), used AS (
      UPDATE lorayard.usage_intervals u
      SET during = pg_catalog.tstzrange(lower(u.during), greatest(upper(u.during), v_now))
      FROM mine WHERE u.job_id = mine.job_id AND u.attempt = mine.attempt AND NOT u.closed
    ), alive AS (
      UPDATE lorayard.attempts a SET renewed_at = v_now
      FROM mine WHERE a.job_id = mine.job_id AND a.attempt = mine.attempt
    )
    SELECT coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_object('job', m.job_id, 'attempt', m.attempt, 'nonce', m.nonce, 'desired', m.desired)), '[]')
    INTO v_attempts FROM mine m;
  END IF;
  -- What this agent accepted and does not list, it does not run: both answers
  -- of its accept were lost, or its end could not be written. An accept under
  -- way is younger than the grace, which ends with the time that the list was
  -- made at: this transaction may have waited for locks since.
  FOR r IN SELECT j.job_id, j.attempt FROM lorayard.jobs j
           JOIN lorayard.attempts t ON t.job_id = j.job_id AND t.attempt = j.attempt
           WHERE j.agent_id = p_agent AND j.state = 'accepted' AND t.accepted_at < pg_catalog.now() - interval '10 seconds'
             AND NOT EXISTS (SELECT 1 FROM pg_catalog.jsonb_to_recordset(p_refs) AS l(job uuid, attempt integer, nonce uuid)
                             WHERE l.job = j.job_id AND l.attempt = j.attempt AND l.nonce = j.nonce)
           ORDER BY j.job_id LOOP
    PERFORM lorayard.lose_attempt(r.job_id, r.attempt, 'agent ' || p_agent || ' does not run it');
  END LOOP;
  RETURN pg_catalog.jsonb_build_object(
    'cordoned', v_agent.cordoned,
    'drain_in', extract(epoch FROM v_agent.drain_by - v_now),
    'dispatchers', coalesce((SELECT pg_catalog.jsonb_agg(d.address ORDER BY d.address) FROM lorayard.dispatchers d
                             WHERE d.address <> '' AND d.lease_until > v_now), '[]'),
    'attempts', v_attempts);
END $$;

-- The shim of an attempt outlived its agent, ended the trainer and says so. The
-- agent's lease ends now: what was assigned to it and not accepted goes back as
-- well. Only the dispatcher calls this, for whoever knows the nonce. The answer
-- is the job's status, or 'stale'.
-- The leader looks at its hosts again, before it gives the job to the dead one.
CREATE OR REPLACE FUNCTION lorayard.report_death(p_agent text, p_boot uuid, p_job uuid, p_attempt integer, p_nonce uuid, p_message text)
RETURNS text LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
  PERFORM 1 FROM lorayard.agents a WHERE a.id = p_agent FOR UPDATE;
  PERFORM 1 FROM lorayard.jobs j
  WHERE j.job_id = p_job AND j.attempt = p_attempt AND j.nonce = p_nonce AND j.agent_id = p_agent AND j.state = 'accepted' FOR UPDATE;
  IF NOT FOUND THEN
    RETURN 'stale';
  END IF;
  UPDATE lorayard.agents a SET lease_until = least(a.lease_until, pg_catalog.clock_timestamp()) WHERE a.id = p_agent AND a.boot = p_boot;
  PERFORM pg_catalog.pg_notify('lorayard', 'agent:' || p_agent);
  RETURN lorayard.lose_attempt(p_job, p_attempt, p_message);
END $$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA lorayard FROM PUBLIC;
