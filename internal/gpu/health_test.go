package gpu_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"lorayard/internal/gpu"
)

// ward is a Health over two pretended devices.
type ward struct {
	*gpu.Health
	ledger  *gpu.Ledger
	devices []gpu.Device
	log     *lockedBuffer
	lost    chan gpu.Verdict
	changed chan gpu.Change
	counted chan gpu.Fault
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) count(words string) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.Count(b.b.String(), words)
}

func open(t *testing.T, dir, boot string) *ward {
	t.Helper()
	w := &ward{devices: gpu.Pretend(2, "H100", "host"), log: &lockedBuffer{}, lost: make(chan gpu.Verdict, 100), changed: make(chan gpu.Change, 1000), counted: make(chan gpu.Fault, 100_000)}
	w.ledger = gpu.NewLedger(w.devices)
	var err error
	w.Health, err = gpu.OpenHealth(gpu.HealthConfig{
		Dir: dir, Boot: boot, Devices: w.devices, Ledger: w.ledger, Log: slog.New(slog.NewTextHandler(w.log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	w.Listen(func(v gpu.Verdict) { w.lost <- v }, func(c gpu.Change) { w.changed <- c }, func(f gpu.Fault, _ gpu.XID) { w.counted <- f })
	return w
}

func (w *ward) free() string {
	var out []string
	for _, d := range w.ledger.Free() {
		out = append(out, fmt.Sprint(d.Index))
	}
	return strings.Join(out, ",")
}

func TestAFaultInTheKernelLogTakesOneDeviceOut(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "kmsg")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	w := open(t, dir, "boot-1")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { w.Run(ctx, pipe); close(done) }()
	w.Lent([]string{w.devices[0].UUID}, "job")
	f, err := os.OpenFile(pipe, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(f, "NVRM: Xid (PCI:0000:99:00): 79, of another GPU\nNVRM: Xid (PCI:0000:99:00): 79, of another GPU\nNVRM: Xid (PCI:%s): 119, Timeout\n", w.devices[0].Bus)
	if v := <-w.lost; v.UUID != w.devices[0].UUID || v.XID != 119 || !v.Fatal {
		t.Errorf("lost: %+v", v)
	}
	if c := <-w.changed; c.State != gpu.StateQuarantined || w.free() != "1" {
		t.Errorf("changed: %+v, free: %s", c, w.free())
	}
	if f := <-w.counted; f.XID != 119 || f.Origin != gpu.FromKernel {
		t.Errorf("counted: %+v", f)
	}
	if n := w.log.count("not ours to use"); n != 1 {
		t.Errorf("a strange device was told of %d times", n)
	}
	f.Close()
	cancel()
	<-done

	// It stays out when the agent starts anew; what it had is not ended twice
	// by that, but whoever still has it is to know.
	w = open(t, dir, "boot-1")
	if v := w.Verdict(w.devices[0].UUID); v.State != gpu.StateQuarantined || !v.Fatal || w.free() != "1" {
		t.Errorf("after a restart: %+v, free: %s", v, w.free())
	}
	if r, err := w.ledger.Reclaim([]string{w.devices[0].UUID}); err != nil {
		t.Errorf("an attempt that goes on: %v", err)
	} else {
		w.ledger.Release(r)
	}
	if got := w.ledger.Faults(); len(got) != 1 || !strings.Contains(got[w.devices[0].UUID], "XID 119") {
		t.Errorf("faults: %v", got)
	}
	if err := w.Lift(w.devices[0].UUID); err != nil || w.free() != "0,1" || !w.NeedsCheck([]string{w.devices[0].UUID}) {
		t.Errorf("lifted: %v, free: %s", err, w.free())
	}
	w.Checked(w.devices[0].UUID, "")
	w = open(t, dir, "boot-1")
	if w.free() != "0,1" || w.NeedsCheck([]string{w.devices[0].UUID}) || !w.NeedsCheck([]string{w.devices[1].UUID}) {
		t.Error("what was lifted and checked is forgotten")
	}
}

func TestALogThatMayNotBeReadIsSaidOnceAndTheRestGoesOn(t *testing.T) {
	w := open(t, "", "boot")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { w.Run(ctx, filepath.Join(t.TempDir(), "none")); close(done) }()
	w.Fault(gpu.Fault{UUID: w.devices[1].UUID, XID: 79, Origin: gpu.FromEvent})
	if v := <-w.lost; v.State != gpu.StateMissing {
		t.Errorf("lost: %+v", v)
	}
	for w.log.count("cannot be read") == 0 { // by the other goroutine
		time.Sleep(time.Millisecond)
	}
	cancel()
	<-done
	if n := w.log.count("cannot be read"); n != 1 {
		t.Errorf("said %d times", n)
	}
}

func TestAMemoryThatIsDamagedIsSaidAndEveryDeviceChecked(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "devices.json"), []byte(`[{"uuid":`), 0o600); err != nil {
		t.Fatal(err)
	}
	w := open(t, dir, "boot")
	if w.log.count("is lost") != 1 || w.free() != "0,1" || !w.NeedsCheck([]string{w.devices[0].UUID}) {
		t.Errorf("free: %s", w.free())
	}
}

// A broken device can speak ten thousand times a second, from two sources.
func TestAStormOfErrorsIsBorne(t *testing.T) {
	w := open(t, t.TempDir(), "boot")
	w.Lent([]string{w.devices[0].UUID}, "job")
	var wg sync.WaitGroup
	const n = 5000
	for _, o := range []gpu.Origin{gpu.FromEvent, gpu.FromKernel} {
		wg.Go(func() {
			for range n {
				w.Fault(gpu.Fault{UUID: w.devices[0].UUID, XID: 31, Origin: o})
			}
		})
	}
	wg.Wait()
	if got := len(w.counted); got != n {
		t.Errorf("counted %d, want %d", got, n)
	}
	if w.free() != "0,1" || len(w.lost) > 0 {
		t.Error("errors of one program took a device out")
	}
	raw, err := os.ReadFile(filepath.Join(w.Dir, "devices.json"))
	if err != nil || len(raw) > 2000 {
		t.Errorf("%d bytes are kept of it, %v", len(raw), err)
	}
}
