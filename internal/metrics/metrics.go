// Package metrics is the contract with the dashboards and the alerts: every
// metric name of the house stands in this room and nowhere else, with its help,
// its labels and what they may say.
//
// No job is ever a label of a counter or a histogram: such series would be for
// ever. What is running now is told by gauges that are made at each scrape from
// the agent's own table, and are gone with the job. History is in Postgres.
package metrics

import (
	"cmp"
	"maps"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Type is what a family is, in Prometheus' words.
type Type string

// The types.
const (
	Counter   Type = "counter"
	Gauge     Type = "gauge"
	Histogram Type = "histogram"
)

// Family describes one metric name.
type Family struct {
	Name, Help string
	Type       Type
	// Labels are its labels with what each may say; nil: a set that only the
	// fleet bounds, such as its devices.
	Labels map[string][]string
}

// Catalog lists every family of agents and dispatchers, by name.
func Catalog() []Family {
	all := map[string]Family{}
	maps.Copy(all, NewAgent("").set.families)
	maps.Copy(all, NewDispatcher("").set.families)
	return slices.SortedFunc(maps.Values(all), func(a, b Family) int { return cmp.Compare(a.Name, b.Name) })
}

// set is a registry that remembers what it was told to hold.
type set struct {
	reg      *prometheus.Registry
	families map[string]Family
}

func newSet(component, version string) *set {
	s := &set{reg: prometheus.NewRegistry(), families: map[string]Family{}}
	// The runtime's memory statistics are 25 series that nobody draws; pprof has
	// them on the ops port.
	s.reg.MustRegister(collectors.NewGoCollector(collectors.WithGoCollectorMemStatsMetricsDisabled()), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	info := s.gaugeVec("lorayard_build_info", "1, with the version of the process.", label("component", "agent", "dispatcher"), label("version"))
	info.WithLabelValues(component, version).Set(1)
	return s
}

func (s *set) handler() http.Handler {
	// Exemplars travel in OpenMetrics only.
	return promhttp.HandlerFor(s.reg, promhttp.HandlerOpts{EnableOpenMetrics: true})
}

// dimension is a label and what it may say.
type dimension struct {
	name   string
	values []string
}

func label(name string, values ...string) dimension { return dimension{name, values} }

func (s *set) note(t Type, name, help string, ls []dimension) (names []string) {
	f := Family{Name: name, Help: help, Type: t, Labels: map[string][]string{}}
	for _, l := range ls {
		names = append(names, l.name)
		f.Labels[l.name] = l.values
	}
	s.families[name] = f
	return names
}

// begin makes the series of a family with one closed label, so that a rate sees
// the first event of each.
func begin(ls []dimension, with func(string)) {
	if len(ls) != 1 {
		return
	}
	for _, v := range ls[0].values {
		with(v)
	}
}

func (s *set) counter(name, help string) prometheus.Counter {
	s.note(Counter, name, help, nil)
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	s.reg.MustRegister(c)
	return c
}

func (s *set) counterVec(name, help string, ls ...dimension) *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, s.note(Counter, name, help, ls))
	s.reg.MustRegister(c)
	begin(ls, func(v string) { c.WithLabelValues(v) })
	return c
}

func (s *set) gauge(name, help string) prometheus.Gauge {
	s.note(Gauge, name, help, nil)
	g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	s.reg.MustRegister(g)
	return g
}

// read is a gauge that is asked for at each scrape; 0 while nobody can say.
type read struct{ from atomic.Pointer[func() int] }

func (s *set) gaugeRead(name, help string) *read {
	s.note(Gauge, name, help, nil)
	r := &read{}
	s.reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 {
		if from := r.from.Load(); from != nil {
			return float64((*from)())
		}
		return 0
	}))
	return r
}

func (s *set) gaugeVec(name, help string, ls ...dimension) *prometheus.GaugeVec {
	g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, s.note(Gauge, name, help, ls))
	s.reg.MustRegister(g) // what nobody has set yet is not known: a time of 0 would be an alarm
	return g
}

// A histogram is native, where Prometheus reads such ones, and has a few
// classic buckets for one that does not and for the objectives of alerts.
func histogramOpts(name, help string, buckets []float64) prometheus.HistogramOpts {
	return prometheus.HistogramOpts{
		Name: name, Help: help, Buckets: buckets,
		NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 160, NativeHistogramMinResetDuration: time.Hour,
	}
}

func (s *set) histogram(name, help string, buckets []float64) prometheus.Histogram {
	s.note(Histogram, name, help, nil)
	h := prometheus.NewHistogram(histogramOpts(name, help, buckets))
	s.reg.MustRegister(h)
	return h
}

func (s *set) histogramVec(name, help string, buckets []float64, ls ...dimension) *prometheus.HistogramVec {
	h := prometheus.NewHistogramVec(histogramOpts(name, help, buckets), s.note(Histogram, name, help, ls))
	s.reg.MustRegister(h)
	begin(ls, func(v string) { h.WithLabelValues(v) })
	return h
}

// desc is a family whose series are made at each scrape.
func (s *set) desc(t Type, name, help string, ls ...dimension) *prometheus.Desc {
	return prometheus.NewDesc(name, help, s.note(t, name, help, ls), nil)
}

// Buckets, in seconds.
var (
	moments = []float64{.01, .05, .25, 1, 5}                     // of a call
	stages  = []float64{1, 15, 120, 1800, 14400}                 // of an attempt's stage
	waits   = []float64{1, 10, 60, 300, 1800, 7200, 43200}       // of a job in the queue
	hops    = []float64{.005, .01, .025, .05, .1, .25, .5, 1, 5} // of a hand-over
	cures   = []float64{1, 5, 15, 30, 60, 120, 300, 900}         // from a fault to the next attempt
	kills   = []float64{.001, .005, .01, .05, .25, 1}            // from a fault to the end of a process group
	polls   = []float64{.0003, .001, .01, .1, 1, 10}             // of the GPU driver
	steps   = []float64{.1, .5, 1, 5, 20}                        // of the trainer
)
