package storetest

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// invariant is one statement that holds at every instant, whatever was killed,
// cut or doubled before it. Its query gives a row per violation.
type invariant struct {
	number int    // of the promise it belongs to, see invariants
	says   string // what must be true
	sql    string
}

// invariants are the promises of the system as far as SQL can ask for them:
//
//  1. one attempt of a job may write at any instant, and nobody else does
//  2. one final status, once; completed means that the artifact is there
//  3. no job is lost: what is not final stands where it will be placed again
//  4. one artifact, one settlement, one notification of each type
//  5. one owner a device; the bill is rate times the time of its intervals
//  6. every sample and line exactly once, in order
//  7. a resumed run starts from a checkpoint that an earlier attempt published
//  8. nothing of one user stands under another's name
//
// All of them are asked in one snapshot, so they may be asked under traffic.
// Nothing here calls the functions that it judges.
var invariants = []invariant{
	{1, "an accepted job has one open attempt, accepted under its nonce by its agent", `
		SELECT j.job_id FROM lorayard.jobs j WHERE j.state = 'accepted' AND NOT EXISTS (
		  SELECT 1 FROM lorayard.attempts a WHERE a.job_id = j.job_id AND a.attempt = j.attempt AND a.nonce = j.nonce
		    AND a.agent_id = j.agent_id AND a.devices = j.devices AND a.accepted_at IS NOT NULL AND a.ended_at IS NULL)`},
	{1, "a job has no open attempt but its newest", `
		SELECT a.job_id || ' attempt ' || a.attempt FROM lorayard.attempts a JOIN lorayard.jobs j USING (job_id)
		WHERE a.ended_at IS NULL AND (a.attempt <> j.attempt OR j.state NOT IN ('assigned', 'accepted'))`},
	{1, "an attempt is assigned after the one before it ended", `
		SELECT job_id || ' attempt ' || attempt FROM (
		  SELECT job_id, attempt, assigned_at, lag(attempt) OVER w AS previous, lag(ended_at) OVER w AS before
		  FROM lorayard.attempts WINDOW w AS (PARTITION BY job_id ORDER BY attempt)) x
		WHERE previous IS NOT NULL AND (before IS NULL OR before > assigned_at)`},
	{1, "a nonce is drawn once", `
		SELECT job_id FROM lorayard.attempts WHERE nonce IS NOT NULL GROUP BY job_id, nonce HAVING count(*) > 1`},
	{1, "only an accepted attempt writes", `
		SELECT w.what || ' of ' || w.job_id || ' attempt ' || w.attempt FROM (
		  SELECT DISTINCT 'sample' AS what, job_id, attempt FROM lorayard.samples
		  UNION SELECT 'line', job_id, attempt FROM public.job_logs
		  UNION SELECT 'checkpoint', job_id, attempt FROM public.checkpoints
		  UNION SELECT 'usage', job_id, attempt FROM lorayard.usage_intervals) w
		LEFT JOIN lorayard.attempts a USING (job_id, attempt) WHERE a.accepted_at IS NULL`},
	{1, "an attempt publishes no checkpoint after the next one was accepted", `
		SELECT c.job_id || ' attempt ' || c.attempt FROM public.checkpoints c
		JOIN lorayard.attempts a ON a.job_id = c.job_id AND a.attempt > c.attempt AND a.accepted_at < c.created_at`},

	// A row that the app cancelled is final for its user at once, and settled
	// when its attempt has ended.
	{2, "a settled job is final, and a final one settled unless it was cancelled", `
		SELECT t.id FROM training_jobs t JOIN lorayard.jobs j ON j.job_id = t.id
		WHERE (j.state = 'settled') <> (t.status IN ('completed', 'failed', 'cancelled'))
		  AND NOT (t.status = 'cancelled' AND j.state <> 'settled')`},
	{2, "a job completes by its last attempt, and no other job has an attempt that completed", `
		SELECT t.id FROM training_jobs t JOIN lorayard.jobs j ON j.job_id = t.id LEFT JOIN lorayard.attempts a ON a.job_id = t.id AND a.outcome = 'completed'
		GROUP BY t.id, j.attempt HAVING (t.status = 'completed') <> (count(a.attempt) = 1 AND max(a.attempt) = j.attempt) OR count(a.attempt) > 1`},
	{2, "a completed job has exactly one artifact and names it", `
		SELECT t.id FROM training_jobs t WHERE t.status = 'completed' AND t.external_job_id IS NULL
		  AND (SELECT count(*) FROM model_artifacts m WHERE m.job_id = t.id AND m.id = t.artifact_id) <> 1`},
	{2, "an artifact belongs to a completed job", `
		SELECT m.id FROM model_artifacts m JOIN training_jobs t ON t.id = m.job_id WHERE t.status <> 'completed'`},
	{2, "every file of an artifact has a recorded digest", `
		SELECT m.id || ' ' || f.key FROM model_artifacts m, jsonb_each_text(m.artifacts) f
		WHERE NOT EXISTS (SELECT 1 FROM jsonb_array_elements(m.training_summary -> 'files') d
		                  WHERE d ->> 'name' = f.key AND d ->> 'sha256' ~ '^[0-9a-f]{64}$')`},
	{2, "nothing is accepted for a job that has ended", `
		SELECT a.job_id || ' attempt ' || a.attempt FROM lorayard.attempts a JOIN training_jobs t ON t.id = a.job_id
		WHERE t.status IN ('completed', 'failed') AND a.accepted_at > t.completed_at`},

	{3, "a queued job waits for its placement and nothing else", `
		SELECT j.job_id FROM lorayard.jobs j JOIN training_jobs t ON t.id = j.job_id
		WHERE j.state = 'queued' AND (j.agent_id IS NOT NULL OR j.devices <> '{}' OR t.status NOT IN ('queued', 'cancelled'))`},
	{3, "an assigned job has an agent, devices, and an open attempt that nobody accepted", `
		SELECT j.job_id FROM lorayard.jobs j JOIN training_jobs t ON t.id = j.job_id
		WHERE j.state = 'assigned' AND (j.agent_id IS NULL OR j.devices = '{}' OR t.status NOT IN ('queued', 'cancelled') OR NOT EXISTS (
		  SELECT 1 FROM lorayard.attempts a WHERE a.job_id = j.job_id AND a.attempt = j.attempt AND a.accepted_at IS NULL AND a.ended_at IS NULL))`},
	{3, "a job under way for its user is accepted", `
		SELECT t.id FROM training_jobs t LEFT JOIN lorayard.jobs j ON j.job_id = t.id
		WHERE t.external_job_id IS NULL AND t.status IN ('initializing', 'running') AND j.state IS DISTINCT FROM 'accepted'`},
	{3, "no job ends without a settlement", `
		SELECT t.id FROM training_jobs t LEFT JOIN lorayard.jobs j ON j.job_id = t.id
		WHERE t.external_job_id IS NULL AND t.status IN ('completed', 'failed') AND j.state IS DISTINCT FROM 'settled'`},
	{3, "attempts are numbered from 1 to the job's own number without gaps", `
		SELECT j.job_id FROM lorayard.jobs j LEFT JOIN lorayard.attempts a USING (job_id)
		GROUP BY j.job_id HAVING count(a.attempt) <> j.attempt OR coalesce(min(a.attempt), 1) <> 1 OR coalesce(max(a.attempt), 0) <> j.attempt`},
	{3, "an attempt that ended has an outcome, and only such a one", `
		SELECT job_id || ' attempt ' || attempt FROM lorayard.attempts WHERE (ended_at IS NULL) <> (outcome IS NULL)`},

	{4, "a job has one artifact, one cost record and one notification of each type at most", `
		SELECT 'artifact of ' || job_id FROM model_artifacts GROUP BY job_id HAVING count(*) > 1
		UNION ALL SELECT 'cost of ' || job_id FROM cost_records GROUP BY job_id, cost_type HAVING count(*) > 1
		UNION ALL SELECT type || ' of ' || (metadata ->> 'job_id') FROM notifications WHERE type <> 'job_queued' AND metadata ? 'job_id' GROUP BY metadata ->> 'job_id', type HAVING count(*) > 1`},
	{4, "a user hears of the start, and of exactly the end that came", `
		SELECT want.type || ' of ' || t.id FROM training_jobs t JOIN lorayard.jobs j ON j.job_id = t.id AND j.state = 'settled',
		  LATERAL (VALUES ('job_started', EXISTS (SELECT 1 FROM lorayard.attempts a WHERE a.job_id = t.id AND a.accepted_at IS NOT NULL)),
		                  ('job_completed', t.status = 'completed'), ('artifact_ready', t.status = 'completed'), ('job_failed', t.status = 'failed')) AS want(type, due)
		WHERE want.due <> EXISTS (SELECT 1 FROM notifications n WHERE n.type = want.type AND n.metadata ->> 'job_id' = t.id::text)`},

	{5, "no device has two owners", `
		SELECT a.device || ' of ' || a.job_id || ' and ' || b.job_id FROM lorayard.usage_intervals a JOIN lorayard.usage_intervals b
		ON a.device = b.device AND a.during && b.during AND (a.job_id, a.attempt, a.seq) < (b.job_id, b.attempt, b.seq)`},
	{5, "no device is lent to two open attempts", `
		SELECT d || ' of ' || a.job_id || ' and ' || b.job_id FROM lorayard.attempts a
		JOIN lorayard.attempts b ON a.ended_at IS NULL AND b.ended_at IS NULL AND a.job_id < b.job_id AND a.devices && b.devices, unnest(a.devices) d
		WHERE d = ANY (b.devices)`},
	{5, "usage of an attempt has no gaps, and lies within it", `
		SELECT job_id || ' attempt ' || attempt || ' ' || device FROM (
		  SELECT u.*, a.accepted_at, a.ended_at, a.devices, lag(upper(u.during)) OVER (PARTITION BY u.job_id, u.attempt, u.device ORDER BY u.seq) AS before
		  FROM lorayard.usage_intervals u JOIN lorayard.attempts a USING (job_id, attempt)) x
		WHERE lower(during) <> coalesce(before, accepted_at) OR NOT device = ANY (devices)
		   OR upper(during) > ended_at + interval '1 microsecond'`}, // an interval is never empty
	{5, "usage of a closed attempt is closed, and of no other", `
		SELECT u.job_id || ' attempt ' || u.attempt || ' ' || u.device FROM lorayard.usage_intervals u JOIN lorayard.attempts a USING (job_id, attempt)
		WHERE u.closed <> (a.ended_at IS NOT NULL)`},
	// What the user pays for, the user had: both statements of a settlement
	// read the clock.
	{5, "a billable attempt that its agent ended is measured to its end", `
		SELECT a.job_id || ' attempt ' || a.attempt FROM lorayard.attempts a
		WHERE a.outcome IN ('completed', 'cancelled') AND a.accepted_at IS NOT NULL AND (
		  SELECT count(DISTINCT u.device) FROM lorayard.usage_intervals u
		  WHERE u.job_id = a.job_id AND u.attempt = a.attempt AND u.billable AND upper(u.during) > a.ended_at - interval '1 second') <> cardinality(a.devices)`},
	{5, "lost attempts are not billed", `
		SELECT u.job_id || ' attempt ' || u.attempt FROM lorayard.usage_intervals u JOIN lorayard.attempts a USING (job_id, attempt)
		WHERE a.outcome = 'lost' AND u.billable`},
	{5, "the cost record is rate times billable GPU time", `
		SELECT j.job_id FROM lorayard.jobs j JOIN training_jobs t ON t.id = j.job_id LEFT JOIN LATERAL (
		  SELECT sum(floor(u.micro_usd_per_hour * extract(epoch FROM upper(u.during) - lower(u.during)) / 3600)) AS micro
		  FROM lorayard.usage_intervals u WHERE u.job_id = j.job_id AND u.billable) b ON true LEFT JOIN LATERAL (
		  SELECT sum(c.amount) AS amount, count(*) AS n FROM cost_records c WHERE c.job_id = j.job_id) c ON true
		WHERE j.state = 'settled' AND (t.final_cost IS DISTINCT FROM round(coalesce(b.micro, 0) / 1000000, 2)
		  OR coalesce(c.amount, 0) <> t.final_cost OR c.n <> (b.micro IS NOT NULL)::int)`},
	{5, "nobody pays for a job that is not settled", `
		SELECT c.job_id FROM cost_records c JOIN lorayard.jobs j USING (job_id) WHERE j.state <> 'settled'`},

	// Samples and lines of an attempt share one count, the spool's.
	{6, "samples and lines of an attempt have no gap and no number twice", `
		SELECT job_id || ' attempt ' || attempt FROM (
		  SELECT job_id, attempt, seq FROM lorayard.samples UNION ALL SELECT job_id, attempt, seq FROM public.job_logs) s
		GROUP BY job_id, attempt HAVING min(seq) <> 1 OR max(seq) <> count(*) OR count(DISTINCT seq) <> count(*)`},
	{6, "samples of an attempt rise by one step from where it resumed", `
		SELECT DISTINCT job_id || ' attempt ' || attempt FROM (
		  SELECT s.job_id, s.attempt, s.step, a.resume_step + row_number() OVER (PARTITION BY s.job_id, s.attempt ORDER BY s.seq) AS due
		  FROM lorayard.samples s JOIN lorayard.attempts a USING (job_id, attempt) WHERE s.validation_loss IS NULL) x WHERE step <> due`},
	{6, "every step of a job is measured by one of its attempts", `
		SELECT s.job_id FROM lorayard.samples s GROUP BY s.job_id HAVING min(s.step) <> 1 OR max(s.step) <> count(DISTINCT s.step)`},
	{6, "a completed job shows the last step that was measured", `
		SELECT t.id FROM training_jobs t JOIN lorayard.samples s ON s.job_id = t.id
		WHERE t.status = 'completed' GROUP BY t.id HAVING t.current_step <> max(s.step)`},
	{6, "metrics rows of a job rise in step with time, one a step", `
		SELECT job_id FROM (SELECT job_id, step, lag(step) OVER (PARTITION BY job_id ORDER BY timestamp, step) AS before FROM metrics_points) x WHERE before >= step`},

	{7, "an attempt resumes from a checkpoint of an earlier one", `
		SELECT a.job_id || ' attempt ' || a.attempt FROM lorayard.attempts a WHERE a.resume_step > 0
		  AND NOT EXISTS (SELECT 1 FROM public.checkpoints c WHERE c.job_id = a.job_id AND c.attempt < a.attempt AND c.step = a.resume_step)`},

	{8, "nothing of one user stands under another's name", `
		SELECT 'checkpoint ' || c.id FROM checkpoints c JOIN training_jobs t ON t.id = c.job_id WHERE c.user_id <> t.user_id OR c.path NOT LIKE t.user_id || '/%'
		UNION ALL SELECT 'artifact ' || m.id FROM model_artifacts m JOIN training_jobs t ON t.id = m.job_id, jsonb_each_text(m.artifacts) f WHERE f.value NOT LIKE t.user_id || '/%'
		UNION ALL SELECT 'artifact ' || m.id FROM model_artifacts m JOIN training_jobs t ON t.id = m.job_id WHERE m.user_id <> t.user_id
		UNION ALL SELECT 'line ' || l.id FROM job_logs l JOIN training_jobs t ON t.id = l.job_id WHERE l.user_id <> t.user_id
		UNION ALL SELECT 'cost ' || c.id FROM cost_records c JOIN training_jobs t ON t.id = c.job_id WHERE c.user_id <> t.user_id
		UNION ALL SELECT 'usage of ' || u.job_id FROM lorayard.usage_intervals u JOIN training_jobs t ON t.id = u.job_id WHERE u.user_id <> t.user_id
		UNION ALL SELECT 'notification ' || n.id FROM notifications n JOIN training_jobs t ON n.metadata ->> 'job_id' = t.id::text WHERE n.user_id <> t.user_id
		UNION ALL SELECT 'normalised file of ' || v.dataset_id FROM lorayard.validations v JOIN datasets d ON d.id = v.dataset_id WHERE v.path NOT LIKE d.user_id || '/%'
		UNION ALL SELECT 'data set of ' || t.id FROM training_jobs t JOIN datasets d ON d.id = t.dataset_id JOIN lorayard.attempts a ON a.job_id = t.id WHERE d.user_id <> t.user_id`},
}

// unsettled lists what is not over.
const unsettled = `
	SELECT t.id::text || ' is ' || t.status || ', ' || coalesce(j.state, 'not admitted')
	FROM training_jobs t LEFT JOIN lorayard.jobs j ON j.job_id = t.id
	WHERE t.external_job_id IS NULL AND (t.status NOT IN ('completed', 'failed', 'cancelled') OR coalesce(j.state, 'settled') <> 'settled')
	ORDER BY t.id`

// most bounds how many rows of one violation are told.
const most = 5

// Violations asks every invariant of the system in one snapshot of the
// database and returns a line for each that does not hold: its number, what it
// says, and the first rows that break it. It may be asked at any time. The
// error says that the database could not be asked.
func Violations(ctx context.Context, pool *pgxpool.Pool) ([]string, error) {
	var out []string
	err := pgx.BeginTxFunc(ctx, pool, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) (err error) {
		out, err = ask(ctx, tx)
		return err
	})
	return out, err
}

func ask(ctx context.Context, q querier) ([]string, error) {
	var out []string
	for _, i := range invariants {
		bad, err := texts(ctx, q, "SELECT x::text FROM ("+i.sql+") AS q(x) ORDER BY 1")
		if err != nil {
			return nil, fmt.Errorf("ask whether %s: %w", i.says, err)
		}
		if len(bad) > 0 {
			out = append(out, fmt.Sprintf("invariant %d: %s; but not %s", i.number, i.says, first(bad)))
		}
	}
	return out, nil
}

// Unsettled lists the jobs that are not over, a line each: none may be left
// when everything that was to run has run. The error says that the database
// could not be asked.
func Unsettled(ctx context.Context, pool *pgxpool.Pool) ([]string, error) {
	out, err := texts(ctx, pool, unsettled)
	if err != nil {
		return nil, fmt.Errorf("ask what is not settled: %w", err)
	}
	return out, nil
}

type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}

func texts(ctx context.Context, q querier, sql string) ([]string, error) {
	rows, err := q.Query(ctx, sql)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

func first(rows []string) string {
	if n := len(rows) - most; n > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(rows[:most], ", "), n)
	}
	return strings.Join(rows, ", ")
}

// Check fails the test for every invariant that does not hold.
func Check(t testing.TB, pool *pgxpool.Pool) {
	t.Helper()
	bad, err := Violations(context.Background(), pool)
	if err != nil {
		t.Error(err)
	}
	for _, v := range bad {
		t.Error(v)
	}
}

// CheckSettled is Check when nothing is to run any more.
func CheckSettled(t testing.TB, pool *pgxpool.Pool) {
	t.Helper()
	Check(t, pool)
	left, err := Unsettled(context.Background(), pool)
	if err != nil {
		t.Error(err)
	}
	if len(left) > 0 {
		t.Error("not settled: " + first(left))
	}
}
