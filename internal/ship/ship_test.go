package ship_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/ship"
	"lorayard/internal/spool"
)

// table is a sink that knows when what came.
type table struct {
	mu      sync.Mutex
	shown   []time.Time     // when progress came
	last    job.Progress    // and the newest
	behind  []time.Duration // of each sample
	perCall time.Duration
}

func (k *table) Append(_ context.Context, _ job.Ref, samples []job.Sample, _ []job.Line, p *job.Progress) error {
	time.Sleep(k.perCall)
	k.mu.Lock()
	defer k.mu.Unlock()
	now := time.Now()
	for _, s := range samples {
		k.behind = append(k.behind, now.Sub(s.At))
	}
	if p != nil {
		k.shown, k.last = append(k.shown, now), *p
	}
	return nil
}

// A job's row is what Realtime publishes: it changes once a second at most,
// however fast the steps are, and no sample is a second behind.
func TestARowChangesOnceASecondAtMost(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		sp, err := spool.Open(dir, 1<<30)
		if err != nil {
			t.Fatal(err)
		}
		defer sp.Close()
		sink := &table{perCall: 5 * time.Millisecond}
		s := ship.New(job.Ref{Job: "j", Attempt: 1}, sp, sink, func(error) bool { return false }, metrics.NewAgent(""), slog.New(slog.DiscardHandler))
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- s.Run(ctx) }()

		const steps, step = 10_000, time.Millisecond
		for i := range steps {
			raw, err := json.Marshal(map[string]any{"v": 1, "ev": "sample", "ts": time.Now().UnixMilli(), "step": i + 1, "loss": 1})
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Accept(raw); err != nil {
				t.Fatal(err)
			}
			s.Show(job.Progress{Status: job.Running, Step: i + 1})
			time.Sleep(step)
		}
		time.Sleep(2 * time.Second) // nothing more comes, and the last is shown
		stop()
		if err := <-done; err != nil {
			t.Fatal(err)
		}

		if got := len(sink.shown); got < 8 || got > 12 {
			t.Errorf("the row changed %d times in 10 s", got)
		}
		for i := 1; i < len(sink.shown); i++ {
			if d := sink.shown[i].Sub(sink.shown[i-1]); d < 990*time.Millisecond {
				t.Errorf("change %d came %v after the one before", i, d)
			}
		}
		if sink.last.Step != steps {
			t.Errorf("the last step shown is %d", sink.last.Step)
		}
		if len(sink.behind) != steps {
			t.Errorf("%d of %d samples arrived", len(sink.behind), steps)
		}
		for _, d := range sink.behind {
			if d > time.Second+3*sink.perCall {
				t.Fatalf("a sample was %v behind", d)
			}
		}
	})
}
