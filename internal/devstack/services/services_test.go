package services_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"golang.org/x/sys/unix"

	"lorayard/internal/devstack/services"
)

// TestMain lets the test binary play the parent that is killed with its
// servers running.
func TestMain(m *testing.M) {
	if os.Getenv("SERVICES_TEST_PARENT") != "" {
		os.Exit(parent())
	}
	os.Exit(m.Run())
}

func parent() int {
	ctx := context.Background()
	pg, err := services.Postgres(ctx, services.PostgresConfig{})
	if err != nil {
		fmt.Println("err", err)
		return 1
	}
	rd, err := services.Redis(ctx, services.RedisConfig{Real: true})
	if err != nil {
		fmt.Println("err", err)
		return 1
	}
	fmt.Println("up", pg.URL(), rd.Addr(), pg.Dir(), filepath.Dir(rd.Log()))
	select {}
}

// need skips a test whose server is not installed, except where CI promised
// that nothing is skipped.
func need(t *testing.T, err error) {
	t.Helper()
	if errors.Is(err, services.ErrMissing) && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func startPostgres(t *testing.T, cfg services.PostgresConfig) *services.PG {
	t.Helper()
	pg, err := services.Postgres(t.Context(), cfg)
	need(t, err)
	t.Cleanup(func() {
		if err := pg.Stop(); err != nil {
			t.Error(err)
		}
	})
	return pg
}

func query(ctx context.Context, url, sql string) (string, error) {
	conn, err := pgx.Connect(ctx, url)
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	var s string
	err = conn.QueryRow(ctx, sql).Scan(&s)
	return s, err
}

func must(t *testing.T, url, sql, want string) {
	t.Helper()
	got, err := query(t.Context(), url, sql)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	if got != want {
		t.Fatalf("%s = %q, want %q", sql, got, want)
	}
}

func TestPostgresListensOnLoopbackWithAPassword(t *testing.T) {
	pg := startPostgres(t, services.PostgresConfig{})
	must(t, pg.URL(), `SELECT current_setting('listen_addresses')`, "127.0.0.1")
	must(t, pg.URL(), `SELECT current_setting('fsync')`, "off")
	must(t, pg.URL(), `SELECT current_setting('server_encoding')`, "UTF8")
	if pg.Major() < 15 {
		t.Errorf("major = %d, want 15 or newer", pg.Major())
	}
	wrong := strings.Replace(pg.URL(), "postgres:", "postgres:x", 2)
	if _, err := query(t.Context(), wrong, `SELECT 'in'`); err == nil {
		t.Error("a wrong password was accepted")
	}
}

func TestPostgresCopiesTemplates(t *testing.T) {
	pg := startPostgres(t, services.PostgresConfig{})
	url, err := pg.Database(t.Context(), "model", "")
	if err != nil {
		t.Fatal(err)
	}
	must(t, url, `WITH made AS (SELECT 1) SELECT current_database() FROM made`, "model")
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), `CREATE TABLE seen (word text); INSERT INTO seen VALUES ('hello')`); err != nil {
		t.Fatal(err)
	}
	conn.Close(t.Context())

	const copies = 4
	errs := make(chan error, copies)
	for i := range copies {
		go func() {
			url, err := pg.Database(t.Context(), fmt.Sprintf(`copy "%d"`, i), "model")
			if err == nil {
				_, err = query(t.Context(), url, `SELECT word FROM seen`)
			}
			errs <- err
		}()
	}
	for range copies {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if _, err := pg.Database(t.Context(), "model", ""); err == nil {
		t.Error("a second database of the same name was made")
	}
	if err := pg.Drop(t.Context(), "model"); err != nil {
		t.Error(err)
	}
	if err := pg.Drop(t.Context(), "model"); err != nil {
		t.Errorf("dropping what is not there: %v", err)
	}
}

func TestPostgresKeepsItsDataOverRestartKillAndStop(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pg")
	pg := startPostgres(t, services.PostgresConfig{Dir: dir, Durable: true})
	t.Cleanup(func() { os.RemoveAll(pg.Dir()) }) // not below dir when root runs the tests
	url := pg.URL()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), `CREATE TABLE kept AS SELECT 'yes' AS answer`); err != nil {
		t.Fatal(err)
	}
	if err := pg.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if pg.URL() != url {
		t.Errorf("url changed from %s to %s", url, pg.URL())
	}
	must(t, url, `SELECT answer FROM kept`, "yes")

	if err := pg.Kill(); err != nil {
		t.Fatal(err)
	}
	if _, err := query(t.Context(), url, `SELECT 'alive'`); err == nil {
		t.Fatal("it answers after Kill")
	}
	if err := pg.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	must(t, url, `SELECT answer FROM kept`, "yes")

	if err := pg.Stop(); err != nil {
		t.Fatal(err)
	}
	again := startPostgres(t, services.PostgresConfig{Dir: dir, Durable: true})
	must(t, again.URL(), `SELECT answer FROM kept`, "yes")
	must(t, again.URL(), `SELECT current_setting('fsync')`, "on")
}

func TestPostgresSaysWhyItDoesNotStart(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	_, err = services.Postgres(t.Context(), services.PostgresConfig{Port: port})
	if errors.Is(err, services.ErrMissing) {
		need(t, err)
	}
	if err == nil || !strings.Contains(err.Error(), "Address already in use") {
		t.Fatalf("err = %v, want the server's own words", err)
	}
}

func TestThrowAwayPostgresLeavesNoFiles(t *testing.T) {
	pg := startPostgres(t, services.PostgresConfig{})
	if _, err := os.Stat(pg.Log()); err != nil {
		t.Fatal(err)
	}
	if err := pg.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(pg.Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("stat %s = %v, want not exist", pg.Dir(), err)
	}
}

func client(t *testing.T, r *services.RedisServer) *redis.Client {
	t.Helper()
	opt, err := redis.ParseURL(r.URL())
	if err != nil {
		t.Fatal(err)
	}
	opt.DialerRetries = 1
	c := redis.NewClient(opt)
	t.Cleanup(func() { c.Close() })
	return c
}

func TestRedisRestarts(t *testing.T) {
	for _, tc := range []struct {
		kind string
		cfg  services.RedisConfig
		kept string
	}{
		{services.KindServer, services.RedisConfig{Real: true}, ""},
		{services.KindServer, services.RedisConfig{Real: true, AppendOnly: true}, "v"},
		{services.KindMini, services.RedisConfig{Mini: true}, ""},
		{services.KindMini, services.RedisConfig{Mini: true, AppendOnly: true}, "v"},
	} {
		t.Run(fmt.Sprintf("%s kept=%q", tc.kind, tc.kept), func(t *testing.T) {
			ctx := t.Context()
			r, err := services.Redis(ctx, tc.cfg)
			need(t, err)
			t.Cleanup(func() {
				if err := r.Stop(); err != nil {
					t.Error(err)
				}
			})
			if r.Kind() != tc.kind {
				t.Fatalf("kind = %s, want %s", r.Kind(), tc.kind)
			}
			c := client(t, r)
			url := r.URL()
			stranger := redis.NewClient(&redis.Options{Addr: r.Addr()})
			defer stranger.Close()
			if err := stranger.Ping(ctx).Err(); err == nil {
				t.Error("it answers without the password")
			}

			if err := c.Set(ctx, "k", "v", 0).Err(); err != nil {
				t.Fatal(err)
			}
			if err := r.Restart(ctx); err != nil {
				t.Fatal(err)
			}
			if r.URL() != url {
				t.Errorf("url changed from %s to %s", url, r.URL())
			}
			if got := c.Get(ctx, "k").Val(); got != tc.kept {
				t.Errorf("after a restart k = %q, want %q", got, tc.kept)
			}

			if err := r.Kill(); err != nil {
				t.Fatal(err)
			}
			if listens(r.Addr()) {
				t.Fatal("it answers after Kill")
			}
			if err := r.Restart(ctx); err != nil {
				t.Fatal(err)
			}
			if err := c.Set(ctx, "k", "v", 0).Err(); err != nil {
				t.Fatal(err)
			}
			if err := r.FlushAll(ctx); err != nil {
				t.Fatal(err)
			}
			if err := c.Get(ctx, "k").Err(); !errors.Is(err, redis.Nil) {
				t.Errorf("after FlushAll: %v, want nil reply", err)
			}
		})
	}
}

func TestRedisComesBackFromASnapshot(t *testing.T) {
	rd, err := services.Redis(t.Context(), services.RedisConfig{Real: true, AppendOnly: true})
	need(t, err)
	t.Cleanup(func() {
		if err := rd.Stop(); err != nil {
			t.Error(err)
		}
	})
	c := redis.NewClient(&redis.Options{Addr: rd.Addr(), Password: rd.Password()})
	defer c.Close()
	if err := c.Set(t.Context(), "then", "x", 0).Err(); err != nil {
		t.Fatal(err)
	}
	snapshot, err := rd.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(c.Set(t.Context(), "since", "x", 0).Err(), c.Del(t.Context(), "then").Err()); err != nil {
		t.Fatal(err)
	}
	if err := rd.Restore(t.Context(), snapshot); err != nil {
		t.Fatal(err)
	}
	if keys, err := c.Keys(t.Context(), "*").Result(); err != nil || len(keys) != 1 || keys[0] != "then" {
		t.Errorf("after the restore: %v, %v", keys, err)
	}
}

func TestAFrozenPostgresAnswersWhenItIsThawed(t *testing.T) {
	pg := startPostgres(t, services.PostgresConfig{})
	conn, err := pgx.Connect(t.Context(), pg.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := pg.Freeze(); err != nil {
		t.Fatal(err)
	}
	answer := make(chan error, 1)
	go func() { answer <- conn.Ping(context.Background()) }()
	select {
	case err := <-answer:
		t.Errorf("a frozen server answered: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	if err := pg.Thaw(); err != nil {
		t.Fatal(err)
	}
	if err := <-answer; err != nil {
		t.Errorf("the session did not outlive the freeze: %v", err)
	}
}

func TestTheImitationsClockRuns(t *testing.T) {
	r, err := services.Redis(t.Context(), services.RedisConfig{Mini: true})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	c := client(t, r)
	if err := c.Set(t.Context(), "lease", "1", 150*time.Millisecond).Err(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if c.Exists(t.Context(), "lease").Val() == 0 {
			return
		}
	}
	t.Error("a key of 150 ms is there after 10 s")
}

func TestServersDieWithTheirParent(t *testing.T) {
	startPostgres(t, services.PostgresConfig{}) // skips where there is none
	if _, err := exec.LookPath("redis-server"); err != nil {
		need(t, fmt.Errorf("%w: %w", err, services.ErrMissing))
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "SERVICES_TEST_PARENT=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var url, addr, dir, redisDir string
	if _, err := fmt.Fscanf(out, "up %s %s %s %s\n", &url, &addr, &dir, &redisDir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir); os.RemoveAll(redisDir) })
	if _, err := query(t.Context(), url, `SELECT 'alive'`); err != nil {
		t.Fatal(err)
	}
	server, err := unix.PidfdOpen(postmaster(t, dir), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(server)
	conn, err := net.Dial("tcp4", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed: that is the point
	// A process descriptor becomes readable when its process ends.
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(server), Events: unix.POLLIN}}, 20_000)
	if err != nil || n != 1 {
		t.Errorf("postgres is there 20 s after its parent (poll: %d, %v)", n, err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("redis is there 20 s after its parent")
	}
}

func postmaster(t *testing.T, dir string) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "data", "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(b), "\n")
	pid, err := strconv.Atoi(line)
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func listens(addr string) bool {
	c, err := net.DialTimeout("tcp4", addr, time.Second)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

func TestAMissingRedisIsNamedOrReplaced(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	t.Setenv("CI", "true")
	if _, err := services.Redis(t.Context(), services.RedisConfig{}); !errors.Is(err, services.ErrMissing) {
		t.Errorf("with CI=true: err = %v, want ErrMissing", err)
	}
	t.Setenv("CI", "")
	if _, err := services.Redis(t.Context(), services.RedisConfig{Real: true}); !errors.Is(err, services.ErrMissing) {
		t.Errorf("with Real: err = %v, want ErrMissing", err)
	}
	r, err := services.Redis(t.Context(), services.RedisConfig{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	if r.Kind() != services.KindMini {
		t.Errorf("kind = %s, want %s", r.Kind(), services.KindMini)
	}
}

func TestFreePortIsFree(t *testing.T) {
	port, err := services.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}
