// Package metrics is the contract with the dashboards: every metric name of
// the house stands in this file and nowhere else. No job id is ever a label.
package metrics

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Agent holds the agent's instruments.
type Agent struct {
	reg *prometheus.Registry

	Accepts       *prometheus.CounterVec   // result: accepted, stale, refused, error
	Attempts      *prometheus.CounterVec   // outcome, kind
	Running       prometheus.Gauge         // attempts under way
	Devices       *prometheus.GaugeVec     // state: free, reserved, unfit
	Renewals      *prometheus.CounterVec   // result: ok, error
	RenewSeconds  prometheus.Histogram     // seconds of one renewal
	SpoolRecords  prometheus.Gauge         // records that are not in Postgres yet
	SinkErrors    prometheus.Counter       // batches that the database did not take
	DroppedValues prometheus.Counter       // records refused by the database one by one
	UploadBytes   prometheus.Counter       // bytes put into Storage
	StageSeconds  *prometheus.HistogramVec // stage: seconds an attempt spent in it
	TokensPerSec  prometheus.Gauge         // sum over running attempts
	QueueGate     prometheus.Gauge         // 1: tasks come by wake-up; 0: by polling, or Redis was never there
}

// Dispatcher holds the dispatcher's instruments.
type Dispatcher struct {
	reg *prometheus.Registry

	Leader      prometheus.Gauge
	Rounds      *prometheus.CounterVec // result: ok, error
	RoundSecs   prometheus.Histogram
	Admitted    *prometheus.CounterVec // result: admitted, refused
	Assigned    prometheus.Counter
	Preempted   prometheus.Counter
	Sends       *prometheus.CounterVec // result: ok, error
	Grants      *prometheus.CounterVec // result: granted, refused, error
	Validated   *prometheus.CounterVec // result: ready, error, postponed, unwanted
	Removed     prometheus.Counter     // objects of Storage that nobody needed
	TakenBack   prometheus.Counter
	Reaped      prometheus.Counter
	Jobs        *prometheus.GaugeVec // state: queued, assigned, accepted
	HostsTaking prometheus.Gauge
}

var moments = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}

// NewAgent registers the agent's instruments.
func NewAgent() *Agent {
	m := &Agent{reg: newRegistry()}
	m.Accepts = counterVec(m.reg, "lorayard_agent_accepts_total", "Tasks received, by what came of them.", "result")
	m.Attempts = counterVec(m.reg, "lorayard_agent_attempts_total", "Attempts ended, by outcome and kind of failure.", "outcome", "kind")
	m.Running = gauge(m.reg, "lorayard_agent_running_attempts", "Attempts under way on this host.")
	m.Devices = gaugeVec(m.reg, "lorayard_agent_devices", "Devices of this host, by state.", "state")
	m.Renewals = counterVec(m.reg, "lorayard_agent_renewals_total", "Renewals of the agent's lease, by result.", "result")
	m.RenewSeconds = histogram(m.reg, "lorayard_agent_renewal_seconds", "Time that one renewal took.", moments)
	m.SpoolRecords = gauge(m.reg, "lorayard_agent_spool_records", "Samples and lines that are not in Postgres yet.")
	m.SinkErrors = counter(m.reg, "lorayard_agent_sink_errors_total", "Batches that could not be written; they are tried again.")
	m.DroppedValues = counter(m.reg, "lorayard_agent_dropped_records_total", "Records that the database refused for their values.")
	m.UploadBytes = counter(m.reg, "lorayard_agent_upload_bytes_total", "Bytes put into Storage.")
	m.StageSeconds = histogramVec(m.reg, "lorayard_agent_stage_seconds", "Time that attempts spent in a stage.", []float64{.1, .5, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400}, "stage")
	m.TokensPerSec = gauge(m.reg, "lorayard_agent_trainer_tokens_per_second", "Training throughput, summed over running attempts.")
	m.QueueGate = gauge(m.reg, "lorayard_agent_queue_gate_active", "1 while tasks come by wake-up; 0 while Redis is polled, because Asynq changed, or was not reached yet.")
	return m
}

// NewDispatcher registers the dispatcher's instruments.
func NewDispatcher() *Dispatcher {
	m := &Dispatcher{reg: newRegistry()}
	m.Leader = gauge(m.reg, "lorayard_dispatcher_leader", "1 while this process leads.")
	m.Rounds = counterVec(m.reg, "lorayard_dispatcher_rounds_total", "Rounds of admit, place, assign, reap, by result.", "result")
	m.RoundSecs = histogram(m.reg, "lorayard_dispatcher_round_seconds", "Time that one round took.", moments)
	m.Admitted = counterVec(m.reg, "lorayard_dispatcher_admissions_total", "Rows looked at, by result.", "result")
	m.Assigned = counter(m.reg, "lorayard_dispatcher_assignments_total", "Attempts assigned.")
	m.Preempted = counter(m.reg, "lorayard_dispatcher_preemptions_total", "Attempts asked to make room for a job of higher priority.")
	m.Sends = counterVec(m.reg, "lorayard_dispatcher_sends_total", "Tasks sent to agents, by result.", "result")
	m.Validated = counterVec(m.reg, "lorayard_dispatcher_validations_total", "Validations of data sets, by result.", "result")
	m.Grants = counterVec(m.reg, "lorayard_dispatcher_grants_total", "Signed URLs and upload tokens for agents, by result.", "result")
	m.Removed = counter(m.reg, "lorayard_dispatcher_objects_removed_total", "Objects removed from Storage because nobody needed them.")
	m.TakenBack = counter(m.reg, "lorayard_dispatcher_taken_back_total", "Assignments that no agent accepted in time.")
	m.Reaped = counter(m.reg, "lorayard_dispatcher_reaped_total", "Attempts lost with their agent.")
	m.Jobs = gaugeVec(m.reg, "lorayard_dispatcher_jobs", "Jobs that are not settled, by control state.", "state")
	m.HostsTaking = gauge(m.reg, "lorayard_dispatcher_hosts", "Hosts that take work.")
	return m
}

// Handler serves the agent's metrics.
func (m *Agent) Handler() http.Handler { return promhttp.HandlerFor(m.reg, promhttp.HandlerOpts{}) }

// Handler serves the dispatcher's metrics.
func (m *Dispatcher) Handler() http.Handler {
	return promhttp.HandlerFor(m.reg, promhttp.HandlerOpts{})
}

func newRegistry() *prometheus.Registry {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return reg
}

func counter(r *prometheus.Registry, name, help string) prometheus.Counter {
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	r.MustRegister(c)
	return c
}

func counterVec(r *prometheus.Registry, name, help string, labels ...string) *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	r.MustRegister(c)
	return c
}

func gauge(r *prometheus.Registry, name, help string) prometheus.Gauge {
	g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	r.MustRegister(g)
	return g
}

func gaugeVec(r *prometheus.Registry, name, help string, labels ...string) *prometheus.GaugeVec {
	g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	r.MustRegister(g)
	return g
}

func histogram(r *prometheus.Registry, name, help string, buckets []float64) prometheus.Histogram {
	h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets})
	r.MustRegister(h)
	return h
}

func histogramVec(r *prometheus.Registry, name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
	r.MustRegister(h)
	return h
}
