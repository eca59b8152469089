package e2e_test

import (
	"path/filepath"
	"testing"
	"time"

	"lorayard/internal/gpu/fakenvml"
)

// What keeps a job from running is seen before one begins, and nothing of it
// ends the agent: memory that somebody else uses, a device on which nothing can
// run, a driver that hangs. A driver that was loaded anew brings back what was
// broken.
func TestNothingIsLentThatCannotBeUsed(t *testing.T) {
	f := faults(t, dry(20, 20*time.Millisecond)...)
	d := f.dispatcher("dispatcher")
	library, err := fakenvml.Build(t.TempDir())
	f.must(err)
	host, err := fakenvml.New(filepath.Join(t.TempDir(), "state"), 2)
	f.must(err)
	defer host.Close()
	for i := range 2 {
		host.Call(i, "NVIDIA A100-SXM4-80GB", 80)
	}
	one := f.agent("host-1", "PRETEND_GPUS=0", "KERNEL_LOG=", "GPU_LIBRARY="+library, fakenvml.StateEnv+"="+host.Path)
	f.eventually("the host", func() bool { return f.metric(d, "lorayard_dispatcher_hosts") == 1 })
	fault := func(i int, like string) {
		t.Helper()
		f.until("fault of device: "+like, `SELECT fault LIKE $2 FROM lorayard.devices WHERE uuid = $1`, host.UUID(i), like)
	}

	host.Use(0, 9<<30)
	host.XID(1, 119)
	fault(0, "busy: 9.0 GiB used by a process that is not ours")
	fault(1, "XID 119%")
	host.Use(0, 0)
	host.Unload()
	host.Load()
	fault(0, "")
	fault(1, "")
	if n := f.metric(one, "lorayard_gpu_driver_reopened_total"); n != 1 {
		t.Errorf("the driver was opened anew %v times", n)
	}

	host.Prohibit(0, true)
	host.Prohibit(1, true)
	id := f.job()
	f.eventually("a refusal", func() bool {
		return f.metric(one, `lorayard_agent_accepts_total{result="refused"}`) > 0 || f.text(`SELECT string_agg(fault, '') FROM lorayard.devices`) != ""
	})
	host.Prohibit(0, false)
	host.Prohibit(1, false)
	f.completed(id, 20, "1 host-1 completed")
	if f.metric(one, "lorayard_gpu_driver_wedged") != 0 || f.metric(d, "lorayard_dispatcher_hosts") != 1 {
		t.Error("the agent is not well")
	}

	// A call that never comes back keeps nobody: neither a scrape, nor a renewal,
	// nor the end.
	host.Hang(time.Hour)
	polls := `lorayard_gpu_poll_last_success_timestamp_seconds{tier="hot"}`
	f.eventually("a call that hangs", func() bool {
		return time.Since(time.Unix(int64(f.metric(one, polls)), 0)) > 4*time.Second // a poll a second is made
	})
	if f.metric(d, "lorayard_dispatcher_hosts") != 1 {
		t.Error("the agent is not renewed while the driver hangs")
	}
	began := time.Now()
	if err := one.Stop(10 * time.Second); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the agent took %v to end", took)
	}
}
