package storetest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"lorayard/internal/job"
	"lorayard/internal/store"
)

func TestMain(m *testing.M) { Main(m) }

// world is a database in which everything has happened and nothing is wrong.
type world struct {
	*DB
	agent store.Agent
	user  string
}

// job inserts and admits one.
func (w *world) job() job.ID {
	w.t.Helper()
	id := job.ID(w.Job(w.user, w.Dataset(w.user)))
	spec, err := job.ParseSpec("balanced", []byte(Hyperparameters), []byte(GPUConfig), job.Policy{BaseModels: []string{"m"}})
	w.must(err)
	_, err = w.Store.Admit(w.t.Context(), []store.Admission{{ID: id, Spec: spec, Hyperparameters: []byte(Hyperparameters), GPUConfig: []byte(GPUConfig)}})
	w.must(err)
	return id
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) assign(id job.ID, before, device int) job.Ref {
	w.t.Helper()
	sends, err := w.Store.Assign(w.t.Context(), []store.Assignment{{Job: id, Attempt: before, Agent: w.agent.ID, Devices: []string{w.agent.Devices[device].UUID}}})
	if err != nil || len(sends) != 1 {
		w.t.Fatalf("assign: %+v, %v", sends, err)
	}
	return sends[0].Task.Ref
}

func (w *world) accept(ref job.Ref) job.Ref {
	w.t.Helper()
	ref.Nonce = w.Text(`SELECT gen_random_uuid()`)
	_, err := w.Store.Accept(w.t.Context(), w.agent, ref)
	w.must(err)
	return ref
}

// says appends samples of the steps from first to last, then a line.
func (w *world) says(ref job.Ref, first, last int) {
	w.t.Helper()
	var samples []job.Sample
	for s := first; s <= last; s++ {
		samples = append(samples, job.Sample{Seq: uint64(s - first + 1), At: time.Now(), Step: s, Epoch: 1, Loss: 2, LearningRate: 1e-4, GradNorm: 1, TokensPerSecond: 1})
	}
	line := job.Line{Seq: uint64(last - first + 2), At: time.Now(), Level: "info", Message: "x"}
	w.must(w.Store.Append(w.t.Context(), ref, samples, []job.Line{line}, &job.Progress{Status: job.Running, Stage: job.StageTraining, Step: last, TotalSteps: last, Epoch: 1, TotalEpochs: 1}))
}

// build makes jobs in every standing: done (at its second attempt, resumed),
// running, assigned, queued, failed and cancelled.
func build(t *testing.T) (w *world, jobs map[string]string) {
	w = &world{DB: New(t), agent: store.Agent{ID: "a", BaseModels: []string{"m"}}}
	for i := range 4 {
		w.agent.Devices = append(w.agent.Devices, store.Device{UUID: fmt.Sprintf("GPU-%d", i), Index: i, Class: "A100-80GB", Pretend: true})
	}
	w.agent.Boot = w.Text(`SELECT gen_random_uuid()`)
	w.user = w.User()
	_, err := w.Store.Register(t.Context(), w.agent, time.Hour, nil)
	w.must(err)

	done := w.job()
	ref := w.accept(w.assign(done, 0, 0))
	w.says(ref, 1, 4)
	w.must(w.Store.AddCheckpoint(t.Context(), ref, job.Checkpoint{Step: 3, Bucket: "lora-models", Path: w.user + "/x", ManifestSHA256: "ab", Files: []job.File{}}))
	lost, err := w.Store.ReportDeath(t.Context(), w.agent.ID, w.agent.Boot, ref, "killed")
	if err != nil || !lost {
		t.Fatalf("report the death: %t, %v", lost, err)
	}
	_, err = w.Store.Register(t.Context(), w.agent, time.Hour, nil)
	w.must(err)
	ref = w.accept(w.assign(done, 1, 0))
	w.Exec(`SELECT lorayard.set_resume_step($1, $2, $3, 3)`, string(ref.Job), ref.Attempt, ref.Nonce)
	w.says(ref, 4, 6)
	_, err = w.Store.Renew(t.Context(), w.agent, time.Hour, store.AgentState{}, []job.Ref{ref})
	w.must(err)
	art := w.Text(`SELECT gen_random_uuid()`)
	_, err = w.Store.Settle(t.Context(), ref, store.End{Outcome: store.OutcomeCompleted, Artifact: &store.Artifact{
		ID: art, Files: map[string]string{"adapter.safetensors": w.user + "/" + art + "/adapter.safetensors"}, QualityMetrics: map[string]any{}, Metrics: map[string]any{},
		TrainingSummary: map[string]any{"files": []job.File{{Name: "adapter.safetensors", Bytes: 1, SHA256: strings.Repeat("0", 64)}}},
	}})
	w.must(err)

	running := w.job()
	w.says(w.accept(w.assign(running, 0, 1)), 1, 2)
	assigned := w.job()
	w.assign(assigned, 0, 2)
	queued := w.job()
	failed := w.job()
	_, err = w.Store.Settle(t.Context(), w.accept(w.assign(failed, 0, 3)), store.End{Outcome: store.OutcomeFailed, Failure: &job.Failure{Kind: job.Diverged, Message: "diverged"}})
	w.must(err)
	cancelled := w.job()
	w.Exec(`UPDATE training_jobs SET status = 'cancelled' WHERE id = $1`, string(cancelled))
	_, err = w.Store.SettleCancelled(t.Context())
	w.must(err)
	return w, map[string]string{
		"$done": string(done), "$running": string(running), "$assigned": string(assigned), "$queued": string(queued), "$failed": string(failed), "$cancelled": string(cancelled),
	}
}

// plants are ways to break an invariant, by a part of what it says. $done and
// the like stand for jobs.
var plants = []struct{ sql, named string }{
	{`UPDATE lorayard.attempts SET nonce = gen_random_uuid() WHERE job_id = '$running'`, "one open attempt, accepted under its nonce"},
	{`UPDATE lorayard.attempts SET ended_at = NULL, outcome = NULL WHERE job_id = '$done' AND attempt = 1`, "no open attempt but its newest"},
	{`UPDATE lorayard.attempts SET ended_at = now() + interval '1 hour' WHERE job_id = '$done' AND attempt = 1`, "assigned after the one before it ended"},
	{`UPDATE lorayard.attempts SET nonce = (SELECT nonce FROM lorayard.jobs WHERE job_id = '$done') WHERE job_id = '$done'`, "a nonce is drawn once"},
	{`INSERT INTO lorayard.samples SELECT '$assigned', 1, 1, now(), 1, 0, 1, NULL, 0, 0, 0`, "only an accepted attempt writes"},
	{`INSERT INTO job_logs (user_id, job_id, attempt, seq, timestamp, level, message) SELECT user_id, id, 1, 1, now(), 'info', 'x' FROM training_jobs WHERE id = '$assigned'`, "only an accepted attempt writes"},
	{`UPDATE checkpoints SET created_at = now() + interval '1 hour' WHERE job_id = '$done'`, "no checkpoint after the next one was accepted"},

	{`UPDATE training_jobs SET status = 'completed' WHERE id = '$running'`, "a settled job is final, and a final one settled"},
	{`UPDATE training_jobs SET status = 'running' WHERE id = '$done'`, "a settled job is final, and a final one settled"},
	{`UPDATE training_jobs SET status = 'cancelled' WHERE id = '$done'`, "a job completes by its last attempt"},
	{`UPDATE lorayard.attempts SET outcome = 'completed' WHERE job_id = '$done'`, "a job completes by its last attempt"},
	{`UPDATE training_jobs SET artifact_id = NULL WHERE id = '$done'`, "exactly one artifact and names it"},
	{`UPDATE model_artifacts SET job_id = '$cancelled'`, "an artifact belongs to a completed job"},
	{`UPDATE model_artifacts SET training_summary = jsonb_set(training_summary, '{files,0,sha256}', '"?"')`, "has a recorded digest"},
	{`UPDATE lorayard.attempts SET accepted_at = now() + interval '1 hour' WHERE job_id = '$failed'`, "nothing is accepted for a job that has ended"},

	{`UPDATE lorayard.jobs SET agent_id = 'a' WHERE job_id = '$queued'`, "a queued job waits for its placement"},
	{`UPDATE lorayard.jobs SET state = 'assigned' WHERE job_id = '$queued'`, "an assigned job has an agent"},
	{`UPDATE lorayard.attempts SET ended_at = now(), outcome = 'lost' WHERE job_id = '$assigned'`, "an assigned job has an agent"},
	{`UPDATE training_jobs SET status = 'running' WHERE id = '$queued'`, "a job under way for its user is accepted"},
	{`DELETE FROM lorayard.jobs WHERE job_id = '$done'`, "no job ends without a settlement"},
	{`UPDATE lorayard.jobs SET attempt = 3 WHERE job_id = '$done'`, "numbered from 1"},
	{`DELETE FROM lorayard.attempts WHERE job_id = '$done' AND attempt = 1`, "numbered from 1"},
	{`UPDATE lorayard.attempts SET outcome = NULL WHERE job_id = '$failed'`, "an attempt that ended has an outcome"},

	{`INSERT INTO model_artifacts SELECT (jsonb_populate_record(m, jsonb_build_object('id', gen_random_uuid()))).* FROM model_artifacts m`, "one artifact, one cost record and one notification"},
	{`INSERT INTO cost_records SELECT (jsonb_populate_record(c, jsonb_build_object('id', gen_random_uuid()))).* FROM cost_records c`, "one artifact, one cost record and one notification"},
	{`INSERT INTO notifications SELECT (jsonb_populate_record(n, jsonb_build_object('id', gen_random_uuid()))).* FROM notifications n`, "one artifact, one cost record and one notification"},
	{`DELETE FROM notifications WHERE type = 'artifact_ready'`, "a user hears of the start"},
	{`UPDATE notifications SET type = 'job_completed' WHERE type = 'job_failed'`, "a user hears of the start"},

	{`ALTER TABLE lorayard.usage_intervals DROP CONSTRAINT usage_intervals_one_owner; UPDATE lorayard.usage_intervals SET device = 'GPU-0', during = tstzrange(now() - interval '1 day', now())`, "no device has two owners"},
	{`UPDATE lorayard.attempts SET devices = '{GPU-1}' WHERE job_id = '$assigned'`, "no device is lent to two open attempts"},
	{`UPDATE lorayard.usage_intervals SET during = tstzrange(lower(during), upper(during) + interval '1 minute') WHERE job_id = '$failed'`, "usage of an attempt has no gaps"},
	{`INSERT INTO lorayard.usage_intervals (job_id, attempt, device, seq, user_id, class, micro_usd_per_hour, during)
	  SELECT job_id, attempt, device, 2, user_id, class, micro_usd_per_hour, tstzrange(upper(during) + interval '1 second', upper(during) + interval '2 seconds') FROM lorayard.usage_intervals WHERE job_id = '$running'`, "usage of an attempt has no gaps"},
	{`UPDATE lorayard.usage_intervals SET closed = false WHERE job_id = '$failed'`, "usage of a closed attempt is closed"},
	{`UPDATE lorayard.usage_intervals SET billable = false WHERE job_id = '$done'`, "is measured to its end"},
	{`UPDATE lorayard.usage_intervals SET billable = true WHERE job_id = '$done'`, "lost attempts are not billed"},
	{`UPDATE cost_records SET amount = amount + 0.01`, "the cost record is rate times"},
	{`DELETE FROM cost_records WHERE job_id = '$done'`, "the cost record is rate times"},
	{`UPDATE lorayard.usage_intervals SET micro_usd_per_hour = 1000000000000000 WHERE job_id = '$done'`, "the cost record is rate times"},
	{`UPDATE cost_records SET job_id = '$running' WHERE job_id = '$done'`, "nobody pays for a job that is not settled"},

	{`DELETE FROM lorayard.samples WHERE job_id = '$running' AND seq = 1`, "no gap and no number twice"},
	{`UPDATE job_logs SET seq = 1 WHERE job_id = '$running'`, "no gap and no number twice"},
	{`UPDATE lorayard.samples SET step = 7 WHERE job_id = '$done' AND step = 6`, "rise by one step"},
	{`UPDATE lorayard.samples SET step = step + 1 WHERE job_id = '$running'`, "every step of a job is measured"},
	{`UPDATE training_jobs SET current_step = 5 WHERE id = '$done'`, "shows the last step"},
	{`UPDATE metrics_points SET timestamp = now() + interval '1 hour' WHERE job_id = '$done' AND step = 1`, "rise in step with time"},
	{`UPDATE lorayard.attempts SET resume_step = 2 WHERE job_id = '$done' AND attempt = 2`, "resumes from a checkpoint of an earlier one"},

	{`UPDATE checkpoints SET path = 'elsewhere/x'`, "under another's name"},
	{`WITH u AS (INSERT INTO auth.users DEFAULT VALUES RETURNING id) UPDATE job_logs SET user_id = u.id FROM u`, "under another's name"},
	{`WITH u AS (INSERT INTO auth.users DEFAULT VALUES RETURNING id) UPDATE datasets SET user_id = u.id FROM u`, "under another's name"},
	{`INSERT INTO lorayard.validations (dataset_id, path) SELECT id, 'somebody/' || id || '/normalised-x.jsonl' FROM datasets LIMIT 1`, "under another's name"},
	{`WITH u AS (INSERT INTO auth.users DEFAULT VALUES RETURNING id) UPDATE notifications SET user_id = u.id FROM u`, "under another's name"},
}

// Each invariant can fail: what is planted against it is named, and nothing is
// named before.
func TestEveryPlantedViolationIsNamed(t *testing.T) {
	w, jobs := build(t)
	Check(t, w.Pool)
	left, err := Unsettled(t.Context(), w.Pool)
	w.must(err)
	if len(left) != 3 {
		t.Errorf("not settled: %v, want the running, the assigned and the queued job", left)
	}
	named := map[string]bool{}
	for _, p := range plants {
		sql := p.sql
		for name, id := range jobs {
			sql = strings.ReplaceAll(sql, name, id)
		}
		undo := errors.New("undo")
		err := pgx.BeginFunc(t.Context(), w.Pool, func(tx pgx.Tx) error {
			// The database guards some of it by itself.
			if _, err := tx.Exec(t.Context(), `SET LOCAL session_replication_role = replica; ALTER TABLE model_artifacts DROP CONSTRAINT model_artifacts_job_id_key`); err != nil {
				return err
			}
			tag, err := tx.Exec(t.Context(), sql)
			if err != nil || tag.RowsAffected() == 0 {
				return fmt.Errorf("plant %s: %d rows, %w", p.sql, tag.RowsAffected(), err)
			}
			bad, err := ask(context.WithoutCancel(t.Context()), tx)
			if err != nil {
				return err
			}
			if !strings.Contains(strings.Join(bad, "\n"), p.named) {
				t.Errorf("%s\nis not named by %q, but by %q", p.sql, p.named, bad)
			}
			for _, v := range bad {
				named[v[:strings.Index(v, "; but not ")]] = true
			}
			return undo
		})
		if !errors.Is(err, undo) {
			t.Errorf("%s: %v", p.sql, err)
		}
	}
	for _, i := range invariants {
		if !named[fmt.Sprintf("invariant %d: %s", i.number, i.says)] {
			t.Errorf("nothing is planted against %q", i.says)
		}
	}
	Check(t, w.Pool)
}
