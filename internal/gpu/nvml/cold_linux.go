//go:build linux && cgo

package nvml

import (
	"context"
	"math"
	"slices"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"lorayard/internal/gpu"
)

const (
	fabricDone       = nvml.GPU_FABRIC_STATE_COMPLETED
	fabricNone       = nvml.GPU_FABRIC_STATE_NOT_SUPPORTED
	fabricNarrow     = nvml.GPU_FABRIC_HEALTH_MASK_DEGRADED_BW_TRUE
	fabricNarrowMask = nvml.GPU_FABRIC_HEALTH_MASK_WIDTH_DEGRADED_BW
)

// Details reads of the devices what seldom changes; this takes milliseconds for
// each, and asks the driver for what it only tells under its lock. A device that
// is not there, or does not answer, is left out.
func (d *Driver) Details(ctx context.Context, uuids []string) ([]gpu.Detail, error) {
	wanted := slices.Clone(uuids)
	var out []gpu.Detail
	if err := d.thread.do(ctx, func() {
		for _, u := range d.units {
			if u.handle == nil || u.gone || d.stale || !slices.Contains(wanted, u.UUID) || ctx.Err() != nil {
				continue
			}
			if _, ret := u.whole.GetUUID(); ret == nvml.SUCCESS {
				out = append(out, d.detail(u))
			}
		}
	}); err != nil {
		return nil, err
	}
	defer d.thread.done()
	return out, nil
}

func (d *Driver) detail(u *unit) gpu.Detail {
	out := gpu.Detail{UUID: u.UUID}
	h := u.whole
	on := func(s nvml.EnableState) bool { return s == nvml.FEATURE_ENABLED }
	if d.has[symPersistence] {
		if v, ret := h.GetPersistenceMode(); ret == nvml.SUCCESS {
			out.Persistence = new(on(v))
		}
	}
	if d.has[symComputeMode] {
		if v, ret := h.GetComputeMode(); ret == nvml.SUCCESS {
			out.ComputeMode = new(int(v))
		}
	}
	if d.has[symECCMode] {
		if now, next, ret := h.GetEccMode(); ret == nvml.SUCCESS {
			out.ECC = &gpu.Mode{Now: on(now), Next: on(next)}
		}
	}
	if d.has[symMIGMode] {
		if now, next, ret := h.GetMigMode(); ret == nvml.SUCCESS {
			out.MIG = &gpu.Mode{Now: now != 0, Next: next != 0}
		}
	}
	if d.has[symHistogram] {
		if v, ret := h.GetRowRemapperHistogram(); ret == nvml.SUCCESS {
			out.Rows = &gpu.Rows{Max: int(v.Max), High: int(v.High), Partial: int(v.Partial), Low: int(v.Low), None: int(v.None)}
		}
	}
	if d.has[symInfoROM] {
		switch h.ValidateInforom() {
		case nvml.SUCCESS:
			out.InfoROM = new(true)
		case nvml.ERROR_CORRUPTED_INFOROM:
			out.InfoROM = new(false)
		}
	}
	if d.has[symSRAM] {
		if v, ret := h.GetSramEccErrorStatus(); ret == nvml.SUCCESS {
			out.SRAMWorn = new(v.BThresholdExceeded != 0)
		}
	}
	if d.has[symFabric] {
		if v, ret := h.GetGpuFabricInfoV().V2(); ret == nvml.SUCCESS && v.State != fabricNone {
			out.Fabric = &gpu.Fabric{
				Ready:    v.State == fabricDone && nvml.Return(v.Status) == nvml.SUCCESS,
				Degraded: v.HealthMask&fabricNarrowMask == fabricNarrow,
			}
		}
	}
	if d.has[symGen] && d.has[symMaxGen] {
		now, ret := h.GetCurrPcieLinkGeneration()
		most, ret2 := h.GetMaxPcieLinkGeneration()
		if ret == nvml.SUCCESS && ret2 == nvml.SUCCESS {
			out.PCIe = &[2]int{now, most}
		}
	}
	if d.has[symProcesses] {
		if ps, ret := u.handle.GetComputeRunningProcesses(); ret == nvml.SUCCESS {
			out.ProcessesOK = true
			for _, p := range ps {
				bytes := int64(-1)
				if p.UsedGpuMemory != math.MaxUint64 {
					bytes = int64(p.UsedGpuMemory)
				}
				out.Processes = append(out.Processes, gpu.Process{PID: int(p.Pid), Bytes: bytes})
			}
		}
	}
	return out
}
