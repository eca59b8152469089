// Dispatcher is the control plane: it admits the rows that the app inserts,
// decides where each runs, hands them over and takes back what was lost.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/google/uuid"

	"lorayard/deploy"
	"lorayard/internal/config"
	"lorayard/internal/daemon"
	"lorayard/internal/dispatch"
	"lorayard/internal/grant"
	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/place"
	"lorayard/internal/queue"
	"lorayard/internal/retain"
	"lorayard/internal/storage"
	"lorayard/internal/store"
	"lorayard/internal/trace"
	"lorayard/internal/vet"
	"lorayard/internal/watch"
)

// version is set by the linker.
var version = "development"

func main() {
	ctx, stop := daemon.Signals(context.Background())
	defer stop()
	if err := run(ctx, os.Args[1:], os.Environ(), os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "dispatcher:", err)
		os.Exit(1)
	}
}

const usage = `dispatcher admits, places and hands over LoRA training jobs.

Usage: dispatcher <verb> [flags]

  serve                run the control plane (several may run, one leads)
  migrate              bring the database to this version's schema

  agents               list the agents, their devices, and why they take nothing new
  jobs                 list the jobs that are not settled, and why they wait
  cordon AGENT         give the agent nothing new; what it runs goes on (--reason)
  uncordon AGENT       give it work again, also after a drain
  drain AGENT          cordon it, and have its attempts elsewhere --within a time
  forget AGENT         take an agent that is gone for good off the list
  pause JOB            save a checkpoint and keep the job in the queue
  resume JOB           let a paused job go on
  prioritize JOB N     place the job before those of lower priority (0 is usual)

  validate FILE        judge a data file on this machine as one that is uploaded; 1 when it is bad

  version              print the version
  help                 print this text; "dispatcher <verb> --help" lists its flags
`

// settings are those of serve. deploy/dispatcher.env.example is made of them.
type settings struct {
	DatabaseURL config.Secret `flag:"database-url" env:"DATABASE_URL" required:"true" example:"postgres://user:password@host:5432/postgres" help:"the app's Postgres; a session connection (port 5432), not a transaction pooler"`
	RedisURL    config.Secret `flag:"redis-url" env:"REDIS_URL" required:"true" example:"redis://:password@host:6379/0" help:"Redis that carries the hand-over; appendonly yes, maxmemory-policy noeviction"`
	SupabaseURL string        `flag:"supabase-url" env:"SUPABASE_URL" required:"true" example:"https://ref.supabase.co" help:"the Supabase project, for Storage"`
	SupabaseKey config.Secret `flag:"supabase-key" env:"SUPABASE_SECRET_KEY" required:"true" example:"sb_secret_..." help:"its secret key; with it dispatchers sign what agents may touch, one object at a time"`
	BaseModels  []string      `flag:"base-models" env:"BASE_MODELS" required:"true" example:"meta-llama/Llama-3.1-8B-Instruct" help:"base models that jobs may name; the first is the default"`
	MaxGPUs     int           `flag:"max-gpus" env:"MAX_GPUS" default:"8" help:"the most GPUs that one job may ask for"`
	OpsAddr     string        `flag:"ops-addr" env:"OPS_ADDR" default:"127.0.0.1:9090" help:"address of /metrics, /healthz and /readyz"`
	Presence    string        `flag:"presence" env:"PRESENCE" default:"tcp://:9092" help:"where agents keep a stream: tcp://host:port, or tls://host:port with a certificate; off: nowhere, which costs seconds when an agent dies"`
	Advertise   string        `flag:"advertise" env:"ADVERTISE" example:"tcp://dispatcher-1.internal:9092" help:"the same as agents reach it; empty: this host's name and PRESENCE's port"`
	TLSCert     string        `flag:"presence-tls-cert" env:"PRESENCE_TLS_CERT" help:"certificate file (PEM) for tls://"`
	TLSKey      string        `flag:"presence-tls-key" env:"PRESENCE_TLS_KEY" help:"its key file (PEM)"`
	Poll        time.Duration `flag:"poll" env:"POLL" default:"1s" help:"catch-up round when no notification comes"`
	Resend      time.Duration `flag:"resend" env:"RESEND" default:"1s" help:"send an attempt again that is not accepted after"`
	Accept      time.Duration `flag:"accept" env:"ACCEPT" default:"5s" help:"take an attempt back that is not accepted after"`
	Lease       time.Duration `flag:"lease" env:"LEASE" default:"5s" help:"the agents' lease, waited out after an outage of the database"`
	Term        time.Duration `flag:"term" env:"LEADER_TERM" default:"3s" help:"the leader's own lease: a standby leads at most a third longer after it died"`
	MinRun      time.Duration `flag:"min-run" env:"MIN_RUN" default:"10m" help:"an attempt is not preempted before it ran so long"`
	Reserve     time.Duration `flag:"reserve-after" env:"RESERVE_AFTER" default:"10m" help:"a job for several GPUs that waits so long may reserve a host"`
	MaxReserved int           `flag:"max-reserved" env:"MAX_RESERVED" default:"2" help:"the most hosts that are reserved at once"`
	UserGPUs    int           `flag:"user-gpus" env:"USER_GPUS" default:"0" help:"GPUs at once of a user without a row in lorayard.quotas; 0: no limit"`
	UserQueued  int           `flag:"user-queued" env:"USER_QUEUED" default:"0" help:"jobs of such a user that take part in the queue at once; 0: no limit"`
	Patience    time.Duration `flag:"patience" env:"PATIENCE" default:"30s" help:"how long beyond its lease a silent agent keeps its attempts"`
	Checkpoints int           `flag:"keep-checkpoints" env:"KEEP_CHECKPOINTS" default:"3" help:"newest checkpoints of a job that stay in Storage, beside its best one"`
	Settled     time.Duration `flag:"keep-settled" env:"KEEP_SETTLED" default:"168h" help:"how long the checkpoints of a settled job stay"`
	Zombie      time.Duration `flag:"sweep-after" env:"SWEEP_AFTER" default:"1h" help:"what an ended attempt left in Storage is removed after; longer than the agents' OUT_OF_TOUCH"`
	ScratchDir  string        `flag:"scratch-dir" env:"SCRATCH_DIR" help:"where a data set lies on its way to Storage, two at a time and up to 1 GiB each; empty: the system's directory for such files"`
	Traces      string        `flag:"traces" env:"TRACES" example:"http://collector:4318" help:"OTLP endpoint over HTTP that gets spans of jobs; empty: nobody does"`
	LogLevel    string        `flag:"log-level" env:"LOG_LEVEL" default:"info" help:"debug, info, warn or error"`
	LogFormat   string        `flag:"log-format" env:"LOG_FORMAT" default:"auto" help:"text, json, or auto: text on a terminal"`
}

// migration are the settings of migrate.
type migration struct {
	DatabaseURL config.Secret `flag:"database-url" env:"DATABASE_URL" required:"true" example:"postgres://postgres:password@host:5432/postgres" help:"the app's Postgres, as a role that may create schemas and roles"`
	StandIns    bool          `flag:"stand-ins" env:"STAND_INS" help:"for a database that is not Supabase: create what it lacks of Supabase Auth"`
}

func run(ctx context.Context, args, environ []string, stdout, stderr io.Writer) error {
	verb := "serve"
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		verb, args = args[0], args[1:]
	}
	switch verb {
	case "serve":
		var s settings
		if err := load(&s, args, environ, stdout); err != nil {
			return ignoreHelp(err)
		}
		return serve(ctx, s, stderr)
	case "migrate":
		var m migration
		if err := load(&m, args, environ, stdout); err != nil {
			return ignoreHelp(err)
		}
		return migrate(ctx, m, stdout)
	case "agents", "jobs", "cordon", "uncordon", "drain", "forget", "pause", "resume", "prioritize":
		return operate(ctx, verb, args, environ, stdout)
	case "validate":
		return validate(args, environ, stdout)
	case "version":
		fmt.Fprintln(stdout, "dispatcher", version)
		return nil
	case "help":
		fmt.Fprint(stdout, usage)
		return nil
	default:
		return fmt.Errorf("%q is not a verb; see `dispatcher help`", verb)
	}
}

func load(dst any, args, environ []string, stdout io.Writer) error {
	rest, err := config.Load(dst, args, environ)
	if errors.Is(err, config.ErrHelp) {
		config.Usage(stdout, dst)
		return err
	}
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%q is neither a flag nor expected here", rest[0])
	}
	return err
}

func ignoreHelp(err error) error {
	if errors.Is(err, config.ErrHelp) {
		return nil
	}
	return err
}

func serve(ctx context.Context, s settings, stderr io.Writer) error {
	log := daemon.Logger(stderr, s.LogLevel, s.LogFormat)
	queue.LogTo(log)
	st, err := store.Open(ctx, s.DatabaseURL.Reveal(), store.Options{Name: "lorayard-dispatcher"})
	if err != nil {
		return err
	}
	defer st.Close()
	ms, err := store.Migrations(deploy.Migrations)
	if err != nil {
		return err
	}
	if err := st.CheckSchema(ctx, ms); err != nil {
		return err
	}
	if err := st.CheckAlone(ctx); err != nil {
		return err
	}
	q, err := queue.Dial(s.RedisURL.Reveal())
	if err != nil {
		return err
	}
	defer q.Close()
	if err := q.Ping(ctx); err != nil {
		log.WarnContext(ctx, "Redis is not there yet; attempts are sent when it is", "err", err)
	}
	m := metrics.NewDispatcher(version)
	bucket, err := storage.Open(storage.Config{URL: s.SupabaseURL, Key: s.SupabaseKey.Reveal()})
	if err != nil {
		return err
	}
	defer bucket.Close()
	keeper := &retain.Keeper{Store: st, Storage: bucket, Metrics: m, Log: log, Config: retain.Config{
		Checkpoints: max(1, s.Checkpoints), Settled: s.Settled, Zombie: s.Zombie, Every: 10 * time.Minute,
	}}
	minter := &grant.Minter{Store: st, Storage: bucket, Metrics: m, Log: log}
	hostname, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("read the host name: %w", err)
	}
	self := store.Dispatcher{ID: uuid.NewString(), Name: hostname, Version: version}
	streams, parts, err := presenceOf(ctx, s, &self, log)
	if err != nil {
		return err
	}
	spans, err := trace.Open(ctx, trace.Config{Endpoint: s.Traces, Service: "lorayard-dispatcher", Instance: hostname, Version: version, Log: log})
	if err != nil {
		return err
	}
	defer spans.Close()
	policy := place.Usual()
	policy.MinRun, policy.ReserveAfter, policy.MaxReserved = s.MinRun, s.Reserve, s.MaxReserved
	made := dispatch.Parts{
		Self: self, Store: st, Queue: q, Metrics: m, Trace: spans, Log: log,
		Config: dispatch.Config{
			Policy: job.Policy{BaseModels: s.BaseModels, MaxGPUs: s.MaxGPUs}, Place: policy, UserGPUs: s.UserGPUs, UserQueued: s.UserQueued,
			Poll: s.Poll, Resend: s.Resend, Accept: s.Accept, Lease: s.Lease, Patience: s.Patience, Term: s.Term,
		},
	}
	if streams != nil {
		made.Push = streams.Push
	}
	made.Grants = minter.Wake
	vetter := &vet.Vetter{Store: st, Storage: bucket, Queue: q, RedisURL: s.RedisURL.Reveal(), Dir: s.ScratchDir, Metrics: m, Log: log}
	made.Datasets = vetter.Wake
	d := dispatch.New(made)
	if streams != nil {
		streams.Verify, streams.Died = verify(st), died(st, m, log)
		m.ReadStreams(func() int { return len(streams.Present()) })
		streams.Connected, streams.Gone = d.Back, d.Gone
	}
	watcher := &watch.Watch{Store: st, Metrics: m, Log: log, Leads: d.Leads, Trace: spans}
	ready := func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		return st.Ping(ctx)
	}
	log.InfoContext(ctx, "dispatcher starts", "version", version, "base_models", s.BaseModels, "presence", self.Address)
	parts = append([]daemon.Part{daemon.Ops(s.OpsAddr, m.Handler(), ready)}, append(parts, daemon.Part{Name: "dispatch", Run: d.Run}, daemon.Part{Name: "grants", Run: minter.Run}, daemon.Part{Name: "data sets", Run: vetter.Run}, daemon.Part{Name: "retention", Run: keeper.Run}, daemon.Part{Name: "watch", Run: watcher.Run})...)
	return daemon.Run(ctx, log, parts...)
}

func migrate(ctx context.Context, m migration, stdout io.Writer) error {
	st, err := store.Open(ctx, m.DatabaseURL.Reveal(), store.Options{Name: "lorayard-migrate", MaxConns: 2})
	if err != nil {
		return err
	}
	defer st.Close()
	ms, err := store.Migrations(deploy.Migrations)
	if err != nil {
		return err
	}
	standIns := ""
	if m.StandIns {
		standIns = deploy.StandIns
	}
	applied, err := st.Migrate(ctx, ms, standIns)
	for _, v := range applied {
		fmt.Fprintln(stdout, "applied", v)
	}
	if err == nil && len(applied) == 0 {
		fmt.Fprintln(stdout, "the schema is up to date")
	}
	return err
}
