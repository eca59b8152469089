//go:build linux && cgo

package nvml

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/dl"
	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"lorayard/internal/gpu"
)

const library = "libnvidia-ml.so.1"

// needed are the symbols without which nothing can be said of a device.
var needed = []string{
	"nvmlInit_v2", "nvmlShutdown", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetUUID", "nvmlDeviceGetName",
}

// The symbols that a driver may lack.
const (
	symDriverVersion = "nvmlSystemGetDriverVersion"
	symCUDAVersion   = "nvmlSystemGetCudaDriverVersion"
	symMemory2       = "nvmlDeviceGetMemoryInfo_v2"
	symMemory        = "nvmlDeviceGetMemoryInfo"
	symPCI           = "nvmlDeviceGetPciInfo_v3"
	symFields        = "nvmlDeviceGetFieldValues"
	symUtilization   = "nvmlDeviceGetUtilizationRates"
	symTemperature   = "nvmlDeviceGetTemperature"
	symPowerLimit    = "nvmlDeviceGetEnforcedPowerLimit"
	symClock         = "nvmlDeviceGetClockInfo"
	symWidth         = "nvmlDeviceGetCurrPcieLinkWidth"
	symMaxWidth      = "nvmlDeviceGetMaxPcieLinkWidth"
	symMargin        = "nvmlDeviceGetMarginTemperature"
	symLinkState     = "nvmlDeviceGetNvLinkState"
	symLinkPCI       = "nvmlDeviceGetNvLinkRemotePciInfo_v2"
	symLinkType      = "nvmlDeviceGetNvLinkRemoteDeviceType"
	symAncestor      = "nvmlDeviceGetTopologyCommonAncestor"
	symMIGMode       = "nvmlDeviceGetMigMode"
	symMIGCount      = "nvmlDeviceGetMaxMigDeviceCount"
	symMIGDevice     = "nvmlDeviceGetMigDeviceHandleByIndex"
	symInstance      = "nvmlDeviceGetGpuInstanceId"
	symSetCreate     = "nvmlEventSetCreate"
	symSetWait       = "nvmlEventSetWait_v2"
	symSetFree       = "nvmlEventSetFree"
	symSupported     = "nvmlDeviceGetSupportedEventTypes"
	symRegister      = "nvmlDeviceRegisterEvents"
	symReasons       = "nvmlDeviceGetCurrentClocksEventReasons"
	symPower         = "nvmlDeviceGetPowerUsage"
	symPersistence   = "nvmlDeviceGetPersistenceMode"
	symComputeMode   = "nvmlDeviceGetComputeMode"
	symECCMode       = "nvmlDeviceGetEccMode"
	symHistogram     = "nvmlDeviceGetRowRemapperHistogram"
	symInfoROM       = "nvmlDeviceValidateInforom"
	symSRAM          = "nvmlDeviceGetSramEccErrorStatus"
	symFabric        = "nvmlDeviceGetGpuFabricInfoV"
	symGen           = "nvmlDeviceGetCurrPcieLinkGeneration"
	symMaxGen        = "nvmlDeviceGetMaxPcieLinkGeneration"
	symProcesses     = "nvmlDeviceGetComputeRunningProcesses_v3"
)

var wanted = []string{
	symDriverVersion, symCUDAVersion, symMemory2, symMemory, symPCI, symFields, symUtilization, symTemperature, symPowerLimit, symClock,
	symWidth, symMaxWidth, symMargin, symLinkState, symLinkPCI, symLinkType, symAncestor, symMIGMode, symMIGCount, symMIGDevice, symInstance,
	symSetCreate, symSetWait, symSetFree, symSupported, symRegister, symReasons, symPower, symPersistence, symComputeMode, symECCMode, symHistogram,
	symInfoROM, symSRAM, symFabric, symGen, symMaxGen, symProcesses,
}

// Symbols lists every symbol of the library that may be called here.
func Symbols() []string { return append(slices.Clone(needed), wanted...) }

// Driver is the open library.
type Driver struct {
	lib     nvml.Interface
	has     map[string]bool
	thread  *thread
	opening time.Duration // patience while devices are woken

	// Held for reading while events are waited for, and for writing while the
	// library is opened anew.
	open sync.RWMutex

	// What only the thread touches.
	units     []*unit
	readings  []gpu.Reading
	failed    error // of the last read
	tiers     map[gpu.Tier]func()
	stale     bool // the library has to be opened anew
	anew      bool // because the driver under it was
	bad       bool // a device is lost, or has to be reset
	reopened  time.Time
	again     time.Duration // after which time it is opened anew to see whether a bad device is well
	oldFields bool          // the driver refuses newer fields

	generation atomic.Int64 // of the driver
	opened     atomic.Int64 // of our handles
	versions   atomic.Pointer[[2]string]
	handles    atomic.Pointer[map[nvml.Device][]part] // whole devices or their parts, for events
}

// unit is one device of the inventory.
type unit struct {
	gpu.Device
	handle nvml.Device
	whole  nvml.Device // the device that a MIG instance is a part of; handle, when it is none
	mig    bool
	// instance is the number of a MIG instance; -1: not known, or none.
	instance int
	gone     bool // since the driver was loaded anew

	refused  bool // gone, but only until it is reset
	bad      bool // it was lost, or had to be reset, when it was read last
	returned int  // how often it was well again after that

	hot, warm     []nvml.FieldValue
	answer        hotAnswer
	raw, rawWhole pointer
}

// hold keeps the handles of a device, and of the whole that it is a part of.
func (u *unit) hold(h, whole nvml.Device) {
	u.handle, u.whole, u.raw, u.rawWhole = h, whole, raw(h), raw(whole)
}

// openingTimes is how much longer opening may take than another call: without
// persistence mode the driver wakes one device after the other, for seconds
// each.
const openingTimes = 9

// reopenEvery is how often the library is opened anew because a device is lost
// or has to be reset: what it said of a device once it says until then, whatever
// somebody has done to the device. It is no light thing to do, so it is done
// seldom.
const reopenEvery = time.Minute

// part is what an event of a whole device is about: the device, or a MIG
// instance of it.
type part struct {
	uuid     string
	instance int // as the driver counts them; -1: not known, or none
}

// Open loads the library; the error wraps ErrUnavailable when there is none.
func Open(o Options) (*Driver, error) {
	path := o.Path
	if path == "" {
		path = library
	}
	// Looked at before go-nvml is: its Init calls symbols already.
	probe := dl.New(path, dl.RTLD_LAZY|dl.RTLD_GLOBAL)
	if err := probe.Open(); err != nil {
		return nil, ErrUnavailable
	}
	find(path)
	has := map[string]bool{}
	for _, s := range Symbols() {
		has[s] = probe.Lookup(s) == nil
	}
	for _, s := range needed {
		if !has[s] {
			return nil, fmt.Errorf("the NVIDIA driver is too old for this agent: its library has no %s", s)
		}
	}
	patience := cmp.Or(o.Patience, Patience)
	d := &Driver{lib: nvml.New(nvml.WithLibraryPath(path)), has: has, thread: newThread(patience), opening: openingTimes * patience, reopened: time.Now(), again: reopenEvery}
	d.tiers = map[gpu.Tier]func(){gpu.Hot: func() { d.failed = d.read(gpu.Hot) }, gpu.Warm: func() { d.failed = d.read(gpu.Warm) }}
	d.versions.Store(&[2]string{})
	var ret nvml.Return
	if err := d.thread.doFor(context.Background(), d.opening, func() {
		if ret = d.lib.Init(); ret == nvml.SUCCESS {
			d.publish()
		}
	}); err != nil {
		return nil, fmt.Errorf("initialise the NVIDIA driver library: %w", err)
	}
	d.thread.done()
	if ret != nvml.SUCCESS {
		d.thread.end()
		if ret == nvml.ERROR_DRIVER_NOT_LOADED {
			return nil, ErrUnavailable
		}
		return nil, fmt.Errorf("initialise the NVIDIA driver library: %s", words(ret))
	}
	d.generation.Store(1)
	return d, nil
}

// Missing lists the symbols that this driver lacks.
func (d *Driver) Missing() []string {
	return slices.DeleteFunc(Symbols(), func(s string) bool { return d.has[s] })
}

// Close lets go of the library, unless a call keeps it.
func (d *Driver) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	err := d.thread.do(ctx, func() {
		if d.open.TryLock() { // somebody still waits for events: the process is about to end
			_ = d.lib.Shutdown() // nothing can be done about a failure
			d.open.Unlock()
		}
	})
	if err == nil {
		d.thread.done()
		d.thread.end()
	}
}

// Generation grows when the driver was loaded anew.
func (d *Driver) Generation() int { return int(d.generation.Load()) }

// Versions are those of the driver and of CUDA; empty: not known.
func (d *Driver) Versions() (driver, cuda string) {
	v := d.versions.Load()
	return v[0], v[1]
}

// Devices reads what there is: whole devices, and the MIG instances of those
// that are split. A device that does not answer is in the list with its fault,
// under the index that the driver counts it at.
func (d *Driver) Devices(ctx context.Context) ([]gpu.Device, error) {
	var devices []gpu.Device
	var failed error
	if err := d.thread.doFor(ctx, d.opening, func() {
		var units []*unit
		if units, failed = d.list(); failed != nil {
			return
		}
		d.take(units)
		for _, u := range units {
			devices = append(devices, u.Device)
		}
	}); err != nil {
		return nil, err
	}
	defer d.thread.done()
	return devices, failed
}

// take makes units the inventory.
func (d *Driver) take(units []*unit) {
	d.units, d.readings = units, make([]gpu.Reading, len(units))
	for i, u := range units {
		d.readings[i] = gpu.BlankReading(u.UUID)
	}
	d.publish()
}

// publish tells other threads what the inventory is.
func (d *Driver) publish() {
	handles := map[nvml.Device][]part{}
	for _, u := range d.units {
		if u.whole != nil && !u.gone {
			handles[u.whole] = append(handles[u.whole], part{u.UUID, u.instance})
		}
	}
	d.handles.Store(&handles)
	var v [2]string
	if d.has[symDriverVersion] {
		v[0], _ = d.lib.SystemGetDriverVersion()
	}
	if d.has[symCUDAVersion] {
		if n, ret := d.lib.SystemGetCudaDriverVersion(); ret == nvml.SUCCESS {
			v[1] = strconv.Itoa(n/1000) + "." + strconv.Itoa(n%1000/10)
		}
	}
	d.versions.Store(&v)
}

func (d *Driver) list() ([]*unit, error) {
	n, ret := d.lib.DeviceGetCount()
	if ret != nvml.SUCCESS {
		return nil, fmt.Errorf("count the GPUs: %s", words(ret))
	}
	var units []*unit
	for i := range n {
		u := d.unit(i)
		parts := d.parts(u)
		if len(parts) == 0 {
			units = append(units, u)
		}
		units = append(units, parts...)
	}
	return units, nil
}

func (d *Driver) unit(i int) *unit {
	u := &unit{Device: gpu.Device{UUID: fmt.Sprintf("unknown-%d", i), Index: i, Node: -1}, instance: -1}
	h, ret := d.lib.DeviceGetHandleByIndex(i)
	if ret != nvml.SUCCESS {
		u.Fault = "the driver gives no handle: " + words(ret)
		return u
	}
	uuid, ret := h.GetUUID()
	if ret != nvml.SUCCESS {
		u.Fault = "the driver gives no UUID: " + words(ret)
		return u
	}
	u.UUID = uuid
	u.hold(h, h)
	if u.Name, ret = h.GetName(); ret != nvml.SUCCESS {
		u.Fault = "the driver gives no name: " + words(ret)
	}
	if d.has[symPCI] {
		if pci, ret := h.GetPciInfo(); ret == nvml.SUCCESS {
			u.Bus = address(pci)
		}
	}
	d.size(u)
	return u
}

// size reads memory and, with it, the class.
func (d *Driver) size(u *unit) {
	total, _, _, ret := d.memory(u.handle)
	if ret != nvml.SUCCESS {
		u.Fault = "the driver gives no memory size: " + words(ret)
		return
	}
	u.MemoryBytes = int64(total)
	u.Class = gpu.Classify(u.Name, u.MemoryBytes)
}

// parts lists the MIG instances of a device, none when it is not split.
func (d *Driver) parts(whole *unit) []*unit {
	if whole.handle == nil || !d.has[symMIGMode] || !d.has[symMIGCount] || !d.has[symMIGDevice] {
		return nil
	}
	if mode, _, ret := whole.handle.GetMigMode(); ret != nvml.SUCCESS || mode != nvml.DEVICE_MIG_ENABLE {
		return nil
	}
	n, ret := whole.handle.GetMaxMigDeviceCount()
	if ret != nvml.SUCCESS {
		return nil
	}
	var out []*unit
	for i := range n {
		h, ret := whole.handle.GetMigDeviceHandleByIndex(i)
		if ret != nvml.SUCCESS {
			continue // instances may have gaps
		}
		uuid, ret := h.GetUUID()
		if ret != nvml.SUCCESS {
			continue
		}
		u := &unit{Device: gpu.Device{UUID: uuid, Index: whole.Index, Name: whole.Name + " MIG", Bus: whole.Bus, Node: -1}, mig: true, instance: -1}
		u.hold(h, whole.handle)
		if d.has[symInstance] {
			if id, ret := h.GetGpuInstanceId(); ret == nvml.SUCCESS {
				u.instance = id
			}
		}
		if name, ret := h.GetName(); ret == nvml.SUCCESS {
			u.Name = name
		}
		d.size(u)
		out = append(out, u)
	}
	return out
}

// words says what a return code means; the library's own words may be missing.
func words(ret nvml.Return) string {
	switch ret {
	case nvml.SUCCESS:
		return "ok"
	case nvml.ERROR_UNINITIALIZED:
		return "the driver was not initialised"
	case nvml.ERROR_NOT_SUPPORTED:
		return "not supported"
	case nvml.ERROR_NO_PERMISSION:
		return "no permission"
	case nvml.ERROR_DRIVER_NOT_LOADED:
		return "the driver is not loaded"
	case nvml.ERROR_TIMEOUT:
		return "the driver does not answer"
	case nvml.ERROR_IRQ_ISSUE:
		return "the kernel found a problem with the device's interrupts"
	case nvml.ERROR_LIB_RM_VERSION_MISMATCH:
		return "library and kernel module of the driver are of different versions: restart the agent if the driver was just upgraded, else the host"
	case nvml.ERROR_GPU_IS_LOST:
		return "the device is lost"
	case nvml.ERROR_RESET_REQUIRED:
		return "the device must be reset"
	case nvml.ERROR_OPERATING_SYSTEM:
		return "the operating system refuses"
	}
	return fmt.Sprintf("NVML error %d", ret)
}
