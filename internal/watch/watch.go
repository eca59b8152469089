// Package watch turns what the database knows of fleet, attempts and ledger into
// metrics. The leader alone does it, so that nothing is counted twice; what
// happened while nobody led is in Postgres, and counted by nobody.
package watch

import (
	"context"
	"log/slog"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/store"
	"lorayard/internal/trace"
)

// Store is the database; *store.Store is one.
type Store interface {
	Moves(ctx context.Context, since time.Time) ([]store.Began, []store.Closed, time.Time, error)
	Standing(ctx context.Context) (store.Standing, error)
	CheckLedger(ctx context.Context) (store.Ledger, error)
}

// Watch reads every few seconds.
type Watch struct {
	Store   Store
	Metrics *metrics.Dispatcher
	Log     *slog.Logger
	Leads   func() bool   // whether this process leads now
	Trace   *trace.Tracer // nil: no spans

	since   time.Time          // what was closed before is counted
	counted map[move]time.Time // what was counted of the time after, and when it was seen
	stood   time.Time          // when the fleet was read last
	states  map[state]int      // and how it stood
	checked time.Time          // when the ledger was
	failing bool               // the last look failed
}

// move is an attempt that began or ended.
type move struct {
	job     job.ID
	attempt int
	ended   bool
}

type state struct{ class, state string }

const (
	every       = 5 * time.Second
	ledgerEvery = 2 * time.Minute
	callLimit   = 10 * time.Second
	// overlap is read twice: a transaction stamps its rows before others see
	// them.
	overlap = 30 * time.Second
)

// Run watches until ctx ends.
func (w *Watch) Run(ctx context.Context) error {
	// Often, so that who begins to lead begins to count.
	t := time.NewTicker(every / 10)
	defer t.Stop()
	var looked time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if !w.Leads() {
			w.Stand()
			looked = time.Time{}
			continue
		}
		if time.Since(looked) < every {
			continue
		}
		looked = time.Now()
		err := w.Look(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !w.failing:
			w.Log.WarnContext(ctx, "metrics of fleet and attempts are not up to date", "err", err)
		}
		w.failing = err != nil
	}
}

// Stand leaves counting to the next leader.
func (w *Watch) Stand() {
	if w.since.IsZero() && w.stood.IsZero() {
		return
	}
	w.since, w.counted, w.stood, w.states, w.checked = time.Time{}, nil, time.Time{}, nil, time.Time{}
	m := w.Metrics
	m.Agents.Reset()
	m.GPUs.Reset()
	m.WatchLast.Set(0)
	m.LedgerChecked.Set(0)
}

// Look reads once.
func (w *Watch) Look(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	if err := w.moves(ctx); err != nil {
		return err
	}
	if err := w.fleet(ctx); err != nil {
		return err
	}
	w.Metrics.WatchLast.SetToCurrentTime()
	if time.Since(w.checked) < ledgerEvery {
		return nil
	}
	l, err := w.Store.CheckLedger(ctx)
	if err != nil {
		return err
	}
	w.checked = time.Now()
	w.Metrics.LedgerDrift.Set(l.Drift)
	w.Metrics.LedgerOpen.Set(float64(l.Open))
	w.Metrics.LedgerStray.Set(float64(l.Stray))
	w.Metrics.LedgerChecked.SetToCurrentTime()
	return nil
}

// moves counts what began and ended since the last look.
func (w *Watch) moves(ctx context.Context) error {
	first := w.since.IsZero()
	if first { // the leader before us counted what was before
		_, _, now, err := w.Store.Moves(ctx, time.Now().Add(time.Hour))
		if err != nil {
			return err
		}
		w.since, w.counted = now, map[move]time.Time{}
	}
	began, closed, now, err := w.Store.Moves(ctx, w.since.Add(-overlap))
	if err != nil {
		if first {
			w.since = time.Time{}
		}
		return err
	}
	for _, b := range began {
		if w.news(move{b.Ref.Job, b.Ref.Attempt, false}, now) && !first {
			w.began(b)
		}
	}
	for _, c := range closed {
		if w.news(move{c.Ref.Job, c.Ref.Attempt, true}, now) && !first {
			w.closed(c)
		}
	}
	for m, seen := range w.counted {
		if now.Sub(seen) > 2*overlap {
			delete(w.counted, m)
		}
	}
	w.since = now
	return nil
}

// news reports whether m was not counted yet.
func (w *Watch) news(m move, now time.Time) bool {
	_, known := w.counted[m]
	w.counted[m] = now
	return !known
}

func (w *Watch) began(b store.Began) {
	w.Metrics.ObserveHandOver(b.HandOver.Seconds(), w.Trace.ID(b.Ref.Job))
	since := b.Waited
	if b.Ref.Attempt > 1 {
		since = b.Recovery - b.HandOver
	}
	w.Trace.Tell(trace.Span{Ref: b.Ref, Name: "queued", Began: b.Assigned.Add(-since), Over: b.Assigned})
	w.Trace.Tell(trace.Span{Ref: b.Ref, Name: "handed over", Began: b.Assigned, Over: b.Assigned.Add(b.HandOver)})
	if b.Ref.Attempt == 1 {
		w.Metrics.Wait.WithLabelValues(b.Class).Observe(b.Waited.Seconds())
	}
	if infra(b.After) {
		w.Metrics.Recovery.WithLabelValues(string(b.After)).Observe(b.Recovery.Seconds())
	}
}

func (w *Watch) closed(c store.Closed) {
	w.Metrics.Attempts.WithLabelValues(c.Outcome, string(c.Kind)).Inc()
	failed := ""
	if c.Outcome == string(store.OutcomeFailed) || c.Outcome == "lost" {
		failed = string(c.Kind)
	}
	w.Trace.TellAttempt(trace.Span{
		Ref: c.Ref, Name: "attempt", Began: c.Assigned, Over: c.Ended, Failed: failed,
		About: map[string]string{"agent": c.Agent, "outcome": c.Outcome, "kind": string(c.Kind)},
	})
	if c.Status != "" {
		if c.Status != job.Failed {
			failed = ""
		}
		w.Trace.TellJob(trace.Span{Ref: c.Ref, Name: "job", Began: c.Created, Over: c.At, Failed: failed, About: map[string]string{"status": string(c.Status)}})
	}
	switch {
	case c.Status == "":
	case c.Status == job.Failed && infra(c.Kind):
		w.Metrics.Settled.WithLabelValues("failed_infra").Inc()
	default:
		w.Metrics.Settled.WithLabelValues(string(c.Status)).Inc()
	}
}

// infra reports whether a failure is on us and not on the job.
func infra(k job.Kind) bool { return k != "" && k.Retryable() && !k.Billable() && !k.Counted() }

// fleet counts agents and devices, and charges the time since the last look to
// what the devices were then.
func (w *Watch) fleet(ctx context.Context) error {
	st, err := w.Store.Standing(ctx)
	if err != nil {
		return err
	}
	now := time.Now()
	if !w.stood.IsZero() {
		for s, n := range w.states {
			w.Metrics.GPUSeconds.WithLabelValues(s.class, s.state).Add(float64(n) * now.Sub(w.stood).Seconds())
		}
	}
	w.stood, w.states = now, map[state]int{}
	for _, d := range st.Devices {
		for _, s := range []string{"busy", "idle", "idle_with_queue", "unfit"} {
			w.states[state{d.Class, s}] += 0 // none is a number too
			w.Metrics.GPUSeconds.WithLabelValues(d.Class, s)
		}
		w.Metrics.Wait.WithLabelValues(d.Class) // a rate does not see the first of a series
		s := d.State
		if s == "idle" && wanted(st.Wishes, d.Class) {
			s = "idle_with_queue"
		}
		w.states[state{d.Class, s}] += d.N
	}
	w.Metrics.GPUs.Reset()
	for s, n := range w.states {
		w.Metrics.GPUs.WithLabelValues(s.class, s.state).Set(float64(n))
	}
	for s, n := range st.Agents {
		w.Metrics.Agents.WithLabelValues(s).Set(float64(n))
	}
	return nil
}

func wanted(wishes []job.Wish, class string) bool {
	for _, wish := range wishes {
		if wish.Matches(class, 0) {
			return true
		}
	}
	return false
}
