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
//	      ◄──report───   └─ subreaper: every orphan below comes to it
//
// The agent alone holds the other end of the lifeline, a socket. Its end means
// that the agent is gone, however it went. The shim leaves only after every
// process below it is dead and reaped, so that an ended shim means a free GPU.
package proc

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	defaultOutputDelay = 2 * time.Second
	shimStartLimit     = 30 * time.Second // a shim that has not reported by then never will
	shimKillLimit      = 5 * time.Second  // a shim that has not killed by then is killed itself
)

var (
	// ErrOutputCut says that somebody outside the group kept the child's
	// output open, and that reading it was given up. The Exit is valid.
	ErrOutputCut = errors.New("output cut off")

	// ErrShimLost says that the shim ended without a report, as when it was
	// killed. The group is gone even so; a process that had left the group may
	// not be.
	ErrShimLost = errors.New("shim ended without a report")
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
}

// Exit says how a child ended.
type Exit struct {
	Code   int            // the exit code; 128+Signal when a signal ended it
	Signal syscall.Signal // 0 when the child left by itself
}

// String is the exit in words.
func (e Exit) String() string {
	if e.Signal != 0 {
		return fmt.Sprintf("ended by signal %d (%v)", int(e.Signal), e.Signal)
	}
	return fmt.Sprintf("exit code %d", e.Code)
}

// Process is a started child. Its methods may be called by many goroutines.
type Process struct {
	pid   int
	grace time.Duration
	cmd   *exec.Cmd // the child, or the shim above it

	lifeline *os.File      // nil without a shim
	report   *bufio.Reader // reads lifeline

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
	p := &Process{grace: c.Grace, done: make(chan struct{})}
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
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Path, err)
	}
	p.pid = p.cmd.Process.Pid
	go p.reap()
	return p, nil
}

// startShim starts the shim with the lifeline as the descriptor after the
// extra ones, and waits until it has started the child.
func (p *Process) startShim(c Cmd) (*Process, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open lifeline: %w", err)
	}
	p.lifeline = os.NewFile(uintptr(fds[0]), "lifeline")
	p.report = bufio.NewReader(p.lifeline)
	theirs := os.NewFile(uintptr(fds[1]), "lifeline of shim")
	fd := 3 + len(c.Extra)
	p.cmd.Path = c.Shim[0]
	p.cmd.Args = append(append([]string{}, c.Shim...), "--lifeline="+strconv.Itoa(fd), "--", c.Path)
	p.cmd.Args = append(p.cmd.Args, c.Args...)
	p.cmd.ExtraFiles = append(append([]*os.File{}, c.Extra...), theirs)
	err = p.cmd.Start()
	theirs.Close()
	if err != nil {
		p.lifeline.Close()
		return nil, fmt.Errorf("start shim %s: %w", c.Shim[0], err)
	}
	if err := p.awaitChild(c.Path); err != nil {
		p.lifeline.Close()
		p.cmd.Process.Kill() // it may be gone already, and is waited for either way
		if werr := p.cmd.Wait(); errors.Is(err, ErrShimLost) && werr != nil {
			err = fmt.Errorf("%w: %w", err, werr)
		}
		return nil, fmt.Errorf("start %s: %w", c.Path, err)
	}
	go p.reapShim()
	return p, nil
}

// awaitChild reads the first line of the shim's report.
func (p *Process) awaitChild(path string) error {
	if err := p.lifeline.SetReadDeadline(time.Now().Add(shimStartLimit)); err != nil {
		return fmt.Errorf("set deadline of shim: %w", err)
	}
	line, err := p.report.ReadString('\n')
	if err != nil {
		return fmt.Errorf("%w: %w", ErrShimLost, err)
	}
	var errno int
	if n, _ := fmt.Sscanf(line, reportRefused, &errno); n == 1 {
		return &os.PathError{Op: "exec", Path: path, Err: syscall.Errno(errno)}
	}
	if n, _ := fmt.Sscanf(line, reportStarted, &p.pid); n != 1 {
		return fmt.Errorf("%w: it said %q", ErrShimLost, line)
	}
	return p.lifeline.SetReadDeadline(time.Time{})
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

// reapShim waits for the shim, which ends after all that is below it.
func (p *Process) reapShim() {
	defer close(p.done)
	var reported bool
	for {
		line, err := p.report.ReadString('\n')
		if err != nil {
			break
		}
		var code, sig int
		if n, _ := fmt.Sscanf(line, reportEnded, &code, &sig); n == 2 {
			p.exit, reported = Exit{Code: code, Signal: syscall.Signal(sig)}, true
		}
	}
	if reported {
		p.markGone()
	} else {
		// The child got SIGKILL from the kernel when the shim died.
		p.closeGroup()
	}
	p.lifeline.Close()
	p.err = outputError(p.cmd.Wait())
	if !reported {
		awaitGroup(p.pid)
		p.exit = Exit{Code: 128 + int(syscall.SIGKILL), Signal: syscall.SIGKILL}
		p.err = errors.Join(ErrShimLost, p.err)
	}
}

// markGone ends all signalling.
func (p *Process) markGone() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gone = true
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
	_, err := p.lifeline.Write([]byte{byte(sig)})
	if sig == syscall.SIGKILL {
		// Somebody may have stopped the shim.
		_ = p.cmd.Process.Signal(syscall.SIGCONT)
		if p.lastStand == nil {
			p.lastStand = time.AfterFunc(shimKillLimit, func() { _ = p.cmd.Process.Kill() })
		}
	}
	return p.signalError(sig, err)
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
		return nil
	case <-ctx.Done():
	case <-grace.C:
	}
	if err := p.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("stop process %d: %w", p.pid, context.Cause(ctx))
	}
}

// Done is closed when Wait would return at once.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait returns how the child ended, after the whole group is gone and its
// output was read: with a shim, after everything that the child ever started
// is gone. The error is ErrOutputCut, ErrShimLost or that of a writer; the
// Exit is valid even so. Every caller gets the same answer.
func (p *Process) Wait() (Exit, error) {
	<-p.done
	return p.exit, p.err
}
