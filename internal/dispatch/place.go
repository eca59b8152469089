package dispatch

import (
	"context"
	"errors"
	"slices"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/place"
	"lorayard/internal/store"
	"lorayard/internal/trace"
)

// known is what the leader remembers between rounds, so that a round costs what
// is new. All of it may be lost with the process: the database has the truth,
// and a promise that is forgotten is given anew.
type known struct {
	hosts    []store.Host
	hostsAt  time.Time
	rates    map[string]int64
	users    map[string]place.User
	usersAt  time.Time
	reserved map[string]string // job → agent that was promised to it
	again    bool              // the last assignment was not carried out in full
	busy     bool              // the round under way, or the last one, assigned jobs and others wait

	// waiting is the queue as it was last read, without what was assigned since;
	// queue says that it holds but for the jobs in came. A settlement changes none
	// of it, and there are as many of them as there are rounds.
	waiting []store.Waiting
	queue   bool
	came    []job.ID
	spare   int // so many more may be assigned before a user's further jobs are to be seen
}

const (
	// hostsAge bounds how long a host whose lease ran out is still offered;
	// assigning looks at the lease again. Changes are notified.
	hostsAge = time.Second
	// usersAge is short against the hours over which usage is forgotten.
	usersAge = 5 * time.Second
)

// place decides where waiting jobs run and carries it out. With explain it
// also records why the others wait.
func (d *Dispatcher) place(ctx context.Context, explain bool) error {
	if err := d.look(ctx); err != nil {
		return err
	}
	waiting := d.known.waiting
	if err := d.refresh(ctx, len(waiting) > 0); err != nil {
		return err
	}
	if len(waiting) == 0 {
		d.tally(nil)
		return nil
	}
	running, err := d.Store.Running(ctx)
	if err != nil {
		return err
	}
	res := place.Place(d.input(waiting, running))
	d.known.reserved = map[string]string{}
	for _, r := range res.Reservations {
		d.known.reserved[r.Job] = r.Agent
	}
	if explain {
		d.tally(res.Waiting)
	}
	return errors.Join(d.assign(ctx, waiting, res.Assignments), d.preempt(ctx, running, res.Preemptions), d.explain(ctx, explain, res.Waiting))
}

// look reads the queue when it is not what we know.
func (d *Dispatcher) look(ctx context.Context) error {
	k := &d.known
	came := k.came
	if k.came = nil; k.queue && k.spare > 0 {
		if len(came) == 0 {
			return nil
		}
		fresh, err := d.Store.Waiting(ctx, most, came)
		if err != nil {
			k.queue = false
			return err
		}
		k.waiting = slices.DeleteFunc(k.waiting, func(w store.Waiting) bool { _, is := slices.BinarySearch(came, w.ID); return is })
		k.waiting = append(k.waiting, fresh...)
		return nil
	}
	waiting, err := d.Store.Waiting(ctx, most, nil)
	if err != nil {
		return err
	}
	k.waiting, k.queue, k.spare = waiting, true, most
	of := map[string]int{}
	for _, w := range waiting {
		if of[w.User]++; of[w.User] == store.WaitingOfUser {
			k.spare = store.WaitingOfUser / 2
		}
	}
	if len(waiting) == most {
		k.spare = min(k.spare, most/2)
	}
	return nil
}

// join adds jobs that were admitted now: what is known of them is all there is.
func (k *known) join(admitted []store.Waiting) {
	if !k.queue {
		return // all of it is read anew
	}
	k.waiting = append(k.waiting, admitted...)
	for _, w := range admitted {
		if i, is := slices.BinarySearch(k.came, w.ID); is {
			k.came = slices.Delete(k.came, i, i+1)
		}
	}
}

// most is how many jobs are placed at once.
const most = 10 * batch

// assigned takes jobs off the queue that we know.
func (k *known) assigned(sends []store.Send) {
	gone := make(map[job.ID]bool, len(sends))
	for _, s := range sends {
		gone[s.Task.Ref.Job] = true
	}
	k.waiting = slices.DeleteFunc(k.waiting, func(w store.Waiting) bool { return gone[w.ID] })
	k.spare -= len(sends)
}

// refresh reads hosts and users again when it is time, or when something about
// hosts changed.
func (d *Dispatcher) refresh(ctx context.Context, needed bool) error {
	k := &d.known
	now := time.Now()
	if d.stale.Swap(false) || now.Sub(k.hostsAt) >= hostsAge {
		hosts, err := d.Store.Hosts(ctx)
		if err == nil {
			k.rates, err = d.Store.Rates(ctx)
		}
		if err != nil {
			d.stale.Store(true)
			return err
		}
		k.hosts, k.hostsAt = hosts, now
		taking := 0
		for _, h := range hosts {
			if h.Closed == "" {
				taking++
			}
		}
		d.Metrics.HostsTaking.Set(float64(taking))
	}
	if needed && now.Sub(k.usersAt) >= usersAge {
		users, err := d.Store.Users(ctx)
		if err != nil {
			return err
		}
		k.users, k.usersAt = map[string]place.User{}, now
		for _, u := range users {
			k.users[u.ID] = d.user(u)
		}
	}
	return nil
}

func (d *Dispatcher) user(u store.User) place.User {
	return place.User{Weight: u.Weight, RecentGPUSeconds: u.GPUSeconds, MaxGPUs: limit(u.MaxGPUs, d.Config.UserGPUs), MaxQueued: limit(u.MaxQueued, d.Config.UserQueued)}
}

// limit is a user's own limit, or the policy's; 0 is none.
func limit(own *int, policy int) int {
	if own != nil {
		return *own
	}
	return policy
}

// input is what placement looks at.
func (d *Dispatcher) input(waiting []store.Waiting, running []store.Running) place.Input {
	in := place.Input{Now: time.Now(), Policy: d.Config.Place, Users: map[string]place.User{}}
	busy := map[string]bool{}
	for _, r := range running {
		for _, uuid := range r.Devices {
			busy[uuid] = true
		}
		in.Running = append(in.Running, place.Running{
			Job: string(r.Ref.Job), User: r.User, Agent: r.Agent, Devices: r.Devices, Priority: r.Priority, Preemptible: r.Spec.Preemptible,
			Started: r.Started, Ends: r.Ends, Leaving: r.Desired != job.DesireRun,
		})
	}
	for _, h := range d.known.hosts {
		in.Hosts = append(in.Hosts, d.host(h, busy))
	}
	for _, w := range waiting {
		s := w.Spec
		in.Jobs = append(in.Jobs, place.Job{
			ID: string(w.ID), User: w.User, Wish: s.GPUs, Count: s.GPUCount, MinBytes: int64(s.MinMemoryGB) * 1e9, BaseModel: s.BaseModel, Labels: s.Labels,
			Priority: w.Priority, Submitted: w.Admitted, Deadline: s.Deadline, Preemptible: s.Preemptible, Avoid: w.Failed, Reserved: d.known.reserved[string(w.ID)],
		})
		if _, known := in.Users[w.User]; !known {
			u, used := d.known.users[w.User]
			if !used {
				u = d.user(store.User{})
			}
			in.Users[w.User] = u
		}
	}
	return in
}

func (d *Dispatcher) host(h store.Host, busy map[string]bool) place.Host {
	out := place.Host{Agent: h.Agent, BaseModels: h.BaseModels, Labels: h.Labels, PricePerHour: d.known.rates, Draining: h.Closed != ""}
	d.mu.Lock()
	_, gone := d.gone[h.Agent]
	d.mu.Unlock()
	out.Draining = out.Draining || gone
	for _, dev := range h.Devices {
		x := place.Device{UUID: dev.UUID, Class: dev.Class, MemoryBytes: dev.MemoryBytes, Fault: dev.Fault, Busy: busy[dev.UUID], Node: dev.Node}
		out.Links = append(out.Links, dev.Links) // placement leaves alone what is not whole
		if _, priced := d.known.rates[dev.Class]; !priced && x.Fault == "" {
			x.Fault = "its class has no rate" // it would run for nothing
		}
		out.Devices = append(out.Devices, x)
	}
	return out
}

func (d *Dispatcher) assign(ctx context.Context, waiting []store.Waiting, as []place.Assignment) error {
	if len(as) == 0 {
		return nil
	}
	attempts := make(map[string]int, len(waiting))
	for _, w := range waiting {
		attempts[string(w.ID)] = w.Attempt
	}
	chosen := make([]store.Assignment, len(as))
	for i, a := range as {
		chosen[i] = store.Assignment{Job: job.ID(a.Job), Attempt: attempts[a.Job], Agent: a.Agent, Devices: a.Devices}
	}
	began := time.Now()
	sends, err := d.Store.Assign(ctx, chosen)
	over := time.Now()
	d.known.assigned(sends)
	d.known.busy = len(sends) > 0 && len(d.known.waiting) > 0
	for _, s := range sends {
		d.Metrics.Assigned.Inc()
		d.Trace.Tell(trace.Span{Ref: s.Task.Ref, Name: "placed", Began: began, Over: over, About: map[string]string{"agent": s.Agent}})
		d.Log.InfoContext(ctx, "attempt assigned", "job", s.Task.Ref.Job, "attempt", s.Task.Ref.Attempt, "agent", s.Agent, "device", s.Task.Devices)
	}
	again := d.known.again
	if d.known.again = len(sends) < len(as); d.known.again { // something was not as we knew it
		d.stale.Store(true)
		d.known.queue = false
		if !again { // once: who keeps being refused waits for the next poll
			d.Wake()
		}
	}
	d.send(ctx, sends)
	return err
}

func (d *Dispatcher) preempt(ctx context.Context, running []store.Running, ps []place.Preemption) error {
	if len(ps) == 0 {
		return nil
	}
	wanted := map[string]string{} // victim → for whom
	for _, p := range ps {
		wanted[p.Job] = p.For
	}
	var refs []job.Ref
	for _, r := range running {
		if wanted[string(r.Ref.Job)] != "" {
			refs = append(refs, r.Ref)
		}
	}
	asked, err := d.Store.Preempt(ctx, refs)
	for _, ref := range asked {
		d.Metrics.Preempted.Inc()
		d.Log.InfoContext(ctx, "attempt preempted", "job", ref.Job, "attempt", ref.Attempt, "for", wanted[string(ref.Job)])
	}
	return err
}

// tally counts those that wait by the first class that they may land on and by
// why they wait.
func (d *Dispatcher) tally(why map[string]place.Wait) {
	type slot struct{ class, code string }
	jobs, oldest := map[slot]int{}, map[string]time.Time{}
	for _, w := range d.known.waiting {
		p, waits := why[string(w.ID)]
		if !waits {
			continue
		}
		class := w.Spec.GPUClass()
		jobs[slot{class, p.Code}]++
		if at, known := oldest[class]; !known || w.Admitted.Before(at) {
			oldest[class] = w.Admitted
		}
	}
	d.Metrics.Waiting.Reset()
	d.Metrics.OldestAge.Reset()
	for s, n := range jobs {
		d.Metrics.Waiting.WithLabelValues(s.class, s.code).Set(float64(n))
	}
	for class, at := range oldest {
		d.Metrics.OldestAge.WithLabelValues(class).Set(time.Since(at).Seconds())
	}
}

// explain records why jobs wait: at once for those that say nothing yet, for
// all of them when everything is looked at.
func (d *Dispatcher) explain(ctx context.Context, all bool, why map[string]place.Wait) error {
	var waits []store.Wait
	for i := range d.known.waiting {
		w := &d.known.waiting[i]
		p, ok := why[string(w.ID)]
		if !ok || p.Reason == w.Reason || (!all && w.Reason != "") {
			continue
		}
		if w.Reason == "" {
			d.Log.InfoContext(ctx, "job waits", "job", w.ID, "reason", p.Reason)
		}
		w.Reason = p.Reason
		waits = append(waits, store.Wait{Job: w.ID, Reason: p.Reason, Earliest: p.Earliest, Latest: p.Latest})
	}
	if len(waits) == 0 {
		return nil
	}
	return d.Store.SetWaiting(ctx, waits)
}
