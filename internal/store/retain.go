package store

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"lorayard/internal/job"
)

// Folder is a folder of Storage.
type Folder struct {
	ID     string // of the checkpoint
	Bucket string
	Path   string
}

const spare = `
	SELECT c.id::text, c.bucket, c.path
	FROM (SELECT c.*, row_number() OVER (PARTITION BY c.job_id ORDER BY c.step DESC, c.attempt DESC) AS newest,
	             row_number() OVER (PARTITION BY c.job_id ORDER BY c.loss NULLS LAST, c.step DESC, c.attempt DESC) AS best
	      FROM public.checkpoints c) c
	JOIN lorayard.jobs j ON j.job_id = c.job_id JOIN public.training_jobs t ON t.id = c.job_id
	WHERE c.newest > $1 AND c.best > 1 OR j.state = 'settled' AND t.completed_at < clock_timestamp() - $2::interval
	ORDER BY c.id LIMIT $3`

// SpareCheckpoints returns up to n checkpoints that nobody needs: beyond the
// newest keep of a job and its best, or of a job that was settled longer ago
// than after.
func (s *Store) SpareCheckpoints(ctx context.Context, keep int, after time.Duration, n int) ([]Folder, error) {
	rows, err := s.pool.Query(ctx, spare, keep, after, n)
	if err != nil {
		return nil, fmt.Errorf("look for spare checkpoints: %w", err)
	}
	out, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Folder])
	if err != nil {
		return nil, fmt.Errorf("look for spare checkpoints: %w", err)
	}
	return out, nil
}

const removeCheckpoint = `DELETE FROM public.checkpoints WHERE id = $1`

// RemoveCheckpoint forgets a checkpoint whose files are gone.
func (s *Store) RemoveCheckpoint(ctx context.Context, id string) error {
	if _, err := s.pool.Exec(ctx, removeCheckpoint, id); err != nil {
		return fmt.Errorf("remove checkpoint %s: %w", id, err)
	}
	return nil
}

// Ended is an attempt that is over and may have left something in Storage.
type Ended struct {
	Job     job.ID
	Attempt int
	Folders []string // in bucket lora-models, where nothing is needed but what is below Kept
	Kept    []string // folders of its checkpoints
}

const ended = `
	UPDATE lorayard.attempts a SET sweep_after = clock_timestamp() + interval '30 minutes'
	FROM (SELECT x.job_id, x.attempt FROM lorayard.attempts x
	      WHERE NOT x.swept AND x.ended_at < clock_timestamp() - $1::interval AND coalesce(x.sweep_after, '-infinity') < clock_timestamp()
	      ORDER BY x.ended_at LIMIT $2 FOR UPDATE SKIP LOCKED) o, lorayard.jobs j
	WHERE a.job_id = o.job_id AND a.attempt = o.attempt AND j.job_id = a.job_id
	RETURNING a.job_id::text, a.attempt,
		CASE WHEN a.nonce IS NULL THEN '{}' ELSE
			ARRAY[j.user_id || '/' || a.job_id || '/a' || a.attempt || '-' || a.nonce]
			|| CASE WHEN EXISTS (SELECT 1 FROM public.model_artifacts m WHERE m.id = lorayard.artifact_of(a.job_id, a.attempt, a.nonce)) THEN '{}'
			        ELSE ARRAY[j.user_id || '/' || lorayard.artifact_of(a.job_id, a.attempt, a.nonce)] END END,
		ARRAY(SELECT c.path FROM public.checkpoints c WHERE c.job_id = a.job_id AND c.attempt = a.attempt)`

// EndedAttempts takes up to n attempts to sweep that ended longer ago than
// after: a zombie may write beside the truth until its deadline.
func (s *Store) EndedAttempts(ctx context.Context, after time.Duration, n int) ([]Ended, error) {
	rows, err := s.pool.Query(ctx, ended, after, n)
	if err != nil {
		return nil, fmt.Errorf("look for ended attempts: %w", err)
	}
	out, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Ended])
	if err != nil {
		return nil, fmt.Errorf("look for ended attempts: %w", err)
	}
	return out, nil
}

const swept = `UPDATE lorayard.attempts SET swept = true WHERE job_id = $1 AND attempt = $2`

// Swept says that nothing is left of an attempt in Storage but its checkpoints.
func (s *Store) Swept(ctx context.Context, id job.ID, attempt int) error {
	if _, err := s.pool.Exec(ctx, swept, string(id), attempt); err != nil {
		return fmt.Errorf("note that attempt %d of job %s is swept: %w", attempt, id, err)
	}
	return nil
}
