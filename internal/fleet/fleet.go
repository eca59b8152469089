// Package fleet runs the real dispatcher and any number of real agents in this
// process, on a real Postgres and Redis, with attempts that train nothing: for
// the benchmarks and for tests of the control plane. Support only, never linked
// into a shipped binary.
package fleet

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"lorayard/internal/agent"
	"lorayard/internal/attempt"
	"lorayard/internal/dispatch"
	"lorayard/internal/gpu"
	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/place"
	"lorayard/internal/queue"
	"lorayard/internal/store"
)

// Config says how large the fleet is.
type Config struct {
	DatabaseURL, RedisURL string
	Agents, GPUs          int    // GPUs of each agent
	Class                 string // of the GPUs; empty: A100-80GB
	Models                []string
	Labels                func(agent int) map[string]string // nil: none
	Conns                 int32                             // of the agents to Postgres, all together; 0 means 12
	Dispatchers           int                               // 0 means 1
	Renew                 time.Duration                     // 0 means 1 s
	Lease                 time.Duration                     // 0 means 5 s
	Dispatch              func(*dispatch.Config)
	Log                   *slog.Logger // nil: discarded
	// Work is an attempt: it returns when the attempt has done its work, or ctx
	// ends. nil returns at once.
	Work func(ctx context.Context, as job.Assignment)
	// Accepted hears of each accepted attempt; nil hears nothing.
	Accepted func(agent string, ref job.Ref)
	// Settled hears of each attempt that its agent settled; nil hears nothing.
	Settled func(agent string, ref job.Ref)
}

// Fleet is a running control plane.
type Fleet struct {
	Store  *store.Store // of the agents
	Agents []*agent.Agent
	c      Config
	stop   context.CancelFunc
	wg     sync.WaitGroup
	closes []func()

	mu  sync.Mutex
	err error
}

// Start starts the fleet and returns when every agent takes work.
func Start(ctx context.Context, c Config) (_ *Fleet, err error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Class = or(c.Class, "A100-80GB")
	c.Renew = or(c.Renew, time.Second)
	c.Lease = or(c.Lease, 5*time.Second)
	c.Dispatchers = or(c.Dispatchers, 1)
	c.Conns = or(c.Conns, 12)
	f := &Fleet{c: c}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	f.stop = stop
	defer func() {
		if err != nil {
			_ = f.Stop()
		}
	}()
	if f.Store, err = f.open(ctx, "agents", c.Conns); err != nil {
		return nil, err
	}
	for i := range c.Dispatchers {
		if err := f.dispatcher(ctx, run, i); err != nil {
			return nil, err
		}
	}
	for i := range c.Agents {
		var labels map[string]string
		if c.Labels != nil {
			labels = c.Labels(i)
		}
		f.agent(run, fmt.Sprintf("bench-%05d", i), labels)
	}
	for _, a := range f.Agents {
		for a.Ready() != nil {
			select {
			case <-ctx.Done():
				return nil, fmt.Errorf("wait for the agents: %w", context.Cause(ctx))
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	return f, nil
}

func or[T comparable](v, otherwise T) T {
	var zero T
	if v == zero {
		return otherwise
	}
	return v
}

func (f *Fleet) open(ctx context.Context, name string, conns int32) (*store.Store, error) {
	st, err := store.Open(ctx, f.c.DatabaseURL, store.Options{Name: "fleet " + name, MaxConns: conns, LeaseConns: 2})
	if err == nil {
		f.closes = append(f.closes, st.Close)
	}
	return st, err
}

func (f *Fleet) dispatcher(ctx, run context.Context, i int) error {
	st, err := f.open(ctx, fmt.Sprint("dispatcher ", i), 8)
	if err != nil {
		return err
	}
	q, err := queue.Dial(f.c.RedisURL)
	if err != nil {
		return err
	}
	f.closes = append(f.closes, func() { _ = q.Close() })
	conf := dispatch.Config{
		Policy: job.Policy{BaseModels: f.c.Models, MaxGPUs: 64}, Place: place.Usual(),
		Poll: time.Second, Resend: time.Second, Accept: 5 * time.Second, Lease: f.c.Lease, Patience: 30 * time.Second, Term: 3 * time.Second,
	}
	if f.c.Dispatch != nil {
		f.c.Dispatch(&conf)
	}
	d := dispatch.New(dispatch.Parts{
		Self:  store.Dispatcher{ID: uuid.NewString(), Name: fmt.Sprint(i)},
		Store: st, Queue: q, Metrics: metrics.NewDispatcher(""), Log: f.c.Log, Config: conf,
	})
	f.wg.Go(func() { f.note(d.Run(run)) })
	return nil
}

func (f *Fleet) agent(run context.Context, id string, labels map[string]string) {
	log := f.c.Log.With("agent", id)
	devices := gpu.Pretend(f.c.GPUs, f.c.Class, id)
	self := store.Agent{ID: id, Boot: uuid.NewString(), Instance: id, Hostname: "here", BaseModels: f.c.Models, Labels: labels, Devices: agent.Offer(devices, nil)}
	a := agent.New(agent.Parts{
		Self: self, Store: f.Store, Ledger: gpu.NewLedger(devices), Metrics: metrics.NewAgent(""), Log: log,
		Config:   agent.Config{Lease: f.c.Lease, Renew: f.c.Renew, OutOfTouch: 15 * time.Minute, HandOver: time.Minute},
		Runner:   &idler{Fleet: f, agent: id},
		NewNonce: uuid.NewString,
	})
	f.Agents = append(f.Agents, a)
	f.wg.Go(func() { f.note(a.Run(run)) })
	f.wg.Go(func() {
		f.note(queue.Serve(run, queue.Server{
			URL: f.c.RedisURL, Agent: id, Concurrency: 2*f.c.GPUs + 4, Log: log, Admit: func() bool { return a.Ready() == nil }, Accept: a.Accept,
		}))
	})
}

func (f *Fleet) note(err error) {
	if err == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err == nil {
		f.err = err
	}
}

// Stop ends the fleet and returns the first error of a part.
func (f *Fleet) Stop() error {
	f.stop()
	f.wg.Wait()
	for _, c := range slices.Backward(f.closes) {
		c()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// idler is a runner whose attempts train nothing and settle at once after.
type idler struct {
	*Fleet
	agent string
}

func (r *idler) Run(ctx context.Context, as job.Assignment, live *attempt.Live) error {
	if r.c.Accepted != nil {
		r.c.Accepted(r.agent, as.Ref)
	}
	if r.c.Work != nil {
		r.c.Work(ctx, as)
	}
	live.Free()
	end := store.End{Outcome: store.OutcomeCompleted, Artifact: &store.Artifact{
		ID: uuid.NewString(), Description: "nothing", Files: map[string]string{}, QualityMetrics: map[string]any{}, TrainingSummary: map[string]any{}, Metrics: map[string]any{},
	}}
	if ctx.Err() != nil {
		end = store.End{Outcome: store.OutcomeHandedBack, Failure: &job.Failure{Kind: job.Preempted, Err: context.Cause(ctx)}}
	}
	// As a real attempt does: until the database has a definite answer.
	for {
		_, err := r.Store.Settle(context.WithoutCancel(ctx), as.Ref, end)
		if err == nil && r.c.Settled != nil {
			r.c.Settled(r.agent, as.Ref)
		}
		if err == nil || job.KindOf(err) == job.LeaseLost || store.IsData(err) {
			return err
		}
		r.c.Log.WarnContext(ctx, "not settled yet", "err", err)
		time.Sleep(20 * time.Millisecond)
	}
}

func (r *idler) Left(context.Context) []attempt.Left                       { return nil }
func (r *idler) Resume(context.Context, attempt.Left, *attempt.Live) error { return nil }
func (r *idler) Discard(context.Context, attempt.Left)                     {}
