package e2e_test

import (
	"context"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// What the stack is run with must be found nowhere that somebody else reads:
// no row, no metric, no log, no file of an agent, no command line.
func TestNoSecretIsWrittenDown(t *testing.T) {
	s := start(t, dry(30, 20*time.Millisecond)...)
	s.fakeModel()
	parts := map[string]string{"dispatcher": s.dispatcher("dispatcher").OpsURL(), "host-1": s.agent("host-1").OpsURL()}
	user, data := s.dataset(s.write("talks.jsonl", strings.Repeat(oneTalk, 20)))
	good := s.insert(user, data, nil)
	bad := s.insert(user, data, map[string]any{"rank": -1})
	s.status(bad, "failed")
	s.until("training", `SELECT current_step > 2 FROM training_jobs WHERE id = $1`, good)
	secrets := map[string]string{
		"the Storage key": s.SupabaseKey, "the JWT secret": s.JWTSecret, "the owner's password": password(s.DatabaseURL),
		"the dispatcher's password": password(s.DispatcherURL()), "the agent's password": password(s.AgentURL()), "the password of Redis": password(s.RedisURL),
	}
	look := func(where, text string) {
		for name, secret := range secrets {
			if secret == "" {
				t.Fatalf("%s is empty", name)
			}
			if strings.Contains(text, secret) {
				t.Errorf("%s is in %s", name, where)
			}
		}
	}
	for part, url := range parts {
		for _, path := range []string{"/metrics", "/healthz", "/readyz", "/debug/pprof/cmdline"} {
			resp, err := http.Get(url + path)
			s.must(err)
			body, err := io.ReadAll(resp.Body)
			s.must(err)
			resp.Body.Close()
			look(path+" of the "+part, string(body))
		}
	}
	cmdlines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	s.must(err)
	for _, path := range cmdlines {
		if raw, err := os.ReadFile(path); err == nil {
			look("the command line "+strings.ReplaceAll(string(raw), "\x00", " "), string(raw))
		}
	}
	files := 0
	read := func(path string) {
		raw, err := os.ReadFile(path)
		s.must(err)
		look(path, string(raw))
		files++
	}
	s.must(filepath.WalkDir(filepath.Join(s.Dir, "host-1"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			if raw, err := os.ReadFile(path); err == nil { // an attempt's files come and go
				look(path, string(raw))
				files++
			}
		}
		return nil
	}))
	s.status(good, "completed")
	logs, err := filepath.Glob(filepath.Join(s.Dir, "*.log"))
	s.must(err)
	for _, path := range logs {
		read(path)
	}
	if files < 5 {
		t.Errorf("only %d files were read", files)
	}
	rows, err := s.Pool.Query(context.Background(), `SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE c.relkind = 'r' AND n.nspname IN ('public', 'lorayard', 'auth', 'supabase_migrations')`)
	s.must(err)
	tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
	s.must(err)
	for _, table := range tables {
		look("table "+table, s.text(`SELECT coalesce(string_agg(x::text, E'\n'), '') FROM `+table+` x`))
	}
	if len(tables) < 15 {
		t.Errorf("only %d tables were read", len(tables))
	}
}
