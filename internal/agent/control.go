package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// What `agent drain`, `agent restart` and `agent status` say to the running
// process, one line of JSON each way over a socket that only its user may use.
//
//	{"do":"drain","within_seconds":1800}   → {"state":"takes work","attempts":[...], ...}
//	{"do":"restart"}                         how it stood when it was told
//	{"do":"status"}
//	{"do":"lift","device":"GPU-..."}         take a device out of quarantine

// controlSocket is its name in the data directory.
const controlSocket = "agent.sock"

// Command is what a running agent can be told.
type Command struct {
	Do            string  `json:"do"` // drain, restart, status or lift
	WithinSeconds float64 `json:"within_seconds,omitempty"`
	Device        string  `json:"device,omitempty"` // UUID; of lift
}

// Status is what a running agent answers.
type Status struct {
	Error    string          `json:"error,omitempty"`
	PID      int             `json:"pid"`
	Started  time.Time       `json:"started"` // of the process, a restart in place included
	Agent    string          `json:"agent"`
	State    string          `json:"state"` // taking work, or why not
	Attempts []AttemptStatus `json:"attempts"`
	Devices  []DeviceStatus  `json:"devices"`
}

// AttemptStatus is one attempt of a running agent.
type AttemptStatus struct {
	Job     string    `json:"job"`
	Attempt int       `json:"attempt"`
	Since   time.Time `json:"since"` // when this process took it
}

// ErrNoAgent says that no agent runs on this data directory.
var ErrNoAgent = errors.New("no agent runs on this data directory")

// Tell sends c to the agent that runs on dataDir.
func Tell(ctx context.Context, dataDir string, c Command) (Status, error) {
	var s Status
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(dataDir, controlSocket))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return s, fmt.Errorf("%w: %s", ErrNoAgent, dataDir)
	}
	if err != nil {
		return s, fmt.Errorf("reach the agent: %w", err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := json.NewEncoder(conn).Encode(c); err != nil {
		return s, fmt.Errorf("tell the agent: %w", err)
	}
	if err := json.NewDecoder(conn).Decode(&s); err != nil {
		return s, fmt.Errorf("hear the agent: %w", err)
	}
	if s.Error != "" {
		return s, errors.New(s.Error)
	}
	return s, nil
}

// Control serves Tell until ctx ends.
func (a *Agent) Control(ctx context.Context, dataDir string) error {
	path := filepath.Join(dataDir, controlSocket)
	// The data directory is locked by this process: a socket that is there is
	// one that an earlier process left.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove an old control socket: %w", err)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("open the control socket: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return fmt.Errorf("close the control socket to others: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("serve the control socket: %w", err)
		}
		wg.Go(func() { a.answer(conn) })
	}
}

func (a *Agent) answer(conn net.Conn) {
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return
	}
	line, err := bufio.NewReader(conn).ReadBytes('\n')
	if err != nil {
		return
	}
	var c Command
	if err := json.Unmarshal(line, &c); err != nil {
		return
	}
	s := a.status()
	switch c.Do {
	case "status":
	case "drain":
		if c.WithinSeconds < 0 {
			s.Error = "the time to drain within is negative"
			break
		}
		a.Drain(time.Duration(c.WithinSeconds * float64(time.Second)))
	case "restart":
		a.Restart()
	case "lift":
		if err := a.lift(c.Device); err != nil {
			s.Error = err.Error()
			break
		}
		s.Devices = a.Devices()
	default:
		s.Error = fmt.Sprintf("this agent does not know %q: it may be older than the command", c.Do)
	}
	_ = json.NewEncoder(conn).Encode(s) // whoever asked may have gone
}

func (a *Agent) status() Status {
	s := Status{PID: os.Getpid(), Started: a.started, Agent: a.Self.ID, State: "takes work", Attempts: []AttemptStatus{}, Devices: a.Devices()}
	if err := a.Ready(); err != nil {
		s.State = err.Error()
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for ref, h := range a.running {
		s.Attempts = append(s.Attempts, AttemptStatus{Job: string(ref.Job), Attempt: ref.Attempt, Since: h.started.UTC()})
	}
	return s
}

// Lock makes sure that one process alone runs on a data directory; it ends with
// the process.
func Lock(dataDir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dataDir, "agent.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock of %s: %w", dataDir, err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("another agent runs on %s: stop it, or give this one a data directory of its own (DATA_DIR)", dataDir)
		}
		return nil, fmt.Errorf("lock %s: %w", dataDir, err)
	}
	return f, nil
}
