package gpu_test

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"lorayard/internal/gpu"
)

func TestDeviceNamesMapOntoClasses(t *testing.T) {
	for _, c := range []struct {
		name string
		gib  int64
		want string
	}{
		{"NVIDIA A100-SXM4-80GB", 80, "A100-80GB"},
		{"NVIDIA A100 80GB PCIe", 79, "A100-80GB"},
		{"NVIDIA A100-PCIE-40GB", 40, "A100-40GB"},
		{"NVIDIA H100 80GB HBM3", 79, "H100"},
		{"NVIDIA H200", 140, "H200"},
		{"Tesla V100-SXM2-32GB", 31, "V100-32GB"},
		{"Tesla V100-SXM2-16GB", 15, "V100-16GB"},
		{"NVIDIA GeForce RTX 4090", 23, "RTX-4090"},
		{"NVIDIA L40S", 44, "L40S"},
		{"NVIDIA L4", 22, "L4"},
		{"NVIDIA A10-4Q", 4, "nvidia-a10-4q-4GB"}, // a slice that a cloud rents out
		{"NVIDIA A100-SXM4-80GB MIG 1g.10gb", 9, "MIG-9GB"},
		{"Imagined 9", 8, "imagined-9-8GB"},
	} {
		if got := gpu.Classify(c.name, c.gib<<30); got != c.want {
			t.Errorf("Classify(%q, %d GiB) = %s, want %s", c.name, c.gib, got, c.want)
		}
	}
}

func TestReservationsAreAllOrNothing(t *testing.T) {
	devs := gpu.Pretend(3, "H100", "host")
	devs[2].Fault = "fell off the bus"
	l := gpu.NewLedger(devs)
	r, err := l.Reserve([]string{devs[0].UUID})
	if err != nil {
		t.Fatal(err)
	}
	for _, wish := range [][]string{{devs[1].UUID, devs[0].UUID}, {devs[1].UUID, devs[2].UUID}, {devs[1].UUID, "GPU-unknown"}, {devs[1].UUID, devs[1].UUID}} {
		if _, err := l.Reserve(wish); err == nil {
			t.Errorf("lent %v", wish)
		} else if _, ok := errors.AsType[*gpu.UnavailableError](err); !ok {
			t.Errorf("err = %T", err)
		}
	}
	if free := l.Free(); len(free) != 1 || free[0].UUID != devs[1].UUID {
		t.Errorf("free = %+v", free)
	}
	l.Release(r)
	again, err := l.Reserve([]string{devs[0].UUID})
	if err != nil {
		t.Fatal(err)
	}
	l.Release(r) // the old reservation ended long ago
	if _, err := l.Reserve([]string{devs[0].UUID}); err == nil {
		t.Error("releasing twice gave away another's device")
	}
	l.Release(again)
}

func TestADeviceHasOneHolderAtATime(t *testing.T) {
	devs := gpu.Pretend(4, "H100", "host")
	l := gpu.NewLedger(devs)
	var holders [4]atomic.Int32
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for n := range 200 {
				i := (g + n) % 4
				r, err := l.Reserve([]string{devs[i].UUID})
				if err != nil {
					continue
				}
				if holders[i].Add(1) != 1 {
					t.Error("two holders")
				}
				holders[i].Add(-1)
				l.Release(r)
			}
		})
	}
	wg.Wait()
}

func TestPretendedDevicesAreTheSameAfterARestart(t *testing.T) {
	a, b := gpu.Pretend(2, "A100-40GB", "x"), gpu.Pretend(2, "A100-40GB", "x")
	if a[0] != b[0] || a[0].UUID == a[1].UUID || a[0].MemoryBytes != 40<<30 || a[0].UUID == gpu.Pretend(1, "H100", "y")[0].UUID {
		t.Errorf("%+v %+v", a, b)
	}
}
