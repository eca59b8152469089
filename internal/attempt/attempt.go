// Package attempt takes one accepted attempt to its settlement:
//
//	prepare → train → upload → settle
//
// It is the heart of the agent and should read as a story, a file a chapter.
// Whatever goes wrong has a kind; whatever is ours is cleaned up on a context
// that outlives the attempt's own.
package attempt

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/ship"
	"lorayard/internal/spool"
	"lorayard/internal/storage"
	"lorayard/internal/store"
	"lorayard/internal/trainer"
)

// Config is what an operator may turn.
type Config struct {
	DataDir         string        // run directories, spools and the data-set cache
	ModelsDir       string        // base models, <dir>/<name>
	Pretend         bool          // devices are pretended: train on the CPU
	Threads         int           // CPU threads of the trainer, 0: it chooses
	CheckpointEvery time.Duration // how often the trainer saves
	LeaveGrace      time.Duration // how long a trainer may take to save and leave
	MinFreeBytes    int64         // free disk that must be left before an attempt starts
	Environ         []string      // our environment, of which the trainer sees an allow-list
}

// Runner runs attempts.
type Runner struct {
	Store   *store.Store
	Storage *storage.Client
	Trainer *trainer.Trainer
	Metrics *metrics.Agent
	Log     *slog.Logger
	Config  Config
}

// Causes with which the agent ends an attempt's context.
var (
	ErrCancelled = errors.New("the job was cancelled")
	ErrPreempted = errors.New("the attempt was preempted")
	ErrLeaseLost = errors.New("the attempt belongs to somebody else now")
)

// artifactBucket is where checkpoints and adapters are kept (the app's).
const artifactBucket = "lora-models"

// run is the state of one attempt.
type run struct {
	*Runner
	as    job.Assignment
	dir   string
	log   *slog.Logger
	ship  *ship.Shipper
	stage stageClock
	board board
}

// Run carries out as until it is settled or lost. ctx ends it early; its cause
// says why: ErrCancelled and ErrLeaseLost kill the trainer, anything else lets
// it save a checkpoint and hands the job back.
func (r *Runner) Run(ctx context.Context, as job.Assignment) error {
	x := &run{
		Runner: r, as: as,
		dir: filepath.Join(r.Config.DataDir, "attempts", fmt.Sprintf("%s-a%d-%s", as.Ref.Job, as.Ref.Attempt, as.Ref.Nonce)),
		log: r.Log.With("job", as.Ref.Job, "attempt", as.Ref.Attempt),
	}
	if err := os.MkdirAll(x.dir, 0o700); err != nil {
		return x.settleFailure(ctx, &job.Failure{Kind: job.DiskFull, Err: fmt.Errorf("make the attempt's directory: %w", err)})
	}
	// The directory is only of use while the attempt can be written.
	defer os.RemoveAll(x.dir)
	sp, err := spool.Open(filepath.Join(x.dir, "spool"), 1<<30)
	if err != nil {
		return x.settleFailure(ctx, &job.Failure{Kind: job.DiskFull, Err: fmt.Errorf("open the spool: %w", err)})
	}
	defer sp.Close()
	x.ship = ship.New(as.Ref, sp, r.Store, store.IsData, r.Metrics, x.log)
	x.stage = stageClock{metrics: r.Metrics}
	defer x.stage.end()

	// The shipper outlives the attempt's context: what was said is carried out
	// even when the job is cancelled.
	shipping, stopShipping := context.WithCancel(context.WithoutCancel(ctx))
	defer stopShipping()
	g, shipping := errgroup.WithContext(shipping)
	lost, loseLease := context.WithCancelCause(ctx)
	g.Go(func() error {
		if err := x.ship.Run(shipping); err != nil {
			loseLease(fmt.Errorf("%w: %w", ErrLeaseLost, err))
		}
		return nil
	})
	result, err := x.work(lost)
	stopShipping()
	_ = g.Wait()
	defer loseLease(nil)
	return x.settle(lost, result, err)
}

// work is the attempt up to its uploads.
func (x *run) work(ctx context.Context) (*job.Result, error) {
	plan, err := x.prepare(ctx)
	if err != nil {
		return nil, err
	}
	trained, err := x.train(ctx, plan)
	if err != nil {
		return nil, err
	}
	return x.upload(ctx, trained)
}

// stopped reports why ctx ended, as a failure; nil while it has not.
func stopped(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, ErrCancelled):
		return &job.Failure{Kind: job.CancelledByUser, Err: cause}
	case errors.Is(cause, ErrLeaseLost):
		return &job.Failure{Kind: job.LeaseLost, Err: cause}
	default:
		return &job.Failure{Kind: job.Preempted, Err: cause}
	}
}
