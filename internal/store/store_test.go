package store_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"lorayard/deploy"
	"lorayard/internal/devstack/services"
	"lorayard/internal/job"
	"lorayard/internal/store"
	"lorayard/internal/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

const ttl = 5 * time.Second

// nonces for tests are UUIDs that a reader can tell apart.
func nonce(n int) string { return fmt.Sprintf("00000000-0000-4000-8000-%012d", n) }

func agent(id string, boot int) store.Agent {
	return store.Agent{ID: id, Boot: nonce(boot), BaseModels: []string{"m"}, Devices: []store.Device{
		{UUID: "GPU-" + id + "-0", Class: "A100-80GB", Name: "pretend", MemoryBytes: 80 << 30, Pretend: true},
		{UUID: "GPU-" + id + "-1", Index: 1, Class: "A100-80GB", Name: "pretend", MemoryBytes: 80 << 30, Pretend: true},
	}}
}

// admitted inserts a job as the app does, admits it and registers agent a.
func admitted(t *testing.T, db *storetest.DB, a store.Agent) (id job.ID, user string) {
	t.Helper()
	user = db.User()
	id = job.ID(db.Job(user, db.Dataset(user)))
	admit(t, db, id)
	register(t, db, a)
	return id, user
}

// register registers a process that adopts nothing.
func register(t *testing.T, db *storetest.DB, a store.Agent) {
	t.Helper()
	if _, err := db.Store.Register(t.Context(), a, ttl, nil); err != nil {
		t.Fatal(err)
	}
}

// renew renews and returns what is wanted of the attempts.
func renew(t *testing.T, db *storetest.DB, a store.Agent, refs ...job.Ref) store.Wanted {
	t.Helper()
	w, err := db.Store.Renew(t.Context(), a, ttl, store.AgentState{}, refs)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func admit(t *testing.T, db *storetest.DB, id job.ID) {
	t.Helper()
	spec, err := job.ParseSpec("balanced", []byte(storetest.Hyperparameters), []byte(storetest.GPUConfig), job.Policy{BaseModels: []string{"m"}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = db.Store.Admit(t.Context(), []store.Admission{{ID: id, Spec: spec, Hyperparameters: []byte(storetest.Hyperparameters), GPUConfig: []byte(storetest.GPUConfig)}})
	if err != nil {
		t.Fatal(err)
	}
}

func assign(t *testing.T, db *storetest.DB, id job.ID, before int, a store.Agent) job.Ref {
	t.Helper()
	sends, err := db.Store.Assign(t.Context(), []store.Assignment{{Job: id, Attempt: before, Agent: a.ID, Devices: []string{a.Devices[0].UUID}}})
	if err != nil || len(sends) != 1 {
		t.Fatalf("assign: %+v, %v", sends, err)
	}
	return sends[0].Task.Ref
}

func accept(t *testing.T, db *storetest.DB, a store.Agent, ref job.Ref) job.Assignment {
	t.Helper()
	as, err := db.Store.Accept(t.Context(), a, ref)
	if err != nil {
		t.Fatal(err)
	}
	return as
}

func lost(err error) bool { return err != nil && job.KindOf(err) == job.LeaseLost }

func TestMigratingTwiceChangesNothing(t *testing.T) {
	db := storetest.New(t)
	ms, err := store.Migrations(deploy.Migrations)
	if err != nil {
		t.Fatal(err)
	}
	applied, err := db.Store.Migrate(t.Context(), ms, deploy.StandIns)
	if err != nil || len(applied) != 0 {
		t.Errorf("applied again: %v, %v", applied, err)
	}
	db.Exec(`DELETE FROM supabase_migrations.schema_migrations`) // as if pushed by hand before
	if applied, err = db.Store.Migrate(t.Context(), ms, deploy.StandIns); err != nil || len(applied) != len(ms) {
		t.Errorf("a second run over the same schema: %v, %v", applied, err)
	}
	if err := db.Store.CheckSchema(t.Context(), ms); err != nil {
		t.Error(err)
	}
	db.Exec(`ALTER TABLE public.cost_records DISABLE ROW LEVEL SECURITY`)
	if err := db.Store.CheckSchema(t.Context(), ms); err == nil || !strings.Contains(err.Error(), "cost_records") {
		t.Errorf("an open table passed: %v", err)
	}
}

func TestMigrateRefusesADatabaseThatIsNotSupabase(t *testing.T) {
	db := storetest.New(t)
	db.Exec(`DROP SCHEMA auth CASCADE`)
	ms, _ := store.Migrations(deploy.Migrations)
	if _, err := db.Store.Migrate(t.Context(), ms, ""); err == nil || !strings.Contains(err.Error(), "--stand-ins") {
		t.Errorf("err = %v", err)
	}
}

func TestAJobFromRowToArtifact(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	id, user := admitted(t, db, a)
	ref := assign(t, db, id, 0, a)
	ref.Nonce = nonce(11)
	as := accept(t, db, a, ref)
	if as.User != user || as.Spec.Rank != 16 || as.Dataset.Bucket != "lora-datasets" || len(as.Devices) != 1 {
		t.Fatalf("assignment = %+v", as)
	}
	if got := db.Text(`SELECT status FROM training_jobs WHERE id = $1`, id); got != "initializing" {
		t.Errorf("status = %s", got)
	}
	two := 2.5
	samples := []job.Sample{
		{Seq: 1, At: time.Now(), Step: 1, Epoch: 0.1, Loss: 3.25, LearningRate: 5e-5, GradNorm: 12_000, TokensPerSecond: 100},
		{Seq: 2, At: time.Now(), Step: 2, Epoch: 0.2, Loss: 1e5, LearningRate: 2e-11, GradNorm: math.NaN(), TokensPerSecond: 1e12},
		{Seq: 3, At: time.Now(), Step: 3, Epoch: 0.3, Loss: math.NaN(), LearningRate: 5e-5, GradNorm: math.Inf(1), Skipped: true},
		{Seq: 4, At: time.Now(), Step: 2, Epoch: 1.2, Loss: 3, ValidationLoss: &two, LearningRate: 5e-5, GradNorm: math.NaN(), TokensPerSecond: math.NaN()},
	}
	lines := []job.Line{{Seq: 5, At: time.Now(), Level: "info", Message: "nul \x00 and bad utf-8 \xff", Code: "x"}}
	p := &job.Progress{Status: job.Running, Stage: job.StageTraining, Step: 3, TotalSteps: 30, Epoch: 1, TotalEpochs: 3, Percent: 10, Loss: &two, Remaining: time.Minute}
	for range 2 { // a lost acknowledgement: the same batch again
		if err := db.Store.Append(t.Context(), ref, samples, lines, p); err != nil {
			t.Fatal(err)
		}
	}
	for sql, want := range map[string]string{
		`SELECT count(*) FROM lorayard.samples`: "4",
		`SELECT string_agg(step || ':' || training_loss || ':' || coalesce(gradient_norm::text, '-'), ' ' ORDER BY step) FROM metrics_points`: "1:3.250000:9999.999999 2:9999.999999:-",
		`SELECT validation_loss FROM metrics_points WHERE step = 2`:                                                                           "2.500000",
		`SELECT count(*) FROM job_logs`: "1",
		`SELECT status || ' ' || current_stage || ' ' || progress || ' ' || current_step || '/' || total_steps FROM training_jobs`: "running training 10.00 3/30",
		`SELECT estimated_completion_at > now() FROM training_jobs`:                                                                "t",
	} {
		if got := db.Text(sql); got != want {
			t.Errorf("%s = %s, want %s", sql, got, want)
		}
	}
	if w := renew(t, db, a, ref); w.Attempts[ref] != job.DesireRun {
		t.Fatalf("wanted = %v", w.Attempts)
	}
	cp := job.Checkpoint{Step: 3, Epoch: 0.3, Loss: math.NaN(), Bucket: "lora-models", Path: user + "/x", ManifestSHA256: "ab", Files: []job.File{{Name: "state.json", Bytes: 7, SHA256: "cd"}}}
	if err := db.Store.AddCheckpoint(t.Context(), ref, cp); err != nil {
		t.Fatal(err)
	}
	end := store.End{Outcome: store.OutcomeCompleted, Artifact: &store.Artifact{
		ID: nonce(77), Files: map[string]string{"adapter_config.json": user + "/" + nonce(77) + "/adapter_config.json"},
		QualityMetrics: map[string]any{"overall_score": 4}, Metrics: map[string]any{},
		TrainingSummary: map[string]any{"total_steps": 30, "files": []job.File{{Name: "adapter_config.json", Bytes: 7, SHA256: strings.Repeat("c", 64)}}},
	}}
	for range 2 { // asking again after a lost answer
		if status, err := db.Store.Settle(t.Context(), ref, end); err != nil || status != job.Completed {
			t.Fatalf("settle: %s, %v", status, err)
		}
	}
	if got := db.Text(`SELECT string_agg(type, ',' ORDER BY type) FROM notifications`); got != "artifact_ready,job_completed,job_started" {
		t.Errorf("notifications = %s", got)
	}
	if got := db.Text(`SELECT (training_summary ? 'total_cost') AND (configuration -> 'hyperparameters' ? 'rank') FROM model_artifacts`); got != "t" {
		t.Error("the artifact lacks what the model page reads")
	}
	storetest.Check(t, db.Pool)
}

func TestAStaleAttemptChangesNothing(t *testing.T) {
	db := storetest.New(t)
	a, b := agent("a", 1), agent("b", 2)
	id, user := admitted(t, db, a)
	register(t, db, b)
	old := assign(t, db, id, 0, a)
	old.Nonce = nonce(11)
	accept(t, db, a, old)

	twin := old // the same task delivered twice to the same agent
	twin.Nonce = nonce(12)
	if _, err := db.Store.Accept(t.Context(), a, twin); !lost(err) {
		t.Errorf("a second accept of one attempt: %v", err)
	}
	if err := db.Store.Append(t.Context(), twin, nil, []job.Line{{Seq: 1, Level: "info", Message: "x"}}, nil); !lost(err) {
		t.Errorf("another nonce wrote: %v", err)
	}

	db.Exec(`UPDATE lorayard.agents SET lease_until = now() - interval '1 minute' WHERE id = 'a'`)
	reap := func(patience time.Duration) []job.Ref {
		t.Helper()
		refs, err := db.Store.Reap(t.Context(), nonce(80), ttl, patience)
		if err != nil {
			t.Fatal(err)
		}
		return refs
	}
	if refs := reap(0); len(refs) != 0 {
		t.Errorf("somebody who does not lead reaped %v", refs)
	}
	if _, err := db.Store.Campaign(t.Context(), store.Dispatcher{ID: nonce(80)}, time.Minute); err != nil {
		t.Fatal(err)
	}
	if refs := reap(0); len(refs) != 0 {
		t.Errorf("a leader of less than a lease reaped %v", refs)
	}
	db.Exec(`UPDATE lorayard.leader SET since = now() - interval '1 minute'`)
	if refs := reap(time.Hour); len(refs) != 0 {
		t.Errorf("reaped within patience: %v", refs)
	}
	for patience, want := range map[time.Duration]time.Duration{time.Hour: 59 * time.Minute, time.Second: 0} { // b runs nothing
		if in, err := db.Store.NextLapse(t.Context(), patience); err != nil || (in-want).Abs() > time.Minute || (in > 0) != (want > 0) {
			t.Errorf("with a patience of %v somebody lapses in %v, %v", patience, in, err)
		}
	}
	// The database stood still: the leader could not renew either.
	db.Exec(`UPDATE lorayard.leader SET lease_until = now() - interval '1 s'`)
	if refs := reap(0); len(refs) != 0 {
		t.Errorf("reaped right after an outage: %v", refs)
	}
	if _, err := db.Store.Campaign(t.Context(), store.Dispatcher{ID: nonce(80)}, time.Minute); err != nil {
		t.Fatal(err)
	}
	if refs := reap(0); len(refs) != 0 {
		t.Errorf("reaped within a lease of an outage: %v", refs)
	}
	db.Exec(`UPDATE lorayard.leader SET since = now() - interval '1 minute'`)
	if refs := reap(0); len(refs) != 1 {
		t.Fatalf("reaped %v", refs)
	}
	now := assign(t, db, id, 1, b)
	now.Nonce = nonce(13)
	accept(t, db, b, now)
	if now.Attempt != 2 {
		t.Errorf("attempt = %d", now.Attempt)
	}
	art := &store.Artifact{ID: nonce(70), Files: map[string]string{}, QualityMetrics: map[string]any{}, TrainingSummary: map[string]any{}}
	for name, err := range map[string]error{
		"append":     db.Store.Append(t.Context(), old, []job.Sample{{Seq: 9, Step: 9, Loss: 1}}, nil, nil),
		"checkpoint": db.Store.AddCheckpoint(t.Context(), old, job.Checkpoint{Step: 1, Path: user + "/y", Files: []job.File{}}),
		"settle": func() error {
			_, err := db.Store.Settle(t.Context(), old, store.End{Outcome: store.OutcomeCompleted, Artifact: art})
			return err
		}(),
	} {
		if !lost(err) {
			t.Errorf("%s of a stale attempt: %v", name, err)
		}
	}
	if w := renew(t, db, a, old); len(w.Attempts) != 0 {
		t.Errorf("a stale attempt was renewed: %v", w.Attempts)
	}
	if _, err := db.Store.Settle(t.Context(), now, store.End{Outcome: store.OutcomeCompleted, Artifact: art}); err != nil {
		t.Fatal(err)
	}
	storetest.Check(t, db.Pool)
}

// wired lends a database over a wire that a test may cut.
func wired(t *testing.T, o store.Options) (*store.Store, *services.FaultProxy) {
	t.Helper()
	db := storetest.New(t)
	host := db.Pool.Config().ConnConfig
	at := fmt.Sprintf("%s:%d", host.Host, host.Port)
	wire, err := services.Proxy(at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { wire.Close() })
	st, err := store.Open(t.Context(), strings.Replace(db.URL, at, wire.Addr(), 1), o)
	if err != nil {
		t.Fatal(err)
	}
	return st, wire
}

// A connection that somebody on the way forgot takes what is sent and answers
// nothing. No call waits for ever on it, also one without a deadline of its own.
func TestACallOnASilentConnectionEnds(t *testing.T) {
	st, wire := wired(t, store.Options{Name: "silent", CallLimit: 300 * time.Millisecond})
	defer st.Close()
	calls := map[string]func() error{
		"a query": func() error { _, err := st.Depths(context.Background()); return err },
		"a batch": func() error { _, err := st.Assign(context.Background(), nil); return err },
		"an exec": func() error { return st.SweepGrants(context.Background()) },
	}
	for name, call := range calls {
		if err := call(); err != nil { // on a connection that works
			t.Fatalf("%s: %v", name, err)
		}
		if err := wire.Blackhole(); err != nil {
			t.Fatal(err)
		}
		if err := call(); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s in a black hole: %v", name, err)
		}
		if err := wire.Pass(); err != nil {
			t.Fatal(err)
		}
	}
}

// Whoever leaves does not wait for a network that does not answer.
func TestClosingDoesNotWaitForSilentConnections(t *testing.T) {
	st, wire := wired(t, store.Options{Name: "silent"})
	if err := wire.Blackhole(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := st.Ping(ctx); err == nil {
		t.Fatal("a black hole answered")
	}
	began := time.Now()
	st.Close()
	if took := time.Since(began); took > 10*time.Second { // pgx alone: 15 s
		t.Errorf("closing took %v", took)
	}
}

// The page draws the curve in the order of time. An attempt that does steps
// again must not put them after those that it has not come to.
func TestACurveThatIsDoneAgainStaysInOrder(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	id, _ := admitted(t, db, a)
	say := func(ref job.Ref, loss float64, steps ...int) {
		t.Helper()
		var samples []job.Sample
		for i, s := range steps {
			samples = append(samples, job.Sample{Seq: uint64(i + 1), At: time.Now(), Step: s, Epoch: 1, Loss: loss, LearningRate: 1e-4, GradNorm: 1})
		}
		if err := db.Store.Append(t.Context(), ref, samples, nil, &job.Progress{Status: job.Running, Stage: job.StageTraining, Step: len(steps), TotalSteps: 9}); err != nil {
			t.Fatal(err)
		}
	}
	ref := assign(t, db, id, 0, a)
	ref.Nonce = nonce(1)
	accept(t, db, a, ref)
	say(ref, 3, 1, 2, 3, 4)
	if ok, err := db.Store.ReportDeath(t.Context(), a.ID, a.Boot, ref, "killed"); err != nil || !ok {
		t.Fatalf("report the death: %t, %v", ok, err)
	}
	register(t, db, a)
	ref = assign(t, db, id, 1, a)
	ref.Nonce = nonce(2)
	accept(t, db, a, ref)
	say(ref, 2, 1, 2)
	storetest.Check(t, db.Pool)
	if got := db.Text(`SELECT string_agg(step || ':' || training_loss::int, ' ' ORDER BY timestamp, step) FROM metrics_points`); got != "1:2 2:2 3:3 4:3" {
		t.Errorf("the curve in the order of time: %s", got)
	}
}

func TestANewBootTakesTheOldOnesPlace(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	id, _ := admitted(t, db, a)
	ref := assign(t, db, id, 0, a)
	ref.Nonce = nonce(11)
	accept(t, db, a, ref)
	again := agent("a", 2)
	register(t, db, again)
	if _, err := db.Store.Renew(t.Context(), a, ttl, store.AgentState{}, []job.Ref{ref}); !errors.Is(err, store.ErrReplaced) {
		t.Errorf("the old process may renew: %v", err)
	}
	w, err := db.Store.Waiting(t.Context(), 10, nil)
	if err != nil || len(w) != 1 || w[0].Attempt != 1 || len(w[0].Failed) != 1 || w[0].Failed[0] != "a" {
		t.Errorf("waiting = %+v, %v", w, err)
	}
	storetest.Check(t, db.Pool)
}

func TestNobodyPaysForASettlementThatHadToWait(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	id, _ := admitted(t, db, a)
	ref := assign(t, db, id, 0, a)
	ref.Nonce = nonce(11)
	accept(t, db, a, ref)
	// It ran for ten minutes, and the database was away for fifty.
	db.Exec(`UPDATE lorayard.attempts SET assigned_at = assigned_at - interval '1 hour', accepted_at = accepted_at - interval '1 hour'`)
	db.Exec(`UPDATE lorayard.usage_intervals SET during = tstzrange(lower(during) - interval '1 hour', upper(during) - interval '1 hour')`)
	if _, err := db.Store.Settle(t.Context(), ref, store.End{Outcome: store.OutcomeCancelled, Idle: 50 * time.Minute, Failure: &job.Failure{Kind: job.CancelledByUser}}); err != nil {
		t.Fatal(err)
	}
	if got := db.Text(`SELECT round((details ->> 'gpu_seconds')::numeric, -1) FROM cost_records`); got != "600" {
		t.Errorf("paid for %s s", got)
	}
	storetest.Check(t, db.Pool)
}

func TestCancel(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	id, user := admitted(t, db, a)
	cancel := func(id job.ID, user string) (rows int64) {
		err := db.As(user, func(tx pgx.Tx) error { // as the app writes it
			tag, err := tx.Exec(context.Background(), `UPDATE training_jobs SET status = 'cancelled', completed_at = now(), final_cost = 0 WHERE id = $1`, id)
			rows = tag.RowsAffected()
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return rows
	}
	if n := cancel(id, db.User()); n != 0 {
		t.Error("a stranger cancelled a job")
	}
	ref := assign(t, db, id, 0, a)
	ref.Nonce = nonce(11)
	accept(t, db, a, ref)
	if n := cancel(id, user); n != 1 {
		t.Fatalf("%d rows were cancelled", n)
	}
	if w := renew(t, db, a, ref); w.Attempts[ref] != job.DesireCancel {
		t.Errorf("wanted = %v", w.Attempts)
	}
	// The trainer finished before it heard: the cancel still wins.
	art := &store.Artifact{ID: nonce(70), Files: map[string]string{}, QualityMetrics: map[string]any{}, TrainingSummary: map[string]any{}}
	if status, err := db.Store.Settle(t.Context(), ref, store.End{Outcome: store.OutcomeCompleted, Artifact: art}); err != nil || status != job.Cancelled {
		t.Errorf("settle: %s, %v", status, err)
	}
	if n := db.Text(`SELECT count(*) FROM model_artifacts`); n != "0" {
		t.Error("a cancelled job has an artifact")
	}
	if n := cancel(id, user); n != 0 {
		t.Error("a final status changed")
	}

	waiting := job.ID(db.Job(user, db.Dataset(user)))
	admit(t, db, waiting)
	cancel(waiting, user)
	if refs, err := db.Store.SettleCancelled(t.Context()); err != nil || len(refs) != 1 {
		t.Errorf("settle cancelled: %v, %v", refs, err)
	}
	storetest.Check(t, db.Pool)
}

func TestAUserMayCancelAndNothingElse(t *testing.T) {
	db := storetest.New(t)
	user := db.User()
	id := db.Job(user, db.Dataset(user))
	for _, set := range []string{
		`status = 'completed'`, `status = 'running'`, `current_cost = 0`, `progress = 100`, `user_id = gen_random_uuid()`, `retry_count = 5`,
		`status = 'cancelled', progress = 100`,
	} {
		err := db.As(user, func(tx pgx.Tx) error {
			_, err := tx.Exec(context.Background(), `UPDATE training_jobs SET `+set+` WHERE id = $1`, id)
			return err
		})
		if err == nil {
			t.Errorf("a user may set %s", set)
		}
	}
}

func TestWhatAnInsertClaimsIsNotBelieved(t *testing.T) {
	db := storetest.New(t)
	user, other := db.User(), db.User()
	mine, theirs := db.Dataset(user), db.Dataset(other)
	insert := func(dataset string) error {
		return db.As(user, func(tx pgx.Tx) error {
			_, err := tx.Exec(context.Background(), `INSERT INTO training_jobs (user_id, dataset_id, preset_id, hyperparameters, gpu_config, status, progress,
				total_epochs, estimated_total_cost, current_cost, final_cost, retry_count, started_at, external_job_id)
				VALUES ($1, $2, 'fast', '{}', '{}', 'running', 50, -5, 1, -100, -100, 2147483647, now(), 'x')`, user, dataset)
			return err
		})
	}
	if err := insert(mine); err != nil {
		t.Fatal(err)
	}
	if got := db.Text(`SELECT status || progress || current_cost || coalesce(final_cost::text, '-') || retry_count || coalesce(external_job_id, '-') FROM training_jobs`); got != "queued0.000.00-0-" {
		t.Errorf("row = %s", got)
	}
	if err := insert(theirs); err == nil || !strings.Contains(err.Error(), "not yours") {
		t.Errorf("a job on another's data set: %v", err)
	}
}

func TestNobodyReadsAnothersRows(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	id, user := admitted(t, db, a)
	ref := assign(t, db, id, 0, a)
	ref.Nonce = nonce(11)
	accept(t, db, a, ref)
	if err := db.Store.Append(t.Context(), ref, []job.Sample{{Seq: 1, At: time.Now(), Step: 1, Loss: 1}}, []job.Line{{Seq: 2, At: time.Now(), Level: "info", Message: "x"}}, nil); err != nil {
		t.Fatal(err)
	}
	if err := db.Store.AddCheckpoint(t.Context(), ref, job.Checkpoint{Step: 1, Bucket: "b", Path: user + "/x", Files: []job.File{}}); err != nil {
		t.Fatal(err)
	}
	art := &store.Artifact{ID: nonce(70), Files: map[string]string{}, QualityMetrics: map[string]any{}, TrainingSummary: map[string]any{}}
	if _, err := db.Store.Settle(t.Context(), ref, store.End{Outcome: store.OutcomeCompleted, Artifact: art}); err != nil {
		t.Fatal(err)
	}
	for _, table := range []string{"datasets", "training_jobs", "metrics_points", "model_artifacts", "cost_records", "notifications", "checkpoints", "job_logs"} {
		for who, want := range map[string]bool{user: true, db.User(): false} {
			var n int
			err := db.As(who, func(tx pgx.Tx) error {
				return tx.QueryRow(context.Background(), `SELECT count(*) FROM `+table).Scan(&n)
			})
			if err != nil || (n > 0) != want {
				t.Errorf("%s: the owner is %t and reads %d rows, %v", table, want, n, err)
			}
		}
	}
	// Neither control state nor another role's functions are in a user's reach.
	for _, sql := range []string{`SELECT count(*) FROM lorayard.jobs`, `SELECT lorayard.cost_of(gen_random_uuid())`} {
		if err := db.As(user, func(tx pgx.Tx) error { _, err := tx.Exec(context.Background(), sql); return err }); err == nil {
			t.Errorf("a user may run %s", sql)
		}
	}
}

func TestTheAgentsRoleRunsItsFunctionsAndTouchesNoTable(t *testing.T) {
	db := storetest.New(t)
	as := func(sql string) error {
		return pgx.BeginFunc(t.Context(), db.Pool, func(tx pgx.Tx) error {
			if _, err := tx.Exec(t.Context(), `SET LOCAL ROLE lorayard_agent`); err != nil {
				return err
			}
			_, err := tx.Exec(t.Context(), sql)
			return err
		})
	}
	if err := as(`SELECT lorayard.register_agent('x', gen_random_uuid(), '{"devices":[],"base_models":[]}', '5 s', '[]')`); err != nil {
		t.Error(err)
	}
	for _, sql := range []string{
		`SELECT count(*) FROM lorayard.jobs`, `SELECT count(*) FROM training_jobs`, `DELETE FROM cost_records`,
		`SELECT lorayard.finish_job(gen_random_uuid(), 'completed', '', '')`, `SELECT lorayard.lose_attempt(gen_random_uuid(), 1, '')`,
	} {
		if err := as(sql); err == nil {
			t.Errorf("the agent's role may run %s", sql)
		}
	}
}

func TestFailuresAreCountedAndHandBacksAreNot(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	id, _ := admitted(t, db, a)
	settle := func(before int, kind job.Kind, out store.Outcome) job.Status {
		ref := assign(t, db, id, before, a)
		ref.Nonce = nonce(100 + before)
		accept(t, db, a, ref)
		status, err := db.Store.Settle(t.Context(), ref, store.End{Outcome: out, Failure: &job.Failure{Kind: kind, Err: errors.New("x")}, Detail: "trace"})
		if err != nil {
			t.Fatal(err)
		}
		return status
	}
	for i, c := range []struct {
		kind job.Kind
		out  store.Outcome
		want job.Status
	}{
		{job.Preempted, store.OutcomeHandedBack, job.Queued},
		{job.TrainerCrashed, store.OutcomeFailed, job.Queued},
		{job.StorageUnavailable, store.OutcomeFailed, job.Queued},
		{job.TrainerCrashed, store.OutcomeFailed, job.Queued},
		{job.TrainerCrashed, store.OutcomeFailed, job.Failed},
	} {
		if got := settle(i, c.kind, c.out); got != c.want {
			t.Fatalf("attempt %d (%s): %s, want %s", i+1, c.kind, got, c.want)
		}
	}
	if got := db.Text(`SELECT failures || ' ' || losses FROM lorayard.jobs`); got != "3 1" {
		t.Errorf("failures and losses = %s", got)
	}
	if got := db.Text(`SELECT error_message FROM training_jobs`); got == "" {
		t.Error("a failed job tells its user nothing")
	}
	storetest.Check(t, db.Pool)
}

func TestAnUnacceptedAttemptIsSentAgainAndTakenBack(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	id, _ := admitted(t, db, a)
	ref := assign(t, db, id, 0, a)
	sends, err := db.Store.Resend(t.Context(), 0)
	if err != nil || len(sends) != 1 || sends[0].Task.Send != 2 || sends[0].Task.Ref.Attempt != 1 {
		t.Fatalf("re-send: %+v, %v", sends, err)
	}
	if refs, err := db.Store.TakeBack(t.Context(), time.Hour, nil); err != nil || len(refs) != 0 {
		t.Errorf("taken back too early: %v, %v", refs, err)
	}
	if refs, err := db.Store.TakeBack(t.Context(), 0, nil); err != nil || len(refs) != 1 {
		t.Fatalf("take back: %v, %v", refs, err)
	}
	ref.Nonce = nonce(5)
	if _, err := db.Store.Accept(t.Context(), a, ref); !lost(err) {
		t.Errorf("a late accept: %v", err)
	}
	storetest.Check(t, db.Pool)
}

func TestOneDeviceIsNeverAssignedTwice(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	first, user := admitted(t, db, a)
	second := job.ID(db.Job(user, db.Dataset(user)))
	admit(t, db, second)
	assign(t, db, first, 0, a)
	sends, err := db.Store.Assign(t.Context(), []store.Assignment{{Job: second, Agent: a.ID, Devices: []string{a.Devices[0].UUID}}})
	if err != nil || len(sends) != 0 {
		t.Errorf("assigned twice: %+v, %v", sends, err)
	}
	running, err := db.Store.Running(t.Context())
	if err != nil || len(running) != 1 || running[0].Ref.Job != first || running[0].Devices[0] != a.Devices[0].UUID {
		t.Errorf("running = %+v, %v", running, err)
	}
}

func TestListenHearsWhatTheAppInserts(t *testing.T) {
	db := storetest.New(t)
	ctx, cancel := context.WithCancel(t.Context())
	heard := make(chan string, 16)
	done := make(chan error, 1)
	go func() { done <- db.Store.Listen(ctx, func(p string) { heard <- p }) }()
	if p := <-heard; p != "" {
		t.Errorf("the first wake-up is %q", p)
	}
	user := db.User()
	id := db.Job(user, db.Dataset(user))
	if p := <-heard; p != "job:"+id {
		t.Errorf("heard %q", p)
	}
	cancel()
	<-done
}

func TestOneLeaderAtATime(t *testing.T) {
	db := storetest.New(t)
	campaign := func(n int, ttl time.Duration) int64 {
		t.Helper()
		term, err := db.Store.Campaign(t.Context(), store.Dispatcher{ID: nonce(n), Name: fmt.Sprint(n), Address: fmt.Sprintf("tcp://d%d:1", n)}, ttl)
		if err != nil {
			t.Fatal(err)
		}
		return term
	}
	first := campaign(1, time.Minute)
	if first == 0 || campaign(1, time.Minute) != first {
		t.Error("the first dispatcher does not lead, or not on")
	}
	if term := campaign(2, time.Minute); term != 0 {
		t.Errorf("a second leader, in term %d", term)
	}
	if err := db.Store.Resign(t.Context(), nonce(1)); err != nil {
		t.Fatal(err)
	}
	if term := campaign(2, time.Minute); term != first+1 {
		t.Errorf("term = %d after %d", term, first)
	}
	// A leader that says nothing for a lease is one no more, connected or not.
	db.Exec(`UPDATE lorayard.leader SET lease_until = now() - interval '1 s'`)
	if term := campaign(3, time.Minute); term != first+2 {
		t.Errorf("term = %d after %d", term, first)
	}
	if term := campaign(2, time.Minute); term != 0 {
		t.Error("a leader that slept leads on")
	}
	a := agent("a", 1)
	register(t, db, a)
	if w := renew(t, db, a); len(w.Dispatchers) != 2 || w.Dispatchers[0] != "tcp://d2:1" || w.Dispatchers[1] != "tcp://d3:1" {
		t.Errorf("dispatchers = %v", w.Dispatchers)
	}
}

func TestARestartedAgentAdoptsWhatItLists(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	first, user := admitted(t, db, a)
	second := job.ID(db.Job(user, db.Dataset(user)))
	admit(t, db, second)
	keep := assign(t, db, first, 0, a)
	keep.Nonce = nonce(11)
	accept(t, db, a, keep)
	sends, err := db.Store.Assign(t.Context(), []store.Assignment{{Job: second, Agent: a.ID, Devices: []string{a.Devices[1].UUID}}})
	if err != nil || len(sends) != 1 {
		t.Fatalf("assign: %v, %v", sends, err)
	}
	drop := sends[0].Task.Ref
	drop.Nonce = nonce(12)
	accept(t, db, a, drop)

	next := agent("a", 2)
	wrong := drop
	wrong.Nonce = nonce(99)
	for range 2 { // the answer of the first may have been lost
		kept, err := db.Store.Register(t.Context(), next, ttl, []job.Ref{keep, wrong})
		if err != nil || len(kept) != 1 || kept[0] != keep {
			t.Fatalf("kept %v, %v", kept, err)
		}
	}
	if w := renew(t, db, next, keep, drop); len(w.Attempts) != 1 || w.Attempts[keep] != job.DesireRun {
		t.Errorf("wanted = %v", w.Attempts)
	}
	if got := db.Text(`SELECT outcome FROM lorayard.attempts WHERE job_id = $1`, second); got != "lost" {
		t.Errorf("an attempt that nobody adopted is %q", got)
	}
	storetest.Check(t, db.Pool)
}

// An accept whose answers were all lost is known to the database alone.
func TestAnAttemptThatItsAgentDoesNotListIsLost(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	id, _ := admitted(t, db, a)
	ref := assign(t, db, id, 0, a)
	ref.Nonce = nonce(11)
	accept(t, db, a, ref)
	renew(t, db, a) // sent before the accept was
	if got := db.Text(`SELECT state FROM lorayard.jobs`); got != "accepted" {
		t.Fatalf("state = %s right after the accept", got)
	}
	db.Exec(`UPDATE lorayard.attempts SET accepted_at = accepted_at - interval '1 minute'`)
	if w := renew(t, db, a, ref); w.Attempts[ref] != job.DesireRun {
		t.Errorf("wanted = %v of an attempt that is listed", w.Attempts)
	}
	renew(t, db, a)
	if got := db.Text(`SELECT j.state || ' ' || a.outcome FROM lorayard.jobs j JOIN lorayard.attempts a USING (job_id)`); got != "queued lost" {
		t.Errorf("job and attempt: %s", got)
	}
}

func TestADeviceThatBreaksIsOfferedNoMore(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	a.Devices[0].Links, a.Devices[1].Links, a.Devices[1].Node = []int{0, 7}, []int{7, 0}, 1
	register(t, db, a)
	register(t, db, agent("b", 2))
	say := func(faults map[string]string) {
		t.Helper()
		if _, err := db.Store.Renew(t.Context(), a, ttl, store.AgentState{Faults: faults}, nil); err != nil {
			t.Fatal(err)
		}
	}
	// faults lists what the dispatcher sees, in the order of the devices.
	faults := func() string {
		t.Helper()
		hosts, err := db.Store.Hosts(t.Context())
		if err != nil || len(hosts) != 2 {
			t.Fatalf("%v, %v", hosts, err)
		}
		if d := hosts[0].Devices; !slices.Equal(d[0].Links, []int{0, 7}) || d[0].Node != 0 || d[1].Node != 1 || hosts[1].Devices[0].Links == nil && len(hosts[1].Devices[0].Links) != 0 {
			t.Errorf("%+v", hosts)
		}
		var out []string
		for _, h := range hosts {
			for _, d := range h.Devices {
				out = append(out, d.Fault)
			}
		}
		return strings.Join(out, "|")
	}
	for _, c := range []struct {
		said map[string]string
		want string
	}{
		{nil, "|||"},
		{map[string]string{a.Devices[1].UUID: "XID 79", "GPU-b-0": "not yours to say"}, "|XID 79||"},
		{nil, "|XID 79||"}, // an agent of before does not say
		{map[string]string{a.Devices[0].UUID: "busy"}, "busy|||"},
		{map[string]string{}, "|||"},
	} {
		say(c.said)
		if got := faults(); got != c.want {
			t.Errorf("after %v: %s, want %s", c.said, got, c.want)
		}
	}
}

func TestAnAgentThatFailedAJobIsAvoidedForAnHour(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	id, _ := admitted(t, db, a)
	ref := assign(t, db, id, 0, a)
	ref.Nonce = nonce(11)
	accept(t, db, a, ref)
	if _, err := db.Store.Settle(t.Context(), ref, store.End{Outcome: store.OutcomeFailed, Failure: &job.Failure{Kind: job.GPUFault, Err: errors.New("XID 79")}}); err != nil {
		t.Fatal(err)
	}
	failed := func() []string {
		t.Helper()
		ws, err := db.Store.Waiting(t.Context(), 10, nil)
		if err != nil || len(ws) != 1 {
			t.Fatalf("%v, %v", ws, err)
		}
		return ws[0].Failed
	}
	if got := failed(); !slices.Equal(got, []string{"a"}) {
		t.Errorf("avoids %v", got)
	}
	db.Exec(`UPDATE lorayard.attempts SET ended_at = ended_at - interval '61 minutes'`)
	if got := failed(); len(got) != 0 {
		t.Errorf("avoids %v an hour later", got)
	}
	if got := db.Text(`SELECT failures || ' ' || losses || ' ' || (SELECT bool_or(billable) FROM lorayard.usage_intervals) FROM lorayard.jobs`); got != "0 1 false" {
		t.Errorf("failures, losses, billed: %s", got)
	}
}

func TestAnAgentIdBelongsToOneHost(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	a.Instance = "here"
	register(t, db, a)
	other := agent("a", 2)
	other.Instance = "there"
	if _, err := db.Store.Register(t.Context(), other, ttl, nil); !errors.Is(err, store.ErrInUse) {
		t.Errorf("a second host took the id: %v", err)
	}
	thief := agent("b", 3)
	thief.Devices = a.Devices
	if _, err := db.Store.Register(t.Context(), thief, ttl, nil); !errors.Is(err, store.ErrInUse) {
		t.Errorf("a second agent took the devices: %v", err)
	}
	renew(t, db, a)
	db.Exec(`UPDATE lorayard.agents SET lease_until = now() - interval '1 s'`)
	register(t, db, other)
	if _, err := db.Store.Register(t.Context(), a, ttl, nil); !errors.Is(err, store.ErrInUse) {
		t.Errorf("the id went back while its new host lives: %v", err)
	}
}

func TestADeathReportNeedsTheNonce(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	id, user := admitted(t, db, a)
	ref := assign(t, db, id, 0, a)
	ref.Nonce = nonce(11)
	accept(t, db, a, ref)
	waits := job.ID(db.Job(user, db.Dataset(user)))
	admit(t, db, waits)
	if sends, err := db.Store.Assign(t.Context(), []store.Assignment{{Job: waits, Agent: a.ID, Devices: []string{a.Devices[1].UUID}}}); err != nil || len(sends) != 1 {
		t.Fatalf("assign: %v, %v", sends, err)
	}
	wrong := ref
	wrong.Nonce = nonce(12)
	if ok, err := db.Store.ReportDeath(t.Context(), a.ID, a.Boot, wrong, "x"); ok || err != nil {
		t.Errorf("a stranger's report: %t, %v", ok, err)
	}
	if ok, err := db.Store.ReportDeath(t.Context(), a.ID, a.Boot, ref, "the agent was killed"); !ok || err != nil {
		t.Errorf("report: %t, %v", ok, err)
	}
	if ok, err := db.Store.ReportDeath(t.Context(), a.ID, a.Boot, ref, "again"); ok || err != nil {
		t.Errorf("a second report: %t, %v", ok, err)
	}
	if got := db.Text(`SELECT state FROM lorayard.jobs WHERE job_id = $1`, id); got != "queued" {
		t.Errorf("state = %s", got)
	}
	// What was on its way to the dead agent goes back at once, too.
	if refs, err := db.Store.TakeBack(t.Context(), time.Hour, nil); err != nil || len(refs) != 1 || refs[0].Job != waits {
		t.Errorf("taken back: %v, %v", refs, err)
	}
	storetest.Check(t, db.Pool)
}

func TestDesiredStates(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	id, _ := admitted(t, db, a)
	ref := assign(t, db, id, 0, a)
	ref.Nonce = nonce(11)
	accept(t, db, a, ref)
	wanted := func() job.Desired { return renew(t, db, a, ref).Attempts[ref] }
	if got := wanted(); got != job.DesireRun {
		t.Errorf("wanted = %s", got)
	}
	if refs, err := db.Store.Preempt(t.Context(), []job.Ref{ref}); err != nil || len(refs) != 1 {
		t.Errorf("preempt: %v, %v", refs, err)
	}
	if got := wanted(); got != job.DesirePreempt {
		t.Errorf("wanted = %s", got)
	}
	if err := db.Store.Pause(t.Context(), id); err != nil || wanted() != job.DesirePause {
		t.Errorf("pause: %v", err)
	}
	back := store.End{Outcome: store.OutcomeHandedBack, Failure: &job.Failure{Kind: job.Preempted}}
	if status, err := db.Store.Settle(t.Context(), ref, back); err != nil || status != job.Queued {
		t.Fatalf("settle: %s, %v", status, err)
	}
	if w, err := db.Store.Waiting(t.Context(), 10, nil); err != nil || len(w) != 0 {
		t.Errorf("a paused job waits to be placed: %v, %v", w, err)
	}
	if err := db.Store.Resume(t.Context(), id); err != nil {
		t.Error(err)
	}
	if err := db.Store.Prioritize(t.Context(), id, 7); err != nil {
		t.Error(err)
	}
	if w, err := db.Store.Waiting(t.Context(), 10, nil); err != nil || len(w) != 1 || w[0].Priority != 7 {
		t.Errorf("waiting: %v, %v", w, err)
	}

	if err := db.Store.Cordon(t.Context(), "a", "fan"); err != nil {
		t.Fatal(err)
	}
	hosts, err := db.Store.Hosts(t.Context())
	if err != nil || len(hosts) != 1 || hosts[0].Closed != "cordoned fan" || !renew(t, db, a).Cordoned {
		t.Errorf("hosts = %+v, %v", hosts, err)
	}
	if sends, err := db.Store.Assign(t.Context(), []store.Assignment{{Job: id, Attempt: 1, Agent: "a", Devices: []string{a.Devices[0].UUID}}}); err != nil || len(sends) != 0 {
		t.Errorf("a cordoned agent was given work: %v, %v", sends, err)
	}
	if err := db.Store.Drain(t.Context(), "a", time.Minute, ""); err != nil {
		t.Fatal(err)
	}
	if w := renew(t, db, a); !w.Drain || w.DrainIn <= 50*time.Second || w.DrainIn > time.Minute {
		t.Errorf("wanted = %+v", w)
	}
	if err := db.Store.Uncordon(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if w := renew(t, db, a); w.Drain || w.Cordoned {
		t.Errorf("wanted = %+v", w)
	}
	var missing *store.NotFoundError
	if err := db.Store.Forget(t.Context(), "a"); !errors.As(err, &missing) {
		t.Errorf("a live agent is forgotten: %v", err)
	}
	db.Exec(`UPDATE lorayard.agents SET lease_until = now() - interval '1 s'`)
	if err := db.Store.Forget(t.Context(), "a"); err != nil || db.Text(`SELECT count(*) FROM lorayard.devices`) != "0" {
		t.Errorf("forget: %v", err)
	}
	if err := db.Store.Cordon(t.Context(), "nobody", ""); !errors.As(err, &missing) {
		t.Errorf("err = %v", err)
	}
	storetest.Check(t, db.Pool)
}

// A renewal touches usage and attempts of many jobs, a settlement those of one:
// when they did not agree on an order, one of them died of a deadlock.
func TestRenewalsAndSettlementsKeepOneOrder(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	a.Devices = nil
	for i := range 16 {
		a.Devices = append(a.Devices, store.Device{UUID: fmt.Sprintf("GPU-%d", i), Class: "A100-80GB"})
	}
	register(t, db, a)
	user := db.User()
	set := db.Dataset(user)
	for range 8 {
		var refs []job.Ref
		var as []store.Assignment
		for _, d := range a.Devices {
			id := job.ID(db.Job(user, set))
			admit(t, db, id)
			as = append(as, store.Assignment{Job: id, Agent: a.ID, Devices: []string{d.UUID}})
		}
		sends, err := db.Store.Assign(t.Context(), as)
		if err != nil || len(sends) != len(as) {
			t.Fatalf("assigned %d: %v", len(sends), err)
		}
		for i, s := range sends {
			ref := s.Task.Ref
			ref.Nonce = nonce(100 + i)
			accept(t, db, a, ref)
			refs = append(refs, ref)
		}
		g, ctx := errgroup.WithContext(t.Context())
		var left atomic.Int64
		left.Store(int64(len(refs)))
		for range 2 {
			g.Go(func() error {
				for left.Load() > 0 {
					if _, err := db.Store.Renew(ctx, a, ttl, store.AgentState{}, refs); err != nil {
						return err
					}
				}
				return nil
			})
		}
		for _, ref := range refs {
			g.Go(func() error {
				defer left.Add(-1)
				_, err := db.Store.Settle(ctx, ref, store.End{Outcome: store.OutcomeCancelled, Failure: &job.Failure{Kind: job.CancelledByUser}})
				return err
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
	}
}
