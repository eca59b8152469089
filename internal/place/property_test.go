package place_test

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"lorayard/internal/job"
	"lorayard/internal/place"
)

var now = time.Date(2026, 3, 31, 14, 0, 0, 0, time.UTC)

// memory is what a driver reports, in MiB.
var memory = map[string]int64{"H100": 81559, "A100-80GB": 81920, "L4": 23034, "MIG-9GB": 9856}

func wish(t interface{ Fatal(...any) }, text string) job.Wish {
	w, err := job.ParseWish(text)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func often(t *rapid.T, of int, label string) bool { return rapid.IntRange(1, of).Draw(t, label) > 1 }

// drawInput makes a fleet at work.
func drawInput(t *rapid.T) place.Input {
	in := place.Input{Now: now, Users: map[string]place.User{}}
	models := []string{"m", "n"}
	users := []string{"ann", "bob", "cem", "dee"}
	minutes := func(label string, most int) time.Duration {
		return time.Duration(rapid.IntRange(0, most).Draw(t, label)) * time.Minute
	}
	in.Policy = place.Policy{MinRun: minutes("min run", 20), ReserveAfter: minutes("reserve after", 20), MaxReserved: rapid.IntRange(0, 3).Draw(t, "max reserved"), FetchModels: !often(t, 4, "no fetching")}
	for _, u := range users {
		user := place.User{Weight: float64(rapid.IntRange(0, 3).Draw(t, "weight")), RecentGPUSeconds: float64(rapid.IntRange(0, 3).Draw(t, "recent") * 1000)}
		if !often(t, 3, "no quota") {
			user.MaxGPUs = rapid.IntRange(1, 10).Draw(t, "quota")
		}
		if !often(t, 5, "no queue limit") {
			user.MaxQueued = rapid.IntRange(1, 5).Draw(t, "queue limit")
		}
		if !often(t, 10, "may start") {
			user.Hold = "budget used up"
		}
		in.Users[u] = user
	}
	n := 0
	for i := range rapid.IntRange(0, 5).Draw(t, "hosts") {
		h := place.Host{
			Agent: fmt.Sprintf("h%d", i), BaseModels: rapid.SliceOfDistinct(rapid.SampledFrom(models), rapid.ID).Draw(t, "models"),
			Draining: !often(t, 6, "takes work"), PricePerHour: map[string]int64{"H100": rapid.Int64Range(1, 3).Draw(t, "price")},
		}
		if !often(t, 3, "no label") {
			h.Labels = map[string]string{"zone": "eu"}
		}
		count := rapid.IntRange(0, 8).Draw(t, "devices")
		main := rapid.SampledFrom(slices.Sorted(maps.Keys(memory))).Draw(t, "main class")
		for d := range count {
			dev := place.Device{UUID: fmt.Sprintf("h%d-%d", i, (d*3)%8), Class: main}
			if !often(t, 6, "same class") {
				dev.Class = rapid.SampledFrom(slices.Sorted(maps.Keys(memory))).Draw(t, "class")
			}
			dev.MemoryBytes = memory[dev.Class] << 20
			if !often(t, 8, "fit") {
				dev.Fault = "fell off the bus"
			}
			dev.Busy = !often(t, 8, "not busy")
			h.Devices = append(h.Devices, dev)
		}
		if rapid.Bool().Draw(t, "linked") {
			h.Links = make([][]int, count)
			for a := range count {
				h.Links[a] = make([]int, count)
			}
			for a := range count {
				for b := range a {
					w := rapid.SampledFrom([]int{10, 40, 100}).Draw(t, "link")
					h.Links[a][b], h.Links[b][a] = w, w
				}
			}
		}
		for d := 0; d < count; {
			size := rapid.IntRange(1, 4).Draw(t, "size")
			if rapid.Bool().Draw(t, "runs") {
				r := place.Running{
					Job: fmt.Sprintf("r%d", n), User: rapid.SampledFrom(users).Draw(t, "runner"), Agent: h.Agent,
					Priority: rapid.IntRange(0, 2).Draw(t, "running priority"), Preemptible: often(t, 4, "running preemptible"),
					Started: now.Add(-minutes("runs for", 60)), Leaving: !often(t, 6, "stays"),
				}
				if rapid.Bool().Draw(t, "end known") {
					r.Ends = now.Add(minutes("ends", 60) - 10*time.Minute)
				}
				for _, dev := range h.Devices[d:min(d+size, count)] {
					r.Devices = append(r.Devices, dev.UUID)
				}
				in.Running = append(in.Running, r)
				n++
			}
			d += size
		}
		in.Hosts = append(in.Hosts, h)
	}
	for i := range rapid.IntRange(0, 25).Draw(t, "jobs") {
		j := place.Job{
			ID: fmt.Sprintf("j%02d", i), User: rapid.SampledFrom(users).Draw(t, "user"),
			Wish:  wish(t, rapid.SampledFrom([]string{"H100", "A100-80GB", "any", "H100|A100", "20GB..", "MIG-9GB", "L4"}).Draw(t, "wish")),
			Count: rapid.SampledFrom([]int{0, 1, 1, 1, 2, 2, 3, 4, 8}).Draw(t, "count"), MinBytes: rapid.SampledFrom([]int64{0, 0, 0, 20e9, 60e9}).Draw(t, "bytes"),
			BaseModel: rapid.SampledFrom([]string{"", "m", "m", "n"}).Draw(t, "model"), Priority: rapid.IntRange(0, 2).Draw(t, "priority"),
			Submitted: now.Add(-minutes("waits for", 60)), Estimate: minutes("estimate", 30), Preemptible: true,
		}
		if !often(t, 6, "any host") {
			j.Labels = map[string]string{"zone": "eu"}
		}
		if !often(t, 5, "no deadline") {
			j.Deadline = now.Add(minutes("deadline", 600))
		}
		if !often(t, 5, "no failure") {
			j.Avoid = []string{"h0"}
		}
		if !often(t, 5, "no promise") {
			j.Reserved = fmt.Sprintf("h%d", rapid.IntRange(0, 5).Draw(t, "promise"))
		}
		in.Jobs = append(in.Jobs, j)
	}
	return in
}

// fatal is what check needs of a test.
type fatal interface {
	Helper()
	Fatalf(string, ...any)
}

// check holds an answer against everything that an answer must be.
func check(t fatal, in place.Input, r place.Result) {
	t.Helper()
	jobs, hosts, runs := map[string]place.Job{}, map[string]place.Host{}, map[string]place.Running{}
	holder := map[string]string{} // device → running job, "?" if unknown
	gpus := map[string]int{}      // by user
	had := map[string]int{}
	for _, j := range in.Jobs {
		jobs[j.ID] = j
	}
	for _, h := range in.Hosts {
		hosts[h.Agent] = h
		for _, d := range h.Devices {
			if d.Busy {
				holder[d.UUID] = "?"
			}
		}
	}
	for _, run := range in.Running {
		runs[run.Job] = run
		gpus[run.User] += len(run.Devices)
		had[run.User] += len(run.Devices)
		for _, d := range run.Devices {
			holder[d] = run.Job
		}
	}
	// unfit says why devices cannot serve j at all.
	unfit := func(j place.Job, agent string, devices []string) string {
		h, ok := hosts[agent]
		class := ""
		switch {
		case !ok || h.Draining:
			return "the host takes no work"
		case j.BaseModel != "" && !in.Policy.FetchModels && !slices.Contains(h.BaseModels, j.BaseModel):
			return "the base model is missing"
		case len(devices) != j.Count:
			return "the number of devices is wrong"
		}
		for k, v := range j.Labels {
			if h.Labels[k] != v {
				return "a label is missing"
			}
		}
		for _, u := range devices {
			i := slices.IndexFunc(h.Devices, func(d place.Device) bool { return d.UUID == u })
			if i < 0 {
				return "a device is of another host"
			}
			d := h.Devices[i]
			if d.Fault != "" || d.MemoryBytes < j.MinBytes || !j.Wish.Matches(d.Class, d.MemoryBytes) || class != "" && class != d.Class {
				return "a device does not do"
			}
			class = d.Class
		}
		return ""
	}

	// Promises: whole gangs, of devices that will do, each device once.
	promise := map[string]place.Reservation{}
	claims := map[string]place.Reservation{} // by job
	reserved := 0
	for _, p := range r.Reservations {
		j, waits := jobs[p.Job], false
		if _, ok := r.Waiting[p.Job]; ok {
			waits = true
		}
		if why := unfit(j, p.Agent, p.Devices); why != "" || !waits {
			t.Fatalf("promise %+v: %s, waits: %v", p, why, waits)
		}
		for _, d := range p.Devices {
			if o, twice := promise[d]; twice {
				t.Fatalf("%s is promised to %s and %s", d, o.Job, p.Job)
			}
			promise[d] = p
			if p.Claim && holder[d] == "?" {
				t.Fatalf("claim of %s, whose holder is unknown", d)
			}
		}
		if p.Claim {
			claims[p.Job] = p
			gpus[j.User] += j.Count
			continue
		}
		reserved++
		if j.Count < 2 || in.Now.Sub(j.Submitted) < in.Policy.ReserveAfter {
			t.Fatalf("%s must not reserve", p.Job)
		}
	}
	if reserved > in.Policy.MaxReserved {
		t.Fatalf("%d reservations, %d are allowed", reserved, in.Policy.MaxReserved)
	}

	// Assignments: whole gangs, free devices, each once; promised ones only to
	// who will be gone in time.
	for _, a := range r.Assignments {
		j, ok := jobs[a.Job]
		if why := unfit(j, a.Agent, a.Devices); why != "" || !ok {
			t.Fatalf("assignment %+v: %s", a, why)
		}
		for _, d := range a.Devices {
			if holder[d] != "" {
				t.Fatalf("%s goes to %s, but %s has it", d, a.Job, holder[d])
			}
			// A promise may count on a device that was given away just before,
			// to one who goes first.
			if p, ok := promise[d]; ok && (p.Claim || p.Start.IsZero() && j.Priority < jobs[p.Job].Priority ||
				!p.Start.IsZero() && (j.Estimate <= 0 || in.Now.Add(j.Estimate).After(p.Start))) {
				t.Fatalf("%s goes to %s, but it is promised: %+v", d, a.Job, p)
			}
			holder[d] = a.Job
		}
		gpus[j.User] += j.Count
		delete(jobs, a.Job)
		if _, waits := r.Waiting[a.Job]; waits {
			t.Fatalf("%s is assigned and waits", a.Job)
		}
	}
	for u, n := range gpus {
		if most := in.Users[u].MaxGPUs; most > 0 && n > max(most, had[u]) {
			t.Fatalf("%s uses %d GPUs of %d", u, n, most)
		}
		if in.Users[u].Hold != "" && n > had[u] {
			t.Fatalf("%s is on hold", u)
		}
	}

	// Preemptions: downward, after the minimum run, once, and of use.
	asked := map[string]bool{}
	for _, p := range r.Preemptions {
		v, by, claim := runs[p.Job], jobs[p.For], claims[p.For]
		switch {
		case asked[p.Job] || v.Leaving || !v.Preemptible || in.Now.Sub(v.Started) < in.Policy.MinRun:
			t.Fatalf("%+v: the victim must not be asked: %+v", p, v)
		case v.Priority >= by.Priority:
			t.Fatalf("%+v: from priority %d to %d", p, v.Priority, by.Priority)
		case !slices.ContainsFunc(v.Devices, func(d string) bool { return slices.Contains(claim.Devices, d) }):
			t.Fatalf("%+v does not help: %+v", p, claim)
		}
		asked[p.Job] = true
	}
	for _, c := range claims {
		for _, d := range c.Devices {
			if h := holder[d]; h != "" && !runs[h].Leaving && !asked[h] {
				t.Fatalf("claim %+v: %s does not leave %s", c, h, d)
			}
		}
	}

	// Who waits knows why, and waits for devices only while none are free.
	for id, j := range jobs {
		w, ok := r.Waiting[id]
		if !ok || w.Reason == "" {
			t.Fatalf("%s is neither placed nor told why it waits", id)
		}
		if !w.Start.IsZero() && (w.Earliest.IsZero() || w.Start.Before(w.Earliest) || w.Latest.Before(w.Start)) || !w.Earliest.IsZero() && w.Earliest.Before(in.Now) {
			t.Fatalf("%s starts at %+v", id, w)
		}
		if code := codeOf(w.Reason); w.Code != code {
			t.Fatalf("%s waits as %s, but says %q", id, w.Code, w.Reason)
		}
		switch u := in.Users[j.User]; {
		case strings.HasPrefix(w.Reason, "paused: "):
			if u.Hold == "" {
				t.Fatalf("%s: %s", id, w.Reason)
			}
			continue
		case strings.HasPrefix(w.Reason, "quota: "):
			if u.MaxGPUs == 0 && u.MaxQueued == 0 {
				t.Fatalf("%s has no quota: %s", id, w.Reason)
			}
			continue
		}
		for _, h := range in.Hosts {
			free := map[string][]string{}
			for _, d := range h.Devices {
				_, taken := promise[d.UUID]
				if !taken && holder[d.UUID] == "" && d.Fault == "" {
					free[d.Class] = append(free[d.Class], d.UUID)
				}
			}
			if j.Count == 0 && unfit(j, h.Agent, nil) == "" {
				t.Fatalf("%s waits (%s), but %s would do", id, w.Reason, h.Agent)
			}
			for _, us := range free {
				if j.Count > 0 && len(us) >= j.Count && unfit(j, h.Agent, us[:j.Count]) == "" {
					t.Fatalf("%s waits (%s), but %s has %v", id, w.Reason, h.Agent, us)
				}
			}
		}
	}
	if len(r.Assignments)+len(r.Waiting) != len(in.Jobs) {
		t.Fatalf("%d assigned, %d wait, of %d", len(r.Assignments), len(r.Waiting), len(in.Jobs))
	}
}

func TestEveryAnswerKeepsTheRules(t *testing.T) {
	for range 20 { // a hundred fleets each, which take some milliseconds
		rapid.Check(t, func(t *rapid.T) {
			in := drawInput(t)
			check(t, in, place.Place(in))
		})
	}
}

func TestTheOrderOfTheInputDoesNotMatter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		in := drawInput(t)
		r := place.Place(in)
		mixed := in
		mixed.Jobs = rapid.Permutation(in.Jobs).Draw(t, "jobs")
		mixed.Running = rapid.Permutation(in.Running).Draw(t, "running")
		mixed.Hosts = slices.Clone(rapid.Permutation(in.Hosts).Draw(t, "hosts"))
		for i, h := range mixed.Hosts {
			order := make([]int, len(h.Devices))
			for d := range order {
				order[d] = d
			}
			order = rapid.Permutation(order).Draw(t, "devices")
			devices, links := []place.Device(nil), [][]int(nil)
			for _, a := range order {
				devices = append(devices, h.Devices[a])
				if h.Links != nil {
					var row []int
					for _, b := range order {
						row = append(row, h.Links[a][b])
					}
					links = append(links, row)
				}
			}
			mixed.Hosts[i].Devices, mixed.Hosts[i].Links = devices, links
		}
		if again := place.Place(mixed); !reflect.DeepEqual(r, again) {
			t.Fatalf("%+v\n%+v", r, again)
		}
		if again := place.Place(in); !reflect.DeepEqual(r, again) {
			t.Fatal("a second call gives another answer: the first one changed its input")
		}
	})
}

func TestTheBestLinkedSetIsChosen(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 8).Draw(t, "n")
		k := rapid.IntRange(1, n).Draw(t, "k")
		h := gpus("a", "H100", n)
		h.Links = make([][]int, n)
		for a := range n {
			h.Links[a] = make([]int, n)
		}
		for a := range n {
			for b := range a {
				w := rapid.SampledFrom([]int{10, 20, 100}).Draw(t, "link")
				h.Links[a][b], h.Links[b][a] = w, w
			}
		}
		if rapid.Bool().Draw(t, "all to all") { // through switches
			for a := range n {
				for b := range n {
					h.Links[a][b] = 100
				}
			}
		}
		for a := range n {
			h.Devices[a].Node = rapid.IntRange(0, 2).Draw(t, "node")
		}
		r := place.Place(place.Input{Now: now, Jobs: []place.Job{want("j", "H100", k)}, Hosts: []place.Host{h}})
		if len(r.Assignments) != 1 {
			t.Fatalf("%+v", r)
		}
		// within, among the rest, and nodes, of a set as bits
		links := func(set int) (within, rest, nodes int) {
			on := map[int]bool{}
			for a := range n {
				if set&(1<<a) != 0 {
					on[h.Devices[a].Node] = true
				}
				for b := range a {
					switch {
					case set&(1<<a) != 0 && set&(1<<b) != 0:
						within += h.Links[a][b]
					case set&(1<<a) == 0 && set&(1<<b) == 0:
						rest += h.Links[a][b]
					}
				}
			}
			return within, rest, len(on)
		}
		got := 0
		for i, d := range h.Devices {
			if slices.Contains(r.Assignments[0].Devices, d.UUID) {
				got |= 1 << i
			}
		}
		within, rest, nodes := links(got)
		for set := range 1 << n {
			size := 0
			for a := range n {
				size += set >> a & 1
			}
			if size != k {
				continue
			}
			if w, r, n := links(set); w > within || w == within && (r > rest || r == rest && n < nodes) {
				t.Fatalf("%b has %d within and %d among the rest, on %d nodes; %b has %d and %d, on %d", got, within, rest, nodes, set, w, r, n)
			}
		}
	})
}

// codeOf is the short word for a reason, by what it says.
func codeOf(reason string) string {
	switch {
	case strings.HasPrefix(reason, "paused: "):
		return "paused"
	case strings.HasPrefix(reason, "quota: your job "):
		return "behind_own"
	case strings.HasPrefix(reason, "quota: "):
		return "quota"
	case strings.Contains(reason, " are being made free for it"), strings.Contains(reason, " are reserved for it"):
		return "promised"
	case strings.Contains(reason, " × "):
		return "no_devices"
	}
	return "nowhere"
}
