// Package vet brings data sets from `validating` to a verdict. A dispatcher
// finds what is due, by notification or by polling, and puts it on the
// dispatchers' queue; whoever gets it begins a try in the database, streams
// the file from Storage through the validation, stores the normalised file
// under its digest, and writes the verdict, fenced by the number of the try.
// A dispatcher that dies over it leaves nothing that has to be undone.
//
//	validating ─ due ─► task ─► begin ─► Storage ─► dataset ─► normalised file ─► verdict
//	     ▲                        │                                │
//	     └── lease runs out, or postponed when something is away ──┘
package vet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"time"

	"lorayard/internal/dataset"
	"lorayard/internal/metrics"
	"lorayard/internal/queue"
	"lorayard/internal/storage"
	"lorayard/internal/store"
)

const (
	// bucket is where normalised files go, in the folder of their owner.
	bucket = "lora-datasets"
	// poll finds what no notification told of.
	poll = time.Second
	// again is after what time a task that nobody began is sent anew.
	again = 5 * time.Second
	// lease is how long a try of a dispatcher that died keeps others away.
	lease = 15 * time.Second
	// batch bounds one round.
	batch = 100
	// side is how many data sets one dispatcher reads at once: each takes up to
	// 50 MiB of memory and one core.
	side = 2
	// mostFailures in a row end in a verdict: the user is told, and may ask again.
	mostFailures = 12
	// longest is the longest pause between two tries.
	longest = time.Minute
	// scratch are the files in Dir; nobody works at one for so long as stale.
	scratch = "lorayard-dataset-*.jsonl"
	stale   = 2 * time.Hour
	// shown is how many errors the app's column holds.
	shown = 10
)

// Vetter validates data sets. Every dispatcher does it, leader or standby.
type Vetter struct {
	Store    *store.Store
	Storage  *storage.Client // with the key
	Queue    *queue.Client
	RedisURL string
	Dir      string // for the normalised file on its way to Storage; empty: the system's
	Metrics  *metrics.Dispatcher
	Log      *slog.Logger

	wake chan struct{}
	once sync.Once
}

// Wake says that a data set waits.
func (v *Vetter) Wake() {
	select {
	case v.signal() <- struct{}{}:
	default:
	}
}

func (v *Vetter) signal() chan struct{} {
	v.once.Do(func() { v.wake = make(chan struct{}, 1) })
	return v.wake
}

// Run finds what is due and validates it until ctx ends.
func (v *Vetter) Run(ctx context.Context) error {
	v.sweep()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var sending sync.WaitGroup
	defer sending.Wait()
	sending.Go(func() { v.send(ctx) })
	err := queue.ServeChecks(ctx, queue.Checker{URL: v.RedisURL, Side: side, Log: v.Log, Validate: v.Validate})
	stop()
	return err
}

// sweep removes what dispatchers that were killed left in Dir. Others may be at
// work in it, but at nothing so old.
func (v *Vetter) sweep() {
	dir := v.Dir
	if dir == "" {
		dir = os.TempDir()
	}
	left, _ := filepath.Glob(filepath.Join(dir, scratch)) // the pattern is good
	for _, name := range left {
		if fi, err := os.Lstat(name); err == nil && fi.Mode().IsRegular() && time.Since(fi.ModTime()) > stale {
			_ = os.Remove(name)
		}
	}
}

func (v *Vetter) send(ctx context.Context) {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	for {
		if err := v.round(ctx); err != nil && ctx.Err() == nil {
			v.Log.WarnContext(ctx, "data sets wait to be validated, trying again", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-v.signal():
		case <-tick.C:
		}
	}
}

// round sends what is due.
func (v *Vetter) round(ctx context.Context) error {
	due, err := v.Store.DueDatasets(ctx, batch, again)
	if err != nil || len(due) == 0 {
		return err
	}
	checks := make([]queue.Check, len(due))
	for i, d := range due {
		checks[i] = queue.Check{Dataset: d.ID, Run: d.Run, Send: d.Send}
	}
	return v.Queue.SendChecks(ctx, checks)
}

// errNotWanted ends a try that was taken over, or whose data set is gone.
var errNotWanted = errors.New("the validation is not wanted any more")

// Validate brings one data set to its verdict, if nobody is at it already.
func (v *Vetter) Validate(ctx context.Context, id string) {
	try, ok, err := v.Store.BeginValidation(ctx, id, lease)
	if err != nil || !ok {
		if err != nil && ctx.Err() == nil {
			v.Log.WarnContext(ctx, "data set not validated, trying again", "dataset", id, "err", err)
		}
		return
	}
	began := time.Now()
	verdict, err := v.judge(ctx, try)
	if err == nil {
		var written bool
		if written, err = v.Store.FinishValidation(ctx, try, verdict); err == nil && !written {
			err = errNotWanted
		}
	}
	switch {
	case err == nil:
		result := "ready"
		if !verdict.Ready {
			result = "error"
		}
		v.Metrics.Validated.WithLabelValues(result).Inc()
		v.Log.InfoContext(ctx, "data set validated", "dataset", id, "result", result, "took", time.Since(began).Round(time.Millisecond))
	case errors.Is(err, errNotWanted):
		v.Metrics.Validated.WithLabelValues("unwanted").Inc()
		v.Log.InfoContext(ctx, "a validation is not wanted any more", "dataset", id, "run", try.Run)
	default:
		v.postpone(ctx, try, err)
	}
}

// postpone gives a try up. A dispatcher that stops leaves it to the others.
func (v *Vetter) postpone(ctx context.Context, try store.Validation, cause error) {
	delay, trouble := time.Duration(0), ""
	if ctx.Err() == nil {
		delay = min(time.Second<<min(try.Failures, 10), longest)
		delay = delay/2 + rand.N(delay)
		trouble = cause.Error()
		v.Metrics.Validated.WithLabelValues("postponed").Inc()
		v.Log.WarnContext(ctx, "data set not validated, trying again", "dataset", try.Dataset, "run", try.Run, "in", delay, "err", cause)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := v.Store.PostponeValidation(ctx, try, delay, trouble); err != nil {
		v.Log.WarnContext(ctx, "the lease of a validation runs out by itself", "dataset", try.Dataset, "err", err)
	}
}

// judge reads the file, keeping the lease meanwhile. An error leaves the data
// set to another try.
func (v *Vetter) judge(ctx context.Context, try store.Validation) (store.Verdict, error) {
	ctx, stop := context.WithCancelCause(ctx)
	var keeper sync.WaitGroup
	defer keeper.Wait()
	defer stop(nil)
	keeper.Go(func() { v.keep(ctx, try, stop) })
	verdict, err := v.read(ctx, try)
	if err != nil && errors.Is(context.Cause(ctx), errNotWanted) {
		err = errNotWanted
	}
	switch {
	case err == nil:
		verdict.Source = try.Bucket + "/" + try.Path
	case missing(err):
		verdict, err = refused("The data set's file is not in storage.", "Upload it again."), nil
	case storage.CheckKey(try.Path) != nil:
		verdict, err = refused("The data set's file has a name that storage does not take.", "Upload it again under a simple name."), nil
	case try.Failures >= mostFailures && !errors.Is(err, errNotWanted) && ctx.Err() == nil:
		v.Log.ErrorContext(ctx, "data set given up", "dataset", try.Dataset, "err", err)
		verdict, err = refused("The data set could not be checked.", "Try again later."), nil
	}
	return verdict, err
}

// missing says that the file itself is not there.
func missing(err error) bool {
	e, ok := errors.AsType[*storage.Error](err)
	return ok && e.Op == "read" && storage.IsNotFound(e)
}

func (v *Vetter) keep(ctx context.Context, try store.Validation, stop context.CancelCauseFunc) {
	tick := time.NewTicker(lease / 3)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// A database that is away is no reason to stop: the verdict is fenced.
		if kept, err := v.Store.RenewValidation(ctx, try, lease); err == nil && !kept {
			stop(errNotWanted)
		}
	}
}

// read validates the file and stores the normalised one.
func (v *Vetter) read(ctx context.Context, try store.Validation) (store.Verdict, error) {
	out, err := os.CreateTemp(v.Dir, scratch)
	if err != nil {
		return store.Verdict{}, fmt.Errorf("make room for the normalised file: %w", err)
	}
	defer os.Remove(out.Name())
	defer out.Close()
	in := v.Storage.Read(ctx, try.Bucket, try.Path)
	defer in.Close()
	report, err := dataset.Validate(in, dataset.Options{Normalised: out})
	if err != nil {
		return store.Verdict{}, err
	}
	if err := out.Close(); err != nil {
		return store.Verdict{}, fmt.Errorf("write the normalised file: %w", err)
	}
	verdict, err := verdictOf(report)
	if err != nil || !report.OK {
		return verdict, err
	}
	verdict.File = &store.DataFile{
		Bucket: bucket, Bytes: report.Normalised.Bytes, SHA256: report.Normalised.SHA256,
		Path: fmt.Sprintf("%s/%s/normalised-%s.jsonl", try.User, try.Dataset, report.Normalised.SHA256),
	}
	// The same file under the same key is a success: another try stored it.
	_, err = v.Storage.Upload(ctx, bucket, verdict.File.Path, out.Name(), storage.Options{ContentType: "application/jsonl", SHA256: verdict.File.SHA256})
	return verdict, err
}

// appError is one entry of the app's column validation_errors.
type appError struct {
	Line       int64  `json:"line"`
	Error      string `json:"error"`
	Suggestion string `json:"suggestion"`
}

// refused is the verdict on a file that could not be read.
func refused(message, suggestion string) store.Verdict {
	list, _ := json.Marshal([]appError{{1, message, suggestion}}) // cannot fail
	whole := message + " " + suggestion
	return store.Verdict{Notice: whole, Message: &whole, Errors: list}
}

// verdictOf puts a report into the app's words and columns.
func verdictOf(r *dataset.Report) (v store.Verdict, err error) {
	v = store.Verdict{
		Ready: r.OK, TrainingPairs: r.TrainingPairs, ValidationPairs: r.ValidationPairs, Tokens: r.Tokens,
		TurnsPerConversation: r.AvgTurnsPerConversation, TokensPerTurn: r.AvgTokensPerTurn,
	}
	if v.Report, err = json.Marshal(r); err != nil {
		return v, fmt.Errorf("encode a report: %w", err)
	}
	if v.Samples, err = json.Marshal(r.Samples); err != nil {
		return v, fmt.Errorf("encode samples: %w", err)
	}
	if r.OK {
		v.Notice = fmt.Sprintf("Your data set has %d training and %d validation pairs and about %d tokens.", r.TrainingPairs, r.ValidationPairs, r.Tokens)
		if n := len(r.Findings); n > 0 {
			v.Notice += " " + attention(r.Findings)
		}
		return v, nil
	}
	errs := make([]appError, 0, shown)
	for _, p := range r.Problems[:min(shown, len(r.Problems))] {
		errs = append(errs, appError{max(1, p.Line), p.Message, p.Suggestion})
	}
	if v.Errors, err = json.Marshal(errs); err != nil {
		return v, fmt.Errorf("encode errors: %w", err)
	}
	first := r.Problems[0]
	message := fmt.Sprintf("%d lines cannot be trained on. The first is line %d: %s %s", r.BadLines, first.Line, first.Message, first.Suggestion)
	switch {
	case first.Line == 0:
		message = first.Message + " " + first.Suggestion
	case r.BadLines == 1:
		message = fmt.Sprintf("Line %d cannot be trained on: %s %s", first.Line, first.Message, first.Suggestion)
	}
	v.Notice, v.Message = message, &message
	return v, nil
}

// attention names secrets and leaks, which a user should hear of without
// looking.
func attention(findings []dataset.Finding) string {
	for _, f := range findings {
		switch f.Code {
		case dataset.PrivateKey, dataset.AWSKey, dataset.APIKey, dataset.JWT, dataset.Card, dataset.IBAN:
			return fmt.Sprintf("It seems to contain secrets (first in line %d): %s", f.Lines[0], f.Suggestion)
		}
	}
	for _, f := range findings {
		if f.Code == dataset.Leak {
			return fmt.Sprintf("Line %d repeats a conversation that stands under another id: %s", f.Lines[0], f.Suggestion)
		}
	}
	return ""
}
