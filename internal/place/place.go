// Package place decides which job runs where. It is one pure function of jobs
// and hosts: equal inputs give equal outputs, nothing is read, nothing is
// remembered. The dispatcher's leader calls it and carries out the answer.
package place

import (
	"fmt"
	"slices"
	"strings"
)

// Job is a job that waits. Jobs are placed in the order given.
type Job struct {
	ID        string
	Class     string // GPU class
	Count     int    // devices, all on one host
	BaseModel string
	Avoid     string // agent of a failed attempt: taken only when no other fits
}

// Device is one device of a host.
type Device struct {
	UUID  string
	Class string
	Fit   bool // healthy
	Free  bool // in no reservation
}

// Host is an agent that takes work.
type Host struct {
	Agent      string
	BaseModels []string
	Devices    []Device
}

// Assignment gives devices of one host to a job.
type Assignment struct {
	Job     string
	Agent   string
	Devices []string // UUIDs
}

// Result is the answer: what to assign, and for every other job why it waits,
// in words.
type Result struct {
	Assignments []Assignment
	Waiting     map[string]string
}

// Place gives each job, in order, the fitting host that is left with the
// fewest free devices of the class (best fit keeps large sets whole), and
// among those the first by name. A job that does not fit blocks nobody.
func Place(jobs []Job, hosts []Host) Result {
	taken := map[string]bool{}
	res := Result{Waiting: map[string]string{}}
	for _, j := range jobs {
		best, free := -1, []string(nil)
		for i, h := range hosts {
			f := freeOf(h, j, taken)
			if len(f) < j.Count || !slices.Contains(h.BaseModels, j.BaseModel) {
				continue
			}
			if best < 0 || better(j, h, f, hosts[best], free) {
				best, free = i, f
			}
		}
		if best < 0 {
			res.Waiting[j.ID] = why(j, hosts, taken)
			continue
		}
		devices := free[:j.Count]
		for _, d := range devices {
			taken[d] = true
		}
		res.Assignments = append(res.Assignments, Assignment{Job: j.ID, Agent: hosts[best].Agent, Devices: slices.Clone(devices)})
	}
	return res
}

func freeOf(h Host, j Job, taken map[string]bool) []string {
	var free []string
	for _, d := range h.Devices {
		if d.Class == j.Class && d.Fit && d.Free && !taken[d.UUID] {
			free = append(free, d.UUID)
		}
	}
	return free
}

func better(j Job, a Host, freeA []string, b Host, freeB []string) bool {
	if avoidA, avoidB := a.Agent == j.Avoid, b.Agent == j.Avoid; avoidA != avoidB {
		return avoidB
	}
	if len(freeA) != len(freeB) {
		return len(freeA) < len(freeB)
	}
	return a.Agent < b.Agent
}

// why names the first thing that a person could change.
func why(j Job, hosts []Host, taken map[string]bool) string {
	wish := fmt.Sprintf("%d × %s", j.Count, j.Class)
	if len(hosts) == 0 {
		return "no GPU host takes work at the moment"
	}
	have, fit, holds, mostFree, quarantined := 0, 0, 0, 0, 0
	for _, h := range hosts {
		class, healthy := 0, 0
		for _, d := range h.Devices {
			if d.Class == j.Class {
				class++
				if d.Fit {
					healthy++
				}
			}
		}
		if class < j.Count {
			continue
		}
		have++
		quarantined += class - healthy
		if healthy < j.Count {
			continue
		}
		fit++
		if slices.Contains(h.BaseModels, j.BaseModel) {
			holds++
			mostFree = max(mostFree, len(freeOf(h, j, taken)))
		}
	}
	switch {
	case have == 0:
		return fmt.Sprintf("no single host has %s; hosts have %s", wish, strings.Join(classes(hosts), ", "))
	case fit == 0:
		return fmt.Sprintf("%s are on a host, but %d of them are not fit for work", wish, quarantined)
	case holds == 0:
		return fmt.Sprintf("no host with %s holds base model %s", wish, j.BaseModel)
	default:
		return fmt.Sprintf("%s are not free on one host: at most %d are", wish, mostFree)
	}
}

func classes(hosts []Host) []string {
	most := map[string]int{}
	for _, h := range hosts {
		n := map[string]int{}
		for _, d := range h.Devices {
			n[d.Class]++
		}
		for c, k := range n {
			most[c] = max(most[c], k)
		}
	}
	var out []string
	for c, n := range most {
		out = append(out, fmt.Sprintf("up to %d × %s", n, c))
	}
	slices.Sort(out)
	return out
}
