// Package services runs throw-away servers for the tests and for the dev
// stack: a Postgres cluster and a Redis that listen on 127.0.0.1 alone, with
// generated passwords, in a directory of their own. It knows what nobody else
// should have to: where Debian hides initdb, that postgres refuses to run as
// root, and how a child is made to die with its parent. It never starts, stops
// or configures a service of the system. Linux only, and never linked into a
// shipped binary.
package services

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// ErrMissing is wrapped by errors that mean: a program is not installed. The
// message says how to install it.
var ErrMissing = errors.New("not installed")

// startTimeout bounds a start whose context has no deadline of its own.
const startTimeout = 60 * time.Second

// stopTimeout is how long a server may take to leave after it was asked.
const stopTimeout = 20 * time.Second

// pollEvery is the pause between two looks at something that has no event.
const pollEvery = 20 * time.Millisecond

// FreePort returns a port on 127.0.0.1 that nobody listens on at this moment.
// It stays below the range from which the kernel takes ports for outgoing
// connections, so that a server can be stopped and find its port free again.
func FreePort() (int, error) {
	const low, high = 20000, 32000
	var last error
	for range 100 {
		n, err := rand.Int(rand.Reader, big.NewInt(high-low))
		if err != nil {
			return 0, fmt.Errorf("choosing a port: %w", err)
		}
		port := low + int(n.Int64())
		l, err := net.Listen("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			last = err
			continue
		}
		return port, l.Close()
	}
	return 0, fmt.Errorf("choosing a port between %d and %d: %w", low, high, last)
}

// secret returns 32 hexadecimal digits from the system's random source.
func secret() string {
	var b [16]byte
	rand.Read(b[:]) // never fails: the runtime ends the process instead
	return hex.EncodeToString(b[:])
}

// child is a server that we started. It leads its own process group, so that
// Ctrl-C in a terminal does not end the database before its clients.
type child struct {
	name string
	pid  int
	done chan struct{} // closed when the process was reaped
	err  error         // how it ended; read after done
}

// spawn starts cmd and keeps a thread for it. The kernel sends the parent death
// signal when the *thread* that started the child ends, so that thread is held
// until the child is gone.
func spawn(cmd *exec.Cmd, parentDied syscall.Signal) (*child, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	cmd.SysProcAttr.Pdeathsig = parentDied
	c := &child{name: cmd.Path, done: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := cmd.Start()
		if err == nil {
			c.pid = cmd.Process.Pid
		}
		started <- err
		if err != nil {
			return
		}
		c.err = cmd.Wait()
		close(c.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", cmd.Path, err)
	}
	return c, nil
}

// id is the process's number, 0 when none runs.
func (c *child) id() int {
	if !c.running() {
		return 0
	}
	return c.pid
}

// running reports whether the process has not been reaped yet.
func (c *child) running() bool {
	if c == nil {
		return false
	}
	select {
	case <-c.done:
		return false
	default:
		return true
	}
}

// within is ctx, cancelled also when the process is gone: a question to a dead
// server may be answered by a stranger who will never say anything.
func (c *child) within(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer cancel()
		select {
		case <-c.done:
		case <-ctx.Done():
		}
	}()
	return ctx, cancel
}

// end sends the signals in turn, each with stopTimeout to take effect, and
// SIGKILL at last. It returns when the process is reaped.
func (c *child) end(signals ...syscall.Signal) error {
	if !c.running() {
		return nil
	}
	for _, sig := range append(signals, syscall.SIGKILL) {
		if err := syscall.Kill(c.pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("sending %s to %s: %w", sig, c.name, err)
		}
		late := time.NewTimer(stopTimeout)
		select {
		case <-c.done:
			late.Stop()
			return nil
		case <-late.C:
		}
	}
	return fmt.Errorf("ending %s: process %d does not react to SIGKILL", c.name, c.pid)
}

// tail returns the end of a log file in one line for an error message.
func tail(path string) string {
	const most = 1500
	f, err := os.Open(path)
	if err != nil {
		return "no log"
	}
	defer f.Close()
	if st, err := f.Stat(); err == nil && st.Size() > most {
		if _, err := f.Seek(-most, io.SeekEnd); err != nil {
			return "no log"
		}
	}
	b, err := io.ReadAll(io.LimitReader(f, most))
	if err != nil || len(b) == 0 {
		return "the log is empty"
	}
	return strings.Join(strings.Split(strings.TrimSpace(string(b)), "\n"), " | ")
}

// environment is what a server gets to see of ours: nothing but the means to
// find programs.
func environment(home string) []string {
	return []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home, "LC_ALL=C.UTF-8", "TZ=UTC"}
}
