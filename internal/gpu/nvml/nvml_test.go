//go:build linux && cgo

package nvml

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"lorayard/internal/gpu"
	"lorayard/internal/gpu/fakenvml"
)

// A process binds the library's symbols once: every test of it shares one.
var library1 = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "fakenvml")
	if err != nil {
		return "", err
	}
	return fakenvml.Build(dir)
})

func TestMain(m *testing.M) {
	if path := os.Getenv("NVML_TEST_LIBRARY"); path != "" {
		child(path)
		return
	}
	code := m.Run()
	if path, err := library1(); err == nil {
		_ = os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

// host has n devices and a driver that reads them.
func host(t testing.TB, n int, patience time.Duration) (*fakenvml.Host, *Driver) {
	t.Helper()
	so, err := library1()
	if err != nil {
		t.Fatal(err)
	}
	h, err := fakenvml.New(filepath.Join(t.TempDir(), "state"), n)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv(fakenvml.StateEnv, h.Path)
	d, err := Open(Options{Path: so, Patience: patience})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.Close()
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return h, d
}

func devices(t testing.TB, d *Driver) []gpu.Device {
	t.Helper()
	ds, err := d.Devices(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return ds
}

func must(rs []gpu.Reading, _ error) []gpu.Reading { return rs }

// read takes both tiers.
func read(t testing.TB, d *Driver, n int) ([]gpu.Reading, error) {
	t.Helper()
	dst := make([]gpu.Reading, n)
	return dst, errors.Join(d.Read(t.Context(), gpu.Hot, dst), d.Read(t.Context(), gpu.Warm, dst))
}

func TestReadsEveryDevice(t *testing.T) {
	h, d := host(t, 8, 0)
	h.Busy(3, 97, 650, 66)
	h.Use(3, 30<<30)
	h.Count(3, 5, 1, 1234.5)
	h.Recover(3, int(gpu.RecoveryDrainReset))
	ds := devices(t, d)
	if len(ds) != 8 || ds[3].UUID != h.UUID(3) || ds[3].Class != gpu.Classify("NVIDIA H100 80GB HBM3", 80<<30) || ds[3].Bus != "0000:13:00" || ds[3].Fault != "" {
		t.Fatalf("%+v", ds)
	}
	rs, err := read(t, d, 8)
	if err != nil {
		t.Fatal(err)
	}
	r := rs[3]
	for what, v := range map[string][2]float64{
		"utilization": {r.Utilization, 0.97}, "used": {r.MemoryUsed, 30 << 30}, "reserved": {r.MemoryReserved, 479 << 20},
		"power": {r.Power, 650}, "temperature": {r.Temperature, 66}, "memory": {r.MemoryTemperature, 74}, "energy": {r.Energy, 1234.5},
		"corrected": {r.ECCCorrected, 5}, "uncorrected": {r.ECCUncorrected, 1}, "recovery": {r.Recovery, 4}, "throttled": {r.Throttled[2], 1},
		"limit": {r.PowerLimit, 700}, "margin": {r.TemperatureMargin, 21}, "clock": {r.ClockSM, 1980e6}, "width": {r.PCIeWidth, 1}, "links": {r.NVLinksUp, 18},
	} {
		if v[0] != v[1] {
			t.Errorf("%s is %v, not %v", what, v[0], v[1])
		}
	}
	if driver, cuda := d.Versions(); driver == "" || cuda != "13.0" {
		t.Errorf("versions %q %q", driver, cuda)
	}
	if f := r.Facts(1); *f.UsedBytes != 30<<30 || *f.Recovery != gpu.RecoveryDrainReset || *f.Uncorrectable != 1 {
		t.Errorf("%+v", f)
	}
}

func TestLinksAreMeasured(t *testing.T) {
	h, d := host(t, 8, 0)
	devices(t, d)
	links, err := d.Links(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if links[0][1] != 180_030 || links[0][7] != 180_010 || links[2][2] != 0 {
		t.Errorf("with a switch: %v", links)
	}
	h.Switched(false)
	if links, err = d.Links(t.Context()); err != nil || links[0][1] != 180_030 || links[0][2] != 30 || links[7][0] != 10 {
		t.Errorf("in pairs: %v %v", links, err)
	}
}

func TestOneDeviceIsLostAndNoOther(t *testing.T) {
	h, d := host(t, 4, 0)
	devices(t, d)
	h.Lose(1, true)
	h.RequireReset(2, true)
	rs, err := read(t, d, 4)
	if err == nil || !strings.Contains(err.Error(), h.UUID(1)) || strings.Contains(err.Error(), h.UUID(0)) {
		t.Error(err)
	}
	for i, r := range rs {
		if r.Lost != (i == 1) || r.ResetRequired != (i == 2) || math.IsNaN(r.MemoryUsed) != (i == 1 || i == 2) {
			t.Errorf("device %d: %+v", i, r)
		}
	}
	h.Lose(1, false) // somebody has reset it; the library knows nothing of that yet
	if rs, _ = read(t, d, 4); !rs[1].Lost || !math.IsNaN(rs[1].Power) {
		t.Errorf("%+v", rs[1])
	}
	d.again = 0
	read(t, d, 4)
	for i, r := range must(read(t, d, 4)) {
		if r.Lost || r.ResetRequired != (i == 2) || r.Returned != map[int]int{1: 1}[i] || d.Generation() != 1 {
			t.Errorf("device %d, generation %d: %+v", i, d.Generation(), r)
		}
	}
	h.RequireReset(2, false)
	read(t, d, 4)
	if rs := must(read(t, d, 4)); rs[2].ResetRequired || rs[2].Lost || rs[2].Returned != 1 || math.IsNaN(rs[2].Power) {
		t.Errorf("after its reset: %+v", rs[2])
	}
}

func TestTheDriverIsLoadedAnew(t *testing.T) {
	h, d := host(t, 3, 0)
	devices(t, d)
	h.Unload()
	for range 2 {
		rs, err := read(t, d, 3)
		if err == nil || rs[0].Lost {
			t.Fatalf("no device is lost, the driver is gone: %v, %+v", err, rs[0])
		}
	}
	h.Lose(2, true)
	h.Load()
	rs, err := read(t, d, 3)
	if err != nil && !strings.Contains(err.Error(), h.UUID(2)) || d.Generation() != 2 || rs[0].Lost || !rs[2].Lost || math.IsNaN(rs[0].Power) {
		t.Fatalf("generation %d, %v, %+v", d.Generation(), err, rs)
	}
}

func TestACallThatHangsIsNotWaitedForForEver(t *testing.T) {
	h, d := host(t, 2, 50*time.Millisecond)
	devices(t, d)
	h.Hang(400 * time.Millisecond)
	dst := make([]gpu.Reading, 2)
	if err := d.Read(t.Context(), gpu.Hot, dst); !errors.Is(err, gpu.ErrWedged) {
		t.Fatal(err)
	}
	began := time.Now()
	if err := d.Read(t.Context(), gpu.Hot, dst); !errors.Is(err, gpu.ErrWedged) || dst[0].UUID != "" {
		t.Fatal(err, dst)
	}
	if took := time.Since(began); took > 40*time.Millisecond {
		t.Errorf("whoever comes after it waits %v too", took)
	}
	h.Hang(0)
	for d.Read(t.Context(), gpu.Hot, dst) != nil { // it comes back, and all is as before
	}
	if dst[0].UUID != h.UUID(0) {
		t.Error(dst)
	}
}

// Without persistence mode a driver wakes its devices one by one when it is
// opened: that is slow, and no sign of trouble.
func TestOpeningMayTakeLongerThanACall(t *testing.T) {
	h, _ := host(t, 2, 0)
	h.Hang(30 * time.Millisecond)
	so, err := library1()
	if err != nil {
		t.Fatal(err)
	}
	d, err := Open(Options{Path: so, Patience: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	devices(t, d)
}

func TestEvents(t *testing.T) {
	h, d := host(t, 4, 0)
	devices(t, d)
	ctx, stop := context.WithCancel(t.Context())
	heard, ended := make(chan gpu.Fault, 2*stormSize), make(chan error)
	go func() { ended <- d.Events(ctx, func(f gpu.Fault) { heard <- f }) }()
	h.Event(0, 4, 79) // a change of power state carries a number that is no XID
	h.XID(2, 79)
	h.Event(1, 2, 0)
	want := []gpu.Fault{{UUID: h.UUID(2), XID: 79, Origin: gpu.FromEvent}, {UUID: h.UUID(1), XID: 48, Origin: gpu.FromEvent, Text: "a memory error that could not be corrected"}}
	for _, w := range want {
		if f := <-heard; f != w {
			t.Errorf("%+v, not %+v", f, w)
		}
	}
	for range stormSize { // fewer than the library keeps
		h.XID(3, 31)
	}
	for range stormSize {
		if f := <-heard; f.UUID != h.UUID(3) || f.XID != 31 {
			t.Fatal(f)
		}
	}
	h.Unload()
	if err := <-ended; err == nil {
		t.Error("nobody is told that events ended")
	}
	stop()
}

const stormSize = 3000

func TestMIG(t *testing.T) {
	h, d := host(t, 2, 0)
	h.Split(1, 3)
	ds := devices(t, d)
	if len(ds) != 4 || ds[0].UUID != h.UUID(0) || !strings.HasPrefix(ds[1].UUID, "MIG-1-") || ds[3].MemoryBytes != 10<<30 || !strings.HasPrefix(ds[3].Class, "MIG-") {
		t.Fatalf("%+v", ds)
	}
	h.RemapPending(1, true)
	rs, err := read(t, d, 4)
	if err != nil || rs[0].RemapPending != 0 || rs[2].RemapPending != 1 || rs[2].MemoryTotal != 10<<30 {
		t.Errorf("%v %+v", err, rs)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	heard := make(chan string, 9)
	go func() { _ = d.Events(ctx, func(f gpu.Fault) { heard <- f.UUID }) }()
	h.XID(1, 95)
	got := []string{<-heard, <-heard, <-heard}
	slices.Sort(got)
	if !slices.Equal(got, []string{ds[1].UUID, ds[2].UUID, ds[3].UUID}) {
		t.Error(got)
	}
	h.PartXID(1, 1, 13) // of one program, in its own instance
	h.XID(0, 13)
	if a, b := <-heard, <-heard; a != ds[2].UUID || b != ds[0].UUID {
		t.Errorf("an error of one instance is told of %s, then %s", a, b)
	}
}

func TestDetails(t *testing.T) {
	h, d := host(t, 6, 0)
	ds := devices(t, d)
	h.Prohibit(0, true)
	h.SpendRows(1, 3)
	h.LeaveFabric(2, true)
	h.UsedBy(3, 4711)
	h.Use(3, 2<<30)
	h.Lose(4, true)
	var uuids []string
	for _, x := range ds[:5] {
		uuids = append(uuids, x.UUID)
	}
	details, err := d.Details(t.Context(), uuids)
	if err != nil || len(details) != 4 {
		t.Fatalf("%v, %+v", err, details)
	}
	for i, want := range []string{"its compute mode is prohibited: set it to default (nvidia-smi -c 0 -i " + h.UUID(0) + ")", "3 banks of its memory have no spare row left: have it replaced", "", ""} {
		if got := details[i].Problem(); got != want {
			t.Errorf("device %d: %q, not %q", i, got, want)
		}
	}
	if why := gpu.GangProblem(details[1:4]); !strings.Contains(why, h.UUID(2)) || gpu.GangProblem(details[2:3]) != "" || gpu.GangProblem(details[:2]) != "" {
		t.Error(why)
	}
	x := details[3]
	if len(x.Processes) != 1 || x.Processes[0] != (gpu.Process{PID: 4711, Bytes: 2 << 30}) || !x.ECC.Now || !*x.Persistence || !*x.InfoROM || *x.SRAMWorn || x.PCIe[1] != 5 {
		t.Errorf("%+v", x)
	}
}

func TestAnOldDriverRefusesNewFields(t *testing.T) {
	h, d := host(t, 1, 0)
	devices(t, d)
	h.Old(true)
	rs, err := read(t, d, 1)
	if err != nil || !math.IsNaN(rs[0].Recovery) || rs[0].ECCUncorrected != 0 || math.IsNaN(rs[0].Energy) {
		t.Errorf("%v %+v", err, rs)
	}
	if rs, err = read(t, d, 1); err != nil || rs[0].Power != 70 {
		t.Errorf("its power, told in another way, is %v: %v", rs[0].Power, err)
	}
}

func TestNoLibrary(t *testing.T) {
	if _, err := Open(Options{Path: filepath.Join(t.TempDir(), fakenvml.Library)}); !errors.Is(err, ErrUnavailable) {
		t.Error(err)
	}
}

// child does all that an agent does with a driver.
func child(path string) {
	d, err := Open(Options{Path: path})
	if err != nil {
		fmt.Println("refused:", err)
		return
	}
	ctx, stop := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer stop()
	ds, err := d.Devices(context.Background())
	if err != nil {
		fmt.Println("refused:", err)
		return
	}
	dst := make([]gpu.Reading, len(ds))
	for _, tier := range []gpu.Tier{gpu.Hot, gpu.Warm} {
		if err := d.Read(context.Background(), tier, dst); err != nil {
			fmt.Println("read:", err)
		}
	}
	if _, err := d.Links(context.Background()); err != nil {
		fmt.Println("links:", err)
	}
	if _, err := d.Details(context.Background(), []string{ds[0].UUID}); err != nil {
		fmt.Println("details:", err)
	}
	_ = d.Events(ctx, func(gpu.Fault) {})
	d.Close()
	fmt.Println("fine:", len(ds))
}

// go-nvml ends the process when it calls a symbol that the library lacks.
func TestNoMissingSymbolEndsTheProcess(t *testing.T) {
	so, err := library1()
	if err != nil {
		t.Fatal(err)
	}
	h, err := fakenvml.New(filepath.Join(t.TempDir(), "state"), 2)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	run := func(path string) string {
		c := exec.Command(os.Args[0])
		// The race detector sleeps for a second at the end of a process.
		c.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", "NVML_TEST_LIBRARY="+path, fakenvml.StateEnv+"="+h.Path)
		out, err := c.CombinedOutput()
		if err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return string(bytes.TrimSpace(out))
	}
	if said := run(so); said != "fine: 2" {
		t.Fatalf("with all symbols: %s", said)
	}
	for _, symbol := range Symbols() {
		without, err := fakenvml.Without(so, symbol, t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		want := "fine: 2"
		if slices.Contains(needed, symbol) {
			want = "refused: the NVIDIA driver is too old for this agent: its library has no " + symbol
		}
		if said := run(without); said != want {
			t.Errorf("without %s: %s", symbol, said)
		}
	}
}

// One poll of eight devices: Go and the crossing to C, without what a driver does.
func BenchmarkPoll8(b *testing.B) {
	_, d := host(b, 8, 0)
	devices(b, d)
	for _, tier := range []gpu.Tier{gpu.Hot, gpu.Warm} {
		b.Run(string(tier), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := d.read(tier); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// The same, asked of the thread that does it.
func BenchmarkRead8(b *testing.B) {
	_, d := host(b, 8, 0)
	devices(b, d)
	dst := make([]gpu.Reading, 8)
	b.ReportAllocs()
	for b.Loop() {
		if err := d.Read(b.Context(), gpu.Hot, dst); err != nil {
			b.Fatal(err)
		}
	}
}

func TestASteadyPollAllocatesNothing(t *testing.T) {
	_, d := host(t, 16, 0)
	devices(t, d)
	dst := make([]gpu.Reading, 16)
	if n := testing.AllocsPerRun(100, func() {
		if err := d.Read(t.Context(), gpu.Hot, dst); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations in each", n)
	}
}

// From an error to whoever hears of it.
func BenchmarkEvent(b *testing.B) {
	h, d := host(b, 8, 0)
	devices(b, d)
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	heard := make(chan time.Time, 1)
	go func() { _ = d.Events(ctx, func(gpu.Fault) { heard <- time.Now() }) }()
	var took []time.Duration
	for b.Loop() {
		time.Sleep(time.Millisecond) // the driver is waited for again, asleep
		began := time.Now()
		h.XID(5, 79)
		took = append(took, (<-heard).Sub(began))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}
