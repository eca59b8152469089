package trainer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/proc"
	"lorayard/internal/wire"
)

var (
	// ErrHandedOver says that the trainer goes on without this agent.
	ErrHandedOver = proc.ErrHandedOver

	// ErrInCharge says that another agent has not handed the trainer over.
	ErrInCharge = proc.ErrInCharge

	errOutOfTouch = errors.New("out of touch for too long")
)

// Run is one running trainer.
type Run struct {
	proc     *proc.Process
	dir      string
	after    uint64 // events up to this one are old
	tap      *tap   // nil when the trainer had ended before it was adopted
	commands *os.File

	// Nothing waits in events: what was sent was received, so that a hand-over
	// can tell where it stopped. The trainer does not wait for us all the same:
	// it hands events over in a thread of their own.
	events    chan Event
	delivered uint64        // the last one received; to be read after done
	leaving   chan struct{} // closed when nothing more is to be delivered
	done      chan struct{} // closed when reading is over

	mu      sync.Mutex
	said    *wire.Event // the error event
	bad     error       // the protocol was broken
	stopped stop
}

func newRun(p *proc.Process, dir string, after uint64) *Run {
	return &Run{proc: p, dir: dir, after: after, events: make(chan Event), leaving: make(chan struct{}), done: make(chan struct{})}
}

// stop is who ended the run: nobody, a request to leave, or a kill.
type stop int

const (
	nobody stop = iota
	asked
	killed
)

// Event is one event and the line that carried it.
type Event struct {
	wire.Event
	Line []byte
	Old  bool // an adopter's caller said that it had this one before
}

// read decodes events to their end. It always drains the pipe: the trainer
// must never wait for us.
func (r *Run) read(from io.Reader) {
	defer close(r.done)
	defer close(r.events)
	d := wire.NewDecoder(from)
	for {
		e, line, err := d.Next()
		switch {
		case errors.Is(err, io.EOF) || r.isLeaving(): // that cuts a line in two
			return
		case err != nil:
			r.breakOff(err, from)
			return
		}
		if e.Ev == "error" {
			r.mu.Lock()
			r.said = &e
			r.mu.Unlock()
		}
		select {
		case r.events <- Event{Event: e, Line: bytes.Clone(line), Old: e.Seq <= r.after}:
			r.delivered = e.Seq
		case <-r.leaving:
			return
		}
	}
}

func (r *Run) isLeaving() bool {
	select {
	case <-r.leaving:
		return true
	default:
		return false
	}
}

// breakOff ends a trainer that cannot be understood.
func (r *Run) breakOff(err error, from io.Reader) {
	if r.tap == nil {
		// A full disk can cut a line of the file. The trainer is gone, and its
		// exit tells more than that.
		return
	}
	r.mu.Lock()
	r.bad = err
	r.mu.Unlock()
	_ = r.proc.Kill()
	_, _ = io.Copy(io.Discard, from)
}

// Events yields events until the trainer closes its pipe, or until HandOver.
// Whoever starts or adopts a run must read them to the end.
func (r *Run) Events() <-chan Event { return r.events }

// PID is the trainer's process id.
func (r *Run) PID() int { return r.proc.Pid() }

// Extend lets the trainer run for d from now: the agent is in touch.
func (r *Run) Extend(d time.Duration) error { return r.proc.Extend(d) }

// HandOver leaves the trainer to go on without us, and to whoever adopts it
// within d; if nobody does, it is asked to save and leave. It returns the seq of
// the last event that Events has yielded; an adopter gets the later ones, also
// those that we have read. Events ends, and Wait returns ErrHandedOver.
//
// os.ErrProcessDone says that the trainer has ended, and that nothing changed.
// ErrHandedOver is an error here only when the shim did not confirm.
func (r *Run) HandOver(d time.Duration) (uint64, error) {
	if r.tap == nil {
		return 0, os.ErrProcessDone
	}
	r.tap.shut()
	err := r.proc.HandOver(d, r.tap.pipe, r.commands)
	if err != nil && !errors.Is(err, ErrHandedOver) {
		r.tap.open()
		return 0, err
	}
	close(r.leaving)
	r.tap.leave()
	<-r.done
	return r.delivered, err
}

// Leave asks the trainer to save a checkpoint and leave; after grace it is
// killed. It returns at once.
func (r *Run) Leave(grace time.Duration) {
	r.end(asked)
	ctx, cancel := context.WithTimeout(context.Background(), grace)
	go func() {
		defer cancel()
		_ = r.proc.Signal(syscall.SIGTERM)
		select {
		case <-r.proc.Done():
		case <-ctx.Done():
			_ = r.proc.Kill()
		}
	}()
}

// Kill ends the trainer and all that it started now.
func (r *Run) Kill() {
	r.end(killed)
	_ = r.proc.Kill()
}

func (r *Run) end(s stop) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopped = max(r.stopped, s)
}

// Wait returns once everything that the trainer started is gone: nil when it
// finished, else a *job.Failure with the trainer's own words for the user; or
// ErrHandedOver. Events must have been read to their end.
func (r *Run) Wait() error {
	exit, err := r.proc.Wait()
	<-r.done
	r.closePipes()
	if errors.Is(err, ErrHandedOver) {
		return ErrHandedOver
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	failure := r.judge(exit, err)
	if failure == nil {
		return nil
	}
	if failure.Kind == job.TrainerCrashed || failure.Kind == job.Protocol {
		failure.Err = withLog(failure.Err, r.dir)
	}
	return failure
}

// judge names the failure; nil when there was none.
func (r *Run) judge(exit proc.Exit, err error) *job.Failure {
	switch {
	case err != nil:
		return &job.Failure{Kind: job.TrainerCrashed, Err: fmt.Errorf("wait for the trainer: %w", err)}
	case exit.Late:
		return &job.Failure{Kind: job.AgentLost, Err: errOutOfTouch}
	case exit.Orphaned && exit.Signal != 0:
		return &job.Failure{Kind: job.AgentLost, Err: errors.New("the agent went, and nobody took its trainer over in time")}
	case r.bad != nil:
		return &job.Failure{Kind: job.Protocol, Err: r.bad}
	case exit.Code == 0 && exit.Signal == 0:
		return nil
	case r.stopped == killed:
		return &job.Failure{Kind: job.Preempted, Err: errors.New("the trainer was killed by this agent")}
	case r.said != nil && exit.Signal == 0:
		message := r.said.Message
		if r.said.Hint != "" {
			message += " " + r.said.Hint
		}
		return &job.Failure{Kind: job.Kind(wire.KindOfExit(exit.Code)), Message: message, Err: errors.New(firstOf(r.said.Detail, r.said.Message))}
	case exit.Signal != 0:
		if r.stopped == asked {
			return &job.Failure{Kind: job.Preempted, Err: errors.New("the trainer did not leave in time and was killed")}
		}
		return &job.Failure{Kind: job.TrainerCrashed, Err: fmt.Errorf("the trainer was ended by signal %v", exit.Signal)}
	default:
		return &job.Failure{Kind: job.Kind(wire.KindOfExit(exit.Code)), Err: fmt.Errorf("the trainer left with code %d", exit.Code)}
	}
}

func (r *Run) closePipes() {
	if r.tap != nil {
		r.tap.pipe.Close()
		r.commands.Close()
	}
}

func firstOf(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
