package gpu_test

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"lorayard/internal/gpu"
)

// notes are what was logged, of several goroutines.
type notes struct {
	mu   sync.Mutex
	text strings.Builder
}

func (n *notes) Write(p []byte) (int, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.text.Write(p)
}

func (n *notes) String() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.text.String()
}

// source is a driver by script.
type source struct {
	mu         sync.Mutex
	uuids      []string
	read       func(gpu.Tier, []gpu.Reading) error
	generation int
	reads      map[gpu.Tier]int
	events     int
}

func (s *source) Devices(context.Context) ([]gpu.Device, error) { return nil, nil }
func (s *source) Versions() (driver, cuda string)               { return "580", "13.0" }
func (s *source) Generation() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.generation
}

// change changes the script while the driver is read.
func (s *source) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

func (s *source) Read(_ context.Context, t gpu.Tier, dst []gpu.Reading) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reads[t]++
	for i := range dst {
		dst[i].MemoryUsed, dst[i].Energy = 0, float64(s.reads[gpu.Hot])
	}
	if s.read == nil {
		return nil
	}
	return s.read(t, dst)
}

func (s *source) Details(context.Context, []string) ([]gpu.Detail, error) { return nil, nil }

func (s *source) Events(ctx context.Context, heard func(gpu.Fault)) error {
	s.events++
	heard(gpu.Fault{UUID: s.uuids[0], XID: 79, Origin: gpu.FromEvent})
	return errors.New("the set is gone")
}

func TestPoller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var said notes
		log := slog.New(slog.NewTextHandler(&said, nil))
		devices := gpu.Pretend(2, "H100-80GB", "host")
		s := &source{uuids: []string{devices[0].UUID, devices[1].UUID}, reads: map[gpu.Tier]int{}, generation: 1}
		health, err := gpu.OpenHealth(gpu.HealthConfig{Devices: devices, Ledger: gpu.NewLedger(devices), Log: log})
		if err != nil {
			t.Fatal(err)
		}
		polls := map[gpu.Tier]int{}
		p := &gpu.Poller{Source: s, Health: health, Log: log, Polled: func(t gpu.Tier, _ time.Duration, err error) {
			if err == nil {
				polls[t]++
			}
		}}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			p.Run(ctx, devices)
			close(ended)
		}()
		time.Sleep(30*time.Second + 500*time.Millisecond)
		synctest.Wait()
		if polls[gpu.Hot] != 31 || polls[gpu.Warm] != 3 || s.events != 3 {
			t.Errorf("in half a minute: %v polls, events asked for %d times", polls, s.events)
		}
		if v := health.Verdict(s.uuids[0]); v.State != gpu.StateMissing {
			t.Errorf("after an event: %+v", v)
		}
		if n := strings.Count(said.String(), "no events"); n != 1 {
			t.Errorf("said %d times that there are no events", n)
		}

		// A driver that is loaded anew counts from nothing; what operators see does not.
		before := p.Snapshot().Devices[1].Energy
		s.change(func() { s.reads[gpu.Hot], s.generation = 0, 2 })
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if now := p.Snapshot(); now.Devices[1].Energy != before+2 || now.Generation != 2 || now.Driver != "580" || !math.IsNaN(now.Devices[1].Power) {
			t.Errorf("from %v to %+v", before, now)
		}

		// A call that hangs leaves the last readings, and is complained about once.
		s.change(func() { s.read = func(gpu.Tier, []gpu.Reading) error { return gpu.ErrWedged } })
		at := p.Snapshot().At
		time.Sleep(20 * time.Second)
		synctest.Wait()
		if !p.Snapshot().At.Equal(at) || strings.Count(said.String(), gpu.ErrWedged.Error()) != 1 {
			t.Errorf("readings of %v, not %v; said:\n%s", p.Snapshot().At, at, said.String())
		}

		// Foreign memory is seen by a poll and forgotten when it is gone.
		s.change(func() {
			s.read = func(_ gpu.Tier, dst []gpu.Reading) error {
				dst[1].MemoryUsed = 9 << 30
				return nil
			}
		})
		time.Sleep(4 * time.Second)
		synctest.Wait()
		if v := health.Verdict(s.uuids[1]); v.State != gpu.StateForeign || !strings.Contains(v.Reason, "9.0 GiB") {
			t.Errorf("%+v", v)
		}
		s.change(func() { s.read = nil })
		time.Sleep(4 * time.Second)
		synctest.Wait()
		if v := health.Verdict(s.uuids[1]); v.State != gpu.StateOK {
			t.Errorf("%+v", v)
		}
		stop()
		<-ended
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
