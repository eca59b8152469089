package store

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"lorayard/internal/job"
)

// Row is a job as the app inserted it, before admission.
type Row struct {
	ID              job.ID
	User            string
	Preset          string
	Hyperparameters []byte
	GPUConfig       []byte
	DatasetOwner    string // user id; another than User is refused
	DatasetDeleted  bool
	DatasetStatus   string
}

const unadmitted = `
	SELECT t.id::text, t.user_id::text, t.preset_id, t.hyperparameters, t.gpu_config,
	       d.user_id::text, d.deleted_at IS NOT NULL, d.status
	FROM public.training_jobs t JOIN public.datasets d ON d.id = t.dataset_id
	WHERE t.status = 'queued' AND t.external_job_id IS NULL
	  AND NOT EXISTS (SELECT 1 FROM lorayard.jobs j WHERE j.job_id = t.id)
	ORDER BY t.created_at, t.id LIMIT $1`

// Unadmitted returns up to n rows that the app inserted and nobody looked at.
func (s *Store) Unadmitted(ctx context.Context, n int) ([]Row, error) {
	rows, err := s.pool.Query(ctx, unadmitted, n)
	if err != nil {
		return nil, fmt.Errorf("read new jobs: %w", err)
	}
	out, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (row Row, err error) {
		err = r.Scan(&row.ID, &row.User, &row.Preset, &row.Hyperparameters, &row.GPUConfig, &row.DatasetOwner, &row.DatasetDeleted, &row.DatasetStatus)
		return row, err
	})
	if err != nil {
		return nil, fmt.Errorf("read new jobs: %w", err)
	}
	return out, nil
}

const admit = `
	WITH mine AS (
		INSERT INTO lorayard.jobs (job_id, user_id, spec)
		SELECT t.id, t.user_id, $2 FROM public.training_jobs t WHERE t.id = $1 AND t.status = 'queued'
		ON CONFLICT DO NOTHING RETURNING job_id
	)
	UPDATE public.training_jobs t SET hyperparameters = $3, gpu_config = $4, total_epochs = $5
	FROM mine WHERE t.id = mine.job_id`

// Admit takes a row into the queue, with both readers' spellings filled in.
// Admitting twice changes nothing.
func (s *Store) Admit(ctx context.Context, id job.ID, spec job.Spec, hyperparameters, gpuConfig []byte) error {
	raw, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("encode spec of job %s: %w", id, err)
	}
	if _, err := s.pool.Exec(ctx, admit, string(id), raw, hyperparameters, gpuConfig, spec.Epochs); err != nil {
		return fmt.Errorf("admit job %s: %w", id, err)
	}
	return nil
}

const refuseInsert = `
	INSERT INTO lorayard.jobs (job_id, user_id, spec)
	SELECT t.id, t.user_id, '{}' FROM public.training_jobs t WHERE t.id = $1
	ON CONFLICT DO NOTHING`

const finish = `SELECT lorayard.finish_job($1, $2, $3, $4)`

// Refuse fails a row at admission, with words for the user.
func (s *Store) Refuse(ctx context.Context, id job.ID, message string) error {
	err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, refuseInsert, string(id))
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		_, err = tx.Exec(ctx, finish, string(id), string(job.Failed), clean(message), "")
		return err
	})
	if err != nil {
		return fmt.Errorf("refuse job %s: %w", id, err)
	}
	return nil
}

// Waiting is an admitted job without an attempt under way.
type Waiting struct {
	ID       job.ID
	User     string
	Attempt  int // of the last assignment
	Spec     job.Spec
	Admitted time.Time
	Reason   string // why it was not placed before
	LastHost string // agent of the attempt before, empty for none
}

const waiting = `
	SELECT j.job_id::text, j.user_id::text, j.attempt, j.spec, j.admitted_at, j.waiting,
	       coalesce((SELECT a.agent_id FROM lorayard.attempts a WHERE a.job_id = j.job_id AND a.outcome IN ('failed', 'lost') ORDER BY a.attempt DESC LIMIT 1), '')
	FROM lorayard.jobs j JOIN public.training_jobs t ON t.id = j.job_id
	WHERE j.state = 'queued' AND t.status = 'queued' AND j.not_before <= clock_timestamp()
	ORDER BY j.admitted_at, j.job_id LIMIT $1`

// Waiting returns up to n jobs to place, oldest first.
func (s *Store) Waiting(ctx context.Context, n int) ([]Waiting, error) {
	rows, err := s.pool.Query(ctx, waiting, n)
	if err != nil {
		return nil, fmt.Errorf("read waiting jobs: %w", err)
	}
	out, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (w Waiting, err error) {
		err = r.Scan(&w.ID, &w.User, &w.Attempt, &w.Spec, &w.Admitted, &w.Reason, &w.LastHost)
		return w, err
	})
	if err != nil {
		return nil, fmt.Errorf("read waiting jobs: %w", err)
	}
	return out, nil
}

// Host is an agent that holds its lease and takes work.
type Host struct {
	Agent      string
	BaseModels []string
	Devices    []HostDevice
}

// HostDevice is one device of a host.
type HostDevice struct {
	Device
	Busy bool // in an assigned or accepted attempt
}

const hosts = `
	WITH busy AS (
		SELECT unnest(j.devices) AS uuid FROM lorayard.jobs j WHERE j.state IN ('assigned', 'accepted')
	)
	SELECT a.id, a.base_models, d.uuid, d.index, d.name, d.class, d.memory_bytes, d.pretend, d.fault,
	       EXISTS (SELECT 1 FROM busy b WHERE b.uuid = d.uuid)
	FROM lorayard.agents a JOIN lorayard.devices d ON d.agent_id = a.id
	WHERE a.lease_until > clock_timestamp() AND NOT a.draining AND NOT a.cordoned
	ORDER BY a.id, d.index`

// Hosts returns every host that may be given work, with its devices.
func (s *Store) Hosts(ctx context.Context) ([]Host, error) {
	rows, err := s.pool.Query(ctx, hosts)
	if err != nil {
		return nil, fmt.Errorf("read hosts: %w", err)
	}
	defer rows.Close()
	var out []Host
	for rows.Next() {
		var id string
		var models []string
		var d HostDevice
		if err := rows.Scan(&id, &models, &d.UUID, &d.Index, &d.Name, &d.Class, &d.MemoryBytes, &d.Pretend, &d.Fault, &d.Busy); err != nil {
			return nil, fmt.Errorf("read hosts: %w", err)
		}
		if len(out) == 0 || out[len(out)-1].Agent != id {
			out = append(out, Host{Agent: id, BaseModels: models})
		}
		h := &out[len(out)-1]
		h.Devices = append(h.Devices, d)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("read hosts: %w", err)
	}
	return out, nil
}

// Assignment gives a waiting job to an agent.
type Assignment struct {
	Job     job.ID
	Attempt int // of the last assignment; the new one is one more
	Agent   string
	Devices []string
}

// Send is a task and the agent that it is for.
type Send struct {
	Agent string
	Task  job.Task
}

const assign = `
	WITH chosen AS (
		SELECT * FROM jsonb_to_recordset($1) AS c(job uuid, attempt integer, agent text, devices text[])
	), given AS (
		UPDATE lorayard.jobs j SET state = 'assigned', attempt = j.attempt + 1, agent_id = c.agent, devices = c.devices,
			nonce = NULL, assigned_at = clock_timestamp(), send = 1, sent_at = clock_timestamp(), waiting = ''
		FROM chosen c
		WHERE j.job_id = c.job AND j.attempt = c.attempt AND j.state = 'queued'
		  AND NOT EXISTS (SELECT 1 FROM lorayard.jobs o WHERE o.state IN ('assigned', 'accepted') AND o.devices && c.devices)
		RETURNING j.job_id, j.attempt, j.agent_id, j.devices, j.send
	), noted AS (
		INSERT INTO lorayard.attempts (job_id, attempt, agent_id, devices)
		SELECT job_id, attempt, agent_id, devices FROM given
	)
	SELECT job_id::text, attempt, agent_id, devices, send FROM given`

// Assign gives jobs to agents in one statement and returns what to send. A job
// that moved meanwhile, or a device that was taken, is left out.
func (s *Store) Assign(ctx context.Context, as []Assignment) ([]Send, error) {
	type row struct {
		Job     job.ID   `json:"job"`
		Attempt int      `json:"attempt"`
		Agent   string   `json:"agent"`
		Devices []string `json:"devices"`
	}
	doc := make([]row, len(as))
	for i, a := range as {
		doc[i] = row(a)
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		return nil, fmt.Errorf("encode assignments: %w", err)
	}
	return s.sends(ctx, "assign", assign, raw)
}

const resend = `
	UPDATE lorayard.jobs j SET send = j.send + 1, sent_at = clock_timestamp()
	WHERE j.state = 'assigned' AND j.sent_at < clock_timestamp() - $1::interval
	RETURNING j.job_id::text, j.attempt, j.agent_id, j.devices, j.send`

// Resend returns assigned attempts that were last sent longer ago than after.
func (s *Store) Resend(ctx context.Context, after time.Duration) ([]Send, error) {
	return s.sends(ctx, "re-send", resend, after)
}

func (s *Store) sends(ctx context.Context, doing, query string, args ...any) ([]Send, error) {
	rows, err := s.pool.Query(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	out, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (x Send, err error) {
		err = r.Scan(&x.Task.Ref.Job, &x.Task.Ref.Attempt, &x.Agent, &x.Task.Devices, &x.Task.Send)
		return x, err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	return out, nil
}

const takeBack = `
	WITH late AS (
		SELECT j.job_id, j.attempt FROM lorayard.jobs j LEFT JOIN lorayard.agents a ON a.id = j.agent_id
		WHERE j.state = 'assigned'
		  AND (j.assigned_at < clock_timestamp() - $1::interval OR a.lease_until IS NULL OR a.lease_until < clock_timestamp())
		FOR UPDATE OF j SKIP LOCKED
	), closed AS (
		UPDATE lorayard.attempts t SET ended_at = clock_timestamp(), outcome = 'not_accepted', kind = 'not_accepted'
		FROM late WHERE t.job_id = late.job_id AND t.attempt = late.attempt
	)
	UPDATE lorayard.jobs j SET state = 'queued', agent_id = NULL, devices = '{}', send = 0, sent_at = NULL
	FROM late WHERE j.job_id = late.job_id
	RETURNING j.job_id::text, j.attempt`

// TakeBack returns to the queue what was assigned longer ago than after and
// not accepted, or assigned to an agent that is gone.
func (s *Store) TakeBack(ctx context.Context, after time.Duration) ([]job.Ref, error) {
	rows, err := s.pool.Query(ctx, takeBack, after)
	if err != nil {
		return nil, fmt.Errorf("take back: %w", err)
	}
	return collectRefs(rows, "take back")
}

func collectRefs(rows pgx.Rows, doing string) ([]job.Ref, error) {
	refs, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (ref job.Ref, err error) {
		err = r.Scan(&ref.Job, &ref.Attempt)
		return ref, err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	return refs, nil
}

const expired = `
	SELECT j.job_id::text, j.attempt FROM lorayard.jobs j
	LEFT JOIN lorayard.agents a ON a.id = j.agent_id
	WHERE j.state = 'accepted' AND coalesce(a.lease_until, '-infinity') < clock_timestamp() - $1::interval
	ORDER BY j.job_id`

const lose = `SELECT lorayard.lose_attempt($1, $2, $3)`

// Reap gives back every accepted attempt whose agent's lease ran out longer
// ago than patience. The user does not pay for them.
func (s *Store) Reap(ctx context.Context, patience time.Duration) ([]job.Ref, error) {
	rows, err := s.pool.Query(ctx, expired, patience)
	if err != nil {
		return nil, fmt.Errorf("find lost attempts: %w", err)
	}
	refs, err := collectRefs(rows, "find lost attempts")
	if err != nil {
		return nil, err
	}
	var reaped []job.Ref
	for _, ref := range refs {
		var status string
		if err := s.pool.QueryRow(ctx, lose, string(ref.Job), ref.Attempt, "the agent stopped renewing its lease").Scan(&status); err != nil {
			return reaped, fmt.Errorf("reap %s: %w", ref, err)
		}
		if status != "stale" {
			reaped = append(reaped, ref)
		}
	}
	return reaped, nil
}

const cancelled = `
	SELECT j.job_id::text, j.attempt FROM lorayard.jobs j JOIN public.training_jobs t ON t.id = j.job_id
	WHERE j.state IN ('queued', 'assigned') AND t.status = 'cancelled'
	ORDER BY j.job_id FOR UPDATE OF j SKIP LOCKED`

const closeUnaccepted = `SELECT lorayard.close_attempt($1, $2, 'cancelled', 'cancelled', '', true, true)`

// SettleCancelled settles jobs that were cancelled while no attempt ran.
func (s *Store) SettleCancelled(ctx context.Context) ([]job.Ref, error) {
	var refs []job.Ref
	err := pgx.BeginFunc(ctx, s.pool, func(tx pgx.Tx) error {
		rows, err := tx.Query(ctx, cancelled)
		if err != nil {
			return err
		}
		if refs, err = collectRefs(rows, "find cancelled jobs"); err != nil {
			return err
		}
		for _, ref := range refs {
			if _, err := tx.Exec(ctx, closeUnaccepted, string(ref.Job), ref.Attempt); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, finish, string(ref.Job), string(job.Cancelled), "", ""); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("settle cancelled jobs: %w", err)
	}
	return refs, nil
}

const setWaiting = `
	UPDATE lorayard.jobs j SET waiting = w.reason
	FROM jsonb_to_recordset($1) AS w(job uuid, reason text)
	WHERE j.job_id = w.job AND j.state = 'queued' AND j.waiting <> w.reason`

// SetWaiting records why jobs are not placed.
func (s *Store) SetWaiting(ctx context.Context, reasons map[job.ID]string) error {
	type row struct {
		Job    job.ID `json:"job"`
		Reason string `json:"reason"`
	}
	doc := make([]row, 0, len(reasons))
	for id, r := range reasons {
		doc = append(doc, row{id, r})
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		return fmt.Errorf("encode reasons: %w", err)
	}
	if _, err := s.pool.Exec(ctx, setWaiting, raw); err != nil {
		return fmt.Errorf("record why jobs wait: %w", err)
	}
	return nil
}

const rates = `
	SELECT DISTINCT ON (class) class, micro_usd_per_hour FROM lorayard.rates
	WHERE effective_from <= clock_timestamp() ORDER BY class, effective_from DESC`

// Rates returns what an hour of each GPU class costs now, in micro-dollars.
func (s *Store) Rates(ctx context.Context) (map[string]int64, error) {
	rows, err := s.pool.Query(ctx, rates)
	if err != nil {
		return nil, fmt.Errorf("read rates: %w", err)
	}
	defer rows.Close()
	out := map[string]int64{}
	for rows.Next() {
		var class string
		var micro int64
		if err := rows.Scan(&class, &micro); err != nil {
			return nil, fmt.Errorf("read rates: %w", err)
		}
		out[class] = micro
	}
	return out, rows.Err()
}

const depths = `
	SELECT state, count(*) FROM lorayard.jobs WHERE state <> 'settled' GROUP BY state`

// Depths counts unsettled jobs by control state (queued, assigned, accepted).
func (s *Store) Depths(ctx context.Context) (map[string]int, error) {
	rows, err := s.pool.Query(ctx, depths)
	if err != nil {
		return nil, fmt.Errorf("count jobs: %w", err)
	}
	defer rows.Close()
	out := map[string]int{"queued": 0, "assigned": 0, "accepted": 0}
	for rows.Next() {
		var state string
		var n int
		if err := rows.Scan(&state, &n); err != nil {
			return nil, fmt.Errorf("count jobs: %w", err)
		}
		out[state] = n
	}
	return out, rows.Err()
}
