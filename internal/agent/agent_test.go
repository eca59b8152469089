package agent_test

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"lorayard/internal/agent"
	"lorayard/internal/attempt"
	"lorayard/internal/gpu"
	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/store"
)

// host is a database that answers as it is told to, and a runner whose attempts
// last until they are stopped.
type host struct {
	accept   func(context.Context) error
	renew    func() error
	deadline time.Time // of the trainer
	ended    []error   // causes with which attempts ended
	begun    chan struct{}
}

func (h *host) Register(context.Context, store.Agent, time.Duration, []job.Ref) ([]job.Ref, error) {
	return nil, nil
}

func (h *host) Renew(_ context.Context, _ store.Agent, _ time.Duration, _ store.AgentState, refs []job.Ref) (store.Wanted, error) {
	w := store.Wanted{Attempts: map[job.Ref]job.Desired{}}
	for _, ref := range refs {
		w.Attempts[ref] = job.DesireRun
	}
	if h.renew != nil {
		return w, h.renew()
	}
	return w, nil
}

func (h *host) Accept(ctx context.Context, _ store.Agent, ref job.Ref) (job.Assignment, error) {
	return job.Assignment{Ref: ref}, h.accept(ctx)
}

func (h *host) Run(ctx context.Context, _ job.Assignment, live *attempt.Live) error {
	live.Attach(h)
	close(h.begun)
	<-ctx.Done()
	h.ended = append(h.ended, context.Cause(ctx))
	return nil
}

func (h *host) Extend(d time.Duration) error                              { h.deadline = time.Now().Add(d); return nil }
func (h *host) Kill()                                                     {}
func (h *host) Left(context.Context) []attempt.Left                       { return nil }
func (h *host) Resume(context.Context, attempt.Left, *attempt.Live) error { return nil }
func (h *host) Discard(context.Context, attempt.Left)                     {}

const outOfTouch = 5 * time.Second

func (h *host) agent() *agent.Agent {
	h.begun = make(chan struct{})
	began := time.Now()
	return agent.New(agent.Parts{
		Store: h, Runner: h, Ledger: gpu.NewLedger(nil), Metrics: metrics.NewAgent(""), Log: slog.New(slog.DiscardHandler),
		Config:   agent.Config{Lease: 5 * time.Second, Renew: time.Second, OutOfTouch: outOfTouch},
		NewNonce: func() string { return "n" }, Clock: func() time.Duration { return time.Since(began) },
	})
}

func TestAnAcceptWithoutAnAnswerHoldsItsDevicesForSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		h := &host{accept: func(ctx context.Context) error { asked++; <-ctx.Done(); return ctx.Err() }}
		a := h.agent()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- a.Run(ctx) }()
		synctest.Wait()
		began := time.Now()
		if err := a.Accept(t.Context(), job.Task{Ref: job.Ref{Job: "j", Attempt: 1}}); err == nil {
			t.Error("it was accepted")
		}
		if took := time.Since(began); asked != 2 || took > 9*time.Second {
			t.Errorf("asked %d times in %v", asked, took)
		}
		cancel()
		<-done
	})
}

func TestATrainersTimeCountsFromTheLastRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var last time.Time
		h := &host{accept: func(context.Context) error { return nil }, renew: func() error { last = time.Now(); return nil }}
		a := h.agent()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- a.Run(ctx) }()
		time.Sleep(1700 * time.Millisecond)
		if err := a.Accept(t.Context(), job.Task{Ref: job.Ref{Job: "j", Attempt: 1}}); err != nil {
			t.Fatal(err)
		}
		<-h.begun
		if d := h.deadline.Sub(last); d != outOfTouch {
			t.Errorf("it may train for %v after the last renewal", d)
		}
		cancel()
		<-done
	})
}

// A renewal that fails is no reason to let a task lie: the lease is what counts.
func TestTasksAreTakenForAsLongAsTheLeaseLasts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cut := errors.New("cut")
		var away atomic.Bool
		var answered atomic.Int64 // when a renewal last was
		h := &host{renew: func() error {
			if away.Load() {
				return cut
			}
			answered.Store(time.Now().UnixNano())
			return nil
		}}
		a := h.agent()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- a.Run(ctx) }()
		time.Sleep(1700 * time.Millisecond)
		away.Store(true)
		until := time.Unix(0, answered.Load()).Add(5 * time.Second)
		time.Sleep(time.Until(until) - time.Millisecond)
		if err := a.Ready(); err != nil {
			t.Errorf("with the lease in hand: %v", err)
		}
		time.Sleep(2 * time.Millisecond)
		if err := a.Ready(); !errors.Is(err, cut) {
			t.Errorf("after the lease: %v", err)
		}
		away.Store(false)
		time.Sleep(2 * time.Second)
		if err := a.Ready(); err != nil {
			t.Errorf("in touch again: %v", err)
		}
		cancel()
		<-done
	})
}

func TestADrainWaitsForAnAcceptUnderWayAndHandsItBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &host{accept: func(context.Context) error { time.Sleep(3 * time.Second); return nil }}
		a := h.agent()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- a.Run(ctx) }()
		synctest.Wait()
		accepted := make(chan error, 1)
		go func() { accepted <- a.Accept(context.Background(), job.Task{Ref: job.Ref{Job: "j", Attempt: 1}}) }()
		time.Sleep(time.Second)
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(h.ended, []error{attempt.ErrPreempted}) {
			t.Errorf("when the agent ended, its attempts had ended with %v", h.ended)
		}
		if err := <-accepted; err != nil {
			t.Error(err)
		}
	})
}

func TestAReplacedAgentHasEndedWhatItWasAboutToBegin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		h := &host{
			accept: func(context.Context) error { time.Sleep(3 * time.Second); return nil },
			renew: func() error {
				if time.Since(began) < 500*time.Millisecond {
					return nil
				}
				return store.ErrReplaced
			},
		}
		a := h.agent()
		done := make(chan error, 1)
		go func() { done <- a.Run(t.Context()) }()
		synctest.Wait()
		go func() { _ = a.Accept(context.Background(), job.Task{Ref: job.Ref{Job: "j", Attempt: 1}}) }()
		if err := <-done; !errors.Is(err, store.ErrReplaced) {
			t.Fatal(err)
		}
		if !slices.Equal(h.ended, []error{attempt.ErrLeaseLost}) {
			t.Errorf("when the agent ended, its attempts had ended with %v", h.ended)
		}
		time.Sleep(10 * time.Second) // for what is left behind, if it is
	})
}
