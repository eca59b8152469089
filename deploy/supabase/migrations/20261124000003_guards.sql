-- What a user may do to the app's tables, and what nobody may.

-- Row level security on every table the app can see. Policies of our own stand
-- beside the app's; permissive policies add up, and these say the same.
ALTER TABLE public.datasets        ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.training_jobs   ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.metrics_points  ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.model_artifacts ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.cost_records    ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.notifications   ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.checkpoints     ENABLE ROW LEVEL SECURITY;
ALTER TABLE public.job_logs        ENABLE ROW LEVEL SECURITY;

DROP POLICY IF EXISTS lorayard_datasets_select ON public.datasets;
CREATE POLICY lorayard_datasets_select ON public.datasets FOR SELECT TO authenticated
  USING (user_id = (SELECT auth.uid()));
DROP POLICY IF EXISTS lorayard_datasets_insert ON public.datasets;
CREATE POLICY lorayard_datasets_insert ON public.datasets FOR INSERT TO authenticated
  WITH CHECK (user_id = (SELECT auth.uid()));
DROP POLICY IF EXISTS lorayard_datasets_update ON public.datasets;
CREATE POLICY lorayard_datasets_update ON public.datasets FOR UPDATE TO authenticated
  USING (user_id = (SELECT auth.uid())) WITH CHECK (user_id = (SELECT auth.uid()));

DROP POLICY IF EXISTS lorayard_training_jobs_select ON public.training_jobs;
CREATE POLICY lorayard_training_jobs_select ON public.training_jobs FOR SELECT TO authenticated
  USING (user_id = (SELECT auth.uid()));
DROP POLICY IF EXISTS lorayard_training_jobs_insert ON public.training_jobs;
CREATE POLICY lorayard_training_jobs_insert ON public.training_jobs FOR INSERT TO authenticated
  WITH CHECK (user_id = (SELECT auth.uid()));
-- The app's cancel: an own unfinished job becomes cancelled, and nothing else.
DROP POLICY IF EXISTS lorayard_training_jobs_cancel ON public.training_jobs;
CREATE POLICY lorayard_training_jobs_cancel ON public.training_jobs FOR UPDATE TO authenticated
  USING (user_id = (SELECT auth.uid()) AND status IN ('queued', 'initializing', 'running'))
  WITH CHECK (user_id = (SELECT auth.uid()) AND status = 'cancelled');

DROP POLICY IF EXISTS lorayard_metrics_points_select ON public.metrics_points;
CREATE POLICY lorayard_metrics_points_select ON public.metrics_points FOR SELECT TO authenticated
  USING (job_id IN (SELECT j.id FROM public.training_jobs j WHERE j.user_id = (SELECT auth.uid())));
DROP POLICY IF EXISTS lorayard_model_artifacts_select ON public.model_artifacts;
CREATE POLICY lorayard_model_artifacts_select ON public.model_artifacts FOR SELECT TO authenticated
  USING (user_id = (SELECT auth.uid()));
DROP POLICY IF EXISTS lorayard_cost_records_select ON public.cost_records;
CREATE POLICY lorayard_cost_records_select ON public.cost_records FOR SELECT TO authenticated
  USING (user_id = (SELECT auth.uid()));
DROP POLICY IF EXISTS lorayard_notifications_select ON public.notifications;
CREATE POLICY lorayard_notifications_select ON public.notifications FOR SELECT TO authenticated
  USING (user_id = (SELECT auth.uid()));
DROP POLICY IF EXISTS lorayard_notifications_insert ON public.notifications;
CREATE POLICY lorayard_notifications_insert ON public.notifications FOR INSERT TO authenticated
  WITH CHECK (user_id = (SELECT auth.uid()));
DROP POLICY IF EXISTS lorayard_notifications_update ON public.notifications;
CREATE POLICY lorayard_notifications_update ON public.notifications FOR UPDATE TO authenticated
  USING (user_id = (SELECT auth.uid())) WITH CHECK (user_id = (SELECT auth.uid()));
DROP POLICY IF EXISTS lorayard_checkpoints_select ON public.checkpoints;
CREATE POLICY lorayard_checkpoints_select ON public.checkpoints FOR SELECT TO authenticated
  USING (user_id = (SELECT auth.uid()));
DROP POLICY IF EXISTS lorayard_job_logs_select ON public.job_logs;
CREATE POLICY lorayard_job_logs_select ON public.job_logs FOR SELECT TO authenticated
  USING (user_id = (SELECT auth.uid()));

-- Grants are explicit: new tables get none by themselves.
REVOKE ALL ON public.checkpoints, public.job_logs FROM PUBLIC, anon, authenticated;
REVOKE ALL ON public.datasets, public.training_jobs, public.metrics_points, public.model_artifacts,
  public.cost_records, public.notifications FROM anon;
GRANT SELECT, INSERT, UPDATE ON public.datasets TO authenticated;
GRANT SELECT, INSERT ON public.training_jobs TO authenticated;
REVOKE UPDATE, DELETE, TRUNCATE ON public.training_jobs FROM authenticated;
GRANT UPDATE (status, completed_at, final_cost, updated_at) ON public.training_jobs TO authenticated;
REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON public.metrics_points, public.cost_records FROM authenticated;
GRANT SELECT ON public.metrics_points, public.model_artifacts, public.cost_records, public.checkpoints, public.job_logs TO authenticated;
GRANT SELECT, INSERT, UPDATE ON public.notifications TO authenticated;
GRANT ALL ON public.datasets, public.training_jobs, public.metrics_points, public.model_artifacts,
  public.cost_records, public.notifications, public.checkpoints, public.job_logs TO service_role;

-- A row that a user inserts says what to train and on what; where the job
-- stands, what it cost and when it ran is never the user's to say.
CREATE OR REPLACE FUNCTION lorayard.guard_job_insert() RETURNS trigger
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
  IF current_user NOT IN ('authenticated', 'anon') THEN
    RETURN NEW;
  END IF;
  IF NOT EXISTS (SELECT 1 FROM public.datasets d
                 WHERE d.id = NEW.dataset_id AND d.user_id = NEW.user_id AND d.deleted_at IS NULL) THEN
    RAISE EXCEPTION 'data set % is not yours or does not exist: choose one of your own data sets', NEW.dataset_id
      USING ERRCODE = 'insufficient_privilege';
  END IF;
  NEW.status := 'queued';
  NEW.current_stage := 'queued';
  NEW.progress := 0;
  NEW.current_epoch := 0;
  NEW.current_step := 0;
  NEW.current_metrics := '{}';
  NEW.queued_at := now();
  NEW.started_at := NULL;
  NEW.completed_at := NULL;
  NEW.estimated_completion_at := NULL;
  NEW.current_cost := 0;
  NEW.final_cost := NULL;
  NEW.error_message := NULL;
  NEW.error_stack := NULL;
  NEW.retry_count := 0;
  NEW.external_job_id := NULL;
  NEW.artifact_id := NULL;
  NEW.created_at := now();
  NEW.updated_at := now();
  RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS lorayard_guard_insert ON public.training_jobs;
CREATE TRIGGER lorayard_guard_insert BEFORE INSERT ON public.training_jobs
  FOR EACH ROW EXECUTE FUNCTION lorayard.guard_job_insert();

-- Final statuses are absorbing, whoever writes. The app's cancel reads the row
-- and then updates it blindly; without this a completed job became cancelled.
CREATE OR REPLACE FUNCTION lorayard.guard_job_update() RETURNS trigger
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
  IF OLD.status IN ('completed', 'failed', 'cancelled') AND NEW.status IS DISTINCT FROM OLD.status THEN
    RAISE EXCEPTION 'job % is already %: a final status does not change', OLD.id, OLD.status
      USING ERRCODE = 'check_violation';
  END IF;
  IF current_user IN ('authenticated', 'anon') THEN
    -- A cancel; its time is the database's and its cost the ledger's.
    NEW.completed_at := now();
    NEW.final_cost := OLD.final_cost;
  END IF;
  NEW.updated_at := now();
  RETURN NEW;
END $$;
DROP TRIGGER IF EXISTS lorayard_guard_update ON public.training_jobs;
CREATE TRIGGER lorayard_guard_update BEFORE UPDATE ON public.training_jobs
  FOR EACH ROW EXECUTE FUNCTION lorayard.guard_job_update();

-- Whoever inserts a job or changes its status wakes the dispatcher; the
-- payload is the id alone. Progress does not notify.
CREATE OR REPLACE FUNCTION lorayard.notify_job() RETURNS trigger
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
  PERFORM pg_catalog.pg_notify('lorayard', 'job:' || NEW.id);
  RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS lorayard_notify_insert ON public.training_jobs;
CREATE TRIGGER lorayard_notify_insert AFTER INSERT ON public.training_jobs
  FOR EACH ROW EXECUTE FUNCTION lorayard.notify_job();
DROP TRIGGER IF EXISTS lorayard_notify_status ON public.training_jobs;
CREATE TRIGGER lorayard_notify_status AFTER UPDATE OF status ON public.training_jobs
  FOR EACH ROW WHEN (OLD.status IS DISTINCT FROM NEW.status) EXECUTE FUNCTION lorayard.notify_job();

CREATE OR REPLACE FUNCTION lorayard.notify_dataset() RETURNS trigger
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
  PERFORM pg_catalog.pg_notify('lorayard', 'dataset:' || NEW.id);
  RETURN NULL;
END $$;
DROP TRIGGER IF EXISTS lorayard_notify_dataset ON public.datasets;
CREATE TRIGGER lorayard_notify_dataset AFTER UPDATE OF status ON public.datasets
  FOR EACH ROW WHEN (NEW.status = 'validating' AND OLD.status IS DISTINCT FROM NEW.status)
  EXECUTE FUNCTION lorayard.notify_dataset();
