package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"lorayard/internal/devstack"
)

// kernelLog is a pipe that an agent reads as its kernel's log.
func (f *faulty) kernelLog(id string) (setting string, say func(bus string, xid int)) {
	f.t.Helper()
	path := filepath.Join(f.t.TempDir(), id)
	f.must(syscall.Mkfifo(path, 0o600))
	return "KERNEL_LOG=" + path, func(bus string, xid int) {
		f.t.Helper()
		w, err := os.OpenFile(path, os.O_WRONLY, 0)
		f.must(err)
		defer w.Close()
		_, err = fmt.Fprintf(w, "4,1,1,-;NVRM: Xid (PCI:%s): %d, pid=1, name=python, planted\n", bus, xid)
		f.must(err)
	}
}

// bus is the PCI address of the pretended device that an attempt has.
func (f *faulty) bus(id string, attempt int) string {
	f.t.Helper()
	return f.text(`SELECT 'ffff:' || lpad(to_hex(d.index + 1), 2, '0') || ':00' FROM lorayard.attempts a JOIN lorayard.devices d ON d.uuid = a.devices[1] WHERE a.job_id = $1 AND a.attempt = $2`, id, attempt)
}

// A GPU breaks under a job: the trainer is ended at once, the job is finished
// on the other host, nobody pays for what was lost, and the device is not used
// again until somebody says so, across a restart and a kill of its agent.
func TestAJobLeavesABrokenDevice(t *testing.T) {
	f := faults(t, dry(100, 50*time.Millisecond)...)
	d := f.dispatcher("dispatcher")
	setting, say := f.kernelLog("host-1")
	one := f.agent("host-1", setting)
	id := f.job()
	f.steps(id, 3)
	f.until("a checkpoint", `SELECT count(*) > 0 FROM checkpoints WHERE job_id = $1`, id)
	f.agent("host-2")
	f.eventually("the second host", func() bool { return f.metric(d, "lorayard_dispatcher_hosts") == 2 })
	began := time.Now()
	say(f.bus(id, 1), 79)
	f.until("the end of the attempt", `SELECT outcome IS NOT NULL FROM lorayard.attempts WHERE job_id = $1 AND attempt = 1`, id)
	t.Logf("from the fault to the settlement: %v", time.Since(began).Round(time.Millisecond))
	f.until("the next attempt", `SELECT count(*) = 1 FROM lorayard.attempts WHERE job_id = $1 AND attempt = 2 AND accepted_at IS NOT NULL`, id)
	t.Logf("from the fault to the next accept: %v", time.Since(began).Round(time.Millisecond))
	f.completed(id, 100, "1 host-1 failed, 2 host-2 completed")
	if got := f.text(`SELECT kind || ' ' || message FROM lorayard.attempts WHERE job_id = $1 AND attempt = 1`, id); !strings.HasPrefix(got, "gpu_fault GPU ") || !strings.Contains(got, "of host-1 failed during the training (XID 79, the GPU has fallen off the bus)") {
		t.Errorf("the attempt says: %s", got)
	}
	if got := f.text(`SELECT failures || ' ' || losses || ' ' || (SELECT bool_or(billable) FROM lorayard.usage_intervals u WHERE u.job_id = j.job_id AND attempt = 1) FROM lorayard.jobs j WHERE job_id = $1`, id); got != "0 1 false" {
		t.Errorf("failures, losses, first attempt billed: %s", got)
	}
	if got := f.text(`SELECT count(*) FROM job_logs WHERE job_id = $1 AND level = 'error' AND message LIKE 'GPU % of host-1 failed: XID 79%'`, id); got != "1" {
		t.Errorf("%s lines of the job's log tell of it", got)
	}
	if f.text(`SELECT resume_step > 0 FROM lorayard.attempts WHERE job_id = $1 AND attempt = 2`, id) != "t" {
		t.Error("attempt 2 began anew")
	}
	uuid := f.text(`SELECT devices[1] FROM lorayard.attempts WHERE job_id = $1 AND attempt = 1`, id)
	quarantined := func(after string) {
		t.Helper()
		f.until("the quarantine "+after, `SELECT fault LIKE 'XID 79%restart the host' FROM lorayard.devices WHERE uuid = $1`, uuid)
		out, err := f.Tell(t.Context(), "host-1", "quarantine")
		if err != nil || strings.Count(out, "missing") != 1 || !strings.Contains(out, uuid) {
			t.Errorf("%s, `agent quarantine` says, %v:\n%s", after, err, out)
		}
	}
	quarantined("at first")
	seen, err := one.Metrics()
	f.must(err)
	for _, want := range []string{
		`lorayard_gpu_xid_errors_total{class="reboot",gpu_uuid="` + uuid + `",source="kernel_log",xid="79"} 1`,
		`lorayard_gpu_quarantines_total{gpu_uuid="` + uuid + `",reason="xid"} 1`,
		"lorayard_gpu_fault_kill_seconds_count 1",
	} {
		if !strings.Contains(seen, want) {
			t.Errorf("no metric says %s", want)
		}
	}
	one.Kill()
	f.agent("host-1", setting)
	quarantined("after a kill")
	if out, err := f.Tell(t.Context(), "host-1", "quarantine", "lift", uuid); err != nil || strings.Contains(out, "missing") || !strings.Contains(out, "suspect") {
		t.Errorf("lift: %v\n%s", err, out)
	}
	f.until("the return of the device", `SELECT fault = '' FROM lorayard.devices WHERE uuid = $1`, uuid)
	if out, err := f.Tell(t.Context(), "host-1", "quarantine", "lift", uuid); err == nil {
		t.Errorf("lifted twice:\n%s", out)
	}
}

// With one host, the job goes on there, on the other device; and a job of both
// waits for the one that is broken, with the reason.
func TestAHostWithOneBrokenDeviceUsesTheOther(t *testing.T) {
	f := faults(t, dry(60, 50*time.Millisecond)...)
	f.dispatcher("dispatcher")
	setting, say := f.kernelLog("host-1")
	f.agent("host-1", setting)
	id := f.job()
	f.steps(id, 2)
	say("ffff:09:00", 79)  // of nobody
	say(f.bus(id, 1), 31)  // of the program
	say(f.bus(id, 1), 119) // of the device
	f.completed(id, 60, "1 host-1 failed, 2 host-1 completed")
	if f.text(`SELECT count(DISTINCT devices[1]) FROM lorayard.attempts WHERE job_id = $1`, id) != "2" {
		t.Error("the same device was used again")
	}
	both, err := f.Insert(t.Context(), devstack.Job{
		User: f.user, Dataset: f.data, Preset: "custom", GPUConfig: map[string]any{"type": "A100-80GB", "count": 2},
		Hyperparameters: map[string]any{"learning_rate": 1e-3, "batch_size": 4, "epochs": 2, "rank": 8, "alpha": 16, "dropout": 0},
	})
	f.must(err)
	f.until("a reason to wait", `SELECT waiting LIKE '%XID 119%' FROM lorayard.jobs WHERE job_id = $1`, both)
	if out, err := f.Tell(t.Context(), "host-1", "quarantine", "lift", f.text(`SELECT uuid FROM lorayard.devices WHERE fault <> ''`)); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	f.completed(both, 60, "1 host-1 completed")
}
