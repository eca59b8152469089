-- Hand-over: who leads, who is where, what is wanted of agents and attempts,
-- and attempts that outlive the process that ran them.
--
-- Lock order everywhere: lorayard.agents, then lorayard.jobs, then
-- public.training_jobs.

-- What an agent is and what an operator wants of it. `instance` names the
-- agent's data directory: a process that brings the same one is the old one's
-- heir; another one under the same id is a mistake while the lease lasts.
ALTER TABLE lorayard.agents
  ADD COLUMN IF NOT EXISTS instance      text NOT NULL DEFAULT '',
  ADD COLUMN IF NOT EXISTS labels        jsonb NOT NULL DEFAULT '{}',
  ADD COLUMN IF NOT EXISTS cordon_reason text NOT NULL DEFAULT '',
  ADD COLUMN IF NOT EXISTS drain_by      timestamptz;  -- an operator's drain: attempts have left by then

ALTER TABLE lorayard.jobs
  ADD COLUMN IF NOT EXISTS priority       integer NOT NULL DEFAULT 0,  -- higher first
  ADD COLUMN IF NOT EXISTS start_earliest timestamptz,                 -- when it is expected to start, while it waits
  ADD COLUMN IF NOT EXISTS start_latest   timestamptz;
ALTER TABLE lorayard.jobs DROP CONSTRAINT IF EXISTS jobs_desired_check;
ALTER TABLE lorayard.jobs ADD CONSTRAINT jobs_desired_check CHECK (desired IN ('run', 'cancel', 'preempt', 'pause'));
CREATE INDEX IF NOT EXISTS jobs_user_idx ON lorayard.jobs (user_id, admitted_at) WHERE state = 'queued';
CREATE INDEX IF NOT EXISTS usage_intervals_recent_idx ON lorayard.usage_intervals (upper(during));

-- What an operator grants a user beyond the policy's defaults.
CREATE TABLE IF NOT EXISTS lorayard.quotas (
  user_id    uuid PRIMARY KEY REFERENCES auth.users (id) ON DELETE CASCADE,
  weight     float8 NOT NULL DEFAULT 1 CHECK (weight > 0 AND weight <= 1e6),  -- share of the fleet, relative to others
  priority   integer NOT NULL DEFAULT 0,             -- of the user's new jobs
  max_gpus   integer CHECK (max_gpus >= 0),          -- GPUs at once; NULL: the policy's
  max_queued integer CHECK (max_queued >= 0)         -- jobs waiting at once; NULL: the policy's
);

-- Dispatchers that run, and where agents find them.
CREATE TABLE IF NOT EXISTS lorayard.dispatchers (
  id          uuid PRIMARY KEY,
  name        text NOT NULL,
  address     text NOT NULL,   -- of its presence stream, empty for none
  version     text NOT NULL DEFAULT '',
  lease_until timestamptz NOT NULL
);

-- The one leader. A lease and not a lock of the session: a leader that was
-- stopped with SIGSTOP keeps its connection, and so would keep a lock.
CREATE TABLE IF NOT EXISTS lorayard.leader (
  one         boolean PRIMARY KEY DEFAULT true CHECK (one),
  holder      uuid,
  term        bigint NOT NULL DEFAULT 0,
  since       timestamptz NOT NULL DEFAULT '-infinity',  -- from then on it has led, and this database has answered, without a gap
  lease_until timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO lorayard.leader DEFAULT VALUES ON CONFLICT DO NOTHING;

-- A cancel wakes the dispatcher to settle, and the agent to stop.
CREATE OR REPLACE FUNCTION lorayard.notify_cancel() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
DECLARE
  v_agent text;
BEGIN
  SELECT j.agent_id INTO v_agent FROM lorayard.jobs j WHERE j.job_id = NEW.id AND j.state = 'accepted';
  IF v_agent IS NOT NULL THEN
    PERFORM pg_catalog.pg_notify('lorayard', 'look:' || v_agent);
  ELSE
    PERFORM pg_catalog.pg_notify('lorayard', 'cancelled:' || NEW.id);
  END IF;
  RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS lorayard_notify_status ON public.training_jobs;
CREATE TRIGGER lorayard_notify_status AFTER UPDATE OF status ON public.training_jobs
  FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status AND NEW.status = 'cancelled')
  EXECUTE FUNCTION lorayard.notify_cancel();

-- Sends a job back to the queue, or ends it when it was cancelled or has used
-- up its attempts. A paused job stays paused.
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
  UPDATE lorayard.jobs j SET state = 'queued', nonce = NULL, agent_id = NULL, devices = '{}',
    desired = CASE WHEN j.desired = 'pause' THEN 'pause' ELSE 'run' END,
    send = 0, sent_at = NULL, not_before = pg_catalog.clock_timestamp() + p_delay
  WHERE j.job_id = p_job;
  UPDATE public.training_jobs t SET status = 'queued', current_stage = 'queued', estimated_completion_at = NULL,
    retry_count = v_job.attempt
  WHERE t.id = p_job;
  PERFORM pg_catalog.pg_notify('lorayard', 'job:' || p_job);
  RETURN 'queued';
END $$;

-- A process registers as the one that runs an agent. What an earlier process of
-- this agent ran goes on when this one lists it with the right nonce
-- (p_adopt), and is lost otherwise. The answer lists what goes on.
--   LY002: the id is in use on another host; LY003: a device is.
DROP FUNCTION IF EXISTS lorayard.register_agent(text, uuid, jsonb, interval);
CREATE OR REPLACE FUNCTION lorayard.register_agent(p_agent text, p_boot uuid, p_info jsonb, p_ttl interval, p_adopt jsonb)
RETURNS jsonb LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
DECLARE
  r          record;
  v_now      timestamptz := pg_catalog.clock_timestamp();
  v_instance text := coalesce(p_info ->> 'instance', '');
  v_kept     jsonb := '[]';
BEGIN
  SELECT a.hostname, a.lease_until INTO r FROM lorayard.agents a
  WHERE a.id = p_agent AND a.boot <> p_boot AND a.instance <> v_instance AND a.lease_until > v_now FOR UPDATE;
  IF FOUND THEN
    RAISE EXCEPTION 'agent id % is in use on host %, which holds its lease', p_agent, r.hostname USING ERRCODE = 'LY002';
  END IF;
  SELECT d.uuid, a.id INTO r FROM lorayard.devices d JOIN lorayard.agents a ON a.id = d.agent_id
  WHERE a.id <> p_agent AND a.lease_until > v_now
    AND d.uuid IN (SELECT x ->> 'uuid' FROM pg_catalog.jsonb_array_elements(p_info -> 'devices') x) LIMIT 1;
  IF FOUND THEN
    RAISE EXCEPTION 'device % is run by agent %, which holds its lease', r.uuid, r.id USING ERRCODE = 'LY003';
  END IF;
  INSERT INTO lorayard.agents AS a (id, boot, instance, hostname, version, base_models, labels, lease_until)
  VALUES (p_agent, p_boot, v_instance, coalesce(p_info ->> 'hostname', ''), coalesce(p_info ->> 'version', ''),
    ARRAY(SELECT pg_catalog.jsonb_array_elements_text(p_info -> 'base_models')), coalesce(p_info -> 'labels', '{}'), v_now + p_ttl)
  ON CONFLICT (id) DO UPDATE SET boot = excluded.boot, instance = excluded.instance, hostname = excluded.hostname,
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

-- One renewal of an agent: its lease, the usage of its attempts, and what is
-- wanted of it and of each of them. An attempt that does not come back is not
-- the agent's, and one that the agent does not list is lost. p_state: {draining}. The answer: {cordoned, drain_in (seconds),
-- dispatchers [address], attempts [{job, attempt, nonce, desired}]}.
DROP FUNCTION IF EXISTS lorayard.renew(text, uuid, interval, boolean, jsonb);
CREATE OR REPLACE FUNCTION lorayard.renew(p_agent text, p_boot uuid, p_ttl interval, p_state jsonb, p_refs jsonb)
RETURNS jsonb LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
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
  SELECT a.draining INTO v_was FROM lorayard.agents a WHERE a.id = p_agent AND a.boot = p_boot FOR UPDATE;
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
    WHERE j.job_id IN (SELECT l.job FROM pg_catalog.jsonb_to_recordset(p_refs) AS l(job uuid))
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
  -- What this process accepted and does not list, it does not run: both answers
  -- of its accept were lost, or its end could not be written. An accept under
  -- way is younger than the grace.
  FOR r IN SELECT j.job_id, j.attempt FROM lorayard.jobs j
           JOIN lorayard.attempts t ON t.job_id = j.job_id AND t.attempt = j.attempt
           WHERE j.agent_id = p_agent AND j.state = 'accepted' AND t.boot = p_boot AND t.accepted_at < v_now - interval '10 seconds'
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
    PERFORM 1 FROM lorayard.jobs o
    WHERE o.agent_id = p_agent AND o.state = 'accepted' AND o.job_id <> p_job AND o.devices && v_job.devices;
    IF FOUND THEN
      RETURN NULL; -- a device has an owner
    END IF;
    v_now := pg_catalog.clock_timestamp();
    UPDATE lorayard.jobs j SET state = 'accepted', nonce = p_nonce, waiting = '', start_earliest = NULL, start_latest = NULL WHERE j.job_id = p_job;
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

-- The shim of an attempt outlived its agent, ended the trainer and says so. The
-- agent's lease ends now: what was assigned to it and not accepted goes back as
-- well. Only the dispatcher calls this, for whoever knows the nonce. The answer
-- is the job's status, or 'stale'.
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
  RETURN lorayard.lose_attempt(p_job, p_attempt, p_message);
END $$;

-- Gives back every accepted attempt whose agent's lease ran out longer ago than
-- p_patience. Only the leader may judge, and only when it has led without a gap
-- for a full lease of the agents: a database that was away, or stood still, let
-- nobody renew, and so did a leader that has just woken up. The agents' rows are
-- locked first: a renewal comes before or after, never between.
CREATE OR REPLACE FUNCTION lorayard.reap(p_leader uuid, p_lease interval, p_patience interval)
RETURNS TABLE (job_id uuid, attempt integer)
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
  v_now timestamptz := pg_catalog.clock_timestamp();
  a     record;
  r     record;
BEGIN
  PERFORM 1 FROM lorayard.leader l WHERE l.holder = p_leader AND l.lease_until > v_now AND l.since <= v_now - p_lease;
  IF NOT FOUND THEN
    RETURN;
  END IF;
  FOR a IN SELECT g.id FROM lorayard.agents g
           WHERE g.lease_until < v_now - p_patience
             AND EXISTS (SELECT 1 FROM lorayard.jobs j WHERE j.agent_id = g.id AND j.state = 'accepted')
           ORDER BY g.id FOR UPDATE SKIP LOCKED LOOP
    FOR r IN SELECT j.job_id AS id, j.attempt AS n FROM lorayard.jobs j
             WHERE j.agent_id = a.id AND j.state = 'accepted' ORDER BY j.job_id LOOP
      IF lorayard.lose_attempt(r.id, r.n, 'agent ' || a.id || ' stopped renewing its lease') <> 'stale' THEN
        job_id := r.id;
        attempt := r.n;
        RETURN NEXT;
      END IF;
    END LOOP;
  END LOOP;
END $$;

-- Jobs that were cancelled while no attempt ran. Returns how many it settled.
CREATE OR REPLACE FUNCTION lorayard.settle_cancelled() RETURNS SETOF uuid
LANGUAGE plpgsql SET search_path = '' AS $$
DECLARE
  r record;
BEGIN
  FOR r IN SELECT j.job_id, j.attempt FROM lorayard.jobs j JOIN public.training_jobs t ON t.id = j.job_id
           WHERE j.state IN ('queued', 'assigned') AND t.status = 'cancelled'
           ORDER BY j.job_id FOR UPDATE OF j SKIP LOCKED LOOP
    PERFORM lorayard.close_attempt(r.job_id, r.attempt, 'cancelled', 'cancelled', '', true, true);
    PERFORM lorayard.finish_job(r.job_id, 'cancelled', '', '');
    RETURN NEXT r.job_id;
  END LOOP;
END $$;

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA lorayard FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA lorayard FROM PUBLIC;
GRANT EXECUTE ON FUNCTION
  lorayard.register_agent(text, uuid, jsonb, interval, jsonb),
  lorayard.renew(text, uuid, interval, jsonb, jsonb)
TO lorayard_agent;
