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
	coldEvery = time.Minute
	soonEvery = 5 * time.Second // those on which nothing can run
)

// preflightLimit bounds how long a job waits for the look at its devices; a
// driver that takes longer is busy, and the job begins without it.
const preflightLimit = time.Second

// Tier is a group of readings that are taken together.
type Tier string

// The tiers.
const (
	Hot  Tier = "hot"  // once a second: memory, power, errors, the driver's own verdict
	Warm Tier = "warm" // every 15 s: clocks, links
	Cold Tier = "cold" // every minute, and before a device is lent: see Detail
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
	// Details reads the cold tier; a device that does not answer is left out.
	Details(ctx context.Context, uuids []string) ([]Detail, error)
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

	refused atomic.Bool // a look before lending found what polls have not seen

	// What only Run touches.
	devices []Device
	slowed  []float64 // seconds of hw_slowdown, which no counter of the driver has
	at      time.Time // of the last readings of the hot tier
	wedged  bool
	coldAt  time.Time // when the cold tier is due
	unfit   []string  // UUIDs
}

// risen makes counters that go on where a driver that was loaded anew begins
// again at nothing.
type risen struct{ base, last [counters]float64 }

const (
	counters         = 14
	throttledHW      = 1 // in Throttles
	reasonHWSlowdown = 8 // nvmlClocksEventReasonHwSlowdown
)

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
	p.devices, p.slowed = devices, make([]float64, len(devices))
	tick := time.NewTicker(hotEvery)
	defer tick.Stop()
	failing := map[Tier]string{}
	var all []string
	for _, d := range devices {
		all = append(all, d.UUID)
	}
	var soonAt time.Time
	for warmAt := time.Now(); ; {
		p.poll(ctx, Hot, readings, failing)
		if now := time.Now(); !p.wedged && !now.Before(warmAt) {
			p.poll(ctx, Warm, readings, failing)
			warmAt = now.Add(warmEvery)
		}
		switch now := time.Now(); {
		case p.wedged:
		case p.refused.Swap(false) || !now.Before(p.coldAt):
			p.coldAt, soonAt = now.Add(coldEvery), now.Add(soonEvery)
			p.cold(ctx, all, failing)
		case len(p.unfit) > 0 && !now.Before(soonAt):
			soonAt = now.Add(soonEvery)
			p.cold(ctx, slices.Clone(p.unfit), failing)
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
	if ctx.Err() != nil {
		return
	}
	p.polled(t, time.Since(began), err)
	p.complain(ctx, t, err, failing)
	p.wedge(errors.Is(err, ErrWedged))
	if p.wedged {
		return // what was read is old, and the call that hangs may still write
	}
	if t == Hot {
		p.passed(began, readings)
	}
	generation := p.Source.Generation()
	driver, cuda := p.Source.Versions()
	seen := slices.Clone(readings)
	for i := range seen {
		seen[i].Throttled[throttledHW] = p.slowed[i]
		p.risen[i].raise(&seen[i])
	}
	p.snapshot.Store(&Snapshot{At: p.at, Generation: generation, Driver: driver, CUDA: cuda, Devices: seen})
	if t == Hot {
		for _, r := range readings {
			p.Health.Facts(r.UUID, r.Facts(generation))
		}
	}
}

func (p *Poller) polled(t Tier, took time.Duration, err error) {
	if p.Polled != nil {
		p.Polled(t, took, err)
	}
}

// passed adds up the time for which the hardware said that it slows down.
func (p *Poller) passed(now time.Time, readings []Reading) {
	if d := now.Sub(p.at).Seconds(); !p.at.IsZero() && d > 0 {
		for i, r := range readings {
			if r.Reasons&reasonHWSlowdown != 0 {
				p.slowed[i] += d
			}
		}
	}
	p.at = now
}

// wedge takes all devices out of use while the driver does not answer: what
// runs may go on, but nobody could see how.
func (p *Poller) wedge(on bool) {
	if p.wedged == on {
		return
	}
	p.wedged = on
	why := ""
	if on {
		why = "the GPU driver does not answer: restart the host when what runs has ended"
	}
	for _, d := range p.devices {
		if d.Fault == "" { // else the inventory has why it is not used
			p.Health.Unfit(d.UUID, why)
		}
	}
	p.unfit, p.coldAt = nil, time.Time{} // the next look at details says it again
}

// cold looks at what would keep a job from running.
func (p *Poller) cold(ctx context.Context, uuids []string, failing map[Tier]string) {
	began := time.Now()
	ds, err := p.Source.Details(ctx, uuids)
	if ctx.Err() != nil {
		return
	}
	p.polled(Cold, time.Since(began), err)
	p.complain(ctx, Cold, err, failing)
	if err != nil {
		return
	}
	for _, d := range ds {
		i := slices.Index(p.unfit, d.UUID)
		switch why := d.Problem(); {
		case why != "":
			p.Health.Unfit(d.UUID, why)
			if i < 0 {
				p.unfit = append(p.unfit, d.UUID)
			}
		case i >= 0:
			p.Health.Unfit(d.UUID, "")
			p.unfit = slices.Delete(p.unfit, i, i+1)
		}
	}
}

// Preflight looks at devices before they are lent. The error, an
// *UnavailableError, says what would keep a job from running on them.
func (p *Poller) Preflight(ctx context.Context, uuids []string) error {
	ctx, cancel := context.WithTimeout(ctx, preflightLimit)
	defer cancel()
	ds, err := p.Source.Details(ctx, uuids)
	if err != nil {
		p.Log.WarnContext(ctx, "devices are lent without a look at them", "err", err)
		return nil
	}
	bad := map[string]string{}
	for _, d := range ds {
		if why := d.Problem(); why != "" {
			bad[d.UUID] = why
		}
	}
	// The dispatcher must hear of it, or it would try again.
	if len(bad) > 0 {
		p.refused.Store(true)
	}
	if why := GangProblem(ds); why != "" {
		for _, u := range uuids {
			bad[u] = why
		}
	}
	if len(bad) > 0 {
		return &UnavailableError{Reasons: bad}
	}
	return nil
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
