package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"lorayard/internal/fleet"
	"lorayard/internal/job"
	"lorayard/internal/queue/queuebench"
)

// handover is the time from the app's INSERT to the accept under the fence on
// an idle fleet. The baselines are Asynq alone, from a send to its handler:
// without a row, an admission, a placement or a fence.
func handover(ctx context.Context, g *ground, o options) (_ queuebench.Table, err error) {
	samples, warm, stockAgents, stockEach := 400, 10, 40, 5
	if o.quick {
		samples, warm, stockAgents, stockEach = 4, 1, 2, 1
	}
	slow, err := queuebench.Stock(ctx, g.redis.URL(), 0, stockAgents, stockEach)
	if err != nil {
		return queuebench.Table{}, err
	}
	quick, err := queuebench.Stock(ctx, g.redis.URL(), 50*time.Millisecond, 4, (samples+3)/4)
	if err != nil {
		return queuebench.Table{}, err
	}
	f, err := g.lend(ctx)
	if err != nil {
		return queuebench.Table{}, err
	}
	defer func() { err = errors.Join(err, f.done(ctx)) }()
	user, dataset, err := f.user(ctx)
	if err != nil {
		return queuebench.Table{}, err
	}
	acc := accepts{at: map[job.ID]time.Time{}, news: make(chan struct{}, 1)}
	fl, err := fleet.Start(ctx, fleet.Config{
		DatabaseURL: f.url, RedisURL: g.redis.URL(), Agents: 10, GPUs: 8, Models: []string{model},
		Accepted: func(_ string, ref job.Ref) { acc.heard(ref.Job, time.Now()) },
	})
	if err != nil {
		return queuebench.Table{}, err
	}
	defer func() { err = errors.Join(err, fl.Stop()) }()

	var whole []time.Duration
	var steps [5][]time.Duration // insert and commit, admit, assign, accept, hear
	for n := range samples + warm {
		if err := sleep(ctx, 30*time.Millisecond+rand.N(50*time.Millisecond)); err != nil {
			return queuebench.Table{}, err
		}
		began, id, err := f.insertTimed(ctx, user, dataset)
		if err != nil {
			return queuebench.Table{}, err
		}
		committed := time.Now()
		heard, err := acc.wait(ctx, job.ID(id), 30*time.Second)
		if err != nil {
			return queuebench.Table{}, err
		}
		if n < warm { // warms everything up
			continue
		}
		var admitted, assigned, accepted time.Time
		err = f.pool.QueryRow(ctx, `SELECT j.admitted_at, a.assigned_at, a.accepted_at FROM lorayard.jobs j JOIN lorayard.attempts a USING (job_id) WHERE job_id = $1 AND a.attempt = 1`, id).Scan(&admitted, &assigned, &accepted)
		if err != nil {
			return queuebench.Table{}, fmt.Errorf("read the times of job %s: %w", id, err)
		}
		whole = append(whole, heard.Sub(began))
		for i, pair := range [][2]time.Time{{began, committed}, {committed, admitted}, {admitted, assigned}, {assigned, accepted}, {accepted, heard}} {
			steps[i] = append(steps[i], pair[1].Sub(pair[0]))
		}
	}
	slices.Sort(whole)
	p50, p99 := at(whole, .5), at(whole, .99)
	rows := []goal{
		{what: "p50", baseline: "Asynq, default (1 s): " + ms(at(slow, .5)), ours: ms(p50), ratio: times(at(slow, .5), p50), goal: "≤ 3 ms", met: yes(p50 <= 3*time.Millisecond)},
		{what: "p99", baseline: "Asynq, default (1 s): " + ms(at(slow, .99)), ours: ms(p99), ratio: times(at(slow, .99), p99), goal: "≤ 20 ms", met: yes(p99 <= 20*time.Millisecond)},
		{what: "p50", baseline: "Asynq at 50 ms: " + ms(at(quick, .5)), ours: ms(p50), ratio: times(at(quick, .5), p50)},
		{what: "p99", baseline: "Asynq at 50 ms: " + ms(at(quick, .99)), ours: ms(p99), ratio: times(at(quick, .99), p99)},
	}
	for i, name := range []string{"INSERT and COMMIT", "notify, round begins, admit begins", "admit, place, assign", "send, wake, dequeue, accept", "COMMIT, the agent has it"} {
		slices.Sort(steps[i])
		rows = append(rows, goal{what: "  " + name, ours: fmt.Sprintf("p50 %s, p99 %s", ms(at(steps[i], .5)), ms(at(steps[i], .99)))})
	}
	t := table(fmt.Sprintf("INSERT to fenced accept, idle fleet of 10, %d samples", len(whole)), rows...)
	t.Figures["ms-p50"], t.Figures["ms-p99"] = p50.Seconds()*1e3, p99.Seconds()*1e3
	return t, nil
}

// times says how many times shorter ours is.
func times(baseline, ours time.Duration) string {
	return fmt.Sprintf("× %.0f", float64(baseline)/float64(ours))
}

// sleep waits for d or the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}

// accepts are the moments at which agents accepted.
type accepts struct {
	mu   sync.Mutex
	at   map[job.ID]time.Time
	news chan struct{}
}

func (a *accepts) heard(id job.ID, at time.Time) {
	a.mu.Lock()
	a.at[id] = at
	a.mu.Unlock()
	select {
	case a.news <- struct{}{}:
	default:
	}
}

// wait returns when job id was accepted; one goroutine may wait.
func (a *accepts) wait(ctx context.Context, id job.ID, patience time.Duration) (time.Time, error) {
	late := time.NewTimer(patience)
	defer late.Stop()
	for {
		a.mu.Lock()
		at, ok := a.at[id]
		delete(a.at, id)
		a.mu.Unlock()
		if ok {
			return at, nil
		}
		select {
		case <-a.news:
		case <-late.C:
			return time.Time{}, fmt.Errorf("job %s was not accepted in %v", id, patience)
		case <-ctx.Done():
			return time.Time{}, context.Cause(ctx)
		}
	}
}
