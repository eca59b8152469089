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

	GPUClass string `json:"gpu_class"`
	GPUCount int    `json:"gpu_count"`
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

// gpuMemoryGB is the memory that the app's class names promise, in GB.
var gpuMemoryGB = map[string]int{"A100-80GB": 80, "A100-40GB": 40, "H100": 80, "V100-32GB": 32}

// GPUClasses are the class names that the app sends, in the order in which a
// message names them.
func GPUClasses() []string { return []string{"A100-80GB", "A100-40GB", "H100", "V100-32GB"} }

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
	s.BaseModel = r.text(h, "", "base_model", "model")

	if len(p.BaseModels) == 0 {
		r.fault("this server has no base model to offer: tell its operator to set BASE_MODELS")
	} else if s.BaseModel == "" {
		s.BaseModel = p.BaseModels[0]
	} else if !slices.Contains(p.BaseModels, s.BaseModel) {
		r.fault("base_model %q is not offered here: choose one of %s", s.BaseModel, strings.Join(p.BaseModels, ", "))
	}

	g := r.object("gpu_config", gpuConfig)
	s.GPUClass = r.text(g, "A100-80GB", "type", "gpu_type")
	if _, ok := gpuMemoryGB[s.GPUClass]; !ok {
		r.fault("gpu_config.type %q is not known: choose one of %s", s.GPUClass, strings.Join(GPUClasses(), ", "))
	}
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
// usdPerHour is the server's rate: what a client claimed is replaced.
func (s Spec) GPUConfig(sent []byte, usdPerHour string) ([]byte, error) {
	return lay(sent, map[string]any{
		"type": s.GPUClass, "gpu_type": s.GPUClass,
		"count": s.GPUCount, "num_gpus": s.GPUCount,
		"gpu_memory_gb": gpuMemoryGB[s.GPUClass], "cost_per_gpu_hour": json.Number(usdPerHour),
	})
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
