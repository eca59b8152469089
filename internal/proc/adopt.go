//go:build linux

package proc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	handOverLimit = 5 * time.Second // for the shim's answer
	adoptLimit    = 5 * time.Second // for the shim's answer, and for a shim that is not ready
	adoptPause    = 10 * time.Millisecond
)

// ErrInCharge says that the child cannot be adopted because it was not handed
// over: another agent is in charge of it.
var ErrInCharge = errors.New("another agent is in charge")

// HandOver leaves the child, which goes on, to whoever adopts it within d. The
// shim keeps copies of keep for them, such as our ends of the child's pipes.
// After nil, Wait returns ErrHandedOver. os.ErrProcessDone says that the child
// has ended before: nothing changed, and Wait tells how. ErrHandedOver is a
// shim that did not answer: it will when it can, and the child is out of our
// hands. After any other error we are still in charge.
//
// When nobody comes in time, the child is asked to leave, is killed after
// Grace, and can be adopted until it has ended.
func (p *Process) HandOver(d time.Duration, keep ...*os.File) error {
	if !p.stays {
		return errors.New("hand over: needs a shim, a socket and a record, and no writer for the output")
	}
	if err := p.sayHandOver(d, keep); err != nil {
		return err
	}
	select {
	case <-p.done:
	case why := <-p.refused:
		return fmt.Errorf("hand over process %d: %s", p.pid, why)
	case <-time.After(handOverLimit):
		// The shim reads what we said before it sees that we are gone.
		p.lifeline.close()
		<-p.done
		return fmt.Errorf("hand over process %d: no answer in %v: %w", p.pid, handOverLimit, ErrHandedOver)
	}
	if !errors.Is(p.err, ErrHandedOver) {
		return os.ErrProcessDone
	}
	return nil
}

func (p *Process) sayHandOver(d time.Duration, keep []*os.File) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone {
		return os.ErrProcessDone
	}
	if err := p.lifeline.say(keep, "%s %d", cmdHandOver, int64(d)); err != nil {
		return p.signalError(0, err)
	}
	return nil
}

// Adopt takes charge of a child that was handed over. socket and record are
// those of its Cmd; grace is for Stop. The files are those that HandOver kept,
// in their order. The deadline stands until Extend moves it. When the child has
// ended meanwhile, Wait tells how, and there are no files.
//
// A shim that has not been told to hand over, or is just ending its child, is
// waited for: for 5 s, then it is ErrInCharge. ErrShimLost says that there is
// neither a shim nor a record of one.
func Adopt(socket, record string, grace time.Duration) (*Process, []*os.File, error) {
	for end := time.Now().Add(adoptLimit); ; time.Sleep(adoptPause) {
		p, files, err := adoptLiving(socket, grace)
		if absent(err) {
			p, err = adoptEnded(record)
		}
		if errors.Is(err, ErrInCharge) && time.Now().Before(end) {
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("adopt: %w", err)
		}
		return p, files, nil
	}
}

// absent tells whether err says that no shim waits: no socket, a socket that
// nobody listens on, or one whose shim left while we were in its queue.
func absent(err error) bool {
	for _, gone := range []error{syscall.ENOENT, syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE, errNoAnswer} {
		if errors.Is(err, gone) {
			return true
		}
	}
	return false
}

var errNoAnswer = errors.New("the shim left without an answer")

func adoptLiving(socket string, grace time.Duration) (*Process, []*os.File, error) {
	l, err := dial(socket)
	if err != nil {
		return nil, nil, err
	}
	p := &Process{grace: grace, lifeline: l, stays: true, refused: make(chan string, 1), done: make(chan struct{})}
	if err := p.recognise(); err != nil {
		p.markGone()
		closeAll(l.take())
		l.close()
		return nil, nil, err
	}
	files := l.take()
	go p.attend()
	return p, files, nil
}

// recognise hears who the child is and proves that the other side is its shim:
// of our user, and the parent of the very process that it names.
func (p *Process) recognise() error {
	peer, err := peerOf(p.lifeline.conn)
	if err != nil {
		return err
	}
	if int(peer.Uid) != os.Geteuid() {
		return fmt.Errorf("the socket belongs to user %d", peer.Uid)
	}
	if err := p.lifeline.conn.SetReadDeadline(time.Now().Add(adoptLimit)); err != nil {
		return err
	}
	said, err := p.lifeline.hear()
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("shim %d: no answer in %v", peer.Pid, adoptLimit)
	case err != nil:
		return fmt.Errorf("%w: %w", errNoAnswer, err)
	case said[0] != sayAdopted || number(said, 1) <= 1:
		return fmt.Errorf("shim %d said %q", peer.Pid, said)
	}
	p.meet(said)
	// A handle of the process: its number may be given to another when it ends.
	if p.shim, err = os.FindProcess(int(peer.Pid)); err != nil {
		return fmt.Errorf("find shim %d: %w", peer.Pid, err)
	}
	// A child that has just been reaped shows nothing, but the shim will say
	// that it ended, and we never signal its number ourselves.
	if s, ok := statOf(p.pid); ok && (s.start != p.start || s.parent != int(peer.Pid)) {
		_ = p.shim.Release()
		return fmt.Errorf("process %d is not the one that was handed over: started at tick %d by %d, not %d by %d", p.pid, s.start, s.parent, p.start, peer.Pid)
	}
	return p.lifeline.conn.SetReadDeadline(time.Time{})
}

func peerOf(c *net.UnixConn) (*unix.Ucred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred
	var perr error
	if err := raw.Control(func(fd uintptr) {
		peer, perr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	if perr != nil {
		return nil, fmt.Errorf("ask who is there: %w", perr)
	}
	return peer, nil
}

// adoptEnded reads the record. A shim that lives holds the lock of its
// directory until it has written one.
func adoptEnded(record string) (*Process, error) {
	dir, err := os.Open(filepath.Dir(record))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrShimLost, err)
	}
	defer dir.Close()
	lock := unix.Flock(int(dir.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(lock, unix.EWOULDBLOCK) {
		return nil, ErrInCharge
	}
	r, err := readRecord(record)
	if err != nil {
		if lock == nil { // else the file system has no locks, and the shim may live
			bury(record)
		}
		return nil, fmt.Errorf("%w: %w", ErrShimLost, err)
	}
	exit := Exit{Code: r.Code, Signal: syscall.Signal(r.Signal), Late: r.Deadline, Orphaned: r.Orphaned}
	p := &Process{gone: true, exit: exit, done: make(chan struct{})}
	close(p.done)
	return p, nil
}

// bury ends what a shim that was killed has left: the child went with it, but
// not those that had left the child's group.
func bury(record string) {
	if r, err := readRecord(record + unfinished); err == nil && r.Cgroup != "" {
		killCgroup(r.Cgroup)
		removeCgroup(r.Cgroup)
	}
}

// unfinished is the end of the record's name while the child runs. The shim
// writes it early, also because there may be no room on the disk later.
const unfinished = ".new"

// exitRecord is the file that tells how a child ended.
type exitRecord struct {
	Code     int    `json:"code"`
	Signal   int    `json:"signal"`
	Deadline bool   `json:"deadline"`
	Orphaned bool   `json:"orphaned"`
	Cgroup   string `json:"cgroup"`
}

// beginRecord notes what has to be ended if the shim is killed.
func beginRecord(path, cgroup string) error { return writeUnfinished(path, exitRecord{Cgroup: cgroup}) }

// writeRecord replaces path as a whole.
func writeRecord(path string, e Exit) error {
	if err := writeUnfinished(path, exitRecord{Code: e.Code, Signal: int(e.Signal), Deadline: e.Late, Orphaned: e.Orphaned}); err != nil {
		return err
	}
	return os.Rename(path+unfinished, path)
}

// writeUnfinished writes over what is there: its room is ours already.
func writeUnfinished(path string, r exitRecord) error {
	const size = 8 << 10 // more than the longest path
	raw, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	f, err := os.OpenFile(path+unfinished, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	// JSON may end in blanks.
	_, err = f.Write(append(raw, bytes.Repeat([]byte("\n"), max(0, size-len(raw)))...))
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

func readRecord(path string) (exitRecord, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return exitRecord{}, err
	}
	var r exitRecord
	if err := json.Unmarshal(raw, &r); err != nil {
		return exitRecord{}, fmt.Errorf("read record %s: %w", path, err)
	}
	return r, nil
}

// shortPath calls f with a name for path of a few bytes, valid only during the
// call: the address of a socket holds 107, and a run's directory is longer.
func shortPath(path string, f func(short string) error) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return f("/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + filepath.Base(path))
}

func dial(path string) (*lifeline, error) {
	var c *net.UnixConn
	err := shortPath(path, func(short string) error {
		var err error
		c, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: short, Net: "unix"})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", path, err)
	}
	return &lifeline{conn: c}, nil
}

// listen opens a socket at path that only our user may connect to.
func listen(path string) (*net.UnixListener, error) {
	_ = os.Remove(path)
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var merr error
		// The mode of the socket becomes that of the file.
		if err := c.Control(func(fd uintptr) { merr = unix.Fchmod(int(fd), 0o600) }); err != nil {
			return err
		}
		return merr
	}}
	var l net.Listener
	err := shortPath(path, func(short string) error {
		var err error
		l, err = config.Listen(context.Background(), "unix", short)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", path, err)
	}
	u := l.(*net.UnixListener)
	u.SetUnlinkOnClose(false) // it knows the short name alone
	return u, nil
}
