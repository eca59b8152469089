// Package place decides which job runs where. It is one pure function of jobs,
// what runs, hosts, users and policy: equal inputs give equal outputs in
// whatever order they are listed, no clock is read, nothing is remembered. The
// dispatcher's leader calls it and carries out the answer.
//
// Jobs are served one after another: by priority; then whoever was promised
// devices by the last call; then the user with the least weighted share; then
// the earliest deadline, the earliest submission, the id. Each takes the first
// of these that works:
//
//	assign    devices that are free and promised to nobody
//	backfill  devices that are promised, if it ends before they are needed
//	claim     devices that are coming free, and those of jobs of lower
//	          priority that are asked to leave for it (preemption)
//	reserve   for a gang that waits long enough: a host that fills up for it
//	wait      with the reason in words, and when it may start
package place

import (
	"cmp"
	"container/heap"
	"math"
	"slices"
	"time"

	"lorayard/internal/job"
)

// Input is all that Place looks at.
type Input struct {
	Now     time.Time
	Jobs    []Job // that wait
	Running []Running
	Hosts   []Host
	Users   map[string]User // who is missing has the zero User
	Policy  Policy
}

// Job is a job that waits.
type Job struct {
	ID          string
	User        string
	Wish        job.Wish
	Count       int               // devices, all on one host; 0: work that needs none
	MinBytes    int64             // of memory, of each device
	BaseModel   string            // empty: none needed
	Labels      map[string]string // that the host must carry
	Priority    int               // larger goes first
	Submitted   time.Time
	Deadline    time.Time     // zero: none
	Preemptible bool          // once it runs; Place only hands it through to Running
	Avoid       []string      // agents of failed attempts: taken when no other fits
	Estimate    time.Duration // how long it will run; 0: unknown
	// Reserved is the agent that the last Result promised to this job, if any.
	// With it the job keeps its place in the queue and its host; without it
	// nothing breaks, but a promise may move to another job or host.
	Reserved string
}

// Running is an attempt that holds devices or is about to.
type Running struct {
	Job         string
	User        string
	Agent       string
	Devices     []string // UUIDs
	Priority    int
	Preemptible bool
	Started     time.Time
	Ends        time.Time // as estimated; zero: unknown
	Leaving     bool      // it was asked to leave, or is ending: its devices come free soon
}

// Device is one device of a host.
type Device struct {
	UUID        string
	Class       string
	MemoryBytes int64
	Fault       string // why it must not be used; empty: fit
	Busy        bool   // held by somebody, whether or not Running shows it
	Node        int    // NUMA node; only whether two are the same matters
}

// Host is an agent.
type Host struct {
	Agent   string
	Devices []Device
	// Links says how well Devices[i] and Devices[j] are connected, larger is
	// better, symmetric. Nil: all equally well.
	Links        [][]int
	BaseModels   []string
	Labels       map[string]string
	PricePerHour map[string]int64 // by class, micro-dollars a device; one that is missing is the dearest
	Draining     bool             // takes nothing new
}

// User is what counts for all jobs of one user.
type User struct {
	Weight           float64 // of the fair share; 0 means 1
	RecentGPUSeconds float64 // used lately, running attempts included, decayed as the caller likes
	MaxGPUs          int     // at once; 0: no limit
	MaxQueued        int     // jobs that take part in the queue at once; 0: no limit
	Hold             string  // why no job of this user may start; empty: they may
}

// Policy is what an operator may turn. The zero Policy preempts without
// mercy and reserves nothing; see Usual.
type Policy struct {
	MinRun       time.Duration // nobody is preempted earlier in an attempt
	ReserveAfter time.Duration // a gang that has waited so long may reserve a host
	MaxReserved  int           // reservations at once
	// Horizon is what a GPU in use weighs against the past: the user of one
	// counts as having used it for so long already. 0 means 15 minutes, the
	// length of a small job.
	Horizon time.Duration
	// FetchModels means that agents can fetch a base model. Those that hold it
	// are then preferred; otherwise nobody else will do.
	FetchModels bool
	Hold        string // why nothing may start at all; empty: it may
}

// Usual is the policy for jobs of minutes to hours: an attempt may be preempted
// once it has repaid its start-up of a minute or two several times over. Two
// hosts at most fill up for gangs; on four hosts of 8 at a load of 85 % that
// takes a third off the waits of 8 GPUs and adds some minutes to those of one,
// the fewer the later it begins.
func Usual() Policy {
	return Policy{MinRun: 10 * time.Minute, ReserveAfter: 10 * time.Minute, MaxReserved: 2}
}

// Result is the answer. Every waiting job is in Assignments or in Waiting.
type Result struct {
	Assignments  []Assignment
	Preemptions  []Preemption
	Reservations []Reservation
	Waiting      map[string]Wait
}

// Assignment gives devices of one host to a job.
type Assignment struct {
	Job     string
	Agent   string
	Devices []string // UUIDs, sorted
}

// Preemption asks a running job to leave.
type Preemption struct {
	Job   string
	Agent string
	For   string // the job that its devices are for
}

// Reservation promises devices to a job that cannot start yet. The next call
// takes it as Job.Reserved.
type Reservation struct {
	Job     string
	Agent   string
	Devices []string  // UUIDs, sorted; some are free, others are to come
	Start   time.Time // when all of them are expected; zero: unknown
	Claim   bool      // all that is missing is being left at this moment
}

// Wait says why a job waits and when it may start. Times that nobody can
// estimate are zero.
type Wait struct {
	Reason   string    // in words, for a person
	Code     string    // in rough, for a count: no_devices, promised, quota, behind_own, nowhere or paused
	Start    time.Time // counting who goes first
	Earliest time.Time // if nobody went first and all ended at their estimates
	Latest   time.Time // if everything took half as long again
}

// Place answers in.
func Place(in Input) Result {
	s := newState(in)
	for _, level := range s.levels() {
		for queue := level; queue.Len() > 0; {
			line := queue[0]
			s.serve(line.jobs[0])
			if line.jobs = line.jobs[1:]; len(line.jobs) == 0 {
				heap.Pop(&queue)
			} else {
				heap.Fix(&queue, 0) // the share may have grown
			}
		}
	}
	s.explain()
	return s.result
}

// serve gives one job what it can have.
func (s *state) serve(w *waiting) {
	u := w.user
	u.queued++
	switch {
	case s.Policy.Hold != "":
		s.wait(w, held, s.Policy.Hold)
		return
	case u.Hold != "":
		s.wait(w, held, u.Hold)
		return
	case u.MaxQueued > 0 && u.queued > u.MaxQueued:
		s.wait(w, tooManyQueued, "")
		return
	case w.Count <= 0:
		s.placeAnywhere(w)
		return
	case u.MaxGPUs > 0 && u.gpus+w.Count > u.MaxGPUs:
		// Its own small jobs must not keep a large one waiting for ever.
		if u.first == nil && w.Count <= u.MaxGPUs && s.aged(w) {
			u.first = w
		}
		s.wait(w, overQuota, "")
		return
	case u.first != nil:
		s.wait(w, behindOwn, u.first.ID)
		return
	}
	w.demand = s.demandOf(w.Job)
	switch {
	case s.assign(w), s.backfill(w):
	case s.claim(w):
	case s.reserve(w):
	default:
		s.wait(w, blocked, "")
	}
}

func (s *state) aged(w *waiting) bool { return s.Now.Sub(w.Submitted) >= s.Policy.ReserveAfter }

// assign gives w the cheapest suitable devices: a host that did not fail it,
// the least price, a host that holds the base model, the least memory, the
// fewest free devices left behind, the first by name.
func (s *state) assign(w *waiting) bool {
	d := w.demand
	if d.full { // what is free only becomes less during a call
		return false
	}
	best := -1
	var least rank
	for i := range d.pools {
		p := &s.pools[d.pools[i].pool]
		if p.free < d.count {
			continue
		}
		r := rank{avoid: w.avoids(s.hosts[p.host].Agent), price: p.price, lacks: d.pools[i].lacks, gib: p.gib, free: p.free}
		if best < 0 || r.before(&least) { // pools are in the order of names
			best, least = d.pools[i].pool, r
		}
	}
	if best < 0 {
		d.full = true
		return false
	}
	p := &s.pools[best]
	s.give(w, p, p.choose(d.count, func(d *device) bool { return d.open() }))
	return true
}

type rank struct {
	avoid, lacks bool
	price, gib   int64
	free         int
}

func (a *rank) before(b *rank) bool {
	switch {
	case a.avoid != b.avoid:
		return b.avoid
	case a.price != b.price:
		return a.price < b.price
	case a.lacks != b.lacks:
		return b.lacks
	case a.gib != b.gib:
		return a.gib < b.gib
	}
	return a.free < b.free
}

// backfill gives w devices that wait for the rest of somebody's reservation,
// if it will be gone by then.
func (s *state) backfill(w *waiting) bool {
	if w.Estimate <= 0 {
		return false
	}
	for _, r := range s.reservations {
		// An unknown start is long past.
		if s.Now.Add(w.Estimate).After(r.Start) || r.free < w.Count || !w.demand.takes(r.pool) {
			continue
		}
		p := &s.pools[r.pool]
		s.give(w, p, p.choose(w.Count, func(d *device) bool { return !d.busy && d.held == r }))
		r.free -= w.Count
		return true
	}
	return false
}

// give assigns devices of p.
func (s *state) give(w *waiting, p *pool, devices []*device) {
	a := Assignment{Job: w.ID, Agent: s.hosts[p.host].Agent}
	for _, d := range devices {
		a.Devices = append(a.Devices, d.uuid)
		if d.open() {
			p.free--
		}
		d.busy = true
		if w.Estimate > 0 {
			d.ends = s.Now.Add(w.Estimate)
		}
	}
	p.version++
	w.user.gpus += len(devices)
	s.result.Assignments = append(s.result.Assignments, a)
}

// placeAnywhere places work that needs no device: on the host that has least
// of it.
func (s *state) placeAnywhere(w *waiting) {
	var best *host
	for i := range s.hosts {
		h := &s.hosts[i]
		if h.Draining || !h.carries(w.Labels) || s.lacks(h, w.BaseModel) && !s.Policy.FetchModels {
			continue
		}
		if best == nil || w.avoids(best.Agent) && !w.avoids(h.Agent) ||
			w.avoids(best.Agent) == w.avoids(h.Agent) && h.light < best.light {
			best = h
		}
	}
	if best == nil {
		s.wait(w, blocked, "")
		return
	}
	best.light++
	s.result.Assignments = append(s.result.Assignments, Assignment{Job: w.ID, Agent: best.Agent})
}

func (w *waiting) avoids(agent string) bool { return slices.Contains(w.Avoid, agent) }

// levels gives the queues of the jobs, one for each priority, highest first.
func (s *state) levels() []lines {
	all := make([]*waiting, 0, len(s.Jobs))
	for i := range s.Jobs {
		all = append(all, &waiting{Job: &s.Jobs[i], user: s.user(s.Jobs[i].User)})
	}
	slices.SortFunc(all, func(a, b *waiting) int {
		return cmp.Or(cmp.Compare(b.Priority, a.Priority), cmp.Compare(a.User, b.User), a.compare(b))
	})
	var out []lines
	var last *waiting
	seen := make(map[string]bool, len(all))
	for _, w := range all {
		if seen[w.ID] {
			continue // listed twice
		}
		seen[w.ID] = true
		if last == nil || w.Priority != last.Priority {
			out = append(out, nil)
			last = nil
		}
		level := &out[len(out)-1]
		if last == nil || w.User != last.User {
			*level = append(*level, &line{})
		}
		l := (*level)[len(*level)-1]
		l.jobs = append(l.jobs, w)
		last = w
	}
	for i := range out {
		heap.Init(&out[i])
	}
	return out
}

// line is the jobs of one user in one level.
type line struct{ jobs []*waiting }

// lines is a heap: whose job is next.
type lines []*line

func (l lines) Len() int      { return len(l) }
func (l lines) Swap(i, j int) { l[i], l[j] = l[j], l[i] }
func (l *lines) Push(any)     { panic("a level only shrinks") }
func (l *lines) Pop() any {
	last := len(*l) - 1
	out := (*l)[last]
	*l = (*l)[:last]
	return out
}

func (l lines) Less(i, j int) bool {
	a, b := l[i].jobs[0], l[j].jobs[0]
	if a.promised() != b.promised() {
		return a.promised()
	}
	if x, y := a.user.share(), b.user.share(); x != y {
		return x < y
	}
	return a.compare(b) < 0
}

// waiting is a job in its queue.
type waiting struct {
	*Job
	user   *user
	demand *demand // nil if devices do not matter
}

func (w *waiting) promised() bool { return w.Reserved != "" }

// compare is the order in which jobs of one user are served.
func (w *waiting) compare(o *waiting) int {
	if w.promised() != o.promised() {
		if w.promised() {
			return -1
		}
		return 1
	}
	if w.Deadline.IsZero() != o.Deadline.IsZero() {
		if o.Deadline.IsZero() {
			return -1
		}
		return 1
	}
	return cmp.Or(w.Deadline.Compare(o.Deadline), w.Submitted.Compare(o.Submitted), cmp.Compare(w.ID, o.ID))
}

// user is a user during one call.
type user struct {
	User
	gpus    int      // in use, given and claimed
	queued  int      // jobs served so far
	first   *waiting // of its jobs, that all others wait for
	horizon float64  // seconds
	runs    []*run
	next    map[int]time.Time // devices → when the quota is expected to have room for so many
}

// share is what the user has had, for the fair order.
func (u *user) share() float64 {
	had := max(u.RecentGPUSeconds, 0) + float64(u.gpus)*u.horizon
	if u.Weight > 0 {
		had /= u.Weight
	}
	if math.IsNaN(had) {
		return 0
	}
	return had
}
