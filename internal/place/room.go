package place

import (
	"cmp"
	"slices"
	"time"
)

// room is what it takes to free enough devices of one pool.
type room struct {
	version int // of the pool that was looked at
	enough  bool
	free    int
	victims []*run
	top     int     // the highest priority among them
	lost    float64 // GPU-seconds that they have run
}

// claim promises w devices that are coming free and, where these are too few,
// asks jobs of lower priority on one host to leave. It does neither unless that
// makes room for all of w. Devices that somebody leaves already are claimed by
// the first in the order, so nobody is asked twice for the same room.
func (s *state) claim(w *waiting) bool {
	d := w.demand
	if d.rooms == nil || d.roomsFor != w.Priority {
		d.rooms, d.roomsFor, d.noRoom = make([]room, len(d.pools)), w.Priority, false
		for i := range d.rooms {
			d.rooms[i].version = -1
		}
	}
	if d.noRoom { // during a level, room only becomes less
		return false
	}
	best := -1
	for i, c := range d.pools {
		p := &s.pools[c.pool]
		r := &d.rooms[i]
		if r.version != p.version {
			*r = s.roomIn(p, d.count, w.Priority)
		}
		if r.enough && (best < 0 || s.easier(w, c, r, d.pools[best], &d.rooms[best])) {
			best = i
		}
	}
	if best < 0 {
		d.noRoom = true
		return false
	}
	p := &s.pools[d.pools[best].pool]
	agent := s.hosts[p.host].Agent
	for _, v := range d.rooms[best].victims {
		v.leaving = true
		for _, p := range v.pools {
			p.version++
		}
		s.result.Preemptions = append(s.result.Preemptions, Preemption{Job: v.Job, Agent: agent, For: w.ID})
	}
	chosen := slices.Clone(p.devices)
	chosen = slices.DeleteFunc(chosen, func(d *device) bool { return !d.open() && !d.coming() })
	slices.SortStableFunc(chosen, func(a, b *device) int { return number(a.busy) - number(b.busy) })
	r := s.hold(w, d.pools[best].pool, chosen[:d.count])
	r.Claim = true
	w.user.gpus += d.count // so that its next job sees the quota
	return true
}

func number(b bool) int {
	if b {
		return 1
	}
	return 0
}

// coming reports whether somebody leaves the device and nobody claimed it.
func (d *device) coming() bool { return d.busy && d.held == nil && d.run != nil && d.run.leaving }

// easier reports whether making the room a costs less than b: nobody has to
// leave, then the host that was promised before; the lower priority, the fewer
// victims, the less of their time.
func (s *state) easier(w *waiting, at candidate, a *room, bt candidate, b *room) bool {
	agentA, agentB := s.hosts[s.pools[at.pool].host].Agent, s.hosts[s.pools[bt.pool].host].Agent
	avoidA, avoidB := w.avoids(agentA), w.avoids(agentB)
	none := func(r *room) int { return number(len(r.victims) > 0) }
	return cmp.Or(
		number(avoidA)-number(avoidB),
		none(a)-none(b),
		number(agentB == w.Reserved)-number(agentA == w.Reserved),
		cmp.Compare(a.top, b.top),
		len(a.victims)-len(b.victims),
		cmp.Compare(a.lost, b.lost),
		b.free-a.free,
	) < 0
}

// roomIn finds the fewest victims in p that make room for count devices, of the
// lowest priority that suffices.
func (s *state) roomIn(p *pool, count, priority int) room {
	out := room{version: p.version, free: p.free}
	need := count - p.free
	type victim struct {
		*run
		devices int
		lost    float64
	}
	var able []victim
	for i, d := range p.devices {
		switch {
		case d.coming():
			need--
		case d.run == nil || !s.mayLeave(d.run, priority):
		case slices.ContainsFunc(p.devices[:i], func(o *device) bool { return o.run == d.run }): // counted with the first
		default:
			v := victim{run: d.run, lost: float64(len(d.run.Devices)) * s.Now.Sub(d.run.Started).Seconds()}
			promised := false
			for _, o := range p.devices[i:] {
				if o.run == d.run {
					v.devices++
					promised = promised || o.held != nil
				}
			}
			if !promised { // else it would leave for somebody else
				able = append(able, v)
			}
		}
	}
	if need <= 0 {
		out.enough = true
		return out
	}
	slices.SortStableFunc(able, func(a, b victim) int { return cmp.Compare(a.Priority, b.Priority) })
	sum := 0
	for i, v := range able {
		sum += v.devices
		if sum >= need {
			for i++; i < len(able) && able[i].Priority == v.Priority; i++ {
				continue
			}
			able = able[:i]
			out.enough = true
			break
		}
	}
	if !out.enough {
		return out
	}
	for need > 0 {
		// The cheapest that suffices alone, else the largest.
		pick := 0
		for i, v := range able {
			b := able[pick]
			enough, was := v.devices >= need, b.devices >= need
			switch {
			case enough != was:
				if enough {
					pick = i
				}
			case !enough && v.devices != b.devices:
				if v.devices > b.devices {
					pick = i
				}
			case v.lost < b.lost:
				pick = i
			}
		}
		v := able[pick]
		out.victims = append(out.victims, v.run)
		if len(out.victims) == 1 || v.Priority > out.top {
			out.top = v.Priority
		}
		out.lost += v.lost
		need -= v.devices
		able = slices.Delete(able, pick, pick+1)
	}
	return out
}

// mayLeave reports whether r may be asked to. Who leaves already is not asked:
// what it holds is coming, or promised.
func (s *state) mayLeave(r *run, priority int) bool {
	return r.Preemptible && r.Priority < priority && s.Now.Sub(r.Started) >= s.Policy.MinRun
}

// reserve lets a host fill up for a gang that has waited long enough: the one
// that is expected to have enough devices soonest. A host that was promised
// before is kept unless it takes twice as long as another: estimates move, and
// a promise that moved with them would never be kept.
func (s *state) reserve(w *waiting) bool {
	if w.Count < 2 || !s.aged(w) || s.reserved >= s.Policy.MaxReserved {
		return false
	}
	var best, before *filling
	for _, c := range w.demand.pools {
		f := s.fill(c.pool, w.Count)
		if f == nil {
			continue
		}
		f.avoid = w.avoids(s.hosts[s.pools[c.pool].host].Agent)
		if best == nil || f.sooner(best) {
			best = f
		}
		if s.hosts[s.pools[c.pool].host].Agent == w.Reserved && (before == nil || f.sooner(before)) {
			before = f
		}
	}
	if best == nil {
		return false
	}
	if before != nil && before.unknown <= best.unknown && before.start.Sub(s.Now) <= 2*best.start.Sub(s.Now) {
		best = before
	}
	r := s.hold(w, best.pool, best.devices)
	if best.unknown == 0 {
		r.Start = best.start
	}
	s.reserved++
	return true
}

// filling is a set of devices of one pool that are, or will be, free together.
type filling struct {
	pool    int
	devices []*device
	unknown int       // of them, of whose end nothing is known
	start   time.Time // when the others are free
	avoid   bool
	price   int64
}

func (f *filling) sooner(o *filling) bool {
	return cmp.Or(number(f.avoid)-number(o.avoid), f.unknown-o.unknown, f.start.Compare(o.start), cmp.Compare(f.price, o.price)) < 0
}

// fill finds the count devices of a pool that are promised to nobody and
// expected free soonest; nil if there are not so many.
func (s *state) fill(at, count int) *filling {
	p := &s.pools[at]
	f := &filling{pool: at, start: s.Now, price: p.price}
	for _, d := range p.devices {
		if d.held == nil {
			f.devices = append(f.devices, d)
		}
	}
	if len(f.devices) < count {
		return nil
	}
	slices.SortStableFunc(f.devices, func(a, b *device) int {
		if a.busy != b.busy {
			return number(a.busy) - number(b.busy)
		}
		if a.ends.IsZero() != b.ends.IsZero() {
			return number(a.ends.IsZero()) - number(b.ends.IsZero())
		}
		return a.ends.Compare(b.ends)
	})
	f.devices = f.devices[:count]
	for _, d := range f.devices {
		switch {
		case !d.busy:
		case d.ends.IsZero():
			f.unknown++
		case d.ends.After(f.start):
			f.start = d.ends
		}
	}
	return f
}

// hold promises devices of a pool to w.
func (s *state) hold(w *waiting, at int, devices []*device) *reservation {
	p := &s.pools[at]
	r := &reservation{Reservation: Reservation{Job: w.ID, Agent: s.hosts[p.host].Agent}, pool: at}
	for _, d := range devices {
		if !d.busy {
			r.free++
			p.free--
		}
		d.held = r
		r.Devices = append(r.Devices, d.uuid)
	}
	slices.Sort(r.Devices)
	p.version++
	s.reservations = append(s.reservations, r)
	s.waits = append(s.waits, wait{waiting: w, cause: promised, promise: r})
	return r
}
