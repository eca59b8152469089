package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"lorayard/internal/fleet"
	"lorayard/internal/queue/queuebench"
)

// idle measures what agents without work cost: Redis beside stock polling, and
// Postgres with the agents' renewals.
func idle(ctx context.Context, g *ground, o options) (_ queuebench.Table, err error) {
	// Four connections an agent: Redis's usual maxclients of 10,000 ends at 2,400,
	// the ports of one address at 7,000.
	counts, window := []int{1000, 2000}, 15*time.Second
	if o.quick {
		counts, window = []int{3}, 2*time.Second
	}
	if err := g.redis.FlushAll(ctx); err != nil {
		return queuebench.Table{}, err
	}
	t, err := queuebench.Idle(ctx, g.redis.URL(), window, counts...)
	if err != nil {
		return queuebench.Table{}, err
	}
	var rows []goal
	for _, n := range counts {
		ours, stock := t.Figures[fmt.Sprintf("%%core-gate-%d", n)], t.Figures[fmt.Sprintf("%%core-stock-%d", n)]
		rows = append(rows, goal{
			what: fmt.Sprintf("Redis, %d agents waiting for work", n), baseline: fmt.Sprintf("Asynq, default: %.1f %% of a core", stock), ours: fmt.Sprintf("%.1f %% of a core", ours),
			ratio: fmt.Sprintf("× %.1f", stock/ours), goal: "≤ 7 %", met: yes(ours <= 7),
		})
	}
	whole, err := idleFleet(ctx, g, counts[0], window)
	if err != nil {
		return queuebench.Table{}, err
	}
	return table(fmt.Sprintf("Idle agents in one process, %v each", window), append(rows, whole...)...), nil
}

// idleFleet measures whole agents, which renew their leases every second.
func idleFleet(ctx context.Context, g *ground, n int, window time.Duration) (_ []goal, err error) {
	f, err := g.lend(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.done(ctx)) }()
	// A lease that lasts: a thousand agents that register at once take a while.
	fl, err := fleet.Start(ctx, fleet.Config{DatabaseURL: f.url, RedisURL: g.redis.URL(), Agents: n, GPUs: 8, Models: []string{model}, Lease: 15 * time.Second})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, fl.Stop()) }()
	if err := sleep(ctx, 5*time.Second); err != nil { // starting is not idling
		return nil, err
	}
	before, err := f.spent()
	if err != nil {
		return nil, err
	}
	began := time.Now()
	if err := sleep(ctx, window); err != nil {
		return nil, err
	}
	after, err := f.spent()
	if err != nil {
		return nil, err
	}
	used, s := after.since(before), time.Since(began).Seconds()
	var held int
	if err := f.pool.QueryRow(ctx, `SELECT count(*) FROM lorayard.agents WHERE lease_until > now()`).Scan(&held); err != nil {
		return nil, fmt.Errorf("count leases: %w", err)
	}
	share := func(d time.Duration) string { return fmt.Sprintf("%.1f %% of a core", d.Seconds()/s*100) }
	return []goal{
		{what: fmt.Sprintf("%d whole agents: Redis", n), ours: share(used.redis)},
		{what: "  Postgres, a renewal a second each", ours: share(used.postgres)},
		{what: "  the process with all agents and a dispatcher", ours: share(used.self)},
		{what: "  leases held at the end", ours: fmt.Sprint(held), goal: fmt.Sprint(n), met: yes(held == n)},
	}, nil
}

// queued measures the memory of a real dispatcher with a long queue: 10,000 jobs
// of 1,000 users, and 1,000 cordoned hosts of 8 devices, which it looks at for
// each of them and for the reasons.
func queued(ctx context.Context, _ *ground, o options) (_ queuebench.Table, err error) {
	users, each, hosts, watch := 1000, 10, 1000, 20*time.Second
	if o.quick {
		users, each, hosts, watch = 10, 10, 10, 3*time.Second
	}
	y, err := openYard(ctx, o, 0, "LOG_LEVEL=warn")
	if err != nil {
		return queuebench.Table{}, err
	}
	defer func() { err = errors.Join(err, y.done(ctx)) }()
	pid := y.dispatcher.PID()
	empty, _, err := memory(pid)
	if err != nil {
		return queuebench.Table{}, err
	}
	for _, sql := range []string{
		`INSERT INTO lorayard.agents (id, boot, base_models, cordoned, lease_until) SELECT 'host-' || n, gen_random_uuid(), ARRAY['` + model + `'], true, now() + interval '1 hour' FROM generate_series(1, ` + strconv.Itoa(hosts) + `) n`,
		`INSERT INTO lorayard.devices (uuid, agent_id, index, name, class, memory_bytes) SELECT 'GPU-' || n || '-' || d, 'host-' || n, d, 'A100', 'A100-80GB', 80000000000 FROM generate_series(1, ` + strconv.Itoa(hosts) + `) n, generate_series(0, 7) d`,
		`INSERT INTO auth.users (id) SELECT gen_random_uuid() FROM generate_series(1, ` + strconv.Itoa(users) + `)`,
		`INSERT INTO datasets (user_id, name, storage_path, file_name, file_size, status, training_ready) SELECT id, 'talks', id || '/train.jsonl', 'train.jsonl', 1000, 'ready', true FROM auth.users`,
		`INSERT INTO training_jobs (user_id, dataset_id, preset_id, hyperparameters, gpu_config, status, current_stage, total_epochs, total_steps, current_metrics, estimated_total_cost)
			SELECT d.user_id, d.id, 'balanced', '{"learning_rate": 5e-5, "batch_size": 4, "epochs": 3, "rank": 16, "alpha": 32, "dropout": 0.1}', '{"type": "A100-80GB", "count": 1}', 'queued', 'queued', 3, 120, '{}', 2.5
			FROM datasets d, generate_series(1, ` + strconv.Itoa(each) + `)`,
	} {
		if _, err := y.Pool.Exec(ctx, sql); err != nil {
			return queuebench.Table{}, fmt.Errorf("fill the queue: %w", err)
		}
	}
	n := users * each
	for waiting := 0; waiting < n; {
		if err := y.Pool.QueryRow(ctx, `SELECT count(*) FROM lorayard.jobs WHERE state = 'queued' AND waiting <> ''`).Scan(&waiting); err != nil {
			return queuebench.Table{}, fmt.Errorf("count the queue: %w", err)
		}
		if err := sleep(ctx, 200*time.Millisecond); err != nil {
			return queuebench.Table{}, err
		}
	}
	before, err := spentBy(pid)
	if err != nil {
		return queuebench.Table{}, err
	}
	if err := sleep(ctx, watch); err != nil {
		return queuebench.Table{}, err
	}
	after, err := spentBy(pid)
	if err != nil {
		return queuebench.Table{}, err
	}
	now, most, err := memory(pid)
	if err != nil {
		return queuebench.Table{}, err
	}
	const limit = 512 << 20
	mb := func(n int64) string { return fmt.Sprintf("%.0f MiB", float64(n)/(1<<20)) }
	return table(fmt.Sprintf("A dispatcher process with %d jobs queued by %d users, and %d hosts × 8 GPUs that take nothing", n, users, hosts),
		goal{what: "memory, the most since it started (RSS)", ours: mb(most), goal: "< 512 MiB", met: yes(most < limit)},
		goal{what: "  after", ours: fmt.Sprintf("%s (%s with nothing queued)", mb(now), mb(empty))},
		goal{what: "  its CPU while nothing comes", ours: fmt.Sprintf("%.0f %% of a core", (after-before).Seconds()/watch.Seconds()*100)},
	), nil
}

// memory reads a process's resident memory, now and at its most, in bytes.
func memory(pid int) (now, most int64, err error) {
	raw, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0, 0, fmt.Errorf("read the memory of process %d: %w", pid, err)
	}
	for line := range strings.Lines(string(raw)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		n, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			continue
		}
		switch f[0] {
		case "VmRSS:":
			now = n << 10
		case "VmHWM:":
			most = n << 10
		}
	}
	return now, most, nil
}
