package place

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
)

// cause is why a job waits, in rough.
type cause int

const (
	held          cause = iota // by a person: note says why
	tooManyQueued              // of this user
	overQuota
	behindOwn // note is the id of the user's job that goes first
	promised  // devices, see promise
	blocked   // no devices
)

// wait is a job that waits, to be explained when all are served.
type wait struct {
	*waiting
	cause   cause
	note    string
	promise *reservation
	ahead   float64 // devices that those who go first ask for
}

func (s *state) wait(w *waiting, c cause, note string) {
	out := wait{waiting: w, cause: c, note: note}
	if c == blocked && w.demand != nil {
		for _, k := range w.demand.kinds {
			out.ahead += s.ahead[k]
		}
		for _, k := range w.demand.kinds {
			s.ahead[k] += float64(w.Count) / float64(len(w.demand.kinds))
		}
	}
	s.waits = append(s.waits, out)
}

// explain says of every job that waits why, and when it may start.
func (s *state) explain() {
	for _, r := range s.reservations {
		s.result.Reservations = append(s.result.Reservations, r.Reservation)
	}
	for _, w := range s.waits {
		out := s.why(w)
		out.Code = w.code()
		s.result.Waiting[w.ID] = out
	}
}

// code is why a job waits, in one of a few words.
func (w wait) code() string {
	switch w.cause {
	case held:
		return "paused"
	case tooManyQueued, overQuota:
		return "quota"
	case behindOwn:
		return "behind_own"
	case promised:
		return "promised"
	}
	if w.Count <= 0 {
		return "nowhere"
	}
	return "no_devices"
}

func (s *state) why(w wait) Wait {
	u := w.user
	switch w.cause {
	case held:
		return Wait{Reason: "paused: " + w.note}
	case tooManyQueued:
		return Wait{Reason: fmt.Sprintf("quota: you have %d jobs queued, and %d take part at once", u.queued, u.MaxQueued)}
	case overQuota:
		if w.Count > u.MaxGPUs {
			return Wait{Reason: fmt.Sprintf("quota: you may use %d GPUs at once, and this job asks for %d", u.MaxGPUs, w.Count)}
		}
		out := Wait{Reason: fmt.Sprintf("quota: you use %d of %d GPUs", u.gpus, u.MaxGPUs), Earliest: s.quotaRoom(u, w.Count)}
		if w.Count > 1 {
			out.Reason += fmt.Sprintf(", and this job asks for %d", w.Count)
		}
		if !out.Earliest.IsZero() {
			out.Reason += "; next expected in " + s.in(out.Earliest)
		}
		return out
	case behindOwn:
		return Wait{Reason: fmt.Sprintf("quota: your job %s waits for %d of your %d GPUs and goes first", w.note, u.first.Count, u.MaxGPUs)}
	case promised:
		return s.whyPromised(w)
	}
	if w.Count <= 0 {
		return Wait{Reason: s.whyNowhere(w.Job)}
	}
	tail, releases := s.tell(w.demand)
	out := s.estimate(releases, w.ahead/float64(w.Count))
	out.Reason = wish(w.Job) + " " + tail
	return out
}

func (s *state) whyPromised(w wait) Wait {
	r := w.promise
	if r.Claim {
		return Wait{
			Reason:   fmt.Sprintf("%s on %s are being made free for it", wish(w.Job), r.Agent),
			Earliest: s.Now,
		}
	}
	out := Wait{Reason: fmt.Sprintf("%s on %s are reserved for it", wish(w.Job), r.Agent), Start: r.Start, Earliest: r.Start}
	if r.Start.IsZero() {
		out.Reason += "; nothing is known yet of when they come free"
	} else {
		out.Latest = s.later(r.Start)
		out.Reason += "; expected in " + s.in(r.Start)
	}
	return out
}

func wish(j *Job) string {
	out := fmt.Sprintf("%d × %s", j.Count, j.Wish)
	if j.Wish.Any() {
		out = fmt.Sprintf("%d × any GPU", j.Count)
	}
	if j.MinBytes > 0 {
		out += fmt.Sprintf(" with %.4g GB", math.Ceil(float64(j.MinBytes)/1e8)/10)
	}
	return out
}

// quotaRoom is when u is expected to use so little that count devices more are
// within its quota.
func (s *state) quotaRoom(u *user, count int) time.Time {
	if t, ok := u.next[count]; ok {
		return t
	}
	if u.next == nil {
		u.next = map[int]time.Time{}
		u.runs = slices.DeleteFunc(u.runs, func(r *run) bool { return r.Ends.IsZero() })
		slices.SortFunc(u.runs, func(a, b *run) int { return s.expected(a).Compare(s.expected(b)) })
	}
	need := u.gpus + count - u.MaxGPUs
	var at time.Time
	for _, r := range u.runs {
		if need -= len(r.Devices); need <= 0 {
			at = s.expected(r)
			break
		}
	}
	u.next[count] = at
	return at
}

// tell says why nothing serves d now, and when something is expected to. It is
// computed once for all jobs that ask for the same.
func (s *state) tell(d *demand) (string, []time.Time) {
	if !d.told {
		d.told, d.releases = true, s.releasesOf(d)
		d.tail = s.whyNot(d)
	}
	return d.tail, d.releases
}

// whyNot names the first thing that a person could change.
func (s *state) whyNot(d *demand) string {
	var draining []string
	var reserved *reservation
	large, carried, fit, mostFree, sick, fault := 0, 0, 0, 0, 0, ""
	takes := false
	for i := range s.pools {
		p := &s.pools[i]
		if !slices.Contains(d.kinds, p.kind) || p.all < d.count {
			continue
		}
		h := &s.hosts[p.host]
		large++
		if !h.carries(d.labels) {
			continue
		}
		carried++
		switch {
		case h.Draining:
			draining = append(draining, h.Agent)
		case len(p.devices) < d.count:
			sick, fault = p.all-len(p.devices), p.fault
		case !d.takes(i):
			fit++
		default:
			takes = true
			mostFree = max(mostFree, p.free)
			if r := p.promised(d.count); r != nil && (reserved == nil || !r.Claim) {
				reserved = r
			}
		}
	}
	switch {
	case len(s.hosts) == 0:
		return "are not there: no host takes work at the moment"
	case large == 0:
		return "are on no single host; " + s.offers()
	case carried == 0:
		return "are on no host with the labels " + labels(d.labels)
	case takes && reserved != nil && reserved.Start.IsZero():
		return "are free, but reserved for an earlier large job"
	case takes && reserved != nil:
		return "are free, but reserved for an earlier large job until about " + about(reserved.Start)
	case takes:
		out := fmt.Sprintf("free on no single host (at most %d)", mostFree)
		if len(d.releases) > 0 {
			out += "; next expected in " + s.in(d.releases[0])
		}
		return out
	case fit > 0:
		return "are on no host that holds base model " + d.model
	case sick > 0:
		return fmt.Sprintf("are on a host, but %d of its devices are not fit: %s", sick, fault)
	}
	return "are only where nothing new is taken: " + some(draining) + " " + isAre(len(draining)) + " closed to new jobs"
}

// promised gives a reservation because of which count free devices are not
// open.
func (p *pool) promised(count int) *reservation {
	n, out := 0, (*reservation)(nil)
	for _, d := range p.devices {
		if !d.busy {
			n++
		}
		if !d.busy && d.held != nil {
			out = d.held
		}
	}
	if n < count {
		return nil
	}
	return out
}

func (s *state) whyNowhere(j *Job) string {
	var draining []string
	for i := range s.hosts {
		if s.hosts[i].Draining {
			draining = append(draining, s.hosts[i].Agent)
		}
	}
	switch {
	case len(s.hosts) == 0:
		return "no host takes work at the moment"
	case len(draining) == len(s.hosts):
		return "no host takes anything new: " + some(draining) + " " + isAre(len(draining)) + " closed to new jobs"
	case len(j.Labels) > 0:
		return "no host that takes work carries the labels " + labels(j.Labels)
	}
	return "no host that takes work holds base model " + j.BaseModel
}

// offers lists the largest set of each class on one host.
func (s *state) offers() string {
	most := map[string]int{}
	for i := range s.pools {
		c := s.kinds[s.pools[i].kind].class
		most[c] = max(most[c], s.pools[i].all)
	}
	if len(most) == 0 {
		return "no host has a GPU"
	}
	var out []string
	for _, c := range slices.Sorted(maps.Keys(most)) {
		out = append(out, fmt.Sprintf("up to %d × %s", most[c], c))
	}
	return "hosts have " + strings.Join(out, ", ")
}

func labels(m map[string]string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, k+"="+m[k])
	}
	return strings.Join(out, ", ")
}

func some(names []string) string {
	names = slices.Compact(names)
	if len(names) > 3 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:3], ", "), len(names)-3)
	}
	return strings.Join(names, ", ")
}

func isAre(n int) string {
	if n == 1 {
		return "is"
	}
	return "are"
}

// foreseen is how many releases are looked at; further ones are taken to come
// at the same rate.
const foreseen = 32

// releasesOf lists the next moments at which one more gang of d is expected to
// fit, as if nobody else wanted the devices.
func (s *state) releasesOf(d *demand) []time.Time {
	var out []time.Time
	for _, c := range d.pools {
		p := &s.pools[c.pool]
		if !p.timed {
			p.timed = true
			for _, dev := range p.devices {
				switch {
				case dev.held != nil:
				case !dev.busy:
					p.times = append(p.times, s.Now)
				case !dev.ends.IsZero():
					p.times = append(p.times, dev.ends)
				}
			}
			slices.SortFunc(p.times, time.Time.Compare)
		}
		for i := d.count - 1; i < len(p.times); i += d.count {
			at, _ := slices.BinarySearchFunc(out, p.times[i], time.Time.Compare)
			if at >= foreseen {
				break
			}
			out = slices.Insert(out, at, p.times[i])
			out = out[:min(len(out), foreseen)]
		}
	}
	return out
}

// estimate guesses the start of a job before which ahead others of its size
// are served.
func (s *state) estimate(releases []time.Time, ahead float64) Wait {
	n := len(releases)
	if n == 0 {
		return Wait{}
	}
	out := Wait{Earliest: releases[0]}
	if i := int(ahead); i < n {
		out.Start = releases[i]
	} else {
		last := releases[n-1].Sub(s.Now)
		more := float64(last) / float64(n) * float64(i-n+1)
		if more > float64(365*24*time.Hour) { // so far ahead nothing is known
			return out
		}
		out.Start = s.Now.Add(last + time.Duration(more))
	}
	out.Latest = s.later(out.Start)
	return out
}

func (s *state) later(t time.Time) time.Time { return s.Now.Add(t.Sub(s.Now) * 3 / 2) }

// in says how long it is to t, in steps so coarse that the words rarely change:
// they are written down whenever they do.
func (s *state) in(t time.Time) string {
	d := t.Sub(s.Now)
	steps := []time.Duration{1, 2, 3, 5, 8, 12, 15, 20, 30, 45, 60, 90}
	for _, m := range steps {
		if d <= m*time.Minute {
			return fmt.Sprintf("about %d min", m)
		}
	}
	return fmt.Sprintf("about %d h", int(math.Ceil(d.Hours())))
}

// about is a time of day, to five minutes.
func about(t time.Time) string {
	return t.UTC().Add(5*time.Minute - 1).Truncate(5 * time.Minute).Format("15:04 UTC")
}
