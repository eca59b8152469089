package store

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"lorayard/internal/job"
)

// This file is what the watch reads: counts and moments, never a row of a user.

// Began is an attempt that was accepted.
type Began struct {
	Ref      job.Ref // without the nonce
	Class    string  // of its devices
	Assigned time.Time
	Waited   time.Duration // from admission to this assignment
	HandOver time.Duration // from assignment to accept
	After    job.Kind      // why the attempt before it failed; empty: there was none, or it did not fail
	Recovery time.Duration // from the end of that one to this accept
}

// Closed is an attempt that ended.
type Closed struct {
	Ref                          job.Ref // without the nonce
	Outcome                      string
	Kind                         job.Kind
	Status                       job.Status // of the job, when this was its last attempt; else empty
	Agent                        string
	Created, Assigned, Ended, At time.Time // of the job; and of the attempt, which was closed At
}

// Closed attempts are found by their index, open ones through those of jobs: an
// index over accepts would be written once more at each of them.
const began = `
	SELECT a.job_id::text, a.attempt, coalesce((SELECT d.class FROM lorayard.devices d WHERE d.uuid = a.devices[1]), ''), a.assigned_at,
	       a.assigned_at - j.admitted_at, a.accepted_at - a.assigned_at,
	       CASE WHEN p.outcome IN ('failed', 'lost') THEN p.kind ELSE '' END, coalesce(a.accepted_at - p.ended_at, interval '0')
	FROM (
		SELECT x.* FROM lorayard.jobs r JOIN lorayard.attempts x ON x.job_id = r.job_id AND x.attempt = r.attempt WHERE r.state = 'accepted'
		UNION ALL
		SELECT x.* FROM lorayard.attempts x WHERE x.closed_at > $1
	) a JOIN lorayard.jobs j ON j.job_id = a.job_id
	LEFT JOIN lorayard.attempts p ON p.job_id = a.job_id AND p.attempt = a.attempt - 1
	WHERE a.accepted_at > $1`

const closed = `
	SELECT a.job_id::text, a.attempt, a.outcome, a.kind,
	       CASE WHEN j.state = 'settled' AND j.attempt = a.attempt THEN t.status ELSE '' END,
	       a.agent_id, t.created_at, a.assigned_at, a.ended_at, a.closed_at
	FROM lorayard.attempts a JOIN lorayard.jobs j ON j.job_id = a.job_id, LATERAL (SELECT x.status, x.created_at FROM public.training_jobs x WHERE x.id = a.job_id OFFSET 0) t
	WHERE a.closed_at > $1 AND a.outcome IS NOT NULL`

// Moves lists what began and what ended after since, a moment of the database's
// clock, and that clock's time now.
func (s *Store) Moves(ctx context.Context, since time.Time) (bs []Began, cs []Closed, now time.Time, err error) {
	b := &pgx.Batch{}
	b.Queue(`SELECT clock_timestamp()`).QueryRow(func(r pgx.Row) error { return r.Scan(&now) })
	b.Queue(began, since).Query(func(r pgx.Rows) error { bs, err = pgx.CollectRows(r, scanBegan); return err })
	b.Queue(closed, since).Query(func(r pgx.Rows) error { cs, err = pgx.CollectRows(r, scanClosed); return err })
	if err := s.pool.SendBatch(ctx, b).Close(); err != nil {
		return nil, nil, now, fmt.Errorf("read what began and ended: %w", err)
	}
	return bs, cs, now, nil
}

func scanBegan(r pgx.CollectableRow) (b Began, err error) {
	err = r.Scan(&b.Ref.Job, &b.Ref.Attempt, &b.Class, &b.Assigned, &b.Waited, &b.HandOver, &b.After, &b.Recovery)
	return b, err
}

func scanClosed(r pgx.CollectableRow) (c Closed, err error) {
	err = r.Scan(&c.Ref.Job, &c.Ref.Attempt, &c.Outcome, &c.Kind, &c.Status, &c.Agent, &c.Created, &c.Assigned, &c.Ended, &c.At)
	return c, err
}

// Standing counts agents and devices.
type Standing struct {
	Agents  map[string]int // by state: taking, closed, lost
	Devices []DeviceCount
	Wishes  []job.Wish // what jobs wait for, each once
}

// DeviceCount is how many devices of a class are in a state: busy, idle or unfit.
type DeviceCount struct {
	Class, State string
	N            int
}

const agentCounts = `
	SELECT CASE WHEN a.lease_until < clock_timestamp() THEN 'lost' WHEN a.cordoned OR a.draining OR a.drain_by IS NOT NULL THEN 'closed' ELSE 'taking' END, count(*)
	FROM lorayard.agents a GROUP BY 1`

const deviceCounts = `
	SELECT d.class, CASE WHEN held.uuid IS NOT NULL THEN 'busy' WHEN d.fault <> '' THEN 'unfit' ELSE 'idle' END AS state, count(*)::integer
	FROM lorayard.devices d JOIN lorayard.agents a ON a.id = d.agent_id AND a.lease_until > clock_timestamp()
	LEFT JOIN (SELECT DISTINCT unnest(j.devices) AS uuid FROM lorayard.jobs j WHERE j.state IN ('assigned', 'accepted')) held ON held.uuid = d.uuid
	GROUP BY 1, 2 ORDER BY 1, 2`

const wishes = `
	SELECT DISTINCT j.spec ->> 'gpu_class' FROM lorayard.jobs j
	WHERE j.state = 'queued' AND j.desired <> 'pause' AND j.not_before <= clock_timestamp() AND j.spec ->> 'gpu_class' IS NOT NULL LIMIT 100`

// Standing reads how the fleet stands.
func (s *Store) Standing(ctx context.Context) (st Standing, err error) {
	st.Agents = map[string]int{"taking": 0, "closed": 0, "lost": 0}
	b := &pgx.Batch{}
	b.Queue(agentCounts).Query(func(r pgx.Rows) error {
		var state string
		var n int
		_, err := pgx.ForEachRow(r, []any{&state, &n}, func() error { st.Agents[state] = n; return nil })
		return err
	})
	b.Queue(deviceCounts).Query(func(r pgx.Rows) error {
		st.Devices, err = pgx.CollectRows(r, pgx.RowToStructByPos[DeviceCount])
		return err
	})
	b.Queue(wishes).Query(func(r pgx.Rows) error {
		var text string
		_, err := pgx.ForEachRow(r, []any{&text}, func() error {
			if w, err := job.ParseWish(text); err == nil {
				st.Wishes = append(st.Wishes, w)
			}
			return nil
		})
		return err
	})
	if err := s.pool.SendBatch(ctx, b).Close(); err != nil {
		return Standing{}, fmt.Errorf("read how the fleet stands: %w", err)
	}
	return st, nil
}

// Ledger is what the watch on the ledger found.
type Ledger struct {
	Drift       float64 // dollars between cost records and what they should be
	Open, Stray int     // usage intervals that are written; and those that nobody writes any more
}

// CheckLedger compares cost records with usage.
func (s *Store) CheckLedger(ctx context.Context) (l Ledger, err error) {
	if err := s.pool.QueryRow(ctx, `SELECT * FROM lorayard.check_ledger()`).Scan(&l.Drift, &l.Open, &l.Stray); err != nil {
		return l, fmt.Errorf("check the ledger: %w", err)
	}
	return l, nil
}
