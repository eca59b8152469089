//go:build linux && cgo

package nvml

import (
	"context"
	"slices"
	"time"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"lorayard/internal/gpu"
)

// Measure calls everything that is read of a device so many times on each, and
// whole polls as often, and says how long the driver took. This keeps the driver
// busy: it is for hosts on which nothing runs that matters.
func (d *Driver) Measure(ctx context.Context, times int) ([]Timing, error) {
	type call struct {
		name, symbol string
		few          bool // it is slow, or has to be: a tenth of the times will do
		do           func(*unit) nvml.Return
	}
	ret := func(_ uint32, r nvml.Return) nvml.Return { return r }
	calls := []call{
		{"memory", symMemory2, false, func(u *unit) nvml.Return { _, r := u.handle.GetMemoryInfo_v2(); return r }},
		{"fields of the hot tier", symFields, false, func(u *unit) nvml.Return {
			n := d.prepare(&u.hot, hotFields)
			return u.whole.GetFieldValues(u.hot[:n])
		}},
		{"fields of the warm tier", symFields, false, func(u *unit) nvml.Return {
			n := d.prepare(&u.warm, warmFields)
			return u.whole.GetFieldValues(u.warm[:n])
		}},
		{"utilization", symUtilization, false, func(u *unit) nvml.Return { _, r := u.whole.GetUtilizationRates(); return r }},
		{"temperature", symTemperature, false, func(u *unit) nvml.Return { return ret(u.whole.GetTemperature(nvml.TEMPERATURE_GPU)) }},
		{"clock event reasons", symReasons, false, func(u *unit) nvml.Return { _, r := u.whole.GetCurrentClocksEventReasons(); return r }},
		{"power limit", symPowerLimit, false, func(u *unit) nvml.Return { return ret(u.whole.GetEnforcedPowerLimit()) }},
		{"clock", symClock, false, func(u *unit) nvml.Return { return ret(u.whole.GetClockInfo(nvml.CLOCK_SM)) }},
		{"PCIe width", symWidth, false, func(u *unit) nvml.Return { _, r := u.whole.GetCurrPcieLinkWidth(); return r }},
		{"temperature margin", symMargin, false, func(u *unit) nvml.Return { _, r := u.whole.GetMarginTemperature(); return r }},
		{"NVLink state", symLinkState, false, func(u *unit) nvml.Return { _, r := u.whole.GetNvLinkState(0); return r }},
		{"ECC mode", symECCMode, false, func(u *unit) nvml.Return { _, _, r := u.whole.GetEccMode(); return r }},
		{"MIG mode", symMIGMode, false, func(u *unit) nvml.Return { _, _, r := u.whole.GetMigMode(); return r }},
		{"row remap histogram", symHistogram, true, func(u *unit) nvml.Return { _, r := u.whole.GetRowRemapperHistogram(); return r }},
		{"SRAM errors", symSRAM, true, func(u *unit) nvml.Return { _, r := u.whole.GetSramEccErrorStatus(); return r }},
		{"fabric", symFabric, true, func(u *unit) nvml.Return { _, r := u.whole.GetGpuFabricInfoV().V2(); return r }},
		{"processes", symProcesses, true, func(u *unit) nvml.Return { _, r := u.handle.GetComputeRunningProcesses(); return r }},
		{"InfoROM", symInfoROM, true, func(u *unit) nvml.Return { return u.whole.ValidateInforom() }},
	}
	var out []Timing
	for _, c := range calls {
		n := times
		if c.few {
			n = max(1, times/10)
		}
		t := Timing{Call: c.name, Answer: "the library has no " + c.symbol}
		if !d.has[c.symbol] {
			out = append(out, t)
			continue
		}
		var took []time.Duration
		answer := nvml.SUCCESS
		if err := d.thread.doFor(ctx, d.opening, func() {
			for _, u := range d.units {
				for range n {
					if u.handle == nil || u.gone || ctx.Err() != nil {
						break
					}
					began := time.Now()
					r := c.do(u)
					took = append(took, time.Since(began))
					if r != nvml.SUCCESS {
						answer = r
					}
				}
			}
		}); err != nil {
			return out, err
		}
		d.thread.done()
		out = append(out, summary(c.name, words(answer), took))
	}
	for _, tier := range []gpu.Tier{gpu.Hot, gpu.Warm} {
		var took []time.Duration
		answer := words(nvml.SUCCESS)
		if err := d.thread.doFor(ctx, d.opening, func() {
			for range times {
				began := time.Now()
				if err := d.read(tier); err != nil {
					answer = err.Error()
				}
				took = append(took, time.Since(began))
			}
		}); err != nil {
			return out, err
		}
		d.thread.done()
		out = append(out, summary("whole "+string(tier)+" poll of all devices", answer, took))
	}
	return out, nil
}

func summary(call, answer string, took []time.Duration) Timing {
	t := Timing{Call: call, Answer: answer, Times: len(took)}
	if len(took) > 0 {
		slices.Sort(took)
		t.P50, t.P99, t.Most = took[len(took)/2], took[len(took)*99/100], took[len(took)-1]
	}
	return t
}
