// Agent runs on a GPU host: it takes the attempts that the dispatcher assigned
// to it and runs the trainer on the host's devices.
package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"

	"lorayard/internal/agent"
	"lorayard/internal/attempt"
	"lorayard/internal/config"
	"lorayard/internal/daemon"
	"lorayard/internal/gpu"
	"lorayard/internal/metrics"
	"lorayard/internal/presence"
	"lorayard/internal/proc"
	"lorayard/internal/queue"
	"lorayard/internal/storage"
	"lorayard/internal/store"
	"lorayard/internal/trace"
	"lorayard/internal/trainer"
	"lorayard/internal/wire"
)

// version is set by the linker.
var version = "development"

func main() {
	// The shim is this binary, started again between agent and trainer.
	if len(os.Args) > 1 && os.Args[1] == "shim" {
		os.Exit(proc.RunShim(os.Args[2:], func(report string) {
			// Nobody is left to be told of an error; the lease runs out.
			_ = presence.SendReport(context.Background(), report)
		}))
	}
	// Before anything else: a new version may be put in the place of this one.
	self, selfErr := os.Executable()
	ctx, stop := daemon.Signals(context.Background())
	defer stop()
	err := run(ctx, os.Args[1:], os.Environ(), os.Stdout, os.Stderr)
	if errors.Is(err, agent.ErrRestart) && selfErr == nil {
		// The same process goes on as the version that is on the disk now; a
		// supervisor sees no difference. If that fails it starts us anew.
		err = fmt.Errorf("start %s anew: %w", self, syscall.Exec(self, os.Args, os.Environ()))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "agent:", err)
		os.Exit(1)
	}
}

const usage = `agent runs LoRA training jobs on the GPUs of this host.

Usage: agent <verb> [flags]

  run        take jobs until told to stop; SIGTERM drains at once: checkpoint, hand back, leave
  drain      let the running agent take nothing new, finish or checkpoint --within a time, and leave
  restart    start the running agent anew, as the version on disk; its trainers run on
  status     say what the running agent does
  gpus       list the GPUs and how they are; --watch goes on
  quarantine list the devices of the running agent; "quarantine lift UUID" lets one be used again
  doctor     look at everything that a run needs and say what to do about problems
  version    print the version
  help       print this text; "agent <verb> --help" lists its flags
`

// settings are those of run and doctor; deploy/agent.env.example is made of
// them.
type settings struct {
	ID          string        `flag:"id" env:"AGENT_ID" example:"gpu-host-1" help:"name of this agent, one per host; empty: the host name"`
	DatabaseURL config.Secret `flag:"database-url" env:"DATABASE_URL" required:"true" example:"postgres://gpu_host_1:password@host:5432/postgres" help:"the app's Postgres, as a login in role lorayard_agent"`
	RedisURL    config.Secret `flag:"redis-url" env:"REDIS_URL" required:"true" example:"redis://:password@host:6379/0" help:"Redis that carries the hand-over"`
	SupabaseURL string        `flag:"supabase-url" env:"SUPABASE_URL" required:"true" example:"https://ref.supabase.co" help:"the Supabase project, for Storage; an agent holds no key of it"`
	DataDir     string        `flag:"data-dir" env:"DATA_DIR" default:"/var/lib/lorayard" help:"run directories, spools and cached data sets"`
	ModelsDir   string        `flag:"models-dir" env:"MODELS_DIR" default:"/var/lib/lorayard/models" help:"base models, each in <dir>/<name> with config.json and safetensors"`
	Python      string        `flag:"trainer-python" env:"TRAINER_PYTHON" required:"true" example:"/opt/lorayard/venv/bin/python" help:"absolute path of the trainer environment's interpreter"`
	TrainerDir  string        `flag:"trainer-dir" env:"TRAINER_DIR" default:"/opt/lorayard/scripts/train" help:"directory that holds the package lora_train"`
	PretendGPUs int           `flag:"pretend-gpus" env:"PRETEND_GPUS" default:"0" help:"for development: so many pretended GPUs, training on the CPU"`
	PretendType string        `flag:"pretend-class" env:"PRETEND_CLASS" default:"A100-80GB" help:"class of the pretended GPUs"`
	GPULibrary  string        `flag:"gpu-library" env:"GPU_LIBRARY" help:"path of NVIDIA's libnvidia-ml.so.1; empty: where the system has it"`
	KernelLog   string        `flag:"kernel-log" env:"KERNEL_LOG" default:"/dev/kmsg" help:"where the GPU driver's worst errors are told; for tests a pipe, empty: nowhere"`
	Backend     string        `flag:"backend" env:"TRAINER_BACKEND" default:"torch" help:"torch, or dry: a scripted run without torch, for development"`
	DrySteps    int           `flag:"dry-steps" env:"DRY_STEPS" default:"20" help:"steps of a dry run"`
	DryStepTime time.Duration `flag:"dry-step-time" env:"DRY_STEP_TIME" default:"50ms" help:"time of one step of a dry run"`
	Threads     int           `flag:"threads" env:"TRAINER_THREADS" default:"0" help:"CPU threads of a trainer; 0: it chooses"`
	Checkpoint  time.Duration `flag:"checkpoint-every" env:"CHECKPOINT_EVERY" default:"4m" help:"how often the trainer saves a checkpoint"`
	LeaveGrace  time.Duration `flag:"leave-grace" env:"LEAVE_GRACE" default:"60s" help:"how long a trainer may take to save and leave"`
	MinFree     int64         `flag:"min-free-bytes" env:"MIN_FREE_BYTES" default:"2147483648" help:"free disk below which nothing is started"`
	HandOver    time.Duration `flag:"hand-over" env:"HAND_OVER" default:"60s" help:"how long trainers wait for the new process when the agent restarts; after that they save a checkpoint and leave"`
	OutOfTouch  time.Duration `flag:"out-of-touch" env:"OUT_OF_TOUCH" default:"15m" help:"a trainer ends when the lease was not renewed for so long"`
	Lease       time.Duration `flag:"lease" env:"LEASE" default:"5s" help:"how long the lease lasts beyond a renewal"`
	Renew       time.Duration `flag:"renew" env:"RENEW" default:"1s" help:"how often the lease is renewed"`
	Labels      []string      `flag:"labels" env:"LABELS" example:"zone=north,disk=nvme" help:"key=value pairs of this host that jobs may ask for"`
	PresenceCA  string        `flag:"presence-ca" env:"PRESENCE_CA" help:"certificate file (PEM) that tls:// dispatchers must show; empty: the system's"`
	OpsAddr     string        `flag:"ops-addr" env:"OPS_ADDR" default:"127.0.0.1:9091" help:"address of /metrics, /healthz and /readyz"`
	Traces      string        `flag:"traces" env:"TRACES" example:"http://collector:4318" help:"OTLP endpoint over HTTP that gets spans of jobs; empty: nobody does"`
	LogLevel    string        `flag:"log-level" env:"LOG_LEVEL" default:"info" help:"debug, info, warn or error"`
	LogFormat   string        `flag:"log-format" env:"LOG_FORMAT" default:"auto" help:"text, json, or auto: text on a terminal"`
}

func run(ctx context.Context, args, environ []string, stdout, stderr io.Writer) error {
	verb := "run"
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		verb, args = args[0], args[1:]
	}
	switch verb {
	case "gpus":
		return gpus(ctx, args, environ, stdout)
	case "quarantine":
		return quarantine(ctx, args, environ, stdout)
	case "drain", "restart", "status":
		return tell(ctx, verb, args, environ, stdout)
	case "run", "doctor":
		var s settings
		dir := ""
		if verb == "doctor" {
			var err error
			if dir, args, err = recordDir(args); err != nil {
				return err
			}
		}
		rest, err := config.Load(&s, args, environ)
		switch {
		case errors.Is(err, config.ErrHelp):
			config.Usage(stdout, &s)
			if verb == "doctor" {
				fmt.Fprint(stdout, recordHelp)
			}
			return nil
		case err != nil && verb == "run":
			return err
		case err == nil && len(rest) > 0:
			return fmt.Errorf("%q is neither a flag nor expected here", rest[0])
		}
		if s.ID == "" { // err may be what the doctor has to tell
			name, unnamed := os.Hostname()
			if unnamed != nil {
				return fmt.Errorf("read the host name: %w", unnamed)
			}
			s.ID = name
		}
		if verb == "doctor" {
			found := doctor(ctx, s, err, stdout)
			if dir != "" {
				return errors.Join(found, record(ctx, s, dir, stdout))
			}
			return found
		}
		return serve(ctx, s, environ, stderr)
	case "version":
		fmt.Fprintln(stdout, "agent", version)
		return nil
	case "help":
		fmt.Fprint(stdout, usage)
		return nil
	default:
		return fmt.Errorf("%q is not a verb; see `agent help`", verb)
	}
}

func serve(ctx context.Context, s settings, environ []string, stderr io.Writer) error {
	log := daemon.Logger(stderr, s.LogLevel, s.LogFormat).With("agent", s.ID)
	queue.LogTo(log)
	for _, dir := range []string{s.DataDir, s.ModelsDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make %s: %w", dir, err)
		}
	}
	lock, err := agent.Lock(s.DataDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	instance, generation, err := instanceOf(s.DataDir)
	if err != nil {
		return err
	}
	labels, err := labelsOf(s.Labels)
	if err != nil {
		return err
	}
	roots, ca, err := rootsOf(s.PresenceCA)
	if err != nil {
		return err
	}
	host, err := openDevices(ctx, s)
	if err != nil {
		return err
	}
	defer host.close()
	devices := host.list
	locks, err := gpu.LockDevices(gpu.LockDirs(), devices)
	if err != nil {
		return err
	}
	defer locks.Close()
	places := gpu.FindPlaces("/sys", devices)
	st, err := waitForStore(ctx, s, log)
	if err != nil || st == nil {
		return err
	}
	defer st.Close()
	m := metrics.NewAgent(version)
	bucket, err := storage.Open(storage.Config{URL: s.SupabaseURL, Retried: m.Retried})
	if err != nil {
		return err
	}
	defer bucket.Close()
	hostname, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("read the host name: %w", err)
	}
	models, err := modelsIn(s.ModelsDir)
	if err != nil {
		return err
	}
	self := store.Agent{ID: s.ID, Boot: uuid.NewString(), Instance: instance, Generation: generation, Hostname: hostname, Version: version, BaseModels: models, Labels: labels, Devices: agent.Offer(devices, host.links)}
	tr := &trainer.Trainer{Python: s.Python, Dir: s.TrainerDir, Shim: []string{"/proc/self/exe", "shim"}, Backend: s.Backend}
	if s.Backend == "dry" {
		tr.Dry = &wire.Dry{Steps: s.DrySteps, StepSeconds: s.DryStepTime.Seconds(), Loss: [2]float64{3.2, 0.4}}
	}
	spans, err := trace.Open(ctx, trace.Config{Endpoint: s.Traces, Service: "lorayard-agent", Instance: s.ID, Version: version, Log: log})
	if err != nil {
		return err
	}
	defer spans.Close()
	runner := &attempt.Runner{
		Agent: s.ID, Boot: self.Boot, CA: ca, Store: st, Storage: bucket, Trainer: tr, Metrics: m, Trace: spans, Log: log,
		Config: attempt.Config{
			DataDir: s.DataDir, ModelsDir: s.ModelsDir, Pretend: s.PretendGPUs > 0, Threads: s.Threads,
			CheckpointEvery: s.Checkpoint, LeaveGrace: s.LeaveGrace, HandOver: s.HandOver, MinFreeBytes: s.MinFree, Environ: environ,
		},
	}
	ledger := gpu.NewLedger(devices)
	health, err := gpu.OpenHealth(gpu.HealthConfig{Dir: s.DataDir, Boot: gpu.BootID(), Devices: devices, Ledger: ledger, Log: log})
	if err != nil {
		return err
	}
	kernelLog := s.KernelLog
	if s.PretendGPUs > 0 && kernelLog == gpu.KernelLog {
		kernelLog = "" // it has nothing to say of them
	}
	streams := &presence.Client{Agent: s.ID, Boot: self.Boot, Version: version, Roots: roots, Log: log}
	reading, preflight, poll := host.watch(health, m, log)
	a := agent.New(agent.Parts{
		Self: self, Store: st, Ledger: ledger, Health: health, Places: places, Runner: runner, Metrics: m, Trace: spans, Log: log,
		Config:   agent.Config{Lease: s.Lease, Renew: s.Renew, OutOfTouch: s.OutOfTouch, HandOver: s.HandOver},
		NewNonce: uuid.NewString, Reading: reading, Preflight: preflight,
		Dispatchers: func(addresses []string) {
			streams.SetAddresses(addresses)
			if err := runner.Announce(addresses); err != nil {
				log.WarnContext(ctx, "shims do not know where to report to", "err", err)
			}
		},
	})
	streams.Look = a.Look
	m.ReadDevices(a.Readings)
	m.ReadJobs(a.Standings)
	m.ReadStreams(streams.Connected)
	log.InfoContext(ctx, "agent starts", "version", version, "devices", len(devices), "pretend", s.PretendGPUs > 0)
	restart := false
	err = daemon.Run(ctx, log,
		daemon.Ops(s.OpsAddr, m.Handler(), a.Ready),
		daemon.Part{Name: "presence", Run: func(ctx context.Context) error { streams.Run(ctx); return nil }},
		daemon.Part{Name: "devices", Run: func(ctx context.Context) error { health.Run(ctx, kernelLog); return nil }},
		daemon.Part{Name: "polls", Run: func(ctx context.Context) error { poll(ctx); return nil }},
		daemon.Part{Name: "control", Run: func(ctx context.Context) error { return a.Control(ctx, s.DataDir) }},
		daemon.Part{Name: "agent", Run: func(ctx context.Context) error {
			err := a.Run(ctx)
			if restart = errors.Is(err, agent.ErrRestart); restart {
				return nil
			}
			return err
		}},
		daemon.Part{Name: "queue", Run: func(ctx context.Context) error {
			return queue.Serve(ctx, queue.Server{
				URL: s.RedisURL.Reveal(), Agent: s.ID, Concurrency: 2*len(devices) + 4, Log: log,
				Admit:  func() bool { return a.Ready() == nil },
				Accept: a.Accept,
				GateActive: func(active bool) {
					m.QueueGate.Set(0)
					if active {
						m.QueueGate.Set(1)
					}
				},
			})
		}},
	)
	if err == nil && restart {
		return agent.ErrRestart
	}
	return err
}

// instanceOf names a data directory, once for its whole life: an agent that is
// started on the same one is the heir of the process before. The generation
// counts them, so that a registration of an earlier one that comes late is told
// from its heir's.
func instanceOf(dataDir string) (id string, generation int64, err error) {
	path := filepath.Join(dataDir, "instance")
	raw, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", 0, fmt.Errorf("read the data directory's name: %w", err)
	}
	_, _ = fmt.Sscan(string(raw), &id, &generation) // a new directory has neither
	if uuid.Validate(id) != nil {
		id, generation = uuid.NewString(), 0
	}
	generation++
	if err := os.WriteFile(path+".new", fmt.Appendf(nil, "%s %d\n", id, generation), 0o600); err != nil {
		return "", 0, fmt.Errorf("name the data directory: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return "", 0, fmt.Errorf("name the data directory: %w", err)
	}
	return id, generation, nil
}

func labelsOf(pairs []string) (map[string]string, error) {
	labels := map[string]string{}
	for _, pair := range pairs {
		k, v, ok := strings.Cut(pair, "=")
		if !ok || k == "" {
			return nil, fmt.Errorf("LABELS: %q is not of the form key=value", pair)
		}
		labels[k] = v
	}
	return labels, nil
}

// rootsOf reads the certificates that dispatchers must show.
func rootsOf(path string) (*x509.CertPool, string, error) {
	if path == "" {
		return nil, "", nil
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, "", fmt.Errorf("read PRESENCE_CA: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(raw) {
		return nil, "", fmt.Errorf("PRESENCE_CA: %s holds no certificate in PEM", path)
	}
	return roots, string(raw), nil
}

// waitForStore connects to Postgres, however long it takes; nil when ctx ended.
func waitForStore(ctx context.Context, s settings, log *slog.Logger) (*store.Store, error) {
	for {
		st, err := store.Open(ctx, s.DatabaseURL.Reveal(), store.Options{Name: "lorayard-agent " + s.ID, MaxConns: 4})
		if err == nil {
			return st, nil
		}
		if ctx.Err() != nil {
			return nil, nil
		}
		log.WarnContext(ctx, "the database is not there yet", "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(2 * time.Second):
		}
	}
}

// modelsIn lists the base models in dir by name: <model> or <owner>/<model>.
func modelsIn(dir string) ([]string, error) {
	var names []string
	for _, pattern := range []string{"*/config.json", "*/*/config.json"} {
		found, err := filepath.Glob(filepath.Join(dir, filepath.FromSlash(pattern)))
		if err != nil {
			return nil, fmt.Errorf("look for base models: %w", err)
		}
		for _, f := range found {
			rel, err := filepath.Rel(dir, filepath.Dir(f))
			if err != nil {
				return nil, fmt.Errorf("look for base models: %w", err)
			}
			names = append(names, filepath.ToSlash(rel))
		}
	}
	return names, nil
}

func cpus() string {
	return fmt.Sprintf("%d CPU threads, %s/%s", runtime.NumCPU(), runtime.GOOS, runtime.GOARCH)
}
