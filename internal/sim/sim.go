// Package sim runs the real dispatchers and the real agents in a world of
// fakes: a database whose transitions are those of internal/proto, a queue, a
// network, hosts with trainers; and it breaks all of them. What comes of a seed
// is always the same, to the nanosecond, so a seed that fails is a test case.
//
// The world lives in a bubble of testing/synctest, where time passes only when
// everybody waits. Three rules make it repeat itself:
//
//   - One thing happens at a time. Everything that touches the world is an event
//     in one queue; the next one is taken only when every goroutine of the
//     bubble waits again (synctest.Wait).
//   - Nothing happens at the same instant as something else. Every call takes
//     time, every pause of the real code goes through its Jitter, and both end at
//     a nanosecond of their own. Two timers that ring together would be taken in
//     any order.
//   - Whatever is drawn depends on the seed, on who draws, for what and when, and
//     not on what others drew before: goroutines that run side by side between
//     two events cannot change each other's luck.
//
// The faults are planned before the world begins (plan.go); what must hold
// whatever happens is in check.go; base.go is the database, host.go an agent's
// host, calls.go the way between the two.
package sim

import (
	"container/heap"
	"fmt"
	"hash/fnv"
	"io"
	"log/slog"
	"math/rand/v2"
	"sync"
	"testing/synctest"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/metrics"
)

// Options say what to simulate.
type Options struct {
	Seed   uint64
	Mutant Mutant
	// Trace hears of everything that happens; nil: nobody does.
	Trace func(line string)
	// Metrics may be shared by many simulations: nobody reads them.
	Metrics Metrics
}

// Metrics are what the real parts count into.
type Metrics struct {
	Agent      *metrics.Agent
	Dispatcher *metrics.Dispatcher
}

// Result is what came of it.
type Result struct {
	Bad     string        // the first thing that must not be; empty: all is well
	Hash    uint64        // of everything that happened, in order and with its time
	Events  int           // that happened
	Virtual time.Duration // that passed in the world
	Jobs    int
	Unused  time.Duration  // the longest that somebody paid for after a trainer's end
	Count   map[string]int // how often things happened that a test wants to have seen
}

// instant is the time since the world began. Nothing happens at 0.
type instant = time.Duration

// event is something that happens to the world.
type event struct {
	at  instant
	key uint64 // who comes first, should two have the same instant
	do  func()
}

type events []event

func (q events) Len() int { return len(q) }
func (q events) Less(i, j int) bool {
	return q[i].at < q[j].at || q[i].at == q[j].at && q[i].key < q[j].key
}
func (q events) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *events) Push(x any)   { *q = append(*q, x.(event)) }
func (q *events) Pop() any {
	n := len(*q) - 1
	x := (*q)[n]
	(*q)[n] = event{}
	*q = (*q)[:n]
	return x
}

// world is everything. What it points to belongs to the goroutine that takes
// events, except for the queue of events itself.
type world struct {
	Options
	start time.Time
	plan  plan
	over  chan struct{} // closed when the world ends
	wg    sync.WaitGroup

	mu    sync.Mutex
	queue events
	poke  chan struct{} // the queue has something new

	base  base
	redis redis
	hosts []*host
	seats []*seat
	ran   map[job.Ref]instant // when trainers ended
	res   Result
	hash  interface {
		io.Writer
		Sum64() uint64
	}
	note []byte
}

// Run lives through one world. It has to be called in a bubble.
func Run(o Options) Result {
	w := &world{Options: o, start: time.Now(), over: make(chan struct{}), poke: make(chan struct{}, 1), hash: fnv.New64a()}
	w.res.Count, w.ran = map[string]int{}, map[job.Ref]instant{}
	w.plan = newPlan(o.Seed)
	w.base.begin(w)
	w.redis.begin(w)
	w.populate()
	w.live()
	w.res.Virtual = w.now()
	w.res.Hash = w.hash.Sum64()
	w.res.Jobs = len(w.base.rows)
	close(w.over)
	for _, h := range w.hosts {
		h.end()
	}
	for _, s := range w.seats {
		s.end()
	}
	w.wg.Wait()
	return w.res
}

func (w *world) now() instant { return time.Since(w.start) }

// live takes events until all is done, or something is wrong.
func (w *world) live() {
	for w.res.Bad == "" {
		synctest.Wait()
		w.mu.Lock()
		next := w.queue[0] // there is always one: the look for the end
		if wait := next.at - w.now(); wait > 0 {
			w.mu.Unlock()
			t := time.NewTimer(wait)
			select {
			case <-t.C:
			case <-w.poke:
			}
			t.Stop()
			continue
		}
		heap.Pop(&w.queue)
		w.mu.Unlock()
		w.res.Events++
		next.do()
		if w.done() {
			return
		}
	}
}

// at lets something happen. Everybody may call it.
func (w *world) at(when instant, key uint64, do func()) {
	w.mu.Lock()
	heap.Push(&w.queue, event{when, key, do})
	w.mu.Unlock()
	select {
	case w.poke <- struct{}{}:
	default:
	}
}

// dice are what somebody draws from now, for one thing.
func (w *world) dice(who, what string) *rand.Rand {
	h := uint64(14695981039346656037) // FNV-1a
	for _, s := range [...]string{who, "|", what} {
		for i := range len(s) {
			h = (h ^ uint64(s[i])) * 1099511628211
		}
	}
	return rand.New(rand.NewPCG(w.Seed, h^uint64(w.now())*0x9e3779b97f4a7c15))
}

func chance(r *rand.Rand, percent int) bool { return r.IntN(100) < percent }

func between(r *rand.Rand, least, most time.Duration) time.Duration {
	return least + time.Duration(r.Int64N(int64(most-least)+1))
}

// log notes that something happened. It is part of what a seed has to repeat.
func (w *world) log(who, what string, about ...any) {
	w.note = fmt.Appendf(w.note[:0], "%12.6f %s: %s", w.now().Seconds(), who, what)
	for _, a := range about {
		w.note = fmt.Appendf(w.note, " %v", a)
	}
	_, _ = w.hash.Write(w.note)
	if w.Trace != nil {
		w.Trace(string(w.note))
	}
}

// wrong ends the world: something is that must not be.
func (w *world) wrong(format string, args ...any) {
	if w.res.Bad == "" {
		w.res.Bad = fmt.Sprintf(format, args...)
		w.log("check", w.res.Bad)
	}
}

// logger is for the real code. What it says is shown and not compared: within
// one instant goroutines may speak in any order.
func (w *world) logger(who string) *slog.Logger {
	if w.Trace == nil {
		return slog.New(slog.DiscardHandler)
	}
	out := &lines{w: w, who: who}
	return slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}))
}

type lines struct {
	w   *world
	who string
}

func (l *lines) Write(b []byte) (int, error) {
	l.w.Trace(fmt.Sprintf("%12.6f   %s says: %s", l.w.now().Seconds(), l.who, b[:len(b)-1]))
	return len(b), nil
}
