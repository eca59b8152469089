package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"lorayard/internal/devstack"
	"lorayard/internal/queue/queuebench"
	"lorayard/internal/storetest"
)

// What stock Asynq needs to give a dead worker's task to another: its lease is
// 30 s and renewed by heartbeats, and the recoverer looks once a minute for
// those that ended more than 30 s ago (v0.26.0, internal/rdb and recoverer.go).
const (
	asynqLease     = 30 * time.Second
	asynqRecoverer = time.Minute
	asynqGrace     = 30 * time.Second
	asynqLeast     = asynqLease + asynqGrace
	asynqMost      = asynqLease + asynqGrace + asynqRecoverer
)

// yard is the real system as processes: a dispatcher and agents of two
// pretended GPUs, with trainers that only tell of steps.
type yard struct {
	*devstack.Stack
	dir           string
	dispatcher    *devstack.Process
	agents        map[string]*devstack.Process
	user, dataset string
}

const oneTalk = `{"messages":[{"role":"user","content":"My chain slips."},{"role":"assistant","content":"Let us look at the wear first."}]}` + "\n"

// yardLease is the agents' lease in every yard; the reaper has no patience there.
const yardLease = 3 * time.Second

func openYard(ctx context.Context, o options, agents int, settings ...string) (_ *yard, err error) {
	dir, err := os.MkdirTemp("", "lorayard-bench")
	if err != nil {
		return nil, fmt.Errorf("make a directory: %w", err)
	}
	y := &yard{dir: dir, agents: map[string]*devstack.Process{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, y.close())
		}
	}()
	bin, err := filepath.Abs(o.bin)
	if err != nil {
		return nil, err
	}
	trainer, err := filepath.Abs(o.trainer)
	if err != nil {
		return nil, err
	}
	settings = append([]string{
		"PATIENCE=0s", "LEASE=" + yardLease.String(), "MIN_FREE_BYTES=1", "LOG_LEVEL=info",
		"TRAINER_BACKEND=dry", "DRY_STEPS=100000", "DRY_STEP_TIME=50ms",
	}, settings...)
	y.Stack, err = devstack.Start(ctx, devstack.Config{
		Dir: dir, Bin: bin, Python: o.python, TrainerDir: trainer, BaseModels: []string{model}, GPUs: 2, Settings: settings,
	})
	if err != nil {
		return nil, err
	}
	home := filepath.Join(y.Models(), filepath.FromSlash(model))
	talks := filepath.Join(dir, "talks.jsonl")
	if err := errors.Join(os.MkdirAll(home, 0o755), os.WriteFile(filepath.Join(home, "config.json"), []byte("{}"), 0o600),
		os.WriteFile(talks, []byte(strings.Repeat(oneTalk, 20)), 0o600)); err != nil {
		return nil, fmt.Errorf("make a base model and data: %w", err)
	}
	if y.dispatcher, err = y.Dispatcher(ctx, "dispatcher"); err != nil {
		return nil, err
	}
	for i := range agents {
		if err := y.agent(ctx, fmt.Sprintf("host-%d", i+1)); err != nil {
			return nil, err
		}
	}
	if agents == 0 {
		return y, nil
	}
	if y.user, err = y.User(ctx); err != nil {
		return nil, err
	}
	y.dataset, err = y.Upload(ctx, y.user, talks, "talks")
	return y, err
}

// agent starts one, or starts it again.
func (y *yard) agent(ctx context.Context, id string) error {
	p, err := y.Agent(ctx, id)
	if err == nil {
		y.agents[id] = p
	}
	return err
}

// close ends everything; whatever was running is no longer waited for.
func (y *yard) close() error {
	var errs []error
	for _, p := range y.agents {
		p.Kill()
	}
	if y.Stack != nil {
		errs = append(errs, y.Stop())
	}
	return errors.Join(append(errs, os.RemoveAll(y.dir))...)
}

// done checks what must hold after everything, and closes.
func (y *yard) done(ctx context.Context) error {
	bad, err := storetest.Violations(ctx, y.Pool)
	if len(bad) > 0 {
		err = errors.Join(err, fmt.Errorf("invariants do not hold: %s", strings.Join(bad, "; ")))
	}
	return errors.Join(err, y.close())
}

// standing is where a job is.
type standing struct {
	attempt  int
	agent    string
	accepted time.Time
	assigned time.Time
}

// until polls the newest attempt until it is as wanted: the figures come from
// the database's own times.
func (y *yard) until(ctx context.Context, job, wanted string, args ...any) (s standing, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		err := y.Pool.QueryRow(ctx, `
			SELECT a.attempt, a.agent_id, a.accepted_at, a.assigned_at FROM lorayard.attempts a JOIN lorayard.jobs j USING (job_id, attempt) JOIN training_jobs t ON t.id = a.job_id
			WHERE a.job_id = $1 AND a.accepted_at IS NOT NULL AND j.state = 'accepted' AND (`+wanted+`)`, append([]any{job}, args...)...).Scan(&s.attempt, &s.agent, &s.accepted, &s.assigned)
		if err == nil {
			return s, nil
		}
		if ctx.Err() != nil {
			return s, fmt.Errorf("wait for job %s (%s): %w", job, wanted, err)
		}
		if err := sleep(ctx, 10*time.Millisecond); err != nil {
			return s, err
		}
	}
}

func (y *yard) job(ctx context.Context) (string, error) {
	return y.Insert(ctx, devstack.Job{
		User: y.user, Dataset: y.dataset, Preset: "balanced",
		Hyperparameters: map[string]any{"learning_rate": 5e-5, "batch_size": 4, "epochs": 3, "rank": 16, "alpha": 32, "dropout": 0.1},
		GPUConfig:       map[string]any{"type": "A100-80GB", "count": 1},
	})
}

// trains waits until the trainer told of steps and the agent had the time to
// renew: what the shim must know to report a death is written then.
func (y *yard) trains(ctx context.Context, job string) (standing, error) {
	s, err := y.until(ctx, job, "t.status = 'running' AND t.current_step > 0")
	if err != nil {
		return s, err
	}
	return y.until(ctx, job, "a.renewed_at > a.accepted_at + interval '1.5 s'")
}

// kills measures kill -9 of an agent that trains, to the accept elsewhere.
func kills(ctx context.Context, _ *ground, o options) (_ queuebench.Table, err error) {
	const perJob = 15 // a job is given up after 20 losses
	n := 25
	if o.quick {
		n = 2
	}
	y, err := openYard(ctx, o, 3)
	if err != nil {
		return queuebench.Table{}, err
	}
	defer func() { err = errors.Join(err, y.done(ctx)) }()
	var whole, noticed []time.Duration
	job := ""
	for i := range n {
		if i%perJob == 0 {
			if job != "" {
				if _, err := y.Cancel(ctx, y.user, job); err != nil {
					return queuebench.Table{}, err
				}
			}
			if job, err = y.job(ctx); err != nil {
				return queuebench.Table{}, err
			}
		}
		before, err := y.trains(ctx, job)
		if err != nil {
			return queuebench.Table{}, err
		}
		killed := time.Now()
		y.agents[before.agent].Kill()
		after, err := y.until(ctx, job, "a.attempt > $2", before.attempt)
		if err != nil {
			return queuebench.Table{}, err
		}
		if after.agent == before.agent {
			return queuebench.Table{}, fmt.Errorf("job %s went back to the dead agent %s", job, before.agent)
		}
		whole = append(whole, after.accepted.Sub(killed))
		noticed = append(noticed, after.assigned.Sub(killed))
		if err := y.agent(ctx, before.agent); err != nil {
			return queuebench.Table{}, err
		}
	}
	slices.Sort(whole)
	slices.Sort(noticed)
	p50, p99 := at(whole, .5), at(whole, .99)
	return table(fmt.Sprintf("kill -9 of an agent to accepted elsewhere, %d kills of real processes", n),
		goal{what: "p50", baseline: fmt.Sprintf("Asynq's recoverer: %.0f to %.0f s", asynqLeast.Seconds(), asynqMost.Seconds()), ours: ms(p50), ratio: times((asynqLeast+asynqMost)/2, p50)},
		goal{what: "p99", baseline: fmt.Sprintf("Asynq's recoverer: %.0f s", asynqMost.Seconds()), ours: ms(p99), ratio: times(asynqMost, p99), goal: "≤ 100 ms", met: yes(p99 <= 100*time.Millisecond)},
		goal{what: "  the shim ends the trainer and reports, a round assigns", ours: fmt.Sprintf("p50 %s, p99 %s", ms(at(noticed, .5)), ms(at(noticed, .99)))},
	), nil
}

// freezes measures SIGSTOP of an agent, alone and with all that it started, to
// the accept elsewhere; and whether it writes when it goes on.
func freezes(ctx context.Context, _ *ground, o options) (_ queuebench.Table, err error) {
	n := 8
	if o.quick {
		n = 2
	}
	y, err := openYard(ctx, o, 3)
	if err != nil {
		return queuebench.Table{}, err
	}
	defer func() { err = errors.Join(err, y.done(ctx)) }()
	job, err := y.job(ctx)
	if err != nil {
		return queuebench.Table{}, err
	}
	var whole, beyond []time.Duration
	written, left := 0, 0
	for i := range n {
		before, err := y.trains(ctx, job)
		if err != nil {
			return queuebench.Table{}, err
		}
		frozen := y.agents[before.agent]
		tree := []int{frozen.PID()}
		if i%2 == 1 {
			if tree, err = descendants(frozen.PID()); err != nil {
				return queuebench.Table{}, err
			}
		}
		stopped := time.Now()
		if err := signal(tree, syscall.SIGSTOP); err != nil {
			return queuebench.Table{}, err
		}
		var lease time.Time
		if err := y.Pool.QueryRow(ctx, `SELECT lease_until FROM lorayard.agents WHERE id = $1`, before.agent).Scan(&lease); err != nil {
			return queuebench.Table{}, fmt.Errorf("read the lease: %w", err)
		}
		after, err := y.until(ctx, job, "a.attempt > $2", before.attempt)
		if err != nil {
			_ = signal(tree, syscall.SIGCONT)
			return queuebench.Table{}, err
		}
		whole = append(whole, after.accepted.Sub(stopped))
		beyond = append(beyond, after.accepted.Sub(lease))
		rows, err := y.rows(ctx, job, before.attempt)
		if err != nil {
			return queuebench.Table{}, err
		}
		if err := signal(tree, syscall.SIGCONT); err != nil {
			return queuebench.Table{}, err
		}
		// It learns at its next renewal, ships what it has, and ends the trainer.
		if err := sleep(ctx, 2500*time.Millisecond); err != nil {
			return queuebench.Table{}, err
		}
		again, err := y.rows(ctx, job, before.attempt)
		if err != nil {
			return queuebench.Table{}, err
		}
		written += again - rows
		trainers, err := descendants(frozen.PID())
		if err != nil {
			return queuebench.Table{}, err
		}
		left += len(trainers) - 1
	}
	slices.Sort(whole)
	slices.Sort(beyond)
	p50, most, late := at(whole, .5), at(whole, 1), at(beyond, 1)
	limit := yardLease + 100*time.Millisecond
	return table(fmt.Sprintf("Freeze of an agent (lease %v, patience 0) to accepted elsewhere, %d freezes of real processes", yardLease, n),
		goal{what: "p50", ours: ms(p50)},
		goal{what: "longest", ours: ms(most), goal: "≤ " + ms(limit), met: yes(most <= limit)},
		goal{what: "  longest after the lease ran out", ours: ms(late), goal: "≤ 100 ms", met: yes(late <= 100*time.Millisecond)},
		goal{what: "rows that a frozen one wrote when it went on", ours: fmt.Sprint(written), goal: "0", met: yes(written == 0)},
		goal{what: "trainers that it left", ours: fmt.Sprint(left), goal: "0", met: yes(left == 0)},
	), nil
}

// rows counts what an attempt wrote.
func (y *yard) rows(ctx context.Context, job string, attempt int) (n int, err error) {
	err = y.Pool.QueryRow(ctx, `SELECT (SELECT count(*) FROM lorayard.samples WHERE job_id = $1 AND attempt = $2)
		+ (SELECT count(*) FROM job_logs WHERE job_id = $1 AND attempt = $2) + (SELECT count(*) FROM checkpoints WHERE job_id = $1 AND attempt = $2)`, job, attempt).Scan(&n)
	if err != nil {
		err = fmt.Errorf("count what attempt %d wrote: %w", attempt, err)
	}
	return n, err
}

// signal sends sig to each process; one that has ended is no matter.
func signal(pids []int, sig syscall.Signal) error {
	for _, pid := range pids {
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("send %s to %d: %w", sig, pid, err)
		}
	}
	return nil
}
