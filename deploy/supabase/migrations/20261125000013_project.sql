-- What only a Supabase project has: Storage and Realtime. Elsewhere nothing of
-- this does anything.

-- The app's buckets, where they are missing. The project's own limit for a file
-- goes first where it is lower.
DO $$
BEGIN
  IF to_regclass('storage.buckets') IS NULL THEN
    RETURN;
  END IF;
  INSERT INTO storage.buckets (id, name, public, file_size_limit) VALUES
    ('lora-datasets', 'lora-datasets', false, 524288000),
    ('training-files', 'training-files', false, 524288000),
    ('lora-models', 'lora-models', false, 5368709120)
  ON CONFLICT DO NOTHING;
EXCEPTION WHEN insufficient_privilege THEN
  RAISE WARNING 'may not make buckets: make lora-datasets, training-files and lora-models by hand, all private';
END $$;

-- A user reads models under a first folder that is the user's own id. Nobody
-- gets a policy to write: uploads go by URLs that the service signs.
DO $$
BEGIN
  IF to_regclass('storage.objects') IS NULL THEN
    RETURN;
  END IF;
  DROP POLICY IF EXISTS lorayard_models_select ON storage.objects;
  CREATE POLICY lorayard_models_select ON storage.objects FOR SELECT TO authenticated
    USING (bucket_id = 'lora-models' AND split_part(name, '/', 1) = (SELECT auth.uid())::text);
EXCEPTION WHEN insufficient_privilege THEN
  RAISE WARNING 'may not make policies of storage.objects: add one for SELECT on bucket lora-models, first folder = auth.uid()';
END $$;

-- Realtime authorises each change once for each subscriber, in one thread: only
-- jobs are published, and their rows change about once a second at most.
DO $$
BEGIN
  IF EXISTS (SELECT 1 FROM pg_publication WHERE pubname = 'supabase_realtime' AND NOT puballtables)
     AND NOT EXISTS (SELECT 1 FROM pg_publication_tables
                     WHERE pubname = 'supabase_realtime' AND schemaname = 'public' AND tablename = 'training_jobs') THEN
    ALTER PUBLICATION supabase_realtime ADD TABLE public.training_jobs;
  END IF;
EXCEPTION WHEN insufficient_privilege THEN
  RAISE WARNING 'may not publish training_jobs: add it to supabase_realtime by hand if the app subscribes to it';
END $$;
