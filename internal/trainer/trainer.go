// Package trainer starts one Python trainer on given devices, yields its
// events, and names its failure. The child gets a plan file, two descriptors
// and an environment of its own; no key of ours is ever in it.
package trainer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/proc"
	"lorayard/internal/wire"
)

// Trainer knows where Python and the package are.
type Trainer struct {
	Python  string            // interpreter of the trainer's environment
	Dir     string            // directory that holds the package lora_train
	Shim    []string          // argv that re-executes this binary as the shim
	Backend string            // torch or dry
	Dry     *wire.Dry         // the script of the dry backend
	Env     map[string]string // beyond the allow-list, such as library paths
}

// allowed are the variables of our own environment that the trainer may see.
var allowed = []string{"PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES"}

// Environment is all that the trainer sees: the allow-list out of environ,
// offline switches, and the devices by UUID.
func Environment(environ []string, devices []string, home string, extra map[string]string) []string {
	env := []string{
		"HOME=" + home, "TMPDIR=" + home, "PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1", "PYTHONNOUSERSITE=1",
		"HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1", "HF_HUB_DISABLE_TELEMETRY=1", "DO_NOT_TRACK=1", "TOKENIZERS_PARALLELISM=false",
		"CUDA_DEVICE_ORDER=PCI_BUS_ID", "CUDA_VISIBLE_DEVICES=" + strings.Join(devices, ","),
	}
	for _, kv := range environ {
		name, _, _ := strings.Cut(kv, "=")
		for _, a := range allowed {
			if name == a {
				env = append(env, kv)
			}
		}
	}
	for k, v := range extra {
		env = append(env, k+"="+v)
	}
	return env
}

// Run is one running trainer.
type Run struct {
	proc     *proc.Process
	commands *os.File
	events   chan Event
	log      chan string

	mu      sync.Mutex
	said    *wire.Event // the error event
	bad     error       // the protocol was broken
	stopped stop
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
}

// Start writes the plan into its run directory and starts the child. devices
// are UUIDs; empty means that the trainer uses the CPU.
func (t *Trainer) Start(plan wire.Plan, devices []string, environ []string) (*Run, error) {
	plan.Backend, plan.Dry = t.Backend, t.Dry
	if err := os.MkdirAll(plan.RunDir, 0o700); err != nil {
		return nil, fmt.Errorf("make the run directory: %w", err)
	}
	path := filepath.Join(plan.RunDir, "plan.json")
	if err := wire.WritePlan(path, plan); err != nil {
		return nil, err
	}
	eventsR, eventsW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make the event pipe: %w", err)
	}
	commandsR, commandsW, err := os.Pipe()
	if err != nil {
		eventsR.Close()
		eventsW.Close()
		return nil, fmt.Errorf("make the command pipe: %w", err)
	}
	r := &Run{commands: commandsW, events: make(chan Event, 64), log: make(chan string, 256)}
	text := &lines{out: r.log}
	p, err := proc.Start(proc.Cmd{
		Path: t.Python, Args: []string{"-m", "lora_train", "--plan", path}, Dir: t.Dir,
		Env:    Environment(environ, devices, plan.RunDir, t.Env),
		Stdout: text, Stderr: text, Extra: []*os.File{eventsW, commandsR}, Shim: t.Shim,
	})
	eventsW.Close()
	commandsR.Close()
	if err != nil {
		eventsR.Close()
		commandsW.Close()
		return nil, &job.Failure{Kind: job.TrainerCrashed, Err: fmt.Errorf("start the trainer: %w", err)}
	}
	r.proc = p
	go r.read(eventsR)
	return r, nil
}

// read decodes events until the pipe ends. It always drains the pipe: the
// trainer must never wait for us.
func (r *Run) read(pipe *os.File) {
	defer close(r.events)
	defer pipe.Close()
	d := wire.NewDecoder(pipe)
	for {
		e, line, err := d.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			r.mu.Lock()
			r.bad = err
			r.mu.Unlock()
			_ = r.proc.Kill()
			_, _ = io.Copy(io.Discard, pipe)
			return
		}
		if e.Ev == "error" {
			r.mu.Lock()
			r.said = &e
			r.mu.Unlock()
		}
		r.events <- Event{Event: e, Line: bytes.Clone(line)}
	}
}

// Events yields events until the trainer closes its pipe. Whoever starts a run
// must read them to the end.
func (r *Run) Events() <-chan Event { return r.events }

// Text yields lines of stdout and stderr; when nobody keeps up, lines are
// dropped, because a flood of text must not hold up a training.
func (r *Run) Text() <-chan string { return r.log }

// PID is the trainer's process id, or the shim's where there is one.
func (r *Run) PID() int { return r.proc.Pid() }

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

// Kill ends the whole process group now.
func (r *Run) Kill() {
	r.end(killed)
	_ = r.proc.Kill()
}

func (r *Run) end(s stop) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stopped = max(r.stopped, s)
}

// Wait returns once the process group is gone: nil when the trainer finished,
// else a *job.Failure with the trainer's own words for the user. Events must
// have been read to their end.
func (r *Run) Wait() error {
	exit, err := r.proc.Wait()
	r.commands.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case err != nil:
		return &job.Failure{Kind: job.TrainerCrashed, Err: fmt.Errorf("wait for the trainer: %w", err)}
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

func firstOf(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// lines cuts what is written into lines of at most 4 KiB.
type lines struct {
	mu  sync.Mutex
	buf []byte
	out chan<- string
}

const longestLine = 4 << 10

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for rest := p; len(rest) > 0; {
		line, after, whole := bytes.Cut(rest, []byte("\n"))
		if room := longestLine - len(l.buf); len(line) > room {
			line = line[:room]
		}
		l.buf = append(l.buf, line...)
		rest = after
		if whole {
			if text := strings.TrimRight(string(l.buf), "\r "); text != "" {
				select {
				case l.out <- text:
				default:
				}
			}
			l.buf = l.buf[:0]
		}
	}
	return len(p), nil
}
