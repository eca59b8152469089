// Package agent is the life of one GPU host: it registers, renews its lease
// once a second, accepts what the dispatcher assigned, and drains when asked.
//
// Out of touch is not dead: when a renewal fails, the attempts train on and
// spool. They cannot change anything shared, because every write is fenced;
// they end when the database says that they belong to somebody else.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"lorayard/internal/attempt"
	"lorayard/internal/gpu"
	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/store"
)

// Config is what an operator may turn.
type Config struct {
	Lease   time.Duration // how long the lease lasts beyond a renewal
	Renew   time.Duration // how often it is renewed
	DataDir string        // where attempts and cached data sets are kept
}

// Agent is one host.
type Agent struct {
	Self    store.Agent
	Store   *store.Store
	Ledger  *gpu.Ledger
	Runner  *attempt.Runner
	Metrics *metrics.Agent
	Log     *slog.Logger
	Config  Config
	// NewNonce draws the secret of an accept (a UUID).
	NewNonce func() string

	mu         sync.Mutex
	running    map[job.Ref]*held
	registered bool
	draining   bool
	lastRenew  error
	wg         sync.WaitGroup
}

// held is one attempt under way.
type held struct {
	cancel  context.CancelCauseFunc
	started time.Time
}

// Run registers, renews until ctx ends, then drains: attempts save a
// checkpoint and are handed back. It returns store.ErrReplaced when another
// process took this agent's id.
func (a *Agent) Run(ctx context.Context) error {
	a.running = map[job.Ref]*held{}
	if err := a.register(ctx); err != nil {
		return err
	}
	a.sweep()
	life, die := context.WithCancelCause(context.WithoutCancel(ctx))
	defer die(nil)

	tick := time.NewTicker(a.Config.Renew)
	defer tick.Stop()
	drained := make(chan struct{})
	asked := ctx.Done()
	for {
		select {
		case <-asked:
			asked = nil
			a.drain()
			go func() {
				a.wg.Wait()
				close(drained)
			}()
			a.Log.InfoContext(life, "draining", "attempts", a.count())
		case <-drained:
			// The last renewal tells the dispatcher that nothing is free here.
			_ = a.renew(life)
			return nil
		case <-tick.C:
		}
		if err := a.renew(life); errors.Is(err, store.ErrReplaced) {
			a.stopAll(attempt.ErrLeaseLost)
			a.wg.Wait()
			return fmt.Errorf("agent %s: %w: give each host an id of its own", a.Self.ID, err)
		}
	}
}

// register tries until the database takes it or ctx ends.
func (a *Agent) register(ctx context.Context) error {
	for {
		err := a.Store.Register(ctx, a.Self, a.Config.Lease)
		if err == nil {
			a.mu.Lock()
			a.registered = true
			a.mu.Unlock()
			a.Log.InfoContext(ctx, "registered", "devices", len(a.Self.Devices), "base_models", a.Self.BaseModels)
			return nil
		}
		if ctx.Err() != nil {
			return nil
		}
		if store.IsData(err) {
			return err
		}
		a.Log.WarnContext(ctx, "not registered yet", "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}

// sweep removes what earlier processes left of attempts: registering has given
// those back.
func (a *Agent) sweep() {
	dir := filepath.Join(a.Config.DataDir, "attempts")
	old, err := os.ReadDir(dir)
	if err != nil {
		return // nothing was ever left
	}
	for _, e := range old {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			a.Log.Warn("leftovers of an attempt not removed", "err", err)
		}
	}
}

// renew renews once and does what is wanted of each attempt.
func (a *Agent) renew(ctx context.Context) error {
	a.mu.Lock()
	refs := make([]job.Ref, 0, len(a.running))
	for ref := range a.running {
		refs = append(refs, ref)
	}
	draining := a.draining
	a.mu.Unlock()

	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	wanted, err := a.Store.Renew(ctx, a.Self, a.Config.Lease, draining, refs)
	a.Metrics.RenewSeconds.Observe(time.Since(start).Seconds())
	a.note(ctx, err)
	if err != nil {
		return err
	}
	for _, ref := range refs {
		a.mu.Lock()
		h := a.running[ref]
		a.mu.Unlock()
		desired, mine := wanted[ref]
		switch {
		case h == nil: // settled meanwhile
		case !mine && h.started.After(start): // accepted meanwhile
		case !mine:
			h.cancel(attempt.ErrLeaseLost)
		case desired == job.DesireCancel:
			h.cancel(attempt.ErrCancelled)
		case desired == job.DesirePreempt:
			h.cancel(attempt.ErrPreempted)
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
	ready := a.registered && !a.draining
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
	ref := t.Ref
	ref.Nonce = a.NewNonce()
	as, err := a.Store.Accept(ctx, a.Self, ref)
	if err != nil && job.KindOf(err) != job.LeaseLost && ctx.Err() == nil {
		// The answer may be lost though the accept was not: ask once more with
		// the same nonce.
		as, err = a.Store.Accept(ctx, a.Self, ref)
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
	a.start(as, res)
	return nil
}

// start runs the attempt in a goroutine that the agent waits for.
func (a *Agent) start(as job.Assignment, res *gpu.Reservation) {
	ctx, cancel := context.WithCancelCause(context.Background())
	a.mu.Lock()
	a.running[as.Ref] = &held{cancel: cancel, started: time.Now()}
	if a.draining {
		cancel(attempt.ErrPreempted)
	}
	a.mu.Unlock()
	a.Log.Info("attempt accepted", "job", as.Ref.Job, "attempt", as.Ref.Attempt, "device", as.Devices)
	a.gauges()
	a.wg.Go(func() {
		defer cancel(nil)
		defer a.gauges()
		defer func() {
			a.mu.Lock()
			delete(a.running, as.Ref)
			a.mu.Unlock()
		}()
		// Released last: the trainer's process group is gone by then.
		defer a.Ledger.Release(res)
		if err := a.Runner.Run(ctx, as); err != nil && job.KindOf(err) != job.LeaseLost {
			a.Log.Error("attempt not settled", "job", as.Ref.Job, "attempt", as.Ref.Attempt, "err", err)
		}
	})
}

func (a *Agent) gauges() {
	a.mu.Lock()
	n := len(a.running)
	a.mu.Unlock()
	a.Metrics.Running.Set(float64(n))
	free := len(a.Ledger.Free())
	unfit := 0
	for _, d := range a.Self.Devices {
		if d.Fault != "" {
			unfit++
		}
	}
	a.Metrics.Devices.WithLabelValues("free").Set(float64(free))
	a.Metrics.Devices.WithLabelValues("unfit").Set(float64(unfit))
	a.Metrics.Devices.WithLabelValues("reserved").Set(float64(len(a.Self.Devices) - free - unfit))
}

func (a *Agent) drain() {
	a.mu.Lock()
	a.draining = true
	a.mu.Unlock()
	a.stopAll(attempt.ErrPreempted)
}

func (a *Agent) stopAll(cause error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, h := range a.running {
		h.cancel(cause)
	}
}

func (a *Agent) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.running)
}

// Ready says why the agent must not be given work; nil when it may.
func (a *Agent) Ready() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case !a.registered:
		return errors.New("not registered yet")
	case a.draining:
		return errors.New("draining")
	case a.lastRenew != nil:
		return fmt.Errorf("out of touch: %w", a.lastRenew)
	}
	return nil
}
