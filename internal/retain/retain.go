// Package retain removes from Storage what nobody needs any more: checkpoints
// beyond the newest and the best of a job, those of jobs that are long settled,
// and what attempts that were lost or failed left beside the truth. Files go
// before the row that names them, so that a crash between leaves nothing that
// is not found again.
package retain

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"lorayard/internal/metrics"
	"lorayard/internal/storage"
	"lorayard/internal/store"
)

const (
	bucket = "lora-models"
	batch  = 100
)

// Config says what is kept.
type Config struct {
	Checkpoints int           // newest of a job; the best one stays beside them
	Settled     time.Duration // after a job is settled, its checkpoints go
	Zombie      time.Duration // an attempt is not swept before it ended so long ago
	Every       time.Duration
}

// Keeper sweeps. Several dispatchers may do it at once.
type Keeper struct {
	Store   *store.Store
	Storage *storage.Client
	Metrics *metrics.Dispatcher
	Log     *slog.Logger
	Config  Config
}

// Run sweeps until ctx ends.
func (k *Keeper) Run(ctx context.Context) error {
	tick := time.NewTicker(k.Config.Every)
	defer tick.Stop()
	for {
		if err := k.Sweep(ctx); err != nil && ctx.Err() == nil {
			k.Log.WarnContext(ctx, "Storage not swept, trying again later", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// Sweep removes all that is not needed now.
func (k *Keeper) Sweep(ctx context.Context) error {
	return errors.Join(k.checkpoints(ctx), k.attempts(ctx))
}

func (k *Keeper) checkpoints(ctx context.Context) error {
	for {
		spare, err := k.Store.SpareCheckpoints(ctx, k.Config.Checkpoints, k.Config.Settled, batch)
		if err != nil || len(spare) == 0 {
			return err
		}
		for _, c := range spare {
			if err := k.remove(ctx, c.Bucket, c.Path, nil); err != nil {
				return err
			}
			if err := k.Store.RemoveCheckpoint(ctx, c.ID); err != nil {
				return err
			}
			k.Log.InfoContext(ctx, "checkpoint removed", "path", c.Path)
		}
	}
}

func (k *Keeper) attempts(ctx context.Context) error {
	for {
		ended, err := k.Store.EndedAttempts(ctx, k.Config.Zombie, batch)
		if err != nil || len(ended) == 0 {
			return err
		}
		for _, a := range ended {
			for _, folder := range a.Folders {
				if err := k.remove(ctx, bucket, folder, a.Kept); err != nil {
					return err
				}
			}
			if err := k.Store.Swept(ctx, a.Job, a.Attempt); err != nil {
				return err
			}
		}
	}
}

// remove removes every object under folder but those under a folder of kept.
func (k *Keeper) remove(ctx context.Context, bucket, folder string, kept []string) error {
	var keys []string
	for i, err := range k.Storage.List(ctx, bucket, folder+"/") {
		if err != nil {
			return fmt.Errorf("list %s: %w", folder, err)
		}
		if !under(i.Key, kept) {
			keys = append(keys, i.Key)
		}
	}
	if len(keys) == 0 {
		return nil
	}
	n, err := k.Storage.Remove(ctx, bucket, keys...)
	k.Metrics.Removed.Add(float64(n))
	if err != nil {
		return fmt.Errorf("remove %d objects of %s: %w", len(keys), folder, err)
	}
	return nil
}

func under(key string, folders []string) bool {
	for _, f := range folders {
		if strings.HasPrefix(key, f+"/") {
			return true
		}
	}
	return false
}
