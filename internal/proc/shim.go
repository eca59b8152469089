//go:build linux

package proc

import (
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	exitUsage   = 64
	exitRefused = 127
	sweepPause  = 10 * time.Millisecond
	hookLimit   = time.Minute // the host may be off the network, and nobody waits for the hook
)

// RunShim is the whole life of a shim; the program's main calls it with the
// arguments after its verb, and exits with the code it returns: the child's, or
// 128+n when signal n ended it.
//
//	shim [--orphan-grace=2s] [--cgroup=false] --lifeline=5 -- /path/to/program args...
//
// The descriptors from 3 to just below the lifeline become the child's; the
// other flags are made of Cmd. TERM, INT, HUP, QUIT, USR1 and USR2 sent to the
// shim go to the child's group.
//
//	              ┌──────────────── adopted ─────────────────┐
//	              ▼                                          │
//	started ─► attended ─ handover ─► waiting ─ time over ─► asked (SIGTERM)
//	              │                      │                   │
//	   deadline, lifeline's end       deadline         deadline, grace over
//	              ▼                      ▼                   ▼
//	    SIGKILL to everything below ─► all reaped ─► record ─► hook ─► gone
//
// At the lifeline's end, or orphan-grace after it, an orphan is killed without
// being asked, because nobody is left who could use the answer.
//
// The hook, orphaned, gets the path of that flag once everything is dead and
// the record is written, when an agent went without a word or did not come back
// in time; not when the child had ended before that. It may take a minute.
func RunShim(args []string, orphaned func(path string)) int {
	s := &shim{
		signals:  make(chan os.Signal, 16),
		changes:  make(chan os.Signal, 1),
		commands: make(chan command),
		adopters: make(chan *net.UnixConn),
	}
	fs := flag.NewFlagSet("shim", flag.ContinueOnError)
	fs.DurationVar(&s.orphanGrace, "orphan-grace", 0, "how long the child may go on after the agent is gone")
	fs.DurationVar(&s.grace, "grace", 0, "time between SIGTERM and SIGKILL when nobody adopts")
	fs.BoolVar(&s.tryCgroup, "cgroup", true, "kill by control group where one can be made")
	fs.StringVar(&s.socket, "socket", "", "where to wait for an adopter")
	fs.StringVar(&s.record, "exit", "", "file that tells how the child ended")
	lifeline := fs.Int("lifeline", 0, "descriptor of the lifeline; those from 3 to below it become the child's")
	deadline := fs.Int64("deadline", 0, "CLOCK_BOOTTIME in nanoseconds at which all must be over; 0: never")
	log := fs.String("log", "", "file for the child's output")
	fs.StringVar(&s.cpus, "cpus", "", "processors for the child")
	fs.StringVar(&s.memory, "memory", "", "NUMA nodes for the child's memory")
	path := fs.String("orphaned", "", "given to the hook when nobody was in charge any more")
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
	if err := s.start(fs.Args(), *lifeline, time.Duration(*deadline), *log); err != nil {
		s.refuse(err)
		return exitRefused
	}
	s.say(sayStarted, s.identity())
	s.run()
	s.finish()
	if s.orphaned && *path != "" && orphaned != nil {
		called := make(chan struct{})
		go func() {
			defer close(called)
			orphaned(*path)
		}()
		select {
		case <-called:
		case <-time.After(hookLimit):
		}
	}
	return s.exit.Code
}

// shim is the state of the process between agent and child. One goroutine
// signals and reaps, so that no number can be reused between the two.
type shim struct {
	orphanGrace, grace time.Duration
	tryCgroup          bool
	socket, record     string
	cpus, memory       string

	lifeline *lifeline // nil while nobody is in charge
	signals  chan os.Signal
	changes  chan os.Signal // SIGCHLD; one waiting is enough for all
	commands chan command
	adopters chan *net.UnixConn
	alarm    *alarm
	waiting  *waiting
	timer    <-chan time.Time // of whatever comes next when nobody is in charge
	asked    bool             // SIGTERM was sent because nobody came
	orphaned bool

	lock   *os.File // directory of the record, locked while we live
	output *os.File // what the child says; nil without a log
	logged chan struct{}
	cgroup *cgroup // nil where there is none

	child int
	exit  Exit
}

// command is a line of an agent.
type command struct {
	from  *lifeline
	verb  string
	n     int64
	files []*os.File
}

// cmdGone is the end of the lifeline.
const cmdGone = "gone"

// waiting is an open socket, and what is kept for whoever comes.
type waiting struct {
	listener *net.UnixListener
	kept     []*os.File
	over     chan struct{}
}

// say reports to the agent. Nobody may be left to hear it.
func (s *shim) say(verb string, rest string) {
	if s.lifeline != nil {
		_ = s.lifeline.say(nil, "%s %s", verb, rest)
	}
}

// refuse says why there is no child.
func (s *shim) refuse(err error) {
	if errors.Is(err, ErrLate) {
		s.say(sayLate, "")
		return
	}
	errno, ok := errors.AsType[syscall.Errno](err)
	if !ok {
		errno = syscall.EINVAL
	}
	s.say(sayRefused, fmt.Sprint(int(errno)))
	fmt.Fprintln(os.Stderr, "shim:", err)
}

// identity is who the child is: a number alone may be another's tomorrow.
func (s *shim) identity() string {
	var start uint64
	if p, ok := statOf(s.child); ok { // a zombie at least: we have not reaped it
		start = p.start
	}
	return fmt.Sprint(s.child, " ", start, " ", s.cgroup.name())
}

// start starts argv with the descriptors from 3 to below lifeline, and gives
// them up here: the agent must see the child's pipes end when the child ends
// them. Everything else that the agent leaked, as C libraries do, is kept from
// the child.
func (s *shim) start(argv []string, lifeline int, deadline time.Duration, log string) error {
	if err := unix.CloseRange(3, 1<<32-1, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		syscall.CloseOnExec(lifeline) // Linux before 5.11 can do no better
	}
	var err error
	if s.lifeline, err = newLifeline(lifeline); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	if err := s.settleIn(); err != nil {
		return err
	}
	if s.alarm, err = newAlarm(); err != nil {
		return err
	}
	if err := s.alarm.set(deadline); err != nil {
		return err
	}
	signal.Notify(s.changes, syscall.SIGCHLD)
	// Our stderr may be a pipe of an agent that is gone; not ignored, because
	// the child would inherit that.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	signal.Notify(s.signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	files := make([]uintptr, 0, lifeline)
	for fd := range lifeline {
		files = append(files, uintptr(fd))
	}
	if log != "" {
		r, w, err := os.Pipe()
		if err != nil {
			return fmt.Errorf("make log pipe: %w", err)
		}
		defer w.Close()
		files[1], files[2] = w.Fd(), w.Fd()
		s.output, s.logged = r, make(chan struct{})
		go func() {
			defer close(s.logged)
			openLog(log).readFrom(r)
		}()
	}
	if err := s.fork(argv, files); err != nil {
		return fmt.Errorf("start %s: %w", argv[0], err)
	}
	for fd := 3; fd < lifeline; fd++ {
		_ = syscall.Close(fd)
	}
	if s.record != "" {
		// Without it, only less can be known after we were killed.
		_ = beginRecord(s.record, s.cgroup.name())
	}
	go s.listen(s.lifeline)
	return nil
}

// settleIn takes the directory of the record, and removes what an earlier child
// left there.
func (s *shim) settleIn() error {
	if s.record == "" {
		return nil
	}
	var err error
	if s.lock, err = os.Open(filepath.Dir(s.record)); err != nil {
		return fmt.Errorf("open directory of the record: %w", err)
	}
	// Some file systems have no locks; then an early adopter is told that there
	// is no record.
	if err := unix.Flock(int(s.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return fmt.Errorf("another shim lives in the directory of the record: %w", syscall.EBUSY)
	}
	_ = os.Remove(s.record)
	if s.socket != "" {
		_ = os.Remove(s.socket)
	}
	return nil
}

// fork starts the child, in a control group of its own if there can be one,
// unless it is too late.
func (s *shim) fork(argv []string, files []uintptr) error {
	attr := &syscall.ProcAttr{
		Env:   os.Environ(),
		Files: files,
		Sys:   &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL},
	}
	if s.tryCgroup {
		s.cgroup, _ = newCgroup() // the sweep does it too
	}
	if s.cgroup != nil {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(s.cgroup.dir.Fd())
	}
	// The child inherits it from this thread.
	if err := pin(s.cpus, s.memory); err != nil {
		fmt.Fprintln(os.Stderr, "shim:", err)
	}
	if s.alarm.passed() {
		s.leaveCgroup()
		return ErrLate
	}
	pid, err := syscall.ForkExec(argv[0], argv, attr)
	if err != nil && s.cgroup != nil {
		// clone3 may be forbidden, or we may not move processes there.
		s.leaveCgroup()
		attr.Sys.UseCgroupFD = false
		pid, err = syscall.ForkExec(argv[0], argv, attr)
	}
	s.child = pid
	return err
}

func (s *shim) leaveCgroup() {
	if s.cgroup != nil {
		s.cgroup.remove()
		s.cgroup = nil
	}
}

// listen turns lines on the lifeline into commands until its end.
func (s *shim) listen(l *lifeline) {
	for {
		said, err := l.hear()
		if err != nil {
			s.commands <- command{from: l, verb: cmdGone}
			return
		}
		c := command{from: l, verb: said[0], n: number(said, 1)}
		if c.verb == cmdHandOver {
			c.files = l.take()
		}
		s.commands <- c
	}
}

// run watches over the child until it has ended, or has to; then it ends all
// others.
func (s *shim) run() {
	for {
		select {
		case sig := <-s.signals:
			s.pass(sig.(syscall.Signal))
		case c := <-s.commands:
			if c.from != s.lifeline { // one that we gave up
				closeAll(c.files)
				continue
			}
			if s.obey(c) {
				s.kill()
				return
			}
		case conn := <-s.adopters:
			s.adopt(conn)
		case <-s.timer:
			if !s.missed() {
				s.kill()
				return
			}
		case <-s.alarm.rings:
			if !s.alarm.passed() {
				continue
			}
			if ended, _ := s.reap(); !ended {
				s.exit.Late = true
				s.orphaned = s.lifeline == nil
				s.pass(syscall.SIGKILL)
			}
			s.sweep()
			return
		case <-s.changes:
			if ended, _ := s.reap(); ended {
				s.sweep()
				return
			}
		}
	}
}

// obey tells whether the child has to end.
func (s *shim) obey(c command) (end bool) {
	switch c.verb {
	case cmdSignal:
		if syscall.Signal(c.n) == syscall.SIGKILL {
			return true
		}
		s.pass(syscall.Signal(c.n))
	case cmdDeadline:
		// It cannot fail where setting the first one went well.
		_ = s.alarm.set(time.Duration(c.n))
	case cmdHandOver:
		s.takeOver(time.Duration(c.n), c.files)
	case cmdGone:
		s.lifeline, s.orphaned = nil, true
		s.timer = time.After(s.orphanGrace)
		s.asked = true // as good as
		return s.orphanGrace <= 0
	}
	return false
}

// takeOver makes us the only ones to watch over the child.
func (s *shim) takeOver(patience time.Duration, files []*os.File) {
	l, err := listen(s.socket)
	if err != nil {
		closeAll(files)
		s.say(sayCannot, err.Error())
		return
	}
	w := &waiting{listener: l, kept: files, over: make(chan struct{})}
	go func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			select {
			case s.adopters <- conn:
			case <-w.over:
				conn.Close()
				return
			}
		}
	}()
	s.waiting, s.timer, s.asked = w, time.After(patience), false
	s.say(sayHanded, "")
	s.lifeline.close()
	s.lifeline = nil
}

// adopt gives the child to whoever is at the other end, if it is our user.
func (s *shim) adopt(conn *net.UnixConn) {
	l := &lifeline{conn: conn}
	peer, err := peerOf(conn)
	if err != nil || int(peer.Uid) != os.Geteuid() || s.waiting == nil {
		l.close()
		return
	}
	if err := l.say(s.waiting.kept, "%s %s", sayAdopted, s.identity()); err != nil {
		l.close()
		return
	}
	s.stopWaiting()
	s.lifeline, s.timer, s.orphaned = l, nil, false
	go s.listen(l)
}

// stopWaiting closes the socket; whoever stands in its queue learns that.
func (s *shim) stopWaiting() {
	if s.waiting == nil {
		return
	}
	close(s.waiting.over)
	_ = os.Remove(s.socket)
	_ = s.waiting.listener.Close()
	closeAll(s.waiting.kept)
	s.waiting = nil
}

// missed is the end of a time in which nobody came. It tells whether there is
// another one.
func (s *shim) missed() (more bool) {
	if s.asked {
		return false
	}
	s.asked, s.orphaned = true, true
	s.pass(syscall.SIGTERM)
	s.timer = time.After(s.grace)
	return true
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
			late := s.exit.Late
			s.exit, ended = exitOf(ws), true
			s.exit.Late = late
		}
	}
}

// kill ends the child and all others.
func (s *shim) kill() {
	s.pass(syscall.SIGKILL)
	s.sweep()
}

// sweep kills everything below us until nothing is left. The control group
// does it in one step. What is not in it, because there is none or because a
// process left it, becomes our child when its parent dies, and stays ours until
// we reap it: we cannot miss one, only come too late to keep it from forking.
// Groups are killed as a whole, in a step in which nobody in them can fork; who
// wants to escape must start a new session faster than we read /proc.
func (s *shim) sweep() {
	tick := time.NewTicker(sweepPause)
	defer tick.Stop()
	self, _ := statOf(os.Getpid())
	struck := map[int]uint64{}
	for {
		if s.cgroup != nil {
			s.cgroup.kill()
		}
		fresh := false
		eachProcess(func(p stat) {
			if p.parent != self.pid {
				return
			}
			// Only children are killed, and their groups: nobody but us can reap
			// them, so the numbers are sure. A group in our own session may be
			// the agent's; in another one all processes are below us.
			if p.session != self.session {
				_ = syscall.Kill(-p.group, syscall.SIGKILL)
			}
			_ = syscall.Kill(p.pid, syscall.SIGKILL)
			fresh = fresh || struck[p.pid] != p.start
			struck[p.pid] = p.start
		})
		if _, empty := s.reap(); empty {
			return
		}
		if fresh {
			continue // a storm is not waited for
		}
		select {
		case <-s.changes:
		case <-tick.C:
		}
	}
}

// finish writes down how it ended, for an agent that is there and for one that
// comes later.
func (s *shim) finish() {
	if s.output != nil {
		// All writers are dead, unless one gave its end to a stranger.
		_ = s.output.SetReadDeadline(time.Now().Add(logLimit))
		<-s.logged
	}
	s.leaveCgroup()
	s.exit.Orphaned = s.orphaned
	if s.record != "" {
		if err := writeRecord(s.record, s.exit); err != nil {
			fmt.Fprintln(os.Stderr, "shim:", err)
		}
	}
	s.stopWaiting()
	if s.lock != nil {
		_ = s.lock.Close()
	}
	late := 0
	if s.exit.Late {
		late = 1
	}
	s.say(sayEnded, fmt.Sprint(s.exit.Code, " ", int(s.exit.Signal), " ", late))
}
