//go:build linux

// Package proc runs a child in its own process group: asked to leave, then
// killed, always reaped. It is the only room that starts processes.
//
// A trainer must never outlive the agent's care: two trainers on one GPU, or a
// stray one that holds its memory, cost a user's job. A killed agent cannot
// clean up after itself, a group does not hold a grandchild that called
// setsid, and the kernel's parent-death signal is tied to a thread. So a small
// shim, the same binary run again, stands between agent and child:
//
//	agent ──lifeline──► shim ──pdeathsig──► child ─► grandchildren
//	      ◄──report───   ├─ cgroup where there is one: all of them die at once
//	                     └─ subreaper: every orphan below comes to it
//
// The agent alone holds the other end of the lifeline, a socket. Its end means
// that the agent is gone, however it went, unless it said before that it comes
// back: then the shim waits for somebody to Adopt the child. An agent that is
// there but out of touch, because it hangs or was frozen, runs into a deadline.
// The shim leaves only after every process below it is dead and reaped, so
// that an ended shim means a free GPU.
package proc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const defaultOutputDelay = 2 * time.Second

var (
	// ErrOutputCut says that somebody outside the group kept the child's
	// output open, and that reading it was given up. The Exit is valid.
	ErrOutputCut = errors.New("output cut off")

	// ErrShimLost says that the shim ended without a report, as when it was
	// killed. The group is gone even so; a process that had left the group may
	// not be.
	ErrShimLost = errors.New("shim ended without a report")

	// ErrLate says that the deadline had passed before the child was started:
	// it never was.
	ErrLate = errors.New("the deadline had passed")

	// ErrHandedOver says that the child lives on and waits to be adopted.
	ErrHandedOver = errors.New("handed over")
)

// Cmd says what to run.
type Cmd struct {
	Path string   // the executable; PATH is not searched
	Args []string // without the program's name
	Env  []string // the whole environment of the child; nil is an empty one
	Dir  string   // empty: the caller's

	Stdout, Stderr io.Writer  // nil: discarded; an *os.File is handed over as it is
	Extra          []*os.File // descriptors 3 and up of the child; the caller closes its own

	// Grace is the time between SIGTERM and SIGKILL in Stop.
	Grace time.Duration

	// OutputDelay is how long Wait goes on reading output after the group is
	// gone; 0 is 2 s. It matters only when a process outside the group holds
	// the output open, or Stdout or Stderr is that slow.
	OutputDelay time.Duration

	// Shim is the start of the command that runs RunShim in a process of its
	// own, such as {"/proc/self/exe", "shim", "--orphan-grace=2s"}. Empty runs
	// the child without a shim: then nobody ends it when the caller is killed,
	// and a process that leaves the group is not followed.
	Shim []string

	// The rest is the shim's work, and refused without one.

	// Deadline is how long from now the child may run unless Extend is called,
	// by a clock that goes on while the machine sleeps; 0 is for ever. When it
	// has passed before the child is started, the child is not.
	Deadline time.Duration

	// Log is a file that takes the child's output instead of Stdout and
	// Stderr, also while nobody is in charge. It holds the newest 4 MiB; the
	// 4 MiB before those are in <Log>.1.
	Log string

	// Socket is where HandOver leaves the child to be adopted.
	Socket string

	// Record is the file in which the shim writes how the child ended, once
	// everything below it is gone. A child can only be handed over when it has
	// both Socket and Record, and its output does not go to Stdout or Stderr.
	Record string

	// CPUs and Memory are the processors and the NUMA nodes that the child runs
	// best on, as lists of the kernel's form (0-15,32-47). What the host does
	// not let it have is said on the shim's standard error, and left. Empty:
	// wherever.
	CPUs, Memory string

	// Orphaned is given to the hook of RunShim when the shim has ended the
	// child because nobody was in charge of it any more.
	Orphaned string
}

// Exit says how a child ended.
type Exit struct {
	Code   int            // the exit code; 128+Signal when a signal ended it
	Signal syscall.Signal // 0 when the child left by itself
	Late   bool           // the deadline passed, and the shim ended it

	// Orphaned is told to who adopts: nobody was in charge, and the shim ended
	// it, or had asked it to leave.
	Orphaned bool
}

// String is the exit in words.
func (e Exit) String() string {
	if e.Late {
		return "ended because its deadline passed"
	}
	if e.Signal != 0 {
		return fmt.Sprintf("ended by signal %d (%v)", int(e.Signal), e.Signal)
	}
	return fmt.Sprintf("exit code %d", e.Code)
}

// Process is a started child. Its methods may be called by many goroutines.
type Process struct {
	pid   int
	start uint64 // its start time as /proc tells it; 0 without a shim
	grace time.Duration
	cmd   *exec.Cmd // the child, or the shim above it; nil when adopted

	shim     *os.Process // nil without one
	lifeline *lifeline   // nil without a shim
	cgroup   string      // the child's control group, empty where there is none
	stays    bool        // it can be handed over
	refused  chan string // why the shim would not take it over

	handle    int        // a pidfd of the child, 0: none
	mu        sync.Mutex // held while a signal is sent, so that pid is not reused under it
	gone      bool
	lastStand *time.Timer

	done chan struct{} // closed when exit and err are set
	exit Exit
	err  error
}

// Start starts c. The child is reaped whether or not anyone waits for it. An
// executable that is missing or may not be run is the error of Start, with or
// without a shim: it wraps fs.ErrNotExist or fs.ErrPermission.
func Start(c Cmd) (*Process, error) {
	p := &Process{grace: c.Grace, refused: make(chan string, 1), done: make(chan struct{})}
	p.cmd = &exec.Cmd{
		Path:        c.Path,
		Args:        append([]string{c.Path}, c.Args...),
		Env:         append([]string{}, c.Env...), // never nil: that would inherit ours
		Dir:         c.Dir,
		Stdout:      c.Stdout,
		Stderr:      c.Stderr,
		ExtraFiles:  c.Extra,
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true},
		WaitDelay:   c.OutputDelay,
	}
	if c.OutputDelay <= 0 {
		p.cmd.WaitDelay = defaultOutputDelay
	}
	if len(c.Shim) > 0 {
		return p.startShim(c)
	}
	if c.Deadline != 0 || c.Log != "" || c.Socket != "" || c.Record != "" || c.Orphaned != "" || c.CPUs != "" || c.Memory != "" {
		return nil, fmt.Errorf("start %s: deadline, log, socket, record, orphaned, CPUs and memory need a shim", c.Path)
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Path, err)
	}
	p.pid = p.cmd.Process.Pid
	go p.reap()
	return p, nil
}

// reap waits for a child without a shim. The leader stays a zombie until its
// group has been killed: until then nobody else can have its number.
func (p *Process) reap() {
	defer close(p.done)
	for {
		err := unix.Waitid(unix.P_PID, p.pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	p.closeGroup()
	err := p.cmd.Wait()
	awaitGroup(p.pid)
	ws, _ := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	p.exit, p.err = exitOf(ws), outputError(err)
}

// markGone ends all signalling.
func (p *Process) markGone() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone = true
	if p.handle > 0 {
		_ = unix.Close(p.handle)
		p.handle = 0
	}
	if p.lastStand != nil {
		p.lastStand.Stop()
	}
}

// closeGroup ends all signalling and kills what is left of the group.
func (p *Process) closeGroup() {
	p.markGone()
	// ESRCH: nobody is left, which is what we want.
	_ = syscall.Kill(-p.pid, syscall.SIGKILL)
}

func outputError(err error) error {
	if errors.Is(err, exec.ErrWaitDelay) {
		return ErrOutputCut
	}
	// How the child ended is told by Exit.
	if _, ok := errors.AsType[*exec.ExitError](err); ok {
		return nil
	}
	return err
}

func exitOf(ws syscall.WaitStatus) Exit {
	if ws.Signaled() {
		return Exit{Code: 128 + int(ws.Signal()), Signal: ws.Signal()}
	}
	return Exit{Code: ws.ExitStatus()}
}

// Pid is the child's process id, and the id of its group; never the shim's.
func (p *Process) Pid() int { return p.pid }

// Cgroup is the directory of the control group that holds the child and all
// that it starts; empty where the shim could not make one, and sweeps instead.
func (p *Process) Cgroup() string { return p.cgroup }

// Signal sends sig to the group. It is os.ErrProcessDone once the child is
// gone. With a shim the signal goes through it, and SIGKILL ends everything
// below the shim, also what has left the group.
func (p *Process) Signal(sig syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone {
		return os.ErrProcessDone
	}
	if p.lifeline == nil {
		return p.signalError(sig, syscall.Kill(-p.pid, sig))
	}
	if sig == syscall.SIGKILL {
		p.strike()
	}
	err := p.lifeline.say(nil, "%s %d", cmdSignal, int(sig))
	if sig == syscall.SIGKILL && p.shim != nil {
		// Somebody may have stopped the shim.
		_ = p.shim.Signal(syscall.SIGCONT)
		if p.lastStand == nil {
			p.lastStand = time.AfterFunc(shimKillLimit, func() { _ = p.shim.Kill() })
		}
	}
	return p.signalError(sig, err)
}

// strike kills the group of a child that has a shim without waiting for the
// shim: on a busy host that takes a millisecond or two to be woken, in which a
// broken device is trained on. The shim then finds who left the group. The
// handle tells whether the number is the child's still: for another process to
// have it, the child would have to be reaped, and all other numbers be used,
// between two lines. p.mu is held.
func (p *Process) strike() {
	if p.handle > 0 && unix.PidfdSendSignal(p.handle, 0, nil, 0) == nil {
		_ = syscall.Kill(-p.pid, syscall.SIGKILL)
	}
}

func (p *Process) signalError(sig syscall.Signal, err error) error {
	if errors.Is(err, syscall.ESRCH) || errors.Is(err, syscall.EPIPE) {
		return os.ErrProcessDone
	}
	if err != nil {
		return fmt.Errorf("send %v to group %d: %w", sig, p.pid, err)
	}
	return nil
}

// Kill ends the group at once with SIGKILL. It does not wait.
func (p *Process) Kill() error { return p.Signal(syscall.SIGKILL) }

// Stop asks the group to leave with SIGTERM and kills it when Grace has
// passed, or ctx ends, before it is gone. It returns nil once everything is
// dead and reaped. When ctx ends first it returns the cause; the killing and
// reaping go on, and Wait tells when they are done.
func (p *Process) Stop(ctx context.Context) error {
	if err := p.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return errors.Join(err, p.Kill())
	}
	grace := time.NewTimer(p.grace)
	defer grace.Stop()
	select {
	case <-p.done:
		return p.handedOver()
	case <-ctx.Done():
	case <-grace.C:
	}
	if err := p.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return p.handedOver()
	case <-ctx.Done():
		return fmt.Errorf("stop process %d: %w", p.pid, context.Cause(ctx))
	}
}

func (p *Process) handedOver() error {
	if errors.Is(p.err, ErrHandedOver) {
		return ErrHandedOver
	}
	return nil
}

// Done is closed when Wait would return at once.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait returns how the child ended, after the whole group is gone and its
// output was read: with a shim, after everything that the child ever started
// is gone. The error is ErrOutputCut, ErrShimLost or that of a writer; the
// Exit is valid even so. After HandOver it is ErrHandedOver at once, and the
// Exit means nothing. Every caller gets the same answer.
func (p *Process) Wait() (Exit, error) {
	<-p.done
	return p.exit, p.err
}
