package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"time"

	"lorayard/internal/fleet"
	"lorayard/internal/job"
	"lorayard/internal/queue/queuebench"
)

// throughput puts jobs through insert, admit, place, assign, send, accept and
// settle, with work that does nothing: the control plane is all there is.
func throughput(ctx context.Context, g *ground, o options) (_ queuebench.Table, err error) {
	f, err := g.lend(ctx)
	if err != nil {
		return queuebench.Table{}, err
	}
	defer func() { err = errors.Join(err, f.done(ctx)) }()
	agents, gpus, users := 20, 8, 20
	each := max(o.jobs/users, 1)
	if o.quick {
		agents, users, each = 4, 4, 25
	}
	n := users * each
	type person struct{ user, dataset string }
	people := make([]person, users)
	for i := range people {
		if people[i].user, people[i].dataset, err = f.user(ctx); err != nil {
			return queuebench.Table{}, err
		}
	}
	settled := make(chan struct{}, 1<<16)
	fl, err := fleet.Start(ctx, fleet.Config{
		DatabaseURL: f.url, RedisURL: g.redis.URL(), Agents: agents, GPUs: gpus, Models: []string{model},
		Settled: func(string, job.Ref) { settled <- struct{}{} },
	})
	if err != nil {
		return queuebench.Table{}, err
	}
	defer func() { err = errors.Join(err, fl.Stop()) }()
	before, err := f.spent()
	if err != nil {
		return queuebench.Table{}, err
	}
	began := time.Now()
	for _, p := range people {
		if err := f.insertMany(ctx, p.user, p.dataset, each); err != nil {
			return queuebench.Table{}, err
		}
	}
	inserted := time.Since(began)
	if err := await(ctx, settled, n, 3*time.Minute); err != nil {
		return queuebench.Table{}, err
	}
	took := time.Since(began)
	after, err := f.spent()
	if err != nil {
		return queuebench.Table{}, err
	}
	used := after.since(before)
	cores := float64(runtime.NumCPU())
	rate := float64(n) / took.Seconds()
	t := table(fmt.Sprintf("Throughput: %d jobs of 1 GPU, %d agents × %d GPUs, work that does nothing", n, agents, gpus),
		goal{what: "jobs/s from the first INSERT to the last settlement", ours: fmt.Sprintf("%.0f", rate), goal: "≥ 1000", met: yes(rate >= 1000)},
		goal{what: "  of that: inserting", ours: fmt.Sprintf("%.2f s of %.2f s", inserted.Seconds(), took.Seconds())},
		goal{what: "  CPU of a job", ours: used.each(n)},
		goal{what: "  jobs/s if all cores were ours", ours: fmt.Sprintf("%.0f", float64(n)/used.all().Seconds()*cores)},
		goal{what: "  cores that were ours", ours: fmt.Sprintf("%.2f of %.0f", used.all().Seconds()/took.Seconds(), cores)},
	)
	t.Figures["jobs/s"] = rate
	return t, nil
}
