package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"lorayard/internal/agent"
	"lorayard/internal/attempt"
	"lorayard/internal/dispatch"
	"lorayard/internal/gpu"
	"lorayard/internal/job"
	"lorayard/internal/place"
	"lorayard/internal/proto"
	"lorayard/internal/store"
)

// populate plans the first events: everybody's beginnings, what breaks, what
// users and operators do, and the look for the end.
func (w *world) populate() {
	p := &w.plan
	key := uint64(0)
	at := func(t instant, do func()) {
		key++
		w.at(t, key, do)
	}
	for i := range p.dispatchers {
		s := &seat{w: w, name: fmt.Sprint("d", i), life: &p.dispatchers[i]}
		w.seats = append(w.seats, s)
		at(s.life.from, s.begin)
		for _, k := range s.life.strikes {
			at(k.at, func() { s.hit(k) })
		}
	}
	for i := range p.agents {
		name := string(rune('a' + i))
		w.house(&host{w: w, name: name, agent: name, life: &p.agents[i], gpus: p.gpus[i]})
	}
	if t := p.twin; t.to > 0 {
		w.house(&host{w: w, name: "twin", agent: "a", gpus: 1, life: &life{from: t.from, strikes: []strike{{at: t.to, blow: kill}}}})
	}
	for _, j := range p.jobs {
		var r *row
		at(j.at, func() { r = w.base.insert(j) })
		if j.cancel > 0 {
			at(j.cancel, func() { w.base.cancel(r) })
		}
		for _, x := range j.wants {
			at(x.at, func() { w.base.want(r, job.Desired(x.how)) })
			if x.how == string(job.DesireRun) { // it must not be forgotten
				at(max(x.at, p.calm), func() { w.base.want(r, job.DesireRun) })
			}
		}
	}
	for _, t := range p.flushes {
		at(t, func() { w.redis.era++; w.log("redis", "is flushed") })
	}
	for _, x := range p.rollBacks {
		at(x.at, func() { w.base.rollBack(x.lag) })
	}
	var look func()
	look = func() { w.at(w.now()+50*time.Millisecond+1, 0, look) }
	look()
}

func (w *world) house(h *host) {
	h.left = map[job.Ref]*left{}
	w.hosts = append(w.hosts, h)
	w.at(h.life.from, uint64(len(w.hosts))<<8, h.begin)
	for i, k := range h.life.strikes {
		w.at(k.at, uint64(len(w.hosts))<<8+uint64(i)+1, func() { h.hit(k) })
	}
	for _, x := range slices.Concat(h.life.frozen, h.life.cut) {
		w.at(x.from+grace, 1, h.stream)
		w.at(x.to+2*time.Millisecond, 2, h.stream)
	}
}

// host is a machine with devices. Agents' processes come and go on it; trainers
// live beside them.
type host struct {
	w        *world
	name     string
	agent    string // its id
	life     *life
	gpus     int
	boots    int
	proc     *process
	procs    []*process
	trainers []*trainer // that compute
	left     map[job.Ref]*left
	again    bool   // a process that was stopped is followed by another one
	reported string // boot of the process whose death was reported last
	streamed string // boot of the process whose presence stream the dispatchers see
}

// left is what a process left that stepped aside.
type left struct {
	as  job.Assignment
	t   *trainer     // nil: it had not come so far
	end *proto.Event // what it was about to settle
}

func (h *host) end() {
	for _, p := range h.procs {
		p.kill()
		p.quit()
	}
}

func (h *host) begin() {
	w := h.w
	if h.proc != nil || h.name == "twin" && !w.plan.twin.has(w.now()) {
		return
	}
	h.boots++
	p := &process{actor: newActor(w, fmt.Sprint(h.name, h.boots), h.life), host: h, under: map[job.Ref]*trainer{}}
	p.actor.agent = true
	devices := gpu.Pretend(h.gpus, class, h.name)
	self := store.Agent{ID: h.agent, Boot: p.name, Instance: h.name, Generation: int64(h.boots), BaseModels: []string{model}, Devices: agent.Offer(devices, nil)}
	p.ledger = gpu.NewLedger(devices)
	p.store = agentStore{p.actor, p}
	p.daemon = agent.New(agent.Parts{
		Self: self, Store: p.store, Ledger: p.ledger, Runner: p, Metrics: w.Metrics.Agent, Log: w.logger(p.name),
		Config:   agent.Config{Lease: lease, Renew: renew, OutOfTouch: w.plan.outOfTouch, HandOver: handOver},
		NewNonce: func() string { return fmt.Sprintf("%s-%x", p.name, w.dice(p.name, "nonce").Uint32()) },
		Jitter:   p.jitter, Clock: w.now,
	})
	h.proc = p
	h.procs = append(h.procs, p)
	w.log(p.name, "starts")
	w.wg.Go(func() {
		err := p.daemon.Run(p.ctx)
		p.wg.Wait()
		p.do("exit", func() { h.exit(p, err) })
		p.quit()
	})
}

// exit is the end of a process by itself.
func (h *host) exit(p *process, err error) {
	w := h.w
	p.ended = true
	w.log(p.name, "exits", err)
	w.checkExit(p, err)
	if h.proc == p {
		h.proc = nil
	}
	h.orphan(p)
	h.hangUp(p)
	r := w.dice(p.name, "again")
	switch {
	case errors.Is(err, agent.ErrRestart):
		w.res.Count["restart"]++
		w.at(w.now()+between(r, 5*time.Millisecond, 300*time.Millisecond), r.Uint64(), h.begin)
	case err == nil && h.again: // it was stopped for long enough already
		w.at(w.now()+between(r, 5*time.Millisecond, 300*time.Millisecond), r.Uint64(), h.begin)
	case err != nil: // a supervisor starts it again
		w.at(w.now()+between(r, time.Second, 4*time.Second), r.Uint64(), h.begin)
	}
}

func (h *host) hit(k strike) {
	w, p := h.w, h.proc
	if k.after > 0 {
		w.at(k.at+k.after, w.dice(h.name, "after").Uint64(), h.begin)
	}
	if p == nil {
		return
	}
	w.log(p.name, "is hit", k.blow)
	w.res.Count[string(k.blow)]++
	switch k.blow {
	case stop:
		p.stopping = true
		p.quit()
		h.again = k.after > 0
	case restart:
		p.stopping = true
		p.daemon.Restart()
	case kill:
		p.kill()
		h.proc = nil
		h.orphan(p)
		h.hangUp(p)
	}
}

// orphan is what shims do when their agent's process is gone.
func (h *host) orphan(p *process) {
	w := h.w
	for _, t := range slices.Clone(h.trainers) {
		if t.proc != p || t.handed {
			continue
		}
		r := w.dice(t.ref.String(), "orphan")
		w.at(w.now()+5*time.Second, r.Uint64(), func() {
			if !t.gone && t.proc == p {
				w.wrong("%v goes on though its agent is dead", t.ref)
			}
		})
		if w.Mutant.NoOrphanKill {
			continue
		}
		dies := w.now() + between(r, time.Millisecond, 60*time.Millisecond)
		if chance(r, 30) {
			dies += between(r, 0, 3*time.Second) // the kernel takes its time
		}
		report := !chance(r, w.plan.silentDeath)
		w.at(dies, r.Uint64(), func() { t.stop("orphaned") })
		if w.Mutant.ReportBeforeDeath {
			dies = w.now()
		}
		if report {
			h.report(t.ref, p.name, dies+between(r, time.Millisecond, 100*time.Millisecond), 5)
		}
	}
}

// report is a shim's to a dispatcher, which takes it to the database.
func (h *host) report(ref job.Ref, boot string, when instant, tries int) {
	w := h.w
	r := w.dice(ref.String(), "report")
	w.at(when, r.Uint64(), func() {
		now := w.now()
		reached := slices.ContainsFunc(w.seats, func(s *seat) bool {
			return s.d != nil && !s.life.frozen.has(now) && !s.life.cut.has(now)
		})
		switch {
		case reached && !h.life.cut.has(now) && !w.plan.away.has(now):
			w.log(h.name, "reports the death of", ref)
			if w.base.reportDeath(h.agent, boot, ref) {
				h.reported = boot
				w.res.Count["death report"]++
			}
		case tries > 0:
			h.report(ref, boot, now+between(r, 500*time.Millisecond, time.Second), tries-1)
		}
	})
}

// stream looks whether dispatchers should see this host: some time after a
// stream broke, or when it may be back.
func (h *host) stream() {
	w, now := h.w, h.w.now()
	p := h.proc
	for _, o := range w.hosts { // the stream of the process that is registered
		if a := w.base.agents[h.agent]; o.agent == h.agent && o.proc != nil && a != nil && a.proto.Boot == o.proc.name {
			h, p = o, o.proc
		}
	}
	up := p != nil && p.registered && !p.killed && !h.life.frozen.has(now) && !h.life.cut.has(now)
	for _, s := range w.seats {
		if s.d == nil {
			continue
		}
		if up {
			h.streamed = p.name
			s.tell(func(d *dispatch.Dispatcher) { d.Back(h.agent, p.name) })
		} else if h.streamed != "" {
			boot := h.streamed
			s.tell(func(d *dispatch.Dispatcher) { d.Gone(h.agent, boot) })
		}
	}
}

// hangUp is the end of a process's stream.
func (h *host) hangUp(p *process) {
	if p.registered {
		h.w.at(h.w.now()+grace, 3, h.stream)
	}
}

// process is one process of an agent. It is its agent's Runner.
type process struct {
	*actor
	host       *host
	daemon     *agent.Agent
	ledger     *gpu.Ledger
	store      agentStore
	registered bool
	stopping   bool
	accepts    []*taking

	mu    sync.Mutex
	under map[job.Ref]*trainer // what it was seen to run
}

// taking is a call of Accept.
type taking struct {
	ref      job.Ref
	from, to instant // to is 0 while it lasts
}

// take hands a task to Accept, as queue.Serve does.
func (p *process) take(t job.Task) {
	x := &taking{ref: t.Ref, from: p.w.now()}
	p.accepts = append(p.accepts, x)
	p.wg.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // as Asynq gives it: the end of Serve does not end it
		defer cancel()
		err := p.daemon.Accept(ctx, t)
		p.do("accepted "+string(t.Ref.Job), func() {
			p.w.log(p.name, "was given", t.Ref, t.Send, err)
			p.w.checkRefusal(p, t, err)
			x.to = p.w.now()
			if _, refused := errors.AsType[*gpu.UnavailableError](err); refused {
				x.from = 0 // it held nothing
			}
		})
	})
}

// taken reports whether an accept that began after from was under way lately:
// it may hold devices that the database believes free.
func (p *process) taken(from, lately instant) bool {
	return slices.ContainsFunc(p.accepts, func(x *taking) bool { return x.from > from && (x.to == 0 || x.to > lately) })
}

// heard notes what a renewal told: what is lost has to end.
func (p *process) heard(refs []job.Ref, w store.Wanted) {
	for _, ref := range refs {
		if d, mine := w.Attempts[ref]; !mine || d == job.DesireCancel {
			p.w.at(p.w.now(), 0, func() { p.w.checkObeyed(p, ref) })
		}
	}
	if !p.registered {
		p.w.at(p.w.now(), 1, func() { p.registered = true; p.host.stream() })
	}
}

// Paces of trainers.
const (
	handOver   = 10 * time.Second // a trainer waits for the next process
	leaveGrace = 2 * time.Second  // it takes to save and leave
)

// trainer is a process that computes. Nothing but its end and its devices is
// known of it.
type trainer struct {
	host    *host
	ref     job.Ref
	devices []string
	proc    *process // whose child it is
	ends    string   // done, failed, fatal: if nobody stops it
	done    instant
	handed  bool // it waits for the next process
	leaving bool // it was asked to save and leave
	gone    bool
	why     string
	ended   chan struct{}

	mu       sync.Mutex
	deadline instant
}

// Extend is attempt.Child's.
func (t *trainer) Extend(d time.Duration) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.host.w.Mutant.DeadlineFromAnswer {
		d = t.host.w.plan.outOfTouch
	}
	t.deadline = t.host.w.now() + d
	return nil
}

// Kill is attempt.Child's. No device breaks here.
func (*trainer) Kill() {}

func (t *trainer) due() instant {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.deadline
}

// start begins to compute.
func (t *trainer) start(r *rand.Rand, work time.Duration) {
	w := t.host.w
	if !w.Mutant.StartLate && t.due() <= w.now() {
		t.gone, t.why = true, "deadline"
		close(t.ended)
		return
	}
	w.log(t.host.name, "computes", t.ref, t.devices)
	w.checkStart(t)
	t.host.trainers = append(t.host.trainers, t)
	t.done = w.now() + work
	w.at(t.done, r.Uint64(), func() { t.stop(t.ends) })
	t.watch()
}

// watch is the shim's deadline.
func (t *trainer) watch() {
	w := t.host.w
	if w.Mutant.NoDeadline {
		return
	}
	w.at(t.due(), uint64(len(t.ref.Job)), func() {
		switch {
		case t.gone:
		case t.due() <= w.now():
			t.stop("deadline")
			w.res.Count["deadline"]++
		default:
			t.watch()
		}
	})
}

// stop is the end of it.
func (t *trainer) stop(why string) {
	if t.gone {
		return
	}
	t.gone, t.why = true, why
	t.host.trainers = slices.DeleteFunc(t.host.trainers, func(o *trainer) bool { return o == t })
	t.host.w.log(t.host.name, "computes no more", t.ref, why)
	t.host.w.ran[t.ref] = t.host.w.now()
	close(t.ended)
}

// Run is agent.Runner's.
func (p *process) Run(ctx context.Context, as job.Assignment, live *attempt.Live) error {
	r := p.w.dice(p.name, "run "+as.Ref.String())
	if p.w.Mutant.ShareDevices {
		live.Free()
	}
	prepares := between(r, 0, 300*time.Millisecond)
	if chance(r, 10) { // a large model
		prepares *= 10
	}
	if !p.pause(ctx, prepares) {
		return p.stopped(ctx, as, live, nil)
	}
	t := &trainer{host: p.host, ref: as.Ref, devices: as.Devices, proc: p, ended: make(chan struct{}), ends: "done"}
	work := time.Duration(0)
	if !p.do("plan "+string(as.Ref.Job), func() {
		pl := p.w.base.byID[as.Ref.Job].plan
		work = pl.work/2 + between(r, 0, pl.work)
		if chance(r, pl.fails) {
			t.ends = "failed"
			if chance(r, pl.fatal) {
				t.ends = "fatal"
			}
		}
	}) {
		return errOver
	}
	live.Attach(t)
	if p.w.Mutant.DeadlineFromAccept {
		_ = t.Extend(p.w.plan.outOfTouch)
	}
	if !p.do("start "+string(as.Ref.Job), func() { t.start(r, work) }) {
		return errOver
	}
	return p.follow(ctx, as, live, t)
}

// follow hears the trainer to its end, and settles.
func (p *process) follow(ctx context.Context, as job.Assignment, live *attempt.Live, t *trainer) error {
	p.mu.Lock()
	p.under[as.Ref] = t
	p.mu.Unlock()
	defer live.Attach(nil)
	shown := 0 * time.Second
	for {
		tick := time.NewTimer(p.jitter(shown))
		select {
		case <-t.ended:
		case <-ctx.Done():
		case <-p.dead:
		case <-tick.C:
		}
		tick.Stop()
		switch { // several may be true, and a select would take any
		case is(p.dead):
			<-p.w.over
			return errOver
		case ctx.Err() != nil:
			return p.stopped(ctx, as, live, t)
		case is(t.ended):
			if !p.do("ended "+string(as.Ref.Job), func() {}) { // frozen, it hears of it later
				return errOver
			}
			return p.settle(ctx, as, live, t, p.outcome(t.why))
		}
		shown = 3 * time.Second
		if len(p.w.plan.rollBacks) > 0 {
			shown = 300 * time.Millisecond
		}
		if err := p.ship(ctx, as.Ref, t); job.KindOf(err) == job.LeaseLost {
			if !p.end(t, "it may not write") {
				return errOver
			}
			return err
		}
	}
}

// ship writes, and does not wait for it beyond the end of the trainer.
func (p *process) ship(ctx context.Context, ref job.Ref, t *trainer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p.wg.Go(func() {
		select {
		case <-t.ended:
			cancel()
		case <-ctx.Done():
		}
	})
	return p.store.append(ctx, ref)
}

func is(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// end ends a trainer and waits for it.
func (p *process) end(t *trainer, why string) bool {
	return t == nil || p.do("end "+string(t.ref.Job), func() { t.stop(why) })
}

func (p *process) outcome(why string) proto.Event {
	switch why {
	case "done":
		return proto.Event{Outcome: proto.Completed}
	case "failed":
		return proto.Event{Outcome: proto.Failed, Retryable: true, Counted: true}
	case "fatal":
		return proto.Event{Outcome: proto.Failed}
	}
	return proto.Event{Outcome: proto.HandedBack, Retryable: true}
}

// stopped does what the end of ctx means.
func (p *process) stopped(ctx context.Context, as job.Assignment, live *attempt.Live, t *trainer) error {
	if is(p.dead) {
		<-p.w.over
		return errOver
	}
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, attempt.ErrHandOver):
		if !p.leave(as, t, nil) {
			return errOver
		}
		return attempt.ErrHandOver
	case errors.Is(cause, attempt.ErrLeaseLost):
		if !p.w.Mutant.IgnoreLost {
			if !p.end(t, "lost") {
				return errOver
			}
		}
		return &job.Failure{Kind: job.LeaseLost, Err: cause}
	case errors.Is(cause, attempt.ErrCancelled):
		if !p.end(t, "cancelled") {
			return errOver
		}
		return p.settle(ctx, as, live, t, proto.Event{Outcome: proto.Cancelled})
	}
	if t != nil { // it saves and leaves, or is done before
		p.do("leaves "+string(as.Ref.Job), func() { t.leaving = true })
		r := p.w.dice(p.name, "leave "+as.Ref.String())
		p.w.at(p.w.now()+between(r, time.Millisecond, leaveGrace), r.Uint64(), func() { t.stop("left") })
		select {
		case <-t.ended:
		case <-p.dead:
		}
		if !p.do("left "+string(as.Ref.Job), func() {}) {
			return errOver
		}
		return p.settle(ctx, as, live, t, p.outcome(t.why))
	}
	return p.settle(ctx, as, live, nil, p.outcome("left"))
}

// settle settles until there is a definite answer, as a real attempt does.
func (p *process) settle(ctx context.Context, as job.Assignment, live *attempt.Live, t *trainer, end proto.Event) error {
	if !p.w.Mutant.FreeLate {
		live.Free()
	}
	always, freed := context.WithoutCancel(ctx), p.w.now()
	for wait := 200 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		call, cancel := context.WithTimeout(always, 30*time.Second)
		_, err := p.store.settle(call, as.Ref, end, p.w.now()-freed)
		cancel()
		if err == nil || job.KindOf(err) == job.LeaseLost || errors.Is(err, errOver) || p.w.Mutant.GiveUpSettle {
			return err
		}
		if errors.Is(context.Cause(ctx), attempt.ErrHandOver) {
			if !p.leave(as, t, &end) {
				return errOver
			}
			return attempt.ErrHandOver
		}
		if !p.pause(always, wait) {
			return errOver
		}
	}
}

// leave leaves an attempt to the next process.
func (p *process) leave(as job.Assignment, t *trainer, end *proto.Event) bool {
	return p.do("leave "+string(as.Ref.Job), func() {
		p.host.left[as.Ref] = &left{as: as, t: t, end: end}
		if t == nil || t.gone {
			return
		}
		t.handed = true
		r := p.w.dice(t.ref.String(), "hand over")
		p.w.at(p.w.now()+handOver, r.Uint64(), func() {
			if t.handed && !t.gone {
				t.stop("nobody came")
				p.host.report(t.ref, p.name, p.w.now()+between(r, time.Millisecond, 100*time.Millisecond), 5)
			}
		})
	})
}

// Left is agent.Runner's.
func (p *process) Left(ctx context.Context) []attempt.Left {
	for {
		busy := false
		if !p.do("left", func() {
			busy = slices.ContainsFunc(p.host.trainers, func(t *trainer) bool { return !t.handed })
		}) {
			return nil
		}
		if !busy || p.w.Mutant.RegisterOverOrphans {
			break
		}
		if !p.pause(ctx, 5*time.Millisecond) {
			return nil
		}
	}
	var out []attempt.Left
	p.do("list", func() {
		if p.w.Mutant.ForgetLeft {
			return
		}
		for _, l := range p.host.left {
			out = append(out, attempt.Left{Assignment: l.as})
		}
	})
	slices.SortFunc(out, func(a, b attempt.Left) int {
		if a.Assignment.Ref.Job < b.Assignment.Ref.Job {
			return -1
		}
		return 1
	})
	return out
}

// Resume is agent.Runner's.
func (p *process) Resume(ctx context.Context, l attempt.Left, live *attempt.Live) error {
	as := l.Assignment
	var x *left
	if !p.do("adopt "+string(as.Ref.Job), func() {
		x = p.host.left[as.Ref]
		delete(p.host.left, as.Ref)
		p.w.log(p.name, "goes on with", as.Ref)
		p.w.checkResume(p, as.Ref)
		p.w.res.Count["adopted"]++
		if x.t != nil {
			x.t.handed, x.t.proc = false, p
		}
	}) {
		return errOver
	}
	switch {
	case x.end != nil:
		return p.settle(ctx, as, live, x.t, *x.end)
	case x.t == nil:
		return p.Run(ctx, as, live)
	}
	live.Attach(x.t)
	return p.follow(ctx, as, live, x.t)
}

// Discard is agent.Runner's.
func (p *process) Discard(_ context.Context, l attempt.Left) {
	p.do("discard "+string(l.Assignment.Ref.Job), func() {
		if x := p.host.left[l.Assignment.Ref]; x != nil && x.t != nil {
			x.t.stop("discarded")
		}
		delete(p.host.left, l.Assignment.Ref)
	})
}

// seat is where dispatchers run, one after the other.
type seat struct {
	w     *world
	name  string
	life  *life
	boots int
	actor *actor
	all   []*actor
	d     *dispatch.Dispatcher // nil: there is none
	hears instant              // when it hears the last of what it was told
}

func (s *seat) end() {
	for _, a := range s.all {
		a.kill()
		a.quit()
	}
}

func (s *seat) begin() {
	w := s.w
	if s.d != nil {
		return
	}
	s.boots++
	a := newActor(w, fmt.Sprintf("%s.%d", s.name, s.boots), s.life)
	st := dispatcherStore{a}
	d := dispatch.New(dispatch.Parts{
		Self: store.Dispatcher{ID: a.name, Name: a.name}, Store: st, Queue: st, Metrics: w.Metrics.Dispatcher, Log: w.logger(a.name),
		Config: dispatch.Config{
			Policy: job.Policy{BaseModels: []string{model}, MaxGPUs: 8}, Place: place.Usual(),
			Poll: poll, Resend: resend, Accept: accept, Lease: lease, Patience: w.plan.patience, Term: term,
		},
		Push: func(agent string) bool {
			r := w.dice(a.name, "push "+agent)
			w.at(w.now()+between(r, 300*time.Microsecond, 3*time.Millisecond), r.Uint64(), func() { w.push(agent) })
			return true
		},
		Jitter: a.jitter,
	})
	s.actor, s.d = a, d
	s.all = append(s.all, a)
	w.log(a.name, "starts")
	w.wg.Go(func() {
		err := d.Run(a.ctx)
		a.do("exit", func() {
			w.log(a.name, "exits", err)
			a.ended = true
			if s.d == d {
				s.d = nil
			}
		})
		a.quit()
	})
}

// push goes over an agent's presence stream, when there is one.
func (w *world) push(agent string) {
	for _, h := range w.hosts {
		if p := h.proc; h.agent == agent && p != nil && p.registered && !p.killed && !h.life.frozen.has(w.now()) && !h.life.cut.has(w.now()) {
			p.daemon.Look()
		}
	}
}

func (s *seat) hit(k strike) {
	w := s.w
	if k.after > 0 {
		w.at(k.at+k.after, w.dice(s.name, "after").Uint64(), s.begin)
		w.at(w.plan.calm, w.dice(s.name, "at last").Uint64(), s.begin)
	}
	if s.d == nil {
		return
	}
	w.log(s.actor.name, "is hit", k.blow)
	if k.blow == stop {
		s.actor.quit()
		return
	}
	s.actor.kill()
	s.d = nil
}

// tell calls the dispatcher, when it is there to hear it; what it is told while
// it is frozen it hears in the same order.
func (s *seat) tell(what func(*dispatch.Dispatcher)) {
	d, a := s.d, s.actor
	when := max(s.life.frozen.end(s.w.now()), s.hears+1)
	s.hears = when
	s.w.at(when, 0, func() {
		if !a.killed {
			what(d)
		}
	})
}
