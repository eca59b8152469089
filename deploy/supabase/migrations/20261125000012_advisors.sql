-- What the supabase CLI's `db advisors` says of foreign keys: without an index
-- on the column that refers, removing a data set or a user reads whole tables.
-- The app's database may have such an index by another name.

DO $$
DECLARE
  r record;
BEGIN
  FOR r IN SELECT * FROM (VALUES
    ('training_jobs', 'dataset_id'),
    ('training_jobs', 'artifact_id'),
    ('model_artifacts', 'dataset_id'),
    ('model_artifacts', 'parent_model_id'),
    ('cost_records', 'job_id')
  ) AS x(tab, col) LOOP
    IF NOT EXISTS (
      SELECT 1 FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
      WHERE i.indrelid = ('public.' || r.tab)::regclass AND a.attname = r.col AND i.indpred IS NULL
    ) THEN
      EXECUTE format('CREATE INDEX %I ON public.%I (%I)', r.tab || '_' || r.col || '_idx', r.tab, r.col);
    END IF;
  END LOOP;
END $$;
