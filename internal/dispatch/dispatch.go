// Package dispatch turns rows into accepted attempts and takes back what was
// lost: admit → place → assign → send, and settle cancels → take back → reap.
// Only the leader does it; every dispatcher, leader or standby, carries the
// agents' presence streams. Every step is one idempotent statement, so a
// leader that wakes up late, or two of them, do no harm.
package dispatch

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/place"
	"lorayard/internal/queue"
	"lorayard/internal/store"
	"lorayard/internal/trace"
)

// Config holds what an operator may turn.
type Config struct {
	Policy     job.Policy
	Place      place.Policy
	UserGPUs   int           // GPUs at once of a user without a quota of their own; 0: no limit
	UserQueued int           // jobs that take part in the queue at once, likewise
	Poll       time.Duration // catch-up round when nothing wakes us
	Resend     time.Duration // an attempt that is not accepted is sent again after
	Accept     time.Duration // and goes back to the queue after
	Lease      time.Duration // an agent's lease, to wait out after an outage of the database
	Patience   time.Duration // beyond the end of a silent agent's lease
	Term       time.Duration // the leader's own lease
}

// Store is the database; *store.Store is one, the simulation brings another.
type Store interface {
	Campaign(ctx context.Context, d store.Dispatcher, ttl time.Duration) (term int64, err error)
	Resign(ctx context.Context, id string) error
	Listen(ctx context.Context, wake func(payload string)) error

	Unadmitted(ctx context.Context, n int, only []job.ID) ([]store.Row, error) // nil: all
	Rates(ctx context.Context) (map[string]int64, error)
	Admit(ctx context.Context, as []store.Admission) ([]store.Waiting, error)
	Refuse(ctx context.Context, id job.ID, message string) error

	Waiting(ctx context.Context, n int, only []job.ID) ([]store.Waiting, error) // nil: all
	Running(ctx context.Context) ([]store.Running, error)
	Users(ctx context.Context) ([]store.User, error)
	Hosts(ctx context.Context) ([]store.Host, error)
	SetWaiting(ctx context.Context, waits []store.Wait) error
	Assign(ctx context.Context, as []store.Assignment) ([]store.Send, error)
	Preempt(ctx context.Context, refs []job.Ref) ([]job.Ref, error)

	SettleCancelled(ctx context.Context) ([]job.ID, error)
	TakeBack(ctx context.Context, after time.Duration, gone []string) ([]job.Ref, error)
	Reap(ctx context.Context, id string, lease, patience time.Duration) ([]job.Ref, error)
	NextLapse(ctx context.Context, patience time.Duration) (time.Duration, error)
	Resend(ctx context.Context, after time.Duration) ([]store.Send, error)
	Depths(ctx context.Context) (map[string]int, error)
}

// Queue carries tasks to agents; *queue.Client is one.
type Queue interface {
	SendAll(ctx context.Context, sends []queue.Send) []error
}

// Parts are what a dispatcher is made of.
type Parts struct {
	Self    store.Dispatcher
	Store   Store
	Queue   Queue
	Metrics *metrics.Dispatcher
	Log     *slog.Logger
	Config  Config
	// Push tells an agent over its presence stream to look what is wanted of
	// it; nil tells nobody.
	Push func(agent string) bool
	// Datasets hears that a data set waits to be validated; nil hears nothing.
	Datasets func()
	// Grants hears that an agent asks for access to Storage; nil hears nothing.
	Grants func()
	// Trace is told of placements and sends; nil: nobody is.
	Trace *trace.Tracer
	// Jitter turns a pause into the one that is made; nil leaves it. The
	// simulation gives every pause a moment of its own.
	Jitter func(time.Duration) time.Duration
}

// Dispatcher moves jobs from rows to agents.
type Dispatcher struct {
	Parts

	wake      chan struct{} // a round is wanted
	vacant    chan struct{} // the leader resigned
	news      atomic.Bool   // the queue may be other than we know
	cancelled atomic.Bool   // a job without an attempt was cancelled
	stale     atomic.Bool   // what is known of hosts is
	leads     atomic.Bool

	mu   sync.Mutex
	gone map[string]string // agent → boot: its presence stream ended and did not come back
	came map[job.ID]bool   // rows that came, and jobs that came back to the queue or changed in it

	known known     // what the leader remembers between rounds
	lapse time.Time // when the next agent may be judged; zero: not before the next full round
}

// New puts a dispatcher together.
func New(p Parts) *Dispatcher {
	return &Dispatcher{Parts: p, wake: make(chan struct{}, 1), vacant: make(chan struct{}, 1), gone: map[string]string{}, came: map[job.ID]bool{}}
}

// Run leads whenever it can, until ctx ends; otherwise it stands by.
func (d *Dispatcher) Run(ctx context.Context) error {
	var listener sync.WaitGroup
	defer listener.Wait()
	listener.Go(func() { d.listen(ctx) })
	for ctx.Err() == nil {
		sent := time.Now()
		switch term, err := d.campaign(ctx); {
		case ctx.Err() != nil:
		case err != nil:
			d.Log.WarnContext(ctx, "not leading", "err", err)
		case term > 0:
			d.lead(ctx, term, sent)
		}
		if ctx.Err() == nil {
			d.pause(ctx, d.Config.Term/3, d.vacant)
		}
	}
	// Make room at once, instead of after our term. Not under the name ctx: the
	// listener may not have begun to read that one, and would never end.
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := d.Store.Resign(last, d.Self.ID); err != nil {
		d.Log.WarnContext(ctx, "not resigned; a standby leads when the term is over", "err", err)
	}
	return nil
}

func (d *Dispatcher) campaign(ctx context.Context) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, d.Config.Term/2)
	defer cancel()
	return d.Store.Campaign(ctx, d.Self, d.Config.Term)
}

// errDeposed ends a leader's rounds.
var errDeposed = errors.New("the term is over")

// lead runs rounds until ctx or the term ends: at once when something wakes it,
// else every Poll.
func (d *Dispatcher) lead(ctx context.Context, term int64, sent time.Time) {
	d.Log.InfoContext(ctx, "leading", "term", term)
	d.leads.Store(true)
	defer d.leads.Store(false)
	d.Metrics.Leader.Set(1)
	defer d.Metrics.Leader.Set(0)
	// A standby knows nothing of the queue; what it once knew must not stay.
	defer d.Metrics.Waiting.Reset()
	defer d.Metrics.OldestAge.Reset()
	defer d.Metrics.Jobs.Reset()
	defer d.Metrics.HostsTaking.Set(0)
	ctx, depose := context.WithCancelCause(ctx)
	defer depose(nil)
	var keeper sync.WaitGroup
	defer keeper.Wait()
	keeper.Go(func() { depose(d.keepTerm(ctx, term, sent)) })

	d.stale.Store(true)
	d.news.Store(true)
	var full time.Time // when everything was last looked at
	for ctx.Err() == nil {
		start := time.Now()
		everything := !start.Before(d.nextFull(full))
		if everything {
			full = start
		}
		if err := d.Round(ctx, everything); err != nil {
			if ctx.Err() != nil {
				break
			}
			d.Metrics.Rounds.WithLabelValues("error").Inc()
			d.Log.WarnContext(ctx, "round not finished", "err", err)
		} else {
			d.Metrics.Rounds.WithLabelValues("ok").Inc()
			d.Metrics.LastRound.SetToCurrentTime()
		}
		took := time.Since(start)
		d.Metrics.RoundSecs.Observe(took.Seconds())
		if d.known.busy && took > 0 {
			// Under load what comes during a round fills the next one: with a pause
			// as long as the round (half of a core) a round gives several jobs at
			// once, and costs little more than with one.
			d.pause(ctx, min(took, gather), nil)
		}
		d.pause(ctx, max(0, time.Until(d.nextFull(full))), d.wake)
	}
	depose(nil)
	keeper.Wait()
	d.Log.InfoContext(ctx, "no longer leading", "term", term, "err", context.Cause(ctx))
}

// gather bounds the pause after a round that gave jobs to agents.
const gather = 10 * time.Millisecond

// nextFull is when everything is to be looked at again: Poll after the last
// time, or as soon as a silent agent may be judged.
func (d *Dispatcher) nextFull(last time.Time) time.Time {
	next := last.Add(d.Config.Poll)
	if d.lapse.After(last) && d.lapse.Before(next) {
		return d.lapse
	}
	return next
}

// keepTerm renews the term until ctx ends, another dispatcher leads, or our
// time is over: counted from when we asked, because the answer may be old.
func (d *Dispatcher) keepTerm(ctx context.Context, term int64, sent time.Time) error {
	until := sent.Add(d.Config.Term)
	for {
		if d.pause(ctx, d.Config.Term/3, nil); ctx.Err() != nil {
			return context.Cause(ctx)
		}
		sent := time.Now()
		now, err := d.campaign(ctx)
		switch {
		case err == nil && now == term:
			until = sent.Add(d.Config.Term)
		case err == nil:
			return errDeposed
		case !time.Now().Before(until):
			return errors.Join(errDeposed, err)
		}
	}
}

// listen turns notifications into wake-ups and comes back when the connection
// breaks. Losing one costs at most Poll.
func (d *Dispatcher) listen(ctx context.Context) {
	for ctx.Err() == nil {
		err := d.Store.Listen(ctx, d.heed)
		if ctx.Err() != nil {
			return
		}
		d.Log.WarnContext(ctx, "not listening, polling meanwhile", "err", err)
		d.pause(ctx, time.Second, nil)
	}
}

// heed takes one notification: job, settled, cancelled, agent, look, leader,
// grants, dataset or validated, and what it is about.
func (d *Dispatcher) heed(payload string) {
	what, id, _ := strings.Cut(payload, ":")
	switch what {
	case "look":
		if d.Push != nil {
			d.Push(id)
		}
		d.stale.Store(true) // a drain is such a wish
	case "leader":
		poke(d.vacant)
		return
	case "grants":
		if d.Grants != nil {
			d.Grants()
		}
		return
	case "dataset":
		if d.Datasets != nil {
			d.Datasets()
		}
		return
	case "validated": // jobs may have waited for the verdict
		d.news.Store(true)
	case "settled": // devices are free; nothing else is new
	case "agent":
		d.stale.Store(true)
	case "cancelled":
		d.cancelled.Store(true)
		d.news.Store(true) // it waits no longer
	case "job":
		d.mu.Lock()
		if d.came[job.ID(id)] = true; len(d.came) > batch { // a flood, or nobody leads here
			clear(d.came)
			d.news.Store(true)
		}
		d.mu.Unlock()
	default: // whatever was notified before we listened
		d.news.Store(true)
		d.cancelled.Store(true)
		d.stale.Store(true)
	}
	d.Wake()
}

// Leads reports whether this process leads now.
func (d *Dispatcher) Leads() bool { return d.leads.Load() }

// Wake asks for a round now.
func (d *Dispatcher) Wake() { poke(d.wake) }

func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // one is due already
	}
}

// pause waits for t, a wake-up or the end of ctx.
func (d *Dispatcher) pause(ctx context.Context, t time.Duration, wake <-chan struct{}) {
	if d.Jitter != nil {
		t = d.Jitter(t)
	}
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-wake:
	case <-timer.C:
	}
}

// Gone says that an agent's presence stream ended and did not come back in
// time. That proves no death: what it runs is left to its lease. It is given
// nothing new, and what it has not accepted goes back.
func (d *Dispatcher) Gone(agent, boot string) {
	d.mu.Lock()
	d.gone[agent] = boot
	d.mu.Unlock()
	d.Metrics.Lost.Inc()
	d.Wake()
}

// Back says that an agent has a presence stream.
func (d *Dispatcher) Back(agent, _ string) {
	d.mu.Lock()
	delete(d.gone, agent)
	d.mu.Unlock()
	d.stale.Store(true)
	d.Wake()
}

func (d *Dispatcher) goneAgents() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]string, 0, len(d.gone))
	for a := range d.gone {
		out = append(out, a)
	}
	return out
}

// Round does what is due, once: always what a new job waits for, and with
// everything also what only time makes due. A step that fails does not keep
// the others from being done.
func (d *Dispatcher) Round(ctx context.Context, everything bool) error {
	var errs []error
	d.known.busy = false
	d.mu.Lock()
	came := slices.Collect(maps.Keys(d.came))
	clear(d.came)
	d.mu.Unlock()
	if d.news.Swap(false) || everything || len(came) > batch/2 {
		d.known.queue = false
		errs = append(errs, d.admit(ctx, nil))
	} else if len(came) > 0 {
		slices.Sort(came) // the order of a map is nobody's
		d.known.came = came
		errs = append(errs, d.admit(ctx, came))
	}
	if d.cancelled.Swap(false) || everything {
		errs = append(errs, d.settleCancelled(ctx))
	}
	if everything || len(d.goneAgents()) > 0 {
		errs = append(errs, d.takeBack(ctx))
	}
	if everything {
		errs = append(errs, d.reap(ctx), d.resend(ctx))
	}
	errs = append(errs, d.place(ctx, everything))
	if everything {
		errs = append(errs, d.count(ctx))
	}
	return errors.Join(errs...)
}

// batch bounds one statement's rows.
const batch = 1000

func (d *Dispatcher) settleCancelled(ctx context.Context) error {
	ids, err := d.Store.SettleCancelled(ctx)
	for _, id := range ids {
		d.Log.InfoContext(ctx, "cancelled job settled", "job", id)
	}
	return err
}

func (d *Dispatcher) takeBack(ctx context.Context) error {
	refs, err := d.Store.TakeBack(ctx, d.Config.Accept, d.goneAgents())
	if len(refs) > 0 {
		d.known.queue = false
	}
	for _, ref := range refs {
		d.Metrics.TakenBack.Inc()
		d.Log.WarnContext(ctx, "attempt was not accepted", "job", ref.Job, "attempt", ref.Attempt)
	}
	return err
}

func (d *Dispatcher) reap(ctx context.Context) error {
	refs, err := d.Store.Reap(ctx, d.Self.ID, d.Config.Lease, d.Config.Patience)
	for _, ref := range refs {
		d.Metrics.Reaped.Inc()
		d.Log.WarnContext(ctx, "attempt lost with its agent", "job", ref.Job, "attempt", ref.Attempt)
	}
	d.lapse = time.Time{}
	asked := time.Now()
	in, lapseErr := d.Store.NextLapse(ctx, d.Config.Patience)
	if in > 0 {
		d.lapse = asked.Add(in + lapseSlack)
	}
	return errors.Join(err, lapseErr)
}

// lapseSlack lets the database's clock be past the end of a lease when the
// reaper asks: counted from before the question, it would be just short of it.
const lapseSlack = 5 * time.Millisecond

func (d *Dispatcher) resend(ctx context.Context) error {
	sends, err := d.Store.Resend(ctx, d.Config.Resend)
	d.send(ctx, sends)
	return err
}

// send hands tasks over. Redis being away is not an error of the round: the
// attempts stay assigned and are sent again.
func (d *Dispatcher) send(ctx context.Context, sends []store.Send) {
	if len(sends) == 0 {
		return
	}
	tasks := make([]queue.Send, len(sends))
	for i, s := range sends {
		tasks[i] = queue.Send(s)
	}
	var failed error
	began := time.Now()
	results := d.Queue.SendAll(ctx, tasks)
	over := time.Now()
	for i, err := range results {
		d.Trace.Tell(trace.Span{Ref: sends[i].Task.Ref, Name: "sent", Began: began, Over: over, Failed: wrong(err), About: map[string]string{"agent": sends[i].Agent}})
		if err == nil {
			d.Metrics.Sends.WithLabelValues("ok").Inc()
			continue
		}
		d.Metrics.Sends.WithLabelValues("error").Inc()
		if failed == nil {
			failed = err
			d.Log.WarnContext(ctx, "tasks not sent, trying again", "tasks", len(sends)-i, "agent", sends[i].Agent, "err", err)
		}
	}
}

// wrong is a word for a span.
func wrong(err error) string {
	if err == nil {
		return ""
	}
	return "error"
}

func (d *Dispatcher) count(ctx context.Context) error {
	depths, err := d.Store.Depths(ctx)
	for state, n := range depths {
		d.Metrics.Jobs.WithLabelValues(state).Set(float64(n))
	}
	return err
}
