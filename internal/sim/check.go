package sim

import (
	"errors"
	"slices"
	"time"

	"lorayard/internal/cost"
	"lorayard/internal/gpu"
	"lorayard/internal/job"
	"lorayard/internal/proto"
	"lorayard/internal/store"
)

// patienceAfter is how long after the last fault everything may take to settle.
const patienceAfter = 5 * time.Minute

// judge looks at a job after each transition.
func (b *base) judge(r *row, before proto.Job, e proto.Event, ans proto.Answer) {
	j := r.Job
	cur, n := j.Current()
	old, m := before.Current()
	switch {
	case before.Status.Final() && j.Status != before.Status:
		b.wrong("%s of %s changes the final status %s to %s", e.Do, r.id, before.Status, j.Status)
	case j.Artifacts > 1 || j.Settlements > 1 || len(r.paid) > 1:
		b.wrong("%s settles %s again", e.Do, r.id)
	case (j.Control == proto.Settled) != (j.Settlements == 1) || j.Control == proto.Settled && !j.Status.Final():
		b.wrong("%s: settled and final do not agree after %s", r.id, e.Do)
	case (j.Status == job.Completed) != (j.Artifacts == 1):
		b.wrong("%s: completed and an artifact do not agree after %s", r.id, e.Do)
	case (j.Control == proto.Queued || j.Control == proto.Assigned) && j.Status != job.Queued && j.Status != job.Cancelled:
		b.wrong("%s waits and is %s after %s", r.id, j.Status, e.Do)
	case n > 0 && (cur.Outcome == "") != (j.Control == proto.Assigned || j.Control == proto.Accepted):
		b.wrong("%s: the current attempt and its outcome do not agree after %s", r.id, e.Do)
	case n != m && n != m+1:
		b.wrong("%s: attempts have gaps after %s", r.id, e.Do)
	case n == m+1 && before.Control != proto.Queued:
		b.wrong("%s is assigned while it is %s", r.id, before.Control)
	case e.Do == proto.Append && ans.Kind == proto.Done && !before.Held(e.Attempt, e.Nonce):
		b.wrong("an attempt writes to %s that is not accepted", r.id)
	case e.Do == proto.Settle && ans.Kind == proto.Done && !before.Held(e.Attempt, e.Nonce) && (e.Attempt > m || before.Attempts[e.Attempt-1].Nonce != e.Nonce):
		b.wrong("an attempt settles %s that is not accepted", r.id)
	case e.Do == proto.Accept && ans.Kind == proto.Done && (e.Attempt != m || old.Agent != e.Agent):
		b.wrong("attempt %d of %s is accepted, which is not the current one", e.Attempt, r.id)
	case e.Do == proto.Accept && ans.Kind == proto.Done && before.Status == job.Cancelled && before.Control == proto.Assigned:
		b.wrong("%s is begun after it was cancelled", r.id)
	case e.Do == proto.Accept && ans.Kind == proto.Done && b.agents[e.Agent].proto.Boot != e.Boot:
		b.wrong("a process accepts %s that was replaced", r.id)
	case e.Do == proto.Renew && ans.Kind == proto.Done && b.agents[e.Agent].proto.Boot != e.Boot:
		b.wrong("a process renews agent %s that was replaced", e.Agent)
	case e.Do == proto.Settle && before.Held(e.Attempt, e.Nonce) && before.Status == job.Cancelled && j.Status != job.Cancelled:
		b.wrong("%s is %s though it was cancelled first", r.id, j.Status)
	case e.Do == proto.Settle && ans.Kind == proto.Stale && e.Attempt <= n && j.Attempts[e.Attempt-1].Nonce == e.Nonce && j.Attempts[e.Attempt-1].Outcome == e.Outcome:
		b.wrong("an agent is told that it lost %s, which it settled", r.id)
	case e.Do == proto.Accept && ans.Kind != proto.Done && before.Held(e.Attempt, e.Nonce) && old.Agent == e.Agent && old.Boot == e.Boot && b.agents[e.Agent].proto.Boot == e.Boot:
		b.wrong("an agent is told that it did not accept %s, which it did", r.id)
	case ans.Kind == proto.Refused:
		b.wrong("%s of %s is refused by the guard of final statuses", e.Do, r.id)
	case e.Do == proto.Lose && ans.Kind == proto.Done && !b.silent(old.Agent):
		b.wrong("%s is taken from agent %s, which is well and could not renew for the database alone", r.id, old.Agent)
	}
	if ans.Kind == proto.Done && before.Held(m, old.Nonce) && !j.Held(m, old.Nonce) {
		b.checkZombies(r, job.Ref{Job: r.id, Attempt: m, Nonce: old.Nonce})
	}
	if j.Settlements > before.Settlements {
		b.checkBill(r)
	}
}

// silent reports whether an agent had a reason not to renew, other than the
// database's being away.
func (b *base) silent(agent string) bool {
	now := b.now()
	from := now - lease - b.plan.patience - 4*time.Second
	return !slices.ContainsFunc(b.hosts, func(h *host) bool {
		return h.agent == agent && b.agents[agent].self.Instance == h.name && h.well(from, now)
	})
}

// well reports whether a host's process ran, was not frozen and not cut off.
func (h *host) well(from, to instant) bool {
	p := h.proc
	return p != nil && p.started < from && !p.stopping && !p.killed && p.registered && !h.life.frozen.touch(from, to) && !h.life.cut.touch(from, to)
}

// checkBill compares what is paid with what the books say, and the books with
// what was.
func (b *base) checkBill(r *row) {
	var total cost.MicroUSD
	for i, u := range r.usage {
		a := r.Attempts[u.attempt-1]
		paid := a.Outcome == proto.Completed || a.Outcome == proto.Cancelled || a.Outcome == proto.HandedBack || a.Outcome == proto.Failed
		switch {
		case !u.closed:
			b.wrong("%s is settled and attempt %d still costs", r.id, u.attempt)
		case u.billable && !paid:
			b.wrong("%s pays for attempt %d, which is %s", r.id, u.attempt, a.Outcome)
		case u.to > b.now() || u.from > u.to:
			b.wrong("%s pays for a time that was not", r.id)
		}
		for _, o := range r.usage[:i] {
			if o.attempt != u.attempt && u.from < o.to {
				b.wrong("%s: attempts %d and %d overlap", r.id, o.attempt, u.attempt)
			}
		}
		// What a process says counts from when it heard of the end until it said
		// so, and that may be underway for a while; a process that steps aside
		// leaves it to the next one to say.
		if end, ok := b.ran[job.Ref{Job: r.id, Attempt: u.attempt, Nonce: a.Nonce}]; ok && u.billable {
			b.res.Unused = max(b.res.Unused, u.to-end)
			if u.to-end > unanswered+2*time.Second && !b.unheard(a.Agent, end, u.to) {
				b.wrong("%s pays for %v after the end of attempt %d", r.id, u.to-end, u.attempt)
			}
		}
		if u.billable {
			total += cost.Price(cost.Rate{PerHour: rate}, u.to-u.from)
		}
	}
	var paid cost.MicroUSD
	for _, p := range r.paid {
		paid += p
	}
	if paid != total {
		b.wrong("%s pays %v for %v", r.id, paid, total)
	}
}

// unheard reports whether an agent may not have heard of a trainer's end at
// once.
func (b *base) unheard(agent string, from, to instant) bool {
	return slices.ContainsFunc(b.hosts, func(h *host) bool {
		return h.agent == agent && (h.life.frozen.touch(from, to) || slices.ContainsFunc(h.life.strikes, func(k strike) bool { return k.blow == restart }))
	})
}

// checkDevices looks for a device with two owners after an assignment.
func (b *base) checkDevices(r *row) {
	for _, o := range b.rows {
		if o == r || o.agent() != r.agent() {
			continue
		}
		for _, d := range o.devices {
			if slices.Contains(r.devices, d) {
				b.wrong("device %s has two owners, %s and %s", d, o.id, r.id)
			}
		}
	}
}

// checkZombies looks for a trainer of an attempt that has just lost its right
// to write. Where a deadline is no longer than a lease there is none.
func (w *world) checkZombies(r *row, ref job.Ref) {
	for _, h := range w.hosts {
		for _, t := range h.trainers {
			if t.ref != ref {
				continue
			}
			w.res.Count["zombie"]++
			// The report of one death ends the agent's lease, and with it all its
			// attempts: other shims may be about to end their trainers.
			if w.plan.strict && h.reported != t.proc.name && w.base.era == 0 {
				w.wrong("a trainer computes for attempt %d of %s, which is not accepted any more", ref.Attempt, ref.Job)
			}
		}
	}
}

// checkStart looks at a trainer that is about to begin.
func (w *world) checkStart(t *trainer) {
	for _, h := range w.hosts {
		for _, o := range h.trainers {
			if h == t.host && slices.ContainsFunc(o.devices, func(d string) bool { return slices.Contains(t.devices, d) }) {
				w.wrong("two trainers compute on one device: %v and %v", o.ref, t.ref)
			}
		}
	}
	if r := w.base.byID[t.ref.Job]; w.plan.strict && !r.Held(t.ref.Attempt, t.ref.Nonce) && w.base.era == 0 {
		w.wrong("a trainer begins for attempt %d of %s, which is not accepted any more", t.ref.Attempt, t.ref.Job)
	}
}

// checkObeyed looks whether what a renewal called lost ends.
func (w *world) checkObeyed(p *process, ref job.Ref) {
	from := w.now()
	p.mu.Lock()
	t := p.under[ref]
	p.mu.Unlock()
	if t == nil || t.gone {
		return
	}
	within := time.Second
	if t.leaving { // its time to do so is not cut short
		within += leaveGrace
	}
	w.at(from+within, uint64(t.ref.Attempt), func() {
		if t.leaving && within == time.Second {
			return
		}
		if !t.gone && t.proc == p && !p.killed && !p.ended && !p.life.frozen.touch(from, w.now()) {
			w.wrong("a trainer goes on although its agent heard that %v is lost, or cancelled", ref)
		}
	})
}

// checkHeir looks at what a registration did to an attempt of this agent.
func (b *base) checkHeir(r *row, was proto.Job, self store.Agent) {
	cur, n := r.Current()
	if r.Control == proto.Accepted && cur.Agent == self.ID && cur.Boot != self.Boot {
		b.wrong("%s stays accepted by %s, which is not there any more", r.id, cur.Boot)
	}
	if was.Control != proto.Accepted || r.Control == proto.Accepted {
		return
	}
	for _, h := range b.hosts {
		if l := h.left[job.Ref{Job: r.id, Attempt: n, Nonce: cur.Nonce}]; h.name == self.Instance && l != nil {
			b.wrong("attempt %d of %s was left to the next process, which does not want it", n, r.id)
		}
	}
}

// checkUnlisted looks at an attempt that a renewal lost because it does not
// list it: nobody runs it.
func (b *base) checkUnlisted(r *row, was proto.Job) {
	if was.Control != proto.Accepted || r.Control == proto.Accepted {
		return
	}
	cur, n := was.Current()
	b.res.Count["unlisted"]++
	for _, h := range b.hosts {
		for _, p := range h.procs {
			p.mu.Lock()
			t := p.under[job.Ref{Job: r.id, Attempt: n, Nonce: cur.Nonce}]
			p.mu.Unlock()
			if t != nil && !p.killed && !p.ended {
				b.wrong("attempt %d of %s is lost as if nobody ran it", n, r.id)
			}
		}
	}
}

// checkResume looks at an attempt that a process goes on with: it has just been
// told that it may.
func (w *world) checkResume(p *process, ref job.Ref) {
	if r := w.base.byID[ref.Job]; !r.Held(ref.Attempt, ref.Nonce) && w.base.era == 0 && !p.life.frozen.touch(p.started, w.now()) {
		w.wrong("%s goes on with %v, which is not its own", p.name, ref)
	}
}

// checkExit looks at what a process leaves behind when it ends in good order:
// nothing, where it could speak to the database.
func (w *world) checkExit(p *process, err error) {
	pl := &w.plan
	if err != nil || pl.lostCall+pl.lostAnswer+pl.hungCall > 0 || pl.away.touch(p.started, w.now()) || p.life.frozen.touch(p.started, w.now()) || p.life.cut.touch(p.started, w.now()) {
		return
	}
	for _, r := range w.base.rows {
		if cur, n := r.Current(); r.Control == proto.Accepted && cur.Boot == p.name {
			w.wrong("%s ends and leaves attempt %d of %s behind", p.name, n, r.id)
		}
	}
}

// checkLate looks at an assignment that is taken back because nobody accepted
// it in time: where nothing broke, one of its sends has arrived.
func (b *base) checkLate(r *row) {
	now := b.now()
	from := r.assigned - time.Second
	p := &b.plan
	if p.lostCall+p.lostAnswer+p.slowCall+len(p.rollBacks) > 0 || p.twin.to > 0 || p.away.touch(from, now) || p.redisAway.touch(from, now) || r.Status == job.Cancelled {
		return
	}
	for _, d := range p.dispatchers {
		if d.frozen.touch(from, now) || d.cut.touch(from, now) || len(d.strikes) > 0 {
			return
		}
	}
	for _, t := range p.flushes {
		if from < t && t < now {
			return
		}
	}
	for _, h := range b.hosts {
		if h.agent == r.agent() && h.well(from, now) && !h.proc.taken(now-9500*time.Millisecond, now-2500*time.Millisecond) {
			b.wrong("attempt %d of %s is not accepted in time, and nothing was wrong", len(r.Attempts), r.id)
		}
	}
}

// checkRefusal looks at a task that its agent would not take for its devices.
// An agent that was always in touch has what the database believes it has.
func (w *world) checkRefusal(p *process, t job.Task, err error) {
	var busy *gpu.UnavailableError
	r := w.base.byID[t.Ref.Job]
	others := 0
	for _, x := range p.accepts {
		if x.to == 0 {
			others++
		}
	}
	if !errors.As(err, &busy) || others > 1 || r.Control != proto.Assigned || len(r.Attempts) != t.Ref.Attempt {
		return
	}
	w.res.Count["refused for devices"]++
	pl, now := &w.plan, w.now()
	from := now - 12*time.Second
	if pl.lostCall+pl.lostAnswer+pl.hungCall+len(pl.rollBacks) > 0 || pl.twin.to > 0 || p.life.frozen.touch(from, now) || p.life.cut.touch(from, now) || pl.away.touch(from, now) {
		return
	}
	w.wrong("agent %s refuses %v, which it has the devices for: %v", p.name, t.Ref, err)
}

// done reports whether the world may end: everything is over and settled.
func (w *world) done() bool {
	now := w.now()
	if now < w.plan.calm || len(w.base.rows) < len(w.plan.jobs) {
		return false
	}
	for _, r := range w.base.rows {
		// A row that was cancelled before anybody looked at it is over as it is.
		if r.Control != proto.Settled && (r.admitted > 0 || r.Status != job.Cancelled) {
			if now > w.plan.calm+patienceAfter {
				w.wrong("%s never settles: it is %s, %s, wanted %s, in attempt %d", r.id, r.Control, r.Status, r.Desired, len(r.Attempts))
			}
			return false
		}
	}
	for _, h := range w.hosts {
		free := 0
		if p := h.proc; p != nil && !p.killed && !p.ended {
			free = len(p.ledger.Free())
		}
		if len(h.trainers) == 0 && (free == h.gpus || h.proc == nil) {
			continue
		}
		if now > w.plan.calm+patienceAfter {
			w.wrong("host %s is never free again: %d trainers, %d devices free of %d", h.name, len(h.trainers), free, h.gpus)
		}
		return false
	}
	return true
}
