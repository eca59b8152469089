package store

import (
	"context"
	"encoding/json"
	"errors"
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
	FROM %s, LATERAL (SELECT x.user_id, x.deleted_at, x.status FROM public.datasets x WHERE x.id = t.dataset_id OFFSET 0) d
	WHERE t.status = 'queued' AND t.external_job_id IS NULL
	  AND (SELECT j.job_id FROM lorayard.jobs j WHERE j.job_id = t.id) IS NULL
	  AND (d.status <> 'validating' OR d.deleted_at IS NOT NULL)
	ORDER BY t.created_at, t.id LIMIT $1`

// Unadmitted returns up to n rows that the app inserted and nobody looked at,
// but those whose data set is being validated: that ends with a verdict. With only,
// those among them. All of them cost a look at every row that waits.
func (s *Store) Unadmitted(ctx context.Context, n int, only []job.ID) ([]Row, error) {
	query, args := among(unadmitted, "public.training_jobs", "id", "t", only, n)
	rows, err := s.pool.Query(ctx, query, args...)
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

// among fills a query's place for a table: with all of its rows, or with those
// of only, each found by its key. OFFSET keeps the planner from anything else,
// for the reason given at waiting.
func among(query, table, key, alias string, only []job.ID, args ...any) (string, []any) {
	if only == nil {
		return fmt.Sprintf(query, table+" "+alias), args
	}
	some := fmt.Sprintf("unnest($%d::text[]::uuid[]) AS o(id), LATERAL (SELECT * FROM %s x WHERE x.%s = o.id OFFSET 0) %s", len(args)+1, table, key, alias)
	return fmt.Sprintf(query, some), append(args, only)
}

const admit = `
	WITH given AS (
		SELECT * FROM jsonb_to_recordset($1) AS g(job uuid, spec jsonb, hyperparameters jsonb, gpu_config jsonb, epochs integer)
	), mine AS (
		INSERT INTO lorayard.jobs (job_id, user_id, spec, priority)
		SELECT t.id, t.user_id, g.spec, coalesce(q.priority, 0)
		FROM given g JOIN public.training_jobs t ON t.id = g.job LEFT JOIN lorayard.quotas q ON q.user_id = t.user_id
		WHERE t.status = 'queued'
		ON CONFLICT DO NOTHING RETURNING job_id, user_id, priority, admitted_at
	), filled AS (
		UPDATE public.training_jobs t SET hyperparameters = g.hyperparameters, gpu_config = g.gpu_config, total_epochs = g.epochs
		FROM mine JOIN given g ON g.job = mine.job_id WHERE t.id = mine.job_id
	)
	SELECT job_id::text, user_id::text, priority, admitted_at FROM mine`

// Admission is a row that is taken into the queue, with both readers'
// spellings filled in.
type Admission struct {
	ID                         job.ID
	Spec                       job.Spec
	Hyperparameters, GPUConfig []byte
}

// What a crash of the database forgets of an admission is admitted again, so it
// need not be on the disk; the assignment that follows is.
const needNoDisk = `SELECT set_config('synchronous_commit', 'off', true)`

// Admit takes rows into the queue in one statement, and returns those that
// joined it now, as Waiting would. Admitting twice changes nothing.
func (s *Store) Admit(ctx context.Context, as []Admission) ([]Waiting, error) {
	type row struct {
		Job             job.ID          `json:"job"`
		Spec            job.Spec        `json:"spec"`
		Hyperparameters json.RawMessage `json:"hyperparameters"`
		GPUConfig       json.RawMessage `json:"gpu_config"`
		Epochs          int             `json:"epochs"`
	}
	doc := make([]row, len(as))
	for i, a := range as {
		doc[i] = row{a.ID, a.Spec, a.Hyperparameters, a.GPUConfig, a.Spec.Epochs}
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		return nil, fmt.Errorf("encode admissions: %w", err)
	}
	b := &pgx.Batch{}
	b.Queue(needNoDisk)
	b.Queue(admit, raw)
	res := s.pool.SendBatch(ctx, b)
	out, err := admitted(res, as)
	if err := errors.Join(err, res.Close()); err != nil {
		return nil, fmt.Errorf("admit %d jobs: %w", len(as), err)
	}
	return out, nil
}

func admitted(res pgx.BatchResults, as []Admission) ([]Waiting, error) {
	if _, err := res.Exec(); err != nil {
		return nil, err
	}
	rows, err := res.Query()
	if err != nil {
		return nil, err
	}
	specs := make(map[job.ID]job.Spec, len(as))
	for _, a := range as {
		specs[a.ID] = a.Spec
	}
	return pgx.CollectRows(rows, func(r pgx.CollectableRow) (w Waiting, err error) {
		err = r.Scan(&w.ID, &w.User, &w.Priority, &w.Admitted)
		w.Spec = specs[w.ID]
		return w, err
	})
}

const refuse = `SELECT lorayard.refuse($1, $2)`

// Refuse fails a row at admission, with words for the user; doing it twice
// changes nothing.
func (s *Store) Refuse(ctx context.Context, id job.ID, message string) error {
	if _, err := s.pool.Exec(ctx, refuse, string(id), clean(message)); err != nil {
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
	Priority int
	Admitted time.Time
	Reason   string   // why it was not placed before
	Failed   []string // agents of attempts that failed or were lost within the hour, newest first, three at most
}

// WaitingOfUser bounds what Waiting returns of one user: nobody is placed behind
// five hundred of their own in one round, and a flood must not hide the others.
const WaitingOfUser = 500

// The status is asked row by row and not joined: with a queue that grew by
// thousands within a second the planner knows nothing of either table, and a
// join took a quarter of a second where this takes ten milliseconds.
const waiting = `
	SELECT w.job_id::text, w.user_id::text, w.attempt, w.spec, w.priority, w.admitted_at, w.waiting,
	       CASE WHEN w.attempt = 0 THEN '{}' ELSE ARRAY(SELECT a.agent_id FROM lorayard.attempts a
	             WHERE a.job_id = w.job_id AND a.outcome IN ('failed', 'lost') AND a.ended_at > clock_timestamp() - interval '1 hour'
	             ORDER BY a.attempt DESC LIMIT 3) END
	FROM (SELECT j.*, row_number() OVER (PARTITION BY j.user_id ORDER BY j.priority DESC, j.admitted_at, j.job_id) AS place
	      FROM %s WHERE j.state = 'queued' AND j.desired <> 'pause' AND j.not_before <= clock_timestamp()) w
	WHERE w.place <= $2 AND (SELECT t.status FROM public.training_jobs t WHERE t.id = w.job_id) = 'queued'
	ORDER BY w.admitted_at, w.job_id LIMIT $1`

// Waiting returns up to n jobs to place, oldest first, and of each user the
// first WaitingOfUser; with only, those among them.
func (s *Store) Waiting(ctx context.Context, n int, only []job.ID) ([]Waiting, error) {
	query, args := among(waiting, "lorayard.jobs", "job_id", "j", only, n, WaitingOfUser)
	rows, err := s.pool.Query(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("read waiting jobs: %w", err)
	}
	out, err := pgx.CollectRows(rows, func(r pgx.CollectableRow) (w Waiting, err error) {
		err = r.Scan(&w.ID, &w.User, &w.Attempt, &w.Spec, &w.Priority, &w.Admitted, &w.Reason, &w.Failed)
		return w, err
	})
	if err != nil {
		return nil, fmt.Errorf("read waiting jobs: %w", err)
	}
	return out, nil
}

// Running is an attempt that is assigned or accepted.
type Running struct {
	Ref      job.Ref // without the nonce
	User     string
	Agent    string
	Devices  []string
	Spec     job.Spec
	Priority int
	Started  time.Time   // of the attempt
	Ends     time.Time   // as the trainer expects, zero when unknown
	Desired  job.Desired // anything but run: it is leaving
}

// OFFSET keeps the planner from joining, for the reason given at waiting.
const running = `
	SELECT j.job_id::text, j.attempt, j.user_id::text, j.agent_id, j.devices, j.spec, j.priority, j.assigned_at,
	       t.estimated_completion_at, CASE WHEN t.status = 'cancelled' THEN 'cancel' ELSE j.desired END
	FROM lorayard.jobs j, LATERAL (SELECT x.status, x.estimated_completion_at FROM public.training_jobs x WHERE x.id = j.job_id OFFSET 0) t
	WHERE j.state IN ('assigned', 'accepted') ORDER BY j.job_id`

// Running returns every attempt that holds devices.
func (s *Store) Running(ctx context.Context) ([]Running, error) {
	rows, err := s.pool.Query(ctx, running)
	if err != nil {
		return nil, fmt.Errorf("read running jobs: %w", err)
	}
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (r Running, err error) {
		var ends *time.Time
		err = row.Scan(&r.Ref.Job, &r.Ref.Attempt, &r.User, &r.Agent, &r.Devices, &r.Spec, &r.Priority, &r.Started, &ends, &r.Desired)
		if ends != nil {
			r.Ends = *ends
		}
		return r, err
	})
	if err != nil {
		return nil, fmt.Errorf("read running jobs: %w", err)
	}
	return out, nil
}

// User is what placement knows of a user.
type User struct {
	ID         string
	Weight     float64
	GPUSeconds float64 // of the last day, halved every six hours
	MaxGPUs    *int    // nil: the policy's
	MaxQueued  *int
}

// Six hours forget a morning's flood by the evening; a day bounds the query.
const users = `
	WITH used AS (
		SELECT u.user_id, sum(extract(epoch FROM upper(u.during) - lower(u.during))
			* exp(-ln(2) * greatest(extract(epoch FROM clock_timestamp() - upper(u.during)), 0) / 21600)) AS seconds
		FROM lorayard.usage_intervals u WHERE upper(u.during) > clock_timestamp() - interval '1 day' GROUP BY u.user_id
	)
	SELECT coalesce(q.user_id, used.user_id)::text, coalesce(q.weight, 1), coalesce(used.seconds, 0)::float8, q.max_gpus, q.max_queued
	FROM lorayard.quotas q FULL JOIN used ON used.user_id = q.user_id`

// Users returns everybody who used a device lately or has a quota of their own.
func (s *Store) Users(ctx context.Context) ([]User, error) {
	rows, err := s.pool.Query(ctx, users)
	if err != nil {
		return nil, fmt.Errorf("read users: %w", err)
	}
	out, err := pgx.CollectRows(rows, pgx.RowToStructByPos[User])
	if err != nil {
		return nil, fmt.Errorf("read users: %w", err)
	}
	return out, nil
}

// Host is an agent that holds its lease.
type Host struct {
	Agent      string
	BaseModels []string
	Labels     map[string]string
	Closed     string // why it takes nothing new, in words; empty: it does
	Devices    []Device
}

const hosts = `
	SELECT a.id, a.base_models, a.labels,
	       CASE WHEN a.drain_by IS NOT NULL OR a.draining THEN 'draining' WHEN a.cordoned THEN trim('cordoned ' || a.cordon_reason) ELSE '' END,
	       d.uuid, d.index, d.name, d.class, d.memory_bytes, d.pretend, d.fault, d.links, d.node
	FROM lorayard.agents a LEFT JOIN lorayard.devices d ON d.agent_id = a.id
	WHERE a.lease_until > clock_timestamp()
	ORDER BY a.id, d.index`

// Hosts returns every host whose agent holds its lease, with its devices.
func (s *Store) Hosts(ctx context.Context) ([]Host, error) {
	rows, err := s.pool.Query(ctx, hosts)
	if err != nil {
		return nil, fmt.Errorf("read hosts: %w", err)
	}
	defer rows.Close()
	var out []Host
	for rows.Next() {
		var h Host
		var d struct {
			uuid, name, class, fault *string
			index, node              *int
			memory                   *int64
			pretend                  *bool
			links                    []int
		}
		if err := rows.Scan(&h.Agent, &h.BaseModels, &h.Labels, &h.Closed, &d.uuid, &d.index, &d.name, &d.class, &d.memory, &d.pretend, &d.fault, &d.links, &d.node); err != nil {
			return nil, fmt.Errorf("read hosts: %w", err)
		}
		if len(out) == 0 || out[len(out)-1].Agent != h.Agent {
			out = append(out, h)
		}
		if d.uuid != nil {
			last := &out[len(out)-1]
			last.Devices = append(last.Devices, Device{UUID: *d.uuid, Index: *d.index, Name: *d.name, Class: *d.class, MemoryBytes: *d.memory, Pretend: *d.pretend, Fault: *d.fault, Links: d.links, Node: *d.node})
		}
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

// The lock makes two leaders' assignments follow each other: each statement
// sees which devices the other took.
const lockAssign = `SELECT pg_advisory_xact_lock($1)`

const assignLock = 0x79617265 // "yare", beside the old leader's lock

const assign = `
	WITH chosen AS (
		SELECT * FROM jsonb_to_recordset($1) AS c(job uuid, attempt integer, agent text, devices text[])
	), given AS (
		UPDATE lorayard.jobs j SET state = 'assigned', attempt = j.attempt + 1, agent_id = c.agent, devices = c.devices,
			nonce = NULL, assigned_at = clock_timestamp(), send = 1, sent_at = clock_timestamp(), waiting = ''
		FROM chosen c
		WHERE j.job_id = c.job AND j.attempt = c.attempt AND j.state = 'queued' AND j.desired <> 'pause'
		  AND EXISTS (SELECT 1 FROM lorayard.agents a WHERE a.id = c.agent AND a.lease_until > clock_timestamp()
		              AND NOT a.draining AND NOT a.cordoned AND a.drain_by IS NULL)
		  AND NOT EXISTS (SELECT 1 FROM lorayard.jobs o WHERE o.agent_id = c.agent AND o.state IN ('assigned', 'accepted') AND o.devices && c.devices)
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
	// A batch is one transaction and one round trip: the lock is there before
	// the statement looks, and until it is committed.
	b := &pgx.Batch{}
	b.Queue(lockAssign, assignLock)
	b.Queue(assign, raw)
	res := s.pool.SendBatch(ctx, b)
	out, err := assigned(res)
	if err := errors.Join(err, res.Close()); err != nil {
		return nil, fmt.Errorf("assign: %w", err)
	}
	return out, nil
}

func assigned(res pgx.BatchResults) ([]Send, error) {
	if _, err := res.Exec(); err != nil {
		return nil, err
	}
	rows, err := res.Query()
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, scanSend)
}

func scanSend(r pgx.CollectableRow) (x Send, err error) {
	err = r.Scan(&x.Task.Ref.Job, &x.Task.Ref.Attempt, &x.Agent, &x.Task.Devices, &x.Task.Send)
	return x, err
}

const preempt = `
	WITH asked AS (
		UPDATE lorayard.jobs j SET desired = 'preempt'
		FROM jsonb_to_recordset($1) AS p(job uuid, attempt integer)
		WHERE j.job_id = p.job AND j.attempt = p.attempt AND j.state = 'accepted' AND j.desired = 'run'
		RETURNING j.job_id, j.attempt, j.agent_id
	)
	SELECT job_id::text, attempt FROM asked, pg_notify('lorayard', 'look:' || agent_id)`

// Preempt asks accepted attempts to save a checkpoint and hand their jobs
// back; it returns those that were asked now.
func (s *Store) Preempt(ctx context.Context, refs []job.Ref) ([]job.Ref, error) {
	raw, err := encodeRefs(refs)
	if err != nil {
		return nil, err
	}
	rows, err := s.pool.Query(ctx, preempt, raw)
	if err != nil {
		return nil, fmt.Errorf("preempt: %w", err)
	}
	return collectRefs(rows, "preempt")
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
	out, err := pgx.CollectRows(rows, scanSend)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	return out, nil
}

const takeBack = `
	WITH late AS (
		SELECT j.job_id, j.attempt FROM lorayard.jobs j LEFT JOIN lorayard.agents a ON a.id = j.agent_id
		WHERE j.state = 'assigned'
		  AND (j.assigned_at < clock_timestamp() - $1::interval OR a.lease_until IS NULL OR a.lease_until < clock_timestamp() OR j.agent_id = ANY ($2))
		FOR UPDATE OF j SKIP LOCKED
	), closed AS (
		UPDATE lorayard.attempts t SET ended_at = clock_timestamp(), outcome = 'not_accepted', kind = 'not_accepted'
		FROM late WHERE t.job_id = late.job_id AND t.attempt = late.attempt
	)
	UPDATE lorayard.jobs j SET state = 'queued', agent_id = NULL, devices = '{}', send = 0, sent_at = NULL
	FROM late WHERE j.job_id = late.job_id
	RETURNING j.job_id::text, j.attempt`

// TakeBack returns to the queue what was assigned longer ago than after and
// not accepted, or assigned to an agent whose lease is over or that is in gone.
func (s *Store) TakeBack(ctx context.Context, after time.Duration, gone []string) ([]job.Ref, error) {
	rows, err := s.pool.Query(ctx, takeBack, after, gone)
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

const reap = `SELECT job_id::text, attempt FROM lorayard.reap($1, $2, $3)`

// Reap gives back every accepted attempt whose agent's lease ran out longer
// ago than patience; the user does not pay for them. It does nothing unless
// dispatcher id has led, without a gap, for as long as an agent's lease lasts:
// who could not renew because the database was away is not judged.
func (s *Store) Reap(ctx context.Context, id string, lease, patience time.Duration) ([]job.Ref, error) {
	rows, err := s.pool.Query(ctx, reap, id, lease, patience)
	if err != nil {
		return nil, fmt.Errorf("reap: %w", err)
	}
	return collectRefs(rows, "reap")
}

const nextLapse = `
	SELECT coalesce(extract(epoch FROM min(a.lease_until) + $1::interval - clock_timestamp()), 0)::float8 FROM lorayard.agents a
	WHERE a.lease_until > clock_timestamp() - $1::interval
	  AND EXISTS (SELECT 1 FROM lorayard.jobs j WHERE j.agent_id = a.id AND j.state = 'accepted')`

// NextLapse is how long it takes until the first of the agents that run
// something may be judged, should it not renew; 0 when none runs anything.
func (s *Store) NextLapse(ctx context.Context, patience time.Duration) (time.Duration, error) {
	var seconds float64
	if err := s.pool.QueryRow(ctx, nextLapse, patience).Scan(&seconds); err != nil {
		return 0, fmt.Errorf("look for the next lapse: %w", err)
	}
	return time.Duration(seconds * float64(time.Second)), nil
}

const reportDeath = `SELECT lorayard.report_death($1, $2, $3, $4, $5, $6)`

// ReportDeath gives back an attempt whose agent died, as its shim reports, and
// ends the agent's lease. It is false when the attempt is not that agent's any
// more.
func (s *Store) ReportDeath(ctx context.Context, agent, boot string, ref job.Ref, message string) (bool, error) {
	var status string
	if err := s.pool.QueryRow(ctx, reportDeath, agent, boot, string(ref.Job), ref.Attempt, ref.Nonce, clean(message)).Scan(&status); err != nil {
		return false, fmt.Errorf("report the death of %s: %w", ref, err)
	}
	return status != "stale", nil
}

const registered = `SELECT EXISTS (SELECT 1 FROM lorayard.agents WHERE id = $1 AND boot = $2)`

// Registered reports whether boot is the process that runs agent.
func (s *Store) Registered(ctx context.Context, agent, boot string) (bool, error) {
	var ok bool
	if err := s.pool.QueryRow(ctx, registered, agent, boot).Scan(&ok); err != nil {
		return false, fmt.Errorf("look for agent %s: %w", agent, err)
	}
	return ok, nil
}

const settleCancelled = `SELECT x::text FROM lorayard.settle_cancelled() AS x`

// SettleCancelled settles jobs that were cancelled while no attempt ran.
func (s *Store) SettleCancelled(ctx context.Context) ([]job.ID, error) {
	rows, err := s.pool.Query(ctx, settleCancelled)
	if err != nil {
		return nil, fmt.Errorf("settle cancelled jobs: %w", err)
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[job.ID])
	if err != nil {
		return nil, fmt.Errorf("settle cancelled jobs: %w", err)
	}
	return ids, nil
}

const setWaiting = `
	UPDATE lorayard.jobs j SET waiting = w.reason, start_earliest = w.earliest, start_latest = w.latest
	FROM jsonb_to_recordset($1) AS w(job uuid, reason text, earliest timestamptz, latest timestamptz)
	WHERE j.job_id = w.job AND j.state = 'queued'`

// Wait is why a job waits and when it is expected to start.
type Wait struct {
	Job              job.ID
	Reason           string
	Earliest, Latest time.Time // zero: unknown
}

// SetWaiting records why jobs are not placed.
func (s *Store) SetWaiting(ctx context.Context, waits []Wait) error {
	type row struct {
		Job      job.ID     `json:"job"`
		Reason   string     `json:"reason"`
		Earliest *time.Time `json:"earliest"`
		Latest   *time.Time `json:"latest"`
	}
	known := func(t time.Time) *time.Time {
		if t.IsZero() {
			return nil
		}
		return &t
	}
	doc := make([]row, len(waits))
	for i, w := range waits {
		doc[i] = row{w.Job, clean(w.Reason), known(w.Earliest), known(w.Latest)}
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
