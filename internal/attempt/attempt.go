// Package attempt takes one accepted attempt to its settlement:
//
//	prepare → train → upload → settle
//
// It is the heart of the agent and should read as a story, a file a chapter.
// Whatever goes wrong has a kind; whatever is ours is cleaned up on a context
// that outlives the attempt's own. At any moment the agent may step aside: then
// everything stays where it is, and the next process resumes it (left.go).
package attempt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/ship"
	"lorayard/internal/spool"
	"lorayard/internal/storage"
	"lorayard/internal/store"
	"lorayard/internal/trace"
	"lorayard/internal/trainer"
	"lorayard/internal/wire"
)

// Config is what an operator may turn.
type Config struct {
	DataDir         string        // run directories, spools, and the caches of data sets and tokens
	ModelsDir       string        // base models, <dir>/<name>
	Pretend         bool          // devices are pretended: train on the CPU
	Threads         int           // CPU threads of the trainer, 0: it chooses
	CheckpointEvery time.Duration // how often the trainer saves
	LeaveGrace      time.Duration // how long a trainer may take to save and leave
	HandOver        time.Duration // how long a trainer waits for the next process of this agent
	MinFreeBytes    int64         // free disk that must be left before an attempt starts
	Environ         []string      // our environment, of which the trainer sees an allow-list
}

// Runner runs attempts.
type Runner struct {
	Agent   string // id of this agent
	Boot    string // of this process
	CA      string // certificate (PEM) that tls dispatchers show; empty: the system's
	Store   *store.Store
	Storage *storage.Client
	Trainer *trainer.Trainer
	Metrics *metrics.Agent
	Trace   *trace.Tracer // nil: no spans
	Log     *slog.Logger
	Config  Config

	mu          sync.Mutex
	dispatchers []string           // addresses of presence streams
	under       map[string]job.Ref // attempts under way, by directory
}

// Causes with which the agent ends an attempt's context.
var (
	ErrCancelled = errors.New("the job was cancelled")
	ErrPreempted = errors.New("the attempt was preempted")
	ErrLeaseLost = errors.New("the attempt belongs to somebody else now")
	ErrHandOver  = errors.New("the agent steps aside for its next process")
)

// artifactBucket is where checkpoints and adapters are kept (the app's).
const artifactBucket = "lora-models"

// run is the state of one attempt.
type run struct {
	*Runner
	as    job.Assignment
	live  *Live
	dir   string
	log   *slog.Logger
	ship  *ship.Shipper
	stage stageClock
	board board
	takes int64     // bytes that Storage takes as one object, 0: not known
	heard uint64    // the last of the trainer's events that was dealt with
	freed time.Time // when its devices were; zero: not yet
	began time.Time // in this process

	mu        sync.Mutex
	published int // step of the newest checkpoint in Storage
	standing  Standing
	account   account
}

// Run carries out as until it is settled or lost. ctx ends it early; its cause
// says why: ErrCancelled and ErrLeaseLost kill the trainer, ErrHandOver leaves
// it running for Resume in another process, anything else lets it save a
// checkpoint and hands the job back.
func (r *Runner) Run(ctx context.Context, as job.Assignment, live *Live) error {
	x := r.run(as, live, filepath.Join(r.Config.DataDir, "attempts", fmt.Sprintf("%s-a%d-%s", as.Ref.Job, as.Ref.Attempt, as.Ref.Nonce)))
	if err := os.MkdirAll(x.dir, 0o700); err != nil {
		return x.settleFailure(ctx, &job.Failure{Kind: job.DiskFull, Err: fmt.Errorf("make the attempt's directory: %w", err)})
	}
	if err := writeJSON(filepath.Join(x.dir, journalFile), as); err != nil {
		os.RemoveAll(x.dir)
		return x.settleFailure(ctx, &job.Failure{Kind: job.DiskFull, Err: err})
	}
	return x.carry(ctx, x.work)
}

// Resume goes on where an earlier process of this agent stepped aside.
func (r *Runner) Resume(ctx context.Context, l Left, live *Live) error {
	x := r.run(l.Assignment, live, l.Dir)
	x.published = l.note.Published
	// From here on the trainer is ours: whoever comes after a kill of this
	// process must not take it for handed over.
	if err := os.Remove(filepath.Join(l.Dir, handOverFile)); err != nil {
		return fmt.Errorf("take over %s: %w", l.Assignment.Ref, err)
	}
	if _, err := os.Stat(filepath.Join(x.dir, "plan.json")); errors.Is(err, fs.ErrNotExist) {
		return x.carry(ctx, x.work) // it had not come to the trainer
	}
	return x.carry(ctx, func(ctx context.Context) (*job.Result, error) { return x.goOn(ctx, l.note.Event) })
}

func (r *Runner) run(as job.Assignment, live *Live, dir string) *run {
	return &run{
		Runner: r, as: as, live: live, dir: dir, began: time.Now(), standing: Standing{Loss: math.NaN(), TokensPerSecond: math.NaN()},
		log: r.Log.With("job", as.Ref.Job, "attempt", as.Ref.Attempt), stage: stageClock{metrics: r.Metrics, over: func(st job.Stage, began time.Time) { r.span(as, string(st), began, nil) }},
	}
}

// span tells of a part of an attempt that is over now, in the database's time.
func (r *Runner) span(as job.Assignment, name string, began time.Time, err error) {
	s := trace.Span{Ref: as.Ref, Name: name, Began: began.Add(as.Skew), Over: time.Now().Add(as.Skew)}
	if err != nil {
		s.Failed = string(job.KindOf(err))
	}
	r.Trace.Tell(s)
}

// carry does the work and settles it, with the spool and its shipper around
// both.
func (x *run) carry(ctx context.Context, work func(context.Context) (*job.Result, error)) (err error) {
	// The directory is only of use while the attempt can be written, and to the
	// process that takes it over.
	defer func() {
		if !errors.Is(err, ErrHandOver) {
			os.RemoveAll(x.dir)
		}
	}()
	if err := x.announce(x.dir, x.as.Ref); err != nil {
		return x.settleFailure(ctx, &job.Failure{Kind: job.DiskFull, Err: err})
	}
	defer x.forget(x.dir)
	sp, err := spool.Open(filepath.Join(x.dir, "spool"), 1<<30)
	if err != nil {
		return x.settleFailure(ctx, &job.Failure{Kind: job.DiskFull, Err: fmt.Errorf("open the spool: %w", err)})
	}
	defer sp.Close()
	x.ship = ship.New(x.as.Ref, sp, x.Store, store.IsData, x.Metrics, x.log)
	x.ship.Skew = x.as.Skew
	x.live.tells(x.stands)
	defer x.live.tells(nil)
	defer x.stage.end()

	// The shipper outlives the attempt's context: what was said is carried out
	// even when the job is cancelled.
	shipping, stopShipping := context.WithCancel(context.WithoutCancel(ctx))
	defer stopShipping()
	g, shipping := errgroup.WithContext(shipping)
	lost, loseLease := context.WithCancelCause(ctx)
	defer loseLease(nil)
	g.Go(func() error {
		if err := x.ship.Run(shipping); err != nil {
			loseLease(fmt.Errorf("%w: %w", ErrLeaseLost, err))
		}
		return nil
	})
	result, err := work(lost)
	stopShipping()
	_ = g.Wait()
	if errors.Is(err, ErrHandOver) {
		return ErrHandOver
	}
	err = x.blame(err)
	x.live.free()
	x.freed = time.Now()
	x.close(err == nil)
	return x.settle(lost, result, err)
}

// work is the attempt up to its uploads.
func (x *run) work(ctx context.Context) (*job.Result, error) {
	early, release := x.live.breakable(ctx)
	plan, err := x.prepare(early)
	release()
	if err != nil {
		return nil, x.orHandedOver(ctx, err)
	}
	if f := x.live.Fault(); f != nil {
		return nil, f.failure()
	}
	trained, err := x.train(ctx, plan)
	if err != nil {
		return nil, err
	}
	return x.uploadResult(ctx, trained)
}

// goOn is work for an attempt whose trainer was started by the process before.
func (x *run) goOn(ctx context.Context, after uint64) (*job.Result, error) {
	trained, err := x.adopt(ctx, after)
	if err != nil {
		return nil, err
	}
	return x.uploadResult(ctx, trained)
}

func (x *run) uploadResult(ctx context.Context, e *wire.Event) (*job.Result, error) {
	res, err := x.upload(ctx, e)
	if err != nil {
		return nil, x.orHandedOver(ctx, err)
	}
	return res, nil
}

// orHandedOver notes how far we came, when that is why err came up.
func (x *run) orHandedOver(ctx context.Context, err error) error {
	if !errors.Is(context.Cause(ctx), ErrHandOver) {
		return err
	}
	return x.leave(x.heard)
}

// leave writes down how far we came; with the note, and not before, the next
// process may take over.
func (x *run) leave(event uint64) error {
	x.mu.Lock()
	note := handOver{Event: event, Published: x.published}
	x.mu.Unlock()
	if err := writeJSON(filepath.Join(x.dir, handOverFile), note); err != nil {
		return fmt.Errorf("hand over: %w", err)
	}
	return ErrHandOver
}

// stopped reports why ctx ended, as a failure; nil while it has not.
func stopped(ctx context.Context) error {
	if ctx.Err() == nil {
		return nil
	}
	cause := context.Cause(ctx)
	if f, broke := errors.AsType[*DeviceFault](cause); broke {
		return f.failure()
	}
	switch {
	case errors.Is(cause, ErrCancelled):
		return &job.Failure{Kind: job.CancelledByUser, Err: cause}
	case errors.Is(cause, ErrLeaseLost):
		return &job.Failure{Kind: job.LeaseLost, Err: cause}
	default:
		return &job.Failure{Kind: job.Preempted, Err: cause}
	}
}
