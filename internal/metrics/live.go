package metrics

import (
	"math"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Job is an attempt under way. Its series exist while it runs: as many as it
// has devices, and seven.
type Job struct {
	ID        string
	Attempt   int
	Devices   []string // UUIDs
	Class     string   // of the devices
	BaseModel string
	Stage     string

	Step, Steps     int       // done, and of all
	Loss            float64   // NaN: none yet
	TokensPerSecond float64   // NaN: none yet
	Saved           time.Time // of the newest checkpoint in Storage; zero: none yet
	Started         time.Time

	SpoolRecords int       // samples and lines that are not in Postgres yet
	SpoolBytes   int64     // of them
	SpoolOldest  time.Time // since when the oldest of them waits; zero: none waits
}

// live turns the attempts under way into series at each scrape.
type live struct {
	from  func() []Job
	descs []*prometheus.Desc

	info, step, steps, loss, speed, saved *prometheus.Desc
	tokens, records, bytes, oldest        *prometheus.Desc
}

func newLive(s *set, from func() []Job) *live {
	l := &live{from: from}
	add := func(name, help string, ls ...dimension) *prometheus.Desc {
		d := s.desc(Gauge, name, help, ls...)
		l.descs = append(l.descs, d)
		return d
	}
	job, attempt := label("job_id"), label("attempt") // "job" is Prometheus' own word
	l.info = add("lorayard_job_info", "1 while the attempt runs, for each of its devices: joins a device's series with its job.", job, attempt, gpuUUID, label("class"), label("base_model"), label("stage", attemptStage...))
	l.step = add("lorayard_job_step", "Optimizer steps done.", job, attempt)
	l.steps = add("lorayard_job_steps", "Optimizer steps of the whole job.", job, attempt)
	l.loss = add("lorayard_job_loss", "Training loss of the last step, in nats a token.", job, attempt)
	l.speed = add("lorayard_job_tokens_per_second", "Training throughput.", job, attempt)
	l.saved = add("lorayard_job_checkpoint_age_seconds", "Age of the newest checkpoint in Storage; of the attempt while there is none.", job, attempt)
	l.tokens = add("lorayard_agent_trainer_tokens_per_second", "Training throughput, summed over running attempts.")
	l.records = add("lorayard_agent_spool_records", "Samples and lines that are not in Postgres yet.")
	l.bytes = add("lorayard_agent_spool_bytes", "Bytes of them on the disk.")
	l.oldest = add("lorayard_agent_spool_oldest_age_seconds", "How long the oldest of them waits.")
	return l
}

// Describe is of prometheus.Collector.
func (l *live) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range l.descs {
		ch <- d
	}
}

// Collect is of prometheus.Collector.
func (l *live) Collect(ch chan<- prometheus.Metric) {
	put := func(desc *prometheus.Desc, v float64, ls ...string) {
		if !math.IsNaN(v) {
			ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, v, ls...)
		}
	}
	now := time.Now()
	var tokens, records, bytes, oldest float64
	for _, j := range l.from() {
		id, attempt := j.ID, strconv.Itoa(j.Attempt)
		for _, d := range j.Devices {
			put(l.info, 1, id, attempt, d, j.Class, j.BaseModel, j.Stage)
		}
		put(l.step, float64(j.Step), id, attempt)
		put(l.steps, float64(j.Steps), id, attempt)
		put(l.loss, j.Loss, id, attempt)
		put(l.speed, j.TokensPerSecond, id, attempt)
		since := j.Saved
		if since.IsZero() {
			since = j.Started
		}
		put(l.saved, now.Sub(since).Seconds(), id, attempt)
		if !math.IsNaN(j.TokensPerSecond) {
			tokens += j.TokensPerSecond
		}
		records += float64(j.SpoolRecords)
		bytes += float64(j.SpoolBytes)
		if !j.SpoolOldest.IsZero() {
			oldest = max(oldest, now.Sub(j.SpoolOldest).Seconds())
		}
	}
	put(l.tokens, tokens)
	put(l.records, records)
	put(l.bytes, bytes)
	put(l.oldest, oldest)
}
