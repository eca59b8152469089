package services

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// oldestPostgres is the first major version that the migrations run on.
const oldestPostgres = 15

// installPostgres is what to type when Postgres is missing.
const installPostgres = "apt-get install --no-install-recommends postgresql-15"

// PostgresConfig says what kind of cluster is wanted. Its zero value is a
// cluster for one test process.
type PostgresConfig struct {
	// Dir keeps the cluster between runs. Empty: a new directory, removed by
	// Stop. A process of root's may have to keep the cluster elsewhere, because
	// the user it runs as cannot enter Dir; see PG.Dir.
	Dir string
	// Port on 127.0.0.1; 0 takes a free one. Restart keeps it.
	Port int
	// Durable makes commits survive a crash of the machine. Without it the
	// cluster is faster and survives only a crash of Postgres.
	Durable bool
	// Settings are more of the server's, each name=value; last wins.
	Settings []string
}

// PG is a running Postgres cluster. Its methods may be called from several
// goroutines at once.
type PG struct {
	cfg      PostgresConfig
	bin      string // directory of initdb and postgres
	major    int
	dir      string // holds data/, password and postgres.log
	password string
	owner    *syscall.Credential // nil: run as ourselves
	remove   bool                // dir goes with Stop

	mu     sync.Mutex
	port   int
	server *child
}

// Postgres makes a cluster, or takes the one that is in cfg.Dir, and returns
// when it answers. The context bounds the start only; Stop ends the cluster,
// and so does the end of this process, however it comes. The error wraps
// ErrMissing when Postgres is not installed.
func Postgres(ctx context.Context, cfg PostgresConfig) (*PG, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	p := &PG{cfg: cfg, port: cfg.Port}
	var err error
	if p.bin, p.major, err = findPostgres(ctx); err != nil {
		return nil, fmt.Errorf("finding Postgres: %w", err)
	}
	if err := p.makeDir(); err != nil {
		return nil, fmt.Errorf("making the directory of the cluster: %w", err)
	}
	if err := p.init(ctx); err != nil {
		p.discard()
		return nil, fmt.Errorf("making a Postgres cluster in %s: %w", p.dir, err)
	}
	if err := p.start(ctx); err != nil {
		p.discard()
		return nil, fmt.Errorf("starting Postgres in %s: %w", p.dir, err)
	}
	return p, nil
}

// URL is the connection string of database postgres as the superuser, with the
// password in it.
func (p *PG) URL() string { return p.URLFor("postgres") }

// URLFor is URL for another database.
func (p *PG) URLFor(database string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.urlFor(database)
}

func (p *PG) urlFor(database string) string {
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword("postgres", p.password),
		Host: fmt.Sprintf("127.0.0.1:%d", p.port), Path: "/" + database, RawQuery: "sslmode=disable",
	}
	return u.String()
}

// Dir is where the cluster lives: PostgresConfig.Dir where possible.
func (p *PG) Dir() string { return p.dir }

// Log is the path of the server's log.
func (p *PG) Log() string { return filepath.Join(p.dir, "postgres.log") }

// Major is the server's major version.
func (p *PG) Major() int { return p.major }

// PID is the server's first process, 0 when none runs.
func (p *PG) PID() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.server.id()
}

// Stop ends the server as a shutdown would (open sessions are closed), and
// removes a throw-away cluster. A second call does nothing.
func (p *PG) Stop() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	signals := []syscall.Signal{syscall.SIGINT, syscall.SIGQUIT}
	if p.remove {
		signals = signals[1:] // no checkpoint of what is deleted next
	}
	err := p.server.end(signals...)
	p.discard()
	return err
}

// Kill ends every process of the server at once, as a crash would, and returns
// when all are gone. Restart brings it back.
func (p *PG) Kill() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.server.running() {
		return nil
	}
	// Backends are sessions of their own, so no process group holds them all.
	backends := childrenOf(p.server.pid)
	err := p.server.end(syscall.SIGKILL)
	for _, pid := range backends {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("killing backend %d: %w", pid, err)
		}
	}
	return err
}

// Freeze stops every process of the server where it stands: its connections
// stay, and nothing answers. Thaw lets it go on.
func (p *PG) Freeze() error { return p.signal(syscall.SIGSTOP) }

// Thaw ends a Freeze.
func (p *PG) Thaw() error { return p.signal(syscall.SIGCONT) }

// signal sends sig to the server first, so that it starts no session meanwhile.
func (p *PG) signal(sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.server.running() {
		return errors.New("no Postgres runs")
	}
	for _, pid := range append([]int{p.server.pid}, childrenOf(p.server.pid)...) {
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("sending %s to process %d of Postgres: %w", sig, pid, err)
		}
	}
	return nil
}

// Restart shuts the server down, when it runs, and starts it again on the same
// port with the same data.
func (p *PG) Restart(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := p.server.end(syscall.SIGINT, syscall.SIGQUIT); err != nil {
		return fmt.Errorf("restarting Postgres: %w", err)
	}
	if err := p.launch(ctx); err != nil {
		return fmt.Errorf("restarting Postgres: %w", err)
	}
	return nil
}

// Database makes database name and returns its URL. It is a copy of template,
// which takes tens of milliseconds where migrations take seconds; empty means
// Postgres's own template1. Nobody may be connected to the template.
func (p *PG) Database(ctx context.Context, name, template string) (string, error) {
	if template == "" {
		template = "template1"
	}
	sql := fmt.Sprintf("CREATE DATABASE %s TEMPLATE %s", quote(name), quote(template))
	if err := p.exec(ctx, sql); err != nil {
		return "", fmt.Errorf("making database %s from %s: %w", name, template, err)
	}
	return p.URLFor(name), nil
}

// Drop removes database name, also under the hands of those connected to it. A
// database that is not there is no error.
func (p *PG) Drop(ctx context.Context, name string) error {
	if err := p.exec(ctx, "DROP DATABASE IF EXISTS "+quote(name)+" WITH (FORCE)"); err != nil {
		return fmt.Errorf("dropping database %s: %w", name, err)
	}
	return nil
}

func (p *PG) exec(ctx context.Context, sql string) error {
	conn, err := pgx.Connect(ctx, p.URL())
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	_, err = conn.Exec(ctx, sql)
	return err
}

func quote(name string) string { return pgx.Identifier{name}.Sanitize() }

// makeDir settles where the cluster lives and whom it belongs to. Postgres
// refuses to run as root, so root lends the directory to another user, who must
// be able to enter it.
func (p *PG) makeDir() error {
	if os.Geteuid() == 0 {
		owner, err := unprivileged()
		if err != nil {
			return err
		}
		p.owner = owner
	}
	switch {
	case p.cfg.Dir == "":
		base, err := p.base()
		if err != nil {
			return err
		}
		dir, err := os.MkdirTemp(base, "lorayard-pg-")
		if err != nil {
			return err
		}
		p.dir, p.remove = dir, true
	default:
		dir, err := filepath.Abs(p.cfg.Dir)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
			return err
		}
		if !p.reachable(filepath.Dir(dir)) {
			base, err := p.base()
			if err != nil {
				return err
			}
			sum := sha256.Sum256([]byte(dir))
			dir = filepath.Join(base, "lorayard-pg-"+hex.EncodeToString(sum[:6]))
		}
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		p.dir = dir
	}
	return p.own()
}

// own hands the directory to the user that Postgres runs as. A directory of
// somebody else's is refused: the name may have been taken by a stranger.
func (p *PG) own() error {
	st, err := os.Lstat(p.dir)
	if err != nil {
		return err
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !st.IsDir() || !ok {
		return fmt.Errorf("%s is not a directory", p.dir)
	}
	mine := int(sys.Uid) == os.Geteuid() || (p.owner != nil && sys.Uid == p.owner.Uid)
	if !mine {
		return fmt.Errorf("%s belongs to user %d", p.dir, sys.Uid)
	}
	if err := os.Chmod(p.dir, 0o700); err != nil {
		return err
	}
	return p.lend(p.dir)
}

// lend gives path to the user that Postgres runs as.
func (p *PG) lend(path string) error {
	if p.owner == nil {
		return nil
	}
	return os.Lchown(path, int(p.owner.Uid), int(p.owner.Gid))
}

// base returns a directory for temporary files that the cluster's user can
// enter.
func (p *PG) base() (string, error) {
	for _, dir := range []string{os.TempDir(), "/tmp", "/var/tmp"} {
		if p.reachable(dir) {
			return dir, nil
		}
	}
	return "", errors.New("no directory for temporary files that an unprivileged user can enter")
}

// reachable reports whether the cluster's user may enter dir, judged by the
// mode of every directory on the way.
func (p *PG) reachable(dir string) bool {
	if p.owner == nil {
		return true
	}
	for {
		st, err := os.Stat(dir)
		if err != nil || !st.IsDir() {
			return false
		}
		sys, ok := st.Sys().(*syscall.Stat_t)
		if !ok {
			return false
		}
		need := os.FileMode(0o001)
		switch {
		case sys.Uid == p.owner.Uid:
			need = 0o100
		case sys.Gid == p.owner.Gid:
			need = 0o010
		}
		if st.Mode()&need == 0 {
			return false
		}
		if dir == filepath.Dir(dir) {
			return true
		}
		dir = filepath.Dir(dir)
	}
}

// discard removes a throw-away cluster. What cannot be removed is left to the
// system's own cleaning of its temporary directory.
func (p *PG) discard() {
	if p.remove {
		_ = os.RemoveAll(p.dir)
	}
}

func (p *PG) data() string { return filepath.Join(p.dir, "data") }

// init makes the cluster, unless a whole one is there. PG_VERSION alone does
// not prove that: the password file, written last, does.
func (p *PG) init(ctx context.Context) error {
	secretFile := filepath.Join(p.dir, "password")
	if b, err := os.ReadFile(secretFile); err == nil {
		p.password = strings.TrimSpace(string(b))
		return p.sameVersion()
	}
	if err := os.RemoveAll(p.data()); err != nil {
		return err
	}
	p.password = secret()
	fresh := secretFile + ".new"
	if err := os.WriteFile(fresh, []byte(p.password+"\n"), 0o600); err != nil {
		return err
	}
	if err := p.lend(fresh); err != nil {
		return err
	}
	args := []string{
		"--pgdata=" + p.data(), "--username=postgres", "--pwfile=" + fresh, "--auth=scram-sha-256",
		"--encoding=UTF8", "--locale=C.UTF-8",
	}
	if !p.cfg.Durable {
		args = append(args, "--no-sync")
	}
	cmd := exec.CommandContext(ctx, filepath.Join(p.bin, "initdb"), args...)
	p.dress(cmd)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return os.Rename(fresh, secretFile)
}

// sameVersion refuses a cluster that another major version made.
func (p *PG) sameVersion() error {
	b, err := os.ReadFile(filepath.Join(p.data(), "PG_VERSION"))
	if err != nil {
		return err
	}
	if made := strings.TrimSpace(string(b)); made != strconv.Itoa(p.major) {
		return fmt.Errorf("the cluster was made by Postgres %s and this is %d: remove %s", made, p.major, p.dir)
	}
	return nil
}

// dress gives a command the cluster's user and a small environment.
func (p *PG) dress(cmd *exec.Cmd) {
	cmd.Dir = p.dir
	cmd.Env = environment(p.dir)
	if p.owner != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: p.owner}
	}
}

// start launches the server. A port of our own choice that somebody else took
// in the meantime is chosen again.
func (p *PG) start(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cfg.Port != 0 {
		return p.launch(ctx)
	}
	var err error
	for range 5 {
		if p.port, err = FreePort(); err != nil {
			return err
		}
		err = p.launch(ctx)
		if err == nil || !strings.Contains(err.Error(), "Address already in use") {
			return err
		}
	}
	return err
}

// launch starts the server on p.port and waits until it answers. After a crash
// the old server's memory may still be in use for a moment; that passes.
func (p *PG) launch(ctx context.Context) error {
	for {
		err := p.launchOnce(ctx)
		if err == nil || !strings.Contains(err.Error(), "is still in use") || ctx.Err() != nil {
			return err
		}
		if wait(ctx, 5*pollEvery) != nil {
			return err
		}
	}
}

func (p *PG) launchOnce(ctx context.Context) error {
	log, err := os.OpenFile(p.Log(), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(filepath.Join(p.bin, "postgres"), "-D", p.data())
	for _, set := range p.settings() {
		cmd.Args = append(cmd.Args, "-c", set)
	}
	cmd.Stdout, cmd.Stderr = log, log
	p.dress(cmd)
	farewell := syscall.SIGQUIT
	if p.cfg.Durable {
		farewell = syscall.SIGINT // a clean shutdown saves the next start a recovery
	}
	server, err := spawn(cmd, farewell)
	if err != nil {
		return err
	}
	if err := p.answers(ctx, server); err != nil {
		_ = server.end(syscall.SIGQUIT)
		return err
	}
	p.server = server
	return nil
}

// settings are what differs from Postgres's defaults. Nothing lives outside
// the directory of the cluster: no socket, no shared memory file.
func (p *PG) settings() []string {
	s := []string{
		"listen_addresses=127.0.0.1", "port=" + strconv.Itoa(p.port), "unix_socket_directories=",
		"dynamic_shared_memory_type=mmap", "shared_buffers=64MB", "max_connections=200",
		"TimeZone=UTC", "log_timezone=UTC", "jit=off", "logging_collector=off",
	}
	if !p.cfg.Durable {
		s = append(s, "fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_wal_size=256MB")
	}
	return append(s, p.cfg.Settings...)
}

// answers returns nil when a session on the server works.
func (p *PG) answers(ctx context.Context, server *child) error {
	alive, cancel := server.within(ctx)
	defer cancel()
	for {
		err := ping(alive, p.urlFor("postgres"))
		if err == nil {
			return nil
		}
		again := time.NewTimer(pollEvery)
		select {
		case <-server.done:
			again.Stop()
			return fmt.Errorf("postgres ended (%w): %s", exitOf(server.err), tail(p.Log()))
		case <-ctx.Done():
			again.Stop()
			return fmt.Errorf("postgres does not answer (%w): %s", err, tail(p.Log()))
		case <-again.C:
		}
	}
}

func ping(ctx context.Context, dsn string) error {
	conn, err := pgx.Connect(ctx, dsn)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return conn.Ping(ctx)
}

func exitOf(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// findPostgres looks for initdb and postgres side by side: in PATH, then where
// Debian keeps them, the newest first.
func findPostgres(ctx context.Context) (bin string, major int, err error) {
	var dirs []string
	if path, err := exec.LookPath("initdb"); err == nil {
		dirs = append(dirs, filepath.Dir(path))
	}
	debian, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil {
		return "", 0, err
	}
	slices.SortFunc(debian, func(a, b string) int { return versionOf(b) - versionOf(a) })
	var old []string
	for _, dir := range append(dirs, debian...) {
		if _, err := os.Stat(filepath.Join(dir, "initdb")); err != nil {
			continue
		}
		major, err := majorOf(ctx, filepath.Join(dir, "postgres"))
		if err != nil {
			continue
		}
		if major >= oldestPostgres {
			return dir, major, nil
		}
		old = append(old, fmt.Sprintf("%d in %s", major, dir))
	}
	if len(old) > 0 {
		return "", 0, fmt.Errorf("only Postgres %s, need %d or newer (%s): %w", strings.Join(old, ", "), oldestPostgres, installPostgres, ErrMissing)
	}
	return "", 0, fmt.Errorf("no initdb and postgres in PATH or /usr/lib/postgresql (%s): %w", installPostgres, ErrMissing)
}

// versionOf reads 15 out of /usr/lib/postgresql/15/bin.
func versionOf(dir string) int {
	n, _ := strconv.Atoi(filepath.Base(filepath.Dir(dir))) // 0 sorts last
	return n
}

// majorOf reads 15 out of "postgres (PostgreSQL) 15.18 (Debian ...)".
func majorOf(ctx context.Context, postgres string) (int, error) {
	out, err := exec.CommandContext(ctx, postgres, "--version").Output()
	if err != nil {
		return 0, err
	}
	_, version, ok := strings.Cut(string(out), "(PostgreSQL) ")
	if !ok {
		return 0, fmt.Errorf("%s says %q", postgres, out)
	}
	digits := strings.IndexFunc(version, func(r rune) bool { return r < '0' || r > '9' })
	if digits < 0 {
		digits = len(version)
	}
	return strconv.Atoi(version[:digits])
}

// unprivileged finds a user to run Postgres as when we are root.
func unprivileged() (*syscall.Credential, error) {
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err := strconv.ParseUint(u.Uid, 10, 32)
		if err != nil {
			continue
		}
		gid, err := strconv.ParseUint(u.Gid, 10, 32)
		if err != nil {
			continue
		}
		return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
	}
	return nil, errors.New("postgres does not run as root, and there is no user postgres or nobody to run it as")
}

// childrenOf lists the direct children of a process; empty where the kernel
// does not tell.
func childrenOf(pid int) []int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return nil
	}
	var pids []int
	for _, f := range strings.Fields(string(b)) {
		if n, err := strconv.Atoi(f); err == nil {
			pids = append(pids, n)
		}
	}
	return pids
}
