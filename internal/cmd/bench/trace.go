package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"lorayard/internal/dispatch"
	"lorayard/internal/fleet"
	"lorayard/internal/job"
	"lorayard/internal/queue/queuebench"
	"lorayard/internal/storetest"
)

// size is one kind of job of the fleet trace: a queue submits n of them, one
// every so often. The work is real sleep.
type size struct {
	name        string
	n, slots    int
	every, runs time.Duration
	ideal       float64 // mean wait without any overhead, s
}

// idealMakespan is that of the trace when nothing takes any time but the work.
const idealMakespan = 67.1

// trace is Kueue's performance trace on the real control plane: 5 cohorts of 6
// queues; a slot is a GPU, a queue is a user who may use 120 GPUs (its quota of
// 20 and up to 100 borrowed ones; the quota is the fair share of equal weights),
// a cohort is a label that 6 hosts of 20 GPUs carry.
func trace(ctx context.Context, g *ground, o options) (_ queuebench.Table, err error) {
	sizes := []size{
		{"small", 350, 1, 100 * time.Millisecond, 200 * time.Millisecond, 0.25},
		{"medium", 100, 5, 500 * time.Millisecond, 500 * time.Millisecond, 12.0},
		{"large", 50, 20, 1200 * time.Millisecond, time.Second, 41.4},
	}
	cohorts, queues, hosts := 5, 6, 6
	if o.quick {
		cohorts, queues, hosts = 1, 2, 2
		for i := range sizes {
			sizes[i].n /= 50
		}
	}
	f, err := g.lend(ctx)
	if err != nil {
		return queuebench.Table{}, err
	}
	defer func() { err = errors.Join(err, f.done(ctx)) }()
	users := make([][2]string, cohorts*queues)
	for i := range users {
		if users[i][0], users[i][1], err = f.user(ctx); err != nil {
			return queuebench.Table{}, err
		}
	}
	runs := map[int]time.Duration{}
	for _, s := range sizes {
		runs[s.slots] = s.runs
	}
	settled := make(chan struct{}, 1<<16)
	fl, err := fleet.Start(ctx, fleet.Config{
		DatabaseURL: f.url, RedisURL: g.redis.URL(), Agents: cohorts * hosts, GPUs: 20, Models: []string{model},
		Settled:  func(string, job.Ref) { settled <- struct{}{} },
		Labels:   func(i int) map[string]string { return map[string]string{"cohort": fmt.Sprint(i / hosts)} },
		Dispatch: func(c *dispatch.Config) { c.UserGPUs = 120 },
		Work:     func(ctx context.Context, as job.Assignment) { _ = sleep(ctx, runs[len(as.Devices)]) },
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
	late, total, err := f.submit(ctx, began, sizes, users, queues)
	if err != nil {
		return queuebench.Table{}, err
	}
	if err := await(ctx, settled, total, 4*time.Minute); err != nil {
		return queuebench.Table{}, err
	}
	took := time.Since(began).Seconds()
	after, err := f.spent()
	if err != nil {
		return queuebench.Table{}, err
	}
	used := after.since(before)
	rows := []goal{{what: "wall time", baseline: fmt.Sprintf("%.1f s, no overhead at all", idealMakespan), ours: fmt.Sprintf("%.1f s", took), ratio: fmt.Sprintf("× %.2f", took/idealMakespan), goal: "≤ 80 s", met: yes(took <= 80)}}
	for _, s := range sizes {
		var mean, longest float64
		err := f.pool.QueryRow(ctx, `SELECT avg(w)::float8, max(w)::float8 FROM (
			SELECT extract(epoch FROM a.accepted_at - t.created_at) AS w FROM training_jobs t JOIN lorayard.attempts a ON a.job_id = t.id AND a.attempt = 1 WHERE cardinality(a.devices) = $1) x`, s.slots).Scan(&mean, &longest)
		if err != nil {
			return queuebench.Table{}, fmt.Errorf("read the waits: %w", err)
		}
		rows = append(rows, goal{what: fmt.Sprintf("mean wait, %s (%d × %d GPUs)", s.name, s.n*len(users), s.slots), baseline: fmt.Sprintf("%.2f s", s.ideal), ours: fmt.Sprintf("%.2f s, longest %.1f s", mean, longest), ratio: fmt.Sprintf("× %.2f", mean/s.ideal)})
	}
	rows = append(
		rows,
		goal{what: "  CPU of a job", ours: used.each(total)},
		goal{what: "  cores that were ours", ours: fmt.Sprintf("%.2f of %d", used.all().Seconds()/took, runtime.NumCPU())},
		goal{what: "  latest submission behind its time", ours: ms(late)},
	)
	return table(fmt.Sprintf("Fleet trace: %d jobs of %d queues in %d cohorts, %d GPUs, work that sleeps", total, len(users), cohorts, cohorts*hosts*20), rows...), nil
}

// submit inserts every job at its time, those of one moment in one transaction.
func (f *field) submit(ctx context.Context, began time.Time, sizes []size, users [][2]string, queues int) (late time.Duration, total int, err error) {
	type moment struct {
		at time.Duration
		s  size
	}
	var plan []moment
	for _, s := range sizes {
		for i := range s.n {
			plan = append(plan, moment{time.Duration(i+1) * s.every, s})
		}
	}
	slices.SortStableFunc(plan, func(a, b moment) int { return int(a.at - b.at) })
	for _, m := range plan {
		if err := sleep(ctx, time.Until(began.Add(m.at))); err != nil {
			return 0, 0, err
		}
		b := &pgx.Batch{}
		for i, u := range users {
			gpus := fmt.Sprintf(`{"type": "A100-80GB", "count": %d, "labels": {"cohort": "%d"}}`, m.s.slots, i/queues)
			b.Queue(storetest.InsertJob, u[0], u[1], "balanced", storetest.Hyperparameters, gpus)
			total++
		}
		if err := f.pool.SendBatch(ctx, b).Close(); err != nil {
			return 0, 0, fmt.Errorf("insert jobs: %w", err)
		}
		late = max(late, time.Since(began)-m.at)
	}
	return late, total, nil
}
