package place_test

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"lorayard/internal/place"
)

// trace is a list of jobs to come; Job.Submitted is when.
type trace []traced

type traced struct {
	place.Job
	runs time.Duration
}

// sim runs a trace in virtual time: no queue, no hand-over, no start-up. What
// Place decides at an instant holds at that instant.
type sim struct {
	hosts    []place.Host
	users    map[string]place.User
	policy   place.Policy
	halfLife time.Duration // of past use; 0: it does not count
	grace    time.Duration // from being asked to leave to having left
	// round is the time between two calls when nothing happens; a reservation
	// that comes of age is an event too.
	round   time.Duration
	checked fatal // if set, every answer is held against check
}

// outcome is what became of one job.
type outcome struct {
	place.Job
	wait      time.Duration // until its first start
	end       time.Time
	preempted int
}

func (s sim) run(jobs trace) map[string]*outcome {
	out := map[string]*outcome{}
	left := map[string]time.Duration{}
	for _, j := range jobs {
		out[j.ID] = &outcome{Job: j.Job, wait: -1}
		left[j.ID] = j.runs
	}
	coming := slices.Clone(jobs)
	slices.SortStableFunc(coming, func(a, b traced) int { return a.Submitted.Compare(b.Submitted) })
	type attempt struct {
		place.Running
		job  place.Job
		done time.Time // of its own accord
		gone time.Time // if it leaves
	}
	var waiting []place.Job
	running := map[string]*attempt{}
	recent := map[string]float64{}
	at := coming[0].Submitted
	for last := at; len(coming)+len(waiting)+len(running) > 0; last = at {
		// The next event.
		next := at.Add(1000 * time.Hour)
		if s.round > 0 && len(waiting) > 0 {
			next = at.Add(s.round)
		}
		if len(coming) > 0 && coming[0].Submitted.Before(next) {
			next = coming[0].Submitted
		}
		for _, a := range running {
			for _, t := range []time.Time{a.done, a.gone} {
				if !t.IsZero() && t.Before(next) {
					next = t
				}
			}
		}
		if next.Sub(last) >= 1000*time.Hour {
			break // nothing will ever happen again
		}
		at = next
		for u := range recent {
			if s.halfLife > 0 {
				recent[u] *= math.Exp2(-at.Sub(last).Seconds() / s.halfLife.Seconds())
			}
		}
		for _, id := range slices.Sorted(maps.Keys(running)) {
			a := running[id]
			if s.halfLife > 0 {
				recent[a.User] += float64(len(a.Devices)) * at.Sub(last).Seconds()
			}
			switch {
			case !a.done.After(at):
				out[id].end = a.done
				delete(running, id)
			case !a.gone.IsZero() && !a.gone.After(at):
				left[id] -= at.Sub(a.Started)
				out[id].preempted++
				delete(running, id)
				waiting = append(waiting, a.job)
			}
		}
		for len(coming) > 0 && !coming[0].Submitted.After(at) {
			waiting = append(waiting, coming[0].Job)
			coming = coming[1:]
		}

		in := place.Input{Now: at, Jobs: waiting, Hosts: s.hosts, Users: map[string]place.User{}, Policy: s.policy}
		for _, id := range slices.Sorted(maps.Keys(running)) {
			in.Running = append(in.Running, running[id].Running)
		}
		maps.Copy(in.Users, s.users)
		for u, n := range recent {
			user := in.Users[u]
			user.RecentGPUSeconds = n
			in.Users[u] = user
		}
		r := place.Place(in)
		if s.checked != nil {
			check(s.checked, in, r)
		}
		given := map[string]place.Assignment{}
		for _, a := range r.Assignments {
			given[a.Job] = a
		}
		promised := map[string]string{}
		for _, p := range r.Reservations {
			promised[p.Job] = p.Agent
		}
		for _, p := range r.Preemptions {
			running[p.Job].Leaving, running[p.Job].gone = true, at.Add(s.grace)
		}
		var still []place.Job
		for _, j := range waiting {
			a, ok := given[j.ID]
			if !ok {
				j.Reserved = promised[j.ID]
				still = append(still, j)
				continue
			}
			j.Reserved = ""
			run := &attempt{job: j, done: at.Add(left[j.ID])}
			run.Running = place.Running{Job: j.ID, User: j.User, Agent: a.Agent, Devices: a.Devices, Priority: j.Priority, Preemptible: j.Preemptible, Started: at}
			if j.Estimate > 0 {
				run.Ends = at.Add(j.Estimate)
			}
			running[j.ID] = run
			if out[j.ID].wait < 0 {
				out[j.ID].wait = at.Sub(j.Submitted)
			}
		}
		waiting = still
	}
	return out
}

// mean wait and longest, of the jobs that are chosen.
func waits(out map[string]*outcome, chosen func(*outcome) bool) (mean, longest time.Duration) {
	n := 0
	for _, o := range out {
		if chosen(o) {
			mean += o.wait
			longest = max(longest, o.wait)
			n++
		}
	}
	return mean / time.Duration(max(n, 1)), longest
}

func makespan(jobs trace, out map[string]*outcome) time.Duration {
	first := slices.MinFunc(jobs, func(a, b traced) int { return a.Submitted.Compare(b.Submitted) }).Submitted
	var most time.Duration
	for _, o := range out {
		most = max(most, o.end.Sub(first))
	}
	return most
}

func hostsOf(n, devices int) []place.Host {
	var out []place.Host
	for i := range n {
		out = append(out, gpus(fmt.Sprintf("h%02d", i), "H100", devices))
	}
	return out
}

// flood is the trace on which the designs of the hand-over were compared: 300
// jobs of 1, 2, 4 and 8 GPUs at 60, 20, 10 and 10 %, of 0.15 to 2.5 s (an hour
// is a second here; all of them keep 80 GPUs busy for 4.4 s, as there), all
// submitted within half a second. One user has the first 80 %, another the last
// 20 %.
func flood(seed uint64, known bool) trace {
	rnd := rand.New(rand.NewPCG(seed, 0))
	var out trace
	for i := range 300 {
		count := 1
		switch p := rnd.IntN(10); {
		case p >= 9:
			count = 8
		case p >= 8:
			count = 4
		case p >= 6:
			count = 2
		}
		j := traced{want(fmt.Sprintf("j%03d", i), "H100", count), time.Duration(min(0.15+0.386*rnd.ExpFloat64(), 2.5) * float64(time.Second))}
		j.Submitted = now.Add(time.Duration(i) * 500 * time.Millisecond / 300)
		if known {
			j.Estimate = j.runs
		}
		if i >= 240 {
			j.User = "late"
		}
		out = append(out, j)
	}
	return out
}

func TestALateSmallUserDoesNotWaitBehindAFlood(t *testing.T) {
	for _, known := range []bool{false, true} {
		for seed := range uint64(3) {
			// The usual policy at that scale.
			s := sim{hosts: hostsOf(10, 8), policy: place.Policy{ReserveAfter: 30 * time.Millisecond, MaxReserved: 2, Horizon: 250 * time.Millisecond}, halfLife: 8 * time.Second}
			if seed == 0 {
				s.checked = t
			}
			jobs := flood(seed, known)
			out := s.run(jobs)
			first, _ := waits(out, func(o *outcome) bool { return o.User == "ann" })
			late, _ := waits(out, func(o *outcome) bool { return o.User == "late" })
			large, longest := waits(out, func(o *outcome) bool { return o.Count == 8 })
			ideal := 0.0
			for _, j := range jobs {
				ideal += j.runs.Seconds() * float64(j.Count) / 80
			}
			t.Logf("estimates %v: makespan %.2f s (full use %.2f s), mean wait of the flood %v, of the late user %v; of 8 GPUs %v, longest %v",
				known, makespan(jobs, out).Seconds(), ideal, first.Round(time.Millisecond), late.Round(time.Millisecond), large.Round(time.Millisecond), longest.Round(time.Millisecond))
			if late > first/4 {
				t.Errorf("seed %d: the late user waits %v, the flood %v", seed, late, first)
			}
		}
	}
}

// stream is single GPUs in short supply: a job of up to half an hour as often as
// 2 hosts of 8 can bear, each from a user who never had anything before; and
// after an hour one gang of 8.
func stream(known bool) trace {
	rnd := rand.New(rand.NewPCG(0, 1))
	var out trace
	for at := 0.0; at < 6*3600; at += rnd.ExpFloat64() * 900 / 16 {
		j := traced{want(fmt.Sprintf("j%05d", len(out)), "H100", 1), time.Duration(rnd.IntN(1800)+1) * time.Second}
		j.Submitted, j.User = now.Add(time.Duration(at*float64(time.Second))), fmt.Sprint("user", len(out))
		if known && rnd.IntN(2) == 0 {
			j.Estimate = j.runs / 2 * time.Duration(1+rnd.IntN(4)) // often wrong
		}
		out = append(out, j)
	}
	gang := traced{want("gang", "H100", 8), 15 * time.Minute}
	gang.Submitted = now.Add(time.Hour)
	return append(out, gang)
}

func TestAGangDoesNotStarveBehindAStreamOfSmallJobs(t *testing.T) {
	wait := func(policy place.Policy, known bool) time.Duration {
		s := sim{hosts: hostsOf(2, 8), policy: policy, halfLife: time.Hour, round: 30 * time.Second}
		// It goes last among all who come: only its promise helps.
		s.users = map[string]place.User{"ann": {Weight: 1e-9}}
		return s.run(stream(known))["gang"].wait
	}
	for _, known := range []bool{false, true} {
		with, without := wait(place.Policy{ReserveAfter: 2 * time.Minute, MaxReserved: 1}, known), wait(place.Policy{}, known)
		t.Logf("estimates %v: 8 GPUs start after %v, without reservations after %v", known, with.Round(time.Second), without.Round(time.Second))
		// No job is longer than half an hour; one behind it may end late.
		if with > time.Hour+5*time.Minute || without < 3*with {
			t.Errorf("after %v, without reservations after %v", with, without)
		}
	}
}

// day is work of all sizes for 4 hosts of 8, at a load of 85 %.
func day(seed uint64) trace {
	rnd := rand.New(rand.NewPCG(seed, 2))
	var out trace
	for at := 0.0; at < 24*3600; {
		count := []int{1, 1, 1, 1, 1, 1, 2, 2, 4, 8}[rnd.IntN(10)]
		runs := 120 + rnd.ExpFloat64()*600
		at += float64(count) * runs / (32 * 0.85) * rnd.ExpFloat64()
		j := traced{want(fmt.Sprintf("j%05d", len(out)), "H100", count), time.Duration(runs * float64(time.Second))}
		j.Submitted, j.User = now.Add(time.Duration(at*float64(time.Second))), []string{"ann", "bob", "cem"}[rnd.IntN(3)]
		if rnd.IntN(2) == 0 {
			j.Estimate = time.Duration(runs * (0.5 + rnd.Float64()) * float64(time.Second)) // often wrong
		}
		out = append(out, j)
	}
	return out
}

func TestNobodyStarvesInALongTrace(t *testing.T) {
	for seed := range uint64(3) {
		s := sim{hosts: hostsOf(4, 8), policy: place.Usual(), halfLife: 30 * time.Minute, round: 30 * time.Second, users: map[string]place.User{"bob": {MaxGPUs: 20}}}
		out := s.run(day(seed))
		for id, o := range out {
			if o.end.IsZero() {
				t.Errorf("%s of %s (%d GPUs) never ends", id, o.User, o.Count)
			}
		}
		var mean, longest [2]time.Duration
		mean[0], longest[0] = waits(out, func(o *outcome) bool { return o.Count < 8 })
		mean[1], longest[1] = waits(out, func(o *outcome) bool { return o.Count == 8 })
		t.Logf("a day of %d jobs of 12 min at 85 %%: mean and longest wait %v, %v; of 8 GPUs %v, %v", len(out),
			mean[0].Round(time.Second), longest[0].Round(time.Second), mean[1].Round(time.Second), longest[1].Round(time.Second))
		if max(longest[0], longest[1]) > 3*time.Hour {
			t.Errorf("seed %d: longest waits %v", seed, longest)
		}
	}
}

func TestPreemptedWorkComesToAnEnd(t *testing.T) {
	var jobs trace
	rnd := rand.New(rand.NewPCG(3, 3))
	for i := range 400 {
		j := traced{want(fmt.Sprintf("j%03d", i), "H100", []int{1, 1, 2, 4, 8}[rnd.IntN(5)]), time.Duration(1+rnd.IntN(60)) * time.Minute}
		j.Submitted, j.Priority = now.Add(time.Duration(rnd.IntN(48*60))*time.Minute), rnd.IntN(3)
		j.User, j.Preemptible = []string{"ann", "bob", "cem"}[rnd.IntN(3)], rnd.IntN(5) > 0
		jobs = append(jobs, j)
	}
	s := sim{hosts: hostsOf(2, 8), policy: place.Usual(), halfLife: time.Hour, grace: 20 * time.Second, round: time.Minute, checked: t}
	out := s.run(jobs)
	preempted := 0
	for id, o := range out {
		if o.end.IsZero() {
			t.Errorf("%s never ends", id)
		}
		preempted += o.preempted
	}
	var mean [3]time.Duration
	for p := range mean {
		mean[p], _ = waits(out, func(o *outcome) bool { return o.Priority == p })
	}
	t.Logf("%d preemptions; mean waits by priority %v", preempted, mean)
	if preempted == 0 || mean[2] > mean[1] || mean[1] > mean[0] {
		t.Errorf("%d preemptions, mean waits by priority %v", preempted, mean)
	}
}

// queues is Kueue's performance trace: 5 cohorts of 6 queues, each of which
// submits 350 small jobs (1 slot, 0.2 s), 100 medium (5 slots, 0.5 s) and 50
// large (20 slots, 1 s), one every 0.1, 0.5 and 1.2 s. A slot is a GPU, a queue
// is a user, a cohort is a label that the hosts carry: 120 GPUs each. The quota
// of 20 is the fair share of equal weights, lending up to 100 is MaxGPUs 120. How long
// a job runs is not told.
func queues() (trace, map[string]place.User) {
	var out trace
	users := map[string]place.User{}
	for c := range 5 {
		for q := range 6 {
			user := fmt.Sprintf("c%d-q%d", c, q)
			users[user] = place.User{MaxGPUs: 120}
			for _, k := range []struct {
				n, slots    int
				every, runs time.Duration
			}{{350, 1, 100 * time.Millisecond, 200 * time.Millisecond}, {100, 5, 500 * time.Millisecond, 500 * time.Millisecond}, {50, 20, 1200 * time.Millisecond, time.Second}} {
				for i := range k.n {
					j := traced{want(fmt.Sprintf("%s-%02d-%03d", user, k.slots, i), "H100", k.slots), k.runs}
					j.User, j.Labels = user, map[string]string{"cohort": fmt.Sprint(c)}
					j.Submitted = now.Add(time.Duration(i+1) * k.every)
					out = append(out, j)
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b traced) int { return cmp.Or(a.Submitted.Compare(b.Submitted), cmp.Compare(a.ID, b.ID)) })
	return out, users
}

func TestTheFleetTraceIsNearlyIdeal(t *testing.T) {
	if testing.Short() {
		t.Skip("a minute of virtual time takes some seconds")
	}
	for _, c := range []struct {
		name           string
		perHost, hosts int
		policy         place.Policy
		most           float64 // s
	}{
		// Slots that are no machines, as in Kueue.
		{"5 hosts of 120, nothing reserved", 120, 1, place.Policy{}, 75},
		{"30 hosts of 20, nothing reserved", 20, 6, place.Policy{}, 80},
		{"30 hosts of 20, reserving", 20, 6, place.Policy{ReserveAfter: time.Second, MaxReserved: 10}, 80},
	} {
		jobs, users := queues()
		var hosts []place.Host
		for cohort := range 5 {
			for i := range c.hosts {
				h := gpus(fmt.Sprintf("c%d-h%d", cohort, i), "H100", c.perHost)
				h.Labels = map[string]string{"cohort": fmt.Sprint(cohort)}
				hosts = append(hosts, h)
			}
		}
		began := time.Now()
		out := sim{hosts: hosts, users: users, policy: c.policy}.run(jobs)
		took := time.Since(began)
		got := makespan(jobs, out).Seconds()
		var mean [3]float64
		for i, slots := range []int{1, 5, 20} {
			m, _ := waits(out, func(o *outcome) bool { return o.Count == slots })
			mean[i] = m.Seconds()
		}
		t.Logf("%-33s makespan %.1f s (ideal 67.1), mean waits small %.2f, medium %.2f, large %.2f s (ideal 0.25, 12.0, 41.4); simulated in %v", c.name, got, mean[0], mean[1], mean[2], took.Round(time.Millisecond))
		if got > c.most {
			t.Errorf("%s: makespan %.1f s, want at most %.1f", c.name, got, c.most)
		}
	}
}
