package watch_test

import (
	"io"
	"log/slog"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"

	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/store"
	"lorayard/internal/storetest"
	"lorayard/internal/watch"
)

func TestMain(m *testing.M) { storetest.Main(m) }

// value reads a series as Prometheus would.
func value(t *testing.T, m *metrics.Dispatcher, series string) float64 {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	body, _ := io.ReadAll(w.Body)
	for line := range strings.Lines(string(body)) {
		if v, is := strings.CutPrefix(strings.TrimSpace(line), series+" "); is {
			f, err := strconv.ParseFloat(v, 64)
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
	}
	return -1
}

// The watch counts every attempt once, whoever closed it, and knows what the
// devices do meanwhile.
func TestWhatTheDatabaseKnowsBecomesMetrics(t *testing.T) {
	db := storetest.New(t)
	ctx := t.Context()
	m := metrics.NewDispatcher("")
	w := &watch.Watch{Store: db.Store, Metrics: m, Log: slog.New(slog.DiscardHandler), Leads: func() bool { return true }}
	look := func() {
		t.Helper()
		if err := w.Look(ctx); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(want map[string]float64) {
		t.Helper()
		for series, v := range want {
			if got := value(t, m, series); got != v {
				t.Errorf("%s is %v, want %v", series, got, v)
			}
		}
	}
	u := db.User()
	set := db.Dataset(u)
	agent := func(id, fault string, n int) {
		db.Exec(`INSERT INTO lorayard.agents (id, boot, lease_until) VALUES ($1, gen_random_uuid(), now() + interval '1 hour')`, id)
		for i := range n {
			db.Exec(`INSERT INTO lorayard.devices (uuid, agent_id, index, name, class, memory_bytes, fault) VALUES ($1, $2, $3::int, 'x', 'H100', 1, $4)`,
				id+"-"+strconv.Itoa(i), id, i, fault)
		}
	}
	agent("a", "", 3)
	agent("b", "it fell off the bus", 1)
	wish := `{"gpu_class": "H100", "gpu_count": 1}`
	queue := func(state, device string) string {
		id := db.Job(u, set)
		db.Exec(`INSERT INTO lorayard.jobs (job_id, user_id, spec, state, attempt, agent_id, devices, admitted_at)
			VALUES ($1, $2, $3, $4, 0, 'a', ARRAY[$5], now() - interval '1 minute')`, id, u, wish, state, device)
		return id
	}
	begin := func(id, device string, attempt int) {
		db.Exec(`UPDATE lorayard.jobs SET state = 'accepted', attempt = $2::int WHERE job_id = $1`, id, attempt)
		db.Exec(`INSERT INTO lorayard.attempts (job_id, attempt, agent_id, devices, assigned_at, accepted_at)
			VALUES ($1, $3::int, 'a', ARRAY[$2], clock_timestamp() - interval '50 milliseconds', clock_timestamp())`, id, device, attempt)
	}
	end := func(id string, attempt int, outcome, kind string, state string) {
		db.Exec(`UPDATE lorayard.attempts SET ended_at = clock_timestamp() - interval '10 seconds', outcome = $3, kind = $4 WHERE job_id = $1 AND attempt = $2::int`, id, attempt, outcome, kind)
		db.Exec(`UPDATE lorayard.jobs SET state = $2 WHERE job_id = $1`, id, state)
	}
	before := queue("queued", "a-0")
	begin(before, "a-0", 1)
	end(before, 1, "completed", "", "settled") // counted by the leader before
	look()
	expect(map[string]float64{
		`lorayard_job_attempts_total{kind="",outcome="completed"}`: 0,
		`lorayard_fleet_gpus{class="H100",state="idle"}`:           3,
		`lorayard_fleet_gpus{class="H100",state="unfit"}`:          1,
		`lorayard_fleet_agents{state="taking"}`:                    2,
		`lorayard_ledger_drift_dollars`:                            0,
	})

	id := queue("queued", "a-0")
	look()
	expect(map[string]float64{`lorayard_fleet_gpus{class="H100",state="idle_with_queue"}`: 3, `lorayard_fleet_gpus{class="H100",state="idle"}`: 0})
	begin(id, "a-0", 1)
	look()
	look()
	expect(map[string]float64{
		`lorayard_fleet_gpus{class="H100",state="busy"}`:         1,
		`lorayard_fleet_gpus{class="H100",state="idle"}`:         2,
		`lorayard_job_handover_seconds_count`:                    1,
		`lorayard_job_handover_seconds_bucket{le="0.025"}`:       0,
		`lorayard_job_handover_seconds_bucket{le="0.25"}`:        1,
		`lorayard_job_wait_seconds_count{class="H100"}`:          1,
		`lorayard_job_wait_seconds_bucket{class="H100",le="10"}`: 0,
	})
	if v := value(t, m, `lorayard_fleet_gpu_seconds_total{class="H100",state="unfit"}`); v <= 0 || v > 60 {
		t.Errorf("unfit for %v s", v)
	}
	end(id, 1, "failed", string(job.GPUFault), "queued")
	begin(id, "a-1", 2)
	end(id, 2, "completed", "", "settled")
	db.Exec(`UPDATE training_jobs SET status = 'completed' WHERE id = $1`, id)
	lost := queue("queued", "a-2")
	begin(lost, "a-2", 1)
	end(lost, 1, "lost", string(job.AgentLost), "settled")
	db.Exec(`UPDATE training_jobs SET status = 'failed' WHERE id = $1`, lost)
	look()
	look()
	expect(map[string]float64{
		`lorayard_job_attempts_total{kind="gpu_fault",outcome="failed"}`: 1,
		`lorayard_job_attempts_total{kind="",outcome="completed"}`:       1,
		`lorayard_job_attempts_total{kind="agent_lost",outcome="lost"}`:  1,
		`lorayard_jobs_settled_total{status="completed"}`:                1,
		`lorayard_jobs_settled_total{status="failed_infra"}`:             1,
		`lorayard_job_recovery_seconds_count{kind="gpu_fault"}`:          1,
		`lorayard_job_recovery_seconds_bucket{kind="gpu_fault",le="5"}`:  0,
		`lorayard_job_recovery_seconds_bucket{kind="gpu_fault",le="15"}`: 1,
		`lorayard_job_handover_seconds_count`:                            3,
	})
}

func TestTheLedgersWatchSeesAWrongRecord(t *testing.T) {
	db := storetest.New(t)
	u := db.User()
	id := db.Job(u, db.Dataset(u))
	db.Exec(`INSERT INTO lorayard.jobs (job_id, user_id, spec, state, attempt) VALUES ($1, $2, '{}', 'settled', 1)`, id, u)
	db.Exec(`INSERT INTO lorayard.usage_intervals (job_id, attempt, device, user_id, class, micro_usd_per_hour, during, closed)
		VALUES ($1, 1, 'd', $2, 'H100', 3600000, tstzrange(now() - interval '1 hour', now()), true)`, id, u)
	db.Exec(`INSERT INTO cost_records (user_id, job_id, cost_type, amount, billing_period) VALUES ($1, $2, 'compute', 3.60, '2026-11-01')`, u, id)
	check := func(drift float64, open, stray int) {
		t.Helper()
		if l, err := db.Store.CheckLedger(t.Context()); err != nil || l != (store.Ledger{Drift: drift, Open: open, Stray: stray}) {
			t.Errorf("%+v, %v", l, err)
		}
	}
	check(0, 0, 0)
	db.Exec(`UPDATE cost_records SET amount = 4.10`)
	db.Exec(`UPDATE lorayard.usage_intervals SET closed = false`)
	check(0.5, 1, 1)
}

// A standby counts nothing, and a leader that was replaced leaves nothing behind.
func TestAStandbyShowsNoFleet(t *testing.T) {
	db := storetest.New(t)
	m := metrics.NewDispatcher("")
	w := &watch.Watch{Store: db.Store, Metrics: m, Log: slog.New(slog.DiscardHandler), Leads: func() bool { return false }}
	db.Exec(`INSERT INTO lorayard.agents (id, boot, lease_until) VALUES ('a', gen_random_uuid(), now() + interval '1 hour')`)
	if err := w.Look(t.Context()); err != nil {
		t.Fatal(err)
	}
	if v := value(t, m, `lorayard_fleet_agents{state="taking"}`); v != 1 {
		t.Fatalf("%v agents", v)
	}
	w.Stand()
	if v := value(t, m, `lorayard_fleet_agents{state="taking"}`); v != -1 {
		t.Errorf("a standby shows %v agents", v)
	}
}
