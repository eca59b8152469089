package e2e_test

import (
	"bufio"
	"bytes"
	"context"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"lorayard/deploy"
	"lorayard/internal/storetest"
)

// appTools is the directory where scripts/setup put what comes from npm.
func appTools(t *testing.T) string {
	t.Helper()
	switch dir := os.Getenv("APP_TOOLS"); {
	case dir == "unreachable":
		t.Skip("scripts/setup did not reach npm's registry: no supabase-js, no supabase CLI")
	case dir != "":
		return dir
	case os.Getenv("CI") == "true":
		t.Fatal("APP_TOOLS is not set: run `make test`, which installs supabase-js and the supabase CLI")
	default:
		t.Skip("APP_TOOLS is not set: run `make test`")
	}
	return ""
}

// node prepares scripts/app, with its packages beside it, and returns how to
// run it.
func node(t *testing.T) func(ctx context.Context, env []string, args ...string) *exec.Cmd {
	t.Helper()
	tools := appTools(t)
	arch := map[string]string{"amd64": "x64"}[runtime.GOARCH]
	if arch == "" {
		arch = runtime.GOARCH
	}
	bin := filepath.Join(tools, "node_modules", "node-"+runtime.GOOS+"-"+arch, "bin", "node")
	if _, err := os.Stat(bin); err != nil {
		t.Skipf("npm has no Node 22 for this machine: %v", err)
	}
	dir := t.TempDir()
	if err := os.Symlink(filepath.Join(tools, "node_modules"), filepath.Join(dir, "node_modules")); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(dir, os.DirFS(filepath.Join("..", "..", "scripts", "app"))); err != nil {
		t.Fatal(err)
	}
	return func(ctx context.Context, env []string, args ...string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, bin, append([]string{filepath.Join(dir, "app.mjs")}, args...)...)
		cmd.Env = append([]string{"DO_NOT_TRACK=1", "HOME=" + dir}, env...)
		cmd.WaitDelay = 5 * time.Second
		return cmd
	}
}

// The app's own client library, its routes, its keys: from signing up to the
// downloaded adapter, and nothing of it for anybody else. What it does stands
// in scripts/app/app.mjs.
func TestTheAppWithSupabaseJS(t *testing.T) {
	app := node(t)
	database := storetest.Empty(t).URL
	// Its auth tables first: ours refer to them, and where they are the
	// stand-ins change nothing.
	if out, err := app(t.Context(), []string{"DATABASE_URL=" + database}, "schema").CombinedOutput(); err != nil {
		t.Fatalf("make the tables of auth: %v\n%s", err, out)
	}
	owner := hosted(t, database)

	s := startOn(t, owner, dry(60, 30*time.Millisecond)...)
	s.fakeModel()
	s.dispatcher("dispatcher")
	s.agent("host-1")

	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := app(ctx, []string{
		"DATABASE_URL=" + database, "STORAGE_URL=" + s.SupabaseURL, "JWT_SECRET=" + s.JWTSecret,
		"ANON_KEY=" + s.AnonKey(), "SERVICE_KEY=" + s.SupabaseKey,
	})
	out, err := cmd.StdoutPipe()
	s.must(err)
	var errs bytes.Buffer // also what the server thinks of each refusal
	cmd.Stderr = &errs
	s.must(cmd.Start())
	var last string
	for lines := bufio.NewScanner(out); lines.Scan(); {
		last = lines.Text()
		t.Log(last)
	}
	if err := cmd.Wait(); err != nil || !strings.HasSuffix(last, "done") {
		t.Fatalf("the app ended after %q: %v\n%s", last, err, errs.Bytes())
	}
}

// hosted makes a database like that of a hosted project and returns its URL for
// the project's owner, who is no superuser there: what migrates has the rights
// that postgres has, and the functions run with them.
func hosted(t *testing.T, database string) (owner string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	name := "owner_" + strings.TrimPrefix(u.Path, "/")
	for _, sql := range []string{
		`DROP SCHEMA IF EXISTS supabase_migrations CASCADE`, // lite makes one
		deploy.StandIns,
		`CREATE ROLE ` + name + ` LOGIN CREATEROLE BYPASSRLS PASSWORD 'owner'`,
		`ALTER DATABASE ` + strings.TrimPrefix(u.Path, "/") + ` OWNER TO ` + name,
		`GRANT USAGE ON SCHEMA auth TO ` + name,
		`GRANT REFERENCES, SELECT ON auth.users TO ` + name,
	} {
		if _, err := conn.PgConn().Exec(t.Context(), sql).ReadAll(); err != nil {
			t.Fatalf("%s: %v", sql, err)
		}
	}
	u.User = url.UserPassword(name, "owner")
	return u.String()
}
