package metrics

import (
	"fmt"
	"io"
	"maps"
	"math"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
)

// full is an agent as busy as one can be: devices of which everything is known,
// each with a job.
func full(devices int) *Agent {
	m := NewAgent("test")
	var ds []Device
	var js []Job
	for i := range devices {
		d := Device{
			UUID: fmt.Sprintf("GPU-%08d-0000-0000-0000-000000000000", i), Name: "NVIDIA H100 80GB HBM3", Class: "H100", PCI: "00000000:18:00.0",
			Driver: "580.95.05", CUDA: "13.0", Index: i, NUMA: i / 4, Busy: true, Health: "ok",
			Throttled: map[string]float64{}, NVLinksUp: 18, NVLinksN: 18, NVLinkErrors: map[string]float64{},
		}
		for _, r := range []string{"power_cap", "hw_slowdown", "hw_thermal", "power_brake", "sw_thermal"} {
			d.Throttled[r] = 1
		}
		for _, k := range []string{"crc", "replay", "recovery"} {
			d.NVLinkErrors[k] = 0
		}
		ds = append(ds, d)
		js = append(js, Job{
			ID: fmt.Sprintf("00000000-0000-0000-0000-%012d", i), Attempt: 1, Devices: []string{d.UUID}, Class: "H100", BaseModel: "meta-llama/Llama-3.1-8B",
			Stage: "training", Step: 7, Steps: 100, Loss: 2.5, TokensPerSecond: 2200, Started: time.Now(),
		})
		m.SanityFlops.WithLabelValues(d.UUID).Set(7e14)
		m.SanityCopy.WithLabelValues(d.UUID).Set(3e12)
		m.SanityLast.WithLabelValues(d.UUID).SetToCurrentTime()
	}
	for _, s := range []string{"free", "reserved", "unfit"} {
		m.Devices.WithLabelValues(s).Set(1)
	}
	for _, t := range tiers {
		m.PollLast.WithLabelValues(t).SetToCurrentTime()
	}
	m.ReadDevices(func() []Device { return ds })
	m.ReadJobs(func() []Job { return js })
	for _, kind := range []string{"gpu_fault", "out_of_memory", "trainer_crashed", "hang"} {
		m.Attempts.WithLabelValues("failed", kind).Inc()
	}
	m.XIDs.WithLabelValues(ds[0].UUID, "79", "reboot", "event").Inc()
	m.XIDLast.WithLabelValues(ds[0].UUID, "79", "reboot").SetToCurrentTime()
	m.Quarantines.WithLabelValues(ds[0].UUID, "xid").Inc()
	m.Returns.WithLabelValues(ds[0].UUID).Inc()
	m.SanityFailures.WithLabelValues(ds[0].UUID, "product").Inc()
	return m
}

func fullDispatcher() *Dispatcher {
	m := NewDispatcher("test")
	for _, c := range []string{"H100", "A100-80GB"} {
		for _, r := range waitReason {
			m.Waiting.WithLabelValues(c, r).Set(1)
		}
		m.OldestAge.WithLabelValues(c).Set(1)
		for _, s := range fleetState {
			m.GPUs.WithLabelValues(c, s).Set(1)
			m.GPUSeconds.WithLabelValues(c, s).Add(1)
		}
		m.Wait.WithLabelValues(c).Observe(1)
	}
	m.Agents.WithLabelValues("taking").Set(1)
	m.Jobs.WithLabelValues("queued").Set(1)
	m.Attempts.WithLabelValues("failed", "gpu_fault").Inc()
	m.Recovery.WithLabelValues("gpu_fault").Observe(1)
	return m
}

func gather(t *testing.T, s *set) []*dto.MetricFamily {
	t.Helper()
	mfs, err := s.reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	return mfs
}

func TestNamesPassPromlintAndOurOwnRules(t *testing.T) {
	for _, s := range []*set{full(2).set, fullDispatcher().set} {
		mfs := gather(t, s)
		problems, err := promlint.NewWithMetricFamilies(slices.DeleteFunc(slices.Clone(mfs), func(mf *dto.MetricFamily) bool {
			return !strings.HasPrefix(mf.GetName(), "lorayard_")
		})).Lint()
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range problems {
			t.Errorf("promlint: %s: %s", p.Metric, p.Text)
		}
		gathered := map[string]*dto.MetricFamily{}
		for _, mf := range mfs {
			gathered[mf.GetName()] = mf
		}
		for name, f := range s.families {
			mf := gathered[name]
			if mf == nil {
				t.Errorf("%s: a busy process shows no series of it", name)
				continue
			}
			if got := strings.ToLower(mf.GetType().String()); got != string(f.Type) {
				t.Errorf("%s is a %s, the catalogue says %s", name, got, f.Type)
			}
			for _, m := range mf.GetMetric() {
				for _, l := range m.GetLabel() {
					values, known := f.Labels[l.GetName()]
					if !known || values != nil && !slices.Contains(values, l.GetValue()) {
						t.Errorf("%s: label %s says %q, the catalogue knows %v", name, l.GetName(), l.GetValue(), values)
					}
				}
			}
		}
	}
	for _, f := range Catalog() {
		for _, fault := range faults(f) {
			t.Errorf("%s: %s", f.Name, fault)
		}
	}
}

// units are what a name may end in: base units, or what is counted.
var units = []string{
	"seconds", "bytes", "ratio", "watts", "joules", "celsius", "hertz", "dollars", "info", "flops", "bytes_per_second", "tokens_per_second",
	"accepts", "attempts", "devices", "renewals", "streams", "errors", "records", "retries", "checkpoints", "tokens", "steps", "quarantines", "returns",
	"failures", "runs", "remaps", "replays", "rounds", "admissions", "assignments", "preemptions", "sends", "validations", "grants", "removed", "back",
	"reaped", "jobs", "hosts", "losses", "reports", "agents", "gpus", "settled", "intervals", "nvlinks", "reopened",
}

// bare are gauges without a unit: yes or no, a code, a measured number.
var bare = []string{
	"lorayard_agent_queue_gate_active", "lorayard_dispatcher_leader", "lorayard_gpu_busy", "lorayard_gpu_health", "lorayard_gpu_driver_wedged",
	"lorayard_gpu_row_remap_pending", "lorayard_gpu_row_remap_failed", "lorayard_gpu_recovery_action", "lorayard_job_step", "lorayard_job_loss",
}

var wrongUnit = regexp.MustCompile(`(^|_)(milli|micro|nano|kilo|mega|giga)|(^|_)(ms|us|mib|kib|gib|mb|kb|gb|mhz|ghz|percent|minutes|hours|count|number)(_|$)`)

// ours are the labels that a fleet and not a list bounds.
var ours = []string{"gpu_uuid", "class", "kind", "version", "xid", "index", "name", "pci", "driver", "cuda", "numa"}

// faults are what our own rules say of a family.
func faults(f Family) (out []string) {
	say := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	base, total := strings.CutSuffix(f.Name, "_total")
	if !regexp.MustCompile(`^lorayard_(agent|dispatcher|gpu|job|jobs|trainer|storage|queue|fleet|ledger|watch|build)_[a-z0-9_]+$`).MatchString(f.Name) {
		say("the name does not begin with lorayard_ and a room that operators know")
	}
	if wrongUnit.MatchString(base) {
		say("the name has a unit that is not a base unit")
	}
	if total != (f.Type == Counter) {
		say("a %s; only counters end in _total", f.Type)
	}
	if !slices.ContainsFunc(units, func(u string) bool { return strings.HasSuffix(base, "_"+u) }) && !slices.Contains(bare, f.Name) {
		say("the name ends in no unit")
	}
	if f.Type == Histogram && !strings.HasSuffix(base, "_seconds") {
		say("a histogram of something else than seconds")
	}
	if strings.HasSuffix(f.Name, "_timestamp_seconds") != strings.Contains(f.Name, "timestamp") {
		say("a time of the day ends in _timestamp_seconds")
	}
	if len(f.Help) < 10 || !strings.HasSuffix(f.Help, ".") {
		say("the help is no sentence")
	}
	for l, values := range f.Labels {
		live := strings.HasPrefix(f.Name, "lorayard_job_") && f.Type == Gauge
		switch {
		case (l == "job_id" || l == "attempt" || l == "base_model") && !live:
			say("label %s on what does not end with the job", l)
		case values == nil && !live && !slices.Contains(ours, l):
			say("nothing bounds label %s", l)
		case l == "le" || l == "quantile" || l == "instance" || l == "job":
			say("label %s is Prometheus' own", l)
		}
	}
	return out
}

func TestOurRulesNoticeBadNames(t *testing.T) {
	for _, c := range []struct {
		say string
		f   Family
	}{
		{"base unit", Family{Name: "lorayard_gpu_power_milliwatts", Type: Gauge, Help: "Power of it."}},
		{"base unit", Family{Name: "lorayard_gpu_clock_mhz", Type: Gauge, Help: "The clock of it."}},
		{"_total", Family{Name: "lorayard_agent_accepts", Type: Counter, Help: "Tasks received."}},
		{"_total", Family{Name: "lorayard_agent_devices_total", Type: Gauge, Help: "Devices of it."}},
		{"no unit", Family{Name: "lorayard_gpu_energy", Type: Gauge, Help: "Energy of it."}},
		{"begin", Family{Name: "queue_jobs", Type: Gauge, Help: "Jobs of the queue."}},
		{"sentence", Family{Name: "lorayard_queue_jobs", Type: Gauge, Help: "jobs"}},
		{"label job_id", Family{Name: "lorayard_trainer_steps_total", Type: Counter, Help: "Optimizer steps.", Labels: map[string][]string{"job_id": nil}}},
		{"bounds", Family{Name: "lorayard_trainer_steps_total", Type: Counter, Help: "Optimizer steps.", Labels: map[string][]string{"user": nil}}},
	} {
		if got := strings.Join(faults(c.f), "; "); !strings.Contains(got, c.say) {
			t.Errorf("%s: said %q, want something about %q", c.f.Name, got, c.say)
		}
	}
}

func series(mfs []*dto.MetricFamily) (n int) {
	for _, mf := range mfs {
		for _, m := range mf.GetMetric() {
			if h := m.GetHistogram(); h != nil {
				n += len(h.GetBucket()) + 3 // +Inf, _sum, _count
			} else if s := m.GetSummary(); s != nil {
				n += len(s.GetQuantile()) + 2
			} else {
				n++
			}
		}
	}
	return n
}

// An agent of eight devices, all of them known and busy, stays within 600
// series; what a running job adds is counted apart.
func TestAnAgentOfEightDevicesStaysWithinSixHundredSeries(t *testing.T) {
	m := full(8)
	jobs := m.jobs()
	m.ReadJobs(nil)
	idle := series(gather(t, m.set))
	m.ReadJobs(func() []Job { return jobs })
	busy := series(gather(t, m.set))
	t.Logf("%d series, and %d with eight running jobs", idle, busy)
	if idle > 600 {
		t.Errorf("%d series, 600 are allowed", idle)
	}
	if each := float64(busy-idle) / 8; each > 14 {
		t.Errorf("a running job adds %.1f series, 14 are allowed", each)
	}
	m.ReadJobs(func() []Job { return nil })
	if left := series(gather(t, m.set)); left != idle {
		t.Errorf("%d series are left when the jobs are gone, were %d", left, idle)
	}
}

func TestTimeInStatesAddsUpToTheTimeThatPassed(t *testing.T) {
	c := newStateClock()
	d := Blank()
	d.UUID = "GPU-1"
	at := time.Unix(1000, 0)
	c.tick([]Device{d}, at)
	for _, step := range []struct {
		busy   bool
		health string
		until  time.Duration
	}{{false, "ok", 5}, {true, "ok", 12}, {true, "quarantined", 14}, {false, "quarantined", 20}, {false, "foreign", 21}, {false, "suspect", 30}} {
		d.Busy, d.Health = step.busy, step.health
		c.tick([]Device{d}, at.Add(0)) // the change itself costs nothing
		at = time.Unix(1000, 0).Add(step.until * time.Second)
		c.tick([]Device{d}, at)
	}
	got := c.tick([]Device{d}, at)["GPU-1"]
	want := map[string]float64{"idle": 14, "busy": 9, "quarantined": 6, "foreign": 1, "missing": 0}
	if !maps.EqualFunc(got, want, func(a, b float64) bool { return math.Abs(a-b) < 1e-9 }) {
		t.Errorf("spent %v, want %v", got, want)
	}
}

func TestExemplarsTravelInOpenMetrics(t *testing.T) {
	m := NewDispatcher("test")
	req := httptest.NewRequest("GET", "/metrics", nil)
	req.Header.Set("Accept", "application/openmetrics-text; version=1.0.0")
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, req)
	body, _ := io.ReadAll(w.Body)
	if !strings.HasSuffix(string(body), "# EOF\n") {
		t.Error("the answer is not in OpenMetrics")
	}
}

// BenchmarkScrape is one GET of /metrics of a busy agent with eight devices.
func BenchmarkScrape(b *testing.B) {
	h := full(8).Handler()
	req := httptest.NewRequest("GET", "/metrics", nil)
	b.ReportAllocs()
	var size int
	for b.Loop() {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, req)
		size = w.Body.Len()
	}
	b.ReportMetric(float64(size), "bytes")
}
