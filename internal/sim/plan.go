package sim

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// Paces of the simulated fleet. Lease and patience are short so that a world is
// over soon; they stand to each other as in the product.
const (
	lease  = 5 * time.Second
	renew  = time.Second
	poll   = time.Second
	resend = time.Second
	accept = 5 * time.Second
	term   = 3 * time.Second
	grace  = 2 * time.Second // of a presence stream
	class  = "A100-80GB"
	model  = "m"
	rate   = 3_600_000_000 // micro-dollars an hour: a second is a dollar
)

// window is a time in which something is not as it should be.
type window struct{ from, to instant }

func (w window) has(t instant) bool { return w.from <= t && t < w.to }

type windows []window

func (ws windows) has(t instant) bool {
	for _, w := range ws {
		if w.has(t) {
			return true
		}
	}
	return false
}

// end is when the window that t is in is over, t when it is in none.
func (ws windows) end(t instant) instant {
	for _, w := range ws { // they may overlap
		if w.has(t) {
			return ws.end(w.to)
		}
	}
	return t
}

// touch reports whether a window overlaps with a time.
func (ws windows) touch(from, to instant) bool {
	for _, w := range ws {
		if w.from < to && from < w.to {
			return true
		}
	}
	return false
}

// What befalls a process at a moment.
type blow string

const (
	kill    blow = "kill"    // -9
	stop    blow = "stop"    // SIGTERM
	restart blow = "restart" // an agent steps aside for its next process
)

type strike struct {
	at    instant
	blow  blow
	after time.Duration // until the next process starts; 0: there is none
}

// life is what is planned for a host or a dispatcher.
type life struct {
	from    instant // of the first process
	strikes []strike
	frozen  windows // SIGSTOP
	cut     windows // from the network
}

type plannedJob struct {
	at       instant
	gpus     int
	work     time.Duration // of an attempt
	fails    int           // per cent, of attempts
	fatal    int           // per cent, of failures that no other attempt helps
	cancel   instant       // by the app, whatever has become of it; 0: never
	wants    []want        // of operators
	bad      bool          // its row cannot be run
	priority int
	user     string
}

type rollBack struct {
	at  instant
	lag time.Duration
}

type want struct {
	at  instant
	how string // preempt, pause, run
}

// plan is everything that is drawn before the world begins.
type plan struct {
	// A trainer may be out of touch for no longer than a lease, and nobody has
	// patience (strict); or for much longer, as in the product.
	strict      bool
	outOfTouch  time.Duration
	patience    time.Duration
	gpus        []int // of each host
	agents      []life
	dispatchers []life
	twin        window  // agent a runs on a second host as well
	away        windows // the database
	redisAway   windows
	flushes     []instant
	rollBacks   []rollBack
	jobs        []plannedJob
	// Of calls of the database, per mille: lost before they are carried out,
	// after, and slow ones. Of tasks: lost and doubled, per cent.
	lostCall, lostAnswer, slowCall int
	lostTask, doubledTask          int
	hungCall                       int     // of an agent's, but for renewals: its connection is dead, and nobody says so
	twoLeaders                     bool    // both dispatchers believe that they lead
	silentDeath                    int     // per cent of shims whose report comes nowhere
	calm                           instant // nothing breaks from then on
}

func newPlan(seed uint64) plan {
	r := rand.New(rand.NewPCG(seed, 0x706c616e))
	sec := func(least, most float64) time.Duration {
		return between(r, time.Duration(least*1e9), time.Duration(most*1e9))
	}
	p := plan{strict: chance(r, 50), outOfTouch: lease}
	if !p.strict {
		p.outOfTouch, p.patience = sec(8, 40), sec(0, 3)*sec(0, 3)/time.Second
	}
	for i := range 1 + r.IntN(3) {
		p.gpus = append(p.gpus, 1+r.IntN(2))
		p.agents = append(p.agents, life{from: sec(0.001, 0.2) + time.Duration(i)})
	}
	for range 2 {
		p.dispatchers = append(p.dispatchers, life{from: sec(0.001, 0.5)})
	}
	for i := range 2 + r.IntN(5) {
		j := plannedJob{at: sec(0.3, 12), gpus: 1, work: sec(0.05, 8), user: fmt.Sprint("u", i%2), bad: chance(r, 3)}
		if i > 0 && chance(r, 30) {
			j.at, j.priority = p.jobs[i-1].at+sec(0, 0.02), r.IntN(2)
		}
		if p.gpus[0] > 1 && chance(r, 25) {
			j.gpus = 2 // the first host stays
		}
		if chance(r, 25) {
			j.fails, j.fatal = 10+r.IntN(60), r.IntN(50)
		}
		if chance(r, 30) {
			j.cancel = j.at + sec(0, 12)
		}
		if chance(r, 15) {
			j.wants = append(j.wants, want{j.at + sec(0.2, 8), "preempt"})
		}
		if chance(r, 10) {
			at := j.at + sec(0.2, 8)
			j.wants = append(j.wants, want{at, "pause"}, want{at + sec(0.2, 8), "run"})
		}
		p.jobs = append(p.jobs, j)
	}
	if chance(r, 60) {
		p.lostCall, p.lostAnswer, p.slowCall = r.IntN(40), r.IntN(40), r.IntN(60)
	} else if chance(r, 30) {
		p.slowCall = r.IntN(200)
	}
	if chance(r, 50) {
		p.lostTask, p.doubledTask = r.IntN(40), r.IntN(40)
	}
	if chance(r, 50) {
		p.silentDeath = r.IntN(101)
	}
	if chance(r, 20) {
		p.hungCall = r.IntN(100)
	}
	p.twoLeaders = chance(r, 15)
	p.faults(r, sec)
	return p
}

// faults draws what breaks.
func (p *plan) faults(r *rand.Rand, sec func(least, most float64) time.Duration) {
	p.calm = 15 * time.Second
	until := func(t instant) { p.calm = max(p.calm, t) }
	// soon is while a job is handed over.
	soon := func() instant {
		t := p.jobs[r.IntN(len(p.jobs))].at
		if chance(r, 50) {
			return t + sec(0.002, 0.06)
		}
		return t + sec(0.002, 0.6)
	}
	win := func(least, most float64) window {
		from := sec(0.5, 14)
		if chance(r, 50) {
			from = soon()
		}
		w := window{from, from + sec(least, most)}
		until(w.to)
		return w
	}
	hits := func(l *life, agent, last bool) {
		s := strike{at: sec(0.8, 14), blow: kill, after: sec(0.005, 6)}
		if chance(r, 40) {
			s.at = soon()
			if chance(r, 30) { // its last words come late
				p.slowCall = max(p.slowCall, r.IntN(300))
			}
		}
		if chance(r, 40) {
			s.after = sec(0.005, 0.3)
		}
		switch n := r.IntN(10); {
		case n < 4 && agent:
			s.blow, s.after = restart, sec(0.01, 0.8)
		case n < 6:
			s.blow = stop
		}
		if s.blow == kill && !last && chance(r, 25) {
			s.after = 0 // for good
		}
		until(s.at + s.after)
		l.strikes = append(l.strikes, s)
	}
	for range r.IntN(7) {
		i := r.IntN(len(p.agents))
		a, d := &p.agents[i], &p.dispatchers[r.IntN(2)]
		switch r.IntN(12) {
		case 0, 1, 2:
			hits(a, true, i == 0) // one host stays
		case 3:
			a.frozen = append(a.frozen, win(0.2, 14))
		case 4:
			a.cut = append(a.cut, win(0.2, 14))
		case 5:
			p.away = append(p.away, win(0.2, 14))
		case 6:
			p.redisAway = append(p.redisAway, win(0.2, 8))
			p.flushes = append(p.flushes, sec(0.5, 14))
		case 7:
			d.frozen = append(d.frozen, win(1, 9))
		case 8:
			d.cut = append(d.cut, win(1, 9))
		case 9:
			hits(d, false, true)
		case 10:
			x := rollBack{soon() + sec(0, 0.3), sec(0.005, 0.5)}
			p.rollBacks = append(p.rollBacks, x)
			if chance(r, 60) { // who ran it then hears of it late
				a.frozen = append(a.frozen, window{x.at - sec(0, 0.01), x.at + sec(2.1, 4.5)})
			}
		case 11:
			if p.twin.to == 0 {
				p.twin = win(8, 20)
				if chance(r, 70) { // it comes in only where the first is silent
					f := p.twin.from + sec(0, 4)
					w := window{f, f + sec(4, 14)}
					if chance(r, 50) {
						p.agents[0].cut = append(p.agents[0].cut, w)
					} else {
						p.agents[0].frozen = append(p.agents[0].frozen, w)
					}
					until(w.to)
				}
			}
		}
	}
}
