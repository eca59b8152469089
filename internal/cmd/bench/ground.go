package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"lorayard/deploy"
	"lorayard/internal/devstack/services"
	"lorayard/internal/store"
	"lorayard/internal/storetest"
)

// ground is a Postgres and a Redis as they are run in earnest: a commit is on
// the disk.
type ground struct {
	pg    *services.PG
	redis *services.RedisServer
	// profile is the directory for what took Postgres's time; empty: unknown.
	profile string
	n       int
}

const template = "bench_template"

// model is the one base model of every agent.
const model = "bench/model"

// open starts both. With profile Postgres counts what each statement takes,
// which slows it down a little.
func open(ctx context.Context, profile string) (_ *ground, err error) {
	g := &ground{profile: profile}
	defer func() {
		if err != nil {
			g.close()
		}
	}()
	conf := services.PostgresConfig{Durable: true}
	if profile != "" {
		conf.Settings = []string{"shared_preload_libraries=pg_stat_statements", "pg_stat_statements.track=all", "track_io_timing=on"}
	}
	if g.pg, err = services.Postgres(ctx, conf); err != nil {
		return nil, err
	}
	if g.redis, err = services.Redis(ctx, services.RedisConfig{Real: true, AppendOnly: true}); err != nil {
		return nil, err
	}
	url, err := g.pg.Database(ctx, template, "")
	if err != nil {
		return nil, err
	}
	ms, err := store.Migrations(deploy.Migrations)
	if err != nil {
		return nil, err
	}
	st, err := store.Open(ctx, url, store.Options{Name: "bench"})
	if err != nil {
		return nil, err
	}
	defer st.Close()
	if _, err := st.Migrate(ctx, ms, deploy.StandIns); err != nil {
		return nil, err
	}
	if profile == "" {
		return g, nil
	}
	pool, err := pgxpool.New(ctx, url)
	if err != nil {
		return nil, err
	}
	defer pool.Close()
	_, err = pool.Exec(ctx, `CREATE EXTENSION pg_stat_statements SCHEMA extensions`)
	return g, err
}

func (g *ground) close() {
	if g.redis != nil {
		_ = g.redis.Stop() // thrown away
	}
	if g.pg != nil {
		_ = g.pg.Stop()
	}
}

// field is a database of one benchmark, and the empty Redis.
type field struct {
	*ground
	name, url string
	pool      *pgxpool.Pool // as the owner
}

func (g *ground) lend(ctx context.Context) (*field, error) {
	g.n++
	f := &field{ground: g, name: fmt.Sprintf("bench_%d", g.n)}
	var err error
	if f.url, err = g.pg.Database(ctx, f.name, template); err != nil {
		return nil, err
	}
	if err := g.redis.FlushAll(ctx); err != nil {
		return nil, err
	}
	if f.pool, err = pgxpool.New(ctx, f.url); err != nil {
		return nil, err
	}
	return f, nil
}

// statements says what took most of Postgres's time since it was last asked,
// functions' inner statements on lines of their own.
func (f *field) statements(ctx context.Context) (string, error) {
	rows, err := f.pool.Query(ctx, `
		SELECT format('%8s ms %7s calls %8s ms each  %s %s', round(total_exec_time), calls, round(mean_exec_time::numeric, 3), CASE WHEN toplevel THEN '' ELSE '(inner)' END,
		  left(regexp_replace(query, '\s+', ' ', 'g'), 150))
		FROM extensions.pg_stat_statements WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database())
		ORDER BY total_exec_time DESC LIMIT 40`)
	if err != nil {
		return "", fmt.Errorf("read statements: %w", err)
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return "", fmt.Errorf("read statements: %w", err)
	}
	return strings.Join(lines, "\n") + "\n", nil
}

// done checks what must hold after everything, and drops the database.
func (f *field) done(ctx context.Context) error {
	if f.profile != "" {
		text, err := f.statements(ctx)
		if err == nil {
			err = os.WriteFile(filepath.Join(f.profile, f.name+".statements.txt"), []byte(text), 0o644)
		}
		if err != nil {
			return err
		}
	}
	// What was written in a minute is unknown to the planner, and notifications
	// have no index by job: the questions would take longer than the benchmark.
	if _, err := f.pool.Exec(ctx, `CREATE INDEX ON notifications ((metadata ->> 'job_id')); ANALYZE`); err != nil {
		return fmt.Errorf("prepare for the invariants: %w", err)
	}
	bad, err := storetest.Violations(ctx, f.pool)
	if len(bad) > 0 {
		err = errors.Join(err, fmt.Errorf("invariants do not hold: %s", strings.Join(bad, "; ")))
	}
	f.pool.Close()
	return errors.Join(err, f.pg.Drop(ctx, f.name))
}

// user makes a user with a data set.
func (f *field) user(ctx context.Context) (user, dataset string, err error) {
	err = f.pool.QueryRow(ctx, `WITH u AS (INSERT INTO auth.users DEFAULT VALUES RETURNING id)
		INSERT INTO datasets (user_id, name, storage_path, file_name, file_size, status, training_ready)
		SELECT id, 'talks', id || '/train.jsonl', 'train.jsonl', 1000, 'ready', true FROM u RETURNING user_id::text, id::text`).Scan(&user, &dataset)
	if err != nil {
		err = fmt.Errorf("make a user: %w", err)
	}
	return user, dataset, err
}

// insertTimed puts one job in as the app does; began is when its INSERT is sent.
func (f *field) insertTimed(ctx context.Context, user, dataset string) (began time.Time, id string, err error) {
	err = storetest.As(ctx, f.pool, user, func(tx pgx.Tx) error {
		began = time.Now()
		return tx.QueryRow(ctx, storetest.InsertJob, user, dataset, "balanced", storetest.Hyperparameters, storetest.GPUConfig).Scan(&id)
	})
	if err != nil {
		err = fmt.Errorf("insert a job: %w", err)
	}
	return began, id, err
}

// insertMany puts n jobs in, in one transaction.
func (f *field) insertMany(ctx context.Context, user, dataset string, n int) error {
	err := storetest.As(ctx, f.pool, user, func(tx pgx.Tx) error {
		b := &pgx.Batch{}
		for range n {
			b.Queue(storetest.InsertJob, user, dataset, "balanced", storetest.Hyperparameters, storetest.GPUConfig)
		}
		return tx.SendBatch(ctx, b).Close()
	})
	if err != nil {
		err = fmt.Errorf("insert %d jobs: %w", n, err)
	}
	return err
}

// await takes n settlements.
func await(ctx context.Context, settled <-chan struct{}, n int, patience time.Duration) error {
	late := time.NewTimer(patience)
	defer late.Stop()
	for i := range n {
		select {
		case <-settled:
		case <-late.C:
			return fmt.Errorf("%d of %d jobs were settled in %v", i, n, patience)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}
