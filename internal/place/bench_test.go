package place_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"lorayard/internal/place"
)

// fleet makes hosts of 8 GPUs of three classes, full or empty, and jobs of 50
// users with a few hundred different demands.
func fleet(hosts, jobs int, full bool) place.Input {
	rnd := rand.New(rand.NewPCG(1, 2))
	classes := []string{"H100", "A100-80GB", "L4"}
	in := place.Input{Now: now, Users: map[string]place.User{}, Policy: place.Usual()}
	for i := range hosts {
		class := classes[i%3]
		h := gpus(fmt.Sprintf("host-%04d", i), class, 8)
		h.BaseModels = []string{"m", fmt.Sprint("m", i%7)}
		h.PricePerHour = map[string]int64{class: int64(1e6 * (3 - i%3))}
		h.Labels = map[string]string{"zone": fmt.Sprint(i % 4)}
		for d := 0; full && d < 8; {
			n := []int{1, 1, 2, 4}[rnd.IntN(4)]
			r := runs(fmt.Sprintf("r-%d-%d", i, d), h, d, min(n, 8-d))
			r.User, r.Priority = fmt.Sprint("user", rnd.IntN(50)), rnd.IntN(3)
			r.Ends = now.Add(time.Duration(rnd.IntN(7200)) * time.Second)
			in.Running = append(in.Running, r)
			d += n
		}
		in.Hosts = append(in.Hosts, h)
	}
	for i := range jobs {
		j := want(fmt.Sprintf("job-%06d", i), classes[rnd.IntN(3)], []int{1, 1, 1, 2, 4, 8}[rnd.IntN(6)])
		j.User = fmt.Sprint("user", rnd.IntN(50))
		j.Submitted = now.Add(-time.Duration(rnd.IntN(7200)) * time.Second)
		j.BaseModel = []string{"m", "m1", "m2", "m3"}[rnd.IntN(4)]
		j.Estimate = time.Duration(rnd.IntN(7200)) * time.Second
		j.MinBytes = int64(rnd.IntN(20)) * 1e9 // as a planner would say
		if rnd.IntN(4) == 0 {
			j.Labels = map[string]string{"zone": fmt.Sprint(rnd.IntN(4))}
		}
		in.Jobs = append(in.Jobs, j)
	}
	return in
}

// BenchmarkPlace is one call for 10,000 waiting jobs and 1,000 hosts of 8 GPUs.
func BenchmarkPlace(b *testing.B) {
	full := fleet(1000, 10_000, true)
	single := fleet(1000, 10_000, false)
	for i := range single.Jobs {
		single.Jobs[i].Count = 1
	}
	urgent := fleet(1000, 10_000, true)
	for i := range urgent.Jobs {
		urgent.Jobs[i].Priority = 5
	}
	for _, c := range []struct {
		name string
		in   place.Input
	}{
		{"full", full}, {"empty", fleet(1000, 10_000, false)}, {"empty-single", single}, {"preempting", urgent}, {"small", fleet(20, 1000, true)},
	} {
		b.Run(c.name, func(b *testing.B) {
			var r place.Result
			for b.Loop() {
				r = place.Place(c.in)
			}
			b.ReportMetric(float64(len(r.Assignments)), "assigned")
			b.ReportMetric(float64(len(r.Preemptions)), "preempted")
			b.ReportMetric(float64(len(r.Waiting)), "waiting")
		})
	}
}

// BenchmarkLinks picks the best linked devices of one host.
func BenchmarkLinks(b *testing.B) {
	for _, c := range [][2]int{{4, 8}, {4, 16}, {8, 16}} {
		b.Run(fmt.Sprintf("%d-of-%d", c[0], c[1]), func(b *testing.B) {
			h := gpus("a", "H100", c[1])
			rnd := rand.New(rand.NewPCG(1, 2))
			h.Links = make([][]int, c[1])
			for i := range h.Links {
				h.Links[i] = make([]int, c[1])
				for j := range i {
					h.Links[i][j] = 10 * rnd.IntN(7)
					h.Links[j][i] = h.Links[i][j]
				}
			}
			in := place.Input{Now: now, Jobs: []place.Job{want("j", "H100", c[0])}, Hosts: []place.Host{h}}
			for b.Loop() {
				place.Place(in)
			}
		})
	}
}
