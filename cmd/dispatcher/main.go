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

	"lorayard/deploy"
	"lorayard/internal/config"
	"lorayard/internal/daemon"
	"lorayard/internal/dispatch"
	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/queue"
	"lorayard/internal/store"
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

  serve      run the control plane (several may run, one leads)
  migrate    bring the database to this version's schema
  version    print the version
  help       print this text; "dispatcher <verb> --help" lists its flags
`

// settings are those of serve. deploy/dispatcher.env.example is made of them.
type settings struct {
	DatabaseURL config.Secret `flag:"database-url" env:"DATABASE_URL" required:"true" example:"postgres://user:password@host:5432/postgres" help:"the app's Postgres; a session connection (port 5432), not a transaction pooler"`
	RedisURL    config.Secret `flag:"redis-url" env:"REDIS_URL" required:"true" example:"redis://:password@host:6379/0" help:"Redis that carries the hand-over; appendonly yes, maxmemory-policy noeviction"`
	BaseModels  []string      `flag:"base-models" env:"BASE_MODELS" required:"true" example:"meta-llama/Llama-3.1-8B-Instruct" help:"base models that jobs may name; the first is the default"`
	MaxGPUs     int           `flag:"max-gpus" env:"MAX_GPUS" default:"8" help:"the most GPUs that one job may ask for"`
	OpsAddr     string        `flag:"ops-addr" env:"OPS_ADDR" default:"127.0.0.1:9090" help:"address of /metrics, /healthz and /readyz"`
	Poll        time.Duration `flag:"poll" env:"POLL" default:"1s" help:"catch-up round when no notification comes"`
	Resend      time.Duration `flag:"resend" env:"RESEND" default:"1s" help:"send an attempt again that is not accepted after"`
	Accept      time.Duration `flag:"accept" env:"ACCEPT" default:"5s" help:"take an attempt back that is not accepted after"`
	Lease       time.Duration `flag:"lease" env:"LEASE" default:"5s" help:"the agents' lease, waited out after an outage of the database"`
	Patience    time.Duration `flag:"patience" env:"PATIENCE" default:"30s" help:"how long beyond its lease a silent agent keeps its attempts"`
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
	case "version":
		fmt.Fprintln(stdout, "dispatcher", version)
		return nil
	case "help":
		fmt.Fprint(stdout, usage)
		return nil
	default:
		return fmt.Errorf("%q is not a verb; serve, migrate, version and help are", verb)
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
	q, err := queue.Dial(s.RedisURL.Reveal())
	if err != nil {
		return err
	}
	defer q.Close()
	if err := q.Ping(ctx); err != nil {
		log.WarnContext(ctx, "Redis is not there yet; attempts are sent when it is", "err", err)
	}
	m := metrics.NewDispatcher()
	d := dispatch.New(st, q, m, log, dispatch.Config{
		Policy: job.Policy{BaseModels: s.BaseModels, MaxGPUs: s.MaxGPUs},
		Poll:   s.Poll, Resend: s.Resend, Accept: s.Accept, Lease: s.Lease, Patience: s.Patience,
	})
	ready := func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		return st.Ping(ctx)
	}
	log.InfoContext(ctx, "dispatcher starts", "version", version, "base_models", s.BaseModels)
	return daemon.Run(ctx, log,
		daemon.Ops(s.OpsAddr, m.Handler(), ready),
		daemon.Part{Name: "dispatch", Run: d.Run},
	)
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
