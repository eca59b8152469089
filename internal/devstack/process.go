package devstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// Process is one of our binaries, running. Its log goes to <dir>/<name>.log.
type Process struct {
	Name   string
	Log    string // path
	ops    string // base URL of its ops port
	health string // path that answers once it is up
	cmd    *exec.Cmd
	done   chan struct{}
	err    error
}

func (s *Stack) process(ctx context.Context, name, bin string, args, env []string, ops int) (*Process, error) {
	p := &Process{Name: name, Log: filepath.Join(s.Dir, name+".log"), ops: fmt.Sprintf("http://127.0.0.1:%d", ops), health: "/healthz", done: make(chan struct{})}
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the log of %s: %w", name, err)
	}
	p.cmd = exec.Command(bin, args...)
	p.cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.Dir, "LANG=C.UTF-8"}, env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	// A group of its own: Ctrl-C is for whoever runs the stack, who then ends
	// the parts in order. And no part outlives the stack.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	started := make(chan error, 1)
	go func() {
		// The kernel sends Pdeathsig when the thread that forked ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer log.Close()
		defer close(p.done)
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.err = p.cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	s.procs = append(s.procs, p)
	if filepath.Base(bin) == "prometheus" {
		p.health = "/-/ready"
	}
	if err := p.healthy(ctx); err != nil {
		return nil, err
	}
	return p, nil
}

// healthy waits until the ops port answers.
func (p *Process) healthy(ctx context.Context) error {
	for {
		resp, err := http.Get(p.ops + p.health)
		if err == nil {
			resp.Body.Close()
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", p.Name, context.Cause(ctx))
		case <-p.done:
			return fmt.Errorf("%s ended: %w; its log is %s", p.Name, p.err, p.Log)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Metrics reads /metrics.
func (p *Process) Metrics() (string, error) {
	resp, err := http.Get(p.ops + "/metrics")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	return string(raw), err
}

// OpsURL is the address of the process's ops port.
func (p *Process) OpsURL() string { return p.ops }

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Signal sends sig to the process alone.
func (p *Process) Signal(sig syscall.Signal) error { return p.cmd.Process.Signal(sig) }

// Kill is kill -9, waited for.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// Stop asks the process to leave and waits; after patience it is killed, which
// is an error.
func (p *Process) Stop(patience time.Duration) error {
	select {
	case <-p.done:
		return nil
	default:
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(patience):
		p.Kill()
		return errors.New(p.Name + " did not leave and was killed; its log is " + p.Log)
	}
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// run runs a verb of one of our binaries to its end.
func run(ctx context.Context, bin string, args []string, env ...string) (string, error) {
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "LANG=C.UTF-8"}, env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w: %s", filepath.Base(bin), args[0], err, out)
	}
	return string(out), nil
}
