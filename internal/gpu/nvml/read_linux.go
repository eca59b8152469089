//go:build linux && cgo

package nvml

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"lorayard/internal/gpu"
)

// Fields by their numbers in nvml.h, where the binding has no name for them.
const (
	fieldRecovery   = 230 // NVML_FI_DEV_GET_GPU_RECOVERY_ACTION
	fieldSWThermal  = 269 // NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN, ns
	fieldHWThermal  = 270 // ..._HW_THERM_SLOWDOWN
	fieldPowerBrake = 271 // ..._HW_POWER_BRAKE_SLOWDOWN
	firstNewField   = 186 // drivers of before 2022 know none from here on
	milli           = 1e-3
	nano            = 1e-9
	mega            = 1e6
	mostLinks       = nvml.NVLINK_MAX_LINKS
	unknown32Bits   = math.MaxUint32
)

// hotFields are read in one call: each call waits for the driver's one lock.
var hotFields = []uint32{
	nvml.FI_DEV_ECC_SBE_VOL_TOTAL, nvml.FI_DEV_ECC_DBE_VOL_TOTAL, nvml.FI_DEV_MEMORY_TEMP, nvml.FI_DEV_TOTAL_ENERGY_CONSUMPTION,
	nvml.FI_DEV_PCIE_REPLAY_COUNTER, nvml.FI_DEV_REMAPPED_COR, nvml.FI_DEV_REMAPPED_UNC, nvml.FI_DEV_REMAPPED_PENDING,
	nvml.FI_DEV_REMAPPED_FAILURE, nvml.FI_DEV_PERF_POLICY_POWER, nvml.FI_DEV_POWER_INSTANT, fieldRecovery, fieldSWThermal,
	fieldHWThermal, fieldPowerBrake,
}

var warmFields = []uint32{
	nvml.FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL, nvml.FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL, nvml.FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL,
}

// Read takes the readings of a tier into dst; what a device does not tell is
// NaN. The error names the devices that do not answer.
func (d *Driver) Read(ctx context.Context, tier gpu.Tier, dst []gpu.Reading) error {
	if err := d.thread.do(ctx, d.tiers[tier]); err != nil {
		return err
	}
	defer d.thread.done()
	copy(dst, d.readings)
	return d.failed
}

func (d *Driver) read(tier gpu.Tier) error {
	if d.bad && time.Since(d.reopened) >= d.again {
		d.stale = true
	}
	if d.stale {
		if err := d.reopen(); err != nil {
			return err
		}
	}
	var failed error
	dead := 0
	if tier == gpu.Hot {
		d.bad = false
	}
	for i, u := range d.units {
		r := &d.readings[i]
		if u.handle == nil {
			continue // its fault is in the inventory
		}
		if u.gone {
			*r = gpu.BlankReading(u.UUID)
			r.Lost, r.ResetRequired, r.Returned, u.bad, d.bad = !u.refused, u.refused, u.returned, true, true
			continue
		}
		ret := nvml.SUCCESS
		if tier == gpu.Hot {
			ret = d.hot(u, r)
		} else {
			d.warm(u, r)
		}
		switch ret {
		case nvml.SUCCESS, nvml.ERROR_NOT_SUPPORTED:
		case nvml.ERROR_UNINITIALIZED, nvml.ERROR_DRIVER_NOT_LOADED:
			dead++
		default:
			failed = errors.Join(failed, fmt.Errorf("%s: %s", u.UUID, words(ret)))
		}
	}
	if dead > 0 { // not one device is lost, but the driver under all of them
		d.stale, d.anew = true, true
		return errors.New("the driver is being loaded anew")
	}
	return failed
}

// reopen initialises the library again, after the driver under it went, or to
// see whether a device that was lost is there again.
func (d *Driver) reopen() error {
	d.open.Lock()
	defer d.open.Unlock()
	d.reopened = time.Now()
	_ = d.lib.Shutdown() // what it answers is about a driver that is gone
	if ret := d.lib.Init(); ret != nvml.SUCCESS {
		return fmt.Errorf("open the driver anew: %s", words(ret))
	}
	units, err := d.list()
	if err != nil {
		return err
	}
	now, mute := map[string]*unit{}, map[int]bool{}
	for _, u := range units {
		now[u.UUID] = u
		mute[u.Index] = mute[u.Index] || u.handle == nil
	}
	for i, u := range d.units {
		// Of one that has to be reset not even the name is told.
		u.refused = mute[u.Index] && d.readings[i].ResetRequired
		n := now[u.UUID]
		if u.gone = n == nil || n.handle == nil; !u.gone {
			u.instance = n.instance
			u.hold(n.handle, n.whole)
		}
	}
	if d.anew { // else the other devices are what they were
		d.generation.Add(1)
	}
	d.stale, d.anew = false, false
	d.opened.Add(1)
	d.publish()
	return nil
}

// worse keeps the answer that says most about the device's state.
func worse(a, b nvml.Return) nvml.Return {
	for _, ret := range []nvml.Return{nvml.ERROR_UNINITIALIZED, nvml.ERROR_DRIVER_NOT_LOADED, nvml.ERROR_GPU_IS_LOST, nvml.ERROR_RESET_REQUIRED} {
		if a == ret || b == ret {
			return ret
		}
	}
	if a == nvml.SUCCESS || a == nvml.ERROR_NOT_SUPPORTED {
		return b
	}
	return a
}

// memory gives bytes: all, used without reserved, and reserved, which older
// drivers do not tell apart.
func (d *Driver) memory(h nvml.Device) (total, used uint64, reserved float64, _ nvml.Return) {
	if d.has[symMemory2] {
		m, ret := h.GetMemoryInfo_v2()
		if ret != nvml.ERROR_NOT_SUPPORTED && ret != nvml.ERROR_FUNCTION_NOT_FOUND {
			return m.Total, m.Used, float64(m.Reserved), ret
		}
	}
	if !d.has[symMemory] {
		return 0, 0, 0, nvml.ERROR_NOT_SUPPORTED
	}
	m, ret := h.GetMemoryInfo()
	return m.Total, m.Used, math.NaN(), ret
}

// prepare makes values ready to be read again, and says how many of them this
// driver knows.
func (d *Driver) prepare(values *[]nvml.FieldValue, which []uint32) int {
	if *values == nil {
		*values = make([]nvml.FieldValue, len(which))
		for i, id := range which {
			(*values)[i].FieldId = id
		}
	}
	v := *values
	for i := range v {
		v[i].NvmlReturn = uint32(nvml.ERROR_NOT_SUPPORTED)
	}
	n := len(v)
	if d.oldFields {
		for n > 0 && v[n-1].FieldId >= firstNewField {
			n--
		}
	}
	return n
}

// number is one of the values that were read, NaN when there is none.
func number(values []nvml.FieldValue, i int) float64 {
	if i >= len(values) || nvml.Return(values[i].NvmlReturn) != nvml.SUCCESS {
		return math.NaN()
	}
	b := values[i].Value[:]
	switch nvml.ValueType(values[i].ValueType) {
	case nvml.VALUE_TYPE_DOUBLE:
		return math.Float64frombits(binary.LittleEndian.Uint64(b))
	case nvml.VALUE_TYPE_UNSIGNED_INT:
		return float64(binary.LittleEndian.Uint32(b))
	case nvml.VALUE_TYPE_SIGNED_INT:
		return float64(int32(binary.LittleEndian.Uint32(b)))
	case nvml.VALUE_TYPE_SIGNED_LONG_LONG:
		return float64(int64(binary.LittleEndian.Uint64(b)))
	case nvml.VALUE_TYPE_UNSIGNED_SHORT:
		return float64(binary.LittleEndian.Uint16(b))
	}
	return float64(binary.LittleEndian.Uint64(b))
}

// warm reads what is read every 15 seconds.
func (d *Driver) warm(u *unit, r *gpu.Reading) {
	whole := u.whole
	optional := func(symbol string, scale float64, read func() (uint32, nvml.Return)) float64 {
		if d.has[symbol] {
			if v, ret := read(); ret == nvml.SUCCESS && v != unknown32Bits {
				return float64(v) * scale
			}
		}
		return math.NaN()
	}
	r.PowerLimit = optional(symPowerLimit, milli, whole.GetEnforcedPowerLimit)
	r.ClockSM = optional(symClock, mega, func() (uint32, nvml.Return) { return whole.GetClockInfo(nvml.CLOCK_SM) })
	r.ClockMem = optional(symClock, mega, func() (uint32, nvml.Return) { return whole.GetClockInfo(nvml.CLOCK_MEM) })
	width := func(read func() (int, nvml.Return)) func() (uint32, nvml.Return) {
		return func() (uint32, nvml.Return) {
			n, ret := read()
			return uint32(n), ret
		}
	}
	r.PCIeWidth = optional(symWidth, 1, width(whole.GetCurrPcieLinkWidth)) / optional(symMaxWidth, 1, width(whole.GetMaxPcieLinkWidth))
	r.TemperatureMargin = math.NaN()
	if d.has[symMargin] {
		if m, ret := whole.GetMarginTemperature(); ret == nvml.SUCCESS {
			r.TemperatureMargin = float64(m.MarginTemperature)
		}
	}
	up, all := d.links(whole)
	r.NVLinksUp, r.NVLinks = float64(up), float64(all)
	var fields []nvml.FieldValue
	if n := d.prepare(&u.warm, warmFields); d.has[symFields] && whole.GetFieldValues(u.warm[:n]) == nvml.SUCCESS { // else the hot tier says what is wrong
		fields = u.warm[:n]
	}
	for i := range r.NVLinkErrors {
		r.NVLinkErrors[i] = number(fields, i)
	}
}

// links counts the NVLinks of a device.
func (d *Driver) links(h nvml.Device) (up, all int) {
	if !d.has[symLinkState] {
		return 0, 0
	}
	for l := range mostLinks {
		state, ret := h.GetNvLinkState(l)
		if ret != nvml.SUCCESS {
			break // there are no more
		}
		all++
		if state == nvml.FEATURE_ENABLED {
			up++
		}
	}
	return up, all
}

// Links says how well each device is connected to each other one, see
// gpu.Links, in the order of the inventory; nil where the driver does not tell.
func (d *Driver) Links(ctx context.Context) ([][]int, error) {
	var out [][]int
	if err := d.thread.do(ctx, func() {
		if d.has[symAncestor] {
			out = d.matrix()
		}
	}); err != nil {
		return nil, err
	}
	defer d.thread.done()
	return out, nil
}

func (d *Driver) matrix() [][]int {
	devices, wires := make([]gpu.Device, len(d.units)), make([][]gpu.Wire, len(d.units))
	for i, u := range d.units {
		devices[i], wires[i] = u.Device, d.wires(u)
	}
	return gpu.Links(devices, wires, func(i, j int) gpu.Path {
		a, b := d.units[i], d.units[j]
		switch {
		case a.handle == nil || b.handle == nil:
			return gpu.PathUnknown
		case a.Bus == b.Bus && a.Bus != "": // parts of one device
			return gpu.PathBoard
		}
		level, ret := a.whole.GetTopologyCommonAncestor(b.whole)
		if ret != nvml.SUCCESS {
			return gpu.PathUnknown
		}
		return gpu.Path(level)
	})
}

// wires are the NVLinks of a device that are up; a MIG instance has none.
func (d *Driver) wires(u *unit) (out []gpu.Wire) {
	if u.whole == nil || u.mig || !d.has[symLinkState] || !d.has[symLinkPCI] {
		return nil
	}
	for l := range mostLinks {
		state, ret := u.whole.GetNvLinkState(l)
		if ret != nvml.SUCCESS {
			break // there are no more
		}
		if state != nvml.FEATURE_ENABLED {
			continue
		}
		if d.has[symLinkType] {
			if kind, ret := u.whole.GetNvLinkRemoteDeviceType(l); ret == nvml.SUCCESS && kind == nvml.NVLINK_DEVICE_TYPE_SWITCH {
				out = append(out, gpu.Wire{Switch: true})
				continue
			}
		}
		if pci, ret := u.whole.GetNvLinkRemotePciInfo(l); ret == nvml.SUCCESS {
			out = append(out, gpu.Wire{Remote: address(pci)})
		}
	}
	return out
}

func address(pci nvml.PciInfo) string {
	return gpu.NormalBus(fmt.Sprintf("%08x:%02x:%02x.0", pci.Domain, pci.Bus, pci.Device))
}
