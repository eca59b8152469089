//go:build linux

package proc

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What the shim says on the lifeline, one line each: first started or refused,
// at the end ended. The agent writes signal numbers, one byte each.
const (
	reportStarted = "started %d\n"  // pid
	reportRefused = "refused %d\n"  // errno of fork or exec
	reportEnded   = "ended %d %d\n" // exit code, signal or 0
)

const (
	exitUsage   = 64
	exitRefused = 127
	sweepPause  = 10 * time.Millisecond
)

// RunShim is the whole life of a shim; the program's main calls it with the
// arguments after its verb, and exits with the code it returns: the child's, or
// 128+n when signal n ended it.
//
//	shim [--orphan-grace=2s] --lifeline=5 -- /path/to/program args...
//
// The descriptors from 3 to just below the lifeline become the child's.
// When the lifeline ends, everything below the shim gets SIGKILL after
// orphan-grace (default at once); it is not asked first, because nobody is left
// who could use the answer. TERM, INT, HUP, QUIT, USR1 and USR2 sent to the
// shim go to the child's group.
func RunShim(args []string) int {
	fs := flag.NewFlagSet("shim", flag.ContinueOnError)
	orphanGrace := fs.Duration("orphan-grace", 0, "how long the child may go on after the agent is gone")
	lifeline := fs.Int("lifeline", 0, "descriptor of the lifeline; those from 3 to below it become the child's")
	if err := fs.Parse(args); err != nil {
		return exitUsage
	}
	if *lifeline < 3 || fs.NArg() == 0 {
		fmt.Fprintln(os.Stderr, "shim: needs --lifeline of 3 or more, and a program")
		return exitUsage
	}
	// The child's parent-death signal follows this thread, which is now ours
	// until the process ends.
	runtime.LockOSThread()
	s := &shim{
		lifeline:    os.NewFile(uintptr(*lifeline), "lifeline"),
		orphanGrace: *orphanGrace,
		signals:     make(chan os.Signal, 16),
		changes:     make(chan os.Signal, 1),
		commands:    make(chan syscall.Signal),
	}
	if err := s.start(fs.Args(), *lifeline); err != nil {
		var errno syscall.Errno
		if !errors.As(err, &errno) {
			errno = syscall.EINVAL
		}
		s.say(reportRefused, int(errno))
		return exitRefused
	}
	s.say(reportStarted, s.child)
	exit := s.run()
	s.say(reportEnded, exit.Code, int(exit.Signal))
	return exit.Code
}

// shim is the state of the process between agent and child. One goroutine
// signals and reaps, so that no number can be reused between the two.
type shim struct {
	lifeline    *os.File
	orphanGrace time.Duration
	signals     chan os.Signal      // to pass on
	changes     chan os.Signal      // SIGCHLD; one waiting is enough for all
	commands    chan syscall.Signal // from the agent; closed when it is gone
	child       int
	exit        Exit
}

// say reports to the agent. Nobody may be left to hear it.
func (s *shim) say(format string, args ...any) {
	_, _ = fmt.Fprintf(s.lifeline, format, args...)
}

// start starts argv with the descriptors from 3 to below lifeline, and gives
// them up here: the agent must see the child's pipes end when the child ends
// them. Everything else that the agent leaked, as C libraries do, is kept from
// the child.
func (s *shim) start(argv []string, lifeline int) error {
	if err := unix.CloseRange(3, 1<<32-1, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		syscall.CloseOnExec(lifeline) // Linux before 5.11 can do no better
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	signal.Notify(s.changes, syscall.SIGCHLD)
	signal.Notify(s.signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	files := make([]uintptr, 0, lifeline)
	for fd := range lifeline {
		files = append(files, uintptr(fd))
	}
	pid, err := syscall.ForkExec(argv[0], argv, &syscall.ProcAttr{
		Env:   os.Environ(),
		Files: files,
		Sys:   &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", argv[0], err)
	}
	s.child = pid
	for fd := 3; fd < lifeline; fd++ {
		_ = syscall.Close(fd)
	}
	go s.listen()
	return nil
}

// listen turns bytes on the lifeline into commands until its end.
func (s *shim) listen() {
	defer close(s.commands)
	var b [1]byte
	for {
		if n, err := s.lifeline.Read(b[:]); err != nil || n == 0 {
			return
		}
		s.commands <- syscall.Signal(b[0])
	}
}

// run passes signals on until the child has ended, then ends all others.
func (s *shim) run() Exit {
	commands := s.commands
	var orphaned <-chan time.Time
	for {
		select {
		case sig := <-s.signals:
			s.pass(sig.(syscall.Signal))
		case sig, ok := <-commands:
			if !ok {
				commands = nil
				orphaned = time.After(s.orphanGrace)
				continue
			}
			s.pass(sig)
			if sig == syscall.SIGKILL {
				return s.sweep()
			}
		case <-orphaned:
			s.pass(syscall.SIGKILL)
			return s.sweep()
		case <-s.changes:
			if ended, _ := s.reap(); ended {
				return s.sweep()
			}
		}
	}
}

// pass sends sig to the child's group. The child is not reaped yet, so the
// number is still its own.
func (s *shim) pass(sig syscall.Signal) { _ = syscall.Kill(-s.child, sig) }

// reap takes every process that has ended. It tells whether the child was one
// of them, and whether none are left.
func (s *shim) reap() (ended, empty bool) {
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return ended, true
		case pid == 0:
			return ended, false
		case pid == s.child:
			s.exit, ended = exitOf(ws), true
		}
	}
}

// sweep kills all children, who are the group, the orphans, and with each
// round what those had below them, until none is left. Only children are
// killed: nobody but us can reap them, so their numbers are sure.
func (s *shim) sweep() Exit {
	tick := time.NewTicker(sweepPause)
	defer tick.Stop()
	for {
		for _, pid := range children(os.Getpid()) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		if _, empty := s.reap(); empty {
			return s.exit
		}
		select {
		case <-s.changes:
		case <-tick.C:
		}
	}
}
