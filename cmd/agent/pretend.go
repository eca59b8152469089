package main

import (
	"hash/fnv"
	"math"
	"sync"
	"time"

	"lorayard/internal/metrics"
)

// pretended makes believable readings of devices that do not exist: dashboards
// are looked at on machines without a GPU.
type pretended struct {
	mu      sync.Mutex
	devices map[string]*pretendedDevice
}

type pretendedDevice struct {
	at                    time.Time
	celsius, joules, slow float64
}

// read fills in what a device that is busy, idle or gone would show.
func (p *pretended) read(d *metrics.Device) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.devices == nil {
		p.devices = map[string]*pretendedDevice{}
	}
	now := time.Now()
	x := p.devices[d.UUID]
	if x == nil {
		x = &pretendedDevice{at: now, celsius: 36}
		p.devices[d.UUID] = x
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(d.UUID)) // never fails
	own := float64(h.Sum32()%1000) / 1000
	wave := math.Sin(float64(now.UnixMilli())/7000 + 6*own)
	d.Driver, d.CUDA = "pretended", "pretended"
	util, watts, target := 0.0, 68+6*own, 34+5*own
	if d.Busy {
		util, watts, target = 0.93+0.05*wave, 590+60*own+30*wave, 62+9*own
	}
	passed := now.Sub(x.at).Seconds()
	x.at = now
	x.celsius += (target - x.celsius) * (1 - math.Exp(-passed/30))
	x.joules += watts * passed
	if d.Busy {
		x.slow += passed * 0.05 * own
	}
	if d.Health == "missing" {
		return // nothing answers
	}
	d.Utilization, d.MemoryUsed, d.MemoryReserved, d.MemoryForeign = util, 0, 479<<20, 0
	if d.Busy {
		d.MemoryUsed = (0.6 + 0.2*own) * d.MemoryTotal
	}
	d.Power, d.PowerLimit, d.Temperature, d.MemoryTemperature, d.TemperatureMargin = watts, 700, x.celsius, x.celsius+8, 87-x.celsius
	d.ClockSM, d.ClockMem = 345e6+util*1.635e9, 2.619e9
	d.Energy, d.Throttled = x.joules, map[string]float64{"power_cap": x.slow}
	d.ECCCorrected, d.ECCUncorrected, d.RemapPending, d.RemapFailed, d.RemapsCorrected, d.RemapsUncorrected = 0, 0, 0, 0, 0, 0
	d.RecoveryAction, d.PCIeReplays, d.PCIeWidth, d.NVLinksUp, d.NVLinksN = 0, 9, 1, 18, 18
	if d.Health == "quarantined" {
		d.RecoveryAction = 1
	}
}
