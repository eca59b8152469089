package store_test

import (
	"testing"

	"github.com/jackc/pgx/v5"

	"lorayard/deploy"
	"lorayard/internal/store"
	"lorayard/internal/storetest"
)

// rerun runs a migration by its name on a database that has seen it.
func rerun(t *testing.T, db *storetest.DB, name string) {
	t.Helper()
	ms, err := store.Migrations(deploy.Migrations)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range ms {
		if m.Name == name {
			db.Exec(m.SQL)
			return
		}
	}
	t.Fatalf("no migration is named %s", name)
}

// Of Storage and Realtime a project has these, as far as the migration touches
// them.
const likeAProject = `
	CREATE SCHEMA storage;
	GRANT USAGE ON SCHEMA storage TO authenticated, anon;
	CREATE TABLE storage.buckets (id text PRIMARY KEY, name text NOT NULL UNIQUE, public boolean DEFAULT false, file_size_limit bigint);
	CREATE TABLE storage.objects (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), bucket_id text REFERENCES storage.buckets, name text);
	ALTER TABLE storage.objects ENABLE ROW LEVEL SECURITY;
	GRANT ALL ON storage.objects TO authenticated, anon;
	INSERT INTO storage.buckets (id, name, file_size_limit) VALUES ('lora-models', 'lora-models', 52428800);
	CREATE PUBLICATION supabase_realtime`

func TestAProjectGetsBucketsAPolicyAndOnePublishedTable(t *testing.T) {
	db := storetest.New(t)
	db.Exec(likeAProject)
	for range 2 {
		rerun(t, db, "project")
	}
	if got := db.Text(`SELECT string_agg(id || ' ' || public || ' ' || file_size_limit, ', ' ORDER BY id) FROM storage.buckets`); got != "lora-datasets false 524288000, lora-models false 52428800, training-files false 524288000" {
		t.Errorf("buckets: %s", got) // the limit of the one that was there stays
	}
	if got := db.Text(`SELECT string_agg(schemaname || '.' || tablename, ' ') FROM pg_publication_tables WHERE pubname = 'supabase_realtime'`); got != "public.training_jobs" {
		t.Errorf("published: %s", got)
	}

	a, b := db.User(), db.User()
	db.Exec(`INSERT INTO storage.objects (bucket_id, name) VALUES ('lora-models', $1 || '/x/adapter'), ('lora-models', $2 || '/x/adapter'),
		('lora-datasets', $1 || '/x/talks'), ('lora-models', 'x/' || $1 || '/adapter'), ('lora-models', $1 || 'x/y')`, a, b)
	err := db.As(a, func(tx pgx.Tx) error {
		var names string
		if err := tx.QueryRow(t.Context(), `SELECT coalesce(string_agg(bucket_id || ' ' || name, ', '), '') FROM storage.objects`).Scan(&names); err != nil {
			return err
		}
		if names != "lora-models "+a+"/x/adapter" {
			t.Errorf("a user sees %s", names)
		}
		for _, sql := range []string{`UPDATE storage.objects SET name = 'x'`, `DELETE FROM storage.objects`} {
			if tag, err := tx.Exec(t.Context(), sql); err != nil || tag.RowsAffected() != 0 {
				t.Errorf("%s: %v, %v", sql, tag, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if err := db.As(a, func(tx pgx.Tx) error {
		_, err := tx.Exec(t.Context(), `INSERT INTO storage.objects (bucket_id, name) VALUES ('lora-models', $1)`, a+"/mine")
		return err
	}); err == nil {
		t.Error("a user writes objects past the signed URLs")
	}
}

// An index of the app's own, by whatever name, is enough.
func TestForeignKeysAreCoveredOnce(t *testing.T) {
	db := storetest.New(t)
	db.Exec(`DROP INDEX cost_records_job_id_idx; CREATE INDEX theirs ON cost_records (job_id, recorded_at)`)
	rerun(t, db, "advisors")
	if got := db.Text(`SELECT to_regclass('public.cost_records_job_id_idx') IS NULL`); got != "t" {
		t.Error("a second index on cost_records (job_id)")
	}
	// Every foreign key of the tables that the app sees.
	if got := db.Text(`SELECT string_agg(c.conname, ' ') FROM pg_constraint c WHERE c.contype = 'f' AND c.connamespace = 'public'::regnamespace
		AND NOT EXISTS (SELECT 1 FROM pg_index i WHERE i.indrelid = c.conrelid AND i.indkey[0] = c.conkey[1])`); got != "" {
		t.Errorf("without an index: %s", got)
	}
}
