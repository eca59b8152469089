package dispatch_test

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"lorayard/internal/dispatch"
	"lorayard/internal/job"
	"lorayard/internal/metrics"
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
			Store: s, Metrics: metrics.NewDispatcher(), Log: slog.New(slog.DiscardHandler),
			Config: dispatch.Config{Poll: time.Second, Term: 3 * time.Second},
		})
		go d.Run(ctx)
		if late := (<-s.judged).Sub(s.lapses); late > 50*time.Millisecond {
			t.Errorf("judged %v after its lease", late)
		}
	})
}
