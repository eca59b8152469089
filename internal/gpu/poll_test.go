package gpu_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"lorayard/internal/gpu"
)

// script is a driver that answers what a test has set.
type script struct {
	mu         sync.Mutex
	readings   []gpu.Reading
	details    map[string]gpu.Detail
	err        error
	generation int
	reads      map[gpu.Tier]int
	events     chan gpu.Fault
	listens    int
}

func (s *script) Devices(context.Context) ([]gpu.Device, error) { return nil, nil }

func (s *script) Versions() (driver, cuda string) { return "580", "13.0" }

func (s *script) Read(_ context.Context, t gpu.Tier, dst []gpu.Reading) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reads[t]++
	if errors.Is(s.err, gpu.ErrWedged) {
		return s.err
	}
	copy(dst, s.readings)
	return s.err
}

func (s *script) Details(_ context.Context, uuids []string) ([]gpu.Detail, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reads[gpu.Cold]++
	var out []gpu.Detail
	for _, u := range uuids {
		if d, ok := s.details[u]; ok {
			out = append(out, d)
		}
	}
	return out, s.err
}

func (s *script) Generation() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.generation
}

func (s *script) Events(ctx context.Context, heard func(gpu.Fault)) error {
	s.mu.Lock()
	s.listens++
	s.mu.Unlock()
	for {
		select {
		case f, more := <-s.events:
			if !more {
				return errors.New("no more events")
			}
			heard(f)
		case <-ctx.Done():
			return nil
		}
	}
}

func (s *script) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// polled runs f beside a poller over three devices, of which the last could not
// be read at the start, in virtual time.
func polled(t *testing.T, f func(t *testing.T, s *script, p *gpu.Poller, h *gpu.Health, l *gpu.Ledger, failures map[gpu.Tier]int)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		devices := gpu.Pretend(3, "H100", "host")
		devices[2].Fault = "the driver gives no handle"
		log := slog.New(slog.NewTextHandler(io.Discard, nil))
		ledger := gpu.NewLedger(devices)
		h, err := gpu.OpenHealth(gpu.HealthConfig{Devices: devices, Ledger: ledger, Log: log})
		if err != nil {
			t.Fatal(err)
		}
		s := &script{reads: map[gpu.Tier]int{}, events: make(chan gpu.Fault), generation: 1, details: map[string]gpu.Detail{}}
		for _, d := range devices {
			s.readings = append(s.readings, gpu.BlankReading(d.UUID))
			s.details[d.UUID] = gpu.Detail{UUID: d.UUID}
		}
		failures := map[gpu.Tier]int{}
		p := &gpu.Poller{Source: s, Health: h, Log: log, Polled: func(tier gpu.Tier, _ time.Duration, err error) {
			if err != nil {
				failures[tier]++
			}
		}}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			p.Run(ctx, devices)
		}()
		synctest.Wait()
		f(t, s, p, h, ledger, failures)
		stop()
		<-ended
	})
}

func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestTiersAreReadAsOftenAsTheyAreWorth(t *testing.T) {
	polled(t, func(t *testing.T, s *script, _ *gpu.Poller, _ *gpu.Health, _ *gpu.Ledger, _ map[gpu.Tier]int) {
		pass(60500 * time.Millisecond)
		if want := map[gpu.Tier]int{gpu.Hot: 61, gpu.Warm: 5, gpu.Cold: 2}; !maps.Equal(s.reads, want) {
			t.Errorf("%v, not %v", s.reads, want)
		}
	})
}

func TestADriverThatHangsTakesDevicesOutOfUseAndGivesThemBack(t *testing.T) {
	polled(t, func(t *testing.T, s *script, p *gpu.Poller, _ *gpu.Health, l *gpu.Ledger, failures map[gpu.Tier]int) {
		if n := len(l.Free()); n != 2 {
			t.Fatalf("%d devices are free", n)
		}
		s.set(func() { s.err = gpu.ErrWedged })
		pass(1500 * time.Millisecond)
		before := p.Snapshot()
		if n := len(l.Free()); n != 0 {
			t.Errorf("%d devices are lent though nobody sees them", n)
		}
		pass(20 * time.Second)
		if p.Snapshot() != before || failures[gpu.Hot] != 21 || failures[gpu.Warm] != 0 {
			t.Errorf("what is asked of it: %v", failures)
		}
		s.set(func() { s.err = nil })
		pass(time.Second)
		if free := l.Free(); len(free) != 2 || !strings.Contains(slices.Collect(maps.Values(l.Faults()))[0], "no handle") {
			t.Errorf("%v are free, %v", free, l.Faults())
		}
	})
}

func TestCountersClimbOverAReloadOfTheDriver(t *testing.T) {
	polled(t, func(t *testing.T, s *script, p *gpu.Poller, _ *gpu.Health, _ *gpu.Ledger, _ map[gpu.Tier]int) {
		energy := func(v float64) float64 {
			s.set(func() { s.readings[0].Energy = v })
			pass(time.Second)
			return p.Snapshot().Devices[0].Energy
		}
		if v := energy(100); v != 100 {
			t.Error(v)
		}
		s.set(func() { s.generation++ })
		if v := energy(7); v != 107 {
			t.Error(v)
		}
		if v := energy(8); v != 108 {
			t.Error(v)
		}
		if v := p.Snapshot().Devices[0].Throttled[1]; v != 0 {
			t.Error(v)
		}
		s.set(func() { s.readings[0].Reasons = 8 })
		pass(5 * time.Second)
		if v := p.Snapshot().Devices[0].Throttled[1]; v != 5 {
			t.Errorf("slowed down for %v s", v)
		}
	})
}

func TestWhatKeepsAJobFromRunningIsSeenBeforeItBegins(t *testing.T) {
	polled(t, func(t *testing.T, s *script, p *gpu.Poller, _ *gpu.Health, l *gpu.Ledger, _ map[gpu.Tier]int) {
		a, b := s.readings[0].UUID, s.readings[1].UUID
		if err := p.Preflight(t.Context(), []string{a, b}); err != nil {
			t.Error(err)
		}
		s.set(func() { s.details[a] = gpu.Detail{UUID: a, ComputeMode: new(2)} })
		var no *gpu.UnavailableError
		if err := p.Preflight(t.Context(), []string{a, b}); !errors.As(err, &no) || no.Reasons[a] == "" || no.Reasons[b] != "" {
			t.Error(err)
		}
		pass(time.Second) // what a look finds is told at once
		if free := l.Free(); len(free) != 1 || free[0].UUID != b {
			t.Errorf("free: %v", free)
		}
		s.set(func() {
			s.details[a] = gpu.Detail{UUID: a, Fabric: &gpu.Fabric{}}
		})
		pass(5 * time.Second) // and looked for soon
		if free := l.Free(); len(free) != 2 {
			t.Errorf("free: %v", free)
		}
		if err := p.Preflight(t.Context(), []string{a}); err != nil {
			t.Errorf("one device needs no fabric: %v", err)
		}
		if err := p.Preflight(t.Context(), []string{a, b}); !errors.As(err, &no) || len(no.Reasons) != 2 {
			t.Error(err)
		}
		s.set(func() { s.err = errors.New("busy") })
		if err := p.Preflight(t.Context(), []string{a, b}); err != nil {
			t.Errorf("a look that fails keeps a job from running: %v", err)
		}
	})
}

func TestEventsReachTheJudge(t *testing.T) {
	polled(t, func(t *testing.T, s *script, _ *gpu.Poller, h *gpu.Health, _ *gpu.Ledger, _ map[gpu.Tier]int) {
		a := s.readings[0].UUID
		s.events <- gpu.Fault{UUID: a, XID: 79, Origin: gpu.FromEvent}
		synctest.Wait()
		if v := h.Verdict(a); v.State != gpu.StateMissing {
			t.Errorf("%+v", v)
		}
		pass(10 * time.Second)
		old := s.events
		s.set(func() { s.events = make(chan gpu.Fault) })
		close(old) // the driver was loaded anew
		pass(15500 * time.Millisecond)
		s.events <- gpu.Fault{UUID: s.readings[1].UUID, XID: 79, Origin: gpu.FromEvent}
		synctest.Wait()
		if v := h.Verdict(s.readings[1].UUID); v.State != gpu.StateMissing || s.listens != 2 {
			t.Errorf("%+v, listened %d times", v, s.listens)
		}
	})
}

func TestALostDeviceIsSeenByThePollAlone(t *testing.T) {
	polled(t, func(t *testing.T, s *script, _ *gpu.Poller, h *gpu.Health, l *gpu.Ledger, _ map[gpu.Tier]int) {
		s.set(func() { s.readings[1].Lost, s.err = true, errors.New("lost") })
		pass(time.Second)
		if v := h.Verdict(s.readings[1].UUID); v.State != gpu.StateMissing || len(l.Free()) != 1 {
			t.Errorf("%+v, free %v", v, l.Free())
		}
	})
}

func TestForeignMemoryIsSeenAndForgotten(t *testing.T) {
	polled(t, func(t *testing.T, s *script, _ *gpu.Poller, h *gpu.Health, _ *gpu.Ledger, _ map[gpu.Tier]int) {
		uuid := s.readings[1].UUID
		s.set(func() { s.readings[1].MemoryUsed = 9 << 30 })
		pass(4 * time.Second)
		if v := h.Verdict(uuid); v.State != gpu.StateForeign || !strings.Contains(v.Reason, "9.0 GiB") {
			t.Errorf("%+v", v)
		}
		s.set(func() { s.readings[1].MemoryUsed = 0 })
		pass(4 * time.Second)
		if v := h.Verdict(uuid); v.State != gpu.StateOK {
			t.Errorf("%+v", v)
		}
	})
}

// A device that was reset is told from one that only the library's reopening
// touched: its own quarantine ends, that of the others does not.
func TestADeviceThatReturnsIsANewOneAlone(t *testing.T) {
	was, is := gpu.BlankReading("GPU-1"), gpu.BlankReading("GPU-1")
	is.Returned = 1
	if a, b := was.Facts(3), is.Facts(3); a.Generation != 3 || b.Generation != 4 {
		t.Errorf("generations %d and %d", a.Generation, b.Generation)
	}
}
