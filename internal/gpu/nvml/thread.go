package nvml

import (
	"context"
	"runtime"
	"sync/atomic"
	"time"

	"lorayard/internal/gpu"
)

// thread is an operating system thread that does one thing after the other.
// Whoever asks it to do something waits for so long and no longer: a call that
// hangs in the kernel cannot be ended, only left alone.
type thread struct {
	patience time.Duration
	turn     chan struct{} // whoever holds it may give the thread something to do
	work     chan func()
	came     chan struct{} // it came back
	timer    *time.Timer   // of whoever has the turn
	state    atomic.Int32  // of what it was given last
	wedged   atomic.Bool   // it has not come back in time
}

// The states of what a thread was given.
const (
	underWay int32 = iota
	finished
	leftAlone // nobody waits for it any more: the thread gives the turn back
)

func newThread(patience time.Duration) *thread {
	t := &thread{patience: patience, turn: make(chan struct{}, 1), work: make(chan func()), came: make(chan struct{}, 1), timer: time.NewTimer(patience)}
	t.timer.Stop()
	go func() {
		runtime.LockOSThread()
		for f := range t.work {
			f()
			if t.state.CompareAndSwap(underWay, finished) {
				t.came <- struct{}{}
			} else {
				t.wedged.Store(false)
				<-t.turn
			}
		}
	}()
	return t
}

// do has the thread do f. Without an error what f wrote may be looked at, and
// nobody has a turn until done is called. When f does not come back in time the
// error is gpu.ErrWedged, and so it is for everybody until f has come back.
func (t *thread) do(ctx context.Context, f func()) error { return t.doFor(ctx, t.patience, f) }

// doFor is do with another patience.
func (t *thread) doFor(ctx context.Context, patience time.Duration, f func()) error {
	select {
	case t.turn <- struct{}{}:
	default:
		if err := t.wait(ctx, patience); err != nil {
			return err
		}
	}
	t.state.Store(underWay)
	t.timer.Reset(patience)
	t.work <- f
	var err error
	select {
	case <-t.came:
		t.timer.Stop()
		return nil
	case <-t.timer.C:
		err = gpu.ErrWedged
	case <-ctx.Done():
		err = ctx.Err()
	}
	t.timer.Stop()
	t.wedged.Store(true)
	if t.state.CompareAndSwap(underWay, leftAlone) {
		return err
	}
	t.wedged.Store(false) // it came back in this moment
	<-t.came
	return nil
}

// done gives the turn back.
func (t *thread) done() { <-t.turn }

// wait waits for a turn, for a moment only when what has it does not come back.
func (t *thread) wait(ctx context.Context, patience time.Duration) error {
	if t.wedged.Load() {
		patience = time.Millisecond
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case t.turn <- struct{}{}:
		return nil
	case <-timer.C:
		return gpu.ErrWedged
	case <-ctx.Done():
		return ctx.Err()
	}
}

// end ends the thread; nothing may be done by it any more.
func (t *thread) end() { close(t.work) }
