-- The tables of the app, as it describes them. On the app's own database they
-- exist already and nothing here changes them, but for the columns that the
-- app writes and its tables lack.

CREATE TABLE IF NOT EXISTS public.datasets (
  id                       uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id                  uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
  name                     varchar(200) NOT NULL,
  description              text,
  format                   varchar(50) NOT NULL DEFAULT 'brightrun_lora_v4',
  status                   varchar(50) NOT NULL DEFAULT 'uploading',
  storage_bucket           varchar(100) NOT NULL DEFAULT 'lora-datasets',
  storage_path             text NOT NULL UNIQUE,
  file_name                varchar(500) NOT NULL,
  file_size                bigint NOT NULL DEFAULT 0,
  total_training_pairs     integer,
  total_validation_pairs   integer,
  total_tokens             bigint,
  avg_turns_per_conversation numeric(10,2),
  avg_tokens_per_turn      numeric(10,2),
  training_ready           boolean NOT NULL DEFAULT false,
  validated_at             timestamptz,
  validation_errors        jsonb,
  sample_data              jsonb,
  created_at               timestamptz NOT NULL DEFAULT now(),
  updated_at               timestamptz NOT NULL DEFAULT now(),
  deleted_at               timestamptz
);
ALTER TABLE public.datasets ADD COLUMN IF NOT EXISTS error_message text;

CREATE TABLE IF NOT EXISTS public.training_jobs (
  id                      uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id                 uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
  dataset_id              uuid NOT NULL REFERENCES public.datasets (id) ON DELETE RESTRICT,
  preset_id               varchar(50) NOT NULL,
  hyperparameters         jsonb NOT NULL,
  gpu_config              jsonb NOT NULL,
  status                  varchar(50) NOT NULL DEFAULT 'queued',
  current_stage           varchar(50) NOT NULL DEFAULT 'queued',
  progress                numeric(5,2) NOT NULL DEFAULT 0,
  current_epoch           integer NOT NULL DEFAULT 0,
  total_epochs            integer NOT NULL,
  current_step            integer NOT NULL DEFAULT 0,
  total_steps             integer,
  current_metrics         jsonb NOT NULL DEFAULT '{}',
  queued_at               timestamptz NOT NULL DEFAULT now(),
  started_at              timestamptz,
  completed_at            timestamptz,
  estimated_completion_at timestamptz,
  current_cost            numeric(10,2) NOT NULL DEFAULT 0,
  estimated_total_cost    numeric(10,2) NOT NULL,
  final_cost              numeric(10,2),
  error_message           text,
  error_stack             text,
  retry_count             integer NOT NULL DEFAULT 0,
  external_job_id         varchar(255) UNIQUE,
  artifact_id             uuid,
  created_at              timestamptz NOT NULL DEFAULT now(),
  updated_at              timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE IF NOT EXISTS public.metrics_points (
  id              uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  job_id          uuid NOT NULL REFERENCES public.training_jobs (id) ON DELETE CASCADE,
  timestamp       timestamptz NOT NULL DEFAULT now(),
  epoch           integer NOT NULL,
  step            integer NOT NULL,
  training_loss   numeric(10,6) NOT NULL,
  validation_loss numeric(10,6),
  learning_rate   numeric(12,10) NOT NULL,
  gradient_norm   numeric(10,6),
  throughput      numeric(10,2),
  gpu_utilization numeric(5,2)
);

CREATE TABLE IF NOT EXISTS public.model_artifacts (
  id               uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id          uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
  job_id           uuid NOT NULL UNIQUE REFERENCES public.training_jobs (id) ON DELETE RESTRICT,
  dataset_id       uuid NOT NULL REFERENCES public.datasets (id) ON DELETE RESTRICT,
  name             varchar(200) NOT NULL,
  version          varchar(50) NOT NULL DEFAULT '1.0.0',
  description      text,
  status           varchar(50) NOT NULL DEFAULT 'stored',
  deployed_at      timestamptz,
  quality_metrics  jsonb NOT NULL DEFAULT '{}',
  training_summary jsonb NOT NULL DEFAULT '{}',
  configuration    jsonb NOT NULL DEFAULT '{}',
  artifacts        jsonb NOT NULL DEFAULT '{}',
  parent_model_id  uuid REFERENCES public.model_artifacts (id) ON DELETE SET NULL,
  created_at       timestamptz NOT NULL DEFAULT now(),
  updated_at       timestamptz NOT NULL DEFAULT now(),
  deleted_at       timestamptz
);

DO $$
BEGIN
  IF NOT EXISTS (
    SELECT 1 FROM pg_constraint
    WHERE conrelid = 'public.training_jobs'::regclass AND contype = 'f'
      AND confrelid = 'public.model_artifacts'::regclass
  ) THEN
    ALTER TABLE public.training_jobs ADD CONSTRAINT training_jobs_artifact_id_fkey
      FOREIGN KEY (artifact_id) REFERENCES public.model_artifacts (id) ON DELETE SET NULL;
  END IF;
END $$;

CREATE TABLE IF NOT EXISTS public.cost_records (
  id             uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id        uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
  job_id         uuid REFERENCES public.training_jobs (id) ON DELETE SET NULL,
  cost_type      varchar(50) NOT NULL,
  amount         numeric(10,2) NOT NULL,
  details        jsonb NOT NULL DEFAULT '{}',
  billing_period date NOT NULL,
  recorded_at    timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE IF NOT EXISTS public.notifications (
  id         uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id    uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
  type       varchar(50) NOT NULL,
  title      varchar(200) NOT NULL,
  message    text NOT NULL,
  priority   varchar(20) NOT NULL DEFAULT 'medium',
  read       boolean NOT NULL DEFAULT false,
  action_url text,
  metadata   jsonb NOT NULL DEFAULT '{}',
  created_at timestamptz NOT NULL DEFAULT now()
);

CREATE INDEX IF NOT EXISTS datasets_user_id_idx ON public.datasets (user_id, created_at DESC);
CREATE INDEX IF NOT EXISTS training_jobs_user_id_idx ON public.training_jobs (user_id, created_at DESC);
CREATE INDEX IF NOT EXISTS training_jobs_status_idx ON public.training_jobs (status, created_at);
CREATE INDEX IF NOT EXISTS metrics_points_job_time_idx ON public.metrics_points (job_id, timestamp);
CREATE INDEX IF NOT EXISTS model_artifacts_user_id_idx ON public.model_artifacts (user_id, created_at DESC);
CREATE INDEX IF NOT EXISTS cost_records_user_id_idx ON public.cost_records (user_id, recorded_at DESC);
CREATE INDEX IF NOT EXISTS notifications_user_id_idx ON public.notifications (user_id, created_at DESC);
