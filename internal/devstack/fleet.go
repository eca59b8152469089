package devstack

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// FleetConfig says how large a pretended fleet is.
type FleetConfig struct {
	Agents, GPUs int           // GPUs of each agent
	Steps        int           // of a job, about
	StepTime     time.Duration // of one of them
	Data         string        // data file of every job
	Prometheus   string        // directory of its binaries; empty: none
	Rules        string        // directory of the alerts
	Scrape       time.Duration
}

// Fleet is a pretended fleet: real dispatchers and agents, devices that do not
// exist, trainers that train nothing, and faults that somebody plants.
type Fleet struct {
	*Stack
	FleetConfig
	Watch *Prometheus // nil: none

	users, sets []string
	hosts       []*host
}

type host struct {
	id       string
	settings []string
	kernel   string // the pipe that it reads as its kernel's log
	process  *Process
}

// classes alternate from host to host.
var classes = []string{"H100", "A100-80GB"}

// Fleet starts two dispatchers, the agents and Prometheus.
func (s *Stack) Fleet(ctx context.Context, c FleetConfig) (*Fleet, error) {
	f := &Fleet{Stack: s, FleetConfig: c}
	if c.Prometheus != "" {
		var err error
		if f.Watch, err = s.Prometheus(ctx, c.Prometheus, c.Rules, c.Scrape); err != nil {
			return nil, err
		}
	}
	for _, name := range []string{"dispatcher-1", "dispatcher-2"} {
		p, err := s.Dispatcher(ctx, name)
		if err != nil {
			return nil, err
		}
		if err := f.scrape("dispatcher", p); err != nil {
			return nil, err
		}
	}
	for i := range c.Agents {
		h := &host{id: fmt.Sprintf("gpu-host-%d", i+1), kernel: filepath.Join(s.Dir, fmt.Sprintf("kernel-%d", i+1))}
		if err := syscall.Mkfifo(h.kernel, 0o600); err != nil {
			return nil, fmt.Errorf("make a kernel log: %w", err)
		}
		h.settings = []string{
			"PRETEND_GPUS=" + strconv.Itoa(c.GPUs), "PRETEND_CLASS=" + classes[i%len(classes)], "KERNEL_LOG=" + h.kernel, "TRAINER_BACKEND=dry",
			fmt.Sprintf("DRY_STEPS=%d", c.Steps*(4+i)/5), "DRY_STEP_TIME=" + c.StepTime.String(),
		}
		f.hosts = append(f.hosts, h)
		if err := f.start(ctx, h); err != nil {
			return nil, err
		}
	}
	for i := range 3 {
		u, err := s.User(ctx)
		if err != nil {
			return nil, err
		}
		set, err := s.Upload(ctx, u, c.Data, fmt.Sprintf("data of user %d", i+1))
		if err != nil {
			return nil, err
		}
		f.users, f.sets = append(f.users, u), append(f.sets, set)
	}
	return f, nil
}

func (f *Fleet) scrape(kind string, p *Process) error {
	if f.Watch == nil {
		return nil
	}
	return f.Watch.Scrape(kind, p)
}

func (f *Fleet) start(ctx context.Context, h *host) (err error) {
	if h.process, err = f.Agent(ctx, h.id, h.settings...); err != nil {
		return err
	}
	return f.scrape("agent", h.process)
}

// Arrive inserts a job as one of the users: mostly of one GPU, now and then of
// several. It returns the job's id.
func (f *Fleet) Arrive(ctx context.Context) (string, error) {
	who, count := rand.N(len(f.users)), 1
	switch n := rand.N(10); {
	case n == 9:
		count = min(4, f.GPUs)
	case n > 6:
		count = min(2, f.GPUs)
	}
	presets := []string{"fast", "balanced", "quality"}
	return f.Insert(ctx, Job{
		User: f.users[who], Dataset: f.sets[who], Preset: presets[rand.N(len(presets))], Hyperparameters: map[string]any{},
		GPUConfig: map[string]any{"type": classes[rand.N(len(classes))], "count": count},
	})
}

// Fault is one that was planted under a running attempt.
type Fault struct {
	Job     string
	Attempt int
	Agent   string
	Device  string
	XID     int
}

// Plant lets the driver of a host report xid of a device on which an attempt
// trains; nil when none does.
func (f *Fleet) Plant(ctx context.Context, xid int) (*Fault, error) {
	x := &Fault{XID: xid}
	var index int
	err := f.Pool.QueryRow(ctx, `SELECT j.job_id::text, j.attempt, j.agent_id, d.uuid, d.index FROM lorayard.jobs j JOIN lorayard.devices d ON d.uuid = j.devices[1]
		JOIN training_jobs t ON t.id = j.job_id WHERE j.state = 'accepted' AND t.status = 'running' AND d.fault = '' ORDER BY random() LIMIT 1`).Scan(&x.Job, &x.Attempt, &x.Agent, &x.Device, &index)
	if err != nil {
		return nil, nil // nothing trains now
	}
	for _, h := range f.hosts {
		if h.id == x.Agent {
			return x, h.say(fmt.Sprintf("4,1,1,-;NVRM: Xid (PCI:ffff:%02x:00): %d, pid=1, name=python, planted\n", index+1, xid))
		}
	}
	return nil, fmt.Errorf("no host is called %s", x.Agent)
}

// say writes a line into a host's kernel log; an agent that is not there hears
// nothing.
func (h *host) say(line string) error {
	w, err := os.OpenFile(h.kernel, os.O_WRONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.ENXIO) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open the kernel log of %s: %w", h.id, err)
	}
	defer w.Close()
	if _, err := w.WriteString(line); err != nil {
		return fmt.Errorf("write to the kernel log of %s: %w", h.id, err)
	}
	return nil
}

// Repair lets every device be used again that is out of use, as an operator does.
func (f *Fleet) Repair(ctx context.Context) (repaired int, err error) {
	rows, err := f.Pool.Query(ctx, `SELECT agent_id, uuid FROM lorayard.devices WHERE fault <> ''`)
	if err != nil {
		return 0, fmt.Errorf("look for broken devices: %w", err)
	}
	var broken [][2]string
	for rows.Next() {
		var b [2]string
		if err := rows.Scan(&b[0], &b[1]); err != nil {
			return 0, fmt.Errorf("look for broken devices: %w", err)
		}
		broken = append(broken, b)
	}
	for _, b := range broken {
		if _, err := f.Tell(ctx, b[0], "quarantine", "lift", b[1]); err == nil {
			repaired++
		}
	}
	return repaired, rows.Err()
}

// Lose kills an agent as a host that loses power does, and brings it back after
// a while; it returns who it was.
func (f *Fleet) Lose(ctx context.Context, after time.Duration) (string, error) {
	h := f.hosts[rand.N(len(f.hosts))]
	h.process.Kill()
	select {
	case <-ctx.Done():
		return h.id, nil
	case <-time.After(after):
	}
	return h.id, f.start(ctx, h)
}

// EmptyModel places a base model of which there is only the name: enough for
// trainers that train nothing.
func (s *Stack) EmptyModel(name string) error {
	dir := filepath.Join(s.Models(), filepath.FromSlash(name))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("place a model: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte("{}"), 0o644); err != nil {
		return fmt.Errorf("place a model: %w", err)
	}
	return nil
}
