// Package fakenvml builds a stand-in for NVIDIA's libnvidia-ml.so.1 and breaks
// its devices: the real agent with the real binding runs on it where there is no
// GPU. It needs gcc, and is never linked into what is shipped.
package fakenvml

import (
	_ "embed"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

//go:embed c/fakenvml.c
var source []byte

// Library is the name by which the loader finds it in a directory of LD_LIBRARY_PATH.
const Library = "libnvidia-ml.so.1"

// StateEnv names the variable that tells the library where its state is.
const StateEnv = "FAKE_NVML_STATE"

const (
	mostDevices = 16
	mostEvents  = 4096
	nvlinks     = 18
	xidEvent    = 8
)

// Build compiles the library into dir and returns its path.
func Build(dir string) (string, error) {
	c, so := filepath.Join(dir, "fakenvml.c"), filepath.Join(dir, Library)
	if err := os.WriteFile(c, source, 0o600); err != nil {
		return "", err
	}
	out, err := exec.Command("gcc", "-shared", "-fPIC", "-O2", "-o", so, c).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("compile the stand-in for the driver's library: %w\n%s", err, out)
	}
	return so, nil
}

// Without copies the library to another directory under which it lacks a
// symbol, as the library of an older driver does.
func Without(so, symbol, dir string) (string, error) {
	raw, err := os.ReadFile(so)
	if err != nil {
		return "", err
	}
	name := append(append([]byte{0}, symbol...), 0)
	found := 0
	for i := 0; i+len(name) <= len(raw); i++ {
		if string(raw[i:i+len(name)]) == string(name) {
			raw[i+1] = 'x'
			found++
		}
	}
	if found == 0 {
		return "", fmt.Errorf("the library has no %s", symbol)
	}
	to := filepath.Join(dir, Library)
	return to, os.WriteFile(to, raw, 0o700)
}

// device and state are laid out as in fakenvml.c.
type device struct {
	uuid                                                           [48]byte
	name                                                           [64]byte
	total, used, reserved, corrected, uncorrected, energy, replays uint64
	lost, reset, recovery, utilization, power, temperature         uint32
	remaps, remapsBad, pending, failed, parts, links               uint32
	reasons, prohibited, spentBanks, offFabric, pid, unused        uint32
}

type event struct {
	device, kind     uint32
	data             uint64
	instance, unused uint32
}

type state struct {
	count, hang, gone, generation, switched, old uint32
	written, read                                uint32
	events                                       [mostEvents]event
	devices                                      [mostDevices]device
}

// Host is the state of a host with devices; it is read by every process that
// runs with StateEnv set to its path.
type Host struct {
	Path string
	raw  []byte
	s    *state
	mu   sync.Mutex // of the events
}

// New makes a host of n healthy devices, 16 at most, of 80 GB each, joined by a
// switch. Their UUIDs follow from the path.
func New(path string, n int) (*Host, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := f.Truncate(int64(unsafe.Sizeof(state{}))); err != nil {
		return nil, err
	}
	h, err := attach(f)
	if err != nil {
		return nil, err
	}
	var name uint64 = 14695981039346656037
	for _, b := range []byte(path) { // FNV-1a
		name = (name ^ uint64(b)) * 1099511628211
	}
	for i := range mostDevices {
		d := &h.s.devices[i]
		copy(d.uuid[:], fmt.Sprintf("GPU-%08x-%04x-4000-8000-%012x", uint32(name>>32), uint16(name), i))
		copy(d.name[:], "NVIDIA H100 80GB HBM3")
		d.total, d.reserved, d.power, d.temperature, d.links = 80<<30, 479<<20, 70_000, 41, nvlinks
	}
	atomic.StoreUint32(&h.s.switched, 1)
	atomic.StoreUint32(&h.s.count, uint32(n))
	return h, nil
}

// Attach opens the state of a host that another process has made.
func Attach(path string) (*Host, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Size() != int64(unsafe.Sizeof(state{})) {
		return nil, fmt.Errorf("%s is not the state of a pretended host of this version", path)
	}
	return attach(f)
}

func attach(f *os.File) (*Host, error) {
	raw, err := unix.Mmap(int(f.Fd()), 0, int(unsafe.Sizeof(state{})), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the state of the pretended host: %w", err)
	}
	return &Host{Path: f.Name(), raw: raw, s: (*state)(unsafe.Pointer(&raw[0]))}, nil
}

// Devices is how many there are.
func (h *Host) Devices() int { return int(atomic.LoadUint32(&h.s.count)) }

// Close lets go of the state; the file stays.
func (h *Host) Close() error { return unix.Munmap(h.raw) }

// UUID names a device.
func (h *Host) UUID(i int) string {
	u := h.s.devices[i].uuid[:]
	for n, b := range u {
		if b == 0 {
			return string(u[:n])
		}
	}
	return string(u)
}

func set(to *uint32, on bool) {
	v := uint32(0)
	if on {
		v = 1
	}
	atomic.StoreUint32(to, v)
}

// Lose lets a device fall off the bus, or brings it back.
func (h *Host) Lose(i int, lost bool) { set(&h.s.devices[i].lost, lost) }

// RequireReset lets the driver refuse a device until it is reset.
func (h *Host) RequireReset(i int, refused bool) { set(&h.s.devices[i].reset, refused) }

// Recover sets the driver's own verdict on a device.
func (h *Host) Recover(i, action int) {
	atomic.StoreUint32(&h.s.devices[i].recovery, uint32(action))
}

// RemapPending lets a broken row of memory wait for a reset.
func (h *Host) RemapPending(i int, pending bool) { set(&h.s.devices[i].pending, pending) }

// Use sets how much memory processes use.
func (h *Host) Use(i int, bytes uint64) { atomic.StoreUint64(&h.s.devices[i].used, bytes) }

// UsedBy names a process that has a context on the device; 0: none has.
func (h *Host) UsedBy(i, pid int) { atomic.StoreUint32(&h.s.devices[i].pid, uint32(pid)) }

// Call gives a device another name and another size, in GiB.
func (h *Host) Call(i int, name string, gib uint64) {
	d := &h.s.devices[i]
	d.name = [len(d.name)]byte{}
	copy(d.name[:len(d.name)-1], name)
	atomic.StoreUint64(&d.total, gib<<30)
}

// Slow sets why a device is slowed down, as nvmlClocksEventReason bits.
func (h *Host) Slow(i int, reasons uint32) { atomic.StoreUint32(&h.s.devices[i].reasons, reasons) }

// Prohibit sets the compute mode in which nothing can run.
func (h *Host) Prohibit(i int, on bool) { set(&h.s.devices[i].prohibited, on) }

// SpendRows leaves so many banks of memory without a spare row.
func (h *Host) SpendRows(i, banks int) {
	atomic.StoreUint32(&h.s.devices[i].spentBanks, uint32(banks))
}

// LeaveFabric takes a device off the NVLink fabric, or puts it back.
func (h *Host) LeaveFabric(i int, off bool) { set(&h.s.devices[i].offFabric, off) }

// Busy sets what a device does: the share of time in which a kernel runs, and what it draws.
func (h *Host) Busy(i int, percent uint32, watts, celsius float64) {
	d := &h.s.devices[i]
	atomic.StoreUint32(&d.utilization, percent)
	atomic.StoreUint32(&d.power, uint32(watts*1000))
	atomic.StoreUint32(&d.temperature, uint32(celsius))
}

// Count sets the memory errors since the driver was loaded, and its energy.
func (h *Host) Count(i int, corrected, uncorrected uint64, joules float64) {
	d := &h.s.devices[i]
	atomic.StoreUint64(&d.corrected, corrected)
	atomic.StoreUint64(&d.uncorrected, uncorrected)
	atomic.StoreUint64(&d.energy, uint64(joules*1000))
}

// Split makes n MIG instances of a device, 7 at most.
func (h *Host) Split(i, n int) { atomic.StoreUint32(&h.s.devices[i].parts, uint32(n)) }

// Switched says whether devices are joined by a switch or in pairs.
func (h *Host) Switched(on bool) { set(&h.s.switched, on) }

// Old lets the driver refuse fields that were added in 2022 and later.
func (h *Host) Old(on bool) { set(&h.s.old, on) }

// Hang lets every call sleep first.
func (h *Host) Hang(d time.Duration) { atomic.StoreUint32(&h.s.hang, uint32(d.Milliseconds())) }

// Unload takes the driver away; Load brings it back, and old handles are of no
// use any more.
func (h *Host) Unload() {
	atomic.StoreUint32(&h.s.gone, 1)
	h.wake()
}

// Load ends what Unload began.
func (h *Host) Load() {
	atomic.AddUint32(&h.s.generation, 1)
	atomic.StoreUint32(&h.s.gone, 0)
	h.wake()
}

// XID tells of an error of a device, as the driver's library does.
func (h *Host) XID(i, xid int) { h.Event(i, xidEvent, uint64(xid)) }

// Event tells of anything. One that is not fetched in time is lost, as with the
// real library.
func (h *Host) Event(i int, kind uint32, data uint64) { h.tell(i, kind, data, math.MaxUint32) }

// PartXID tells of an error in the n-th MIG instance of a device, from 0.
func (h *Host) PartXID(i, n, xid int) { h.tell(i, xidEvent, uint64(xid), firstInstance+uint32(n)) }

// firstInstance is the number that the driver has for the first of them.
const firstInstance = 7

func (h *Host) tell(i int, kind uint32, data uint64, instance uint32) {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := atomic.LoadUint32(&h.s.written)
	h.s.events[n%mostEvents] = event{device: uint32(i), kind: kind, data: data, instance: instance}
	atomic.StoreUint32(&h.s.written, n+1)
	h.wake()
}

// wake ends the waiting for events.
func (h *Host) wake() {
	_, _, _ = unix.Syscall6(unix.SYS_FUTEX, uintptr(unsafe.Pointer(&h.s.written)), 1, 1<<30, 0, 0, 0)
}
