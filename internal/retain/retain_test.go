package retain_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/retain"
	"lorayard/internal/storage"
	"lorayard/internal/storage/local"
	"lorayard/internal/store"
	"lorayard/internal/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

func uuid(n int) string { return fmt.Sprintf("00000000-0000-4000-8000-%012d", n) }

// bucket lends a store with bucket lora-models.
func bucket(t *testing.T) *storage.Client {
	t.Helper()
	srv, err := local.New(local.Config{Dir: t.TempDir(), Secret: "secret-of-this-test", ServiceKey: "key"})
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(srv)
	t.Cleanup(s.Close)
	c, err := storage.Open(storage.Config{URL: s.URL, Key: "key"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	if err := c.EnsureBucket(t.Context(), "lora-models", storage.BucketOptions{}); err != nil {
		t.Fatal(err)
	}
	return c
}

// world is one job of one user, its database and its objects.
type world struct {
	t    *testing.T
	db   *storetest.DB
	s    *storage.Client
	user string
	id   job.ID
	n    int // attempts so far
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) put(keys ...string) {
	w.t.Helper()
	for _, key := range keys {
		name := filepath.Join(w.t.TempDir(), "x")
		w.must(os.WriteFile(name, []byte(key), 0o600))
		_, err := w.s.Upload(w.t.Context(), "lora-models", key, name, storage.Options{})
		w.must(err)
	}
}

// attempt has the job's next attempt accepted.
func (w *world) attempt() job.Ref {
	w.t.Helper()
	ctx := w.t.Context()
	a := store.Agent{ID: "a", Boot: uuid(1), BaseModels: []string{"m"}, Devices: []store.Device{{UUID: "GPU-0", Class: "A100-80GB", MemoryBytes: 80 << 30}}}
	_, err := w.db.Store.Register(ctx, a, time.Hour, nil)
	w.must(err)
	sends, err := w.db.Store.Assign(ctx, []store.Assignment{{Job: w.id, Attempt: w.n, Agent: "a", Devices: []string{"GPU-0"}}})
	w.must(err)
	if len(sends) != 1 {
		w.t.Fatal("not assigned")
	}
	w.n++
	ref := sends[0].Task.Ref
	ref.Nonce = uuid(10 + w.n)
	_, err = w.db.Store.Accept(ctx, a, ref)
	w.must(err)
	return ref
}

func (w *world) folder(ref job.Ref) string {
	return fmt.Sprintf("%s/%s/a%d-%s", w.user, w.id, ref.Attempt, ref.Nonce)
}

func (w *world) artifact(ref job.Ref) string {
	return w.db.Text(`SELECT lorayard.artifact_of($1, $2, $3)`, w.id, ref.Attempt, ref.Nonce)
}

// checkpoint publishes one with two files.
func (w *world) checkpoint(ref job.Ref, step int, loss float64) {
	w.t.Helper()
	path := fmt.Sprintf("%s/step-%08d", w.folder(ref), step)
	w.put(path+"/state.pt", path+"/manifest.json")
	w.must(w.db.Store.AddCheckpoint(w.t.Context(), ref, job.Checkpoint{Step: step, Loss: loss, Bucket: "lora-models", Path: path, Files: []job.File{}}))
}

// left lists what is in Storage, without the user's folder.
func (w *world) left() string {
	w.t.Helper()
	var keys []string
	for i, err := range w.s.List(w.t.Context(), "lora-models", "") {
		w.must(err)
		keys = append(keys, strings.NewReplacer(w.user+"/", "", string(w.id)+"/", "").Replace(i.Key))
	}
	slices.Sort(keys)
	return strings.Join(keys, "\n")
}

func TestWhatNobodyNeedsIsRemovedAndNothingElse(t *testing.T) {
	db := storetest.New(t)
	w := &world{t: t, db: db, s: bucket(t), user: db.User()}
	w.id = job.ID(db.Job(w.user, db.Dataset(w.user)))
	spec, err := job.ParseSpec("balanced", []byte(storetest.Hyperparameters), []byte(storetest.GPUConfig), job.Policy{BaseModels: []string{"m"}})
	w.must(err)
	_, err = db.Store.Admit(t.Context(), []store.Admission{{ID: w.id, Spec: spec, Hyperparameters: []byte(storetest.Hyperparameters), GPUConfig: []byte(storetest.GPUConfig)}})
	w.must(err)
	keeper := &retain.Keeper{
		Store: db.Store, Storage: w.s, Metrics: metrics.NewDispatcher(""), Log: slog.New(slog.DiscardHandler),
		Config: retain.Config{Checkpoints: 2, Settled: time.Hour, Zombie: time.Minute, Every: time.Hour},
	}
	sweep := func() {
		t.Helper()
		w.must(keeper.Sweep(context.WithoutCancel(t.Context())))
	}
	const others = "somebody/else/x"
	w.put(others)

	first := w.attempt()
	for step, loss := range []float64{3, 1, 2, 2.5, 2.2} { // step 1 is the best
		w.checkpoint(first, step, loss)
	}
	w.put(w.folder(first)+"/step-00000005/half", w.user+"/"+w.artifact(first)+"/adapter.safetensors")
	sweep() // it runs: only spare checkpoints go
	keep := []string{"step-00000001/manifest.json", "step-00000001/state.pt", "step-00000003/manifest.json", "step-00000003/state.pt", "step-00000004/manifest.json", "step-00000004/state.pt"}
	of := func(ref job.Ref, names ...string) (out []string) {
		for _, n := range names {
			out = append(out, fmt.Sprintf("a%d-%s/%s", ref.Attempt, ref.Nonce, n))
		}
		return out
	}
	want := func(keys ...string) {
		t.Helper()
		keys = append(keys, others)
		slices.Sort(keys)
		if got := w.left(); got != strings.Join(keys, "\n") {
			t.Errorf("left:\n%s\nwant:\n%s", got, strings.Join(keys, "\n"))
		}
	}
	partial := w.artifact(first) + "/adapter.safetensors"
	want(append(of(first, append(keep, "step-00000005/half")...), partial)...)

	_, err = db.Store.Settle(t.Context(), first, store.End{Outcome: store.OutcomeHandedBack, Failure: &job.Failure{Kind: job.Preempted}})
	w.must(err)
	sweep() // it may be a zombie's: not yet
	want(append(of(first, append(keep, "step-00000005/half")...), partial)...)
	db.Exec(`UPDATE lorayard.attempts SET ended_at = ended_at - interval '10 minutes', accepted_at = accepted_at - interval '10 minutes', assigned_at = assigned_at - interval '10 minutes'`)
	db.Exec(`UPDATE lorayard.jobs SET not_before = now() - interval '1 s'`)
	sweep() // its checkpoints stay, the job goes on from them
	want(of(first, keep...)...)

	second := w.attempt()
	w.checkpoint(second, 6, 2)
	w.put(w.user + "/" + w.artifact(second) + "/adapter.safetensors")
	_, err = db.Store.Settle(t.Context(), second, store.End{Outcome: store.OutcomeCompleted, Artifact: &store.Artifact{
		ID: w.artifact(second), Files: map[string]string{}, QualityMetrics: map[string]any{}, TrainingSummary: map[string]any{}, Metrics: map[string]any{},
	}})
	w.must(err)
	db.Exec(`UPDATE lorayard.attempts SET ended_at = now() - interval '5 minutes', accepted_at = now() - interval '5 minutes', assigned_at = now() - interval '5 minutes' WHERE attempt = 2`)
	sweep()
	adapter := w.artifact(second) + "/adapter.safetensors"
	want(append(append(of(first, keep[:2]...), of(first, keep[4:]...)...), append(of(second, "step-00000006/manifest.json", "step-00000006/state.pt"), adapter)...)...)

	db.Exec(`UPDATE training_jobs SET completed_at = now() - interval '2 hours'`)
	sweep()
	want(adapter)
	if n := db.Text(`SELECT count(*) FILTER (WHERE swept) || ' ' || count(*) FROM lorayard.attempts`); n != "2 2" {
		t.Errorf("swept, attempts: %s", n)
	}
	if n := db.Text(`SELECT count(*) FROM checkpoints`); n != "0" {
		t.Errorf("%s checkpoints are in the table", n)
	}
}
