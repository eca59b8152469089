//go:build linux

package proc

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The lifeline carries lines, a verb and numbers. An agent may adopt the child
// of an older or newer shim, so both sides skip verbs that they do not know and
// fields beyond those that they do.
const (
	// From the agent.
	cmdSignal   = "signal"   // number
	cmdDeadline = "deadline" // nanoseconds of CLOCK_BOOTTIME, absolute; 0 takes it away
	cmdHandOver = "handover" // nanoseconds from now, with the descriptors to keep

	// From the shim: first one of started, refused, late and adopted, at the
	// end handed or ended.
	sayStarted = "started" // pid, start time, cgroup
	sayRefused = "refused" // errno of fork or exec
	sayLate    = "late"    // the deadline had passed: nothing was started
	sayAdopted = "adopted" // as started, with the kept descriptors
	sayHanded  = "handed"  // the socket is there; the rest is for whoever adopts
	sayCannot  = "cannot"  // no socket: the agent stays in charge
	sayEnded   = "ended"   // exit code, signal or 0, 1 when the deadline did it
)

const (
	longestSay = 4 << 10         // bytes of a line; a cgroup's path is the longest part
	mostFiles  = 16              // descriptors in one message
	sayLimit   = 2 * time.Second // the other side is stopped, and its buffer is full
)

// lifeline is one end of the socket between agent and shim.
type lifeline struct {
	conn  *net.UnixConn
	rest  []byte
	files []*os.File // received, and not yet given out
}

// newLifeline takes the socket over from fd.
func newLifeline(fd int) (*lifeline, error) {
	f := os.NewFile(uintptr(fd), "lifeline")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("open lifeline: %w", err)
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("open lifeline: descriptor %d is a %s", fd, c.LocalAddr().Network())
	}
	return &lifeline{conn: u}, nil
}

// say sends a line, with copies of files.
func (l *lifeline) say(files []*os.File, format string, args ...any) error {
	var fds []int
	for _, f := range files {
		// Fd would make the pipe blocking, for everybody who has it open.
		c, err := f.SyscallConn()
		if err != nil {
			return fmt.Errorf("hand over %s: %w", f.Name(), err)
		}
		if err := c.Control(func(fd uintptr) { fds = append(fds, int(fd)) }); err != nil {
			return fmt.Errorf("hand over %s: %w", f.Name(), err)
		}
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	if err := l.conn.SetWriteDeadline(time.Now().Add(sayLimit)); err != nil {
		return err
	}
	_, _, err := l.conn.WriteMsgUnix(fmt.Appendf(nil, format+"\n", args...), rights, nil)
	return err
}

// hear waits for a line and cuts it into fields. Files that came before it, or
// with it, are in l.files.
func (l *lifeline) hear() ([]string, error) {
	for {
		if line, rest, ok := bytes.Cut(l.rest, []byte("\n")); ok {
			l.rest = rest
			if fields := strings.Fields(string(line)); len(fields) > 0 {
				return fields, nil
			}
			continue
		}
		if len(l.rest) > longestSay {
			return nil, errors.New("lifeline: a line has no end")
		}
		buf, oob := make([]byte, longestSay), make([]byte, unix.CmsgSpace(4*mostFiles))
		n, oobn, _, _, err := l.conn.ReadMsgUnix(buf, oob)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return nil, io.EOF
		}
		l.rest = append(l.rest, buf[:n]...)
		l.files = append(l.files, filesIn(oob[:oobn])...)
	}
}

// filesIn makes files of the descriptors in a control message.
func filesIn(oob []byte) []*os.File {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			// So that a read of it can be given up; it is a pipe or a socket.
			_ = unix.SetNonblock(fd, true)
			files = append(files, os.NewFile(uintptr(fd), "kept"))
		}
	}
	return files
}

// take gives out what was received.
func (l *lifeline) take() []*os.File {
	files := l.files
	l.files = nil
	return files
}

// close ends the lifeline; a hear in progress returns.
func (l *lifeline) close() {
	_ = l.conn.Close()
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// number is field i as a number, 0 when it is not there or none.
func number(fields []string, i int) int64 {
	if i >= len(fields) {
		return 0
	}
	n, _ := strconv.ParseInt(fields[i], 10, 64)
	return n
}
