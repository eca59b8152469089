-- Control state: what the dispatcher and the agents know about a job beyond
-- what the app shows. The schema is not exposed by PostgREST; the app's own
-- tables get no control columns.

CREATE SCHEMA IF NOT EXISTS lorayard;
REVOKE ALL ON SCHEMA lorayard FROM PUBLIC;

CREATE SCHEMA IF NOT EXISTS extensions;
CREATE EXTENSION IF NOT EXISTS btree_gist WITH SCHEMA extensions;

-- One row per GPU host. The lease is the agent's: one renewal a second carries
-- all its attempts. A new boot epoch means that the process is another one.
CREATE TABLE IF NOT EXISTS lorayard.agents (
  id            text PRIMARY KEY CHECK (id ~ '^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$'),
  boot          uuid NOT NULL,
  hostname      text NOT NULL DEFAULT '',
  version       text NOT NULL DEFAULT '',
  base_models   text[] NOT NULL DEFAULT '{}',
  draining      boolean NOT NULL DEFAULT false,  -- the agent itself takes nothing new
  cordoned      boolean NOT NULL DEFAULT false,  -- an operator said so
  lease_until   timestamptz NOT NULL,
  registered_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE IF NOT EXISTS lorayard.devices (
  uuid         text PRIMARY KEY,
  agent_id     text NOT NULL REFERENCES lorayard.agents (id) ON DELETE CASCADE,
  index        integer NOT NULL,
  name         text NOT NULL,
  class        text NOT NULL,
  memory_bytes bigint NOT NULL,
  pretend      boolean NOT NULL DEFAULT false,
  fault        text NOT NULL DEFAULT ''
);
CREATE INDEX IF NOT EXISTS devices_agent_idx ON lorayard.devices (agent_id);

-- Control state of a job. `state` is ours: queued → assigned → accepted →
-- settled, and back to queued when an attempt did not settle the job.
CREATE TABLE IF NOT EXISTS lorayard.jobs (
  job_id        uuid PRIMARY KEY REFERENCES public.training_jobs (id) ON DELETE CASCADE,
  user_id       uuid NOT NULL,
  spec          jsonb NOT NULL,
  state         text NOT NULL DEFAULT 'queued' CHECK (state IN ('queued', 'assigned', 'accepted', 'settled')),
  attempt       integer NOT NULL DEFAULT 0,  -- the fencing token; only an assignment increments it
  nonce         uuid,
  agent_id      text,
  devices       text[] NOT NULL DEFAULT '{}',
  desired       text NOT NULL DEFAULT 'run' CHECK (desired IN ('run', 'cancel', 'preempt')),
  send          integer NOT NULL DEFAULT 0,
  sent_at       timestamptz,
  assigned_at   timestamptz,
  not_before    timestamptz NOT NULL DEFAULT now(),
  failures      integer NOT NULL DEFAULT 0,  -- attempts that failed by the job's own doing
  losses        integer NOT NULL DEFAULT 0,  -- attempts that infrastructure lost
  publish_every integer NOT NULL DEFAULT 1,  -- every n-th step goes to metrics_points
  waiting       text NOT NULL DEFAULT '',    -- why it is not placed, in words
  admitted_at   timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS jobs_state_idx ON lorayard.jobs (state, admitted_at) WHERE state <> 'settled';
CREATE INDEX IF NOT EXISTS jobs_agent_idx ON lorayard.jobs (agent_id) WHERE state IN ('assigned', 'accepted');

CREATE TABLE IF NOT EXISTS lorayard.attempts (
  job_id      uuid NOT NULL REFERENCES lorayard.jobs (job_id) ON DELETE CASCADE,
  attempt     integer NOT NULL,
  nonce       uuid,
  agent_id    text NOT NULL,
  boot        uuid,
  devices     text[] NOT NULL,
  assigned_at timestamptz NOT NULL DEFAULT clock_timestamp(),
  accepted_at timestamptz,
  renewed_at  timestamptz,
  ended_at    timestamptz,
  outcome     text CHECK (outcome IN ('completed', 'failed', 'cancelled', 'handed_back', 'lost', 'not_accepted')),
  kind        text NOT NULL DEFAULT '',
  message     text NOT NULL DEFAULT '',
  resume_step integer NOT NULL DEFAULT 0,
  PRIMARY KEY (job_id, attempt)
);

-- Rates are the server's, effective-dated. What a client sends is not a rate.
CREATE TABLE IF NOT EXISTS lorayard.rates (
  class              text NOT NULL,
  effective_from     timestamptz NOT NULL,
  micro_usd_per_hour bigint NOT NULL CHECK (micro_usd_per_hour >= 0),
  PRIMARY KEY (class, effective_from)
);
INSERT INTO lorayard.rates (class, effective_from, micro_usd_per_hour) VALUES
  ('A100-80GB', '2020-01-01', 3500000),
  ('A100-40GB', '2020-01-01', 2800000),
  ('H100',      '2020-01-01', 4200000),
  ('V100-32GB', '2020-01-01', 2100000)
ON CONFLICT DO NOTHING;

-- GPU time of an attempt, one row per device and unbroken span; the end moves
-- with every renewal. No device has two owners at one instant.
CREATE TABLE IF NOT EXISTS lorayard.usage_intervals (
  job_id             uuid NOT NULL,
  attempt            integer NOT NULL,
  device             text NOT NULL,
  seq                integer NOT NULL DEFAULT 1,
  user_id            uuid NOT NULL,
  class              text NOT NULL,
  micro_usd_per_hour bigint NOT NULL,
  during             tstzrange NOT NULL,
  billable           boolean NOT NULL DEFAULT true,
  closed             boolean NOT NULL DEFAULT false,
  PRIMARY KEY (job_id, attempt, device, seq),
  CONSTRAINT usage_intervals_one_owner EXCLUDE USING gist (device extensions.gist_text_ops WITH =, during WITH &&)
);

-- Every measured step exactly as the trainer said it. metrics_points is the
-- app's view of it: fitted to its columns, one row per step.
CREATE TABLE IF NOT EXISTS lorayard.samples (
  job_id            uuid NOT NULL,
  attempt           integer NOT NULL,
  seq               bigint NOT NULL,
  at                timestamptz NOT NULL,
  step              integer NOT NULL,
  epoch             float8 NOT NULL,
  loss              float8 NOT NULL,
  validation_loss   float8,
  learning_rate     float8 NOT NULL,
  grad_norm         float8 NOT NULL,
  tokens_per_second float8 NOT NULL,
  skipped           boolean NOT NULL DEFAULT false,
  PRIMARY KEY (job_id, attempt, seq)
);

-- Checkpoints and log lines are tables that the app will read.
CREATE TABLE IF NOT EXISTS public.checkpoints (
  id              uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id         uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
  job_id          uuid NOT NULL REFERENCES public.training_jobs (id) ON DELETE CASCADE,
  attempt         integer NOT NULL,
  step            integer NOT NULL,
  epoch           numeric(10,4) NOT NULL,
  loss            numeric(10,6),
  bucket          text NOT NULL,
  path            text NOT NULL,
  size            bigint NOT NULL,
  manifest_sha256 text NOT NULL,
  files           jsonb NOT NULL,
  created_at      timestamptz NOT NULL DEFAULT now(),
  UNIQUE (job_id, attempt, step)
);
CREATE TABLE IF NOT EXISTS public.job_logs (
  id        uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  user_id   uuid NOT NULL REFERENCES auth.users (id) ON DELETE CASCADE,
  job_id    uuid NOT NULL REFERENCES public.training_jobs (id) ON DELETE CASCADE,
  attempt   integer NOT NULL,
  seq       bigint NOT NULL,
  timestamp timestamptz NOT NULL,
  level     text NOT NULL,
  message   text NOT NULL,
  metadata  jsonb NOT NULL DEFAULT '{}',
  UNIQUE (job_id, attempt, seq)
);
CREATE INDEX IF NOT EXISTS checkpoints_user_id_idx ON public.checkpoints (user_id, created_at DESC);
CREATE INDEX IF NOT EXISTS job_logs_user_id_idx ON public.job_logs (user_id);
CREATE INDEX IF NOT EXISTS job_logs_job_time_idx ON public.job_logs (job_id, timestamp, attempt, seq);
