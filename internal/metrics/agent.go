package metrics

import (
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Agent holds the agent's instruments.
type Agent struct {
	set *set

	Accepts      *prometheus.CounterVec   // result
	Attempts     *prometheus.CounterVec   // outcome, kind
	Running      prometheus.Gauge         // attempts under way
	Devices      *prometheus.GaugeVec     // state
	StageSeconds *prometheus.HistogramVec // stage
	GPUSeconds   *prometheus.CounterVec   // use: what GPU time was good for

	Renewals     *prometheus.CounterVec // result
	RenewSeconds prometheus.Histogram   // of one renewal
	LastRenewal  prometheus.Gauge       // Unix time
	Skew         prometheus.Gauge       // seconds, the database's clock minus this host's
	QueueGate    prometheus.Gauge       // 1: tasks come by wake-up; 0: by polling, or Redis was never there

	SinkErrors    prometheus.Counter   // batches that the database did not take
	SinkSeconds   prometheus.Histogram // of one batch
	DroppedValues prometheus.Counter   // records refused by the database one by one

	StorageSeconds *prometheus.HistogramVec // op
	StorageBytes   *prometheus.CounterVec   // direction
	StorageRetries *prometheus.CounterVec   // op
	StorageErrors  *prometheus.CounterVec   // op
	Checkpoints    *prometheus.CounterVec   // result

	Tokens      prometheus.Counter   // trained on
	Steps       prometheus.Counter   // optimizer steps
	StepSeconds prometheus.Histogram // of one of them
	Skipped     prometheus.Counter   // steps without a finite loss or gradient

	GPU

	mu      sync.Mutex
	devices func() []Device
	jobs    func() []Job
	clock   *stateClock
	streams *read
}

// GPU holds the instruments of those who watch the devices.
type GPU struct {
	XIDs           *prometheus.CounterVec   // gpu_uuid, xid, class, source
	XIDLast        *prometheus.GaugeVec     // gpu_uuid, xid, class: Unix time
	Quarantines    *prometheus.CounterVec   // gpu_uuid, reason
	Returns        *prometheus.CounterVec   // gpu_uuid
	KillSeconds    prometheus.Histogram     // from a fault to the end of the trainer's process group
	PollSeconds    *prometheus.HistogramVec // tier
	PollFailures   *prometheus.CounterVec   // tier
	PollLast       *prometheus.GaugeVec     // tier: Unix time
	Wedged         prometheus.Gauge         // 1 while a call of the driver does not come back
	Reopened       prometheus.Counter       // how often all handles were made anew
	SanityRuns     *prometheus.CounterVec   // result
	SanityFailures *prometheus.CounterVec   // gpu_uuid, check
	SanityFlops    *prometheus.GaugeVec     // gpu_uuid: floating-point operations a second
	SanityCopy     *prometheus.GaugeVec     // gpu_uuid: bytes a second
	SanityLast     *prometheus.GaugeVec     // gpu_uuid: Unix time of the last good one
}

// What labels may say.
var (
	failureKinds = []string{
		"", "spec_invalid", "plan_invalid", "dataset_invalid", "dataset_missing", "input_missing", "model_missing", "device_unavailable", "gpu_fault",
		"out_of_memory", "diverged", "hang", "disk_full", "trainer_crashed", "protocol", "storage_unavailable", "preempted", "lease_lost", "agent_lost",
		"not_accepted", "cancelled", "internal",
	}
	outcomes     = []string{"completed", "failed", "cancelled", "handed_back", "lost", "not_accepted"}
	attemptStage = []string{"downloading", "preparing", "loading_model", "training", "validating", "saving", "uploading"}
	xidClasses   = []string{"app", "contained", "reset", "reboot", "nvlink", "info", "unknown"}
	tiers        = []string{"hot", "warm", "cold"}
	gpuUUID      = label("gpu_uuid")
)

// NewAgent registers the agent's instruments.
func NewAgent(version string) *Agent {
	s := newSet("agent", version)
	m := &Agent{set: s}
	m.Accepts = s.counterVec("lorayard_agent_accepts_total", "Tasks received, by what came of them.", label("result", "accepted", "stale", "refused", "error"))
	m.Attempts = s.counterVec("lorayard_agent_attempts_total", "Attempts ended, by outcome and kind of failure.", label("outcome", outcomes...), label("kind", failureKinds...))
	for _, end := range [][2]string{{"completed", ""}, {"cancelled", "cancelled"}, {"handed_back", "preempted"}, {"failed", "gpu_fault"}, {"lost", "lease_lost"}} {
		m.Attempts.WithLabelValues(end[0], end[1]) // a rate must see the first of those that are usual
	}
	m.Running = s.gauge("lorayard_agent_running_attempts", "Attempts under way on this host.")
	m.Devices = s.gaugeVec("lorayard_agent_devices", "Devices of this host, by state.", label("state", "free", "reserved", "unfit"))
	m.StageSeconds = s.histogramVec("lorayard_agent_stage_seconds", "Time that attempts spent in a stage.", stages, label("stage", attemptStage...))
	m.GPUSeconds = s.counterVec("lorayard_agent_gpu_seconds_total", "GPU time of ended attempts: useful is training that a checkpoint or an adapter kept, wasted is training that was lost, overhead is all else.",
		label("use", "useful", "wasted", "overhead"))

	m.Renewals = s.counterVec("lorayard_agent_renewals_total", "Renewals of the agent's lease, by result.", label("result", "ok", "error"))
	m.RenewSeconds = s.histogram("lorayard_agent_renewal_seconds", "Time that one renewal took.", moments)
	m.LastRenewal = s.gauge("lorayard_agent_last_renewal_timestamp_seconds", "When the last renewal that was answered was sent.")
	m.Skew = s.gauge("lorayard_agent_clock_skew_seconds", "The database's clock minus this host's, as measured at the last accept.")
	m.streams = s.gaugeRead("lorayard_agent_presence_streams", "Dispatchers that have this agent's presence stream.")
	m.QueueGate = s.gauge("lorayard_agent_queue_gate_active", "1 while tasks come by wake-up; 0 while Redis is polled, because Asynq changed, or was not reached yet.")

	m.SinkErrors = s.counter("lorayard_agent_sink_errors_total", "Batches that could not be written; they are tried again.")
	m.SinkSeconds = s.histogram("lorayard_agent_sink_seconds", "Time that one batch of samples and lines took to be written.", moments)
	m.DroppedValues = s.counter("lorayard_agent_dropped_records_total", "Records that the database refused for their values.")

	op := label("op", "upload", "download")
	m.StorageSeconds = s.histogramVec("lorayard_storage_transfer_seconds", "Time that one file took to or from Storage, with all its tries.", stages, op)
	m.StorageBytes = s.counterVec("lorayard_storage_transferred_bytes_total", "Bytes of files carried to or from Storage.", label("direction", "upload", "download"))
	m.StorageRetries = s.counterVec("lorayard_storage_retries_total", "Calls of Storage that failed and were tried again.", op)
	m.StorageErrors = s.counterVec("lorayard_storage_errors_total", "Files that were given up.", op)
	m.Checkpoints = s.counterVec("lorayard_agent_checkpoints_total", "Checkpoints that trainers wrote, by what came of them.", label("result", "published", "failed"))

	m.Tokens = s.counter("lorayard_trainer_tokens_total", "Tokens trained on, steps that a later attempt does again included.")
	m.Steps = s.counter("lorayard_trainer_steps_total", "Optimizer steps.")
	m.StepSeconds = s.histogram("lorayard_trainer_step_seconds", "Time that one optimizer step took.", steps)
	m.Skipped = s.counter("lorayard_trainer_skipped_steps_total", "Steps whose loss or gradient was not finite; they change nothing.")

	m.GPU = newGPU(s)
	m.clock = newStateClock()
	s.reg.MustRegister(newReadings(s, m.now), newLive(s, m.running))
	return m
}

func newGPU(s *set) (m GPU) {
	m.XIDs = s.counterVec("lorayard_gpu_xid_errors_total", "Faults that the driver reported, by number, class and who saw them first.",
		gpuUUID, label("xid"), label("class", xidClasses...), label("source", "event", "kernel_log", "poll"))
	m.XIDLast = s.gaugeVec("lorayard_gpu_xid_last_timestamp_seconds", "When the device last reported this fault. An alert sees the first one, which a rate does not.",
		gpuUUID, label("xid"), label("class", xidClasses...))
	m.Quarantines = s.counterVec("lorayard_gpu_quarantines_total", "How often the device was taken out of use, by reason.", gpuUUID,
		label("reason", "xid", "lost", "ecc", "row_remap", "recovery_action", "sanity", "suspect_repeated"))
	m.Returns = s.counterVec("lorayard_gpu_returns_total", "How often the device came back into use.", gpuUUID)
	m.KillSeconds = s.histogram("lorayard_gpu_fault_kill_seconds", "From a fault that ends an attempt to the end of its process group.", kills)
	m.PollSeconds = s.histogramVec("lorayard_gpu_poll_seconds", "Time that one poll of all devices took.", polls, label("tier", tiers...))
	m.PollFailures = s.counterVec("lorayard_gpu_poll_failures_total", "Polls that gave no or not all readings.", label("tier", tiers...))
	m.PollLast = s.gaugeVec("lorayard_gpu_poll_last_success_timestamp_seconds", "When a poll last gave all readings.", label("tier", tiers...))
	m.Wedged = s.gauge("lorayard_gpu_driver_wedged", "1 while a call of the driver does not come back.")
	m.Reopened = s.counter("lorayard_gpu_driver_reopened_total", "How often the driver was opened anew, after a reload or a lost device.")
	m.SanityRuns = s.counterVec("lorayard_gpu_sanity_runs_total", "Sanity checks before training, by result.", label("result", "ok", "failed"))
	m.SanityFailures = s.counterVec("lorayard_gpu_sanity_failures_total", "Sanity checks that the device did not pass, by check.", gpuUUID, label("check", "product", "repeat", "copy", "speed"))
	m.SanityFlops = s.gaugeVec("lorayard_gpu_sanity_flops", "Floating-point operations a second at the last sanity check.", gpuUUID)
	m.SanityCopy = s.gaugeVec("lorayard_gpu_sanity_copy_bytes_per_second", "Bytes a second copied on the device at the last sanity check.", gpuUUID)
	m.SanityLast = s.gaugeVec("lorayard_gpu_sanity_last_success_timestamp_seconds", "When the device last passed its sanity check.", gpuUUID)
	return m
}

// Handler serves the agent's metrics.
func (m *Agent) Handler() http.Handler { return m.set.handler() }

// Retried counts a call of Storage that is tried again; what is neither an
// upload nor a download is not an agent's to make.
func (m *Agent) Retried(op string) {
	if op == "upload" || op == "download" {
		m.StorageRetries.WithLabelValues(op).Inc()
	}
}

// ReadDevices says where the newest readings of the devices are. It is called at
// each scrape and must not wait for a driver.
func (m *Agent) ReadDevices(from func() []Device) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.devices = from
}

// ReadJobs says what attempts are under way, likewise.
func (m *Agent) ReadJobs(from func() []Job) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.jobs = from
}

// ReadStreams says how many dispatchers have this agent's presence stream,
// likewise.
func (m *Agent) ReadStreams(from func() int) { m.streams.from.Store(&from) }

// Tick charges the time since the last tick to the states that the devices were
// in. It is to be called when one of them changes its state; each scrape does it
// as well.
func (m *Agent) Tick() { m.now() }

func (m *Agent) now() ([]Device, map[string]map[string]float64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.devices == nil {
		return nil, nil
	}
	ds := m.devices()
	return ds, m.clock.tick(ds, time.Now())
}

func (m *Agent) running() []Job {
	m.mu.Lock()
	from := m.jobs
	m.mu.Unlock()
	if from == nil {
		return nil
	}
	return from()
}
