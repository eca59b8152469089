// Package e2e_test runs the real binaries on the real Postgres and Redis and
// looks at what the app would see.
package e2e_test

import (
	"context"
	"errors"
	"flag"
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
		// The tests of faults wait for leases much more than they compute.
		flag.Parse()
		if err := flag.Set("test.parallel", "6"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return storetest.Run(m)
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
	return startOn(t, "", settings...)
}

// startOn is start on a migrated database of somebody else's; empty means a
// cluster of the stack's own.
func startOn(t *testing.T, database string, settings ...string) *stack {
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
		DatabaseURL: database,
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

func (s *stack) dispatcher(name string, settings ...string) *devstack.Process {
	s.t.Helper()
	p, err := s.Dispatcher(s.t.Context(), name, settings...)
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

// torchModel makes the demo's base model in the stack.
func (s *stack) torchModel(data string) {
	s.t.Helper()
	place := filepath.Join(s.Models(), filepath.FromSlash(model))
	s.must(os.MkdirAll(filepath.Dir(place), 0o755))
	cmd := exec.Command(s.Python, "-m", "lora_train.demo_model", "--out", place, "--data", data)
	cmd.Dir = s.TrainerDir
	if out, err := cmd.CombinedOutput(); err != nil {
		s.t.Fatalf("make the base model: %v\n%s", err, out)
	}
}

// The whole path with the real trainer, and everything that may befall it: the
// agent is killed in mid-training, Redis is flushed and restarted, another
// agent goes on from the newest checkpoint.
func TestARealJobSurvivesItsAgent(t *testing.T) {
	s := start(t)
	data := filepath.Join(s.TrainerDir, "testdata", "demo.jsonl")
	s.torchModel(data)
	s.dispatcher("dispatcher")
	first := s.agent("host-1")
	user, set := s.dataset(data)
	id := s.insert(user, set, map[string]any{"epochs": 2})

	s.until("a checkpoint", `SELECT count(*) > 0 FROM checkpoints WHERE job_id = $1 AND step >= 3`, id)
	pid := s.text(`SELECT string_agg(attempt::text, ',') FROM lorayard.attempts WHERE job_id = $1`, id)
	if pid != "1" {
		t.Fatalf("attempts: %s", pid)
	}
	first.Kill()
	s.must(s.Redis.FlushAll(t.Context()))
	s.must(s.Redis.Restart(t.Context()))
	s.agent("host-2")
	s.status(id, "completed")

	if got := s.text(`SELECT string_agg(attempt || ' ' || agent_id || ' ' || outcome, ', ' ORDER BY attempt) FROM lorayard.attempts WHERE job_id = $1`, id); got != "1 host-1 lost, 2 host-2 completed" {
		t.Errorf("attempts: %s", got)
	}
	if s.text(`SELECT resume_step >= 3 FROM lorayard.attempts WHERE job_id = $1 AND attempt = 2`, id) != "t" {
		t.Error("attempt 2 began anew")
	}
	if got := s.text(`SELECT count(*) = max(step) AND min(step) = 1 AND max(step) = (SELECT total_steps FROM training_jobs WHERE id = $1) FROM metrics_points WHERE job_id = $1`, id); got != "t" {
		t.Errorf("a metrics row is missing: %s", s.text(`SELECT string_agg(step::text, ',' ORDER BY step) FROM metrics_points WHERE job_id = $1`, id))
	}
	if got := s.text(`SELECT string_agg(type || ':' || n, ' ' ORDER BY type) FROM (SELECT type, count(*) AS n FROM notifications WHERE user_id = $1 GROUP BY type) x`, user); got != "artifact_ready:1 job_completed:1 job_started:1" {
		t.Errorf("notifications: %s", got)
	}
	// The bill, computed here from the intervals and the rate card.
	var seconds, amount float64
	s.must(s.Pool.QueryRow(t.Context(), `SELECT sum(extract(epoch FROM upper(during) - lower(during)))::float8 FROM lorayard.usage_intervals WHERE job_id = $1 AND attempt = 2`, id).Scan(&seconds))
	s.must(s.Pool.QueryRow(t.Context(), `SELECT amount::float8 FROM cost_records WHERE job_id = $1`, id).Scan(&amount))
	if want := 3.50 * seconds / 3600; amount < want-0.0051 || amount > want+0.0051 {
		t.Errorf("billed $%.2f for %.1f GPU seconds at $3.50 an hour, want $%.4f", amount, seconds, want)
	}
	s.loadsWithPeft(id)
}

// loadsWithPeft downloads the artifact as the app does and puts it on the base
// model with peft.
func (s *stack) loadsWithPeft(id string) {
	s.t.Helper()
	dir := s.t.TempDir()
	rows, err := s.Pool.Query(s.t.Context(), `SELECT a.key, a.value, f ->> 'sha256' FROM model_artifacts m, jsonb_each_text(m.artifacts) a, jsonb_array_elements(m.training_summary -> 'files') f
		WHERE m.job_id = $1 AND f ->> 'name' = a.key`, id)
	s.must(err)
	type file struct{ Name, Path, SHA256 string }
	files, err := pgx.CollectRows(rows, pgx.RowToStructByPos[file])
	s.must(err)
	if len(files) < 5 {
		s.t.Fatalf("the artifact has %d files", len(files))
	}
	for _, f := range files {
		_, err := s.Store.Download(s.t.Context(), "lora-models", f.Path, filepath.Join(dir, f.Name), f.SHA256)
		s.must(err)
	}
	const load = `
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)
x = torch.arange(16).unsqueeze(0)
before = base(input_ids=x).logits
after = PeftModel.from_pretrained(base, sys.argv[2])(input_ids=x).logits
sys.exit(0 if torch.isfinite(after).all() and not torch.equal(before, after) else 3)
`
	out, err := exec.Command(s.Python, "-c", load, filepath.Join(s.Models(), filepath.FromSlash(model)), dir).CombinedOutput()
	if err != nil {
		s.t.Errorf("peft does not load the adapter: %v\n%s", err, out)
	}
}

func TestCancellingTheRowStopsTheTrainer(t *testing.T) {
	s := start(t, dry(2000, 100*time.Millisecond)...)
	s.fakeModel()
	s.dispatcher("dispatcher")
	s.agent("host-1")
	user, data := s.dataset(s.write("talks.jsonl", strings.Repeat(oneTalk, 20)))
	id := s.insert(user, data, nil)
	s.until("training", `SELECT status = 'running' AND current_step > 2 FROM training_jobs WHERE id = $1`, id)
	if n := trainers(t, id); n == 0 {
		t.Fatal("no trainer runs")
	}
	done, err := s.Cancel(t.Context(), user, id)
	if err != nil || !done {
		t.Fatalf("cancel: %t, %v", done, err)
	}
	s.status(id, "cancelled")
	// Settled means that the process group was gone before.
	if n := trainers(t, id); n != 0 {
		t.Errorf("%d trainers of a cancelled job are alive", n)
	}
	if got := s.text(`SELECT count(*) FROM model_artifacts`); got != "0" {
		t.Error("a cancelled job has an artifact")
	}
	var seconds float64
	s.must(s.Pool.QueryRow(t.Context(), `SELECT extract(epoch FROM a.ended_at - t.completed_at)::float8 FROM lorayard.attempts a JOIN training_jobs t ON t.id = a.job_id`).Scan(&seconds))
	t.Logf("cancel to settled: %.2f s", seconds)
}

// trainers counts the trainer processes of a job by their command line.
func trainers(t *testing.T, id string) (n int) {
	t.Helper()
	found, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range found {
		raw, err := os.ReadFile(path)
		if err == nil && strings.Contains(string(raw), id) && strings.Contains(string(raw), "lora_train") {
			n++
		}
	}
	return n
}

func TestADrainedAgentHandsItsJobBack(t *testing.T) {
	s := start(t, dry(60, 100*time.Millisecond)...)
	s.fakeModel()
	s.dispatcher("dispatcher")
	first := s.agent("host-1")
	user, data := s.dataset(s.write("talks.jsonl", strings.Repeat(oneTalk, 20)))
	id := s.insert(user, data, nil)
	s.until("training", `SELECT current_step > 5 FROM training_jobs WHERE id = $1`, id)
	s.must(first.Stop(30 * time.Second))
	s.agent("host-2")
	s.status(id, "completed")
	if got := s.text(`SELECT string_agg(agent_id || ' ' || outcome || ' ' || (resume_step > 5), ', ' ORDER BY attempt) FROM lorayard.attempts WHERE job_id = $1`, id); got != "host-1 handed_back false, host-2 completed true" {
		t.Errorf("attempts: %s", got)
	}
}

func TestBadJobsFailInWords(t *testing.T) {
	s := start(t)
	s.fakeModel()
	s.dispatcher("dispatcher")
	user, data := s.dataset(s.write("talks.jsonl", oneTalk))
	stranger, theirs := s.dataset(s.write("talks.jsonl", oneTalk))
	if stranger == user {
		t.Fatal("two users are one")
	}
	good := devstack.Job{User: user, Dataset: data, Preset: "fast", Hyperparameters: map[string]any{}, GPUConfig: map[string]any{"type": "H100", "count": 1}}
	for name, c := range map[string]struct {
		change func(*devstack.Job)
		words  string
	}{
		"unknown preset": {func(j *devstack.Job) { j.Preset = "turbo" }, "use fast, balanced, quality or custom"},
		"rank 0":         {func(j *devstack.Job) { j.Hyperparameters = map[string]any{"rank": 0} }, "rank is 0"},
		"9 GPUs":         {func(j *devstack.Job) { j.GPUConfig = map[string]any{"type": "H100", "count": 9} }, "from 1 to 8"},
		"no price":       {func(j *devstack.Job) { j.GPUConfig = map[string]any{"type": "T4", "count": 1} }, "is not offered here: choose one of"},
		"foreign model":  {func(j *devstack.Job) { j.Hyperparameters = map[string]any{"base_model": "../../etc/passwd"} }, "choose one of"},
	} {
		j := good
		c.change(&j)
		id, err := s.Insert(t.Context(), j)
		s.must(err)
		s.status(id, "failed")
		if got := s.text(`SELECT error_message FROM training_jobs WHERE id = $1`, id); !strings.Contains(got, c.words) {
			t.Errorf("%s: %q does not say %q", name, got, c.words)
		}
		if got := s.text(`SELECT count(*) FROM notifications WHERE type = 'job_failed' AND metadata ->> 'job_id' = $1`, id); got != "1" {
			t.Errorf("%s: %s notifications", name, got)
		}
	}
	j := good
	j.Dataset = theirs
	if _, err := s.Insert(t.Context(), j); err == nil || !strings.Contains(err.Error(), "not yours") {
		t.Errorf("a job on a foreign data set: %v", err)
	}
	// Rows that the app's server inserts are looked at again.
	for name, c := range map[string]struct{ set, hyper, words string }{
		"foreign data set": {theirs, `{}`, "choose one of your own"},
		"not an object":    {data, `[1]`, "hyperparameters is a list"},
		"deleted data set": {s.text(`INSERT INTO datasets (user_id, name, storage_path, file_name, status, deleted_at) VALUES ($1, 'x', 'gone', 'x', 'ready', now()) RETURNING id`, user), `{}`, "was deleted"},
	} {
		id := s.text(`INSERT INTO training_jobs (user_id, dataset_id, preset_id, hyperparameters, gpu_config, total_epochs, estimated_total_cost)
			VALUES ($1, $2, 'fast', $3::jsonb, '{}', 1, 1) RETURNING id`, user, c.set, c.hyper)
		s.status(id, "failed")
		if got := s.text(`SELECT error_message FROM training_jobs WHERE id = $1`, id); !strings.Contains(got, c.words) {
			t.Errorf("%s: %q does not say %q", name, got, c.words)
		}
	}
}

func TestBadDataFilesFailInWords(t *testing.T) {
	s := start(t)
	s.torchModel(filepath.Join(s.TrainerDir, "testdata", "demo.jsonl"))
	s.dispatcher("dispatcher")
	s.agent("host-1")
	missing, err := s.User(t.Context())
	s.must(err)
	jobs := map[string]string{} // id → words
	for content, words := range map[string]string{
		"":                                      "the file is empty",
		"\xff\xfe\x00":                          "not JSON Lines in UTF-8",
		strings.Repeat(oneTalk, 12) + "{oops\n": "line 13 is not JSON",
		`{"messages":[{"role":"user","content":"x"}]}` + "\n": "no assistant text",
	} {
		user, data := s.dataset(s.write("bad.jsonl", content))
		jobs[s.insert(user, data, nil)] = words
	}
	set := s.text(`INSERT INTO datasets (user_id, name, storage_path, file_name, status) VALUES ($1, 'x', $1 || '/nowhere/x.jsonl', 'x.jsonl', 'ready') RETURNING id`, missing)
	jobs[s.insert(missing, set, nil)] = "upload it again"
	for id, words := range jobs {
		s.status(id, "failed")
		if got := s.text(`SELECT error_message FROM training_jobs WHERE id = $1`, id); !strings.Contains(got, words) {
			t.Errorf("%q does not say %q", got, words)
		}
		if got := s.text(`SELECT coalesce(sum(amount), 0) FROM cost_records WHERE job_id = $1`, id); got != "0" {
			t.Errorf("a job that trained nothing was billed %s", got)
		}
	}
}

// Whatever happens, no key of ours is in a log or in the trainer's sight.
func TestNoSecretLeaves(t *testing.T) {
	s := start(t, dry(40, 50*time.Millisecond)...)
	s.fakeModel()
	s.dispatcher("dispatcher")
	s.agent("host-1")
	user, data := s.dataset(s.write("talks.jsonl", strings.Repeat(oneTalk, 20)))
	id := s.insert(user, data, nil)
	s.until("training", `SELECT current_step > 2 FROM training_jobs WHERE id = $1`, id)
	secrets := []string{s.SupabaseKey, password(s.DatabaseURL), password(s.RedisURL)}
	environs, err := filepath.Glob("/proc/[0-9]*/environ")
	s.must(err)
	looked, agents := 0, 0
	for _, path := range environs {
		cmdline, err := os.ReadFile(filepath.Join(filepath.Dir(path), "cmdline"))
		ours := strings.HasPrefix(string(cmdline), filepath.Join(bin, "agent"))
		if err != nil || !ours && !strings.Contains(string(cmdline), id) {
			continue
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		if ours { // it has its own logins, and no key of Storage
			agents++
			if strings.Contains(string(raw), s.SupabaseKey) {
				t.Errorf("the Storage key is in the environment of an agent")
			}
			continue
		}
		looked++
		for _, secret := range secrets {
			if strings.Contains(string(raw), secret) {
				t.Errorf("a secret is in the environment of %s", strings.ReplaceAll(string(cmdline), "\x00", " "))
			}
		}
	}
	if looked == 0 || agents == 0 {
		t.Errorf("%d processes of a trainer and %d agents were looked at", looked, agents)
	}
	s.status(id, "completed")
	logs, err := filepath.Glob(filepath.Join(s.Dir, "*.log"))
	s.must(err)
	for _, path := range logs {
		raw, err := os.ReadFile(path)
		s.must(err)
		for _, secret := range secrets {
			if strings.Contains(string(raw), secret) {
				t.Errorf("a secret is in %s", filepath.Base(path))
			}
		}
	}
}

func password(rawURL string) string {
	_, rest, _ := strings.Cut(rawURL, "://")
	userinfo, _, _ := strings.Cut(rest, "@")
	_, pass, _ := strings.Cut(userinfo, ":")
	return pass
}
