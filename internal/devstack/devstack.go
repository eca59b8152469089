// Package devstack runs the whole system on one machine for development, the
// demo and the end-to-end tests: a throw-away Postgres and Redis, a store on
// disk that speaks the Supabase Storage API, and the real binaries as
// processes of their own. It is not a fourth code path: nothing below it knows
// that it is there. Support only, never linked into a shipped binary.
package devstack

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"lorayard/deploy"
	"lorayard/internal/devstack/services"
	"lorayard/internal/storage"
	"lorayard/internal/storage/local"
	"lorayard/internal/store"
)

// Buckets are the app's, all private.
var buckets = map[string]int64{"lora-datasets": 500 << 20, "training-files": 500 << 20, "lora-models": 5 << 30}

// Config says what the stack is made of. Empty URLs mean: start one here.
type Config struct {
	Dir        string // everything that the stack writes
	Bin        string // directory of the binaries agent and dispatcher
	Python     string // interpreter of the trainer's environment
	TrainerDir string // scripts/train
	BaseModels []string
	GPUs       int      // pretended GPUs of each agent
	Settings   []string // KEY=VALUE for both binaries, last wins

	DatabaseURL string
	RedisURL    string
	SupabaseURL string
	SupabaseKey string

	Say func(string) // progress in words for a person; nil is silent
}

// Stack is the running system.
type Stack struct {
	Config
	PG    *services.PG          // nil when the database is somebody else's
	Redis *services.RedisServer // nil likewise
	Store *storage.Client       // as the service role
	Pool  *pgxpool.Pool         // as the owner of the database

	JWTSecret     string
	agentURL      string // database URL of the agents' login
	dispatcherURL string // and of the dispatchers'
	storageOn     net.Listener
	storage       *local.Server
	server        *http.Server
	procs         []*Process
}

// Start brings up the services, migrates, and makes the buckets. Dispatchers
// and agents are started one by one.
func Start(ctx context.Context, c Config) (_ *Stack, err error) {
	if c.Say == nil {
		c.Say = func(string) {}
	}
	if c.Dir, err = filepath.Abs(c.Dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the data directory: %w", err)
	}
	s := &Stack{Config: c}
	defer func() {
		if err != nil {
			_ = s.Stop()
		}
	}()
	if err := s.startPostgres(ctx); err != nil {
		return nil, err
	}
	if err := s.startRedis(ctx); err != nil {
		return nil, err
	}
	if err := s.startStorage(ctx); err != nil {
		return nil, err
	}
	if err := s.migrate(ctx); err != nil {
		return nil, err
	}
	if s.Pool, err = pgxpool.New(ctx, s.DatabaseURL); err != nil {
		return nil, fmt.Errorf("open the database: %w", err)
	}
	return s, s.makeLogins(ctx)
}

func (s *Stack) startPostgres(ctx context.Context) error {
	if s.DatabaseURL != "" {
		s.Say("using the Postgres of DATABASE_URL")
		return nil
	}
	s.Say("starting Postgres")
	pg, err := services.Postgres(ctx, services.PostgresConfig{Dir: filepath.Join(s.Dir, "postgres")})
	if err != nil {
		return err
	}
	s.PG, s.DatabaseURL = pg, pg.URL()
	return nil
}

func (s *Stack) startRedis(ctx context.Context) error {
	if s.RedisURL != "" {
		s.Say("using the Redis of REDIS_URL")
		return nil
	}
	r, err := services.Redis(ctx, services.RedisConfig{Dir: filepath.Join(s.Dir, "redis"), AppendOnly: true})
	if err != nil {
		return err
	}
	s.Redis, s.RedisURL = r, r.URL()
	s.Say("started " + r.Kind())
	return nil
}

func (s *Stack) startStorage(ctx context.Context) error {
	s.JWTSecret = secret()
	if s.SupabaseURL == "" {
		s.Say("starting a local store that speaks the Supabase Storage API")
		s.SupabaseKey = s.token("service_role", "")
		srv, err := local.New(local.Config{Dir: filepath.Join(s.Dir, "storage"), Secret: s.JWTSecret, ServiceKey: s.SupabaseKey, AnonKey: s.token("anon", "")})
		if err != nil {
			return fmt.Errorf("open the local store: %w", err)
		}
		s.storage = srv
		if s.storageOn, err = (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0"); err != nil {
			return fmt.Errorf("listen for the local store: %w", err)
		}
		s.server = &http.Server{Handler: srv, ReadHeaderTimeout: 5 * time.Second}
		go func() { _ = s.server.Serve(s.storageOn) }() // Stop closes it
		s.SupabaseURL = "http://" + s.storageOn.Addr().String()
	} else {
		s.Say("using the Storage of SUPABASE_URL")
	}
	c, err := storage.Open(storage.Config{URL: s.SupabaseURL, Key: s.SupabaseKey})
	if err != nil {
		return err
	}
	s.Store = c
	for name, limit := range buckets {
		if err := c.EnsureBucket(ctx, name, storage.BucketOptions{FileSizeLimit: limit}); err != nil {
			return err
		}
	}
	return nil
}

// token mints a key of the local project.
func (s *Stack) token(role, sub string) string {
	claims := jwt.MapClaims{"role": role, "iss": "lorayard-dev", "aud": "authenticated", "exp": time.Now().Add(365 * 24 * time.Hour).Unix()}
	if sub != "" {
		claims["sub"] = sub
	}
	t, err := jwt.NewWithClaims(jwt.SigningMethodHS256, claims).SignedString([]byte(s.JWTSecret))
	if err != nil {
		panic(err) // HMAC over JSON of our own cannot fail
	}
	return t
}

// UserToken is what the app's user sends to the local store.
func (s *Stack) UserToken(user string) string { return s.token("authenticated", user) }

// AnonKey is the key that the app's pages carry.
func (s *Stack) AnonKey() string { return s.token("anon", "") }

func (s *Stack) migrate(ctx context.Context) error {
	s.Say("migrating the database")
	st, err := store.Open(ctx, s.DatabaseURL, store.Options{Name: "devstack", MaxConns: 2})
	if err != nil {
		return err
	}
	defer st.Close()
	ms, err := store.Migrations(deploy.Migrations)
	if err != nil {
		return err
	}
	standIns := ""
	if s.PG != nil {
		standIns = deploy.StandIns
	}
	_, err = st.Migrate(ctx, ms, standIns)
	return err
}

// makeLogins makes the logins of agents and dispatchers: each may do what its
// role may, and nothing else.
func (s *Stack) makeLogins(ctx context.Context) (err error) {
	if s.agentURL, err = s.login(ctx, "lorayard_agent"); err != nil {
		return err
	}
	s.dispatcherURL, err = s.login(ctx, "lorayard_dispatcher")
	return err
}

// login makes a login in a role and returns the database's URL with it.
func (s *Stack) login(ctx context.Context, role string) (string, error) {
	u, err := url.Parse(s.DatabaseURL)
	if err != nil {
		return "", errors.New("parse the database URL: it is not of the form postgres://user:password@host:port/database")
	}
	// Logins are the cluster's, and stacks may share one.
	name, password := pgx.Identifier{role + "_" + strings.TrimPrefix(u.Path, "/")}.Sanitize(), secret()
	for _, sql := range []string{
		`DO $$ BEGIN CREATE ROLE ` + name + ` LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$`,
		`ALTER ROLE ` + name + ` PASSWORD '` + password + `'`,
		`GRANT ` + role + ` TO ` + name,
	} {
		if _, err := s.Pool.Exec(ctx, sql); err != nil {
			return "", fmt.Errorf("make a login in role %s: %w", role, err)
		}
	}
	u.User = url.UserPassword(role+"_"+strings.TrimPrefix(u.Path, "/"), password)
	return u.String(), nil
}

func secret() string {
	b := make([]byte, 24)
	_, _ = rand.Read(b) // never fails, by its documentation
	return hex.EncodeToString(b)
}

// Dispatcher starts one.
func (s *Stack) Dispatcher(ctx context.Context, name string, settings ...string) (*Process, error) {
	ops, err := services.FreePort()
	if err != nil {
		return nil, err
	}
	env := append([]string{
		"DATABASE_URL=" + s.dispatcherURL, "REDIS_URL=" + s.RedisURL, "BASE_MODELS=" + strings.Join(s.BaseModels, ","),
		"SUPABASE_URL=" + s.SupabaseURL, "SUPABASE_SECRET_KEY=" + s.SupabaseKey,
		"OPS_ADDR=127.0.0.1:" + strconv.Itoa(ops), "PRESENCE=tcp://127.0.0.1:0",
	}, append(s.Settings, settings...)...)
	return s.process(ctx, name, filepath.Join(s.Bin, "dispatcher"), []string{"serve"}, env, ops)
}

// Agent starts one with a data directory of its own; starting the same id
// again takes the directory over, as on a real host.
func (s *Stack) Agent(ctx context.Context, id string, settings ...string) (*Process, error) {
	ops, err := services.FreePort()
	if err != nil {
		return nil, err
	}
	env := append([]string{
		"AGENT_ID=" + id, "DATABASE_URL=" + s.agentURL, "REDIS_URL=" + s.RedisURL, "SUPABASE_URL=" + s.SupabaseURL,
		"DATA_DIR=" + filepath.Join(s.Dir, id), "MODELS_DIR=" + s.Models(),
		"TRAINER_PYTHON=" + s.Python, "TRAINER_DIR=" + s.TrainerDir, "PRETEND_GPUS=" + strconv.Itoa(s.GPUs),
		"OPS_ADDR=127.0.0.1:" + strconv.Itoa(ops),
	}, append(s.Settings, settings...)...)
	return s.process(ctx, id, filepath.Join(s.Bin, "agent"), []string{"run"}, env, ops)
}

// DispatcherURL and AgentURL are the database with the logins of dispatchers and
// of agents.
func (s *Stack) DispatcherURL() string { return s.dispatcherURL }

// AgentURL is described at DispatcherURL.
func (s *Stack) AgentURL() string { return s.agentURL }

// AgentDatabaseAt is the agents' database URL by another address: that of a
// proxy before it.
func (s *Stack) AgentDatabaseAt(addr string) string { return at(s.agentURL, addr) }

// DatabaseAt and RedisAt are the like for the dispatchers' database and Redis.
func (s *Stack) DatabaseAt(addr string) string { return at(s.dispatcherURL, addr) }

// RedisAt is the URL of Redis by another address.
func (s *Stack) RedisAt(addr string) string { return at(s.RedisURL, addr) }

func at(rawURL, addr string) string {
	u, err := url.Parse(rawURL)
	if err != nil {
		panic(err) // a URL of our own making
	}
	u.Host = addr
	return u.String()
}

// Operate runs a verb of the dispatcher's binary as an operator does, and
// returns what it printed.
func (s *Stack) Operate(ctx context.Context, args ...string) (string, error) {
	return run(ctx, filepath.Join(s.Bin, "dispatcher"), args, "DATABASE_URL="+s.DatabaseURL)
}

// Tell runs a verb of the agent's binary on the host of agent id.
func (s *Stack) Tell(ctx context.Context, id string, args ...string) (string, error) {
	return run(ctx, filepath.Join(s.Bin, "agent"), args, "DATA_DIR="+filepath.Join(s.Dir, id))
}

// Models is the directory of the base models.
func (s *Stack) Models() string { return filepath.Join(s.Dir, "models") }

// Stop ends everything that Start and its methods started, agents first.
func (s *Stack) Stop() error {
	var errs []error
	for i := len(s.procs) - 1; i >= 0; i-- {
		errs = append(errs, s.procs[i].Stop(90*time.Second))
	}
	if s.Pool != nil {
		s.Pool.Close()
	}
	if s.Store != nil {
		s.Store.Close()
	}
	if s.server != nil {
		errs = append(errs, s.server.Close())
	}
	if s.storage != nil {
		errs = append(errs, s.storage.Close())
	}
	if s.Redis != nil {
		errs = append(errs, s.Redis.Stop())
	}
	if s.PG != nil {
		errs = append(errs, s.PG.Stop())
	}
	return errors.Join(errs...)
}
