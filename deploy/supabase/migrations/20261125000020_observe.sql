-- What operators see. Dashboards read views and nothing else, through a role
-- that can do nothing else; the app's users see neither role nor schema. The
-- views run with their owner's rights and show no text of a user.

DO $$
BEGIN
  CREATE ROLE lorayard_observer NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
END $$;

-- When an attempt was closed, on the database's clock. ended_at may lie before
-- it: a lost attempt ended at its last renewal.
ALTER TABLE lorayard.attempts ADD COLUMN IF NOT EXISTS closed_at timestamptz;
CREATE OR REPLACE FUNCTION lorayard.note_closed() RETURNS trigger
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
  IF NEW.ended_at IS NOT NULL AND OLD.ended_at IS NULL THEN
    NEW.closed_at := pg_catalog.clock_timestamp();
  END IF;
  RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS lorayard_note_closed ON lorayard.attempts;
CREATE TRIGGER lorayard_note_closed BEFORE UPDATE OF ended_at ON lorayard.attempts
  FOR EACH ROW EXECUTE FUNCTION lorayard.note_closed();
CREATE INDEX IF NOT EXISTS attempts_closed_idx ON lorayard.attempts (closed_at) WHERE closed_at IS NOT NULL;

-- The watch on the ledger. drift sums, over the jobs whose cost was recorded
-- within the last day, what the record differs from rate × billable time by more
-- than its rounding to cents. A week bounds what is looked at; no index helps,
-- because one would be written at every renewal.
CREATE OR REPLACE FUNCTION lorayard.check_ledger(OUT drift_dollars float8, OUT open_intervals bigint, OUT stray_intervals bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = '' AS $$
  SELECT
    coalesce((
      SELECT sum(abs(c.amount - b.dollars)) FILTER (WHERE abs(c.amount - b.dollars) > 0.005)
      FROM public.cost_records c, LATERAL (
        SELECT coalesce(sum(pg_catalog.floor(u.micro_usd_per_hour * extract(epoch FROM upper(u.during) - lower(u.during)) / 3600)), 0) / 1000000 AS dollars
        FROM lorayard.usage_intervals u WHERE u.job_id = c.job_id AND u.billable) b
      WHERE c.cost_type = 'compute' AND c.job_id IS NOT NULL AND c.recorded_at > pg_catalog.now() - interval '1 day'), 0)::float8,
    (SELECT count(*) FROM lorayard.usage_intervals u WHERE NOT u.closed AND upper(u.during) > pg_catalog.now() - interval '7 days'),
    (SELECT count(*) FROM lorayard.usage_intervals u WHERE NOT u.closed AND upper(u.during) > pg_catalog.now() - interval '7 days'
       AND NOT EXISTS (SELECT 1 FROM lorayard.jobs j WHERE j.job_id = u.job_id AND j.attempt = u.attempt AND j.state = 'accepted'))
$$;
REVOKE ALL ON FUNCTION lorayard.check_ledger(), lorayard.note_closed() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION lorayard.check_ledger() TO lorayard_dispatcher;

CREATE SCHEMA IF NOT EXISTS lorayard_views;
REVOKE ALL ON SCHEMA lorayard_views FROM PUBLIC;

CREATE OR REPLACE VIEW lorayard_views.jobs AS
  SELECT t.id AS job, t.user_id, t.status, t.current_stage AS stage, coalesce(j.state, 'new') AS state, coalesce(j.attempt, 0) AS attempts,
         j.spec ->> 'gpu_class' AS wish, (j.spec ->> 'gpu_count')::integer AS gpus, j.spec ->> 'base_model' AS base_model, j.priority,
         j.agent_id AS agent, j.waiting, j.failures, j.losses,
         t.created_at, j.admitted_at, t.started_at, t.completed_at, t.estimated_completion_at,
         t.current_step AS step, t.total_steps AS steps, t.progress::float8 AS percent, t.current_cost::float8 AS dollars, t.error_message
  FROM public.training_jobs t LEFT JOIN lorayard.jobs j ON j.job_id = t.id;

CREATE OR REPLACE VIEW lorayard_views.attempts AS
  SELECT a.job_id AS job, a.attempt, a.agent_id AS agent, a.devices, a.assigned_at, a.accepted_at, a.ended_at, a.closed_at,
         a.outcome, a.kind, a.message, a.resume_step
  FROM lorayard.attempts a;

CREATE OR REPLACE VIEW lorayard_views.samples AS
  SELECT s.job_id AS job, s.attempt, s.seq, s.at, s.step, s.epoch, s.loss, s.validation_loss, s.learning_rate, s.grad_norm, s.tokens_per_second, s.skipped
  FROM lorayard.samples s;

-- Lines that show an example of the training data are the user's.
CREATE OR REPLACE VIEW lorayard_views.logs AS
  SELECT l.job_id AS job, l.attempt, l.seq, l.timestamp AS at, l.level, coalesce(l.metadata ->> 'code', '') AS code,
         CASE WHEN l.metadata ->> 'code' = 'training_sample' THEN '(an example of the training data)' ELSE l.message END AS message
  FROM public.job_logs l;

CREATE OR REPLACE VIEW lorayard_views.checkpoints AS
  SELECT c.job_id AS job, c.attempt, c.step, c.loss::float8 AS loss, c.size AS bytes, c.created_at
  FROM public.checkpoints c;

CREATE OR REPLACE VIEW lorayard_views.usage AS
  SELECT u.job_id AS job, u.attempt, u.device, u.seq, u.user_id, u.class, lower(u.during) AS began, upper(u.during) AS ended, u.billable, u.closed,
         extract(epoch FROM upper(u.during) - lower(u.during))::float8 AS gpu_seconds,
         floor(u.micro_usd_per_hour * extract(epoch FROM upper(u.during) - lower(u.during)) / 3600)::float8 / 1000000 AS dollars
  FROM lorayard.usage_intervals u;

CREATE OR REPLACE VIEW lorayard_views.costs AS
  SELECT c.job_id AS job, c.user_id, c.cost_type, c.amount::float8 AS dollars, c.billing_period, c.recorded_at
  FROM public.cost_records c;

CREATE OR REPLACE VIEW lorayard_views.agents AS
  SELECT a.id AS agent, a.hostname, a.version, a.base_models, a.labels, a.lease_until, a.registered_at,
         CASE WHEN a.lease_until < clock_timestamp() THEN 'lost' WHEN a.cordoned OR a.draining OR a.drain_by IS NOT NULL THEN 'closed' ELSE 'taking' END AS state,
         a.cordon_reason
  FROM lorayard.agents a;

CREATE OR REPLACE VIEW lorayard_views.devices AS
  SELECT d.uuid AS gpu_uuid, d.agent_id AS agent, d.index, d.name, d.class, d.memory_bytes, d.fault,
         (SELECT j.job_id FROM lorayard.jobs j WHERE j.agent_id = d.agent_id AND j.state IN ('assigned', 'accepted') AND d.uuid = ANY (j.devices) LIMIT 1) AS job
  FROM lorayard.devices d;

GRANT USAGE ON SCHEMA lorayard_views TO lorayard_observer;
GRANT SELECT ON ALL TABLES IN SCHEMA lorayard_views TO lorayard_observer;
