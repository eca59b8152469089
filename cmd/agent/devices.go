package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"time"

	"lorayard/internal/gpu"
	"lorayard/internal/gpu/nvml"
	"lorayard/internal/metrics"
)

// host is the devices that an agent has, and the driver that reads them.
type host struct {
	list   []gpu.Device
	links  [][]int      // see gpu.Links; nil: not known
	driver *nvml.Driver // nil: they are pretended
}

// openDevices reads the host's devices, or pretends them.
func openDevices(ctx context.Context, s settings) (*host, error) {
	if s.PretendGPUs > 0 {
		return &host{list: gpu.Pretend(s.PretendGPUs, s.PretendType, s.ID)}, nil
	}
	d, err := nvml.Open(nvml.Options{Path: s.GPULibrary})
	if err != nil {
		return nil, fmt.Errorf("open the GPU driver: %w (set PRETEND_GPUS=1 to train on the CPU, for development)", err)
	}
	h := &host{driver: d}
	if h.list, err = d.Devices(ctx); err == nil && len(h.list) == 0 {
		err = errors.New("this host has no GPU that the driver knows; run `agent doctor`")
	}
	if err == nil {
		h.links, err = d.Links(ctx)
	}
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("read the GPUs: %w", err)
	}
	return h, nil
}

func (h *host) close() {
	if h.driver != nil {
		h.driver.Close()
	}
}

// watch gives what fills in a device's readings at a scrape, what looks at devices
// before they are lent, and what polls until its context ends.
func (h *host) watch(health *gpu.Health, m *metrics.Agent, log *slog.Logger) (read func(*metrics.Device), preflight func(context.Context, []string) error, poll func(context.Context)) {
	if h.driver == nil {
		return (&pretended{}).read, nil, func(ctx context.Context) { <-ctx.Done() }
	}
	generation := h.driver.Generation()
	p := &gpu.Poller{Source: h.driver, Health: health, Log: log, Polled: func(t gpu.Tier, took time.Duration, err error) {
		tier := string(t)
		m.PollSeconds.WithLabelValues(tier).Observe(took.Seconds())
		if err == nil {
			m.PollLast.WithLabelValues(tier).SetToCurrentTime()
		} else {
			m.PollFailures.WithLabelValues(tier).Inc()
		}
		if g := h.driver.Generation(); g != generation {
			m.Reopened.Add(float64(g - generation))
			generation = g
		}
		m.Wedged.Set(0)
		if errors.Is(err, gpu.ErrWedged) {
			m.Wedged.Set(1)
		}
	}}
	fill := func(d *metrics.Device) {
		d.Driver, d.CUDA = h.driver.Versions() // kept, not asked for
		s := p.Snapshot()
		for i, is := range h.list {
			if is.UUID != d.UUID {
				continue
			}
			d.PCI, d.NUMA = is.Bus, is.Node
			if s != nil && time.Since(s.At) < oldAfter {
				show(d, s.Devices[i])
			}
		}
	}
	return fill, p.Preflight, func(ctx context.Context) { p.Run(ctx, h.list) }
}

// oldAfter is when a reading is no news any more, and is not shown.
const oldAfter = time.Minute

// show puts what was read of a device into its metrics.
func show(d *metrics.Device, r gpu.Reading) {
	if !math.IsNaN(r.MemoryTotal) {
		d.MemoryTotal = r.MemoryTotal
	}
	d.Utilization, d.MemoryUsed, d.MemoryReserved = r.Utilization, r.MemoryUsed, r.MemoryReserved
	d.Power, d.PowerLimit, d.Energy = r.Power, r.PowerLimit, r.Energy
	d.Temperature, d.MemoryTemperature, d.TemperatureMargin = r.Temperature, r.MemoryTemperature, r.TemperatureMargin
	d.ClockSM, d.ClockMem, d.RecoveryAction = r.ClockSM, r.ClockMem, r.Recovery
	d.ECCCorrected, d.ECCUncorrected = r.ECCCorrected, r.ECCUncorrected
	d.RemapPending, d.RemapFailed, d.RemapsCorrected, d.RemapsUncorrected = r.RemapPending, r.RemapFailed, r.RemapsCorrected, r.RemapsUncorrected
	d.PCIeReplays, d.PCIeWidth, d.NVLinksUp, d.NVLinksN = r.PCIeReplays, r.PCIeWidth, r.NVLinksUp, r.NVLinks
	d.MemoryForeign = 0
	if d.Health == string(gpu.StateForeign) {
		d.MemoryForeign = r.MemoryUsed
	}
	d.Throttled, d.NVLinkErrors = map[string]float64{}, map[string]float64{}
	for i, reason := range gpu.Throttles {
		d.Throttled[reason] = r.Throttled[i]
	}
	for i, kind := range gpu.NVLinkErrorKinds {
		if !math.IsNaN(r.NVLinks) && r.NVLinks > 0 {
			d.NVLinkErrors[kind] = r.NVLinkErrors[i]
		}
	}
}
