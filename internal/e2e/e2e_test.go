// Package e2e_test runs the real binaries on the real Postgres and Redis and
// looks at what the app would see.
package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"lorayard/internal/devstack"
	"lorayard/internal/devstack/services"
	"lorayard/internal/storetest"
)

const model = "lorayard/demo-llama"

// bin is where TestMain put the binaries.
var bin string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "lorayard-e2e")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		bin = dir
		for _, name := range []string{"agent", "dispatcher"} {
			out, err := exec.Command("go", "build", "-o", filepath.Join(dir, name), "lorayard/cmd/"+name).CombinedOutput()
			if err != nil {
				fmt.Fprintf(os.Stderr, "build %s: %v\n%s", name, err, out)
				return 1
			}
		}
		return m.Run()
	}())
}

// stack is a devstack with what a test wants to ask it.
type stack struct {
	*devstack.Stack
	t *testing.T
}

func python(t *testing.T) string {
	t.Helper()
	p := os.Getenv("TRAINER_PYTHON")
	if p == "" {
		if os.Getenv("CI") == "true" {
			t.Fatal("TRAINER_PYTHON is not set: run `make test`, which sets up the trainer's environment")
		}
		t.Skip("TRAINER_PYTHON is not set: run `make test`")
	}
	return p
}

func start(t *testing.T, settings ...string) *stack {
	t.Helper()
	py := python(t)
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	// The settings of the tests: quick to give up on the dead.
	settings = append([]string{"PATIENCE=0s", "LEASE=3s", "MIN_FREE_BYTES=1", "LOG_LEVEL=debug", "CHECKPOINT_EVERY=1s"}, settings...)
	s, err := devstack.Start(t.Context(), devstack.Config{
		Dir: dir, Bin: bin, Python: py, TrainerDir: filepath.Join(root, "scripts", "train"), BaseModels: []string{model}, GPUs: 2, Settings: settings,
	})
	if err != nil {
		if errors.Is(err, services.ErrMissing) && os.Getenv("CI") != "true" {
			t.Skip(err)
		}
		t.Fatal(err)
	}
	x := &stack{Stack: s, t: t}
	t.Cleanup(func() {
		if t.Failed() {
			x.dump()
		} else {
			storetest.Check(t, s.Pool)
		}
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	return x
}

// dump shows what the parts said, for a failed test.
func (s *stack) dump() {
	logs, _ := filepath.Glob(filepath.Join(s.Dir, "*.log"))
	for _, path := range logs {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if len(raw) > 12_000 {
			raw = raw[len(raw)-12_000:]
		}
		s.t.Logf("%s:\n%s", filepath.Base(path), raw)
	}
}

func (s *stack) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *stack) dispatcher(name string) *devstack.Process {
	s.t.Helper()
	p, err := s.Dispatcher(s.t.Context(), name)
	s.must(err)
	return p
}

func (s *stack) agent(id string, settings ...string) *devstack.Process {
	s.t.Helper()
	p, err := s.Agent(s.t.Context(), id, settings...)
	s.must(err)
	return p
}

func (s *stack) text(sql string, args ...any) string {
	s.t.Helper()
	var v *string
	if err := s.Pool.QueryRow(context.Background(), sql, append([]any{pgx.QueryExecModeSimpleProtocol}, args...)...).Scan(&v); err != nil {
		s.t.Fatalf("%s: %v", sql, err)
	}
	if v == nil {
		return ""
	}
	return *v
}

// until waits for a query to answer "t".
func (s *stack) until(what, sql string, args ...any) {
	s.t.Helper()
	deadline := time.Now().Add(3 * time.Minute)
	for s.text("SELECT ("+sql+")", args...) != "t" {
		if time.Now().After(deadline) {
			s.t.Fatalf("%s did not happen; the job stands at %s", what, s.text(`SELECT string_agg(row_to_json(t)::text, E'\n') FROM (SELECT status, current_stage, current_step, error_message FROM training_jobs) t`))
		}
		time.Sleep(50 * time.Millisecond) // a poll of the outside, as the app's page does
	}
}

func (s *stack) status(id, want string) {
	s.t.Helper()
	s.until("status "+want, `SELECT status IN ('completed', 'failed', 'cancelled') FROM training_jobs WHERE id = $1`, id)
	s.until("settlement", `SELECT state = 'settled' FROM lorayard.jobs WHERE job_id = $1`, id)
	if got := s.text(`SELECT status FROM training_jobs WHERE id = $1`, id); got != want {
		s.t.Fatalf("the job is %s (%s), want %s", got, s.text(`SELECT error_message FROM training_jobs WHERE id = $1`, id), want)
	}
}

// dataset uploads a file for a new user.
func (s *stack) dataset(path string) (user, dataset string) {
	s.t.Helper()
	user, err := s.User(s.t.Context())
	s.must(err)
	dataset, err = s.Upload(s.t.Context(), user, path, "workshop talks")
	s.must(err)
	return user, dataset
}

// write makes a data file.
func (s *stack) write(name, content string) string {
	s.t.Helper()
	path := filepath.Join(s.t.TempDir(), name)
	s.must(os.WriteFile(path, []byte(content), 0o600))
	return path
}

func (s *stack) insert(user, dataset string, over map[string]any) string {
	s.t.Helper()
	h := map[string]any{"learning_rate": 1e-3, "batch_size": 4, "epochs": 2, "rank": 8, "alpha": 16, "dropout": 0}
	for k, v := range over {
		h[k] = v
	}
	id, err := s.Insert(s.t.Context(), devstack.Job{
		User: user, Dataset: dataset, Preset: "custom", Hyperparameters: h, GPUConfig: map[string]any{"type": "A100-80GB", "count": 1},
	})
	s.must(err)
	return id
}

// fakeModel is a directory that passes for a base model where nothing loads it.
func (s *stack) fakeModel() {
	s.t.Helper()
	dir := filepath.Join(s.Models(), filepath.FromSlash(model))
	s.must(os.MkdirAll(dir, 0o755))
	s.must(os.WriteFile(filepath.Join(dir, "config.json"), []byte("{}"), 0o600))
}

const oneTalk = `{"messages":[{"role":"user","content":"My chain slips."},{"role":"assistant","content":"Let us look at the wear first."}]}` + "\n"

// dry are the settings of a run without torch.
func dry(steps int, step time.Duration) []string {
	return []string{"TRAINER_BACKEND=dry", fmt.Sprintf("DRY_STEPS=%d", steps), "DRY_STEP_TIME=" + step.String()}
}

func TestAJobWithTheDryBackend(t *testing.T) {
	s := start(t, dry(30, 20*time.Millisecond)...)
	s.fakeModel()
	s.dispatcher("dispatcher")
	s.agent("host-1")
	user, data := s.dataset(s.write("talks.jsonl", strings.Repeat(oneTalk, 20)))
	id := s.insert(user, data, nil)
	s.status(id, "completed")
	if got := s.text(`SELECT count(*) || ' ' || min(step) || ' ' || max(step) FROM metrics_points WHERE job_id = $1`, id); got != "30 1 30" {
		t.Errorf("metrics rows: %s", got)
	}
	if got := s.text(`SELECT string_agg(type, ',' ORDER BY type) FROM notifications WHERE user_id = $1`, user); got != "artifact_ready,job_completed,job_started" {
		t.Errorf("notifications: %s", got)
	}
}
