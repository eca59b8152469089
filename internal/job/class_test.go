package job_test

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"

	"lorayard/internal/job"
)

func TestAWishIsReadInTheUsualSpellings(t *testing.T) {
	for text, want := range map[string]string{
		"A100-80GB": "A100-80GB", "a100-80gb": "A100-80GB", "A100_80GB": "A100-80GB", "A100 80 GB": "A100-80GB",
		"nvidia:H100": "H100", "NVIDIA H100": "H100", "h100-80GB": "H100", "RTX4090": "RTX-4090", "4090": "RTX-4090", "rtx a6000": "RTX-A6000",
		"A100": "A100-80GB|A100-40GB", "v100": "V100-32GB|V100-16GB", "a10": "A10", "L4-24GB": "L4",
		"any": "any", "ANY": "any", "H100|any": "any", "..": "any",
		"H100|A100-80GB": "A100-80GB|H100", "A100-80GB, H100": "A100-80GB|H100", "H100,H100": "H100",
		"24GB..": "24GB..", "24gb..48": "24GB..48GB", "..48GB": "..48GB", "40 GB": "40GB", "40GB..40GB": "40GB", "80GB+": "80GB..",
		"48GB..|H100": "H100|48GB..", "mig-9gb|l4": "L4|MIG-9GB",
	} {
		w, err := job.ParseWish(text)
		if err != nil || w.String() != want {
			t.Errorf("ParseWish(%q) = %s, %v; want %s", text, w, err, want)
		}
		if again, err := job.ParseWish(w.String()); err != nil || !reflect.DeepEqual(w, again) {
			t.Errorf("%s is read back as %s, %v", w, again, err)
		}
	}
	for text, want := range map[string]string{
		"H10O": `"H10O" is not known`, "": "names no GPU", " | ,": "names no GPU", "48GB..24GB": "smaller one first",
		"24GB..|80GB": "one range", "24": "not known", "0GB..": "not known", "-1GB": "not known", "99999GB": "not known",
		strings.Repeat("H100|", 200): "too long",
	} {
		if w, err := job.ParseWish(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ParseWish(%q) = %s, %v; want %q", text, w, err, want)
		}
	}
}

func TestAWishTakesWhatItNames(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		wish, class string
		gib         int64
		want        bool
	}{
		{"H100", "H100", 80, true},
		{"H100", "A100-80GB", 80, false},
		{"any", "T4", 15, true},
		{"any", "MIG-9GB", 9, false}, // a slice is no GPU
		{"1GB..", "MIG-9GB", 9, false},
		{"MIG-9GB", "MIG-9GB", 9, true},
		{"any", "imagined-9-8GB", 8, false}, // nobody knows its price
		{"24GB..", "L4", 22, true},          // by the label, not by what the driver leaves
		{"24GB..48GB", "L40S", 45, true},
		{"24GB..48GB", "A100-80GB", 80, false},
		{"40GB", "A100-40GB", 40, true},
		{"40GB", "A100-80GB", 80, false}, // a bare size is exact
		{"90GB..", "H100", 94, true},     // an H100 NVL
		{"90GB..", "H100", 80, false},
		{"90GB..", "H200", 0, true}, // memory not reported
		{"T4|80GB..", "T4", 15, true},
		{"T4|80GB..", "L4", 22, false},
		{"T4|80GB..", "H100", 80, true},
	} {
		w, err := job.ParseWish(c.wish)
		if err != nil {
			t.Fatal(err)
		}
		if got := w.Matches(c.class, c.gib*gib); got != c.want {
			t.Errorf("%s takes %s of %d GiB: %v, want %v", c.wish, c.class, c.gib, got, c.want)
		}
	}
}

func TestGPUConfigMayBeAWish(t *testing.T) {
	s, err := job.ParseSpec("fast", []byte(`{}`), []byte(`{"type":["H100","A100"],"num_gpus":2,"min_vram_gb":60,"preemptible":false,`+
		`"deadline":"2026-03-31T20:00:00+02:00","labels":{"zone":"eu"}}`), policy)
	if err != nil {
		t.Fatal(err)
	}
	if s.GPUs.String() != "A100-80GB|A100-40GB|H100" || s.MinMemoryGB != 60 || s.Preemptible || s.Labels["zone"] != "eu" || s.Deadline.Hour() != 18 {
		t.Errorf("%+v", s)
	}
	raw, err := s.GPUConfig([]byte(`{}`), "1")
	if err != nil || !strings.Contains(string(raw), `"gpu_memory_gb":80`) || !strings.Contains(string(raw), `"gpu_type":"A100-80GB|A100-40GB|H100"`) {
		t.Errorf("%s, %v", raw, err) // 80: the 40 GB ones are out
	}

	s, err = job.ParseSpec("fast", []byte(`{}`), []byte(`{"min_memory_gb":20}`), policy)
	if err != nil || !s.GPUs.Any() {
		t.Errorf("memory alone means any class: %+v, %v", s, err)
	}

	_, err = job.ParseSpec("fast", []byte(`{}`), []byte(`{"type":["H100",3],"preemptible":"no","deadline":"tomorrow","labels":{"a":1}}`), policy)
	for _, want := range []string{"type is 3: send", "preemptible is", "deadline is", "labels has 1"} {
		if words := job.ForUser(err); !strings.Contains(words, want) {
			t.Errorf("%q is not named in: %s", want, words)
		}
	}
	if _, err = job.ParseSpec("fast", []byte(`{}`), []byte(`{"type":"L4","min_memory_gb":80}`), policy); !strings.Contains(job.ForUser(err), "exclude each other") {
		t.Error(err)
	}
}

func TestAnOlderSpecIsStillRead(t *testing.T) {
	var s job.Spec
	if err := json.Unmarshal([]byte(`{"preset":"fast","gpu_class":"H100","gpu_count":2}`), &s); err != nil {
		t.Fatal(err)
	}
	if s.GPUClass() != "H100" || s.GPUCount != 2 || !s.Preemptible {
		t.Errorf("%+v", s)
	}
	if err := json.Unmarshal([]byte(`{"gpu_class":"K80|H100"}`), &s); err != nil || !slices.Equal(s.GPUs.Classes, []string{"H100", "K80"}) {
		t.Errorf("a class that left the table: %+v, %v", s.GPUs, err)
	}
}
