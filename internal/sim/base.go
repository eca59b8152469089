package sim

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"lorayard/internal/cost"
	"lorayard/internal/job"
	"lorayard/internal/proto"
	"lorayard/internal/store"
)

// base is the database. What a call does to a job is a transition of
// internal/proto, as it is of the SQL (internal/store's tests compare the two);
// around it stands what placement, money and leading need.
type base struct {
	*world
	rules  Mutant
	rows   []*row // in the order in which they were inserted
	byID   map[job.ID]*row
	agents map[string]*agentRow
	leader leader
	ears   []*ear
	idle   time.Duration // of what is being settled: how long its devices have been free
	era    instant       // when it was rolled back for the last time; 0: never
}

// row is a job.
type row struct {
	proto.Job
	id       job.ID
	plan     plannedJob
	admitted instant // 0: not yet
	spec     job.Spec
	devices  []string // of the current attempt
	assigned instant
	sent     instant
	accepted instant
	notOpen  instant // it is not placed before
	waiting  string
	usage    []usage
	paid     []cost.MicroUSD // cost records
	past     []row           // where the database may be rolled back to, oldest first
	since    instant         // of this state
}

// usage is the time of an attempt on one device.
type usage struct {
	attempt          int
	device           string
	from, to         instant
	closed, billable bool
}

// agentRow is an agent, as the database knows it.
type agentRow struct {
	proto    proto.Agent // but for its lease
	self     store.Agent
	until    instant // of the lease
	draining bool
}

type leader struct {
	holder string
	term   int64
	since  instant
	until  instant
}

func (b *base) begin(w *world) {
	b.world, b.rules = w, w.Mutant
	b.byID, b.agents = map[job.ID]*row{}, map[string]*agentRow{}
	b.leader.until = -1
}

// standing is an agent with its lease as of now.
func (b *base) standing(id string, patience time.Duration) proto.Agent {
	a := b.agents[id]
	if a == nil {
		return proto.Agent{Lease: proto.LeaseSilent}
	}
	p := a.proto
	switch now := b.now(); {
	case a.until > now:
		p.Lease = proto.LeaseHeld
	case a.until >= now-patience:
		p.Lease = proto.LeaseOver
	default:
		p.Lease = proto.LeaseSilent
	}
	return p
}

// next is one transition of one job. The agent's row follows it, but for a
// lease that begins: how long it lasts is the caller's.
func (b *base) next(r *row, agent string, e proto.Event, patience time.Duration) proto.Answer {
	before := r.Job
	r.remember(b.plan.rollBacks)
	as := b.standing(agent, patience)
	s, ans := b.rules.Next(proto.State{Job: r.Job, Agent: as}, e)
	r.Job = s.Job
	if a := b.agents[agent]; a != nil && s.Agent != as {
		if as.Lease == proto.LeaseHeld && s.Agent.Lease != proto.LeaseHeld {
			a.until = b.now()
		}
		a.proto = s.Agent
	}
	if often := e.Do == proto.Renew || e.Do == proto.Append || e.Do == proto.Register; ans.Kind == proto.Done && !often || r.Control != before.Control || r.Status != before.Status {
		b.log("base", string(e.Do), r.id, len(r.Attempts), agent, e.Boot, e.Outcome, "→", r.Control, r.Status)
	}
	if r.Control != before.Control {
		r.since = b.now()
	}
	b.book(r, before, e)
	b.judge(r, before, e, ans)
	return ans
}

// remember keeps a state that the database may be rolled back to.
func (r *row) remember(rollBacks []rollBack) {
	if len(rollBacks) == 0 || r.Control != proto.Queued && r.Control != proto.Assigned || len(r.past) > 0 && r.past[len(r.past)-1].since == r.since {
		return
	}
	was := *r
	was.past, was.usage = nil, slices.Clone(r.usage)
	r.past = append(r.past, was)
}

// rollBack is a failover to a copy that has not seen the last commits: accepts,
// and assignments before them. A settlement that is rolled back is more than
// the rules can stand, and so is a job's failure or loss.
func (b *base) rollBack(lag time.Duration) {
	to := b.now() - lag
	for _, r := range b.rows {
		for i, was := range slices.Backward(r.past) {
			next := r.since // when that state ended
			if i+1 < len(r.past) {
				next = r.past[i+1].since
			}
			_, n := r.Current()
			_, m := was.Current()
			if next <= to || r.Status.Final() || r.Control == proto.Queued || n > m+1 || n == m && was.Control == proto.Queued {
				break
			}
			status, wanted := r.Status, r.Desired
			past := r.past[:i]
			*r = was
			r.past, r.since = past, b.now()
			if status == job.Cancelled {
				r.Status = status
			}
			if wanted == job.DesirePause {
				r.Desired = wanted
			}
			b.log("base", "forgets what became of", r.id, "→", r.Control, len(r.Attempts))
			b.res.Count["rolled back"]++
			b.era = b.now()
			if was.since <= to {
				break
			}
		}
	}
}

// book keeps the books that the protocol does not know: devices, usage, money.
func (b *base) book(r *row, before proto.Job, e proto.Event) {
	now := b.now()
	if before.Control != proto.Accepted && r.Control == proto.Accepted {
		r.accepted, r.waiting = now, ""
		for _, d := range r.devices {
			r.usage = append(r.usage, usage{attempt: len(r.Attempts), device: d, from: now, to: now + time.Microsecond})
		}
	}
	for i, a := range r.Attempts {
		if a.Outcome == "" || i >= len(before.Attempts) || before.Attempts[i].Outcome != "" {
			continue
		}
		alive := a.Outcome != proto.Lost
		billable := a.Outcome == proto.Completed || a.Outcome == proto.Cancelled || a.Outcome == proto.HandedBack || a.Outcome == proto.Failed && !e.Retryable
		for k := range r.usage {
			if u := &r.usage[k]; u.attempt == i+1 && !u.closed {
				if alive {
					u.to = max(u.to, now)
				}
				if b.idle > time.Second && !b.rules.PayIdle {
					u.to = max(u.from+time.Microsecond, min(u.to, now-b.idle))
				}
				u.closed, u.billable = true, billable || b.rules.PayLost
			}
		}
	}
	if r.Control == proto.Queued && before.Control != proto.Queued {
		r.devices = nil
		if before.Control == proto.Accepted {
			r.notOpen = now
			if e.Outcome == proto.Failed {
				r.notOpen += 5 * time.Second
			}
			b.notify("job:" + string(r.id))
		}
	}
	if r.Settlements > before.Settlements {
		b.res.Count[string(r.Status)]++
	}
	if r.Settlements > before.Settlements && len(r.paid) == 0 {
		if total, used := r.bill(); used > 0 {
			r.paid = append(r.paid, total)
		}
	}
}

// bill is what a job costs, and the time that it is for.
func (r *row) bill() (total cost.MicroUSD, used time.Duration) {
	for _, u := range r.usage {
		if u.billable {
			used += u.to - u.from
			total += cost.Price(cost.Rate{PerHour: rate}, u.to-u.from)
		}
	}
	return total, used
}

func (r *row) agent() string {
	if r.Control != proto.Assigned && r.Control != proto.Accepted {
		return ""
	}
	cur, _ := r.Current()
	return cur.Agent
}

// The app.

func (b *base) insert(p plannedJob) *row {
	r := &row{id: job.ID(fmt.Sprintf("j%d", len(b.rows))), plan: p, Job: proto.New()}
	b.rows = append(b.rows, r)
	b.byID[r.id] = r
	b.log("app", "inserts", r.id)
	b.notify("job:" + string(r.id))
	return r
}

func (b *base) cancel(r *row) {
	was := r.Status
	b.next(r, "", proto.Event{Do: proto.Cancel}, 0)
	if r.Status == was {
		return
	}
	if r.Control == proto.Accepted {
		b.notify("look:" + r.agent())
	} else {
		b.notify("cancelled:" + string(r.id))
	}
}

// want is an operator's or the dispatcher's.
func (b *base) want(r *row, d job.Desired) bool {
	ok := r.admitted > 0 && b.next(r, "", proto.Event{Do: proto.Want, Desired: d}, 0).Kind == proto.Done
	if a := r.agent(); ok && a != "" {
		b.notify("look:" + a)
	} else if ok {
		b.notify("job:" + string(r.id))
	}
	return ok
}

// What dispatchers call.

func (b *base) campaign(id string, ttl time.Duration) int64 {
	l, now := &b.leader, b.now()
	if l.holder != id && l.until >= now {
		return 0
	}
	if l.holder != id || l.until < now {
		l.since = now
	}
	if l.holder != id {
		l.term++
		b.log("base", "is led by", id, l.term)
	}
	l.holder, l.until = id, max(l.until, now+ttl)
	return l.term
}

func (b *base) resign(id string) {
	if b.leader.holder == id {
		b.leader.holder, b.leader.until = "", b.now()-1
		b.notify(fmt.Sprint("leader:", b.leader.term))
	}
}

func (b *base) unadmitted() (out []store.Row) {
	if b.rules.NeverAdmit {
		return nil
	}
	for _, r := range b.rows {
		if r.admitted == 0 && r.Status == job.Queued {
			preset := "fast"
			if r.plan.bad {
				preset = "unheard of"
			}
			out = append(out, store.Row{
				ID: r.id, User: r.plan.user, Preset: preset, Hyperparameters: []byte(`{}`),
				GPUConfig: fmt.Appendf(nil, `{"type":%q,"count":%d}`, class, r.plan.gpus), DatasetOwner: r.plan.user, DatasetStatus: "ready",
			})
		}
	}
	return out
}

func (b *base) admit(as []store.Admission) []store.Waiting {
	joined := map[job.ID]bool{}
	for _, a := range as {
		if r := b.byID[a.ID]; r.admitted == 0 && r.Status == job.Queued {
			r.admitted, r.spec = b.now(), a.Spec
			joined[r.id] = true
			b.log("base", "admits", r.id)
		}
	}
	return slices.DeleteFunc(b.waitingJobs(), func(w store.Waiting) bool { return !joined[w.ID] })
}

// refuse is the SQL's finish_job on a row that never was in the queue: beyond
// the protocol, which begins with admitted jobs.
func (b *base) refuse(id job.ID) {
	r := b.byID[id]
	if r.admitted > 0 {
		return
	}
	r.admitted = b.now()
	if !r.Status.Final() {
		r.Status = job.Failed
	}
	r.Control, r.Settlements = proto.Settled, 1
	b.log("base", "refuses", id)
}

func (b *base) waitingJobs() (out []store.Waiting) {
	for _, r := range b.rows {
		if r.admitted == 0 || r.Control != proto.Queued || r.Desired == job.DesirePause || r.notOpen > b.now() || r.Status != job.Queued {
			continue
		}
		w := store.Waiting{ID: r.id, User: r.plan.user, Attempt: len(r.Attempts), Spec: r.spec, Priority: r.plan.priority, Admitted: b.start.Add(r.admitted), Reason: r.waiting}
		for _, a := range slices.Backward(r.Attempts) {
			if (a.Outcome == proto.Failed || a.Outcome == proto.Lost) && len(w.Failed) < 3 {
				w.Failed = append(w.Failed, a.Agent)
			}
		}
		out = append(out, w)
	}
	return out
}

func (b *base) running() (out []store.Running) {
	for _, r := range b.rows {
		if r.agent() == "" {
			continue
		}
		d := r.Desired
		if r.Status == job.Cancelled {
			d = job.DesireCancel
		}
		out = append(out, store.Running{
			Ref: job.Ref{Job: r.id, Attempt: len(r.Attempts)}, User: r.plan.user, Agent: r.agent(), Devices: r.devices, Spec: r.spec,
			Priority: r.plan.priority, Started: b.start.Add(r.assigned), Desired: d,
		})
	}
	return out
}

func (b *base) openHosts() (out []store.Host) {
	for _, h := range b.hosts {
		a := b.agents[h.agent]
		if a == nil || a.until <= b.now() || a.self.Instance != h.name {
			continue
		}
		x := store.Host{Agent: h.agent, BaseModels: a.self.BaseModels, Devices: a.self.Devices}
		if a.draining {
			x.Closed = "draining"
		}
		out = append(out, x)
	}
	return out
}

// taken reports whether another job than r has one of these devices.
func (b *base) taken(r *row, agent string, devices []string, accepted bool) bool {
	if b.rules.ShareInBase {
		return false
	}
	return slices.ContainsFunc(b.rows, func(o *row) bool {
		return o != r && o.agent() == agent && (!accepted || o.Control == proto.Accepted) &&
			slices.ContainsFunc(devices, func(d string) bool { return slices.Contains(o.devices, d) })
	})
}

func (b *base) assign(as []store.Assignment) (out []store.Send) {
	for _, x := range as {
		r, a := b.byID[x.Job], b.agents[x.Agent]
		if a == nil || a.draining || b.taken(r, x.Agent, x.Devices, false) {
			continue
		}
		old := r.devices
		r.devices = x.Devices
		ans := b.next(r, x.Agent, proto.Event{Do: proto.Assign, Agent: x.Agent, Attempt: x.Attempt}, 0)
		if ans.Kind != proto.Done {
			r.devices = old
			continue
		}
		r.assigned, r.sent, r.waiting = b.now(), b.now(), ""
		b.checkDevices(r)
		out = append(out, b.send(r, ans))
	}
	return out
}

func (b *base) send(r *row, ans proto.Answer) store.Send {
	return store.Send{Agent: ans.Agent, Task: job.Task{Ref: job.Ref{Job: r.id, Attempt: ans.Attempt}, Send: ans.Send, Devices: r.devices}}
}

func (b *base) preempt(refs []job.Ref) (out []job.Ref) {
	for _, ref := range refs {
		if r := b.byID[ref.Job]; len(r.Attempts) == ref.Attempt && b.want(r, job.DesirePreempt) {
			out = append(out, ref)
		}
	}
	return out
}

func (b *base) settleCancelled() (out []job.ID) {
	for _, r := range b.rows {
		if b.rules.NeverSettleCancelled || r.Status != job.Cancelled || r.admitted == 0 {
			continue
		}
		if b.next(r, r.agent(), proto.Event{Do: proto.SettleCancelled}, 0).Kind == proto.Done {
			out = append(out, r.id)
		}
	}
	return out
}

func (b *base) takeBack(after time.Duration, gone []string) (out []job.Ref) {
	for _, r := range b.rows {
		if b.rules.NeverTakeBack || r.Control != proto.Assigned {
			continue
		}
		late := r.assigned < b.now()-after
		if !late && b.standing(r.agent(), 0).Lease == proto.LeaseHeld && !slices.Contains(gone, r.agent()) {
			continue
		}
		if late {
			b.checkLate(r)
		}
		if b.next(r, r.agent(), proto.Event{Do: proto.TakeBack}, 0).Kind == proto.Done {
			out = append(out, job.Ref{Job: r.id, Attempt: len(r.Attempts)})
		}
	}
	return out
}

func (b *base) reap(id string, lease, patience time.Duration) (out []job.Ref) {
	l, now := b.leader, b.now()
	if b.rules.NeverReap || !b.rules.JudgeUnled && (l.holder != id || l.until <= now || l.since > now-lease && !b.rules.JudgeAtOnce) {
		return nil
	}
	for _, r := range b.rows {
		if r.Control != proto.Accepted {
			continue
		}
		if b.next(r, r.agent(), proto.Event{Do: proto.Lose, Attempt: len(r.Attempts)}, patience).Kind == proto.Done {
			out = append(out, job.Ref{Job: r.id, Attempt: len(r.Attempts)})
		}
	}
	return out
}

func (b *base) nextLapse(patience time.Duration) (next time.Duration) {
	for _, r := range b.rows {
		if r.Control != proto.Accepted {
			continue
		}
		if in := b.agents[r.agent()].until + patience - b.now(); in > 0 && (next == 0 || in < next) {
			next = in
		}
	}
	return next
}

func (b *base) resend(after time.Duration) (out []store.Send) {
	for _, r := range b.rows {
		if b.rules.NeverResend || r.Control != proto.Assigned || r.sent >= b.now()-after {
			continue
		}
		if ans := b.next(r, r.agent(), proto.Event{Do: proto.Resend}, 0); ans.Kind == proto.Done {
			r.sent = b.now()
			out = append(out, b.send(r, ans))
		}
	}
	return out
}

func (b *base) reportDeath(agent, boot string, ref job.Ref) bool {
	return b.next(b.byID[ref.Job], agent, proto.Event{Do: proto.ReportDeath, Agent: agent, Boot: boot, Attempt: ref.Attempt, Nonce: ref.Nonce}, 0).Kind == proto.Done
}

// What agents call.

var errStale = errors.New("it is not ours to write")

func stale(ref job.Ref) error { return &job.Failure{Kind: job.LeaseLost, Err: errStale} }

func (b *base) register(self store.Agent, ttl time.Duration, adopt []job.Ref) ([]job.Ref, error) {
	a := b.agents[self.ID]
	if a == nil {
		a = &agentRow{}
		b.agents[self.ID] = a
	}
	e := proto.Event{Do: proto.Register, Agent: self.ID, Boot: self.Boot, Instance: self.Instance, Generation: int(self.Generation)}
	was := b.standing(self.ID, 0)
	s, ans := b.rules.Next(proto.State{Job: proto.New(), Agent: was}, e)
	if ans.Kind == proto.InUse {
		return nil, store.ErrInUse
	}
	if ans.Kind == proto.Replaced {
		return nil, store.ErrReplaced
	}
	for _, r := range b.rows { // each against the row as it was: the last one changes it
		e.Attempt, e.Nonce = 0, ""
		for _, ref := range adopt {
			if ref.Job == r.id {
				e.Attempt, e.Nonce = ref.Attempt, ref.Nonce
			}
		}
		was := r.Job
		b.next(r, self.ID, e, 0)
		b.checkHeir(r, was, self)
	}
	a.proto, a.self, a.draining = s.Agent, self, false
	a.until = max(a.until, b.now()+ttl)
	b.log("base", "registers", self.ID, self.Boot, adopt)
	var kept []job.Ref
	for _, r := range b.rows {
		if cur, n := r.Current(); r.Control == proto.Accepted && cur.Agent == self.ID && cur.Boot == self.Boot {
			kept = append(kept, job.Ref{Job: r.id, Attempt: n, Nonce: cur.Nonce})
		}
	}
	b.notify("agent:" + self.ID)
	return kept, nil
}

// unlisted is how long an accept may be under way.
const unlisted = 10 * time.Second

func (b *base) renew(self store.Agent, ttl time.Duration, st store.AgentState, refs []job.Ref) (store.Wanted, error) {
	a, now := b.agents[self.ID], b.now()
	e := proto.Event{Do: proto.Renew, Agent: self.ID, Boot: self.Boot}
	if _, ans := b.rules.Next(proto.State{Job: proto.New(), Agent: b.standing(self.ID, 0)}, e); ans.Kind == proto.Replaced {
		if now := b.agents[self.ID].self; now.Instance == self.Instance && now.Generation < self.Generation {
			b.wrong("%s is told that %s replaced it, which came before it", self.Boot, now.Boot)
		}
		return store.Wanted{}, store.ErrReplaced
	}
	a.until = max(a.until, now+ttl)
	if a.draining != st.Draining {
		a.draining = st.Draining
		b.notify("agent:" + self.ID)
	}
	w := store.Wanted{Attempts: map[job.Ref]job.Desired{}}
	for _, r := range b.rows {
		i := -1 // an agent may still be about to settle an earlier attempt
		for k, ref := range refs {
			if ref.Job == r.id && (i < 0 || r.Held(ref.Attempt, ref.Nonce)) {
				i = k
			}
		}
		e.Attempt, e.Nonce = 0, ""
		if i >= 0 {
			e.Attempt, e.Nonce = refs[i].Attempt, refs[i].Nonce
		}
		e.Unlisted = r.accepted < now-unlisted
		was := r.Job
		ans := b.next(r, self.ID, e, 0)
		b.checkUnlisted(r, was)
		if i < 0 || ans.Desired == "" {
			continue
		}
		w.Attempts[refs[i]] = ans.Desired
		for k := range r.usage {
			if u := &r.usage[k]; u.attempt == refs[i].Attempt && !u.closed {
				u.to = max(u.to, now)
			}
		}
	}
	return w, nil
}

func (b *base) accept(self store.Agent, ref job.Ref) (job.Assignment, error) {
	r := b.byID[ref.Job]
	cur, _ := r.Current()
	if r.Control == proto.Assigned && b.taken(r, cur.Agent, r.devices, true) {
		return job.Assignment{}, stale(ref) // a device has an owner
	}
	ans := b.next(r, self.ID, proto.Event{Do: proto.Accept, Agent: self.ID, Boot: self.Boot, Attempt: ref.Attempt, Nonce: ref.Nonce}, 0)
	if ans.Kind != proto.Done {
		return job.Assignment{}, stale(ref)
	}
	return job.Assignment{Ref: ref, User: r.plan.user, Devices: slices.Clone(r.devices), Spec: r.spec}, nil
}

func (b *base) append(ref job.Ref) error {
	if b.next(b.byID[ref.Job], "", proto.Event{Do: proto.Append, Attempt: ref.Attempt, Nonce: ref.Nonce}, 0).Kind != proto.Done {
		return stale(ref)
	}
	return nil
}

func (b *base) settle(ref job.Ref, end proto.Event, idle time.Duration) (job.Status, error) {
	r := b.byID[ref.Job]
	b.idle = idle
	defer func() { b.idle = 0 }()
	end.Do, end.Attempt, end.Nonce = proto.Settle, ref.Attempt, ref.Nonce
	switch ans := b.next(r, "", end, 0); ans.Kind {
	case proto.Done:
		b.notify("settled:" + string(ref.Job))
		return r.Status, nil
	case proto.Refused:
		return "", errors.New("a final status may not change")
	}
	return "", stale(ref)
}
