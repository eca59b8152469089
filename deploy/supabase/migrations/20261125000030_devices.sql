-- Devices change while their agent runs: one that breaks is not offered any
-- more, one that was reset is again. And placement learns how they are linked.

ALTER TABLE lorayard.devices
  ADD COLUMN IF NOT EXISTS links integer[] NOT NULL DEFAULT '{}',  -- to the agent's devices in the order of index, larger is better; empty: not known
  ADD COLUMN IF NOT EXISTS node integer NOT NULL DEFAULT -1;       -- NUMA node; -1: not known

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
  INSERT INTO lorayard.devices AS d (uuid, agent_id, index, name, class, memory_bytes, pretend, fault, links, node)
  SELECT x.uuid, p_agent, x.index, x.name, x.class, x.memory_bytes, x.pretend, x.fault, coalesce(x.links, '{}'), coalesce(x.node, -1)
  FROM pg_catalog.jsonb_to_recordset(p_info -> 'devices')
    AS x(uuid text, index integer, name text, class text, memory_bytes bigint, pretend boolean, fault text, links integer[], node integer);
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
-- the agent's, and one that the agent does not list is lost. p_state:
-- {draining, faults {uuid: why it must not be used}}; without faults, the devices
-- stand as they did. The answer: {cordoned, drain_in (seconds), dispatchers
-- [address], attempts [{job, attempt, nonce, desired}]}.
-- A plan that was made while the tables were small reads all of them, as long
-- as the connection lives; this one never does.
CREATE OR REPLACE FUNCTION lorayard.renew(p_agent text, p_boot uuid, p_ttl interval, p_state jsonb, p_refs jsonb)
RETURNS jsonb LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' SET enable_seqscan = off AS $$
DECLARE
  v_now      timestamptz := pg_catalog.clock_timestamp();
  v_agent    lorayard.agents;
  v_was      boolean;
  v_news     boolean := false;
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
  IF p_state ? 'faults' THEN
    UPDATE lorayard.devices d SET fault = coalesce(p_state -> 'faults' ->> d.uuid, '')
    WHERE d.agent_id = p_agent AND d.fault <> coalesce(p_state -> 'faults' ->> d.uuid, '');
    v_news := FOUND;
  END IF;
  IF v_news OR v_was <> v_agent.draining THEN
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

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA lorayard FROM PUBLIC;
