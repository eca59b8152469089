package attempt

import (
	"math"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/trainer"
)

// Standing is what an operator sees of an attempt under way.
type Standing struct {
	Stage           job.Stage
	Step, Steps     int
	Loss            float64   // nats a token; NaN: not known
	TokensPerSecond float64   // NaN: not known
	Saved           time.Time // of the newest checkpoint in Storage; zero: none
	SpoolRecords    int       // samples and lines that are not in Postgres yet
	SpoolBytes      int64
	SpoolOldest     time.Time // since when the oldest of them waits; zero: none does
}

// tells gives Standing its answer; nil ends that.
func (l *Live) tells(from func() Standing) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.standing = from
}

// Standing is how the attempt stands now.
func (l *Live) Standing() Standing {
	l.mu.Lock()
	from := l.standing
	l.mu.Unlock()
	if from == nil {
		return Standing{Loss: math.NaN(), TokensPerSecond: math.NaN()}
	}
	return from()
}

func (x *run) stands() Standing {
	x.mu.Lock()
	s := x.standing
	x.mu.Unlock()
	s.SpoolRecords, s.SpoolBytes, s.SpoolOldest = x.ship.Waiting()
	return s
}

// account is what the GPU time of an attempt was good for, in seconds of
// training. x.mu is held around all of it.
type account struct {
	trained float64
	saved   map[int]float64 // trained until the checkpoint of a step
	kept    float64         // until the newest one in Storage
}

// reckon takes an event into standing, account and counters. What was dealt with
// by the process before was counted by it.
func (x *run) reckon(e trainer.Event) {
	x.mu.Lock()
	defer x.mu.Unlock()
	switch e.Ev {
	case "plan":
		x.standing.Step, x.standing.Steps = e.StartStep, e.TotalSteps
	case "sample":
		x.standing.Step, x.standing.TokensPerSecond = e.Step, float64(e.TokensPerSecond)
		if !e.Skipped {
			x.standing.Loss = float64(e.Loss)
		}
		if e.Old {
			return
		}
		x.account.trained += float64(e.Seconds)
		x.Metrics.Steps.Inc()
		x.Metrics.Tokens.Add(float64(e.Tokens))
		x.Metrics.StepSeconds.Observe(float64(e.Seconds))
		if e.Skipped {
			x.Metrics.Skipped.Inc()
		}
	case "checkpoint":
		if x.account.saved == nil {
			x.account.saved = map[int]float64{}
		}
		x.account.saved[e.Step] = x.account.trained
	}
}

// kept notes that a checkpoint is in Storage: what was trained until then is not
// lost with the attempt.
func (x *run) kept(step int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.published = max(x.published, step)
	x.standing.Saved = time.Now()
	x.account.kept = max(x.account.kept, x.account.saved[step])
}

// close counts what the attempt's GPU time was good for.
func (x *run) close(completed bool) {
	x.mu.Lock()
	a := x.account
	x.mu.Unlock()
	if completed {
		a.kept = a.trained
	}
	n := float64(len(x.as.Devices))
	count := func(use string, seconds float64) { x.Metrics.GPUSeconds.WithLabelValues(use).Add(max(0, n*seconds)) }
	count("useful", a.kept)
	count("wasted", a.trained-a.kept)
	count("overhead", time.Since(x.began).Seconds()-a.trained)
}
