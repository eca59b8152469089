// Package storetest lends tests migrated databases of a real Postgres, inserts
// rows exactly as the app does, and checks the invariants that must hold after
// anything that happens to the system. Support only, never linked into a
// binary.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"lorayard/deploy"
	"lorayard/internal/devstack/services"
	"lorayard/internal/store"
)

const template = "lorayard_template"

// server is the cluster of this test process; Main starts and stops it.
type server struct {
	once sync.Once
	pg   *services.PG
	err  error

	mu sync.Mutex
	n  int
}

var shared server

// Main runs the tests of a package and stops the cluster after them.
func Main(m *testing.M) { os.Exit(Run(m)) }

// Run is Main for a package that has more to clean up: it returns the code to
// exit with.
func Run(m *testing.M) int {
	code := m.Run()
	if shared.pg != nil {
		if err := shared.pg.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
	}
	return code
}

func (s *server) start(ctx context.Context) error {
	s.once.Do(func() {
		s.err = func() error {
			var err error
			if s.pg, err = services.Postgres(ctx, services.PostgresConfig{}); err != nil {
				return err
			}
			url, err := s.pg.Database(ctx, template, "")
			if err != nil {
				return err
			}
			ms, err := store.Migrations(deploy.Migrations)
			if err != nil {
				return err
			}
			st, err := store.Open(ctx, url, store.Options{Name: "storetest"})
			if err != nil {
				return err
			}
			defer st.Close()
			_, err = st.Migrate(ctx, ms, deploy.StandIns)
			return err
		}()
	})
	return s.err
}

// DB is one database.
type DB struct {
	URL   string
	Store *store.Store
	Pool  *pgxpool.Pool // as the owner, for looking behind the curtain
	t     testing.TB
}

// New lends a migrated database of its own to a test. Without Postgres the test is
// skipped, except with CI=true.
func New(t testing.TB) *DB {
	t.Helper()
	return open(t, lend(t, template))
}

// Empty lends a database with nothing in it.
func Empty(t testing.TB) *DB {
	t.Helper()
	return open(t, lend(t, ""))
}

func open(t testing.TB, url string) *DB {
	t.Helper()
	ctx := context.Background()
	st, err := store.Open(ctx, url, store.Options{Name: t.Name()})
	if err != nil {
		t.Fatal(err)
	}
	pool, err := pgxpool.New(ctx, url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		pool.Close()
		st.Close()
	})
	return &DB{URL: url, Store: st, Pool: pool, t: t}
}

// lend makes a copy of a database for the time of a test.
func lend(t testing.TB, of string) (url string) {
	t.Helper()
	ctx := context.Background()
	if err := shared.start(ctx); err != nil {
		if errors.Is(err, services.ErrMissing) && os.Getenv("CI") != "true" {
			t.Skip(err)
		}
		t.Fatal(err)
	}
	shared.mu.Lock()
	defer shared.mu.Unlock() // one copy at a time
	shared.n++
	name := fmt.Sprintf("test_%d", shared.n)
	url, err := shared.pg.Database(ctx, name, of)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := shared.pg.Drop(ctx, name); err != nil {
			t.Error(err)
		}
	})
	return url
}

// Exec runs SQL as the owner.
func (d *DB) Exec(sql string, args ...any) {
	d.t.Helper()
	if _, err := d.Pool.Exec(context.Background(), sql, args...); err != nil {
		d.t.Fatalf("%s: %v", sql, err)
	}
}

// Text reads one value as Postgres prints it; NULL is empty.
func (d *DB) Text(sql string, args ...any) string {
	d.t.Helper()
	var s *string
	if err := d.Pool.QueryRow(context.Background(), sql, append([]any{pgx.QueryExecModeSimpleProtocol}, args...)...).Scan(&s); err != nil {
		d.t.Fatalf("%s: %v", sql, err)
	}
	if s == nil {
		return ""
	}
	return *s
}

// User makes a user and returns its id.
func (d *DB) User() string {
	d.t.Helper()
	return d.Text(`INSERT INTO auth.users DEFAULT VALUES RETURNING id`)
}

// As runs f in a transaction as the signed-in user, the way PostgREST does:
// role authenticated and the JWT's claims.
func (d *DB) As(user string, f func(pgx.Tx) error) error {
	return As(context.Background(), d.Pool, user, f)
}

// As is DB.As for any pool whose login may become role authenticated.
func As(ctx context.Context, pool *pgxpool.Pool, user string, f func(pgx.Tx) error) error {
	return pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SELECT set_config('request.jwt.claims', jsonb_build_object('sub', $1::text, 'role', 'authenticated')::text, true)`, user); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `SET LOCAL ROLE authenticated`); err != nil {
			return err
		}
		return f(tx)
	})
}

// Dataset inserts a validated data set as the app does and returns its id.
func (d *DB) Dataset(user string) string {
	d.t.Helper()
	return d.Text(`INSERT INTO datasets (user_id, name, storage_path, file_name, file_size, status, training_ready)
		VALUES ($1::uuid, 'workshop talks', $1 || '/' || gen_random_uuid() || '/train.jsonl', 'train.jsonl', 1000, 'ready', true) RETURNING id`, user)
}

// InsertJob is the app's own statement: these keys and no others.
const InsertJob = `
	INSERT INTO training_jobs (user_id, dataset_id, preset_id, hyperparameters, gpu_config, status,
		current_stage, progress, current_epoch, total_epochs, current_step, total_steps, current_metrics, current_cost, estimated_total_cost)
	VALUES ($1, $2, $3, $4, $5, 'queued', 'queued', 0, 0, 3, 0, 120, '{}', 0, 2.50) RETURNING id::text`

// Hyperparameters and GPUConfig are what the app sends for preset balanced.
const (
	Hyperparameters = `{"learning_rate": 5e-5, "batch_size": 4, "epochs": 3, "rank": 16, "alpha": 32, "dropout": 0.1}`
	GPUConfig       = `{"type": "A100-80GB", "count": 1}`
)

// Job inserts a job as the signed-in user and returns its id.
func (d *DB) Job(user, dataset string) string {
	d.t.Helper()
	var id string
	err := d.As(user, func(tx pgx.Tx) error {
		return tx.QueryRow(context.Background(), InsertJob, user, dataset, "balanced", Hyperparameters, GPUConfig).Scan(&id)
	})
	if err != nil {
		d.t.Fatal(err)
	}
	return id
}

// Settled yields the id of each job as it is settled by its attempt, from now
// until ctx ends.
func (d *DB) Settled(ctx context.Context) <-chan string {
	d.t.Helper()
	out := make(chan string, 1<<16)
	listening := make(chan struct{})
	go func() {
		defer close(out)
		first := true
		_ = d.Store.Listen(ctx, func(payload string) {
			if first {
				close(listening)
				first = false
			}
			if id, ok := strings.CutPrefix(payload, "settled:"); ok {
				out <- id
			}
		})
	}()
	<-listening
	return out
}
