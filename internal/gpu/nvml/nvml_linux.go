//go:build linux && cgo

package nvml

import (
	"context"
	"fmt"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"lorayard/internal/gpu"
)

// symbols are all that this package calls.
var symbols = []string{
	"nvmlShutdown", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2",
	"nvmlDeviceGetUUID", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUtilizationRates",
}

// Driver is the open library.
type Driver struct{ lib nvml.Interface }

// Open loads the library; the error wraps ErrUnavailable when there is none.
func Open() (*Driver, error) {
	lib := nvml.New()
	switch ret := lib.Init(); ret {
	case nvml.SUCCESS:
	case nvml.ERROR_LIBRARY_NOT_FOUND, nvml.ERROR_DRIVER_NOT_LOADED:
		return nil, ErrUnavailable
	default:
		return nil, fmt.Errorf("initialise the NVIDIA driver library: %s", lib.ErrorString(ret))
	}
	for _, s := range symbols { // only a loaded library can be asked
		if err := lib.Extensions().LookupSymbol(s); err != nil {
			_ = lib.Shutdown()
			return nil, fmt.Errorf("the NVIDIA driver is too old for this agent: %w", err)
		}
	}
	return &Driver{lib: lib}, nil
}

// Close unloads the library.
func (d *Driver) Close() {
	_ = d.lib.Shutdown() // nothing can be done about a failure
}

// Devices reads every device once. A device that does not answer is in the
// list with its fault, under the index that the driver counts it at.
func (d *Driver) Devices(ctx context.Context) ([]gpu.Device, error) {
	n, ret := d.lib.DeviceGetCount()
	if ret != nvml.SUCCESS {
		return nil, fmt.Errorf("count the GPUs: %s", d.lib.ErrorString(ret))
	}
	devices := make([]gpu.Device, 0, n)
	for i := range n {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		devices = append(devices, d.device(i))
	}
	return devices, nil
}

func (d *Driver) device(i int) gpu.Device {
	out := gpu.Device{UUID: fmt.Sprintf("unknown-%d", i), Index: i}
	h, ret := d.lib.DeviceGetHandleByIndex(i)
	if ret != nvml.SUCCESS {
		out.Fault = "the driver gives no handle: " + d.lib.ErrorString(ret)
		return out
	}
	if out.UUID, ret = h.GetUUID(); ret != nvml.SUCCESS {
		out.UUID, out.Fault = fmt.Sprintf("unknown-%d", i), "the driver gives no UUID: "+d.lib.ErrorString(ret)
		return out
	}
	if out.Name, ret = h.GetName(); ret != nvml.SUCCESS {
		out.Fault = "the driver gives no name: " + d.lib.ErrorString(ret)
	}
	mem, ret := h.GetMemoryInfo()
	if ret != nvml.SUCCESS {
		out.Fault = "the driver gives no memory size: " + d.lib.ErrorString(ret)
	}
	out.MemoryBytes = int64(mem.Total)
	out.Class = gpu.Classify(out.Name, out.MemoryBytes)
	return out
}

// Utilization reads how busy each device was over the driver's last sample
// period, in percent, by UUID. A device that does not answer is left out.
func (d *Driver) Utilization(ctx context.Context) (map[string]float64, error) {
	n, ret := d.lib.DeviceGetCount()
	if ret != nvml.SUCCESS {
		return nil, fmt.Errorf("count the GPUs: %s", d.lib.ErrorString(ret))
	}
	out := make(map[string]float64, n)
	for i := range n {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		h, ret := d.lib.DeviceGetHandleByIndex(i)
		if ret != nvml.SUCCESS {
			continue
		}
		uuid, ret := h.GetUUID()
		if ret != nvml.SUCCESS {
			continue
		}
		if u, ret := h.GetUtilizationRates(); ret == nvml.SUCCESS {
			out[uuid] = float64(u.Gpu)
		}
	}
	return out, nil
}
