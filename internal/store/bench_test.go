package store_test

import (
	"testing"
	"time"

	"github.com/google/uuid"

	"lorayard/internal/job"
	"lorayard/internal/store"
	"lorayard/internal/storetest"
)

// BenchmarkAttempt takes jobs through the store one after the other, on a
// Postgres that does not wait for its disk: what the statements themselves take.
func BenchmarkAttempt(b *testing.B) {
	db := storetest.New(b)
	ctx := b.Context()
	user := db.User()
	set := db.Dataset(user)
	a := store.Agent{ID: "a", Boot: uuid.NewString(), Instance: "a", Devices: []store.Device{{UUID: "GPU-1", Class: "A100-80GB", MemoryBytes: 80e9}}}
	if _, err := db.Store.Register(ctx, a, time.Hour, nil); err != nil {
		b.Fatal(err)
	}
	spent := map[string]time.Duration{}
	step := func(name string, do func() error) {
		began := time.Now()
		if err := do(); err != nil {
			b.Fatalf("%s: %v", name, err)
		}
		spent[name] += time.Since(began)
	}
	for b.Loop() {
		id := job.ID(db.Job(user, set))
		ref := job.Ref{Job: id, Attempt: 1, Nonce: uuid.NewString()}
		step("admit", func() error {
			_, err := db.Store.Admit(ctx, []store.Admission{{ID: id, Spec: job.Spec{GPUCount: 1, Epochs: 3}, Hyperparameters: []byte(storetest.Hyperparameters), GPUConfig: []byte(storetest.GPUConfig)}})
			return err
		})
		step("assign", func() error {
			_, err := db.Store.Assign(ctx, []store.Assignment{{Job: id, Agent: "a", Devices: []string{"GPU-1"}}})
			return err
		})
		step("accept", func() error { _, err := db.Store.Accept(ctx, a, ref); return err })
		step("renew", func() error {
			_, err := db.Store.Renew(ctx, a, time.Hour, store.AgentState{}, []job.Ref{ref})
			return err
		})
		step("settle", func() error {
			_, err := db.Store.Settle(ctx, ref, store.End{Outcome: store.OutcomeCompleted, Artifact: &store.Artifact{
				ID: uuid.NewString(), Files: map[string]string{}, QualityMetrics: map[string]any{}, TrainingSummary: map[string]any{}, Metrics: map[string]any{},
			}})
			return err
		})
	}
	for name, d := range spent {
		b.ReportMetric(float64(d.Microseconds())/float64(b.N), "µs-"+name)
	}
}
