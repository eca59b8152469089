package devstack

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"

	"github.com/jackc/pgx/v5"

	"lorayard/internal/storage"
)

// This file does what the app does, with its keys and its spellings, as the
// signed-in user.

// User makes a user of the app and returns its id.
func (s *Stack) User(ctx context.Context) (string, error) {
	var id string
	err := s.Pool.QueryRow(ctx, `INSERT INTO auth.users (email) VALUES (gen_random_uuid() || '@example.com') RETURNING id::text`).Scan(&id)
	if err != nil {
		return "", fmt.Errorf("make a user: %w", err)
	}
	return id, nil
}

// As runs f as the user does through PostgREST: role authenticated and the
// claims of its JWT.
func (s *Stack) As(ctx context.Context, user string, f func(pgx.Tx) error) error {
	return pgx.BeginFunc(ctx, s.Pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SELECT set_config('request.jwt.claims', jsonb_build_object('sub', $1::text, 'role', 'authenticated')::text, true)`, user); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `SET LOCAL ROLE authenticated`); err != nil {
			return err
		}
		return f(tx)
	})
}

// Upload puts a data file where the app puts it and inserts its row.
func (s *Stack) Upload(ctx context.Context, user, path, name string) (dataset string, err error) {
	st, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("look at the data file: %w", err)
	}
	if err := s.Pool.QueryRow(ctx, `SELECT gen_random_uuid()::text`).Scan(&dataset); err != nil {
		return "", fmt.Errorf("draw an id: %w", err)
	}
	file := filepath.Base(path)
	key := user + "/" + dataset + "/" + file
	if _, err := s.Store.Upload(ctx, "lora-datasets", key, path, storage.Options{ContentType: "application/jsonl"}); err != nil {
		return "", err
	}
	err = s.As(ctx, user, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `INSERT INTO datasets (id, user_id, name, format, status, storage_bucket, storage_path, file_name, file_size, training_ready)
			VALUES ($1, $2, $3, 'brightrun_lora_v4', 'ready', 'lora-datasets', $4, $5, $6, true)`, dataset, user, name, key, file, st.Size())
		return err
	})
	if err != nil {
		return "", fmt.Errorf("insert the data set: %w", err)
	}
	return dataset, nil
}

// Job is what the app sends when a user presses "start training".
type Job struct {
	User, Dataset, Preset string
	Hyperparameters       map[string]any
	GPUConfig             map[string]any
}

// Insert inserts a job row exactly as the app does.
func (s *Stack) Insert(ctx context.Context, j Job) (id string, err error) {
	epochs, ok := j.Hyperparameters["epochs"]
	if !ok {
		epochs = 1
	}
	err = s.As(ctx, j.User, func(tx pgx.Tx) error {
		return tx.QueryRow(ctx, `INSERT INTO training_jobs (user_id, dataset_id, preset_id, hyperparameters, gpu_config, status,
				current_stage, progress, current_epoch, total_epochs, current_step, total_steps, current_metrics, current_cost, estimated_total_cost)
			VALUES ($1, $2, $3, $4, $5, 'queued', 'queued', 0, 0, $6, 0, 100, '{}', 0, 1.00) RETURNING id::text`,
			j.User, j.Dataset, j.Preset, j.Hyperparameters, j.GPUConfig, epochs).Scan(&id)
	})
	if err != nil {
		return "", fmt.Errorf("insert the job: %w", err)
	}
	return id, nil
}

// Cancel cancels a job as the app does; false when there was nothing to cancel.
func (s *Stack) Cancel(ctx context.Context, user, id string) (bool, error) {
	var n int64
	err := s.As(ctx, user, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `UPDATE training_jobs SET status = 'cancelled', completed_at = now(), final_cost = current_cost WHERE id = $1`, id)
		n = tag.RowsAffected()
		return err
	})
	if err != nil {
		return false, fmt.Errorf("cancel the job: %w", err)
	}
	return n > 0, nil
}

// Digest is the SHA-256 of a file in hex.
func Digest(path string) (string, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(raw)
	return hex.EncodeToString(sum[:]), nil
}
