package e2e_test

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"lorayard/internal/devstack"
	"lorayard/internal/gpu/fakenvml"
)

// The real agent on a stand-in for the driver's library: what the library tells
// reaches metrics, `agent gpus`, the judge and the job; faults end one attempt
// each, and never the agent.
func TestAnAgentReadsItsDriver(t *testing.T) {
	f := faults(t, dry(60, 50*time.Millisecond)...)
	f.dispatcher("dispatcher")
	dir := t.TempDir()
	_, err := fakenvml.Build(dir)
	f.must(err)
	host, err := fakenvml.New(filepath.Join(dir, "state"), 3)
	f.must(err)
	defer host.Close()
	host.Busy(1, 93, 650, 71)
	library := []string{"LD_LIBRARY_PATH=" + dir, fakenvml.StateEnv + "=" + host.Path}
	a := f.agent("host-1", append([]string{"PRETEND_GPUS=0", "KERNEL_LOG="}, library...)...)
	job := func() string {
		id, err := f.Insert(t.Context(), devstack.Job{
			User: f.user, Dataset: f.data, Preset: "custom", GPUConfig: map[string]any{"type": "H100", "count": 1},
			Hyperparameters: map[string]any{"learning_rate": 1e-3, "batch_size": 4, "epochs": 2, "rank": 8, "alpha": 16, "dropout": 0},
		})
		f.must(err)
		return id
	}
	holds := func(id string, attempt int) int {
		uuid := f.text(`SELECT devices[1] FROM lorayard.attempts WHERE job_id = $1 AND attempt = $2`, id, attempt)
		for i := range 3 {
			if host.UUID(i) == uuid {
				return i
			}
		}
		t.Fatalf("device %q is none of the host's", uuid)
		return 0
	}
	f.eventually("readings", func() bool {
		out, err := a.Metrics()
		return err == nil && strings.Contains(out, `lorayard_gpu_power_watts{gpu_uuid="`+host.UUID(1)+`"} 650`)
	})
	first := job()
	f.steps(first, 2)
	broken := holds(first, 1)
	host.XID(broken, 48) // told by the library's events
	f.until("the second attempt", `SELECT count(*) = 1 FROM lorayard.attempts WHERE job_id = $1 AND attempt = 2 AND accepted_at IS NOT NULL`, first)
	lost := holds(first, 2)
	f.until("its training", `SELECT coalesce(max(step), 0) > 2 FROM metrics_points WHERE job_id = $1`, first)
	host.Lose(lost, true) // told by nobody: the poll finds it out
	f.completed(first, 60, "1 host-1 failed, 2 host-1 failed, 3 host-1 completed")
	if got := f.text(`SELECT failures || ' ' || losses || ' ' || (SELECT string_agg(DISTINCT a.kind, ',') FROM lorayard.attempts a WHERE a.job_id = j.job_id AND attempt < 3) FROM lorayard.jobs j WHERE job_id = $1`, first); got != "0 2 gpu_fault" {
		t.Errorf("failures, losses, kinds: %s", got)
	}
	out, err := a.Metrics()
	f.must(err)
	for _, want := range []string{
		`lorayard_gpu_xid_errors_total{class="reset",gpu_uuid="` + host.UUID(broken) + `",source="event",xid="48"} 1`,
		`lorayard_gpu_health{gpu_uuid="` + host.UUID(lost) + `",state="missing"} 1`,
		`lorayard_gpu_health{gpu_uuid="` + host.UUID(broken) + `",state="quarantined"} 1`,
	} {
		if !strings.Contains(out, want+"\n") {
			t.Errorf("metrics lack %s:\n%s", want, strings.Join(regexp.MustCompile(`(?m)^lorayard_gpu_(xid|health).*$`).FindAllString(out, -1), "\n"))
		}
	}
	show := exec.CommandContext(t.Context(), filepath.Join(f.Bin, "agent"), "gpus", "--data-dir", filepath.Join(f.Dir, "host-1"))
	show.Env = library
	raw, err := show.CombinedOutput()
	table := string(raw)
	if err != nil || strings.Count(table, "NVIDIA H100 80GB HBM3") != 3 || !strings.Contains(table, "quarantined") || !strings.Contains(table, "missing") {
		t.Errorf("`agent gpus`: %v\n%s", err, table)
	}
}
