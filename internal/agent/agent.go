// Package agent is the life of one GPU host: it registers, renews its lease
// once a second, accepts what the dispatcher assigned, drains when asked, and
// steps aside for its own next process without harm to what it runs.
//
// Out of touch is not dead: when a renewal fails, the attempts train on and
// spool. They cannot change anything shared, because every write is fenced;
// they end when the database says that they belong to somebody else, or when
// their shims have not heard of a renewal for too long.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"lorayard/internal/attempt"
	"lorayard/internal/gpu"
	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/store"
	"lorayard/internal/trace"
)

// Config is what an operator may turn.
type Config struct {
	Lease      time.Duration // how long the lease lasts beyond a renewal
	Renew      time.Duration // how often it is renewed
	OutOfTouch time.Duration // a trainer ends when no renewal succeeded for so long
	HandOver   time.Duration // how long trainers wait for the next process of this agent
}

// Store is the database; *store.Store is one, the simulation brings another.
type Store interface {
	Register(ctx context.Context, a store.Agent, ttl time.Duration, adopt []job.Ref) ([]job.Ref, error)
	Renew(ctx context.Context, a store.Agent, ttl time.Duration, state store.AgentState, refs []job.Ref) (store.Wanted, error)
	Accept(ctx context.Context, a store.Agent, ref job.Ref) (job.Assignment, error)
}

// Runner runs attempts; *attempt.Runner is one, the simulation brings another.
type Runner interface {
	// Run carries an accepted attempt out until it is settled, lost or left
	// to the next process; the cause of ctx's end says what to do.
	Run(ctx context.Context, as job.Assignment, live *attempt.Live) error
	// Left lists what an earlier process left to be gone on with, after what
	// else it left behind is dead and removed.
	Left(ctx context.Context) []attempt.Left
	// Resume goes on with one.
	Resume(ctx context.Context, l attempt.Left, live *attempt.Live) error
	// Discard ends one that belongs to somebody else by now.
	Discard(ctx context.Context, l attempt.Left)
}

// ErrRestart says that the agent stepped aside for its next process: its
// trainers run on and wait to be adopted.
var ErrRestart = errors.New("stepped aside for the next process of this agent")

// Parts are what an agent is made of.
type Parts struct {
	Self    store.Agent
	Store   Store
	Ledger  *gpu.Ledger
	Health  *gpu.Health // nil: devices are taken as they are
	Places  *gpu.Places // nil: trainers run wherever the host puts them
	Runner  Runner
	Metrics *metrics.Agent
	Log     *slog.Logger
	Config  Config
	// NewNonce draws the secret of an accept (a UUID).
	NewNonce func() string
	// Dispatchers hears where the dispatchers' presence streams are, at every
	// renewal; nil hears nothing.
	Dispatchers func([]string)
	// Reading fills in what is known of a device, from what was read last; nil
	// knows no more than the agent. It must not wait for a driver.
	Reading func(*metrics.Device)
	// Trace is told of accepts; nil: nobody is.
	Trace *trace.Tracer
	// Preflight looks at devices before an attempt is accepted; the error says why
	// it could not run on them. It comes back within a second. nil: no look.
	Preflight func(ctx context.Context, uuids []string) error
	// Jitter turns a pause into the one that is made; nil leaves it. The
	// simulation gives every pause a moment of its own.
	Jitter func(time.Duration) time.Duration
	// Clock is what deadlines of trainers are told by; nil: one that a suspended
	// host does not stop. The simulation brings its own.
	Clock func() time.Duration
}

// Agent is one host.
type Agent struct {
	Parts
	started time.Time

	look      chan struct{} // a renewal is wanted now
	restart   chan struct{} // closed by Restart
	restarted sync.Once
	idle      chan struct{} // closed when a drain that ends the process is over

	mu         sync.Mutex
	running    map[job.Ref]*held
	accepting  sync.WaitGroup
	asking     int            // how many accepts are under way
	wg         sync.WaitGroup // attempts
	registered bool
	stepAside  bool // no more accepts: the next process goes on
	drain      drain
	lastRenew  error
	inTouch    time.Time // when the last registration or renewal that was answered was sent
}

// New puts an agent together.
func New(p Parts) *Agent {
	a := &Agent{
		Parts: p, started: time.Now(), running: map[job.Ref]*held{},
		look: make(chan struct{}, 1), restart: make(chan struct{}), idle: make(chan struct{}),
	}
	a.watch()
	return a
}

// held is one attempt under way.
type held struct {
	cancel  context.CancelCauseFunc
	started time.Time
	live    *attempt.Live
	as      job.Assignment
}

// drain is the wish that an agent takes nothing new and lets go of what it
// runs. It comes from the process's owner (a signal, `agent drain`), and then
// the process ends, or from an operator of the fleet, and then it stays.
type drain struct {
	own, operator bool
	by            time.Time   // attempts that are still there then are preempted
	timer         *time.Timer // at by
}

func (d *drain) on() bool { return d.own || d.operator }

// Run registers, goes on with what an earlier process left, renews until ctx
// ends, then drains: attempts save a checkpoint and are handed back. It
// returns store.ErrReplaced when another process took this agent's id, and
// ErrRestart after Restart.
func (a *Agent) Run(ctx context.Context) error {
	left := a.reserve(ctx, a.Runner.Left(ctx))
	kept, err := a.register(ctx, left)
	if err != nil || ctx.Err() != nil {
		return err
	}
	a.resume(ctx, left, kept)

	life, die := context.WithCancel(context.WithoutCancel(ctx))
	lease := make(chan error, 1)
	go func() { lease <- a.keepLease(life) }()
	defer func() {
		die()
		<-lease
	}()
	asked := ctx.Done()
	for {
		select {
		case <-asked:
			asked = nil
			a.Drain(0)
		case <-a.idle:
			// The last renewal tells the dispatcher that nothing is free here.
			_ = a.renew(life)
			return nil
		case <-a.restart:
			// First the lease: a renewal that does not list what is being left
			// would give it away.
			die()
			lease <- <-lease
			return a.handOver(life)
		case err := <-lease:
			lease <- nil
			a.takeNothing()
			a.stopAll(attempt.ErrLeaseLost)
			a.wg.Wait()
			return fmt.Errorf("agent %s: %w: give each host an id of its own", a.Self.ID, err)
		}
	}
}

// heir is an attempt that an earlier process left, with its devices.
type heir struct {
	attempt.Left
	devices *gpu.Reservation
}

// reserve takes the devices of what was left. What has lost one of its devices
// cannot go on here: it is not listed at registration, and so goes elsewhere.
func (a *Agent) reserve(ctx context.Context, left []attempt.Left) []heir {
	var out []heir
	for _, l := range left {
		res, err := a.Ledger.Reclaim(l.Assignment.Devices)
		if err != nil {
			a.Log.ErrorContext(ctx, "attempt cannot go on", "job", l.Assignment.Ref.Job, "attempt", l.Assignment.Ref.Attempt, "err", err)
			a.Runner.Discard(ctx, l)
			continue
		}
		out = append(out, heir{l, res})
	}
	return out
}

// register tries until the database takes it or ctx ends. An id or a device
// that a live agent on another host holds is waited for as long as a lease may
// last, in case that agent is dead, and is then a mistake to be told.
func (a *Agent) register(ctx context.Context, left []heir) ([]job.Ref, error) {
	adopt := make([]job.Ref, len(left))
	for i, l := range left {
		adopt[i] = l.Assignment.Ref
	}
	var inUseSince time.Time
	for {
		sent := time.Now()
		kept, err := a.Store.Register(ctx, a.self(), a.Config.Lease, adopt)
		switch {
		case err == nil:
			a.mu.Lock()
			a.registered, a.inTouch = true, sent
			a.mu.Unlock()
			a.Log.InfoContext(ctx, "registered", "devices", len(a.Self.Devices), "base_models", a.Self.BaseModels, "adopted", len(kept))
			return kept, nil
		case ctx.Err() != nil:
			return nil, nil
		case store.IsData(err), errors.Is(err, store.ErrReplaced):
			return nil, err
		case errors.Is(err, store.ErrInUse):
			if inUseSince.IsZero() {
				inUseSince = time.Now()
			}
			if time.Since(inUseSince) > 2*a.Config.Lease {
				return nil, fmt.Errorf("%w: give each host an id of its own (AGENT_ID), or stop the other one", err)
			}
		}
		a.Log.WarnContext(ctx, "not registered yet", "err", err)
		a.pause(ctx, time.Second, nil)
	}
}

// resume goes on with what was left and is still ours, and ends the rest.
func (a *Agent) resume(ctx context.Context, left []heir, kept []job.Ref) {
	for _, h := range left {
		ref := h.Assignment.Ref
		if !slices.Contains(kept, ref) {
			a.Log.WarnContext(ctx, "attempt was given away while nobody was here", "job", ref.Job, "attempt", ref.Attempt)
			a.Runner.Discard(ctx, h.Left)
			a.Ledger.Release(h.devices)
			continue
		}
		a.Log.InfoContext(ctx, "attempt goes on", "job", ref.Job, "attempt", ref.Attempt, "device", h.Assignment.Devices)
		a.begin(h.Assignment, h.devices, func(ctx context.Context, live *attempt.Live) error { return a.Runner.Resume(ctx, h.Left, live) })
	}
}

// keepLease renews until ctx ends or another process took this agent's id.
func (a *Agent) keepLease(ctx context.Context) error {
	for {
		if err := a.renew(ctx); errors.Is(err, store.ErrReplaced) {
			return err
		}
		if a.pause(ctx, a.Config.Renew, a.look); ctx.Err() != nil {
			return nil
		}
	}
}

// pause waits for d, a wake-up or the end of ctx.
func (a *Agent) pause(ctx context.Context, d time.Duration, wake <-chan struct{}) {
	if a.Jitter != nil {
		d = a.Jitter(d)
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-wake:
	case <-t.C:
	}
}

// Look asks for a renewal now: something that is wanted of this agent changed.
func (a *Agent) Look() {
	select {
	case a.look <- struct{}{}:
	default: // one is due already
	}
}

// renew renews once and does what is wanted.
func (a *Agent) renew(ctx context.Context) error {
	a.mu.Lock()
	refs := make([]job.Ref, 0, len(a.running))
	for ref := range a.running {
		refs = append(refs, ref)
	}
	state := store.AgentState{Draining: a.drain.own || a.stepAside}
	a.mu.Unlock()
	if a.Health != nil {
		state.Faults = a.Ledger.Faults()
	}
	job.SortRefs(refs)

	sent := time.Now()
	call, cancel := context.WithTimeout(ctx, max(time.Second, a.Config.Lease/2))
	defer cancel()
	wanted, err := a.Store.Renew(call, a.Self, a.Config.Lease, state, refs)
	if err != nil && ctx.Err() != nil {
		return err // nobody wants to know any more
	}
	a.Metrics.RenewSeconds.Observe(time.Since(sent).Seconds())
	a.note(ctx, err)
	if err != nil {
		return err
	}
	a.Metrics.LastRenewal.Set(float64(sent.UnixMilli()) / 1000)
	a.mu.Lock()
	a.inTouch = sent
	a.mu.Unlock()
	if a.Dispatchers != nil {
		a.Dispatchers(wanted.Dispatchers)
	}
	a.heedDrain(wanted)
	for _, ref := range refs {
		a.mu.Lock()
		h := a.running[ref]
		a.mu.Unlock()
		desired, mine := wanted.Attempts[ref]
		switch {
		case h == nil: // settled meanwhile
		case !mine && h.started.After(sent): // accepted meanwhile
		case !mine:
			h.cancel(attempt.ErrLeaseLost)
		case desired == job.DesireCancel:
			h.cancel(attempt.ErrCancelled)
		case desired == job.DesirePreempt || desired == job.DesirePause:
			h.cancel(attempt.ErrPreempted)
		default:
			// The time counts from when we asked: the answer may be old.
			h.live.Extend(a.Config.OutOfTouch - time.Since(sent))
		}
	}
	return nil
}

// note logs a change between in touch and out of touch, once.
func (a *Agent) note(ctx context.Context, err error) {
	a.mu.Lock()
	before := a.lastRenew
	a.lastRenew = err
	a.mu.Unlock()
	switch {
	case err != nil && before == nil:
		a.Log.WarnContext(ctx, "lease not renewed; attempts train on", "err", err)
	case err == nil && before != nil:
		a.Log.InfoContext(ctx, "lease renewed again")
	}
	if err != nil {
		a.Metrics.Renewals.WithLabelValues("error").Inc()
		return
	}
	a.Metrics.Renewals.WithLabelValues("ok").Inc()
}

// Accept takes one task: it reserves the devices, accepts the attempt under
// the fence and starts it. It returns within moments; the run goes on by
// itself. queue.Serve calls it.
func (a *Agent) Accept(ctx context.Context, t job.Task) error {
	a.mu.Lock()
	ready := a.registered && !a.drain.on() && !a.stepAside
	if ready {
		a.accepting.Add(1)
		a.asking++
		defer a.asked()
	}
	a.mu.Unlock()
	if !ready {
		a.Metrics.Accepts.WithLabelValues("refused").Inc()
		return errors.New("this agent takes nothing now")
	}
	res, err := a.Ledger.Reserve(t.Devices)
	if err != nil {
		a.Metrics.Accepts.WithLabelValues("refused").Inc()
		return fmt.Errorf("reserve devices of %s: %w", t.Ref, err)
	}
	if a.Preflight != nil {
		if err := a.Preflight(ctx, t.Devices); err != nil {
			a.Ledger.Release(res)
			a.Metrics.Accepts.WithLabelValues("refused").Inc()
			return fmt.Errorf("look at the devices of %s: %w", t.Ref, err)
		}
	}
	ref := t.Ref
	ref.Nonce = a.NewNonce()
	asked := time.Now()
	as, err := a.ask(ctx, ref)
	if err != nil && job.KindOf(err) != job.LeaseLost && ctx.Err() == nil {
		// The answer may be lost though the accept was not: ask once more with
		// the same nonce.
		as, err = a.ask(ctx, ref)
	}
	if err != nil {
		a.Ledger.Release(res)
		result := "error"
		if job.KindOf(err) == job.LeaseLost {
			result = "stale" // a late or doubled task: nothing to do
		}
		a.Metrics.Accepts.WithLabelValues(result).Inc()
		return err
	}
	a.Metrics.Accepts.WithLabelValues("accepted").Inc()
	a.Trace.Tell(trace.Span{Ref: ref, Name: "accepted", Began: asked.Add(as.Skew), Over: time.Now().Add(as.Skew)})
	a.Metrics.Skew.Set(as.Skew.Seconds())
	a.Log.Info("attempt accepted", "job", as.Ref.Job, "attempt", as.Ref.Attempt, "device", as.Devices)
	a.begin(as, res, func(ctx context.Context, live *attempt.Live) error { return a.Runner.Run(ctx, as, live) })
	return nil
}

// asked is the end of an accept. A drain waits for it: what was accepted is to
// be handed back.
func (a *Agent) asked() {
	a.mu.Lock()
	a.asking--
	a.checkIdle()
	a.mu.Unlock()
	a.accepting.Done()
}

// askLimit bounds one accept: it holds devices, and the dispatcher takes back
// after 5 s what is not accepted. Two of them are over before a renewal that
// does not list the attempt loses it, 10 s after an accept.
const askLimit = 4 * time.Second

func (a *Agent) ask(ctx context.Context, ref job.Ref) (job.Assignment, error) {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	return a.Store.Accept(ctx, a.Self, ref)
}

// begin runs an attempt in a goroutine that the agent waits for. Its trainer's
// time counts from the last renewal: an accept does not move the lease.
func (a *Agent) begin(as job.Assignment, res *gpu.Reservation, run func(context.Context, *attempt.Live) error) {
	ctx, cancel := context.WithCancelCause(context.Background())
	live := &attempt.Live{Clock: a.Clock}
	live.Free = func() { a.Ledger.Release(res) }
	a.join(as, live)
	a.mu.Lock()
	live.Extend(a.Config.OutOfTouch - time.Since(a.inTouch))
	a.running[as.Ref] = &held{cancel: cancel, started: time.Now(), live: live, as: as}
	if a.drain.on() && !time.Now().Before(a.drain.by) {
		cancel(attempt.ErrPreempted)
	}
	a.mu.Unlock()
	a.breakLost(as, live)
	a.gauges()
	a.wg.Go(func() {
		defer cancel(nil)
		err := run(ctx, live)
		if err != nil && job.KindOf(err) != job.LeaseLost && !errors.Is(err, attempt.ErrHandOver) {
			a.Log.Error("attempt not settled", "job", as.Ref.Job, "attempt", as.Ref.Attempt, "err", err)
		}
		if !errors.Is(err, attempt.ErrHandOver) && live.Free != nil { // nil: a trainer that cannot be killed has them
			live.Free()
		}
		a.mu.Lock()
		delete(a.running, as.Ref)
		a.checkIdle()
		a.mu.Unlock()
		a.gauges()
	})
}

func (a *Agent) gauges() {
	a.mu.Lock()
	n := len(a.running)
	a.mu.Unlock()
	a.Metrics.Running.Set(float64(n))
	a.Metrics.Tick()
	free := len(a.Ledger.Free())
	unfit := len(a.Ledger.Faults())
	a.Metrics.Devices.WithLabelValues("free").Set(float64(free))
	a.Metrics.Devices.WithLabelValues("unfit").Set(float64(unfit))
	a.Metrics.Devices.WithLabelValues("reserved").Set(float64(len(a.Self.Devices) - free - unfit))
}

// Drain makes the agent take nothing new, lets its attempts finish within the
// given time, then save a checkpoint and go back to the queue, and ends Run
// when none is left. Asked again, the earlier time counts.
func (a *Agent) Drain(within time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.drain.own = true
	a.drainBy(time.Now().Add(within))
	a.checkIdle()
	a.Look() // the dispatcher must not give us more
}

// heedDrain does what an operator wants. Its drain leaves the process alive.
func (a *Agent) heedDrain(w store.Wanted) {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case w.Drain:
		a.drain.operator = true
		a.drainBy(time.Now().Add(w.DrainIn))
	case a.drain.operator:
		a.drain.operator = false
		if !a.drain.own && a.drain.timer != nil {
			a.drain.timer.Stop()
			a.drain.timer = nil
		}
	}
}

// drainBy preempts what is left at the given time. a.mu is held.
func (a *Agent) drainBy(by time.Time) {
	if a.drain.timer != nil && !by.Before(a.drain.by.Add(-time.Second)) {
		return // known, as far as clocks agree
	}
	if a.drain.timer != nil {
		a.drain.timer.Stop()
	}
	a.drain.by = by
	a.drain.timer = time.AfterFunc(time.Until(by), func() { a.stopAll(attempt.ErrPreempted) })
	a.Log.Info("draining", "attempts", len(a.running), "by", by.UTC().Format(time.RFC3339))
}

// checkIdle ends a drain that is over. a.mu is held.
func (a *Agent) checkIdle() {
	if !a.drain.own || len(a.running) > 0 || a.asking > 0 {
		return
	}
	select {
	case <-a.idle:
	default:
		close(a.idle)
	}
}

// Restart makes Run step aside for the next process of this agent: it takes
// nothing new, leaves its trainers running and returns ErrRestart.
func (a *Agent) Restart() { a.restarted.Do(func() { close(a.restart) }) }

// handOver leaves every attempt where its trainer runs on. What is not
// training yet, or no more, is begun again by the next process.
func (a *Agent) handOver(ctx context.Context) error {
	n := a.takeNothing()
	a.Log.InfoContext(ctx, "stepping aside for the next process", "attempts", n)
	a.stopAll(attempt.ErrHandOver)
	a.wg.Wait()
	return ErrRestart
}

// takeNothing ends accepts, waits for those under way and tells how many
// attempts run.
func (a *Agent) takeNothing() int {
	a.mu.Lock()
	a.stepAside = true
	a.mu.Unlock()
	a.accepting.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.running)
}

func (a *Agent) stopAll(cause error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, h := range a.running {
		h.cancel(cause)
	}
}

// Ready says why the agent must not be given work; nil when it may.
func (a *Agent) Ready() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case !a.registered:
		return errors.New("not registered yet")
	case a.drain.on() || a.stepAside:
		return errors.New("draining")
	case a.lastRenew != nil && time.Since(a.inTouch) >= a.Config.Lease:
		// Before that the lease is ours, and an accept may well get through: where
		// connections are cut in step with renewals, none would ever be tried.
		return fmt.Errorf("out of touch: %w", a.lastRenew)
	}
	return nil
}
