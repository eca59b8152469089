-- What an agent may do, all of it: these functions. An agent's role touches no
-- table. Every write carries (job, attempt, nonce) and changes nothing when it
-- is stale; leases and money use this database's clock.
--
-- Lock order everywhere: lorayard.jobs, then public.training_jobs.

DO $$
BEGIN
  CREATE ROLE lorayard_agent NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
END $$;

-- Ids of rows that must exist exactly once follow from what they are about.
CREATE OR REPLACE FUNCTION lorayard.id_of(VARIADIC parts text[]) RETURNS uuid
LANGUAGE sql IMMUTABLE SET search_path = '' AS $$
  SELECT pg_catalog.md5('lorayard:' || pg_catalog.array_to_string(parts, ':'))::uuid
$$;

-- A measured value in a numeric column: NULL for NaN, the column's limit for
-- what does not fit. One bad value must not lose the batch around it.
CREATE OR REPLACE FUNCTION lorayard.fit(v float8, ceiling numeric, digits integer) RETURNS numeric
LANGUAGE sql IMMUTABLE SET search_path = '' AS $$
  SELECT CASE
    WHEN v IS NULL OR v = 'NaN'::float8 THEN NULL
    WHEN v >= ceiling::float8 THEN ceiling
    WHEN v <= -ceiling::float8 THEN -ceiling
    ELSE pg_catalog.round(v::numeric, digits)
  END
$$;

-- Micro-dollars of a job's billable GPU time so far: each interval is rounded
-- down to a whole micro-dollar.
CREATE OR REPLACE FUNCTION lorayard.cost_of(p_job uuid) RETURNS bigint
LANGUAGE sql STABLE SET search_path = '' AS $$
  SELECT coalesce(sum(pg_catalog.trunc(
    u.micro_usd_per_hour * extract(epoch FROM upper(u.during) - lower(u.during)) / 3600)), 0)::bigint
  FROM lorayard.usage_intervals u WHERE u.job_id = p_job AND u.billable
$$;

CREATE OR REPLACE FUNCTION lorayard.notify_user(p_job uuid, p_type text, p_title text, p_message text, p_priority text, p_url text)
RETURNS void LANGUAGE sql SET search_path = '' AS $$
  INSERT INTO public.notifications (id, user_id, type, title, message, priority, action_url, metadata)
  SELECT lorayard.id_of('notification', p_type, p_job::text), t.user_id, p_type, p_title, p_message, p_priority, p_url,
         pg_catalog.jsonb_build_object('job_id', p_job)
  FROM public.training_jobs t WHERE t.id = p_job
  ON CONFLICT (id) DO NOTHING
$$;

-- Ends an attempt: its outcome, its usage closed, billable or not. `p_until` is
-- the last proof of life; NULL means now.
CREATE OR REPLACE FUNCTION lorayard.close_attempt(p_job uuid, p_attempt integer, p_outcome text, p_kind text, p_message text, p_billable boolean, p_alive boolean)
RETURNS void LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
  UPDATE lorayard.usage_intervals u
  SET during = CASE WHEN p_alive THEN pg_catalog.tstzrange(lower(u.during), greatest(upper(u.during), pg_catalog.clock_timestamp())) ELSE u.during END,
      closed = true, billable = p_billable
  WHERE u.job_id = p_job AND u.attempt = p_attempt AND NOT u.closed;
  UPDATE lorayard.attempts a
  SET ended_at = CASE WHEN p_alive THEN pg_catalog.clock_timestamp() ELSE coalesce(a.renewed_at, a.accepted_at, pg_catalog.clock_timestamp()) END,
      outcome = p_outcome, kind = p_kind, message = p_message
  WHERE a.job_id = p_job AND a.attempt = p_attempt AND a.ended_at IS NULL;
END $$;

-- Settles a job: final status, cost and notification in the caller's
-- transaction. A cancel that came first wins.
CREATE OR REPLACE FUNCTION lorayard.finish_job(p_job uuid, p_status text, p_message text, p_detail text)
RETURNS text LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
  v_status text;
  v_micro  bigint := lorayard.cost_of(p_job);
  v_amount numeric(10,2);
  v_used   numeric;
BEGIN
  SELECT t.status INTO v_status FROM public.training_jobs t WHERE t.id = p_job FOR UPDATE;
  IF v_status IN ('completed', 'failed', 'cancelled') THEN
    p_status := v_status;
  END IF;
  v_amount := pg_catalog.round(v_micro / 1000000.0, 2);
  UPDATE lorayard.jobs SET state = 'settled', waiting = '' WHERE job_id = p_job;
  UPDATE public.training_jobs t SET
    status = p_status,
    current_stage = CASE WHEN p_status = 'completed' THEN 'completed' ELSE t.current_stage END,
    progress = CASE WHEN p_status = 'completed' THEN 100 ELSE t.progress END,
    completed_at = coalesce(t.completed_at, pg_catalog.clock_timestamp()),
    estimated_completion_at = NULL,
    current_cost = v_amount,
    final_cost = v_amount,
    error_message = CASE WHEN p_status = 'failed' THEN p_message ELSE t.error_message END,
    error_stack = CASE WHEN p_status = 'failed' THEN nullif(p_detail, '') ELSE t.error_stack END
  WHERE t.id = p_job;

  SELECT sum(extract(epoch FROM upper(u.during) - lower(u.during))) INTO v_used
  FROM lorayard.usage_intervals u WHERE u.job_id = p_job AND u.billable;
  IF v_used > 0 THEN
    INSERT INTO public.cost_records (id, user_id, job_id, cost_type, amount, details, billing_period)
    SELECT lorayard.id_of('cost', 'compute', p_job::text), t.user_id, p_job, 'compute', v_amount,
      pg_catalog.jsonb_build_object('micro_usd', v_micro, 'gpu_seconds', pg_catalog.round(v_used, 3),
        'gpu_class', (SELECT min(u.class) FROM lorayard.usage_intervals u WHERE u.job_id = p_job),
        'micro_usd_per_gpu_hour', (SELECT max(u.micro_usd_per_hour) FROM lorayard.usage_intervals u WHERE u.job_id = p_job),
        'attempts', (SELECT count(*) FROM lorayard.attempts a WHERE a.job_id = p_job AND a.accepted_at IS NOT NULL)),
      pg_catalog.date_trunc('month', pg_catalog.now())::date
    FROM public.training_jobs t WHERE t.id = p_job
    ON CONFLICT (id) DO NOTHING;
  END IF;

  IF p_status = 'failed' THEN
    PERFORM lorayard.notify_user(p_job, 'job_failed', 'Training failed', coalesce(p_message, 'The training failed.'), 'high', '/training/jobs/' || p_job);
  ELSIF p_status = 'completed' THEN
    PERFORM lorayard.notify_user(p_job, 'job_completed', 'Training completed', 'Your model has been trained. Cost: $' || v_amount || '.', 'medium', '/training/jobs/' || p_job);
  END IF;
  RETURN p_status;
END $$;

-- Sends a job back to the queue, or ends it when it was cancelled or has used
-- up its attempts.
CREATE OR REPLACE FUNCTION lorayard.requeue_job(p_job uuid, p_counted boolean, p_lost boolean, p_delay interval, p_kind text, p_message text, p_detail text)
RETURNS text LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
  v_job    lorayard.jobs;
  v_status text;
BEGIN
  SELECT * INTO v_job FROM lorayard.jobs j WHERE j.job_id = p_job FOR UPDATE;
  SELECT t.status INTO v_status FROM public.training_jobs t WHERE t.id = p_job FOR UPDATE;
  IF v_status IN ('completed', 'failed', 'cancelled') THEN
    RETURN lorayard.finish_job(p_job, v_status, '', '');
  END IF;
  v_job.failures := v_job.failures + p_counted::integer;
  v_job.losses := v_job.losses + p_lost::integer;
  UPDATE lorayard.jobs j SET failures = v_job.failures, losses = v_job.losses WHERE j.job_id = p_job;
  IF v_job.failures >= 3 OR v_job.losses >= 20 THEN
    RETURN lorayard.finish_job(p_job, 'failed', p_message, p_detail);
  END IF;
  UPDATE lorayard.jobs j SET state = 'queued', nonce = NULL, agent_id = NULL, devices = '{}', desired = 'run',
    send = 0, sent_at = NULL, not_before = pg_catalog.clock_timestamp() + p_delay
  WHERE j.job_id = p_job;
  UPDATE public.training_jobs t SET status = 'queued', current_stage = 'queued', estimated_completion_at = NULL,
    retry_count = v_job.attempt
  WHERE t.id = p_job;
  PERFORM pg_catalog.pg_notify('lorayard', 'job:' || p_job);
  RETURN 'queued';
END $$;

-- An accepted attempt whose agent is gone: it costs the user nothing, its
-- usage ends at the last proof of life, the job goes back to the queue.
CREATE OR REPLACE FUNCTION lorayard.lose_attempt(p_job uuid, p_attempt integer, p_message text)
RETURNS text LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
  PERFORM 1 FROM lorayard.jobs j WHERE j.job_id = p_job AND j.attempt = p_attempt AND j.state = 'accepted' FOR UPDATE;
  IF NOT FOUND THEN
    RETURN 'stale';
  END IF;
  PERFORM lorayard.close_attempt(p_job, p_attempt, 'lost', 'agent_lost', p_message, false, false);
  RETURN lorayard.requeue_job(p_job, false, true, interval '0', 'agent_lost',
    'The machines that ran this training were lost again and again. It was not billed. Start it again, and tell us the job''s id if it happens again.', p_message);
END $$;

CREATE OR REPLACE FUNCTION lorayard.register_agent(p_agent text, p_boot uuid, p_info jsonb, p_ttl interval)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
DECLARE
  r record;
BEGIN
  INSERT INTO lorayard.agents AS a (id, boot, hostname, version, base_models, lease_until)
  VALUES (p_agent, p_boot, coalesce(p_info ->> 'hostname', ''), coalesce(p_info ->> 'version', ''),
    ARRAY(SELECT pg_catalog.jsonb_array_elements_text(p_info -> 'base_models')), pg_catalog.clock_timestamp() + p_ttl)
  ON CONFLICT (id) DO UPDATE SET boot = excluded.boot, hostname = excluded.hostname, version = excluded.version,
    base_models = excluded.base_models, draining = false, lease_until = excluded.lease_until, registered_at = pg_catalog.clock_timestamp();
  DELETE FROM lorayard.devices d WHERE d.agent_id = p_agent;
  INSERT INTO lorayard.devices AS d (uuid, agent_id, index, name, class, memory_bytes, pretend, fault)
  SELECT x.uuid, p_agent, x.index, x.name, x.class, x.memory_bytes, x.pretend, x.fault
  FROM pg_catalog.jsonb_to_recordset(p_info -> 'devices')
    AS x(uuid text, index integer, name text, class text, memory_bytes bigint, pretend boolean, fault text);
  -- Another process took this id: what the one before it ran is lost.
  FOR r IN SELECT j.job_id, j.attempt FROM lorayard.jobs j
           JOIN lorayard.attempts a ON a.job_id = j.job_id AND a.attempt = j.attempt
           WHERE j.agent_id = p_agent AND j.state = 'accepted' AND a.boot IS DISTINCT FROM p_boot
           ORDER BY j.job_id LOOP
    PERFORM lorayard.lose_attempt(r.job_id, r.attempt, 'agent ' || p_agent || ' was started anew');
  END LOOP;
  PERFORM pg_catalog.pg_notify('lorayard', 'agent:' || p_agent);
END $$;

-- One renewal of an agent: its lease, the usage of its attempts, and what is
-- wanted of each. An attempt that does not come back is not the agent's.
CREATE OR REPLACE FUNCTION lorayard.renew(p_agent text, p_boot uuid, p_ttl interval, p_draining boolean, p_refs jsonb)
RETURNS TABLE (job_id uuid, attempt integer, nonce uuid, desired text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
BEGIN
  UPDATE lorayard.agents a SET lease_until = greatest(a.lease_until, pg_catalog.clock_timestamp() + p_ttl), draining = p_draining
  WHERE a.id = p_agent AND a.boot = p_boot;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'agent % is run by another process now', p_agent USING ERRCODE = 'LY001';
  END IF;
  RETURN QUERY
  WITH mine AS (
    SELECT j.job_id, j.attempt, j.nonce,
      CASE WHEN t.status = 'cancelled' THEN 'cancel' ELSE j.desired END AS desired
    FROM pg_catalog.jsonb_to_recordset(p_refs) AS r(job uuid, attempt integer, nonce uuid)
    JOIN lorayard.jobs j ON j.job_id = r.job AND j.attempt = r.attempt AND j.nonce = r.nonce AND j.state = 'accepted' AND j.agent_id = p_agent
    JOIN public.training_jobs t ON t.id = j.job_id
  ), used AS (
    UPDATE lorayard.usage_intervals u
    SET during = pg_catalog.tstzrange(lower(u.during), greatest(upper(u.during), pg_catalog.clock_timestamp()))
    FROM mine WHERE u.job_id = mine.job_id AND u.attempt = mine.attempt AND NOT u.closed
  ), alive AS (
    UPDATE lorayard.attempts a SET renewed_at = pg_catalog.clock_timestamp()
    FROM mine WHERE a.job_id = mine.job_id AND a.attempt = mine.attempt
  )
  SELECT mine.job_id, mine.attempt, mine.nonce, mine.desired FROM mine;
END $$;

-- Takes an assigned attempt. NULL: stale. The answer of a lost acknowledgement
-- can be asked for again with the same nonce.
CREATE OR REPLACE FUNCTION lorayard.accept(p_agent text, p_boot uuid, p_job uuid, p_attempt integer, p_nonce uuid)
RETURNS jsonb LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
DECLARE
  v_job lorayard.jobs;
  v_now timestamptz;
  v_doc jsonb;
BEGIN
  SELECT * INTO v_job FROM lorayard.jobs j WHERE j.job_id = p_job FOR UPDATE;
  IF NOT FOUND OR v_job.attempt <> p_attempt OR v_job.agent_id IS DISTINCT FROM p_agent THEN
    RETURN NULL;
  END IF;
  PERFORM 1 FROM lorayard.agents a WHERE a.id = p_agent AND a.boot = p_boot;
  IF NOT FOUND THEN
    RETURN NULL;
  END IF;
  IF v_job.state = 'assigned' THEN
    PERFORM 1 FROM public.training_jobs t WHERE t.id = p_job AND t.status = 'queued' FOR UPDATE;
    IF NOT FOUND THEN
      RETURN NULL; -- cancelled meanwhile
    END IF;
    v_now := pg_catalog.clock_timestamp();
    UPDATE lorayard.jobs j SET state = 'accepted', nonce = p_nonce, waiting = '' WHERE j.job_id = p_job;
    UPDATE lorayard.attempts a SET nonce = p_nonce, boot = p_boot, accepted_at = v_now, renewed_at = v_now
    WHERE a.job_id = p_job AND a.attempt = p_attempt;
    INSERT INTO lorayard.usage_intervals (job_id, attempt, device, user_id, class, micro_usd_per_hour, during)
    SELECT p_job, p_attempt, d.uuid, v_job.user_id, d.class,
      coalesce((SELECT r.micro_usd_per_hour FROM lorayard.rates r
                WHERE r.class = d.class AND r.effective_from <= v_now ORDER BY r.effective_from DESC LIMIT 1), 0),
      pg_catalog.tstzrange(v_now, v_now + interval '1 microsecond')
    FROM lorayard.devices d WHERE d.uuid = ANY (v_job.devices);
    UPDATE public.training_jobs t SET status = 'initializing', current_stage = 'initializing',
      started_at = coalesce(t.started_at, v_now), error_message = NULL, retry_count = p_attempt - 1
    WHERE t.id = p_job;
    PERFORM lorayard.notify_user(p_job, 'job_started', 'Training started', 'Your training job has started.', 'low', '/training/jobs/' || p_job);
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

-- True when (job, attempt, nonce) may write; holds off a settlement or a reap
-- until the caller's transaction ends.
CREATE OR REPLACE FUNCTION lorayard.may_write(p_job uuid, p_attempt integer, p_nonce uuid) RETURNS boolean
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
  PERFORM 1 FROM lorayard.jobs j
  WHERE j.job_id = p_job AND j.attempt = p_attempt AND j.nonce = p_nonce AND j.state = 'accepted' FOR SHARE;
  RETURN FOUND;
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
  ON CONFLICT (id) DO UPDATE SET timestamp = excluded.timestamp, training_loss = excluded.training_loss,
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

CREATE OR REPLACE FUNCTION lorayard.add_checkpoint(p_job uuid, p_attempt integer, p_nonce uuid, p_doc jsonb)
RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
BEGIN
  IF NOT lorayard.may_write(p_job, p_attempt, p_nonce) THEN
    RETURN false;
  END IF;
  INSERT INTO public.checkpoints (id, user_id, job_id, attempt, step, epoch, loss, bucket, path, size, manifest_sha256, files)
  SELECT lorayard.id_of('checkpoint', p_job::text, p_attempt::text, p_doc ->> 'step'), j.user_id, p_job, p_attempt, (p_doc ->> 'step')::integer,
    coalesce(lorayard.fit((p_doc ->> 'epoch')::float8, 999999, 4), 0), lorayard.fit((p_doc ->> 'loss')::float8, 9999.999999, 6),
    p_doc ->> 'bucket', p_doc ->> 'path', (p_doc ->> 'bytes')::bigint, p_doc ->> 'manifest_sha256', p_doc -> 'files'
  FROM lorayard.jobs j WHERE j.job_id = p_job
  ON CONFLICT DO NOTHING;
  RETURN true;
END $$;

CREATE OR REPLACE FUNCTION lorayard.set_resume_step(p_job uuid, p_attempt integer, p_nonce uuid, p_step integer)
RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
BEGIN
  IF NOT lorayard.may_write(p_job, p_attempt, p_nonce) THEN
    RETURN false;
  END IF;
  UPDATE lorayard.attempts a SET resume_step = p_step WHERE a.job_id = p_job AND a.attempt = p_attempt;
  RETURN true;
END $$;

-- Closes an attempt and, where it is due, the job: status, cost, artifact and
-- notifications in one transaction. p_end: outcome (completed, failed,
-- cancelled, handed_back), kind, message, detail, retryable, counted,
-- billable, delay_seconds, and for completed the artifact. The answer is the
-- job's status, or 'stale'. A lost acknowledgement may be asked for again.
CREATE OR REPLACE FUNCTION lorayard.settle(p_job uuid, p_attempt integer, p_nonce uuid, p_end jsonb)
RETURNS text LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
DECLARE
  v_outcome text := p_end ->> 'outcome';
  v_status  text;
  v_final   text;
  v_art     jsonb := p_end -> 'artifact';
  v_art_id  uuid;
BEGIN
  PERFORM 1 FROM lorayard.jobs j
  WHERE j.job_id = p_job AND j.attempt = p_attempt AND j.nonce = p_nonce AND j.state = 'accepted' FOR UPDATE;
  IF NOT FOUND THEN
    SELECT t.status INTO v_status FROM lorayard.attempts a JOIN public.training_jobs t ON t.id = a.job_id
    WHERE a.job_id = p_job AND a.attempt = p_attempt AND a.nonce = p_nonce AND a.outcome = v_outcome;
    RETURN coalesce(v_status, 'stale');
  END IF;
  SELECT t.status INTO v_status FROM public.training_jobs t WHERE t.id = p_job FOR UPDATE;
  IF v_status = 'cancelled' THEN
    v_outcome := 'cancelled';
  END IF;
  PERFORM lorayard.close_attempt(p_job, p_attempt, v_outcome, coalesce(p_end ->> 'kind', ''), coalesce(p_end ->> 'message', ''),
    v_outcome = 'cancelled' OR coalesce((p_end ->> 'billable')::boolean, false), true);

  IF v_outcome = 'completed' THEN
    v_art_id := (v_art ->> 'id')::uuid;
    INSERT INTO public.model_artifacts (id, user_id, job_id, dataset_id, name, description, quality_metrics, training_summary, configuration, artifacts)
    SELECT v_art_id, t.user_id, t.id, t.dataset_id, left(d.name || ' (' || t.preset_id || ')', 200), v_art ->> 'description',
      v_art -> 'quality_metrics',
      (v_art -> 'training_summary') || pg_catalog.jsonb_build_object(
        'total_cost', pg_catalog.round(lorayard.cost_of(p_job) / 1000000.0, 2),
        'training_duration_hours', pg_catalog.round((extract(epoch FROM pg_catalog.clock_timestamp() - t.started_at) / 3600)::numeric, 4)),
      pg_catalog.jsonb_build_object('preset_id', t.preset_id, 'hyperparameters', t.hyperparameters, 'gpu_config', t.gpu_config),
      v_art -> 'files'
    FROM public.training_jobs t JOIN public.datasets d ON d.id = t.dataset_id WHERE t.id = p_job;
    UPDATE public.training_jobs t SET artifact_id = v_art_id, current_metrics = t.current_metrics || coalesce(v_art -> 'metrics', '{}')
    WHERE t.id = p_job;
    v_final := lorayard.finish_job(p_job, 'completed', '', '');
    PERFORM lorayard.notify_user(p_job, 'artifact_ready', 'Model ready', 'Your trained adapter is ready to download.', 'medium', '/models/' || v_art_id);
  ELSIF v_outcome = 'cancelled' THEN
    v_final := lorayard.finish_job(p_job, 'cancelled', '', '');
  ELSIF v_outcome = 'handed_back' OR (p_end ->> 'retryable')::boolean THEN
    v_final := lorayard.requeue_job(p_job, coalesce((p_end ->> 'counted')::boolean, false), v_outcome = 'failed' AND NOT coalesce((p_end ->> 'counted')::boolean, false),
      pg_catalog.make_interval(secs => coalesce((p_end ->> 'delay_seconds')::float8, 0)), p_end ->> 'kind', p_end ->> 'message', p_end ->> 'detail');
  ELSE
    v_final := lorayard.finish_job(p_job, 'failed', p_end ->> 'message', p_end ->> 'detail');
  END IF;
  PERFORM pg_catalog.pg_notify('lorayard', 'settled:' || p_job);
  RETURN v_final;
END $$;

-- Functions are executable by everybody unless that is taken away.
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA lorayard FROM PUBLIC;
GRANT USAGE ON SCHEMA lorayard TO lorayard_agent;
GRANT EXECUTE ON FUNCTION
  lorayard.register_agent(text, uuid, jsonb, interval),
  lorayard.renew(text, uuid, interval, boolean, jsonb),
  lorayard.accept(text, uuid, uuid, integer, uuid),
  lorayard.append(uuid, integer, uuid, jsonb, jsonb, jsonb),
  lorayard.add_checkpoint(uuid, integer, uuid, jsonb),
  lorayard.set_resume_step(uuid, integer, uuid, integer),
  lorayard.settle(uuid, integer, uuid, jsonb)
TO lorayard_agent;
