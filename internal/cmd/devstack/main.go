// Devstack runs the whole system on this machine: `demo` takes one real job
// from an inserted row to a downloadable adapter and leaves, `dev` stays up,
// `fleet` pretends sixteen GPUs, jobs and faults for those who look at boards.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"lorayard/internal/config"
	"lorayard/internal/daemon"
	"lorayard/internal/devstack"
)

// model is the base model that is made on the spot.
const model = "lorayard/demo-llama"

type settings struct {
	Dir          string        `flag:"dir" env:"DEVSTACK_DIR" default:".data/stack" help:"where everything is kept"`
	Bin          string        `flag:"bin" env:"DEVSTACK_BIN" default:"bin" help:"directory of the binaries agent and dispatcher"`
	Python       string        `flag:"trainer-python" env:"TRAINER_PYTHON" required:"true" help:"interpreter of the trainer's environment"`
	TrainerDir   string        `flag:"trainer-dir" env:"TRAINER_DIR" default:"scripts/train" help:"directory of the package lora_train"`
	Data         string        `flag:"data" env:"DATA" default:"scripts/train/testdata/demo.jsonl" help:"data file of the demo's job"`
	Epochs       int           `flag:"epochs" env:"EPOCHS" default:"0" help:"epochs of the demo's job; 0: as many as fit into three minutes on two cores"`
	LearningRate float64       `flag:"learning-rate" env:"LEARNING_RATE" default:"0.005" help:"learning rate of the demo's job; high, because the base model is tiny"`
	GPUs         int           `flag:"gpus" env:"GPUS" default:"2" help:"pretended GPUs of the agent"`
	DatabaseURL  config.Secret `flag:"database-url" env:"DATABASE_URL" help:"use this Postgres instead of a throw-away one"`
	RedisURL     config.Secret `flag:"redis-url" env:"REDIS_URL" help:"use this Redis instead of a throw-away one"`
	SupabaseURL  string        `flag:"supabase-url" env:"SUPABASE_URL" help:"use this project's Storage instead of the local store"`
	SupabaseKey  config.Secret `flag:"supabase-key" env:"SUPABASE_SECRET_KEY" help:"the key for it"`
}

func main() {
	ctx, stop := daemon.Signals(context.Background())
	defer stop()
	err := run(ctx, os.Args[1:])
	switch {
	case err == nil:
	case errors.Is(err, errCancelled):
		os.Exit(130)
	default:
		fmt.Fprintln(os.Stderr, "devstack:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) (err error) {
	if len(args) > 0 && args[0] == "fleet" {
		return runFleet(ctx, args[1:])
	}
	if len(args) == 0 || (args[0] != "demo" && args[0] != "dev") {
		return errors.New("say demo, dev or fleet; devstack demo --help lists the settings")
	}
	var s settings
	if _, err := config.Load(&s, args[1:], os.Environ()); errors.Is(err, config.ErrHelp) {
		config.Usage(os.Stdout, &s)
		return nil
	} else if err != nil {
		return err
	}
	// Every run has a directory of its own, so that two do not meet.
	dir, err := filepath.Abs(filepath.Join(s.Dir, time.Now().Format("20060102-150405")))
	if err != nil {
		return err
	}
	if s.TrainerDir, err = filepath.Abs(s.TrainerDir); err != nil {
		return err
	}
	if s.Bin, err = filepath.Abs(s.Bin); err != nil {
		return err
	}
	if args[0] == "demo" {
		size, err := sizeOf(s.Data)
		if err != nil {
			return err
		}
		if s.Epochs == 0 {
			s.Epochs = epochsFor(size)
		}
	}
	begin := time.Now()
	say := func(what string) { fmt.Printf("  %5.1f s  %s\n", time.Since(begin).Seconds(), what) }
	fmt.Println("Lorayard, data in", dir)
	st, err := devstack.Start(ctx, devstack.Config{
		Dir: dir, Bin: s.Bin, Python: s.Python, TrainerDir: s.TrainerDir, BaseModels: []string{model}, GPUs: s.GPUs, Say: say,
		Settings:    []string{"CHECKPOINT_EVERY=10s", "PATIENCE=5s", "MIN_FREE_BYTES=268435456"},
		DatabaseURL: s.DatabaseURL.Reveal(), RedisURL: s.RedisURL.Reveal(), SupabaseURL: s.SupabaseURL, SupabaseKey: s.SupabaseKey.Reveal(),
	})
	if err != nil {
		return err
	}
	defer func() {
		say("stopping everything")
		err = errors.Join(err, st.Stop())
		fmt.Println("Nothing is left running. Logs and files are in", dir)
	}()
	if err := makeModel(ctx, st, s, say); err != nil {
		return err
	}
	dispatcher, err := st.Dispatcher(ctx, "dispatcher")
	if err != nil {
		return err
	}
	agent, err := st.Agent(ctx, "dev-host")
	if err != nil {
		return err
	}
	say("dispatcher and agent run")
	if args[0] == "dev" {
		return stay(ctx, st, dispatcher, agent)
	}
	return demo(ctx, st, s, say)
}

func sizeOf(path string) (int64, error) {
	st, err := os.Stat(path)
	if err != nil {
		return 0, fmt.Errorf("look at the data file: %w", err)
	}
	return st.Size(), nil
}

// epochsFor keeps the demo's job under three minutes: two cores train about
// 1,000 tokens a second of long examples, and a pair of the house format takes
// about 9 KB and 1,500 tokens.
func epochsFor(size int64) int {
	if size > 300<<10 {
		return 1
	}
	return 3
}

// makeModel makes the small base model, once for each data file.
func makeModel(ctx context.Context, st *devstack.Stack, s settings, say func(string)) error {
	digest, err := devstack.Digest(s.Data)
	if err != nil {
		return fmt.Errorf("read the data file: %w", err)
	}
	kept, err := filepath.Abs(filepath.Join(filepath.Dir(s.Dir), "models", digest[:12]))
	if err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(kept, "config.json")); err != nil {
		say("making a small base model (Llama architecture, tokenizer trained on the data); once, about half a minute")
		data, err := filepath.Abs(s.Data)
		if err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, s.Python, "-m", "lora_train.demo_model", "--out", kept, "--data", data)
		cmd.Dir = s.TrainerDir
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("make the base model: %w\n%s", err, strings.TrimSpace(string(out)))
		}
	}
	place := filepath.Join(st.Models(), filepath.FromSlash(model))
	if err := os.MkdirAll(filepath.Dir(place), 0o755); err != nil {
		return fmt.Errorf("place the base model: %w", err)
	}
	if err := os.CopyFS(place, os.DirFS(kept)); err != nil {
		return fmt.Errorf("place the base model: %w", err)
	}
	return nil
}

// stay prints what a person needs to poke at the stack, and waits.
func stay(ctx context.Context, st *devstack.Stack, dispatcher, agent *devstack.Process) error {
	user, err := st.User(ctx)
	if err != nil {
		return err
	}
	fmt.Printf(`
  Postgres     %s
  Redis        %s
  Storage      %s
  service key  %s
  a user       %s
  its token    %s
  dispatcher   %s/metrics   (log %s)
  agent        %s/metrics   (log %s)

Insert a row into training_jobs and watch it. Ctrl-C stops everything.
`, st.DatabaseURL, st.RedisURL, st.SupabaseURL, st.SupabaseKey, user, st.UserToken(user),
		dispatcher.OpsURL(), dispatcher.Log, agent.OpsURL(), agent.Log)
	select {
	case <-ctx.Done():
		return nil
	case <-dispatcher.Done():
		return fmt.Errorf("the dispatcher ended; its log is %s", dispatcher.Log)
	case <-agent.Done():
		return fmt.Errorf("the agent ended; its log is %s", agent.Log)
	}
}
