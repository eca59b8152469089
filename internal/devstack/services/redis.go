package services

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
	"sync"
	"syscall"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
)

// Kinds of Redis that Redis may start.
const (
	// KindServer is a real redis-server.
	KindServer = "redis-server"
	// KindMini is an imitation inside this process.
	KindMini = "miniredis"
)

// miniTick is how often the imitation's clock is moved on. Its keys expire
// only when somebody moves it.
const miniTick = 100 * time.Millisecond

// installRedis is what to type when redis-server is missing.
const installRedis = "apt-get install --no-install-recommends redis-server"

// RedisConfig says what kind of Redis is wanted. Its zero value is one for a
// test process.
type RedisConfig struct {
	// Dir keeps the append-only file and the log. Empty: a new directory,
	// removed by Stop.
	Dir string
	// Port on 127.0.0.1; 0 takes a free one. Restart keeps it.
	Port int
	// AppendOnly keeps the keys over a restart and a kill. Without it every
	// restart begins empty.
	AppendOnly bool
	// Real makes a missing redis-server an error instead of starting the
	// imitation. CI=true in the environment does the same.
	Real bool
	// Mini starts the imitation even where redis-server is installed.
	Mini bool
}

// RedisServer is a running Redis. Its methods may be called from several
// goroutines at once.
type RedisServer struct {
	cfg      RedisConfig
	bin      string // empty: the imitation
	dir      string
	password string
	remove   bool

	mu     sync.Mutex
	port   int
	server *child
	mini   *miniredis.Miniredis
	tick   func() // stops the imitation's clock and waits for it
}

// Redis starts a Redis and returns when it answers: redis-server where it is
// installed, else an imitation inside this process. The context bounds the
// start only; Stop ends the server, and so does the end of this process. The
// error wraps ErrMissing when a real one is asked for and not installed.
func Redis(ctx context.Context, cfg RedisConfig) (*RedisServer, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	r := &RedisServer{cfg: cfg, port: cfg.Port, password: secret()}
	if !cfg.Mini {
		path, err := exec.LookPath("redis-server")
		// A run that promised to skip nothing must not pass on the imitation.
		if err != nil && (cfg.Real || os.Getenv("CI") == "true") {
			return nil, fmt.Errorf("finding redis-server in PATH (%s): %w", installRedis, ErrMissing)
		}
		r.bin = path
	}
	if err := r.makeDir(); err != nil {
		return nil, fmt.Errorf("making the directory of Redis: %w", err)
	}
	if err := r.start(ctx); err != nil {
		r.discard()
		return nil, fmt.Errorf("starting %s: %w", r.Kind(), err)
	}
	return r, nil
}

// Kind is KindServer or KindMini.
func (r *RedisServer) Kind() string {
	if r.bin == "" {
		return KindMini
	}
	return KindServer
}

// URL is the redis:// address of database 0, with the password in it.
func (r *RedisServer) URL() string {
	return fmt.Sprintf("redis://:%s@%s/0", r.password, r.Addr())
}

// Addr is host and port.
func (r *RedisServer) Addr() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.addr()
}

func (r *RedisServer) addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(r.port)) }

// Password is what AUTH wants; the user is the default one.
func (r *RedisServer) Password() string { return r.password }

// Log is the path of redis-server's log; the imitation writes none.
func (r *RedisServer) Log() string { return filepath.Join(r.dir, "redis.log") }

// PID is redis-server's process, 0 when none runs.
func (r *RedisServer) PID() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.server.id()
}

// Stop shuts the server down. A second call does nothing.
func (r *RedisServer) Stop() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	err := r.end(syscall.SIGTERM)
	r.discard()
	return err
}

// Kill ends the server at once, as a crash would. Restart brings it back.
func (r *RedisServer) Kill() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.end(syscall.SIGKILL)
}

// Restart ends the server, when it runs, and starts it again on the same port.
// The keys are kept only with RedisConfig.AppendOnly.
func (r *RedisServer) Restart(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := r.end(syscall.SIGTERM); err != nil {
		return fmt.Errorf("restarting Redis: %w", err)
	}
	if err := r.launch(ctx); err != nil {
		return fmt.Errorf("restarting Redis: %w", err)
	}
	return nil
}

// Snapshot is what Redis holds at one moment, for Restore.
type Snapshot map[string][]byte // files of the append-only directory

// appendDir is where redis-server 7 keeps its append-only files.
const appendDir = "appendonlydir"

// Snapshot keeps what Redis holds now, as a backup of its disk would. It needs
// a redis-server with RedisConfig.AppendOnly.
func (r *RedisServer) Snapshot() (Snapshot, error) {
	if r.bin == "" || !r.cfg.AppendOnly {
		return nil, errors.New("a snapshot of Redis needs redis-server and an append-only file")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	entries, err := os.ReadDir(filepath.Join(r.dir, appendDir))
	if err != nil {
		return nil, fmt.Errorf("keeping a snapshot of Redis: %w", err)
	}
	s := Snapshot{}
	for _, e := range entries {
		if s[e.Name()], err = os.ReadFile(filepath.Join(r.dir, appendDir, e.Name())); err != nil {
			return nil, fmt.Errorf("keeping a snapshot of Redis: %w", err)
		}
	}
	return s, nil
}

// Restore ends the server at once and starts it again with what s holds: all
// that was written since is forgotten, and all that was removed is back.
func (r *RedisServer) Restore(ctx context.Context, s Snapshot) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	err := r.end(syscall.SIGKILL)
	dir := filepath.Join(r.dir, appendDir)
	err = errors.Join(err, os.RemoveAll(dir), os.Mkdir(dir, 0o700))
	for name, raw := range s {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), raw, 0o600))
	}
	if err == nil {
		err = r.launch(ctx)
	}
	if err != nil {
		return fmt.Errorf("restoring a snapshot of Redis: %w", err)
	}
	return nil
}

// FlushAll removes every key of every database.
func (r *RedisServer) FlushAll(ctx context.Context) error {
	c := r.client(r.Addr())
	defer c.Close()
	if err := c.FlushAll(ctx).Err(); err != nil {
		return fmt.Errorf("flushing Redis: %w", err)
	}
	return nil
}

// client talks to the server without the retries that would hide its state.
func (r *RedisServer) client(addr string) *redis.Client {
	return redis.NewClient(&redis.Options{
		Addr: addr, Password: r.password, MaxRetries: -1, DialerRetries: 1, PoolSize: 1,
	})
}

func (r *RedisServer) makeDir() error {
	if r.cfg.Dir == "" {
		dir, err := os.MkdirTemp("", "lorayard-redis-")
		if err != nil {
			return err
		}
		r.dir, r.remove = dir, true
		return nil
	}
	dir, err := filepath.Abs(r.cfg.Dir)
	if err != nil {
		return err
	}
	r.dir = dir
	return os.MkdirAll(dir, 0o700)
}

// discard removes a throw-away directory; what cannot be removed is left to the
// system's own cleaning.
func (r *RedisServer) discard() {
	if r.remove {
		_ = os.RemoveAll(r.dir)
	}
}

// start launches the server. A port of our own choice that somebody else took
// in the meantime is chosen again.
func (r *RedisServer) start(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cfg.Port != 0 {
		return r.launch(ctx)
	}
	var err error
	for range 5 {
		if r.port, err = FreePort(); err != nil {
			return err
		}
		err = r.launch(ctx)
		if err == nil || !strings.Contains(strings.ToLower(err.Error()), "address already in use") {
			return err
		}
	}
	return err
}

func (r *RedisServer) launch(ctx context.Context) error {
	if r.bin == "" {
		return r.launchMini()
	}
	return r.launchServer(ctx)
}

// launchMini starts the imitation, or brings the stopped one back.
func (r *RedisServer) launchMini() error {
	switch {
	case r.mini == nil:
		m := miniredis.NewMiniRedis()
		m.RequireAuth(r.password)
		if err := m.StartAddr(r.addr()); err != nil {
			return err
		}
		r.mini = m
	default:
		if !r.cfg.AppendOnly {
			r.mini.FlushAll()
		}
		if err := r.mini.Restart(); err != nil {
			return err
		}
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func(m *miniredis.Miniredis) {
		defer close(stopped)
		t := time.NewTicker(miniTick)
		defer t.Stop()
		last := time.Now()
		for {
			select {
			case <-stop:
				return
			case now := <-t.C:
				m.FastForward(now.Sub(last))
				last = now
			}
		}
	}(r.mini)
	r.tick = func() { close(stop); <-stopped }
	return nil
}

func (r *RedisServer) launchServer(ctx context.Context) error {
	conf := filepath.Join(r.dir, "redis.conf")
	if err := os.WriteFile(conf, []byte(r.settings()), 0o600); err != nil {
		return err
	}
	log, err := os.OpenFile(r.Log(), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(r.bin, conf)
	cmd.Dir, cmd.Env = r.dir, environment(r.dir)
	cmd.Stdout, cmd.Stderr = log, log
	server, err := spawn(cmd, syscall.SIGTERM)
	if err != nil {
		return err
	}
	if err := r.answers(ctx, server); err != nil {
		_ = server.end(syscall.SIGTERM)
		return err
	}
	r.server = server
	return nil
}

// settings are a whole redis.conf: the password must not stand in the list of
// processes.
func (r *RedisServer) settings() string {
	yes := map[bool]string{true: "yes", false: "no"}
	return strings.Join([]string{
		"bind 127.0.0.1", "port " + strconv.Itoa(r.port), "requirepass " + r.password,
		"daemonize no", `save ""`, "appendonly " + yes[r.cfg.AppendOnly], "appendfsync everysec", "",
	}, "\n")
}

// answers returns nil when the server answers a PING; it says LOADING for as
// long as it reads its append-only file.
func (r *RedisServer) answers(ctx context.Context, server *child) error {
	alive, cancel := server.within(ctx)
	defer cancel()
	for {
		err := r.ping(alive)
		if err == nil {
			return nil
		}
		again := time.NewTimer(pollEvery)
		select {
		case <-server.done:
			again.Stop()
			return fmt.Errorf("redis-server ended (%w): %s", exitOf(server.err), tail(r.Log()))
		case <-ctx.Done():
			again.Stop()
			return fmt.Errorf("redis-server does not answer (%w): %s", errors.Join(err, ctx.Err()), tail(r.Log()))
		case <-again.C:
		}
	}
}

// ping dials itself first: the client's pool logs every refused connection and
// then pauses for a second.
func (r *RedisServer) ping(ctx context.Context) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp4", r.addr())
	if err != nil {
		return err
	}
	conn.Close()
	c := r.client(r.addr())
	defer c.Close()
	return c.Ping(ctx).Err()
}

func (r *RedisServer) end(sig syscall.Signal) error {
	if r.bin != "" {
		return r.server.end(sig)
	}
	if r.tick != nil {
		r.tick()
		r.tick = nil
		r.mini.Close()
	}
	return nil
}
