// Package dispatch turns rows into accepted attempts and takes back what was
// lost: admit → settle cancels → take back → reap → place → assign → send.
// Only the leader does it. Every step is one idempotent statement, so a leader
// that wakes up late, or two of them, do no harm.
package dispatch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/place"
	"lorayard/internal/queue"
	"lorayard/internal/store"
)

// Config holds what an operator may turn.
type Config struct {
	Policy   job.Policy
	Poll     time.Duration // catch-up round when nothing wakes us
	Resend   time.Duration // an attempt that is not accepted is sent again after
	Accept   time.Duration // and goes back to the queue after
	Lease    time.Duration // an agent's lease, to wait out after an outage of the database
	Patience time.Duration // beyond the end of a silent agent's lease
}

// Dispatcher moves jobs from rows to agents.
type Dispatcher struct {
	Store   *store.Store
	Queue   *queue.Client
	Metrics *metrics.Dispatcher
	Log     *slog.Logger
	Config  Config

	wake chan struct{}
	// judgeFrom is when the reaper may judge again: the database was away
	// before, and no agent could renew.
	judgeFrom time.Time
}

// New puts a dispatcher together.
func New(s *store.Store, q *queue.Client, m *metrics.Dispatcher, log *slog.Logger, c Config) *Dispatcher {
	return &Dispatcher{Store: s, Queue: q, Metrics: m, Log: log, Config: c, wake: make(chan struct{}, 1)}
}

// Run leads whenever it can, until ctx ends; otherwise it stands by.
func (d *Dispatcher) Run(ctx context.Context) error {
	for ctx.Err() == nil {
		led, err := d.Store.Lead(ctx, d.lead)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			d.Log.WarnContext(ctx, "not leading", "err", err)
		case !led:
			d.Log.DebugContext(ctx, "another dispatcher leads")
		}
		d.Metrics.Leader.Set(0)
		pause(ctx, time.Second)
	}
	return nil
}

// lead runs rounds until ctx ends: at once when something wakes it, else every
// Poll.
func (d *Dispatcher) lead(ctx context.Context) error {
	d.Log.InfoContext(ctx, "leading")
	d.Metrics.Leader.Set(1)
	// What happened before this process led is unknown, and agents may have
	// been without a database: nobody is judged before a full lease is over.
	d.judgeFrom = time.Now().Add(d.Config.Lease)

	var listener sync.WaitGroup
	defer listener.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	listener.Go(func() { d.listen(ctx) })

	tick := time.NewTicker(d.Config.Poll)
	defer tick.Stop()
	for {
		start := time.Now()
		if err := d.Round(ctx); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			d.Metrics.Rounds.WithLabelValues("error").Inc()
			d.judgeFrom = time.Now().Add(d.Config.Lease)
			d.Log.WarnContext(ctx, "round not finished", "err", err)
		} else {
			d.Metrics.Rounds.WithLabelValues("ok").Inc()
		}
		d.Metrics.RoundSecs.Observe(time.Since(start).Seconds())
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-d.wake:
		case <-tick.C:
		}
	}
}

// listen turns notifications into wake-ups and comes back when the connection
// breaks. Losing one costs at most Poll.
func (d *Dispatcher) listen(ctx context.Context) {
	for ctx.Err() == nil {
		err := d.Store.Listen(ctx, func(string) { d.Wake() })
		if ctx.Err() != nil {
			return
		}
		d.Log.WarnContext(ctx, "not listening, polling meanwhile", "err", err)
		pause(ctx, time.Second)
	}
}

// Wake asks for a round now.
func (d *Dispatcher) Wake() {
	select {
	case d.wake <- struct{}{}:
	default: // one is due already
	}
}

// Round does everything that is due, once. A step that fails does not keep the
// others from being done.
func (d *Dispatcher) Round(ctx context.Context) error {
	return errors.Join(d.admit(ctx), d.settleCancelled(ctx), d.takeBack(ctx), d.reap(ctx), d.resend(ctx), d.place(ctx), d.count(ctx))
}

const batch = 500

func (d *Dispatcher) admit(ctx context.Context) error {
	rows, err := d.Store.Unadmitted(ctx, batch)
	if err != nil || len(rows) == 0 {
		return err
	}
	rates, err := d.Store.Rates(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, row := range rows { // one bad row never blocks the others
		if err := d.admitOne(ctx, row, rates); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (d *Dispatcher) admitOne(ctx context.Context, row store.Row, rates map[string]int64) error {
	spec, err := job.ParseSpec(row.Preset, row.Hyperparameters, row.GPUConfig, d.Config.Policy)
	refusal := ""
	if err != nil {
		refusal = job.ForUser(err)
	}
	// The database refuses a user's insert on another's data set; this holds
	// for rows that the app's server inserted.
	if row.DatasetOwner != row.User {
		refusal = join(refusal, "dataset_id is not one of your data sets: choose one of your own.")
	} else if row.DatasetDeleted {
		refusal = join(refusal, "the data set was deleted: choose another one.")
	} else if row.DatasetStatus == "error" {
		refusal = join(refusal, "the data set did not pass validation: correct its file and upload it again.")
	}
	if refusal != "" {
		d.Metrics.Admitted.WithLabelValues("refused").Inc()
		d.Log.InfoContext(ctx, "job refused", "job", row.ID, "err", refusal)
		return d.Store.Refuse(ctx, row.ID, refusal)
	}
	rate, ok := rates[spec.GPUClass()]
	if !ok {
		return fmt.Errorf("admit job %s: no rate for %s in lorayard.rates: add one", row.ID, spec.GPUClass())
	}
	hyper, err := spec.Hyperparameters(row.Hyperparameters)
	if err != nil {
		return fmt.Errorf("admit job %s: %w", row.ID, err)
	}
	gpus, err := spec.GPUConfig(row.GPUConfig, strconv.FormatFloat(float64(rate)/1e6, 'f', -1, 64))
	if err != nil {
		return fmt.Errorf("admit job %s: %w", row.ID, err)
	}
	if err := d.Store.Admit(ctx, row.ID, spec, hyper, gpus); err != nil {
		return err
	}
	d.Metrics.Admitted.WithLabelValues("admitted").Inc()
	d.Log.InfoContext(ctx, "job admitted", "job", row.ID)
	return nil
}

func join(a, b string) string {
	if a == "" {
		return b
	}
	return a + " " + b
}

func (d *Dispatcher) settleCancelled(ctx context.Context) error {
	refs, err := d.Store.SettleCancelled(ctx)
	for _, ref := range refs {
		d.Log.InfoContext(ctx, "cancelled job settled", "job", ref.Job, "attempt", ref.Attempt)
	}
	return err
}

func (d *Dispatcher) takeBack(ctx context.Context) error {
	refs, err := d.Store.TakeBack(ctx, d.Config.Accept)
	for _, ref := range refs {
		d.Metrics.TakenBack.Inc()
		d.Log.WarnContext(ctx, "attempt was not accepted", "job", ref.Job, "attempt", ref.Attempt)
	}
	return err
}

func (d *Dispatcher) reap(ctx context.Context) error {
	if time.Now().Before(d.judgeFrom) {
		return nil
	}
	refs, err := d.Store.Reap(ctx, d.Config.Patience)
	for _, ref := range refs {
		d.Metrics.Reaped.Inc()
		d.Log.WarnContext(ctx, "attempt lost with its agent", "job", ref.Job, "attempt", ref.Attempt)
	}
	return err
}

func (d *Dispatcher) resend(ctx context.Context) error {
	sends, err := d.Store.Resend(ctx, d.Config.Resend)
	return errors.Join(err, d.send(ctx, sends))
}

func (d *Dispatcher) place(ctx context.Context) error {
	waiting, err := d.Store.Waiting(ctx, batch)
	if err != nil {
		return err
	}
	hosts, err := d.Store.Hosts(ctx)
	if err != nil {
		return err
	}
	d.Metrics.HostsTaking.Set(float64(len(hosts)))
	if len(waiting) == 0 {
		return nil
	}
	attempts := map[string]int{}
	jobs := make([]place.Job, len(waiting))
	for i, w := range waiting {
		attempts[string(w.ID)] = w.Attempt
		jobs[i] = place.Job{
			ID: string(w.ID), User: w.User, Wish: w.Spec.GPUs, Count: w.Spec.GPUCount, MinBytes: int64(w.Spec.MinMemoryGB) * 1e9,
			BaseModel: w.Spec.BaseModel, Labels: w.Spec.Labels, Submitted: w.Admitted, Deadline: w.Spec.Deadline, Preemptible: w.Spec.Preemptible,
		}
		if w.LastHost != "" {
			jobs[i].Avoid = []string{w.LastHost}
		}
	}
	res := place.Place(place.Input{Now: time.Now(), Jobs: jobs, Hosts: placeHosts(hosts)})

	reasons := map[job.ID]string{}
	for _, w := range waiting {
		if r := res.Waiting[string(w.ID)].Reason; r != w.Reason && r != "" {
			reasons[w.ID] = r
			d.Log.InfoContext(ctx, "job waits", "job", w.ID, "reason", r)
		}
	}
	var errs []error
	if len(reasons) > 0 {
		errs = append(errs, d.Store.SetWaiting(ctx, reasons))
	}
	if len(res.Assignments) > 0 {
		as := make([]store.Assignment, len(res.Assignments))
		for i, a := range res.Assignments {
			as[i] = store.Assignment{Job: job.ID(a.Job), Attempt: attempts[a.Job], Agent: a.Agent, Devices: a.Devices}
		}
		sends, err := d.Store.Assign(ctx, as)
		for _, s := range sends {
			d.Metrics.Assigned.Inc()
			d.Log.InfoContext(ctx, "attempt assigned", "job", s.Task.Ref.Job, "attempt", s.Task.Ref.Attempt, "agent", s.Agent, "device", s.Task.Devices)
		}
		errs = append(errs, err, d.send(ctx, sends))
	}
	return errors.Join(errs...)
}

func placeHosts(hosts []store.Host) []place.Host {
	out := make([]place.Host, len(hosts))
	for i, h := range hosts {
		out[i] = place.Host{Agent: h.Agent, BaseModels: h.BaseModels}
		for _, dev := range h.Devices {
			out[i].Devices = append(out[i].Devices, place.Device{UUID: dev.UUID, Class: dev.Class, MemoryBytes: dev.MemoryBytes, Fault: dev.Fault, Busy: dev.Busy})
		}
	}
	return out
}

// send hands tasks over. Redis being away is not an error of the round: the
// attempts stay assigned and are sent again.
func (d *Dispatcher) send(ctx context.Context, sends []store.Send) error {
	for _, s := range sends {
		if err := d.Queue.Send(ctx, s.Agent, s.Task); err != nil {
			d.Metrics.Sends.WithLabelValues("error").Inc()
			d.Log.WarnContext(ctx, "task not sent, trying again", "job", s.Task.Ref.Job, "attempt", s.Task.Ref.Attempt, "agent", s.Agent, "err", err)
			return nil // the others would wait for the same timeout
		}
		d.Metrics.Sends.WithLabelValues("ok").Inc()
	}
	return nil
}

func (d *Dispatcher) count(ctx context.Context) error {
	depths, err := d.Store.Depths(ctx)
	for state, n := range depths {
		d.Metrics.Jobs.WithLabelValues(state).Set(float64(n))
	}
	return err
}

// pause waits for t or the end of ctx.
func pause(ctx context.Context, t time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(t):
	}
}
