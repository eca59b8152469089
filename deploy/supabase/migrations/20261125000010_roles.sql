-- Who may do what. Agents execute a handful of functions and touch no table.
-- Dispatchers read and write the control state, and of the app's tables what
-- admission and retention need; neither role bypasses row level security. Make
-- one login per host in one of the roles: it can be revoked alone.

DO $$
BEGIN
  CREATE ROLE lorayard_dispatcher NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
END $$;

-- What writes the app's tables for a dispatcher runs with the owner's rights,
-- and does one thing.
ALTER FUNCTION lorayard.reap(uuid, interval, interval) SECURITY DEFINER;
ALTER FUNCTION lorayard.report_death(text, uuid, uuid, integer, uuid, text) SECURITY DEFINER;

-- Fails a row at admission, with words for the user.
CREATE OR REPLACE FUNCTION lorayard.refuse(p_job uuid, p_message text) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
BEGIN
  INSERT INTO lorayard.jobs (job_id, user_id, spec)
  SELECT t.id, t.user_id, '{}' FROM public.training_jobs t WHERE t.id = p_job
  ON CONFLICT DO NOTHING;
  IF FOUND THEN
    PERFORM lorayard.finish_job(p_job, 'failed', p_message, '');
  END IF;
END $$;

-- Jobs that were cancelled while no attempt ran, also those that nobody had
-- looked at. Returns what it settled.
CREATE OR REPLACE FUNCTION lorayard.settle_cancelled() RETURNS SETOF uuid
LANGUAGE plpgsql SECURITY DEFINER SET search_path = '' AS $$
DECLARE
  r record;
BEGIN
  INSERT INTO lorayard.jobs (job_id, user_id, spec)
  SELECT t.id, t.user_id, '{}' FROM public.training_jobs t
  WHERE t.status = 'cancelled' AND t.external_job_id IS NULL AND t.created_at > pg_catalog.now() - interval '1 day'
    AND NOT EXISTS (SELECT 1 FROM lorayard.jobs j WHERE j.job_id = t.id)
  ON CONFLICT DO NOTHING;
  FOR r IN SELECT j.job_id, j.attempt FROM lorayard.jobs j JOIN public.training_jobs t ON t.id = j.job_id
           WHERE j.state IN ('queued', 'assigned') AND t.status = 'cancelled'
           ORDER BY j.job_id FOR UPDATE OF j SKIP LOCKED LOOP
    PERFORM lorayard.close_attempt(r.job_id, r.attempt, 'cancelled', 'cancelled', '', true, true);
    PERFORM lorayard.finish_job(r.job_id, 'cancelled', '', '');
    RETURN NEXT r.job_id;
  END LOOP;
END $$;

-- An agent belongs to the login that registered it first: one host cannot pass
-- for another. `dispatcher forget` frees the id.
ALTER TABLE lorayard.agents ADD COLUMN IF NOT EXISTS login text NOT NULL DEFAULT '';
CREATE OR REPLACE FUNCTION lorayard.guard_agent_login() RETURNS trigger
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
  IF TG_OP = 'UPDATE' AND OLD.login <> '' AND OLD.login <> session_user THEN
    RAISE EXCEPTION 'agent id % belongs to the login %: use another id, or `dispatcher forget %` first', OLD.id, OLD.login, OLD.id
      USING ERRCODE = 'LY002';
  END IF;
  NEW.login := session_user;
  RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS lorayard_guard_login ON lorayard.agents;
CREATE TRIGGER lorayard_guard_login BEFORE INSERT OR UPDATE OF boot ON lorayard.agents
  FOR EACH ROW EXECUTE FUNCTION lorayard.guard_agent_login();

-- A user's data set lies in the user's own folder: its row cannot point at
-- somebody else's file. (Files in training-files are the app's imports; their
-- folders are named by the file.)
CREATE OR REPLACE FUNCTION lorayard.guard_dataset_path() RETURNS trigger
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
  IF current_user IN ('authenticated', 'anon')
     AND (NEW.storage_bucket NOT IN ('lora-datasets', 'training-files')
          OR NEW.storage_bucket = 'lora-datasets' AND NOT pg_catalog.starts_with(NEW.storage_path, NEW.user_id || '/')
          OR NEW.storage_path ~ '(^|/)\.{0,2}(/|$)') THEN
    RAISE EXCEPTION 'storage_path % is not in your own folder of bucket lora-datasets', NEW.storage_path
      USING ERRCODE = 'insufficient_privilege';
  END IF;
  RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS lorayard_guard_path ON public.datasets;
CREATE TRIGGER lorayard_guard_path BEFORE INSERT OR UPDATE OF storage_bucket, storage_path, user_id ON public.datasets
  FOR EACH ROW EXECUTE FUNCTION lorayard.guard_dataset_path();

GRANT USAGE ON SCHEMA lorayard TO lorayard_dispatcher;
GRANT SELECT, INSERT, UPDATE ON lorayard.jobs, lorayard.attempts TO lorayard_dispatcher;
GRANT SELECT, UPDATE, DELETE ON lorayard.agents, lorayard.grants TO lorayard_dispatcher;
GRANT SELECT, INSERT, UPDATE, DELETE ON lorayard.dispatchers TO lorayard_dispatcher;
GRANT SELECT, UPDATE ON lorayard.leader TO lorayard_dispatcher;
GRANT SELECT ON lorayard.devices, lorayard.rates, lorayard.quotas, lorayard.usage_intervals TO lorayard_dispatcher;
GRANT EXECUTE ON FUNCTION
  lorayard.refuse(uuid, text),
  lorayard.settle_cancelled(),
  lorayard.reap(uuid, interval, interval),
  lorayard.report_death(text, uuid, uuid, integer, uuid, text),
  lorayard.artifact_of(uuid, integer, uuid)
TO lorayard_dispatcher;

GRANT USAGE ON SCHEMA public TO lorayard_dispatcher;
GRANT SELECT ON public.training_jobs, public.datasets, public.checkpoints, public.model_artifacts TO lorayard_dispatcher;
GRANT UPDATE (hyperparameters, gpu_config, total_epochs) ON public.training_jobs TO lorayard_dispatcher;
GRANT DELETE ON public.checkpoints TO lorayard_dispatcher;
DROP POLICY IF EXISTS lorayard_dispatcher_select ON public.training_jobs;
CREATE POLICY lorayard_dispatcher_select ON public.training_jobs FOR SELECT TO lorayard_dispatcher USING (true);
DROP POLICY IF EXISTS lorayard_dispatcher_update ON public.training_jobs;
CREATE POLICY lorayard_dispatcher_update ON public.training_jobs FOR UPDATE TO lorayard_dispatcher USING (true) WITH CHECK (true);
DROP POLICY IF EXISTS lorayard_dispatcher_select ON public.datasets;
CREATE POLICY lorayard_dispatcher_select ON public.datasets FOR SELECT TO lorayard_dispatcher USING (true);
DROP POLICY IF EXISTS lorayard_dispatcher_select ON public.model_artifacts;
CREATE POLICY lorayard_dispatcher_select ON public.model_artifacts FOR SELECT TO lorayard_dispatcher USING (true);
DROP POLICY IF EXISTS lorayard_dispatcher_select ON public.checkpoints;
CREATE POLICY lorayard_dispatcher_select ON public.checkpoints FOR SELECT TO lorayard_dispatcher USING (true);
DROP POLICY IF EXISTS lorayard_dispatcher_delete ON public.checkpoints;
CREATE POLICY lorayard_dispatcher_delete ON public.checkpoints FOR DELETE TO lorayard_dispatcher USING (true);

-- A dispatcher refuses to serve a schema of another version.
DO $$
BEGIN
  IF to_regclass('supabase_migrations.schema_migrations') IS NOT NULL THEN
    GRANT USAGE ON SCHEMA supabase_migrations TO lorayard_dispatcher;
    GRANT SELECT ON supabase_migrations.schema_migrations TO lorayard_dispatcher;
  END IF;
END $$;

REVOKE ALL ON FUNCTION lorayard.refuse(uuid, text), lorayard.settle_cancelled(), lorayard.guard_agent_login(), lorayard.guard_dataset_path() FROM PUBLIC;
