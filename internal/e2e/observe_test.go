package e2e_test

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"lorayard/internal/boards"
	"lorayard/internal/devstack"
	"lorayard/internal/storetest"
)

// observed is a small pretended fleet with a Prometheus.
type observed struct {
	*stack
	fleet *devstack.Fleet
	spans *collector
}

func observe(t *testing.T) *observed {
	t.Helper()
	dir := os.Getenv("PROMETHEUS")
	if dir == "" || dir == "unreachable" {
		if dir == "" && os.Getenv("CI") == "true" {
			t.Fatal("PROMETHEUS is not set: run `make test`, which unpacks Debian's prometheus")
		}
		t.Skip("there is no Prometheus here")
	}
	c := collect(t)
	s := startOn(t, storetest.New(t).URL, "CHECKPOINT_EVERY=1s", "TRAINER_BACKEND=dry", "TRACES="+c.url)
	rules, err := filepath.Abs("../../deploy/prometheus/rules")
	s.must(err)
	data, err := filepath.Abs("../../scripts/train/testdata/demo.jsonl")
	s.must(err)
	s.must(s.EmptyModel(model))
	// Two hosts of each class: a job of two devices finds another host.
	f, err := s.Fleet(t.Context(), devstack.FleetConfig{
		Agents: 4, GPUs: 2, Steps: 40, StepTime: 100 * time.Millisecond, Data: data, Prometheus: dir, Rules: rules, Scrape: 500 * time.Millisecond,
	})
	s.must(err)
	o := &observed{s, f, c}
	// A rate does not see what happened before the first scrape.
	o.ask("every process is scraped", `sum(up)`, above(5))
	return o
}

// ask waits until an expression has a series whose value is wanted.
func (o *observed) ask(what, expr string, wanted func(devstack.Point) bool) {
	o.t.Helper()
	var last []devstack.Point
	ctx, cancel := context.WithTimeout(o.t.Context(), 60*time.Second)
	defer cancel()
	for {
		ps, err := o.fleet.Watch.Ask(ctx, expr)
		for _, p := range ps {
			if wanted(p) {
				return
			}
		}
		last = ps
		select {
		case <-ctx.Done():
			o.t.Fatalf("%s: %s gives %v, %v", what, expr, last, err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func above(n float64) func(devstack.Point) bool {
	return func(p devstack.Point) bool { return p.Value > n }
}

// silent are the panels that may show nothing on a small fleet, and why.
var silent = map[string]string{
	"Memory errors":          "no device has any",
	"Sanity checks":          "devices that do not exist are not checked",
	"Running and waiting":    "all is done by then",
	"Polling the driver":     "no driver is polled",
	"Failed rounds":          "none failed",
	"Waiting jobs by reason": "nothing waits any more",
	"Age of the oldest":      "nothing waits any more",
	"The queue":              "nothing waits any more",
}

var filter = regexp.MustCompile(`\$__timeFilter\((\w+(?:\.\w+)?)\)`)

// A device breaks under a job: metrics, an alert, the job's log and the attempt's
// message tell of it, the job is finished elsewhere, and nobody pays for what
// was lost. Of all that, every panel of every board shows something, or it is
// known why not.
func TestALivingFleetIsSeen(t *testing.T) {
	t.Parallel()
	o := observe(t)
	for range 8 {
		_, err := o.fleet.Arrive(t.Context())
		o.must(err)
	}
	o.until("a training", `SELECT count(*) > 0 FROM training_jobs WHERE status = 'running' AND current_step > 2`)
	x, err := o.fleet.Plant(t.Context(), 79)
	o.must(err)
	if x == nil {
		t.Fatal("nothing trains")
	}
	o.seen(x)
	o.spans.story(x)
	o.ask("a completed job", `sum(lorayard_jobs_settled_total{status="completed"})`, above(1))
	o.ask("time of devices", `sum(rate(lorayard_fleet_gpu_seconds_total[5m]))`, above(0))
	o.ask("rates", `sum(rate(lorayard_agent_gpu_seconds_total{use="useful"}[5m]))`, above(0))
	ps, err := o.fleet.Watch.Ask(t.Context(), `last_over_time(lorayard_job_loss[2m])`)
	if err != nil || len(ps) == 0 {
		t.Fatalf("no job was ever seen: %v", err)
	}
	running := ps[0].Labels["job_id"]
	empty := 0
	for _, b := range boards.All() {
		for _, r := range b.Rows {
			for _, p := range r.Panels {
				why, known := silent[p.Title]
				n := 0
				// What was counted a moment ago is not in every second yet.
				for end := time.Now().Add(5 * time.Second); n == 0; time.Sleep(500 * time.Millisecond) {
					for _, a := range p.Asks {
						n += o.panel(b, p, a, running)
					}
					if known || n > 0 || time.Now().After(end) {
						break
					}
				}
				switch {
				case n == 0 && !known:
					t.Errorf("%s / %s shows nothing", b.UID, p.Title)
				case n == 0:
					empty++
					t.Logf("%s / %s shows nothing: %s", b.UID, p.Title, why)
				}
			}
		}
	}
	if empty > len(silent) {
		t.Errorf("%d panels show nothing", empty)
	}
}

// seen holds that a planted fault is seen wherever somebody may look.
func (o *observed) seen(x *devstack.Fault) {
	o.t.Helper()
	at := fmt.Sprintf(`{gpu_uuid=%q}`, x.Device)
	o.ask("the fault in a metric", `lorayard_gpu_xid_errors_total{xid="79", gpu_uuid="`+x.Device+`"}`, above(0))
	o.ask("the device's health", `lorayard_gpu_health{state="missing", gpu_uuid="`+x.Device+`"}`, above(0))
	o.ask("the alert", `ALERTS{alertname="GPUFatalXid", alertstate="firing", gpu_uuid="`+x.Device+`"}`, above(0))
	o.ask("it was taken out of use", `sum(lorayard_gpu_quarantines_total`+at+`)`, above(0))
	o.ask("the failed attempt", `sum(lorayard_job_attempts_total{outcome="failed", kind="gpu_fault"})`, above(0))
	o.ask("the end of the trainer", `sum(lorayard_gpu_fault_kill_seconds_count)`, above(0))
	o.until("the end of the job", `SELECT status = 'completed' FROM training_jobs WHERE id = $1`, x.Job)
	o.ask("the recovery", `sum(rate(lorayard_job_recovery_seconds_count{kind="gpu_fault"}[5m]))`, above(0))
	if got := o.text(`SELECT kind || ': ' || message FROM lorayard.attempts WHERE job_id = $1 AND attempt = $2`, x.Job, x.Attempt); !strings.HasPrefix(got, "gpu_fault: GPU ") || !strings.Contains(got, "XID 79") {
		o.t.Errorf("the attempt says: %s", got)
	}
	if got := o.text(`SELECT count(*) FROM lorayard_views.logs WHERE job = $1 AND code = 'device_fault' AND message LIKE '%XID 79%'`, x.Job); got != "1" {
		o.t.Errorf("%s lines of the job's log tell of it", got)
	}
	if o.text(`SELECT bool_or(devices && ARRAY[$3]) FROM lorayard.attempts WHERE job_id = $1 AND attempt > $2`, x.Job, x.Attempt, x.Device) != "f" {
		o.t.Error("the device was used again")
	}
	if o.text(`SELECT bool_or(billable) FROM lorayard_views.usage WHERE job = $1 AND attempt = $2`, x.Job, x.Attempt) != "f" {
		o.t.Error("the lost attempt is billed")
	}
}

// panel counts what a query gives: over the time that the fleet has lived.
func (o *observed) panel(b boards.Board, p boards.Panel, a boards.Ask, job string) int {
	if a.SQL != "" {
		sql := strings.ReplaceAll(filter.ReplaceAllString(a.SQL, `$1 > now() - interval '1 hour'`), "$job", job)
		n := 0
		err := pgx.BeginFunc(o.t.Context(), o.Pool, func(tx pgx.Tx) error {
			if _, err := tx.Exec(o.t.Context(), `SET LOCAL ROLE lorayard_observer`); err != nil {
				return err
			}
			rows, err := tx.Query(o.t.Context(), sql)
			if err != nil {
				return err
			}
			for rows.Next() {
				n++
			}
			return rows.Err()
		})
		if err != nil {
			o.t.Errorf("%s / %s: %v", b.UID, p.Title, err)
		}
		return n
	}
	expr := strings.NewReplacer("$instance", ".*", "$gpu", ".*", "$class", ".*", "$job", job).Replace(a.Expr)
	// What a graph shows is the whole time, and a job may be over by now.
	ps, err := o.fleet.Watch.Ask(o.t.Context(), fmt.Sprintf("max_over_time((%s)[2m:1s])", expr))
	if err != nil {
		o.t.Errorf("%s / %s: %v", b.UID, p.Title, err)
	}
	n := 0
	for _, p := range ps {
		if !math.IsNaN(p.Value) { // a quantile of nothing
			n++
		}
	}
	return n
}
