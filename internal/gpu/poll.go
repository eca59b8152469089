package gpu

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"slices"
	"sync/atomic"
	"time"
)

// How often a device is looked at. The first tier is one call for about twenty
// numbers; calls of a driver wait for each other and are not free, so that what
// seldom changes is read seldom.
const (
	hotEvery  = time.Second
	warmEvery = 15 * time.Second
)

// Tier is a group of readings that are taken together.
type Tier string

// The tiers.
const (
	Hot  Tier = "hot"  // once a second: memory, power, errors, the driver's own verdict
	Warm Tier = "warm" // every 15 s: clocks, links
)

// ErrWedged says that a call of the driver has not come back, so that nothing
// else can be asked of it.
var ErrWedged = errors.New("a call of the GPU driver does not come back")

// Source reads the devices of a host. Its calls come back in bounded time.
type Source interface {
	// Devices reads what there is. It is called once, and again when the driver
	// was loaded anew.
	Devices(ctx context.Context) ([]Device, error)
	// Versions are those of the driver and of CUDA; empty: not known.
	Versions() (driver, cuda string)
	// Read takes the readings of a tier into dst, which holds a reading for
	// each device of the inventory, in its order. A device that does not answer
	// keeps what is not known as NaN.
	Read(ctx context.Context, tier Tier, dst []Reading) error
	// Generation grows when the driver was loaded anew.
	Generation() int
	// Events hands over what the driver tells unasked, until ctx ends.
	Events(ctx context.Context, heard func(Fault)) error
}

// Poller reads the devices of a host again and again, tells Health, and keeps
// the newest readings for whoever wants to see them. Nobody who looks at them
// waits for the driver.
type Poller struct {
	Source Source
	Health *Health
	Log    *slog.Logger
	// Polled is called after every poll of a tier; err says that readings are missing.
	Polled func(t Tier, took time.Duration, err error)

	snapshot atomic.Pointer[Snapshot]
	risen    []risen
}

// risen makes counters that go on where a driver that was loaded anew begins
// again at nothing.
type risen struct{ base, last [counters]float64 }

const counters = 14

// pointers are the counters of a reading.
func (r *Reading) pointers() [counters]*float64 {
	return [counters]*float64{
		&r.Energy, &r.ECCCorrected, &r.ECCUncorrected, &r.RemapsCorrected, &r.RemapsUncorrected, &r.PCIeReplays,
		&r.Throttled[0], &r.Throttled[1], &r.Throttled[2], &r.Throttled[3], &r.Throttled[4],
		&r.NVLinkErrors[0], &r.NVLinkErrors[1], &r.NVLinkErrors[2],
	}
}

func (c *risen) raise(r *Reading) {
	for i, v := range r.pointers() {
		switch {
		case math.IsNaN(*v):
			continue
		case *v < c.last[i]:
			c.base[i] += c.last[i]
		}
		c.last[i] = *v
		*v += c.base[i]
	}
}

// Snapshot is the newest one; nil before the first.
func (p *Poller) Snapshot() *Snapshot { return p.snapshot.Load() }

// Run polls and listens until ctx ends.
func (p *Poller) Run(ctx context.Context, devices []Device) {
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		p.listen(ctx)
	}()
	defer func() { <-heard }()
	readings := make([]Reading, len(devices))
	p.risen = make([]risen, len(devices))
	for i, d := range devices {
		readings[i] = BlankReading(d.UUID)
	}
	tick := time.NewTicker(hotEvery)
	defer tick.Stop()
	failing := map[Tier]string{}
	for warmAt := time.Now(); ; {
		tiers := []Tier{Hot}
		if now := time.Now(); !now.Before(warmAt) {
			tiers, warmAt = append(tiers, Warm), now.Add(warmEvery)
		}
		for _, t := range tiers {
			p.poll(ctx, t, readings, failing)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (p *Poller) poll(ctx context.Context, t Tier, readings []Reading, failing map[Tier]string) {
	began := time.Now()
	err := p.Source.Read(ctx, t, readings)
	if p.Polled != nil {
		p.Polled(t, time.Since(began), err)
	}
	p.complain(ctx, t, err, failing)
	if errors.Is(err, ErrWedged) {
		return // what was read is old, and the call that hangs may still write
	}
	generation := p.Source.Generation()
	driver, cuda := p.Source.Versions()
	seen := slices.Clone(readings)
	for i := range seen {
		p.risen[i].raise(&seen[i])
	}
	p.snapshot.Store(&Snapshot{At: began, Generation: generation, Driver: driver, CUDA: cuda, Devices: seen})
	if t == Hot {
		for _, r := range readings {
			p.Health.Facts(r.UUID, r.Facts(generation))
		}
	}
}

// complain says once what is wrong, and once that it is over.
func (p *Poller) complain(ctx context.Context, t Tier, err error, failing map[Tier]string) {
	said := ""
	if err != nil {
		said = err.Error()
	}
	if said == failing[t] {
		return
	}
	failing[t] = said
	if err != nil {
		p.Log.WarnContext(ctx, "the GPU driver does not tell all", "tier", t, "err", err)
	} else {
		p.Log.InfoContext(ctx, "the GPU driver tells all again", "tier", t)
	}
}

// listen hears events; a driver that stops telling them is asked again later.
func (p *Poller) listen(ctx context.Context) {
	for said := ""; ctx.Err() == nil; {
		err := p.Source.Events(ctx, p.Health.Fault)
		if ctx.Err() != nil {
			return
		}
		if err != nil && err.Error() != said {
			said = err.Error()
			p.Log.WarnContext(ctx, "the GPU driver tells no events: the kernel log and polls must do", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(warmEvery):
		}
	}
}
