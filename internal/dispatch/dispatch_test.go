package dispatch_test

import (
	"context"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"lorayard/internal/dispatch"
	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/queue"
	"lorayard/internal/store"
)

// oneAgent is a database in which one agent runs one job and stops renewing.
// What the test does not need is not there.
type oneAgent struct {
	dispatch.Store
	lapses time.Time // when the agent may be judged
	judged chan time.Time
}

func (s *oneAgent) Campaign(context.Context, store.Dispatcher, time.Duration) (int64, error) {
	return 1, nil
}
func (s *oneAgent) Resign(context.Context, string) error             { return nil }
func (s *oneAgent) Listen(ctx context.Context, _ func(string)) error { <-ctx.Done(); return ctx.Err() }

func (s *oneAgent) Unadmitted(context.Context, int, []job.ID) ([]store.Row, error) { return nil, nil }

func (s *oneAgent) Rates(context.Context) (map[string]int64, error) { return nil, nil }

func (s *oneAgent) Waiting(context.Context, int, []job.ID) ([]store.Waiting, error) { return nil, nil }

func (s *oneAgent) Hosts(context.Context) ([]store.Host, error) { return nil, nil }

func (s *oneAgent) SettleCancelled(context.Context) ([]job.ID, error) { return nil, nil }

func (s *oneAgent) Depths(context.Context) (map[string]int, error) { return nil, nil }

func (s *oneAgent) Resend(context.Context, time.Duration) ([]store.Send, error) { return nil, nil }

func (s *oneAgent) TakeBack(context.Context, time.Duration, []string) ([]job.Ref, error) {
	return nil, nil
}

func (s *oneAgent) Reap(context.Context, string, time.Duration, time.Duration) ([]job.Ref, error) {
	if time.Now().After(s.lapses) {
		select {
		case s.judged <- time.Now():
		default:
		}
		return []job.Ref{{Job: "j", Attempt: 1}}, nil
	}
	return nil, nil
}

func (s *oneAgent) NextLapse(context.Context, time.Duration) (time.Duration, error) {
	return max(0, time.Until(s.lapses)), nil
}

func TestASilentAgentIsJudgedWhenItsLeaseRunsOutAndNotAtTheNextPoll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &oneAgent{lapses: time.Now().Add(3400 * time.Millisecond), judged: make(chan time.Time, 1)}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		d := dispatch.New(dispatch.Parts{
			Store: s, Metrics: metrics.NewDispatcher(""), Log: slog.New(slog.DiscardHandler),
			Config: dispatch.Config{Poll: time.Second, Term: 3 * time.Second},
		})
		go d.Run(ctx)
		if late := (<-s.judged).Sub(s.lapses); late > 50*time.Millisecond {
			t.Errorf("judged %v after its lease", late)
		}
	})
}

// gone is a database in which the host that the leader knows is gone when the
// first job comes, and another one is there.
type gone struct {
	oneAgent
	moved    atomic.Bool // the other host is there
	assigned chan string
}

func (s *gone) host() string {
	if s.moved.Load() {
		return "new"
	}
	return "old"
}

func (s *gone) Listen(ctx context.Context, wake func(string)) error {
	time.Sleep(100 * time.Millisecond)
	s.moved.Store(true)
	wake("job:j")
	<-ctx.Done()
	return ctx.Err()
}

func (s *gone) Hosts(context.Context) ([]store.Host, error) {
	return []store.Host{{Agent: s.host(), Devices: []store.Device{{UUID: "GPU-1", Class: "H100", MemoryBytes: 80e9}}}}, nil
}
func (s *gone) Users(context.Context) ([]store.User, error) { return nil, nil }
func (s *gone) Rates(context.Context) (map[string]int64, error) {
	return map[string]int64{"H100": 1}, nil
}
func (s *gone) Running(context.Context) ([]store.Running, error) { return nil, nil }
func (s *gone) SetWaiting(context.Context, []store.Wait) error   { return nil }
func (s *gone) Waiting(_ context.Context, _ int, only []job.ID) ([]store.Waiting, error) {
	if s.host() == "old" {
		return nil, nil
	}
	return []store.Waiting{{ID: "j", User: "u", Spec: job.Spec{GPUCount: 1}}}, nil
}

func (s *gone) Assign(_ context.Context, as []store.Assignment) ([]store.Send, error) {
	if as[0].Agent == "old" {
		return nil, nil
	}
	s.assigned <- as[0].Agent
	return []store.Send{{Agent: as[0].Agent, Task: job.Task{Ref: job.Ref{Job: "j", Attempt: 1}}}}, nil
}

type noQueue struct{}

func (noQueue) SendAll(_ context.Context, sends []queue.Send) []error {
	return make([]error, len(sends))
}

func TestAJobForAHostThatIsGoneIsPlacedAgainAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &gone{assigned: make(chan string, 10)}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		d := dispatch.New(dispatch.Parts{
			Store: s, Queue: noQueue{}, Metrics: metrics.NewDispatcher(""), Log: slog.New(slog.DiscardHandler),
			Config: dispatch.Config{Poll: time.Second, Term: 3 * time.Second},
		})
		began := time.Now()
		go d.Run(ctx)
		if agent := <-s.assigned; agent != "new" || time.Since(began) > 200*time.Millisecond {
			t.Errorf("assigned to %s after %v", agent, time.Since(began))
		}
	})
}
