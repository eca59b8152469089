package place_test

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"lorayard/internal/place"
)

func host(agent, class string, free, busy int) place.Host {
	h := place.Host{Agent: agent, BaseModels: []string{"m"}}
	for i := range free + busy {
		h.Devices = append(h.Devices, place.Device{UUID: fmt.Sprintf("%s-%s-%d", agent, class, i), Class: class, Fit: true, Free: i < free})
	}
	return h
}

func TestBestFitKeepsLargeSetsWhole(t *testing.T) {
	hosts := []place.Host{host("a", "H100", 8, 0), host("b", "H100", 2, 6)}
	r := place.Place([]place.Job{{ID: "small", Class: "H100", Count: 1, BaseModel: "m"}, {ID: "big", Class: "H100", Count: 8, BaseModel: "m"}}, hosts)
	if len(r.Assignments) != 2 || r.Assignments[0].Agent != "b" || r.Assignments[1].Agent != "a" {
		t.Errorf("%+v", r)
	}
}

func TestAvoidedHostIsTakenOnlyWhenNoOtherFits(t *testing.T) {
	j := []place.Job{{ID: "j", Class: "H100", Count: 1, BaseModel: "m", Avoid: "a"}}
	if r := place.Place(j, []place.Host{host("a", "H100", 1, 0), host("b", "H100", 4, 0)}); r.Assignments[0].Agent != "b" {
		t.Errorf("%+v", r)
	}
	if r := place.Place(j, []place.Host{host("a", "H100", 1, 0)}); len(r.Assignments) != 1 {
		t.Errorf("%+v", r)
	}
}

func TestWaitingSaysWhy(t *testing.T) {
	j := place.Job{ID: "j", Class: "H100", Count: 2, BaseModel: "m"}
	other := j
	other.BaseModel = "x"
	sick := host("a", "H100", 2, 0)
	sick.Devices[0].Fit = false
	for _, c := range []struct {
		job   place.Job
		hosts []place.Host
		want  string
	}{
		{j, nil, "no GPU host takes work"},
		{j, []place.Host{host("a", "A100-80GB", 8, 0)}, "no single host has 2 × H100; hosts have up to 8 × A100-80GB"},
		{j, []place.Host{host("a", "H100", 1, 3)}, "at most 1 are"},
		{other, []place.Host{host("a", "H100", 8, 0)}, "holds base model x"},
		{j, []place.Host{sick}, "not fit for work"},
	} {
		r := place.Place([]place.Job{c.job}, c.hosts)
		if !strings.Contains(r.Waiting["j"], c.want) {
			t.Errorf("%q does not say %q", r.Waiting["j"], c.want)
		}
	}
}

func TestProperties(t *testing.T) {
	classes := []string{"H100", "A100-80GB"}
	rapid.Check(t, func(t *rapid.T) {
		var hosts []place.Host
		for i := range rapid.IntRange(0, 5).Draw(t, "hosts") {
			h := place.Host{Agent: fmt.Sprintf("h%d", i), BaseModels: rapid.SliceOfDistinct(rapid.SampledFrom([]string{"m", "n"}), rapid.ID).Draw(t, "models")}
			for d := range rapid.IntRange(0, 8).Draw(t, "devices") {
				h.Devices = append(h.Devices, place.Device{
					UUID: fmt.Sprintf("h%d-%d", i, d), Class: rapid.SampledFrom(classes).Draw(t, "class"),
					Fit: rapid.Bool().Draw(t, "fit"), Free: rapid.Bool().Draw(t, "free"),
				})
			}
			hosts = append(hosts, h)
		}
		var jobs []place.Job
		for i := range rapid.IntRange(0, 20).Draw(t, "jobs") {
			jobs = append(jobs, place.Job{
				ID: fmt.Sprintf("j%d", i), Class: rapid.SampledFrom(classes).Draw(t, "want"),
				Count: rapid.IntRange(1, 8).Draw(t, "count"), BaseModel: rapid.SampledFrom([]string{"m", "n"}).Draw(t, "model"),
			})
		}
		r := place.Place(jobs, hosts)
		if again := place.Place(jobs, hosts); !reflect.DeepEqual(r, again) {
			t.Fatal("equal inputs gave unequal outputs")
		}
		used := map[string]bool{}
		for _, a := range r.Assignments {
			i := slices.IndexFunc(jobs, func(j place.Job) bool { return j.ID == a.Job })
			h := hosts[slices.IndexFunc(hosts, func(h place.Host) bool { return h.Agent == a.Agent })]
			if len(a.Devices) != jobs[i].Count || !slices.Contains(h.BaseModels, jobs[i].BaseModel) {
				t.Fatalf("unfit: %+v", a)
			}
			for _, u := range a.Devices {
				k := slices.IndexFunc(h.Devices, func(d place.Device) bool { return d.UUID == u })
				if used[u] || k < 0 || !h.Devices[k].Fit || !h.Devices[k].Free || h.Devices[k].Class != jobs[i].Class {
					t.Fatalf("device %s does not fit %+v", u, a)
				}
				used[u] = true
			}
		}
		if len(r.Assignments)+len(r.Waiting) != len(jobs) {
			t.Fatal("a job is neither placed nor told why it waits")
		}
		for id, reason := range r.Waiting { // work-conserving: nothing that waits fits what is left
			j := jobs[slices.IndexFunc(jobs, func(j place.Job) bool { return j.ID == id })]
			for _, h := range hosts {
				n := 0
				for _, d := range h.Devices {
					if d.Class == j.Class && d.Fit && d.Free && !used[d.UUID] {
						n++
					}
				}
				if n >= j.Count && slices.Contains(h.BaseModels, j.BaseModel) {
					t.Fatalf("%s waits (%s) though %s has room", id, reason, h.Agent)
				}
			}
		}
	})
}
