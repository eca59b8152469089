package place_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/place"
)

// gpus makes a host that holds base model m.
func gpus(agent, class string, n int) place.Host {
	h := place.Host{Agent: agent, BaseModels: []string{"m"}}
	for i := range n {
		h.Devices = append(h.Devices, place.Device{UUID: fmt.Sprintf("%s-%s-%02d", agent, class, i), Class: class, MemoryBytes: memory[class] << 20})
	}
	return h
}

// want makes a job of user "ann" that was submitted an hour ago.
func want(id, class string, n int) place.Job {
	return place.Job{ID: id, User: "ann", Wish: job.Wish{Classes: []string{class}}, Count: n, BaseModel: "m", Submitted: now.Add(-time.Hour), Preemptible: true}
}

// runs makes an attempt on the devices of h from one on, which has run for half
// an hour and ends in another.
func runs(id string, h place.Host, from, n int) place.Running {
	r := place.Running{Job: id, User: "bob", Agent: h.Agent, Preemptible: true, Started: now.Add(-30 * time.Minute), Ends: now.Add(30 * time.Minute)}
	for _, d := range h.Devices[from : from+n] {
		r.Devices = append(r.Devices, d.UUID)
	}
	return r
}

func with[T any](v T, change func(*T)) T {
	change(&v)
	return v
}

// agents says where each job of r goes: "" if it waits.
func agents(r place.Result) map[string]string {
	out := map[string]string{}
	for _, a := range r.Assignments {
		out[a.Job] = a.Agent
	}
	return out
}

func run(t *testing.T, in place.Input) place.Result {
	t.Helper()
	in.Now = now
	r := place.Place(in)
	check(t, in, r)
	return r
}

func TestBestFitKeepsLargeSetsWhole(t *testing.T) {
	a, b := gpus("a", "H100", 8), gpus("b", "H100", 8)
	r := run(t, place.Input{
		Jobs: []place.Job{want("1-small", "H100", 1), want("2-big", "H100", 8)}, Hosts: []place.Host{a, b},
		Running: []place.Running{runs("r", b, 0, 6)},
	})
	if got := agents(r); got["1-small"] != "b" || got["2-big"] != "a" {
		t.Errorf("%v", got)
	}
}

func TestTwoPairsOfFourAreTwoGoodPairs(t *testing.T) {
	// 0–2 and 1–3 are bridged.
	h := gpus("a", "H100", 4)
	h.Links = [][]int{{0, 1, 9, 1}, {1, 0, 1, 9}, {9, 1, 0, 1}, {1, 9, 1, 0}}
	r := run(t, place.Input{Jobs: []place.Job{want("1", "H100", 2), want("2", "H100", 2)}, Hosts: []place.Host{h}})
	for i, want := range []string{"[a-H100-00 a-H100-02]", "[a-H100-01 a-H100-03]"} {
		if got := fmt.Sprint(r.Assignments[i].Devices); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	// One alone breaks no whole pair.
	r = run(t, place.Input{Jobs: []place.Job{want("1", "H100", 1)}, Hosts: []place.Host{h}, Running: []place.Running{runs("r", h, 1, 1)}})
	if got := fmt.Sprint(r.Assignments[0].Devices); got != "[a-H100-03]" {
		t.Errorf("%s breaks a pair", got)
	}
}

func TestAHostOfManyDevicesIsSplitAlongItsLinks(t *testing.T) {
	// Two islands of 10, even and odd; the search for the best set ends at 16.
	h := gpus("a", "H100", 20)
	for i := range 20 {
		h.Links = append(h.Links, make([]int, 20))
		for j := range 20 {
			h.Links[i][j] = 1 + 9*((i+j+1)%2)
		}
	}
	r := run(t, place.Input{
		Jobs: []place.Job{want("1", "H100", 1), want("2", "H100", 8), want("3", "H100", 8)}, Hosts: []place.Host{h},
		Running: []place.Running{runs("r", h, 19, 1)},
	})
	for i, island := range []int{1, 0, 1} { // the odd one is not whole any more
		for _, d := range r.Assignments[i].Devices {
			var n int
			if _, err := fmt.Sscanf(d, "a-H100-%d", &n); err != nil || n%2 != island {
				t.Errorf("%s goes to %v", r.Assignments[i].Job, r.Assignments[i].Devices)
				break
			}
		}
	}
}

func TestAnAvoidedHostIsTakenOnlyWhenNoOtherFits(t *testing.T) {
	j := with(want("j", "H100", 1), func(j *place.Job) { j.Avoid = []string{"a"} })
	if got := agents(run(t, place.Input{Jobs: []place.Job{j}, Hosts: []place.Host{gpus("a", "H100", 1), gpus("b", "H100", 4)}})); got["j"] != "b" {
		t.Errorf("%v", got)
	}
	if got := agents(run(t, place.Input{Jobs: []place.Job{j}, Hosts: []place.Host{gpus("a", "H100", 1)}})); got["j"] != "a" {
		t.Errorf("%v", got)
	}
}

func TestTheCheapestSuitableHostIsTaken(t *testing.T) {
	price := func(h place.Host, class string, usd int64) place.Host {
		h.PricePerHour = map[string]int64{class: usd * 1e6}
		return h
	}
	hosts := []place.Host{price(gpus("a", "H100", 1), "H100", 4), price(gpus("b", "A100-80GB", 8), "A100-80GB", 3), price(gpus("c", "L4", 8), "L4", 1), gpus("d", "H100", 1)}
	for wishes, agent := range map[string]string{"any": "c", "60GB..": "b", "H100": "a", "H100|A100": "b"} {
		j := with(want("j", "H100", 1), func(j *place.Job) { j.Wish = wish(t, wishes) })
		if got := agents(run(t, place.Input{Jobs: []place.Job{j}, Hosts: hosts})); got["j"] != agent {
			t.Errorf("%s lands on %v, want %s", wishes, got, agent)
		}
	}
	// Without prices the smallest that will do.
	for i := range hosts {
		hosts[i].PricePerHour = nil
	}
	j := with(want("j", "H100", 1), func(j *place.Job) { j.Wish, j.MinBytes = job.Wish{}, 24e9 })
	if got := agents(run(t, place.Input{Jobs: []place.Job{j}, Hosts: hosts})); got["j"] != "c" {
		t.Errorf("%v", got)
	}
}

func TestTheBaseModelIsThereOrPreferred(t *testing.T) {
	a, b := gpus("a", "H100", 1), gpus("b", "H100", 8)
	a.BaseModels = nil
	in := place.Input{Jobs: []place.Job{want("1", "H100", 1), want("2", "H100", 8)}, Hosts: []place.Host{a, b}}
	if got := agents(run(t, in)); got["1"] != "b" || got["2"] != "" {
		t.Errorf("%v", got)
	}
	in.Policy.FetchModels = true
	in.Hosts[1].BaseModels = nil
	if got := agents(run(t, in)); got["1"] != "a" || got["2"] != "b" {
		t.Errorf("%v", got)
	}
	in.Hosts[1].BaseModels = []string{"m"}
	if got := agents(run(t, in)); got["1"] != "b" {
		t.Errorf("%v", got)
	}
}

func TestPriorityGoesFirstThenDeadlineThenAge(t *testing.T) {
	h := gpus("a", "H100", 1)
	jobs := []place.Job{
		with(want("old", "H100", 1), func(j *place.Job) { j.Submitted = now.Add(-9 * time.Hour) }),
		with(want("due", "H100", 1), func(j *place.Job) { j.Deadline = now.Add(time.Hour) }),
		with(want("due-later", "H100", 1), func(j *place.Job) { j.Deadline = now.Add(2 * time.Hour) }),
		with(want("urgent", "H100", 1), func(j *place.Job) { j.Priority, j.Submitted = 1, now }),
		want("new", "H100", 1),
	}
	for _, first := range []string{"urgent", "due", "due-later", "old", "new"} {
		r := run(t, place.Input{Jobs: jobs, Hosts: []place.Host{h}})
		if len(r.Assignments) != 1 || r.Assignments[0].Job != first {
			t.Fatalf("%+v goes first, want %s", r.Assignments, first)
		}
		for i := range jobs {
			if jobs[i].ID == first {
				jobs = append(jobs[:i:i], jobs[i+1:]...)
				break
			}
		}
	}
}

func TestSharesFollowTheWeights(t *testing.T) {
	var jobs []place.Job
	for i := range 40 {
		jobs = append(jobs, with(want(fmt.Sprintf("a%02d", i), "H100", 1), func(j *place.Job) { j.Submitted = now.Add(-9 * time.Hour) }),
			with(want(fmt.Sprintf("b%02d", i), "H100", 1), func(j *place.Job) { j.User = "bob" }))
	}
	count := func(users map[string]place.User) (ann, bob int) {
		var hosts []place.Host
		for i := range 4 {
			hosts = append(hosts, gpus(fmt.Sprint("h", i), "H100", 8))
		}
		for id := range agents(run(t, place.Input{Jobs: jobs, Hosts: hosts, Users: users})) {
			if id[0] == 'a' {
				ann++
			} else {
				bob++
			}
		}
		return ann, bob
	}
	if a, b := count(nil); a != 16 || b != 16 {
		t.Errorf("equal users get %d and %d", a, b)
	}
	if a, b := count(map[string]place.User{"bob": {Weight: 3}}); a != 8 || b != 24 {
		t.Errorf("weights 1 and 3 get %d and %d", a, b)
	}
	// An hour of four GPUs is as much as sixteen GPUs that begin now.
	if a, b := count(map[string]place.User{"ann": {RecentGPUSeconds: 4 * 3600}}); a != 8 || b != 24 {
		t.Errorf("who used much lately gets %d, the other %d", a, b)
	}
}

func TestQuotasAreOfGPUsAtOnceAndOfJobsQueued(t *testing.T) {
	h := gpus("a", "H100", 8)
	in := place.Input{
		Jobs: []place.Job{want("1", "H100", 2), want("2", "H100", 2), want("3", "H100", 1), want("4", "H100", 1)}, Hosts: []place.Host{h},
		Running: []place.Running{with(runs("r", h, 0, 2), func(r *place.Running) { r.User = "ann" })},
		Users:   map[string]place.User{"ann": {MaxGPUs: 4, MaxQueued: 3}},
		Policy:  place.Policy{ReserveAfter: 2 * time.Hour},
	}
	r := run(t, in)
	if got := agents(r); len(got) != 1 || got["1"] != "a" {
		t.Errorf("%v", got)
	}
	for id, reason := range map[string]string{
		"2": "quota: you use 4 of 4 GPUs, and this job asks for 2; next expected in about 30 min",
		"3": "quota: you use 4 of 4 GPUs; next expected in about 30 min", "4": "quota: you have 4 jobs queued, and 3 take part at once",
	} {
		if r.Waiting[id].Reason != reason {
			t.Errorf("%s: %q", id, r.Waiting[id].Reason)
		}
	}
}

func TestOwnSmallJobsDoNotStarveALargeOneUnderAQuota(t *testing.T) {
	h := gpus("a", "H100", 8)
	in := place.Input{
		Jobs:    []place.Job{want("big", "H100", 4), with(want("small", "H100", 1), func(j *place.Job) { j.Submitted = now })},
		Hosts:   []place.Host{h},
		Running: []place.Running{with(runs("r", h, 0, 1), func(r *place.Running) { r.User = "ann" })},
		Users:   map[string]place.User{"ann": {MaxGPUs: 4}},
		Policy:  place.Policy{ReserveAfter: 2 * time.Hour},
	}
	if got := agents(run(t, in)); got["small"] != "a" {
		t.Errorf("%v", got)
	}
	in.Policy.ReserveAfter = time.Minute
	r := run(t, in)
	if len(r.Assignments) != 0 || !strings.Contains(r.Waiting["small"].Reason, "job big waits for 4 of your 4 GPUs") {
		t.Errorf("%+v", r)
	}
}

func TestALargeJobReservesAndShortOnesRunBehindIt(t *testing.T) {
	a, b := gpus("a", "H100", 8), gpus("b", "H100", 8)
	in := place.Input{
		Jobs: []place.Job{
			want("big", "H100", 8),
			with(want("long", "H100", 1), func(j *place.Job) { j.User, j.Submitted, j.Estimate = "cem", now, time.Hour }),
			with(want("short", "H100", 2), func(j *place.Job) { j.User, j.Submitted, j.Estimate = "cem", now, 20*time.Minute }),
			with(want("unknown", "H100", 1), func(j *place.Job) { j.User, j.Submitted = "cem", now }),
		},
		Hosts: []place.Host{a, b},
		Running: []place.Running{
			runs("r1", a, 0, 4), with(runs("r2", b, 0, 6), func(r *place.Running) { r.Ends = now.Add(3 * time.Hour) }), with(runs("r3", b, 6, 2), func(r *place.Running) { r.Ends = time.Time{} }),
		},
		Users:  map[string]place.User{"cem": {RecentGPUSeconds: 1e6}}, // goes last
		Policy: place.Policy{ReserveAfter: time.Minute, MaxReserved: 1},
	}
	r := run(t, in)
	if got := agents(r); len(got) != 1 || got["short"] != "a" {
		t.Errorf("%v", got)
	}
	if len(r.Reservations) != 1 || r.Reservations[0].Agent != "a" || !r.Reservations[0].Start.Equal(now.Add(30*time.Minute)) {
		t.Errorf("%+v", r.Reservations)
	}
	if w := r.Waiting["big"]; w.Reason != "8 × H100 on a are reserved for it; expected in about 30 min" || !w.Start.Equal(now.Add(30*time.Minute)) || !w.Latest.Equal(now.Add(45*time.Minute)) {
		t.Errorf("%+v", w)
	}
	if w := r.Waiting["long"]; w.Reason != "1 × H100 are free, but reserved for an earlier large job until about 14:30 UTC" {
		t.Errorf("%+v", w)
	}
	// Without reservations everything small starts, and the large job waits.
	in.Policy.MaxReserved = 0
	if got := agents(run(t, in)); len(got) != 3 || got["big"] != "" {
		t.Errorf("%v", got)
	}
	// A young one reserves nothing yet.
	in.Policy = place.Policy{ReserveAfter: 2 * time.Hour, MaxReserved: 1}
	if r := run(t, in); len(r.Reservations) != 0 {
		t.Errorf("%+v", r.Reservations)
	}
}

func TestAPromiseIsKept(t *testing.T) {
	a, b := gpus("a", "H100", 8), gpus("b", "H100", 8)
	in := place.Input{
		Jobs:  []place.Job{with(want("big", "H100", 8), func(j *place.Job) { j.Reserved = "b" }), with(want("fresh", "H100", 4), func(j *place.Job) { j.User, j.Submitted = "eve", now })},
		Hosts: []place.Host{a, b},
		Running: []place.Running{
			with(runs("r1", a, 0, 8), func(r *place.Running) { r.Ends = now.Add(20 * time.Minute) }), runs("r2", b, 0, 4),
		},
		Users:  map[string]place.User{"ann": {RecentGPUSeconds: 1e6}},
		Policy: place.Policy{ReserveAfter: time.Minute, MaxReserved: 1},
	}
	r := run(t, in)
	if len(r.Assignments) != 0 || len(r.Reservations) != 1 || r.Reservations[0].Agent != "b" {
		t.Errorf("%+v", r)
	}
	// Without the promise the user who had less goes first.
	in.Jobs[0].Reserved = ""
	if got := agents(run(t, in)); got["fresh"] != "b" {
		t.Errorf("%v", got)
	}
	// A promise that takes far longer than another host is given up.
	in.Jobs = in.Jobs[:1]
	in.Jobs[0].Reserved = "b"
	in.Running[1].Ends = now.Add(5 * time.Hour)
	if r := run(t, in); r.Reservations[0].Agent != "a" {
		t.Errorf("%+v", r.Reservations)
	}
}

func TestTwoGangsDoNotHoldHalfAHostEach(t *testing.T) {
	h := gpus("a", "H100", 8)
	in := place.Input{
		Jobs: []place.Job{want("1", "H100", 8), with(want("2", "H100", 8), func(j *place.Job) { j.User = "bob" })}, Hosts: []place.Host{h},
		Running: []place.Running{with(runs("r", h, 0, 4), func(r *place.Running) { r.User = "cem" })},
		Policy:  place.Policy{MaxReserved: 2},
	}
	r := run(t, in)
	if len(r.Assignments) != 0 || len(r.Reservations) != 1 {
		t.Fatalf("%+v", r)
	}
	in.Running = nil
	if r = run(t, in); len(r.Assignments) != 1 || len(r.Assignments[0].Devices) != 8 {
		t.Errorf("%+v", r)
	}
}

func TestPreemptionTakesTheCheapestRoomThatSuffices(t *testing.T) {
	a, b := gpus("a", "H100", 4), gpus("b", "H100", 4)
	urgent := func(n int) []place.Job {
		return []place.Job{with(want("j", "H100", n), func(j *place.Job) { j.Priority, j.Submitted = 5, now })}
	}
	age := func(r place.Running, m int) place.Running {
		r.Started = now.Add(-time.Duration(m) * time.Minute)
		return r
	}
	policy := place.Policy{MinRun: 10 * time.Minute}
	for _, c := range []struct {
		name    string
		jobs    []place.Job
		running []place.Running
		want    string
	}{
		{"the youngest beyond the minimum", urgent(1), []place.Running{age(runs("1", a, 0, 1), 60), age(runs("2", a, 1, 1), 12), age(runs("3", a, 2, 1), 9), age(runs("4", a, 3, 1), 20), age(runs("5", b, 0, 4), 11)}, "[2]"},
		{"the lowest priority", urgent(1), []place.Running{with(age(runs("1", a, 0, 4), 20), func(r *place.Running) { r.Priority = 1 }), age(runs("2", b, 0, 4), 50)}, "[2]"},
		{"the lowest priority of one host", urgent(1), []place.Running{with(age(runs("1", a, 0, 1), 20), func(r *place.Running) { r.Priority = 1 }), age(runs("2", a, 1, 1), 50), with(runs("3", a, 2, 2), func(r *place.Running) { r.Priority = 1 }), with(runs("4", b, 0, 4), func(r *place.Running) { r.Priority = 1 })}, "[2]"},
		{"the youngest of two hosts", urgent(4), []place.Running{age(runs("1", a, 0, 4), 60), age(runs("2", b, 0, 4), 12)}, "[2]"},
		{"one on another host instead of two", urgent(4), []place.Running{age(runs("1", a, 0, 2), 12), age(runs("2", a, 2, 2), 12), age(runs("3", b, 0, 4), 60)}, "[3]"},
		{"one instead of two", urgent(2), []place.Running{age(runs("1", a, 0, 1), 11), age(runs("2", a, 1, 3), 50), age(runs("3", b, 0, 4), 60)}, "[2]"},
		{"none if not all is freed", urgent(4), []place.Running{age(runs("1", a, 0, 1), 5), age(runs("2", a, 1, 3), 50), age(runs("3", b, 0, 1), 5)}, "[]"},
		{"none of the same priority", urgent(4), []place.Running{with(runs("1", a, 0, 4), func(r *place.Running) { r.Priority = 5 }), with(runs("2", b, 0, 4), func(r *place.Running) { r.Preemptible = false })}, "[]"},
		{"none if devices are free", urgent(4), []place.Running{runs("1", a, 0, 4)}, "[]"},
		{"none twice", urgent(4), []place.Running{with(runs("1", a, 0, 4), func(r *place.Running) { r.Leaving = true }), runs("2", b, 0, 4)}, "[]"},
		{"the rest of what leaves", urgent(4), []place.Running{with(runs("1", a, 0, 3), func(r *place.Running) { r.Leaving = true }), runs("2", a, 3, 1), runs("3", b, 0, 4)}, "[2]"},
	} {
		r := run(t, place.Input{Jobs: c.jobs, Hosts: []place.Host{a, b}, Running: c.running, Policy: policy})
		victims := []string{}
		for _, p := range r.Preemptions {
			victims = append(victims, p.Job)
		}
		if got := fmt.Sprint(victims); got != c.want {
			t.Errorf("%s: %s leave, want %s", c.name, got, c.want)
		}
	}

	// What a first one claims, a second one does not count on.
	two := append(urgent(4), with(urgent(4)[0], func(j *place.Job) { j.ID = "k" }))
	r := run(t, place.Input{Jobs: two, Hosts: []place.Host{a, b}, Running: []place.Running{runs("1", a, 0, 4), runs("2", b, 0, 4)}, Policy: policy})
	if len(r.Preemptions) != 2 || r.Preemptions[0].For != "j" || r.Preemptions[1].For != "k" || r.Waiting["j"].Reason != "4 × H100 on a are being made free for it" {
		t.Errorf("%+v", r)
	}
	// Where devices come free on two hosts, it stays where it was promised some.
	two = []place.Job{with(urgent(4)[0], func(j *place.Job) { j.Reserved = "b" })}
	leave := func(r *place.Running) { r.Leaving = true }
	r = run(t, place.Input{Jobs: two, Hosts: []place.Host{a, b}, Running: []place.Running{with(runs("1", a, 0, 4), leave), with(runs("2", b, 0, 4), leave)}, Policy: policy})
	if len(r.Preemptions) != 0 || r.Reservations[0].Agent != "b" {
		t.Errorf("%+v", r)
	}
	// Two small ones share what one large victim leaves.
	two = append(urgent(2), with(urgent(2)[0], func(j *place.Job) { j.ID = "k" }))
	r = run(t, place.Input{Jobs: two, Hosts: []place.Host{a}, Running: []place.Running{runs("1", a, 0, 4)}, Policy: policy})
	if len(r.Preemptions) != 1 || len(r.Reservations) != 2 {
		t.Errorf("%+v", r)
	}
}

func TestRoomIsCountedAnewWhenAHostChanged(t *testing.T) {
	a, b := gpus("a", "H100", 2), gpus("b", "H100", 3)
	jobs := []place.Job{want("1", "H100", 2), want("2", "H100", 1), want("3", "H100", 2)}
	for i := range jobs {
		jobs[i].Priority = 5
	}
	// The first prefers a, the second takes the free one of b, with which the
	// third could have done with one victim.
	r := run(t, place.Input{Jobs: jobs, Hosts: []place.Host{a, b}, Running: []place.Running{with(runs("r1", a, 0, 2), func(r *place.Running) { r.Leaving = true }), runs("r2", b, 1, 1), runs("r3", b, 2, 1)}})
	if got := agents(r); got["2"] != "b" || len(r.Preemptions) != 2 {
		t.Errorf("%+v", r)
	}

	// One victim that holds devices of two classes leaves both.
	mixed, l4 := gpus("a", "H100", 1), gpus("b", "L4", 1)
	mixed.Devices = append(mixed.Devices, gpus("a", "L4", 1).Devices...)
	jobs = []place.Job{want("1", "L4", 1), want("2", "H100", 1), want("3", "L4", 1)}
	for i := range jobs {
		jobs[i].Priority = 5
	}
	r = run(t, place.Input{Jobs: jobs, Hosts: []place.Host{mixed, l4}, Running: []place.Running{runs("r1", mixed, 0, 2), runs("r2", l4, 0, 1)}})
	if len(r.Preemptions) != 2 || len(r.Reservations) != 3 {
		t.Errorf("%+v", r)
	}
}

func TestWorkWithoutDevicesGoesWhereTheLeastOfItIs(t *testing.T) {
	a, b, c := gpus("a", "H100", 1), gpus("b", "H100", 0), gpus("c", "H100", 0)
	c.Draining = true
	check := func(id string) place.Job {
		return place.Job{ID: id, User: "ann", Submitted: now}
	}
	in := place.Input{
		Jobs: []place.Job{check("1"), check("2"), check("3")}, Hosts: []place.Host{a, b, c},
		Running: []place.Running{runs("r", a, 0, 1), {Job: "v", Agent: "a"}}, Users: map[string]place.User{"ann": {MaxGPUs: 1}},
	}
	if got := agents(run(t, in)); got["1"] != "b" || got["2"] != "a" || got["3"] != "b" {
		t.Errorf("%v", got)
	}
	in.Hosts = in.Hosts[2:]
	if r := run(t, in); r.Waiting["1"].Reason != "no host takes anything new: c is closed to new jobs" {
		t.Errorf("%+v", r)
	}
}

func TestADeviceThatTwoHostsReportIsGivenToNobody(t *testing.T) {
	a, b := gpus("a", "H100", 1), gpus("b", "H100", 1)
	b.Devices[0].UUID = a.Devices[0].UUID
	r := place.Place(place.Input{Now: now, Jobs: []place.Job{want("j", "H100", 1)}, Hosts: []place.Host{a, b}})
	if !strings.Contains(r.Waiting["j"].Reason, "two hosts report it") {
		t.Errorf("%+v", r)
	}
}

func TestWaitingSaysWhy(t *testing.T) {
	two := want("j", "H100", 2)
	sick, drained, full := gpus("a", "H100", 2), gpus("a", "H100", 8), gpus("a", "H100", 4)
	sick.Devices[0].Fault = "fell off the bus"
	drained.Draining = true
	small := with(two, func(j *place.Job) { j.MinBytes = 85.6e9 })
	for _, c := range []struct {
		job     place.Job
		hosts   []place.Host
		running []place.Running
		user    place.User
		policy  place.Policy
		want    string
	}{
		{job: two, want: "2 × H100 are not there: no host takes work at the moment"},
		{job: two, hosts: []place.Host{gpus("a", "A100-80GB", 8), gpus("b", "H100", 1)}, want: "2 × H100 are on no single host; hosts have up to 8 × A100-80GB, up to 1 × H100"},
		{job: two, hosts: []place.Host{full}, running: []place.Running{runs("r", full, 0, 3)}, want: "2 × H100 free on no single host (at most 1); next expected in about 30 min"},
		{job: two, hosts: []place.Host{full}, running: []place.Running{with(runs("r", full, 0, 3), func(r *place.Running) { r.Ends = time.Time{} })}, want: "2 × H100 free on no single host (at most 1)"},
		{job: with(two, func(j *place.Job) { j.BaseModel = "x" }), hosts: []place.Host{full}, want: "2 × H100 are on no host that holds base model x"},
		{job: with(two, func(j *place.Job) { j.Labels = map[string]string{"zone": "eu"} }), hosts: []place.Host{full}, want: "2 × H100 are on no host with the labels zone=eu"},
		{job: two, hosts: []place.Host{sick}, want: "2 × H100 are on a host, but 1 of its devices are not fit: fell off the bus"},
		{job: two, hosts: []place.Host{drained}, want: "2 × H100 are only where nothing new is taken: a is closed to new jobs"},
		{job: small, hosts: []place.Host{full}, want: "2 × H100 with 85.6 GB are on no single host; hosts have up to 4 × H100"},
		{job: with(two, func(j *place.Job) { j.Wish = job.Wish{} }), hosts: []place.Host{gpus("a", "MIG-9GB", 4)}, want: "2 × any GPU are on no single host; hosts have up to 4 × MIG-9GB"},
		{job: two, hosts: []place.Host{full}, user: place.User{MaxGPUs: 1}, want: "quota: you may use 1 GPUs at once, and this job asks for 2"},
		{job: two, hosts: []place.Host{full}, user: place.User{Hold: "the budget of this month is used up"}, want: "paused: the budget of this month is used up"},
		{job: two, hosts: []place.Host{full}, policy: place.Policy{Hold: "maintenance until 16:00"}, want: "paused: maintenance until 16:00"},
	} {
		in := place.Input{Now: now, Jobs: []place.Job{c.job}, Hosts: c.hosts, Running: c.running, Users: map[string]place.User{"ann": c.user}, Policy: c.policy}
		if r := place.Place(in); r.Waiting["j"].Reason != c.want {
			t.Errorf("%q\nwant %q", r.Waiting["j"].Reason, c.want)
		}
	}
}

func TestTheStartIsEstimatedByWhoGoesFirst(t *testing.T) {
	h := gpus("a", "H100", 4)
	in := place.Input{Hosts: []place.Host{h}}
	for i := range 4 { // one ends every ten minutes
		in.Running = append(in.Running, with(runs(fmt.Sprint("r", i), h, i, 1), func(r *place.Running) { r.Ends = now.Add(time.Duration(i+1) * 10 * time.Minute) }))
	}
	for i := range 8 {
		in.Jobs = append(in.Jobs, want(fmt.Sprint("j", i), "H100", 1))
	}
	r := run(t, in)
	for i := range 8 { // the fifth and later by the rate of the first four
		w := r.Waiting[fmt.Sprint("j", i)]
		start := time.Duration(i+1) * 10 * time.Minute
		if !w.Start.Equal(now.Add(start)) || !w.Latest.Equal(now.Add(start*3/2)) || !w.Earliest.Equal(now.Add(10*time.Minute)) {
			t.Errorf("job %d: %+v", i, w)
		}
	}
	// One that is late already is expected to need a tenth more.
	in.Running[0].Ends = now.Add(-time.Minute)
	if r = run(t, in); !r.Waiting["j0"].Start.Equal(now.Add(3 * time.Minute)) {
		t.Errorf("%+v", r.Waiting["j0"])
	}
}
