package agent_test

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"lorayard/internal/attempt"
	"lorayard/internal/gpu"
	"lorayard/internal/proc"
	"lorayard/internal/trainer"
	"lorayard/internal/wire"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "shim" {
		os.Exit(proc.RunShim(os.Args[2:], nil))
	}
	os.Exit(m.Run())
}

// BenchmarkFaultToDeath is the time from a fault until the trainer's process
// group is dead: told by the driver's library, and as a line of the kernel log.
// The trainer is deaf to SIGTERM and has a child.
func BenchmarkFaultToDeath(b *testing.B) {
	for _, from := range []gpu.Origin{gpu.FromEvent, gpu.FromKernel} {
		b.Run(string(from), func(b *testing.B) {
			pipe := filepath.Join(b.TempDir(), "kmsg")
			if err := syscall.Mkfifo(pipe, 0o600); err != nil {
				b.Fatal(err)
			}
			devices := gpu.Pretend(1, "H100", "host")
			health, err := gpu.OpenHealth(gpu.HealthConfig{Dir: b.TempDir(), Devices: devices, Ledger: gpu.NewLedger(devices), Log: slog.New(slog.DiscardHandler)})
			if err != nil {
				b.Fatal(err)
			}
			live := &attempt.Live{}
			health.Listen(func(v gpu.Verdict) { live.Break(&attempt.DeviceFault{Reason: v.Reason}) }, nil, nil)
			done := make(chan struct{})
			go func() { defer close(done); health.Run(b.Context(), pipe) }()
			log, err := os.OpenFile(pipe, os.O_WRONLY, 0)
			if err != nil {
				b.Fatal(err)
			}
			defer log.Close()
			script := filepath.Join(b.TempDir(), "python")
			if err := os.WriteFile(script, []byte("#!/bin/sh\ntrap '' TERM\nsleep 1000 &\nwait\n"), 0o700); err != nil {
				b.Fatal(err)
			}
			tr := &trainer.Trainer{Python: script, Shim: []string{"/proc/self/exe", "shim"}}
			var took, whole []time.Duration
			for b.Loop() {
				live = &attempt.Live{}
				run, err := tr.Start(wire.Plan{RunDir: b.TempDir()}, nil, os.Environ(), trainer.Options{Deadline: time.Hour})
				if err != nil {
					b.Fatal(err)
				}
				live.Extend(time.Hour)
				live.Attach(run)
				health.Lent([]string{devices[0].UUID}, "job")
				fd, err := unix.PidfdOpen(run.PID(), 0)
				if err != nil {
					b.Fatal(err)
				}
				time.Sleep(20 * time.Millisecond) // it trains
				dead := make(chan time.Time, 1)
				go func() {
					_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10_000)
					dead <- time.Now()
				}()
				time.Sleep(5 * time.Millisecond)
				began := time.Now()
				if from == gpu.FromKernel {
					fmt.Fprintf(log, "NVRM: Xid (PCI:%s): 119, planted\n", devices[0].Bus)
				} else {
					health.Fault(gpu.Fault{UUID: devices[0].UUID, XID: 119, Origin: from})
				}
				took = append(took, (<-dead).Sub(began))
				for range run.Events() {
				}
				_ = run.Wait()
				whole = append(whole, time.Since(began))
				unix.Close(fd)
				health.Returned([]string{devices[0].UUID})
				if err := health.Lift(devices[0].UUID); err != nil {
					b.Fatal(err)
				}
			}
			report := func(what string, ds []time.Duration) {
				slices.Sort(ds)
				for _, p := range []int{50, 99} {
					b.ReportMetric(float64(ds[(len(ds)-1)*p/100].Microseconds())/1000, fmt.Sprintf("ms-%s-p%d", what, p))
				}
			}
			report("dead", took)
			report("reaped", whole)
		})
	}
}
