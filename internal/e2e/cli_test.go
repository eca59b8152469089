package e2e_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"lorayard/deploy"
	"lorayard/internal/storetest"
)

// cli returns how to run the supabase CLI on a directory that is a project's
// with our first n migrations; all of them when n is negative. It returns the
// command's standard output.
func cli(t *testing.T, n int) func(args ...string) string {
	t.Helper()
	arch := map[string]string{"amd64": "x64"}[runtime.GOARCH]
	bin := filepath.Join(appTools(t), "node_modules", "@supabase", "cli-"+runtime.GOOS+"-"+arch, "bin", "supabase")
	if _, err := os.Stat(bin); err != nil {
		t.Skipf("npm has no supabase CLI for this machine: %v", err)
	}
	dir := t.TempDir()
	to := filepath.Join(dir, "supabase", "migrations")
	if err := os.MkdirAll(to, 0o755); err != nil {
		t.Fatal(err)
	}
	names, err := fs.Glob(deploy.Migrations, "supabase/migrations/*.sql")
	if err != nil || len(names) == 0 {
		t.Fatalf("%d migrations: %v", len(names), err)
	}
	if n >= 0 {
		names = names[:n]
	}
	for _, name := range names {
		raw, err := fs.ReadFile(deploy.Migrations, name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(to, path.Base(name)), raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return func(args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, bin, append([]string{"--workdir", dir, "--yes"}, args...)...)
		cmd.Env = []string{"HOME=" + dir, "DO_NOT_TRACK=1", "SUPABASE_TELEMETRY_DISABLED=1", "PATH=" + os.Getenv("PATH")}
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := cmd.Run(); err != nil {
			t.Fatalf("supabase %s: %v\n%s\n%s", strings.Join(args, " "), err, out.Bytes(), errs.Bytes())
		}
		return out.String() + errs.String()
	}
}

// push is `supabase db push`.
func push(t *testing.T, n int, database string) string {
	t.Helper()
	return cli(t, n)("db", "push", "--remote="+remote(t, database))
}

// remote is a database's URL in the scheme that the CLI knows it by.
func remote(t *testing.T, database string) string {
	t.Helper()
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	u.Scheme = "postgresql"
	return u.String()
}

// migrate is `dispatcher migrate`.
func migrate(t *testing.T, database string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "dispatcher"), "migrate")
	cmd.Env = []string{"DATABASE_URL=" + database}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("dispatcher migrate: %v\n%s", err, out)
	}
	return string(out)
}

// schema is everything that migrations make, one line for each thing.
func schema(t *testing.T, database string) map[string]bool {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	rows, err := conn.Query(t.Context(), `
		WITH ours AS (SELECT oid FROM pg_namespace WHERE nspname IN ('public', 'lorayard'))
		SELECT concat_ws(' ', 'function', p.oid::regprocedure, md5(p.prosrc), p.prosecdef, p.proconfig, p.proacl) FROM pg_proc p WHERE p.pronamespace IN (SELECT oid FROM ours)
		UNION ALL SELECT concat_ws(' ', 'relation', c.oid::regclass, c.relkind, c.relrowsecurity, c.relacl) FROM pg_class c WHERE c.relnamespace IN (SELECT oid FROM ours) AND c.relkind <> 'i'
		UNION ALL SELECT concat_ws(' ', 'column', a.attrelid::regclass, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid), a.attacl)
			FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
			WHERE c.relnamespace IN (SELECT oid FROM ours) AND c.relkind = 'r' AND a.attnum > 0
		UNION ALL SELECT concat_ws(' ', 'index', pg_get_indexdef(i.indexrelid)) FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid WHERE c.relnamespace IN (SELECT oid FROM ours)
		UNION ALL SELECT concat_ws(' ', 'constraint', c.conrelid::regclass, c.conname, pg_get_constraintdef(c.oid)) FROM pg_constraint c WHERE c.connamespace IN (SELECT oid FROM ours)
		UNION ALL SELECT concat_ws(' ', 'trigger', pg_get_triggerdef(t.oid)) FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid WHERE c.relnamespace IN (SELECT oid FROM ours) AND NOT t.tgisinternal
		UNION ALL SELECT concat_ws(' ', 'policy', schemaname, tablename, policyname, permissive, roles, cmd, qual, with_check) FROM pg_policies`)
	if err != nil {
		t.Fatal(err)
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]bool{}
	for _, l := range lines {
		all[l] = true
	}
	return all
}

// Whoever brings a database up to date, in whatever order, the other finds
// nothing to do, and the schema is the same.
func TestPushAndMigrateAreInterchangeable(t *testing.T) {
	appTools(t)
	migrated := storetest.New(t).URL
	want := schema(t, migrated)
	if out := push(t, -1, migrated); !strings.Contains(out, "up to date") {
		t.Errorf("push after migrate: %s", out)
	}

	// The CLI first, and the dispatcher from the middle on.
	for _, n := range []int{-1, 5} {
		database := storetest.Empty(t).URL
		conn, err := pgx.Connect(t.Context(), database)
		if err != nil {
			t.Fatal(err)
		}
		_, err = conn.PgConn().Exec(t.Context(), deploy.StandIns).ReadAll()
		_ = conn.Close(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		push(t, n, database)
		switch out := migrate(t, database); {
		case n < 0 && !strings.Contains(out, "up to date"):
			t.Errorf("migrate after push: %s", out)
		case n >= 0 && !strings.Contains(out, "applied"):
			t.Errorf("migrate after a push of %d: %s", n, out)
		}
		got := schema(t, database)
		for line := range want {
			if !got[line] {
				t.Errorf("after a push of %d this is missing: %s", n, line)
			}
		}
		for line := range got {
			if !want[line] {
				t.Errorf("after a push of %d this is more: %s", n, line)
			}
		}
	}

	// As the owner of a hosted project, who is no superuser.
	owner := hosted(t, storetest.Empty(t).URL)
	push(t, -1, owner)
	if out := migrate(t, owner); !strings.Contains(out, "up to date") {
		t.Errorf("migrate after the owner's push: %s", out)
	}
}

// finding is one line of `supabase db advisors`, which a hosted project's
// dashboard shows too.
type finding struct{ Level, Name, Detail string }

func advise(t *testing.T, database string) []finding {
	t.Helper()
	out := cli(t, 0)("db", "advisors", "--remote="+remote(t, database), "--output-format", "json", "--level", "warn", "--fail-on", "none")
	var report struct{ Results []finding }
	start := strings.Index(out, "{")
	if start < 0 {
		t.Fatalf("the advisors said %q", out)
	}
	if err := json.NewDecoder(strings.NewReader(out[start:])).Decode(&report); err != nil {
		t.Fatalf("read what the advisors said: %v\n%s", err, out)
	}
	return report.Results
}

func TestTheAdvisorsFindNothing(t *testing.T) {
	db := storetest.New(t)
	for _, f := range advise(t, db.URL) {
		t.Errorf("%s %s: %s", f.Level, f.Name, f.Detail)
	}
	// They do look.
	db.Exec(`CREATE TABLE public.open (id integer PRIMARY KEY); GRANT SELECT ON public.open TO anon`)
	if got := advise(t, db.URL); len(got) != 1 || got[0].Level != "ERROR" || got[0].Name != "rls_disabled_in_public" {
		t.Errorf("of an open table the advisors say %v", got)
	}
}
