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

// DueDataset is a data set that waits for somebody to validate it. Run and Send
// name the task that is sent for it.
type DueDataset struct {
	ID   string
	Run  int64
	Send int
}

const dueDatasets = `SELECT dataset_id::text, run, send FROM lorayard.due_datasets($1, $2)`

// DueDatasets returns up to n data sets for which no task was sent in the last
// time again, and marks them as sent.
func (s *Store) DueDatasets(ctx context.Context, n int, again time.Duration) ([]DueDataset, error) {
	rows, err := s.pool.Query(ctx, dueDatasets, n, again)
	if err != nil {
		return nil, fmt.Errorf("read data sets to validate: %w", err)
	}
	due, err := pgx.CollectRows(rows, pgx.RowToStructByPos[DueDataset])
	if err != nil {
		return nil, fmt.Errorf("read data sets to validate: %w", err)
	}
	return due, nil
}

// Validation is one try to validate a data set. Run is its fencing token.
type Validation struct {
	Dataset  string `json:"dataset"`
	Run      int64  `json:"run"`
	User     string `json:"user"`
	Name     string `json:"name"`
	Bucket   string `json:"bucket"`
	Path     string `json:"path"`
	Failures int    `json:"failures"` // tries in a row before this one that came to no verdict
}

const beginValidation = `SELECT lorayard.begin_validation($1, $2)`

// BeginValidation begins a try, which others leave alone for the time of lease;
// ok is false when there is nothing to do or somebody is at it.
func (s *Store) BeginValidation(ctx context.Context, dataset string, lease time.Duration) (v Validation, ok bool, err error) {
	var raw []byte
	err = s.pool.QueryRow(ctx, beginValidation, dataset, lease).Scan(&raw)
	if errors.Is(err, pgx.ErrNoRows) || err == nil && raw == nil {
		return v, false, nil
	}
	if err == nil {
		err = json.Unmarshal(raw, &v)
	}
	if err != nil {
		return v, false, fmt.Errorf("begin to validate data set %s: %w", dataset, err)
	}
	return v, true, nil
}

const renewValidation = `SELECT lorayard.renew_validation($1, $2, $3)`

// RenewValidation keeps a try; false says that it is not wanted any more.
func (s *Store) RenewValidation(ctx context.Context, v Validation, lease time.Duration) (kept bool, err error) {
	if err := s.pool.QueryRow(ctx, renewValidation, v.Dataset, v.Run, lease).Scan(&kept); err != nil {
		return false, fmt.Errorf("go on validating data set %s: %w", v.Dataset, err)
	}
	return kept, nil
}

const postponeValidation = `SELECT lorayard.postpone_validation($1, $2, $3, $4)`

// PostponeValidation ends a try without a verdict; the next one may begin after
// delay. An empty trouble is no failure.
func (s *Store) PostponeValidation(ctx context.Context, v Validation, delay time.Duration, trouble string) error {
	if _, err := s.pool.Exec(ctx, postponeValidation, v.Dataset, v.Run, delay, clean(trouble)); err != nil {
		return fmt.Errorf("put off validating data set %s: %w", v.Dataset, err)
	}
	return nil
}

// Verdict is the end of a validation, in the words and columns of the app.
type Verdict struct {
	Ready                bool            `json:"ready"`
	Notice               string          `json:"notice"`            // of the notification
	Message              *string         `json:"message,omitempty"` // error_message; nil: NULL
	Errors               json.RawMessage `json:"errors"`            // [{line, error, suggestion}], ten at most
	Samples              json.RawMessage `json:"samples"`           // three conversations
	TrainingPairs        int64           `json:"training_pairs"`
	ValidationPairs      int64           `json:"validation_pairs"`
	Tokens               int64           `json:"tokens"`
	TurnsPerConversation float64         `json:"turns_per_conversation"`
	TokensPerTurn        float64         `json:"tokens_per_turn"`
	Report               json.RawMessage `json:"report"`
	Source               string          `json:"source"` // bucket/path of what was judged
	File                 *DataFile       `json:"file,omitempty"`
}

// DataFile is a file that a trainer reads.
type DataFile struct {
	Bucket string `json:"bucket"`
	Path   string `json:"path"`
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"` // lower-case hex; empty: not known
}

const finishValidation = `SELECT lorayard.finish_validation($1, $2, $3)`

// FinishValidation writes the verdict of a try, its figures and the user's
// notification in one statement; false says that they are not wanted any more,
// or were written already.
func (s *Store) FinishValidation(ctx context.Context, v Validation, verdict Verdict) (written bool, err error) {
	raw, err := json.Marshal(verdict)
	if err != nil {
		return false, fmt.Errorf("encode the verdict on data set %s: %w", v.Dataset, err)
	}
	if err := s.pool.QueryRow(ctx, finishValidation, v.Dataset, v.Run, raw).Scan(&written); err != nil {
		return false, fmt.Errorf("write the verdict on data set %s: %w", v.Dataset, err)
	}
	return written, nil
}

const dataFile = `SELECT lorayard.data_file($1, $2, $3)`

// DataFile is what the attempt ref trains on: the normalised file of its data
// set, or the user's own where nobody validated it. A stale ref gives a failure
// of kind LeaseLost.
func (s *Store) DataFile(ctx context.Context, ref job.Ref) (f DataFile, err error) {
	var raw []byte
	err = s.pool.QueryRow(ctx, dataFile, string(ref.Job), ref.Attempt, ref.Nonce).Scan(&raw)
	if errors.Is(err, pgx.ErrNoRows) || err == nil && raw == nil {
		return f, stale(ref)
	}
	if err == nil {
		err = json.Unmarshal(raw, &f)
	}
	if err != nil {
		return f, fmt.Errorf("ask for the data file of %s: %w", ref, err)
	}
	return f, nil
}
