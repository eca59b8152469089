package store

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/jackc/pgx/v5"

	"lorayard/internal/job"
)

// The verbs of a grant.
const (
	GrantRead  = "read"  // what is known of the object, and a URL to download it
	GrantWrite = "write" // a token to upload it
)

// GrantAsk is one object of Storage that an attempt wants to touch.
type GrantAsk struct {
	Verb   string `json:"verb"`
	Bucket string `json:"bucket"`
	Key    string `json:"key"`
	After  int    `json:"after"` // serial of an answer that does not work any more; 0: any will do
}

// Grant is the answer. It opens one object to whoever has it: never log one.
type Grant struct {
	Serial  int    `json:"-"` // 0 without an answer
	Refused string `json:"refused,omitempty"`
	Missing bool   `json:"missing,omitempty"` // read: there is no such object
	Exists  bool   `json:"exists,omitempty"`  // write: there is one already; look whether it is the same
	URL     string `json:"url,omitempty"`
	Token   string `json:"token,omitempty"`
	Limit   int64  `json:"limit,omitempty"` // write: the largest object in bytes that its bucket takes; 0: not known
	Bytes   int64  `json:"bytes,omitempty"`
	ETag    string `json:"etag,omitempty"`
	SHA256  string `json:"sha256,omitempty"` // lower-case hex; empty: not known
}

const grants = `SELECT lorayard.grants($1, $2, $3, $4)`

// Grants asks for what the attempt ref may touch in Storage and returns what
// was answered so far, in the order of asks; nil for what was not. Asking again
// is how to wait. A stale ref gives a failure of kind LeaseLost.
func (s *Store) Grants(ctx context.Context, ref job.Ref, asks []GrantAsk) ([]*Grant, error) {
	doc, err := json.Marshal(asks)
	if err != nil {
		return nil, fmt.Errorf("encode what %s asks for: %w", ref, err)
	}
	var raw []byte
	if err := s.pool.QueryRow(ctx, grants, string(ref.Job), ref.Attempt, ref.Nonce, doc).Scan(&raw); err != nil {
		return nil, fmt.Errorf("ask for grants of %s: %w", ref, err)
	}
	if raw == nil {
		return nil, stale(ref)
	}
	var answers []*struct {
		Serial int
		Answer Grant
	}
	if err := json.Unmarshal(raw, &answers); err != nil || len(answers) != len(asks) {
		return nil, fmt.Errorf("ask for grants of %s: %d answers to %d questions: %w", ref, len(answers), len(asks), err)
	}
	out := make([]*Grant, len(answers))
	for i, a := range answers {
		if a != nil {
			a.Answer.Serial = a.Serial
			out[i] = &a.Answer
		}
	}
	return out, nil
}

// Asked is a grant that waits for its answer.
type Asked struct {
	ID     int64
	Job    job.ID
	Verb   string
	Bucket string
	Key    string
}

// A dispatcher that died over a grant leaves it to the others.
const asked = `
	UPDATE lorayard.grants g SET taken_at = clock_timestamp()
	FROM (SELECT id FROM lorayard.grants
	      WHERE answer IS NULL AND (taken_at IS NULL OR taken_at < clock_timestamp() - interval '40 seconds')
	      ORDER BY asked_at LIMIT $1 FOR UPDATE SKIP LOCKED) o
	WHERE g.id = o.id
	RETURNING g.id, g.job_id::text, g.verb, g.bucket, g.key`

// Asked takes up to n grants that nobody answers yet.
func (s *Store) Asked(ctx context.Context, n int) ([]Asked, error) {
	rows, err := s.pool.Query(ctx, asked, n)
	if err != nil {
		return nil, fmt.Errorf("read what agents ask for: %w", err)
	}
	out, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Asked])
	if err != nil {
		return nil, fmt.Errorf("read what agents ask for: %w", err)
	}
	return out, nil
}

const answer = `UPDATE lorayard.grants SET answer = $2, serial = serial + 1 WHERE id = $1 AND answer IS NULL`

// Answer answers grant id, once.
func (s *Store) Answer(ctx context.Context, id int64, g Grant) error {
	raw, err := json.Marshal(g)
	if err != nil {
		return fmt.Errorf("encode a grant: %w", err)
	}
	if _, err := s.pool.Exec(ctx, answer, id, raw); err != nil {
		return fmt.Errorf("answer a grant: %w", err)
	}
	return nil
}

const giveBack = `UPDATE lorayard.grants SET taken_at = NULL WHERE id = $1 AND answer IS NULL`

// GiveBack lets grant id be taken again, because it could not be answered.
func (s *Store) GiveBack(ctx context.Context, id int64) error {
	if _, err := s.pool.Exec(ctx, giveBack, id); err != nil {
		return fmt.Errorf("give a grant back: %w", err)
	}
	return nil
}

const sweepGrants = `
	DELETE FROM lorayard.grants g USING lorayard.jobs j
	WHERE j.job_id = g.job_id AND (j.state <> 'accepted' OR j.attempt <> g.attempt)`

// SweepGrants removes the grants of attempts that are over.
func (s *Store) SweepGrants(ctx context.Context) error {
	if _, err := s.pool.Exec(ctx, sweepGrants); err != nil {
		return fmt.Errorf("sweep grants: %w", err)
	}
	return nil
}
