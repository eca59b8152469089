package sim

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/proto"
	"lorayard/internal/queue"
	"lorayard/internal/store"
)

// actor is a process: it may be frozen, cut off and killed. Its code runs on;
// what it may not do it is kept from at the seams.
type actor struct {
	w     *world
	name  string
	life  *life
	agent bool          // and not a dispatcher
	dead  chan struct{} // closed when it is killed: it waits there for the end of the world
	ctx   context.Context
	quit  context.CancelFunc
	wg    sync.WaitGroup
	// Of the goroutine that takes events:
	killed   bool
	killedAt instant
	started  instant
	ended    bool
}

func newActor(w *world, name string, l *life) *actor {
	a := &actor{w: w, name: name, life: l, dead: make(chan struct{}), started: w.now()}
	a.ctx, a.quit = context.WithCancel(context.Background())
	return a
}

// kill is kill -9.
func (a *actor) kill() {
	if !a.killed {
		a.killed, a.killedAt = true, a.w.now()
		close(a.dead)
	}
}

var (
	errOver  = errors.New("the world is over")
	errReset = errors.New("connection reset")
)

// jitter is Parts.Jitter: a pause ends at a nanosecond of its own, and not while
// the process is frozen.
func (a *actor) jitter(d time.Duration) time.Duration {
	r := a.w.dice(a.name, d.String())
	now := a.w.now()
	end := now + max(d, 0) + between(r, time.Microsecond, max(d/8, time.Millisecond))
	if thaw := a.life.frozen.end(end); thaw != end {
		end = thaw + between(r, time.Microsecond, time.Millisecond)
	}
	return end - now
}

// pause waits like the real code does. It is false when ctx ended.
func (a *actor) pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(a.jitter(d))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-a.dead:
		<-a.w.over
		return false
	case <-t.C:
		return true
	}
}

// do lets fn happen on this actor's machine, now or when it thaws, and waits
// for it. It is false when the process does not live to see it.
func (a *actor) do(what string, fn func()) bool {
	done := make(chan struct{})
	r := a.w.dice(a.name, what)
	a.w.at(a.life.frozen.end(a.w.now())+between(r, 1, 1000), r.Uint64(), func() {
		if a.killed {
			return
		}
		fn()
		close(done)
	})
	select {
	case <-done:
		return true
	case <-a.dead:
		<-a.w.over
	case <-a.w.over:
	}
	return false
}

// latency is what one way takes.
func (a *actor) latency(r interface{ Int64N(int64) int64 }, slow bool) time.Duration {
	if slow {
		return 50*time.Millisecond + time.Duration(r.Int64N(int64(time.Second)))
	}
	return 200*time.Microsecond + time.Duration(r.Int64N(int64(3*time.Millisecond)))
}

// unanswered is how long a connection may be silent (store's TCP_USER_TIMEOUT,
// and the database's statement_timeout).
const unanswered = 15 * time.Second

type answer[T any] struct {
	v   T
	err error
}

// call is a transaction of the database. It may be lost, before or after it is
// carried out, or late; its answer comes when the process is not frozen.
func call[T any](ctx context.Context, a *actor, what string, tx func() (T, error)) (T, error) {
	w, p := a.w, &a.w.plan
	if ctx.Err() != nil { // as a driver does
		var zero T
		return zero, fmt.Errorf("%s: %w", what, context.Cause(ctx))
	}
	r := w.dice(a.name, what)
	var (
		calm       = w.now() >= p.calm
		slow       = !calm && r.IntN(1000) < p.slowCall
		lost       = !calm && r.IntN(1000) < p.lostCall
		lostAnswer = !calm && r.IntN(1000) < p.lostAnswer
		hung       = !calm && a.agent && what != "renew" && r.IntN(1000) < p.hungCall
		late       = between(r, time.Millisecond, 1500*time.Millisecond) // a retransmission
		refused    = r.IntN(3) > 0                                       // quickly, where nobody is there
		leaves     = a.life.frozen.end(w.now())
		there      = leaves + a.latency(r, slow)
		back       = a.latency(r, slow)
		key        = r.Uint64()
		ch         = make(chan answer[T], 1)
	)
	reply := func(x answer[T], at instant) {
		w.at(a.life.frozen.end(at), key+1, func() { ch <- x })
	}
	var arrive func()
	arrive = func() {
		now := w.now()
		w.log(a.name, what)
		switch {
		case a.killed && a.killedAt < leaves:
			return // while it was frozen
		case hung:
			reply(answer[T]{err: errReset}, now+unanswered)
			return
		case a.life.cut.has(now):
			if heals := a.life.cut.end(now); heals < there+unanswered-2*time.Second && late%2 == 0 {
				w.at(heals+late, key, arrive)
			} else {
				reply(answer[T]{err: errReset}, there+unanswered)
			}
			return
		case p.away.has(now):
			if refused {
				reply(answer[T]{err: errors.New("connection refused")}, now+back)
			} else {
				reply(answer[T]{err: errReset}, now+unanswered)
			}
			return
		case lost:
			w.log(a.name, what+" is lost")
			reply(answer[T]{err: errReset}, now+back)
			return
		}
		v, err := tx()
		switch {
		case a.life.cut.has(now + back):
			reply(answer[T]{err: errReset}, now+unanswered)
		case lostAnswer || p.away.has(now+back):
			w.log(a.name, what+" is not answered")
			reply(answer[T]{err: errReset}, now+back)
		default:
			reply(answer[T]{v, err}, now+back)
		}
	}
	w.at(there, key, arrive)
	var zero T
	select {
	case x := <-ch:
		return x.v, x.err
	case <-a.dead:
		<-w.over
		return zero, errOver
	case <-w.over:
		return zero, errOver
	case <-ctx.Done():
	}
	if a.life.frozen.has(w.now()) { // then the two come together
		a.pause(context.Background(), 0)
		select {
		case x := <-ch:
			return x.v, x.err
		default:
		}
	}
	return zero, fmt.Errorf("%s: %w", what, context.Cause(ctx))
}

type none struct{}

func run(ctx context.Context, a *actor, what string, tx func() error) error {
	_, err := call(ctx, a, what, func() (none, error) { return none{}, tx() })
	return err
}

// read is a transaction that cannot fail.
func read[T any](ctx context.Context, a *actor, what string, tx func() T) (T, error) {
	return call(ctx, a, what, func() (T, error) { return tx(), nil })
}

// dispatcherStore is a dispatcher's way to the database.
type dispatcherStore struct{ *actor }

func (s dispatcherStore) Campaign(ctx context.Context, d store.Dispatcher, ttl time.Duration) (int64, error) {
	if s.w.plan.twoLeaders {
		return read(ctx, s.actor, "campaign", func() int64 { s.w.base.campaign(d.ID, ttl); return 1 })
	}
	return read(ctx, s.actor, "campaign", func() int64 { return s.w.base.campaign(d.ID, ttl) })
}

func (s dispatcherStore) Resign(ctx context.Context, id string) error {
	return run(ctx, s.actor, "resign", func() error { s.w.base.resign(id); return nil })
}

func (s dispatcherStore) Unadmitted(ctx context.Context, _ int, only []job.ID) ([]store.Row, error) {
	return read(ctx, s.actor, "unadmitted", func() []store.Row {
		return slices.DeleteFunc(s.w.base.unadmitted(), func(r store.Row) bool { return only != nil && !slices.Contains(only, r.ID) })
	})
}

func (s dispatcherStore) Rates(ctx context.Context) (map[string]int64, error) {
	return map[string]int64{class: rate}, ctx.Err() // nobody changes them
}

func (s dispatcherStore) Admit(ctx context.Context, as []store.Admission) ([]store.Waiting, error) {
	return call(ctx, s.actor, "admit", func() ([]store.Waiting, error) { return s.w.base.admit(as), nil })
}

func (s dispatcherStore) Refuse(ctx context.Context, id job.ID, _ string) error {
	return run(ctx, s.actor, "refuse "+string(id), func() error { s.w.base.refuse(id); return nil })
}

func (s dispatcherStore) Waiting(ctx context.Context, _ int, only []job.ID) ([]store.Waiting, error) {
	return read(ctx, s.actor, "waiting", func() []store.Waiting {
		return slices.DeleteFunc(s.w.base.waitingJobs(), func(w store.Waiting) bool { return only != nil && !slices.Contains(only, w.ID) })
	})
}

func (s dispatcherStore) Running(ctx context.Context) ([]store.Running, error) {
	return read(ctx, s.actor, "running", s.w.base.running)
}

func (s dispatcherStore) Users(ctx context.Context) ([]store.User, error) { return nil, ctx.Err() }

func (s dispatcherStore) Hosts(ctx context.Context) ([]store.Host, error) {
	return read(ctx, s.actor, "hosts", s.w.base.openHosts)
}

func (s dispatcherStore) SetWaiting(ctx context.Context, waits []store.Wait) error {
	return run(ctx, s.actor, "set waiting", func() error {
		for _, x := range waits {
			s.w.base.byID[x.Job].waiting = x.Reason
		}
		return nil
	})
}

func (s dispatcherStore) Assign(ctx context.Context, as []store.Assignment) ([]store.Send, error) {
	return read(ctx, s.actor, "assign", func() []store.Send { return s.w.base.assign(as) })
}

func (s dispatcherStore) Preempt(ctx context.Context, refs []job.Ref) ([]job.Ref, error) {
	return read(ctx, s.actor, "preempt", func() []job.Ref { return s.w.base.preempt(refs) })
}

func (s dispatcherStore) SettleCancelled(ctx context.Context) ([]job.ID, error) {
	return read(ctx, s.actor, "settle cancelled", s.w.base.settleCancelled)
}

func (s dispatcherStore) TakeBack(ctx context.Context, after time.Duration, gone []string) ([]job.Ref, error) {
	return read(ctx, s.actor, "take back", func() []job.Ref { return s.w.base.takeBack(after, gone) })
}

func (s dispatcherStore) Reap(ctx context.Context, id string, lease, patience time.Duration) ([]job.Ref, error) {
	return read(ctx, s.actor, "reap", func() []job.Ref { return s.w.base.reap(id, lease, patience) })
}

func (s dispatcherStore) NextLapse(ctx context.Context, patience time.Duration) (time.Duration, error) {
	return read(ctx, s.actor, "next lapse", func() time.Duration { return s.w.base.nextLapse(patience) })
}

func (s dispatcherStore) Resend(ctx context.Context, after time.Duration) ([]store.Send, error) {
	return read(ctx, s.actor, "re-send", func() []store.Send { return s.w.base.resend(after) })
}

func (s dispatcherStore) Depths(context.Context) (map[string]int, error) {
	return nil, nil // for a gauge alone
}

// ear is a connection that listens.
type ear struct {
	a      *actor
	wake   func(string)
	broken chan struct{}
	closed bool
}

func (s dispatcherStore) Listen(ctx context.Context, wake func(string)) error {
	e := &ear{a: s.actor, wake: wake, broken: make(chan struct{})}
	if err := run(ctx, s.actor, "listen", func() error { s.w.base.ears = append(s.w.base.ears, e); return nil }); err != nil {
		return err
	}
	wake("")
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-s.dead:
		<-s.w.over
		return errOver
	case <-s.w.over:
		return errOver
	case <-e.broken:
		return errReset
	}
}

// notify is pg_notify. A connection that cannot carry it breaks.
func (b *base) notify(payload string) {
	now := b.now()
	kept := b.ears[:0]
	for _, e := range b.ears {
		if e.closed || e.a.killed || e.a.ended {
			continue
		}
		kept = append(kept, e)
		r := b.dice(e.a.name, payload)
		b.at(e.a.life.frozen.end(now+e.a.latency(r, false)), r.Uint64(), func() {
			switch {
			case e.closed || e.a.killed || e.a.ended:
			case e.a.life.cut.has(b.now()) || b.plan.away.has(b.now()):
				e.closed = true
				close(e.broken)
			default:
				e.wake(payload)
			}
		})
	}
	b.ears = kept
}

// agentStore is an agent's way to the database.
type agentStore struct {
	*actor
	p *process
}

func (s agentStore) Register(ctx context.Context, a store.Agent, ttl time.Duration, adopt []job.Ref) ([]job.Ref, error) {
	kept, err := call(ctx, s.actor, "register", func() ([]job.Ref, error) { return s.w.base.register(a, ttl, adopt) })
	if err == nil && s.w.Mutant.ResumeUnasked {
		kept = adopt
	}
	return kept, err
}

func (s agentStore) Renew(ctx context.Context, a store.Agent, ttl time.Duration, st store.AgentState, refs []job.Ref) (store.Wanted, error) {
	m := s.w.Mutant
	list := refs
	if m.ListNothing {
		list = nil
	}
	w, err := call(ctx, s.actor, "renew", func() (store.Wanted, error) { return s.w.base.renew(a, ttl, st, list) })
	if err != nil {
		return w, err
	}
	s.p.heard(list, w)
	for _, ref := range refs {
		switch d, mine := w.Attempts[ref]; {
		case !mine && m.IgnoreLost:
			w.Attempts[ref] = job.DesireRun
		case d == job.DesireCancel && m.UnheardCancel:
			w.Attempts[ref] = job.DesireRun
		}
	}
	return w, nil
}

func (s agentStore) Accept(ctx context.Context, a store.Agent, ref job.Ref) (job.Assignment, error) {
	if s.w.Mutant.HangingAccept {
		ctx = context.WithoutCancel(ctx)
	}
	return call(ctx, s.actor, "accept "+string(ref.Job), func() (job.Assignment, error) { return s.w.base.accept(a, ref) })
}

func (s agentStore) append(ctx context.Context, ref job.Ref) error {
	return run(ctx, s.actor, "append "+string(ref.Job), func() error { return s.w.base.append(ref) })
}

func (s agentStore) settle(ctx context.Context, ref job.Ref, end proto.Event, idle time.Duration) (job.Status, error) {
	return call(ctx, s.actor, "settle "+string(ref.Job), func() (job.Status, error) { return s.w.base.settle(ref, end, idle) })
}

// redis is the queue: a list of tasks for each agent that nobody promised to
// keep.
type redis struct {
	*world
	era int // flushes so far
}

func (q *redis) begin(w *world) { q.world = w }

// SendAll is a dispatcher's way to Redis.
func (s dispatcherStore) SendAll(ctx context.Context, sends []queue.Send) []error {
	w := s.w
	r := w.dice(s.name, "send")
	errs := make([]error, len(sends))
	done := make(chan error, 1)
	w.at(s.life.frozen.end(w.now())+s.latency(r, false), r.Uint64(), func() {
		if s.killed {
			return
		}
		err := error(nil)
		if w.plan.redisAway.has(w.now()) || s.life.cut.has(w.now()) {
			err = errors.New("redis: connection refused")
		} else {
			for _, x := range sends {
				w.redis.push(s.actor, x)
			}
		}
		w.at(s.life.frozen.end(w.now()+s.latency(r, false)), r.Uint64(), func() { done <- err })
	})
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		err = ctx.Err()
	case <-s.dead:
		<-w.over
		err = errOver
	case <-w.over:
		err = errOver
	}
	for i := range errs {
		errs[i] = err
	}
	return errs
}

// push puts a task into an agent's queue. The first two sends of an attempt may
// be lost, no more: the third is to arrive.
func (q *redis) push(from *actor, s queue.Send) {
	r := q.dice(from.name, "push "+string(s.Task.Ref.Job))
	calm := q.now() >= q.plan.calm
	if !calm && s.Task.Send <= 2 && chance(r, q.plan.lostTask) {
		q.log("redis", "loses", s.Task.Ref, s.Task.Send)
		q.res.Count["lost task"]++
		return
	}
	n := 1
	if !calm && chance(r, q.plan.doubledTask) {
		n = 2 + r.IntN(2)
	}
	at := q.now()
	for i := range n {
		era := q.era
		at += 300*time.Microsecond + time.Duration(r.Int64N(int64(2*time.Millisecond)))
		if i > 0 {
			at += time.Duration(r.Int64N(int64(8 * time.Second)))
			q.res.Count["doubled task"]++
		}
		q.at(at, r.Uint64(), func() { q.deliver(s, era) })
	}
}

// deliver hands a task to a process of its agent that takes one, or tries again.
func (q *redis) deliver(s queue.Send, era int) {
	if era != q.era {
		return // flushed
	}
	r := q.dice(s.Agent, "deliver "+string(s.Task.Ref.Job))
	now := q.now()
	var open []*process
	for _, h := range q.hosts {
		if p := h.proc; h.agent == s.Agent && p != nil && !p.killed && !p.ended && !h.life.cut.has(now) && p.daemon.Ready() == nil {
			open = append(open, p)
		}
	}
	if len(open) == 0 || q.plan.redisAway.has(now) {
		if now < q.plan.calm+time.Minute {
			q.at(now+between(r, 200*time.Millisecond, 3*time.Second), r.Uint64(), func() { q.deliver(s, era) })
		}
		return
	}
	p := open[r.IntN(len(open))]
	if thaw := p.life.frozen.end(now); thaw > now { // its socket has it
		q.at(thaw+between(r, 1, time.Millisecond), r.Uint64(), func() {
			if p.killed || p.ended {
				return
			}
			p.take(s.Task)
		})
		return
	}
	p.take(s.Task)
}
