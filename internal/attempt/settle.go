package attempt

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/store"
)

// settle carries out what was said, closes the attempt and, where it is due,
// the job. A database that is away is waited for: nobody else can end the
// attempt while its agent renews.
func (x *run) settle(ctx context.Context, result *job.Result, err error) error {
	if job.KindOf(err) == job.LeaseLost && err != nil {
		x.Metrics.Attempts.WithLabelValues("lost", string(job.LeaseLost)).Inc()
		x.log.WarnContext(ctx, "attempt lost", "err", err)
		return err
	}
	began := time.Now()
	defer func() { x.span(x.as, "settle", began, nil) }()
	end := x.end(result, err)
	if end.Outcome == store.OutcomeFailed {
		x.log.WarnContext(ctx, "attempt failed", "kind", end.Failure.Kind, "err", end.Failure)
	}
	asked := ctx
	ctx = context.WithoutCancel(ctx)
	wait := 200 * time.Millisecond
	for {
		status, err := x.settleOnce(ctx, end)
		if err == nil {
			kind := ""
			if end.Failure != nil {
				kind = string(end.Failure.Kind)
			}
			x.Metrics.Attempts.WithLabelValues(string(end.Outcome), kind).Inc()
			x.log.InfoContext(ctx, "attempt settled", "outcome", end.Outcome, "kind", kind, "status", status)
			return nil
		}
		if job.KindOf(err) == job.LeaseLost {
			x.Metrics.Attempts.WithLabelValues("lost", string(job.LeaseLost)).Inc()
			x.log.WarnContext(ctx, "attempt lost at settlement", "err", err)
			return err
		}
		if store.IsData(err) {
			return fmt.Errorf("settlement refused for its values: %w", err)
		}
		x.log.WarnContext(ctx, "not settled yet", "err", err)
		if errors.Is(context.Cause(asked), ErrHandOver) {
			// The next process finds the same end, and settles it again.
			return x.leave(x.heard)
		}
		time.Sleep(wait/2 + rand.N(wait))
		wait = min(2*wait, 5*time.Second)
	}
}

// settleOnce flushes first: every sample and line stands before the end does.
func (x *run) settleOnce(ctx context.Context, end store.End) (job.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if x.ship != nil {
		if err := x.ship.Flush(ctx); err != nil {
			return "", err
		}
	}
	if !x.freed.IsZero() {
		end.Idle = time.Since(x.freed)
	}
	return x.Store.Settle(ctx, x.as.Ref, end)
}

// settleFailure settles an attempt that ended before anything was said.
func (x *run) settleFailure(ctx context.Context, err error) error { return x.settle(ctx, nil, err) }

// end says how the attempt is closed.
func (x *run) end(r *job.Result, err error) store.End {
	if err == nil {
		return store.End{Outcome: store.OutcomeCompleted, Artifact: x.artifact(r)}
	}
	f, ok := errors.AsType[*job.Failure](err)
	if !ok {
		f = &job.Failure{Kind: job.Internal, Err: err}
	}
	switch f.Kind {
	case job.CancelledByUser:
		return store.End{Outcome: store.OutcomeCancelled, Failure: f}
	case job.Preempted:
		return store.End{Outcome: store.OutcomeHandedBack, Failure: f}
	}
	e := store.End{Outcome: store.OutcomeFailed, Failure: f, Detail: f.Error()}
	if _, broke := errors.AsType[*DeviceFault](f.Err); !broke && f.Kind.Retryable() {
		// The same trouble is seldom gone at once; a broken device is avoided.
		e.Delay = 5 * time.Second
	}
	return e
}

func (x *run) artifact(r *job.Result) *store.Artifact {
	s := x.as.Spec
	summary := map[string]any{"epochs_completed": r.Epochs, "total_steps": r.Steps, "tokens": r.Tokens, "base_model": s.BaseModel, "files": r.Digests}
	putFinite(summary, "final_loss", &r.TrainingLoss)
	metrics := map[string]any{}
	putFinite(metrics, "training_loss", &r.TrainingLoss)
	putFinite(metrics, "validation_loss", r.ValidationLoss)
	return &store.Artifact{
		ID:             r.ArtifactID,
		Description:    fmt.Sprintf("LoRA adapter of rank %d for %s, trained on %s", s.Rank, s.BaseModel, x.as.Dataset.Name),
		Files:          r.Files,
		QualityMetrics: quality(r), TrainingSummary: summary, Metrics: metrics,
	}
}
