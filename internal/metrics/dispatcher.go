package metrics

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
)

// Dispatcher holds the dispatcher's instruments.
type Dispatcher struct {
	set     *set
	streams *read

	Leader      prometheus.Gauge
	Rounds      *prometheus.CounterVec // result
	RoundSecs   prometheus.Histogram
	LastRound   prometheus.Gauge       // Unix time of the last good one
	Admitted    *prometheus.CounterVec // result
	Assigned    prometheus.Counter
	Preempted   prometheus.Counter
	Sends       *prometheus.CounterVec // result
	Grants      *prometheus.CounterVec // result
	Validated   *prometheus.CounterVec // result
	Removed     prometheus.Counter     // objects of Storage that nobody needed
	TakenBack   prometheus.Counter
	Reaped      prometheus.Counter
	Jobs        *prometheus.GaugeVec // state: queued, assigned, accepted
	HostsTaking prometheus.Gauge
	Lost        prometheus.Counter     // presence streams that ended and did not come back
	Deaths      *prometheus.CounterVec // result

	// What the queue holds, by the class that a job may land on first and by why
	// it waits.
	Waiting   *prometheus.GaugeVec // class, reason: jobs
	OldestAge *prometheus.GaugeVec // class: seconds

	// What the leader reads in the database, every few seconds.
	Agents     *prometheus.GaugeVec     // state
	GPUs       *prometheus.GaugeVec     // class, state
	GPUSeconds *prometheus.CounterVec   // class, state
	Attempts   *prometheus.CounterVec   // outcome, kind
	Settled    *prometheus.CounterVec   // status
	HandOver   prometheus.Histogram     // seconds from assigned to accepted
	Wait       *prometheus.HistogramVec // class: seconds from admitted to the first assignment
	Recovery   *prometheus.HistogramVec // kind: seconds from the end of a failed attempt to the accept of the next
	WatchLast  prometheus.Gauge         // Unix time

	LedgerDrift   prometheus.Gauge // dollars
	LedgerOpen    prometheus.Gauge // intervals
	LedgerStray   prometheus.Gauge // intervals
	LedgerChecked prometheus.Gauge // Unix time
}

var (
	gpuClass   = label("class")
	waitReason = []string{"no_devices", "promised", "quota", "behind_own", "nowhere", "paused"}
	fleetState = []string{"busy", "idle", "idle_with_queue", "unfit"}
)

// NewDispatcher registers the dispatcher's instruments.
func NewDispatcher(version string) *Dispatcher {
	s := newSet("dispatcher", version)
	m := &Dispatcher{set: s}
	result := func(values ...string) dimension { return label("result", values...) }
	m.Leader = s.gauge("lorayard_dispatcher_leader", "1 while this process leads.")
	m.Rounds = s.counterVec("lorayard_dispatcher_rounds_total", "Rounds of admit, place, assign, reap, by result.", result("ok", "error"))
	m.RoundSecs = s.histogram("lorayard_dispatcher_round_seconds", "Time that one round took.", moments)
	m.LastRound = s.gauge("lorayard_dispatcher_last_round_timestamp_seconds", "When a round was last finished without an error.")
	m.Admitted = s.counterVec("lorayard_dispatcher_admissions_total", "Rows looked at, by result.", result("admitted", "refused"))
	m.Assigned = s.counter("lorayard_dispatcher_assignments_total", "Attempts assigned.")
	m.Preempted = s.counter("lorayard_dispatcher_preemptions_total", "Attempts asked to make room for a job of higher priority.")
	m.Sends = s.counterVec("lorayard_dispatcher_sends_total", "Tasks sent to agents, by result.", result("ok", "error"))
	m.Validated = s.counterVec("lorayard_dispatcher_validations_total", "Validations of data sets, by result.", result("ready", "error", "postponed", "unwanted"))
	m.Grants = s.counterVec("lorayard_dispatcher_grants_total", "Signed URLs and upload tokens for agents, by result.", result("granted", "refused", "error"))
	m.Removed = s.counter("lorayard_dispatcher_objects_removed_total", "Objects removed from Storage because nobody needed them.")
	m.TakenBack = s.counter("lorayard_dispatcher_taken_back_total", "Assignments that no agent accepted in time.")
	m.Reaped = s.counter("lorayard_dispatcher_reaped_total", "Attempts lost with their agent.")
	m.Jobs = s.gaugeVec("lorayard_dispatcher_jobs", "Jobs that are not settled, by control state.", label("state", "queued", "assigned", "accepted"))
	m.HostsTaking = s.gauge("lorayard_dispatcher_hosts", "Hosts that take work.")
	m.streams = s.gaugeRead("lorayard_dispatcher_presence_streams", "Agents that have a presence stream to this process.")
	m.Lost = s.counter("lorayard_dispatcher_presence_losses_total", "Presence streams that ended and did not come back in time.")
	m.Deaths = s.counterVec("lorayard_dispatcher_death_reports_total", "Reports of shims that their agent died, by result.", result("believed", "refused", "error"))

	m.Waiting = s.gaugeVec("lorayard_queue_jobs", "Jobs that take part in the queue, by the first class that they may land on and by why they wait.", gpuClass, label("reason", waitReason...))
	m.OldestAge = s.gaugeVec("lorayard_queue_oldest_age_seconds", "How long the oldest of them waits since it was admitted.", gpuClass)

	m.Agents = s.gaugeVec("lorayard_fleet_agents", "Agents that are registered, by state; lost: the lease ran out and nobody took the agent off the list.", label("state", "taking", "closed", "lost"))
	m.GPUs = s.gaugeVec("lorayard_fleet_gpus", "Devices of agents that hold their lease, by class and state; idle_with_queue: idle while a job waits that may land on the class.", gpuClass, label("state", fleetState...))
	m.GPUSeconds = s.counterVec("lorayard_fleet_gpu_seconds_total", "Time of devices, by class and state.", gpuClass, label("state", fleetState...))
	m.Attempts = s.counterVec("lorayard_job_attempts_total", "Attempts ended, by outcome and kind of failure, as the database knows them.", label("outcome", outcomes...), label("kind", failureKinds...))
	for _, kind := range failureKinds[1:] { // a rate must see the first of each
		m.Attempts.WithLabelValues("failed", kind)
	}
	for _, end := range [][2]string{{"completed", ""}, {"cancelled", "cancelled"}, {"handed_back", "preempted"}, {"lost", "agent_lost"}, {"not_accepted", "not_accepted"}} {
		m.Attempts.WithLabelValues(end[0], end[1])
	}
	m.Settled = s.counterVec("lorayard_jobs_settled_total", "Jobs that came to their end, by status; failed_infra: given up for what was not the job's doing.", label("status", "completed", "failed", "failed_infra", "cancelled"))
	m.HandOver = s.histogram("lorayard_job_handover_seconds", "From the assignment of an attempt to its accept.", hops)
	m.Wait = s.histogramVec("lorayard_job_wait_seconds", "From the admission of a job to its first assignment.", waits, gpuClass)
	m.Recovery = s.histogramVec("lorayard_job_recovery_seconds", "From the end of an attempt that infrastructure failed to the accept of the next one.", cures, label("kind"))
	for _, kind := range []string{"agent_lost", "gpu_fault", "storage_unavailable", "disk_full"} {
		m.Recovery.WithLabelValues(kind)
	}
	m.WatchLast = s.gauge("lorayard_watch_last_success_timestamp_seconds", "When the leader last read fleet and attempts in the database; 0 on a standby.")

	m.LedgerDrift = s.gauge("lorayard_ledger_drift_dollars", "Cost records of settled jobs minus the rate times their billable time, summed without signs over jobs whose difference is not rounding.")
	m.LedgerOpen = s.gauge("lorayard_ledger_open_intervals", "Usage intervals that are being written.")
	m.LedgerStray = s.gauge("lorayard_ledger_stray_intervals", "Usage intervals that are open though no attempt holds the device.")
	m.LedgerChecked = s.gauge("lorayard_ledger_last_check_timestamp_seconds", "When the ledger was last checked.")
	return m
}

// ObserveHandOver measures one, with the trace of its job where there is one.
func (m *Dispatcher) ObserveHandOver(seconds float64, traceID string) {
	if with, can := m.HandOver.(prometheus.ExemplarObserver); can && traceID != "" {
		with.ObserveWithExemplar(seconds, prometheus.Labels{"trace_id": traceID})
		return
	}
	m.HandOver.Observe(seconds)
}

// ReadStreams says how many agents have a presence stream to this process. It is
// called at each scrape.
func (m *Dispatcher) ReadStreams(from func() int) { m.streams.from.Store(&from) }

// Handler serves the dispatcher's metrics.
func (m *Dispatcher) Handler() http.Handler { return m.set.handler() }
