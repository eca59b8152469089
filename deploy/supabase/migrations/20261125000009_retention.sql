-- What is left of attempts in Storage is swept some time after them.
ALTER TABLE lorayard.attempts
  ADD COLUMN IF NOT EXISTS swept       boolean NOT NULL DEFAULT false,
  ADD COLUMN IF NOT EXISTS sweep_after timestamptz;  -- a dispatcher is at it until then
CREATE INDEX IF NOT EXISTS attempts_unswept_idx ON lorayard.attempts (ended_at) WHERE NOT swept AND ended_at IS NOT NULL;
