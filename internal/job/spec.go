package job

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Spec is what a job asks for, with every spelling and preset resolved.
type Spec struct {
	Preset    string `json:"preset"`
	BaseModel string `json:"base_model"`

	LearningRate float64 `json:"learning_rate"`
	BatchSize    int     `json:"batch_size"` // examples per optimizer step
	Epochs       int     `json:"epochs"`
	Rank         int     `json:"rank"`
	Alpha        float64 `json:"alpha"`
	Dropout      float64 `json:"dropout"`
	WarmupSteps  int     `json:"warmup_steps"`
	WeightDecay  float64 `json:"weight_decay"`
	MaxSeqLength int     `json:"max_seq_length"` // tokens
	Seed         int64   `json:"seed"`
	Quantisation string  `json:"quantisation,omitempty"` // of the base model: empty or nf4

	TooLong               string `json:"too_long,omitempty"`                // what becomes of examples above MaxSeqLength; empty: the trainer's choice
	EarlyStoppingPatience *int   `json:"early_stopping_patience,omitempty"` // evaluations without a gain, 0 for never; nil: the trainer's choice
	Merged                bool   `json:"merged,omitempty"`                  // the base model with the adapter added is wanted as well

	GPUs        Wish              `json:"gpu_class"` // a text, as older rows have it
	GPUCount    int               `json:"gpu_count"`
	MinMemoryGB int               `json:"min_memory_gb,omitempty"` // of each device; 1 GB is 10⁹ bytes
	Preemptible bool              `json:"preemptible"`
	Deadline    time.Time         `json:"deadline,omitzero"` // zero: none
	Labels      map[string]string `json:"labels,omitempty"`  // that the host must carry
}

// UnmarshalJSON reads a stored spec. One from before jobs could refuse to be
// preempted is preemptible, as it was then.
func (s *Spec) UnmarshalJSON(raw []byte) error {
	type plain Spec
	read := plain{Preemptible: true}
	if err := json.Unmarshal(raw, &read); err != nil {
		return err
	}
	*s = Spec(read)
	return nil
}

// GPUClass is the first class that the job may land on, in the table's order.
func (s Spec) GPUClass() string {
	if admits := s.GPUs.Admits(); len(admits) > 0 {
		return admits[0]
	}
	return s.GPUs.String()
}

// preset is one row of the app's table of presets.
type preset struct {
	learningRate float64
	batchSize    int
	epochs       int
	rank         int
	alpha        float64
	dropout      float64
}

// presets are the figures that the app shows today (fast, balanced, quality)
// and those of its older pages (conservative, aggressive). The two disagree
// about "balanced"; today's pages win. "custom" sends its own figures and
// takes what it leaves out from balanced.
var presets = map[string]preset{
	"fast":         {1e-4, 8, 1, 8, 16, 0.05},
	"balanced":     {5e-5, 4, 3, 16, 32, 0.1},
	"quality":      {3e-5, 2, 5, 32, 64, 0.1},
	"custom":       {5e-5, 4, 3, 16, 32, 0.1},
	"conservative": {1e-4, 4, 3, 8, 16, 0.05},
	"aggressive":   {3e-4, 16, 10, 32, 64, 0.1},
}

// Policy is what the server allows. The first base model is the default.
type Policy struct {
	BaseModels []string
	MaxGPUs    int // 0 means 8
}

// ParseSpec resolves what the app wrote into a Spec: every spelling, presets,
// the server's default base model. It names everything that is wrong at once,
// in words for the user; the error is a *Failure of kind SpecInvalid.
func ParseSpec(presetID string, hyperparameters, gpuConfig []byte, p Policy) (Spec, error) {
	r := reader{}
	s := Spec{Preset: presetID, MaxSeqLength: 2048, Seed: 42}

	pre, known := presets[presetID]
	if !known {
		r.fault("preset_id %q is not known: use fast, balanced, quality or custom", presetID)
		pre = presets["balanced"]
	}

	h := r.object("hyperparameters", hyperparameters)
	s.LearningRate = r.number(h, pre.learningRate, 1e-8, 0.1, "learning_rate")
	s.BatchSize = r.integer(h, pre.batchSize, 1, 512, "batch_size")
	s.Epochs = r.integer(h, pre.epochs, 1, 100, "epochs", "num_epochs")
	s.Rank = r.integer(h, pre.rank, 1, 512, "rank", "lora_rank")
	alpha := pre.alpha
	if presetID == "custom" && s.Rank > 0 {
		alpha = float64(2 * s.Rank) // the ratio of every preset
	}
	s.Alpha = r.number(h, alpha, 1e-3, 4096, "alpha", "lora_alpha")
	s.Dropout = r.number(h, pre.dropout, 0, 0.9, "dropout", "lora_dropout")
	s.WarmupSteps = r.integer(h, 0, 0, 100_000, "warmup_steps")
	s.WeightDecay = r.number(h, 0, 0, 1, "weight_decay")
	s.MaxSeqLength = r.integer(h, s.MaxSeqLength, 16, 131_072, "max_seq_length")
	s.Seed = int64(r.integer(h, int(s.Seed), 0, math.MaxInt32, "seed"))
	s.TooLong = r.word(h, "too_long", "truncate_history", "drop", "error")
	if patience := r.integer(h, -1, 0, 1000, "early_stopping_patience"); patience >= 0 {
		s.EarlyStoppingPatience = &patience
	}
	s.Merged = r.yes(h, false, "merged")
	s.Quantisation = r.text(h, "", "quantisation", "quantization")
	if s.Quantisation == "none" {
		s.Quantisation = ""
	}
	if s.Quantisation != "" && s.Quantisation != "nf4" {
		r.fault("hyperparameters.quantization %q is not known: use none or nf4", s.Quantisation)
	}
	if s.Quantisation != "" && s.Merged {
		r.fault("hyperparameters.merged is not possible with quantization %s: leave one of them out", s.Quantisation)
	}
	s.BaseModel = r.text(h, "", "base_model", "model")

	if len(p.BaseModels) == 0 {
		r.fault("this server has no base model to offer: tell its operator to set BASE_MODELS")
	} else if s.BaseModel == "" {
		s.BaseModel = p.BaseModels[0]
	} else if !slices.Contains(p.BaseModels, s.BaseModel) {
		r.fault("base_model %q is not offered here: choose one of %s", s.BaseModel, strings.Join(p.BaseModels, ", "))
	}

	g := r.object("gpu_config", gpuConfig)
	s.MinMemoryGB = r.integer(g, 0, 1, 9999, "min_memory_gb", "min_vram_gb")
	otherwise := "A100-80GB" // what the app's page preselects
	if s.MinMemoryGB > 0 {
		otherwise = "any" // the cheapest that is large enough
	}
	s.GPUs = r.wish(g, otherwise, "type", "gpu_type")
	if s.MinMemoryGB > 0 && s.memoryGB() == 0 {
		r.fault("gpu_config.type %s and at least %d GB of memory exclude each other: change one of them", s.GPUs, s.MinMemoryGB)
	}
	s.Preemptible = r.yes(g, true, "preemptible")
	s.Deadline = r.time(g, "deadline")
	s.Labels = r.texts(g, "labels")
	most := p.MaxGPUs
	if most == 0 {
		most = 8
	}
	s.GPUCount = r.integer(g, 1, 1, most, "count", "num_gpus")

	if len(r.faults) > 0 {
		return Spec{}, &Failure{Kind: SpecInvalid, Message: strings.Join(r.faults, "; ") + ".", Err: errors.New("admission refused")}
	}
	return s, nil
}

// Hyperparameters gives s in every spelling that the app's readers know, laid
// over what was sent.
func (s Spec) Hyperparameters(sent []byte) ([]byte, error) {
	return lay(sent, map[string]any{
		"learning_rate": s.LearningRate, "batch_size": s.BatchSize,
		"epochs": s.Epochs, "num_epochs": s.Epochs,
		"rank": s.Rank, "lora_rank": s.Rank,
		"alpha": s.Alpha, "lora_alpha": s.Alpha,
		"dropout": s.Dropout, "lora_dropout": s.Dropout,
		"base_model": s.BaseModel, "warmup_steps": s.WarmupSteps, "weight_decay": s.WeightDecay,
		"max_seq_length": s.MaxSeqLength, "seed": s.Seed,
	})
}

// GPUConfig gives the GPU wish in every spelling, laid over what was sent.
// The memory is the least that the job may land on. usdPerHour is the server's
// rate: what a client claimed is replaced.
func (s Spec) GPUConfig(sent []byte, usdPerHour string) ([]byte, error) {
	return lay(sent, map[string]any{
		"type": s.GPUs.String(), "gpu_type": s.GPUs.String(),
		"count": s.GPUCount, "num_gpus": s.GPUCount,
		"gpu_memory_gb": s.memoryGB(), "cost_per_gpu_hour": json.Number(usdPerHour),
	})
}

// memoryGB is the least memory of a class that the job may land on, by the
// label; 0 if there is none.
func (s Spec) memoryGB() int {
	least := 0
	for _, name := range s.GPUs.Admits() {
		if gb := labelGB(name); gb >= s.MinMemoryGB && (least == 0 || gb < least) {
			least = gb
		}
	}
	return least
}

func lay(sent []byte, over map[string]any) ([]byte, error) {
	m := map[string]any{}
	dec := json.NewDecoder(bytes.NewReader(sent))
	dec.UseNumber() // a number that we do not understand stays as it was sent
	if err := dec.Decode(&m); err != nil {
		return nil, fmt.Errorf("decode what was sent: %w", err)
	}
	for k, v := range over {
		m[k] = v
	}
	return json.Marshal(m)
}

// reader picks values out of a JSON object and remembers every fault.
type reader struct{ faults []string }

type object struct {
	name   string
	fields map[string]any
}

func (r *reader) fault(format string, args ...any) {
	r.faults = append(r.faults, fmt.Sprintf(format, args...))
}

func (r *reader) object(name string, raw []byte) object {
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		r.fault("%s is not JSON: send an object", name)
		return object{name: name}
	}
	m, ok := v.(map[string]any)
	if !ok {
		r.fault("%s is %s: send an object with named values", name, describe(v))
	}
	return object{name: name, fields: m}
}

// pick finds the one value that the spellings give. Two spellings may both be
// there when they agree.
func (r *reader) pick(o object, spellings []string) (any, string, bool) {
	var found any
	var under string
	for _, name := range spellings {
		v, ok := o.fields[name]
		if !ok || v == nil {
			continue
		}
		if under != "" && fmt.Sprint(v) != fmt.Sprint(found) {
			r.fault("%s.%s is %v but %s.%s is %v: send one of them, or the same value", o.name, under, found, o.name, name, v)
			continue
		}
		if under == "" {
			found, under = v, name
		}
	}
	return found, under, under != ""
}

func (r *reader) number(o object, otherwise, least, most float64, spellings ...string) float64 {
	v, name, ok := r.pick(o, spellings)
	if !ok {
		return otherwise
	}
	n, isNumber := v.(json.Number)
	f, err := n.Float64()
	if !isNumber || err != nil {
		r.fault("%s.%s is %s: send a number from %s to %s", o.name, name, describe(v), short(least), short(most))
		return otherwise
	}
	if f < least || f > most {
		r.fault("%s.%s is %s: send a number from %s to %s", o.name, name, n, short(least), short(most))
		return otherwise
	}
	return f
}

func (r *reader) integer(o object, otherwise, least, most int, spellings ...string) int {
	v, name, ok := r.pick(o, spellings)
	if !ok {
		return otherwise
	}
	n, isNumber := v.(json.Number)
	f, err := n.Float64()
	if !isNumber || err != nil || f != math.Trunc(f) {
		r.fault("%s.%s is %s: send a whole number from %d to %d", o.name, name, describe(v), least, most)
		return otherwise
	}
	if f < float64(least) || f > float64(most) {
		r.fault("%s.%s is %s: send a whole number from %d to %d", o.name, name, n, least, most)
		return otherwise
	}
	return int(f)
}

func (r *reader) text(o object, otherwise string, spellings ...string) string {
	v, name, ok := r.pick(o, spellings)
	if !ok {
		return otherwise
	}
	s, isText := v.(string)
	if !isText || s == "" {
		r.fault("%s.%s is %s: send a name", o.name, name, describe(v))
		return otherwise
	}
	return s
}

// word takes one of some words, empty when there is none.
func (r *reader) word(o object, name string, words ...string) string {
	v, _, ok := r.pick(o, []string{name})
	if !ok {
		return ""
	}
	s, _ := v.(string)
	if !slices.Contains(words, s) {
		r.fault("%s.%s is %s: send one of %s", o.name, name, describe(v), strings.Join(words, ", "))
		return ""
	}
	return s
}

// wish takes one text in the grammar of ParseWish or a list of them.
func (r *reader) wish(o object, otherwise string, spellings ...string) Wish {
	v, name, ok := r.pick(o, spellings)
	if !ok {
		v = otherwise
	}
	list, isList := v.([]any)
	if !isList {
		list = []any{v}
	}
	var parts []string
	for _, e := range list {
		s, isText := e.(string)
		if !isText {
			r.fault("%s.%s is %s: send a name or a list of names", o.name, name, describe(e))
			return Wish{}
		}
		parts = append(parts, s)
	}
	w, err := ParseWish(strings.Join(parts, "|"))
	if err != nil {
		r.fault("%s.%s: %s", o.name, name, err)
	}
	return w
}

func (r *reader) yes(o object, otherwise bool, name string) bool {
	v, _, ok := r.pick(o, []string{name})
	if !ok {
		return otherwise
	}
	b, isBool := v.(bool)
	if !isBool {
		r.fault("%s.%s is %s: send true or false", o.name, name, describe(v))
		return otherwise
	}
	return b
}

func (r *reader) time(o object, name string) time.Time {
	v, _, ok := r.pick(o, []string{name})
	if !ok {
		return time.Time{}
	}
	s, _ := v.(string)
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		r.fault("%s.%s is %s: send a time such as 2026-03-31T18:00:00Z", o.name, name, describe(v))
		return time.Time{}
	}
	return t.UTC()
}

// texts reads an object of texts. 16 of them, of 63 bytes each, are as many as
// anybody needs to name a host.
func (r *reader) texts(o object, name string) map[string]string {
	v, _, ok := r.pick(o, []string{name})
	if !ok {
		return nil
	}
	m, isObject := v.(map[string]any)
	if !isObject || len(m) > 16 {
		r.fault("%s.%s is %s: send an object of at most 16 texts", o.name, name, describe(v))
		return nil
	}
	out := map[string]string{}
	for k, v := range m {
		s, isText := v.(string)
		if !isText || k == "" || len(k) > 63 || len(s) > 63 {
			r.fault("%s.%s has %s for %s: send names and texts of at most 63 bytes", o.name, name, describe(v), describe(k))
			return nil
		}
		out[k] = s
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

func short(f float64) string { return strconv.FormatFloat(f, 'g', -1, 64) }

// describe names a JSON value for a message, at a length that fits one.
func describe(v any) string {
	switch v := v.(type) {
	case nil:
		return "null"
	case []any:
		return "a list"
	case map[string]any:
		return "an object"
	case string:
		if len(v) > 40 {
			return "a long text"
		}
		return fmt.Sprintf("the text %q", v)
	default:
		return fmt.Sprint(v)
	}
}
