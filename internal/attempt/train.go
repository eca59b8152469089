package attempt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/ship"
	"lorayard/internal/trainer"
	"lorayard/internal/wire"
)

// train starts the trainer and follows it to its end.
func (x *run) train(ctx context.Context, plan wire.Plan) (*wire.Event, error) {
	x.enter(job.StagePreparing)
	devices := x.as.Devices
	if x.Config.Pretend {
		devices = nil
	}
	child, err := x.Trainer.Start(plan, devices, x.Config.Environ, trainer.Options{
		Deadline: max(x.live.left(), time.Nanosecond), // 0 would be for ever
		Grace:    x.Config.LeaveGrace, Orphaned: filepath.Join(x.dir, reportFile), Near: x.live.Devices.Near,
	})
	if err != nil {
		return nil, err
	}
	x.log.InfoContext(ctx, "trainer started", "pid", child.PID())
	return x.follow(ctx, child)
}

// adopt takes charge of the trainer that the process before left, and follows
// it to its end. Its events up to after were dealt with; they only tell where
// it stands.
func (x *run) adopt(ctx context.Context, after uint64) (*wire.Event, error) {
	child, err := trainer.Adopt(x.dir, after)
	if err != nil {
		return nil, err
	}
	x.log.InfoContext(ctx, "trainer adopted", "pid", child.PID(), "event", after)
	x.heard = after
	return x.follow(ctx, child)
}

// follow hears the trainer to its end and returns its result event. Checkpoints
// go to Storage while it trains.
func (x *run) follow(ctx context.Context, child *trainer.Run) (*wire.Event, error) {
	x.live.Attach(child)
	defer x.live.Attach(nil)
	var result *wire.Event
	var large error // what it would write cannot be stored
	saved := newLatest()
	ended := make(chan struct{})
	g := errgroup.Group{}
	g.Go(func() error { // the end of ctx, passed on to the child
		select {
		case <-ended:
			return nil
		case <-ctx.Done():
		}
		switch cause := context.Cause(ctx); {
		case errors.Is(cause, ErrHandOver):
			// A trainer that has ended meanwhile is told by Wait.
			if _, err := child.HandOver(x.Config.HandOver); err != nil && !errors.Is(err, os.ErrProcessDone) {
				x.log.WarnContext(ctx, "trainer not handed over cleanly", "err", err)
			}
		case job.KindOf(stopped(ctx)) == job.Preempted:
			child.Leave(x.Config.LeaveGrace)
		default:
			child.Kill()
		}
		return nil
	})
	// The newest checkpoint is uploaded even after the trainer left on request;
	// only a lost lease or a cancel makes it pointless, and the next process of
	// this agent has it on its disk.
	uploads, stopUploads := context.WithCancel(context.WithoutCancel(ctx))
	defer stopUploads()
	uploader := errgroup.Group{}
	uploader.Go(func() error { return x.uploadCheckpoints(uploads, saved) })
	failure := x.attend(child, func(e trainer.Event) {
		x.hear(e, saved)
		x.heard = max(x.heard, e.Seq)
		if e.Ev == "result" {
			result = &e.Event
		}
		if e.Ev == "plan" && large == nil {
			if large = tooLarge(e.TrainableParameters, x.takes); large != nil {
				child.Kill()
			}
		}
	})
	close(ended)
	_ = g.Wait()
	s := stopped(ctx)
	var fault *DeviceFault
	if failure != nil {
		fault = x.faultBehind(ctx, job.KindOf(failure))
	}
	left := errors.Is(failure, trainer.ErrHandedOver)
	if k := job.KindOf(s); left || s != nil && (k == job.CancelledByUser || k == job.LeaseLost) {
		stopUploads()
	}
	saved.close()
	uploadErr := uploader.Wait()
	switch {
	case left:
		return nil, x.leave(x.heard)
	case failure != nil && errors.Is(context.Cause(ctx), ErrHandOver):
		return nil, x.leave(x.heard) // it has ended, and the next process finds out how
	case fault != nil && job.KindOf(s) != job.LeaseLost && job.KindOf(s) != job.CancelledByUser:
		return nil, fault.failure()
	case s != nil && failure != nil:
		return nil, s
	case large != nil:
		return nil, large
	case failure != nil:
		return nil, failure
	case uploadErr != nil && job.KindOf(uploadErr) == job.LeaseLost:
		return nil, uploadErr
	case result == nil:
		return nil, &job.Failure{Kind: job.Protocol, Err: fmt.Errorf("the trainer left without a result")}
	}
	return result, nil
}

// hear takes one event to where it belongs. An old one was dealt with by the
// process before: it only tells where the trainer stands.
func (x *run) hear(e trainer.Event, saved *latest) {
	switch e.Ev {
	case "checkpoint":
		x.mu.Lock()
		published := x.published
		x.mu.Unlock()
		if e.Step > published {
			saved.put(e.Event)
		}
	case "stage":
		if st := job.Stage(e.Stage); st != "done" {
			x.enter(st)
		}
	}
	x.reckon(e)
	if changed := x.board.hear(e.Event); e.Old {
		return
	} else if changed {
		x.ship.Show(x.board.progress(x.stage.now))
	}
	switch e.Ev {
	case "sanity":
		x.hearCheck(e)
	case "sample", "eval", "log":
		if err := x.ship.Accept(e.Line); err != nil {
			x.log.Error("event not spooled", "step", e.Step, "err", err)
		}
	case "hello":
		x.log.Info("trainer says hello", "backend", e.Backend, "device", e.Device, "python", e.Python, "libraries", e.Libraries)
	case "plan":
		x.ship.Say("info", fmt.Sprintf("%d examples (%d for validation), %d steps, %d tokens an epoch (%d trained on), %d trainable parameters, starting after step %d",
			e.Examples, e.ValidationExamples, e.TotalSteps, e.TokensPerEpoch, e.LossTokensPerEpoch, e.TrainableParameters, e.StartStep), "plan")
	case "error":
		x.log.Warn("trainer reports an error", "kind", e.Kind, "err", e.Message)
		x.ship.Say("error", e.Message+" "+e.Hint, e.Kind)
	}
}

// enter records that the attempt is in a stage now.
func (x *run) enter(s job.Stage) {
	x.stage.enter(s)
	x.mu.Lock()
	x.standing.Stage = s
	x.mu.Unlock()
	x.ship.Show(x.board.progress(s))
}

// stageClock knows the stage and measures how long each took.
type stageClock struct {
	metrics *metrics.Agent
	now     job.Stage
	since   time.Time
	over    func(job.Stage, time.Time) // hears of each that is over, with its beginning
}

func (c *stageClock) enter(s job.Stage) {
	c.end()
	c.now, c.since = s, time.Now()
}

func (c *stageClock) end() {
	if c.now != "" {
		c.metrics.StageSeconds.WithLabelValues(string(c.now)).Observe(time.Since(c.since).Seconds())
		c.over(c.now, c.since)
	}
}

// board is the newest standing of the run, made of events.
type board struct {
	p       job.Progress
	perStep float64 // seconds, moving average
}

// hear reports whether e changed what a page shows.
func (b *board) hear(e wire.Event) bool {
	switch e.Ev {
	case "plan":
		b.p.TotalSteps, b.p.TotalEpochs, b.p.Step = e.TotalSteps, int(e.Epochs), e.StartStep
	case "sample":
		b.p.Status = job.Running
		b.p.Step = e.Step
		b.p.Epoch = max(1, int(ceil(float64(e.Epoch))))
		if !e.Skipped {
			b.p.Loss = ship.Finite(&e.Loss)
		}
		b.p.LearningRate = ship.Finite(&e.LearningRate)
		b.p.TokensPerSecond = ship.Finite(&e.TokensPerSecond)
		if b.perStep == 0 {
			b.perStep = float64(e.Seconds)
		}
		b.perStep += 0.1 * (float64(e.Seconds) - b.perStep)
		b.p.Remaining = time.Duration(b.perStep * float64(b.p.TotalSteps-e.Step) * float64(time.Second))
	case "eval":
		b.p.ValidationLoss = ship.Finite(e.ValidationLoss)
	default:
		return false
	}
	if b.p.TotalSteps > 0 {
		// 100 % belongs to a completed job.
		b.p.Percent = min(99, 100*float64(b.p.Step)/float64(b.p.TotalSteps))
	}
	return true
}

func ceil(f float64) float64 {
	n := float64(int(f))
	if f > n {
		return n + 1
	}
	return n
}

func (b *board) progress(s job.Stage) job.Progress {
	p := b.p
	p.Stage = s
	if s == job.StageTraining || s == job.StageValidating || s == job.StageSaving || s == job.StageUploading {
		p.Status = job.Running
	}
	if p.Status == "" {
		p.Status = job.Initializing
	}
	return p
}

// latest holds the newest checkpoint that is not uploaded yet: an older one is
// of no use once a newer one is there.
type latest struct {
	mu     sync.Mutex
	event  *wire.Event
	closed bool
	ready  chan struct{}
}

func newLatest() *latest { return &latest{ready: make(chan struct{}, 1)} }

func (l *latest) put(e wire.Event) {
	l.mu.Lock()
	l.event = &e
	l.mu.Unlock()
	l.signal()
}

func (l *latest) close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.signal()
}

func (l *latest) signal() {
	select {
	case l.ready <- struct{}{}:
	default:
	}
}

// take waits for a checkpoint; nil when there will be none.
func (l *latest) take(ctx context.Context) *wire.Event {
	for {
		l.mu.Lock()
		e, closed := l.event, l.closed
		l.event = nil
		l.mu.Unlock()
		if e != nil || closed {
			return e
		}
		select {
		case <-ctx.Done():
			return nil
		case <-l.ready:
		}
	}
}

// uploadCheckpoints uploads and publishes checkpoints until there are no more.
// A failure costs a checkpoint, not the run: the next one is tried.
func (x *run) uploadCheckpoints(ctx context.Context, saved *latest) error {
	for {
		e := saved.take(ctx)
		if e == nil {
			return nil
		}
		err := x.uploadCheckpoint(ctx, e)
		if job.KindOf(err) == job.LeaseLost {
			return err
		}
		if err != nil && ctx.Err() == nil {
			x.Metrics.Checkpoints.WithLabelValues("failed").Inc()
			x.log.WarnContext(ctx, "checkpoint not uploaded", "step", e.Step, "err", err)
			x.ship.Say("warn", fmt.Sprintf("the checkpoint of step %d could not be uploaded", e.Step), "checkpoint_not_uploaded")
		}
	}
}

func (x *run) uploadCheckpoint(ctx context.Context, e *wire.Event) error {
	ref := x.as.Ref
	c := job.Checkpoint{
		Step: e.Step, Epoch: float64(e.Epoch), Loss: float64(e.Loss), Bucket: artifactBucket, ManifestSHA256: e.ManifestSHA256,
		Path: fmt.Sprintf("%s/%s/a%d-%s/step-%08d", x.as.User, ref.Job, ref.Attempt, ref.Nonce, e.Step),
	}
	files, err := x.put(ctx, e.Path, c.Path, withManifest(e.Path, e.Files))
	if err != nil {
		return err
	}
	c.Files = files
	if err := x.addCheckpoint(ctx, c); err != nil {
		return err
	}
	x.kept(c.Step)
	x.Metrics.Checkpoints.WithLabelValues("published").Inc()
	x.log.InfoContext(ctx, "checkpoint published", "step", c.Step, "bytes", c.Bytes())
	return nil
}

// addCheckpoint publishes a checkpoint that is in Storage, after what was said
// before it: whoever resumes from it does those steps no more, so that a kill
// between the two would leave them unmeasured for ever. A database that is away
// is waited for: what was uploaded should not be lost for it.
func (x *run) addCheckpoint(ctx context.Context, c job.Checkpoint) error {
	return x.patiently(ctx, fmt.Sprintf("the checkpoint of step %d is not published yet", c.Step), func(ctx context.Context) error {
		if err := x.ship.Flush(ctx); err != nil {
			return err
		}
		return x.Store.AddCheckpoint(ctx, x.as.Ref, c)
	})
}

// withManifest adds the manifest to the files that it lists, when it is not
// among them: a reader trusts nothing without it.
func withManifest(dir string, files []wire.File) []wire.File {
	const name = "manifest.json"
	for _, f := range files {
		if f.Name == name {
			return files
		}
	}
	if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
		return files
	}
	return append(append([]wire.File(nil), files...), wire.File{Name: name})
}
