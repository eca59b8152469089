package store

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"

	"github.com/jackc/pgx/v5"
)

// Migration is one file of the migrations directory.
type Migration struct {
	Version, Name, SQL string
}

var migrationName = regexp.MustCompile(`^([0-9]{14})_(.+)\.sql$`)

// migrationLock keeps two dispatchers from migrating at once.
const migrationLock = 0x6c6f7261 // "lora"

// Migrations reads every migration of dir in the order of their versions.
func Migrations(dir fs.FS) ([]Migration, error) {
	var ms []Migration
	err := fs.WalkDir(dir, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		m := migrationName.FindStringSubmatch(d.Name())
		if m == nil {
			return fmt.Errorf("%s is not named <14 digits>_<name>.sql", path)
		}
		raw, err := fs.ReadFile(dir, path)
		if err != nil {
			return err
		}
		ms = append(ms, Migration{Version: m[1], Name: m[2], SQL: string(raw)})
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read migrations: %w", err)
	}
	slices.SortFunc(ms, func(a, b Migration) int {
		if a.Version < b.Version {
			return -1
		}
		return 1
	})
	return ms, nil
}

// The supabase CLI's own table, so that `supabase db push` and `dispatcher
// migrate` know of each other's work.
const createHistory = `
	CREATE SCHEMA IF NOT EXISTS supabase_migrations;
	CREATE TABLE IF NOT EXISTS supabase_migrations.schema_migrations (version text PRIMARY KEY, statements text[], name text)`

const (
	readHistory  = `SELECT version FROM supabase_migrations.schema_migrations`
	writeHistory = `INSERT INTO supabase_migrations.schema_migrations (version, name, statements) VALUES ($1, $2, $3)`
)

// Migrate applies every migration that the database has not seen, each in one
// transaction, and returns their versions. standIns, when not empty, is run
// first: it gives a database that is not Supabase what it lacks.
func (s *Store) Migrate(ctx context.Context, ms []Migration, standIns string) ([]string, error) {
	conn, err := pgx.ConnectConfig(ctx, s.session)
	if err != nil {
		return nil, fmt.Errorf("connect to migrate: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, `SELECT set_config('statement_timeout', '0', false), pg_advisory_lock($1)`, migrationLock); err != nil {
		return nil, fmt.Errorf("take the migration lock: %w", err)
	}
	if standIns != "" {
		if _, err := conn.PgConn().Exec(ctx, standIns).ReadAll(); err != nil {
			return nil, fmt.Errorf("create the stand-ins for Supabase Auth: %w", err)
		}
	}
	var supabase bool
	if err := conn.QueryRow(ctx, `SELECT to_regclass('auth.users') IS NOT NULL`).Scan(&supabase); err != nil {
		return nil, fmt.Errorf("look for auth.users: %w", err)
	}
	if !supabase {
		return nil, fmt.Errorf("the database has no table auth.users, so it is not a Supabase project: check DATABASE_URL, or add --stand-ins for a database of your own")
	}
	if _, err := conn.PgConn().Exec(ctx, createHistory).ReadAll(); err != nil {
		return nil, fmt.Errorf("create the history table: %w", err)
	}
	rows, err := conn.Query(ctx, readHistory)
	if err != nil {
		return nil, fmt.Errorf("read the history: %w", err)
	}
	done, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, fmt.Errorf("read the history: %w", err)
	}
	var applied []string
	for _, m := range ms {
		if slices.Contains(done, m.Version) {
			continue
		}
		err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if _, err := tx.Conn().PgConn().Exec(ctx, m.SQL).ReadAll(); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, writeHistory, m.Version, m.Name, []string{m.SQL})
			return err
		})
		if err != nil {
			return applied, fmt.Errorf("apply migration %s_%s: %w", m.Version, m.Name, err)
		}
		applied = append(applied, m.Version)
	}
	return applied, nil
}

// CheckSchema reports what is missing of the schema: migrations that were not
// applied, tables that the app can see without row level security.
func (s *Store) CheckSchema(ctx context.Context, ms []Migration) error {
	var have bool
	if err := s.pool.QueryRow(ctx, `SELECT to_regclass('supabase_migrations.schema_migrations') IS NOT NULL`).Scan(&have); err != nil {
		return fmt.Errorf("look for the history table: %w", err)
	}
	if !have {
		return fmt.Errorf("the database is not migrated: run `dispatcher migrate`")
	}
	rows, err := s.pool.Query(ctx, readHistory)
	if err != nil {
		return fmt.Errorf("read the history: %w", err)
	}
	done, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("read the history: %w", err)
	}
	for _, m := range ms {
		if !slices.Contains(done, m.Version) {
			return fmt.Errorf("migration %s_%s is missing: run `dispatcher migrate`", m.Version, m.Name)
		}
	}
	rows, err = s.pool.Query(ctx, openTables)
	if err != nil {
		return fmt.Errorf("check row level security: %w", err)
	}
	open, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return fmt.Errorf("check row level security: %w", err)
	}
	if len(open) > 0 {
		return fmt.Errorf("row level security is off on %v: everybody signed in can read them; enable it before serving", open)
	}
	return nil
}

const otherWriter = `
	SELECT t.id::text, t.external_job_id FROM public.training_jobs t
	WHERE t.external_job_id IS NOT NULL AND t.status IN ('queued', 'initializing', 'running') AND t.updated_at > clock_timestamp() - interval '2 minutes'
	LIMIT 1`

// CheckAlone reports whether something else runs the app's jobs: the cron
// functions that this system replaces give each job an external_job_id and
// write its row every half minute.
func (s *Store) CheckAlone(ctx context.Context) error {
	var id, external string
	err := s.pool.QueryRow(ctx, otherWriter).Scan(&id, &external)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil
	case err != nil:
		return fmt.Errorf("look for another writer: %w", err)
	}
	return fmt.Errorf("job %s was forwarded elsewhere (external_job_id %s) and written within the last two minutes: the app's old cron functions are at work; stop them (process jobs, validate data sets, create model artifacts), let their jobs end or cancel them, then start this dispatcher", id, external)
}

const openTables = `
	SELECT c.relname::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
	WHERE n.nspname = 'public' AND c.relkind = 'r' AND NOT c.relrowsecurity
	  AND c.relname IN ('datasets', 'training_jobs', 'metrics_points', 'model_artifacts', 'cost_records', 'notifications', 'checkpoints', 'job_logs')
	ORDER BY c.relname`
