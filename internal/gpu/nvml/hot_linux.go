//go:build linux && cgo

package nvml

/*
#cgo noescape lorayard_hot
#cgo nocallback lorayard_hot
#include <dlfcn.h>
#include <stddef.h>

// What go-nvml makes of these calls allocates for every answer, and is a
// crossing from Go to C for each. Here one crossing reads a device. The
// symbols are looked up, never linked: one that is missing is not called.

enum { NOT_SUPPORTED = 3, FUNCTION_NOT_FOUND = 13, NOT_ASKED = -1 };

struct memory1 { unsigned long long total, free, used; };
struct memory2 { unsigned version; unsigned long long total, reserved, free, used; };
struct rates { unsigned gpu, memory; };

struct hot {
	int memory_ret, fields_ret, rates_ret, temperature_ret, reasons_ret, power_ret, has_reserved;
	int want_power; // the fields do not tell it
	struct memory2 memory;
	struct rates rates;
	unsigned temperature, power;
	unsigned long long reasons;
};

static int (*memory1)(void *, struct memory1 *);
static int (*memory2)(void *, struct memory2 *);
static int (*fields)(void *, int, void *);
static int (*rates)(void *, struct rates *);
static int (*temperature)(void *, int, unsigned *);
static int (*reasons)(void *, unsigned long long *);
static int (*power)(void *, unsigned *);

static void lorayard_find(const char *path) {
	void *l = dlopen(path, RTLD_LAZY | RTLD_GLOBAL);
	if (!l) return;
	memory1 = (int (*)(void *, struct memory1 *))dlsym(l, "nvmlDeviceGetMemoryInfo");
	memory2 = (int (*)(void *, struct memory2 *))dlsym(l, "nvmlDeviceGetMemoryInfo_v2");
	fields = (int (*)(void *, int, void *))dlsym(l, "nvmlDeviceGetFieldValues");
	rates = (int (*)(void *, struct rates *))dlsym(l, "nvmlDeviceGetUtilizationRates");
	temperature = (int (*)(void *, int, unsigned *))dlsym(l, "nvmlDeviceGetTemperature");
	reasons = (int (*)(void *, unsigned long long *))dlsym(l, "nvmlDeviceGetCurrentClocksEventReasons");
	power = (int (*)(void *, unsigned *))dlsym(l, "nvmlDeviceGetPowerUsage");
}

// lorayard_hot reads memory of h, which may be a part of whole, and all else of
// whole.
static void lorayard_hot(void *h, void *whole, int n, void *values, struct hot *out) {
	out->memory_ret = out->fields_ret = out->rates_ret = out->temperature_ret = out->reasons_ret = out->power_ret = NOT_ASKED;
	out->has_reserved = 0;
	if (memory2) {
		out->memory.version = sizeof(struct memory2) | 2 << 24;
		out->memory_ret = memory2(h, &out->memory);
		out->has_reserved = 1;
	}
	if (memory1 && (!memory2 || out->memory_ret == NOT_SUPPORTED || out->memory_ret == FUNCTION_NOT_FOUND)) {
		struct memory1 m;
		out->memory_ret = memory1(h, &m);
		out->memory.total = m.total;
		out->memory.used = m.used;
		out->has_reserved = 0;
	}
	if (fields) out->fields_ret = fields(whole, n, values);
	if (rates && h == whole) out->rates_ret = rates(whole, &out->rates);
	if (temperature) out->temperature_ret = temperature(whole, 0, &out->temperature);
	if (power && out->want_power) out->power_ret = power(whole, &out->power);
	if (reasons) out->reasons_ret = reasons(whole, &out->reasons);
}
*/
import "C"

import (
	"math"
	"reflect"
	"unsafe"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"lorayard/internal/gpu"
)

// pointer is a handle as the library itself has it.
type pointer = unsafe.Pointer

// find looks the symbols of the hot tier up.
func find(path string) {
	p := append([]byte(path), 0)
	C.lorayard_find((*C.char)(unsafe.Pointer(&p[0])))
}

// raw takes the library's handle out of the binding's.
func raw(h nvml.Device) pointer {
	if h == nil {
		return nil
	}
	return reflect.ValueOf(h).FieldByName("Handle").UnsafePointer()
}

// hotAnswer is where the library writes what is read every second.
type hotAnswer struct{ c C.struct_hot }

// hot reads what is read every second. It allocates nothing.
func (d *Driver) hot(u *unit, r *gpu.Reading) nvml.Return {
	n := d.prepare(&u.hot, hotFields)
	a := &u.answer.c
	C.lorayard_hot(u.raw, u.rawWhole, C.int(n), unsafe.Pointer(&u.hot[0]), a)
	if nvml.Return(a.fields_ret) == nvml.ERROR_INVALID_ARGUMENT && !d.oldFields {
		d.oldFields = true
		return d.hot(u, r)
	}
	nan := math.NaN()
	r.MemoryTotal, r.MemoryUsed, r.MemoryReserved, r.Utilization, r.Temperature, r.Reasons = nan, nan, nan, nan, nan, 0
	if a.memory_ret == 0 {
		r.MemoryTotal, r.MemoryUsed = float64(a.memory.total), float64(a.memory.used)
		if a.has_reserved != 0 {
			r.MemoryReserved = float64(a.memory.reserved)
		}
	}
	if a.rates_ret == 0 {
		r.Utilization = float64(a.rates.gpu) / 100
	}
	if a.temperature_ret == 0 {
		r.Temperature = float64(a.temperature)
	}
	if a.reasons_ret == 0 {
		r.Reasons = uint64(a.reasons)
	}
	values := u.hot[:n]
	if a.fields_ret != 0 {
		values = nil
	}
	r.ECCCorrected, r.ECCUncorrected, r.MemoryTemperature = number(values, 0), number(values, 1), number(values, 2)
	r.Energy, r.PCIeReplays = number(values, 3)*milli, number(values, 4)
	r.RemapsCorrected, r.RemapsUncorrected, r.RemapPending, r.RemapFailed = number(values, 5), number(values, 6), number(values, 7), number(values, 8)
	r.Power, r.Recovery = number(values, 10)*milli, number(values, 11)
	if a.power_ret == 0 {
		r.Power = float64(a.power) * milli
	}
	if math.IsNaN(r.Power) && a.fields_ret == 0 {
		a.want_power = 1 // from the next poll on
	}
	r.Throttled = [5]float64{number(values, 9) * nano, nan, number(values, 13) * nano, number(values, 14) * nano, number(values, 12) * nano}
	answer := nvml.SUCCESS
	for _, ret := range [...]C.int{a.memory_ret, a.fields_ret, a.rates_ret, a.temperature_ret} {
		if ret != C.NOT_ASKED {
			answer = worse(answer, nvml.Return(ret))
		}
	}
	r.Lost, r.ResetRequired = answer == nvml.ERROR_GPU_IS_LOST, answer == nvml.ERROR_RESET_REQUIRED
	switch {
	case r.Lost || r.ResetRequired:
		u.bad, d.bad = true, true
	case u.bad && answer == nvml.SUCCESS:
		u.bad = false
		u.returned++
	}
	r.Returned = u.returned
	return answer
}
