package job_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"

	"lorayard/internal/job"
)

var policy = job.Policy{BaseModels: []string{"lorayard/demo-llama", "acme/llama-8b"}}

func TestFinalStatusesLeadNowhere(t *testing.T) {
	all := []job.Status{job.Queued, job.Initializing, job.Running, job.Completed, job.Failed, job.Cancelled}
	for _, from := range all {
		for _, to := range all {
			if from.Final() && from.CanBecome(to) {
				t.Errorf("%s may become %s, but it is final", from, to)
			}
		}
		if !from.Final() && !from.CanBecome(job.Cancelled) {
			t.Errorf("a %s job cannot be cancelled", from)
		}
	}
}

func TestPresetFillsWhatTheAppLeavesOut(t *testing.T) {
	s, err := job.ParseSpec("quality", []byte(`{"learning_rate":0.0002}`), []byte(`{"type":"H100","count":2}`), policy)
	if err != nil {
		t.Fatal(err)
	}
	want := job.Spec{
		Preset: "quality", BaseModel: "lorayard/demo-llama", LearningRate: 2e-4, BatchSize: 2, Epochs: 5,
		Rank: 32, Alpha: 64, Dropout: 0.1, MaxSeqLength: 2048, Seed: 42, GPUs: job.Wish{Classes: []string{"H100"}}, GPUCount: 2, Preemptible: true,
	}
	if !reflect.DeepEqual(s, want) {
		t.Errorf("spec = %+v\nwant   %+v", s, want)
	}
}

func TestBothSpellingsMeanTheSame(t *testing.T) {
	a, err := job.ParseSpec("custom", []byte(`{"learning_rate":1e-4,"batch_size":4,"epochs":2,"rank":8,"alpha":16,"dropout":0.1}`), []byte(`{"type":"A100-40GB","count":1}`), policy)
	if err != nil {
		t.Fatal(err)
	}
	b, err := job.ParseSpec("custom", []byte(`{"learning_rate":1e-4,"batch_size":4,"num_epochs":2,"lora_rank":8,"lora_alpha":16,"lora_dropout":0.1}`), []byte(`{"gpu_type":"A100-40GB","num_gpus":1,"cost_per_gpu_hour":0.01}`), policy)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(a, b) {
		t.Errorf("%+v\n%+v", a, b)
	}
}

func TestEveryFaultIsNamedAtOnce(t *testing.T) {
	_, err := job.ParseSpec("turbo", []byte(`{"rank":0,"epochs":2.5,"learning_rate":"fast","num_epochs":3,"base_model":"../../etc/passwd"}`), []byte(`{"type":"H100","count":9}`), policy)
	if job.KindOf(err) != job.SpecInvalid {
		t.Fatalf("kind = %s", job.KindOf(err))
	}
	words := job.ForUser(err)
	for _, want := range []string{`preset_id "turbo"`, "rank is 0", "epochs is 2.5", "learning_rate", "num_epochs", "base_model", "count is 9", "from 1 to 8"} {
		if !strings.Contains(words, want) {
			t.Errorf("%q is not named in: %s", want, words)
		}
	}
}

func TestWhatTheTrainerDecidesMayBeSaid(t *testing.T) {
	s, err := job.ParseSpec("fast", []byte(`{}`), []byte(`{}`), policy)
	if err != nil || s.TooLong != "" || s.EarlyStoppingPatience != nil || s.Merged {
		t.Errorf("nothing said: %+v, %v", s, err)
	}
	s, err = job.ParseSpec("fast", []byte(`{"too_long":"drop","early_stopping_patience":0,"merged":true}`), []byte(`{}`), policy)
	if err != nil || s.TooLong != "drop" || s.EarlyStoppingPatience == nil || *s.EarlyStoppingPatience != 0 || !s.Merged {
		t.Errorf("all said: %+v, %v", s, err)
	}
	_, err = job.ParseSpec("fast", []byte(`{"too_long":"cut","early_stopping_patience":-2,"merged":"yes"}`), []byte(`{}`), policy)
	words := job.ForUser(err)
	for _, want := range []string{"send one of truncate_history, drop, error", "early_stopping_patience is -2", "merged is"} {
		if !strings.Contains(words, want) {
			t.Errorf("%q is not named in: %s", want, words)
		}
	}
}

func TestFourBitsAreAskedForInEitherSpelling(t *testing.T) {
	p := job.Policy{BaseModels: []string{"m"}}
	for sent, want := range map[string]string{
		`{}`: "", `{"quantization":"none"}`: "", `{"quantization":"nf4"}`: "nf4", `{"quantisation":"nf4"}`: "nf4",
	} {
		s, err := job.ParseSpec("fast", []byte(sent), []byte(`{}`), p)
		if err != nil || s.Quantisation != want {
			t.Errorf("%s: quantisation %q, %v, want %q", sent, s.Quantisation, err, want)
		}
	}
	for _, sent := range []string{`{"quantization":"int8"}`, `{"quantization":"nf4","merged":true}`} {
		if _, err := job.ParseSpec("fast", []byte(sent), []byte(`{}`), p); err == nil {
			t.Errorf("%s is admitted", sent)
		}
	}
}

func TestHyperparametersMustBeAnObject(t *testing.T) {
	for _, raw := range []string{`[]`, `"x"`, `3`, `null`, `{`, ``} {
		_, err := job.ParseSpec("fast", []byte(raw), []byte(`{}`), policy)
		if err == nil || !strings.Contains(job.ForUser(err), "hyperparameters") {
			t.Errorf("%q: %v", raw, err)
		}
	}
}

func TestFilledValuesLieBesideWhatWasSent(t *testing.T) {
	sent := []byte(`{"rank":8,"note":"mine","big":12345678901234567890}`)
	s, err := job.ParseSpec("fast", sent, []byte(`{"cost_per_gpu_hour":0.001}`), policy)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := s.Hyperparameters(sent)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]json.RawMessage
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	for k, want := range map[string]string{"note": `"mine"`, "big": "12345678901234567890", "lora_rank": "8", "num_epochs": "1", "lora_alpha": "16"} {
		if string(m[k]) != want {
			t.Errorf("%s = %s, want %s", k, m[k], want)
		}
	}
	raw, err = s.GPUConfig([]byte(`{"cost_per_gpu_hour":0.001}`), "3.5")
	if err != nil || !strings.Contains(string(raw), `"cost_per_gpu_hour":3.5`) {
		t.Errorf("a client's rate survived: %s, %v", raw, err)
	}
}

func TestKindIsFoundThroughWrapping(t *testing.T) {
	err := fmt.Errorf("prepare: %w", &job.Failure{Kind: job.DiskFull, Err: errors.New("no space left")})
	if k := job.KindOf(err); k != job.DiskFull || !k.Retryable() || k.Billable() {
		t.Errorf("kind = %s", k)
	}
	if job.KindOf(errors.New("x")) != job.Internal {
		t.Error("an error without a kind is internal")
	}
	if strings.Contains(job.ForUser(err), "no space") {
		t.Error("an operator's words reached the user")
	}
}

func FuzzParseSpec(f *testing.F) {
	f.Add("fast", []byte(`{"rank":8}`), []byte(`{"type":"H100"}`))
	f.Add("", []byte(`null`), []byte(`[]`))
	f.Add("fast", []byte(`{}`), []byte(`{"type":["a100","24GB..48GB"],"min_vram_gb":30,"labels":{"a":"b"},"deadline":"2026-03-31T18:00:00Z"}`))
	f.Fuzz(func(t *testing.T, preset string, h, g []byte) {
		s, err := job.ParseSpec(preset, h, g, policy)
		if err != nil {
			if job.ForUser(err) == "" {
				t.Fatal("an error without words")
			}
			return
		}
		if s.Rank < 1 || s.Epochs < 1 || s.BatchSize < 1 || s.GPUCount < 1 || s.GPUCount > 8 || !(s.LearningRate > 0) {
			t.Fatalf("out of range: %+v", s)
		}
		raw, err := json.Marshal(s)
		if err != nil {
			t.Fatal(err)
		}
		var back job.Spec
		if err := json.Unmarshal(raw, &back); err != nil || !reflect.DeepEqual(s, back) {
			t.Fatalf("stored %+v, read %+v, %v", s, back, err)
		}
	})
}
