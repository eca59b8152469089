package store

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"lorayard/internal/job"
)

// This file is what an operator asks for. Each is a desired state: it is
// written down, the agent is told to look, and looks anyway at its next
// renewal.

// NotFoundError says that there is nothing by that name.
type NotFoundError struct{ What, Name string }

func (e *NotFoundError) Error() string { return fmt.Sprintf("there is no %s %s", e.What, e.Name) }

const cordon = `
	UPDATE lorayard.agents SET cordoned = $2, cordon_reason = $3, drain_by = CASE WHEN $2 THEN drain_by END WHERE id = $1
	RETURNING pg_notify('lorayard', 'agent:' || id)`

// Cordon keeps an agent from being given new work; what it runs goes on.
func (s *Store) Cordon(ctx context.Context, agent, reason string) error {
	return s.operate(ctx, "cordon", "agent", agent, cordon, true, clean(reason))
}

// Uncordon gives an agent work again, also after a drain.
func (s *Store) Uncordon(ctx context.Context, agent string) error {
	return s.operate(ctx, "uncordon", "agent", agent, cordon, false, "")
}

const drain = `
	UPDATE lorayard.agents SET cordoned = true, cordon_reason = $3, drain_by = clock_timestamp() + $2::interval WHERE id = $1
	RETURNING pg_notify('lorayard', 'look:' || id)`

// Drain cordons an agent and wants its attempts gone within the given time:
// they may finish until then, and save a checkpoint and go elsewhere after.
func (s *Store) Drain(ctx context.Context, agent string, within time.Duration, reason string) error {
	return s.operate(ctx, "drain", "agent", agent, drain, within, clean(reason))
}

const forget = `
	DELETE FROM lorayard.agents a WHERE a.id = $1 AND a.lease_until < clock_timestamp()
	  AND NOT EXISTS (SELECT 1 FROM lorayard.jobs j WHERE j.agent_id = a.id AND j.state IN ('assigned', 'accepted'))`

// Forget takes an agent that is gone for good off the list.
func (s *Store) Forget(ctx context.Context, agent string) error {
	return s.operate(ctx, "forget", "agent without a lease and without attempts by the name", agent, forget)
}

const pause = `
	UPDATE lorayard.jobs SET desired = 'pause', waiting = CASE WHEN state = 'queued' THEN 'paused' ELSE waiting END
	WHERE job_id = $1 AND state <> 'settled'
	RETURNING pg_notify('lorayard', CASE WHEN state = 'accepted' THEN 'look:' || agent_id ELSE 'job:' || job_id END)`

// Pause lets a job's attempt save a checkpoint, and keeps the job in the queue
// until Resume.
func (s *Store) Pause(ctx context.Context, id job.ID) error {
	return s.operate(ctx, "pause", "unsettled job", string(id), pause)
}

const resume = `
	UPDATE lorayard.jobs SET desired = 'run', waiting = CASE WHEN waiting = 'paused' THEN '' ELSE waiting END
	WHERE job_id = $1 AND state <> 'settled' AND desired = 'pause'
	RETURNING pg_notify('lorayard', 'job:' || job_id)`

// Resume undoes Pause.
func (s *Store) Resume(ctx context.Context, id job.ID) error {
	return s.operate(ctx, "resume", "paused job", string(id), resume)
}

const prioritize = `
	UPDATE lorayard.jobs SET priority = $2 WHERE job_id = $1 AND state <> 'settled'
	RETURNING pg_notify('lorayard', 'job:' || job_id)`

// Prioritize gives a job a priority: higher ones are placed first and may
// preempt lower ones. 0 is what jobs begin with.
func (s *Store) Prioritize(ctx context.Context, id job.ID, priority int) error {
	return s.operate(ctx, "prioritize", "unsettled job", string(id), prioritize, priority)
}

func (s *Store) operate(ctx context.Context, verb, what, name, query string, args ...any) error {
	tag, err := s.pool.Exec(ctx, query, append([]any{name}, args...)...)
	if err != nil {
		return fmt.Errorf("%s %s: %w", verb, name, err)
	}
	if tag.RowsAffected() == 0 {
		return fmt.Errorf("%s: %w", verb, &NotFoundError{what, name})
	}
	return nil
}

// AgentRow is one line of an operator's list of agents.
type AgentRow struct {
	Agent, Hostname, Version string
	LeaseLeft                time.Duration // negative: it ran out so long ago
	Closed                   string        // why it takes nothing new
	Devices, Unfit, Held     int           // devices: all, not fit for work, in an attempt
	Classes                  string
}

const agents = `
	SELECT a.id, a.hostname, a.version, a.lease_until - clock_timestamp(),
	       CASE WHEN a.drain_by IS NOT NULL OR a.draining THEN trim('draining ' || a.cordon_reason) WHEN a.cordoned THEN trim('cordoned ' || a.cordon_reason) ELSE '' END,
	       count(d.uuid)::integer, count(d.uuid) FILTER (WHERE d.fault <> '')::integer,
	       coalesce((SELECT sum(cardinality(j.devices)) FROM lorayard.jobs j WHERE j.agent_id = a.id AND j.state IN ('assigned', 'accepted')), 0)::integer,
	       coalesce(string_agg(DISTINCT d.class, ', '), '')
	FROM lorayard.agents a LEFT JOIN lorayard.devices d ON d.agent_id = a.id
	GROUP BY a.id ORDER BY a.id`

// Agents lists every agent that ever registered.
func (s *Store) Agents(ctx context.Context) ([]AgentRow, error) {
	rows, err := s.pool.Query(ctx, agents)
	if err != nil {
		return nil, fmt.Errorf("list agents: %w", err)
	}
	out, err := pgx.CollectRows(rows, pgx.RowToStructByPos[AgentRow])
	if err != nil {
		return nil, fmt.Errorf("list agents: %w", err)
	}
	return out, nil
}

// JobRow is one line of an operator's list of jobs.
type JobRow struct {
	Job, User, State, Status, Stage string
	Attempt, Priority               int
	Agent                           string
	Waiting                         string // why it waits
	Earliest, Latest                *time.Time
}

const unsettled = `
	SELECT j.job_id::text, j.user_id::text, CASE WHEN j.desired = 'pause' THEN 'paused' ELSE j.state END, t.status, coalesce(t.current_stage, ''), j.attempt, j.priority,
	       coalesce(j.agent_id, ''), j.waiting, j.start_earliest, j.start_latest
	FROM lorayard.jobs j JOIN public.training_jobs t ON t.id = j.job_id
	WHERE j.state <> 'settled' ORDER BY j.priority DESC, j.admitted_at, j.job_id LIMIT $1`

// Jobs lists up to n jobs that are not settled.
func (s *Store) Jobs(ctx context.Context, n int) ([]JobRow, error) {
	rows, err := s.pool.Query(ctx, unsettled, n)
	if err != nil {
		return nil, fmt.Errorf("list jobs: %w", err)
	}
	out, err := pgx.CollectRows(rows, pgx.RowToStructByPos[JobRow])
	if err != nil {
		return nil, fmt.Errorf("list jobs: %w", err)
	}
	return out, nil
}
