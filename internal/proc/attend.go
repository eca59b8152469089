//go:build linux

package proc

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	shimStartLimit = 30 * time.Second // a shim that has not reported by then never will
	shimKillLimit  = 5 * time.Second  // a shim that has not killed by then is killed itself
)

// startShim starts the shim with the lifeline as the descriptor after the
// extra ones, and waits until it has started the child.
func (p *Process) startShim(c Cmd) (*Process, error) {
	late := boottime() + c.Deadline // before anything that takes time
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open lifeline: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "lifeline of shim")
	defer theirs.Close()
	if p.lifeline, err = newLifeline(fds[0]); err != nil {
		return nil, err
	}
	if c.Log != "" {
		p.cmd.Stdout, p.cmd.Stderr = nil, nil
	}
	// Our writers go with us, and whoever writes into a broken pipe too.
	p.stays = c.Socket != "" && c.Record != "" && p.cmd.Stdout == nil && p.cmd.Stderr == nil
	p.cmd.Path = c.Shim[0]
	p.cmd.Args = append([]string{}, c.Shim...)
	p.cmd.ExtraFiles = append(append([]*os.File{}, c.Extra...), theirs)
	flags := []string{"--lifeline=" + strconv.Itoa(3+len(c.Extra)), "--grace=" + c.Grace.String()}
	if c.Deadline != 0 {
		flags = append(flags, "--deadline="+strconv.FormatInt(int64(late), 10))
	}
	for flag, path := range map[string]string{"log": c.Log, "socket": c.Socket, "exit": c.Record, "orphaned": c.Orphaned} {
		if path == "" {
			continue
		}
		// The shim lives in c.Dir.
		if path, err = filepath.Abs(path); err != nil {
			p.lifeline.close()
			return nil, fmt.Errorf("start %s: %w", c.Path, err)
		}
		flags = append(flags, "--"+flag+"="+path)
	}
	if c.CPUs != "" || c.Memory != "" {
		flags = append(flags, "--cpus="+c.CPUs, "--memory="+c.Memory)
	}
	p.cmd.Args = append(p.cmd.Args, flags...)
	p.cmd.Args = append(append(p.cmd.Args, "--", c.Path), c.Args...)
	if err := p.cmd.Start(); err != nil {
		p.lifeline.close()
		return nil, fmt.Errorf("start shim %s: %w", c.Shim[0], err)
	}
	p.shim = p.cmd.Process
	theirs.Close() // or the end of the shim would not be seen
	if err := p.awaitChild(c.Path); err != nil {
		p.markGone()
		p.lifeline.close()
		p.shim.Kill() // it may be gone already, and is waited for either way
		if werr := p.cmd.Wait(); errors.Is(err, ErrShimLost) && werr != nil {
			err = fmt.Errorf("%w: %w", err, werr)
		}
		return nil, fmt.Errorf("start %s: %w", c.Path, err)
	}
	go p.attend()
	return p, nil
}

// awaitChild reads the first line of the shim's report.
func (p *Process) awaitChild(path string) error {
	if err := p.lifeline.conn.SetReadDeadline(time.Now().Add(shimStartLimit)); err != nil {
		return fmt.Errorf("set deadline of shim: %w", err)
	}
	said, err := p.lifeline.hear()
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrShimLost, err)
	case said[0] == sayLate:
		return ErrLate
	case said[0] == sayRefused:
		return &os.PathError{Op: "exec", Path: path, Err: syscall.Errno(number(said, 1))}
	case said[0] != sayStarted || number(said, 1) <= 1:
		return fmt.Errorf("%w: it said %q", ErrShimLost, said)
	}
	p.meet(said)
	return p.lifeline.conn.SetReadDeadline(time.Time{})
}

// meet notes who the child is.
func (p *Process) meet(said []string) {
	p.pid, p.start = int(number(said, 1)), uint64(number(said, 2))
	if len(said) > 3 {
		p.cgroup = said[3]
	}
	// A handle of somebody who has the number by now would be of no use.
	if fd, err := unix.PidfdOpen(p.pid, 0); err == nil {
		if s, ok := statOf(p.pid); ok && s.start == p.start {
			p.handle = fd
		} else {
			_ = unix.Close(fd)
		}
	}
}

// attend listens to the shim until it has ended, after all that is below it,
// or has taken the child over.
func (p *Process) attend() {
	defer close(p.done)
	var ended bool
	for {
		said, err := p.lifeline.hear()
		if (err == nil && said[0] == sayHanded) || errors.Is(err, net.ErrClosed) {
			p.part()
			return
		}
		if err != nil {
			break
		}
		switch said[0] {
		case sayEnded:
			p.exit, ended = exitFrom(said), true
		case sayCannot:
			select {
			case p.refused <- strings.Join(said[1:], " "):
			default:
			}
		}
	}
	if ended {
		p.markGone()
	} else {
		p.mourn()
	}
	p.lifeline.close()
	if p.cmd != nil {
		p.err = outputError(p.cmd.Wait())
	} else {
		_ = p.shim.Release()
	}
	if !ended {
		awaitGroup(p.pid)
		p.exit = Exit{Code: 128 + int(syscall.SIGKILL), Signal: syscall.SIGKILL}
		p.err = errors.Join(ErrShimLost, p.err)
	}
}

// part leaves the child to the shim, and the shim to itself.
func (p *Process) part() {
	p.markGone()
	p.lifeline.close()
	if p.cmd != nil {
		go func() { _ = p.cmd.Wait() }() // it is our child for as long as we live
	} else {
		_ = p.shim.Release()
	}
	p.err = ErrHandedOver
}

// mourn ends what a shim that was killed has left. The child got SIGKILL from
// the kernel when the shim died, so its number may be somebody else's by now.
func (p *Process) mourn() {
	p.markGone()
	if s, ok := statOf(p.pid); !ok || s.start == p.start {
		_ = syscall.Kill(-p.pid, syscall.SIGKILL)
	}
	if p.cgroup != "" {
		killCgroup(p.cgroup)
		removeCgroup(p.cgroup)
	}
}

func exitFrom(said []string) Exit {
	return Exit{Code: int(number(said, 1)), Signal: syscall.Signal(number(said, 2)), Late: number(said, 3) == 1}
}

// Extend moves the deadline to d from now. One that has passed cannot be
// taken back: the shim is ending the child.
func (p *Process) Extend(d time.Duration) error {
	late := boottime() + d
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.gone {
		return os.ErrProcessDone
	}
	if p.lifeline == nil {
		return errors.New("extend deadline: needs a shim")
	}
	if err := p.lifeline.say(nil, "%s %d", cmdDeadline, int64(late)); err != nil {
		return fmt.Errorf("extend deadline of process %d: %w", p.pid, err)
	}
	return nil
}
