package agent_test

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"lorayard/internal/agent"
	"lorayard/internal/attempt"
	"lorayard/internal/gpu"
	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/store"
)

// ward is a host whose attempts train until they are killed or stopped.
type ward struct {
	t       *testing.T
	devices []gpu.Device
	health  *gpu.Health
	*agent.Agent

	mu         sync.Mutex
	under      map[job.ID]*patient
	faults     map[string]string // as the last renewal told them
	registered []store.Device
	left       []attempt.Left
}

// patient is an attempt, and its trainer.
type patient struct {
	live  *attempt.Live
	check bool
	once  sync.Once
	dead  chan struct{} // closed by Kill
}

func (p *patient) Extend(time.Duration) error { return nil }
func (p *patient) Kill()                      { p.once.Do(func() { close(p.dead) }) }

func (w *ward) Register(_ context.Context, a store.Agent, _ time.Duration, adopt []job.Ref) ([]job.Ref, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.registered = a.Devices
	return adopt, nil
}

func (w *ward) Renew(_ context.Context, _ store.Agent, _ time.Duration, s store.AgentState, refs []job.Ref) (store.Wanted, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.faults = maps.Clone(s.Faults)
	wanted := store.Wanted{Attempts: map[job.Ref]job.Desired{}}
	for _, ref := range refs {
		wanted.Attempts[ref] = job.DesireRun
	}
	return wanted, nil
}

func (w *ward) Accept(_ context.Context, _ store.Agent, ref job.Ref) (job.Assignment, error) {
	return w.assignment(ref), nil
}

// assignment gives job 0 device 0, and so on.
func (w *ward) assignment(ref job.Ref) job.Assignment {
	return job.Assignment{Ref: ref, Devices: []string{w.devices[ref.Job[0]-'0'].UUID}}
}

func (w *ward) Run(ctx context.Context, as job.Assignment, live *attempt.Live) error {
	p := &patient{live: live, check: live.Devices.Check, dead: make(chan struct{})}
	w.mu.Lock()
	w.under[as.Ref.Job] = p
	w.mu.Unlock()
	live.Attach(p)
	if p.check {
		live.Devices.Checked(0, "")
	}
	select {
	case <-ctx.Done():
	case <-p.dead:
	}
	live.Free()
	return nil
}

func (w *ward) Left(context.Context) []attempt.Left { return w.left }
func (w *ward) Resume(ctx context.Context, l attempt.Left, live *attempt.Live) error {
	return w.Run(ctx, l.Assignment, live)
}
func (w *ward) Discard(context.Context, attempt.Left) { w.t.Error("an attempt was given up") }

// patient waits for the attempt at a job.
func (w *ward) patient(id job.ID) *patient {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.under[id]
}

func (w *ward) told() string {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for i, d := range w.devices {
		if f, bad := w.faults[d.UUID]; bad {
			out = append(out, string(rune('0'+i))+" "+f)
		}
	}
	return strings.Join(out, ", ")
}

func admitWard(t *testing.T, dir string, left ...attempt.Left) *ward {
	t.Helper()
	w := &ward{t: t, devices: gpu.Pretend(2, "H100", "host"), under: map[job.ID]*patient{}, left: left}
	for i := range w.devices {
		w.devices[i].Pretend = false
	}
	ledger, log := gpu.NewLedger(w.devices), slog.New(slog.DiscardHandler)
	var err error
	if w.health, err = gpu.OpenHealth(gpu.HealthConfig{Dir: dir, Boot: "boot", Devices: w.devices, Ledger: ledger, Log: log}); err != nil {
		t.Fatal(err)
	}
	w.Agent = agent.New(agent.Parts{
		Self: store.Agent{ID: "host-1", Devices: agent.Offer(w.devices, nil)}, Store: w, Runner: w, Ledger: ledger, Health: w.health, Metrics: metrics.NewAgent("test"), Log: log,
		Config:   agent.Config{Lease: 5 * time.Second, Renew: time.Second, OutOfTouch: time.Hour},
		NewNonce: func() string { return "n" }, Clock: func() time.Duration { return 0 },
	})
	w.Metrics.ReadDevices(w.Readings) // as the agent's main does: what a change makes due reads all of them
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Agent.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	synctest.Wait()
	return w
}

func (w *ward) accept(id job.ID) error {
	return w.Agent.Accept(w.t.Context(), job.Task{Ref: job.Ref{Job: id, Attempt: 1}, Devices: []string{w.devices[id[0]-'0'].UUID}})
}

func TestABrokenDeviceEndsItsAttemptAndNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := admitWard(t, t.TempDir())
		for _, id := range []job.ID{"0", "1"} {
			if err := w.accept(id); err != nil {
				t.Fatal(err)
			}
		}
		broken, other := w.patient("0"), w.patient("1")
		if !broken.check || !other.check {
			t.Error("the first attempts were not checked")
		}
		w.health.Fault(gpu.Fault{UUID: w.devices[0].UUID, XID: 119, Origin: gpu.FromEvent})
		select {
		case <-broken.dead: // by the time that Fault returns
		default:
			t.Error("its trainer lives on")
		}
		if f := broken.live.Fault(); f == nil || f.Device != "GPU 0 of host-1" || !strings.Contains(f.Reason, "XID 119") {
			t.Errorf("it is told: %v", f)
		}
		select {
		case <-other.dead:
			t.Error("the other one's is dead as well")
		default:
		}
		// It is told at once, not at the next renewal.
		if got := w.told(); !strings.HasPrefix(got, "0 XID 119") || strings.Contains(got, "1 ") && !strings.Contains(got, "reset") {
			t.Errorf("the dispatcher is told %q", got)
		}
		if err := w.accept("0"); err == nil {
			t.Error("it was lent again")
		}
		for _, d := range w.Devices() {
			if want := map[int]string{0: "quarantined", 1: "ok"}[d.Index]; d.State != want {
				t.Errorf("device %d is %s, want %s", d.Index, d.State, want)
			}
		}
		if err := w.health.Lift(w.devices[0].UUID); err != nil {
			t.Fatal(err)
		}
		if got := w.told(); got != "" {
			t.Errorf("after the lift it is told %q", got)
		}
		if err := w.accept("0"); err != nil {
			t.Fatal(err)
		}
		if p := w.patient("0"); !p.check || p.live.Fault() != nil || w.health.NeedsCheck([]string{w.devices[0].UUID}) {
			t.Error("the next attempt was not checked")
		}
	})
}

func TestAFaultBetweenTwoProcessesIsNotLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		devices := gpu.Pretend(2, "H100", "host")
		h, err := gpu.OpenHealth(gpu.HealthConfig{Dir: dir, Boot: "boot", Devices: devices, Ledger: gpu.NewLedger(devices), Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		lost := 0
		h.Listen(func(gpu.Verdict) { lost++ }, nil, nil)
		u, v := devices[0].UUID, devices[1].UUID
		h.Lent([]string{u}, "0")
		h.Lent([]string{v}, "1")
		h.Fault(gpu.Fault{UUID: u, XID: 79, Origin: gpu.FromKernel})
		h.Facts(v, gpu.Facts{RemapPending: true}) // whoever is on it may end
		if lost != 1 {
			t.Errorf("%d were lost", lost)
		}
		// The process ends here, before it could do anything about it.
		ref := func(id job.ID) job.Ref { return job.Ref{Job: id, Attempt: 1, Nonce: "n"} }
		w := admitWard(t, dir, attempt.Left{Assignment: job.Assignment{Ref: ref("0"), Devices: []string{u}}}, attempt.Left{Assignment: job.Assignment{Ref: ref("1"), Devices: []string{v}}})
		broken, ends := w.patient("0"), w.patient("1")
		<-broken.dead
		select {
		case <-ends.dead:
			t.Error("an attempt that may end was killed")
		default:
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		for i, d := range w.registered {
			if d.Fault == "" {
				t.Errorf("device %d was registered as fit", i)
			}
		}
	})
}

func TestTrainersThatBlameADeviceAreHeard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := admitWard(t, t.TempDir())
		if err := w.accept("0"); err != nil {
			t.Fatal(err)
		}
		p := w.patient("0")
		p.live.Devices.Doubt("CUDA error: an illegal memory access")
		if v := w.health.Verdict(w.devices[0].UUID); v.State != gpu.StateSuspect || !v.Check {
			t.Errorf("%+v", v)
		}
		p.live.Devices.Checked(0, "3 of 32 matrix products were wrong")
		if got := w.told(); !strings.Contains(got, "sanity check: 3 of 32") {
			t.Errorf("the dispatcher is told %q", got)
		}
	})
}

// A device that is found unable to run anything is not taken, and is free for
// the next attempt.
func TestDevicesAreLookedAtBeforeAnAttemptIsAccepted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := admitWard(t, t.TempDir())
		var looked [][]string
		wrong := errors.New("its compute mode is prohibited")
		w.Preflight = func(_ context.Context, uuids []string) error {
			looked = append(looked, uuids)
			return wrong
		}
		if err := w.accept("0"); !errors.Is(err, wrong) || w.patient("0") != nil {
			t.Errorf("accepted: %v", err)
		}
		wrong = nil
		if err := w.accept("0"); err != nil || w.patient("0") == nil {
			t.Errorf("not accepted: %v", err)
		}
		if len(looked) != 2 || len(looked[0]) != 1 || looked[0][0] != w.devices[0].UUID {
			t.Errorf("looked at %v", looked)
		}
		w.health.Unfit(w.devices[1].UUID, "its MIG mode changes")
		if d := w.Devices()[1]; w.told() != "1 its MIG mode changes" || d.State != string(gpu.StateQuarantined) || d.Reason != "its MIG mode changes" {
			t.Errorf("the dispatcher is told %q, people %+v", w.told(), d)
		}
		if r := w.Readings()[1]; r.Health != string(gpu.StateQuarantined) {
			t.Errorf("metrics say %s", r.Health)
		}
		w.health.Unfit(w.devices[1].UUID, "")
		if w.told() != "" {
			t.Errorf("the dispatcher is told %q", w.told())
		}
	})
}
