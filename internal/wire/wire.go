// Package wire is the protocol between agent and trainer: the plan file that
// tells the trainer what to do and the events that it sends back. PROTOCOL.md
// beside this file is the text that both sides are written against; the
// transcripts in testdata are read by both.
package wire

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"time"
)

// Version is bumped when an old agent could misread a new trainer.
const Version = 1

// MaxLine is the longest event in bytes.
const MaxLine = 256 << 10

// Plan is the file that the agent hands to the trainer.
type Plan struct {
	V                      int             `json:"v"`
	Job                    string          `json:"job"`
	Attempt                int             `json:"attempt"`
	Backend                string          `json:"backend"` // torch or dry
	RunDir                 string          `json:"run_dir"`
	Device                 string          `json:"device"`                 // cpu or cuda
	Devices                int             `json:"devices"`                // how many, each with a process of its own
	Quantisation           string          `json:"quantisation,omitempty"` // of the base model: none or nf4
	BaseModel              BaseModel       `json:"base_model"`
	Data                   Data            `json:"data"`
	Hyperparameters        Hyperparameters `json:"hyperparameters"`
	ValidationFraction     float64         `json:"validation_fraction"`
	CheckpointEverySteps   int             `json:"checkpoint_every_steps"`   // 0: by time only
	CheckpointEverySeconds float64         `json:"checkpoint_every_seconds"` // seconds
	KeepCheckpoints        int             `json:"keep_checkpoints"`
	ResumeFrom             string          `json:"resume_from"`                 // checkpoint directory, empty for none
	CacheDir               string          `json:"cache_dir,omitempty"`         // where tokens are kept from job to job, empty for nowhere
	Merged                 bool            `json:"merged,omitempty"`            // the base model with the adapter added is wanted as well
	MergedFileBytes        int64           `json:"merged_file_bytes,omitempty"` // at most, of each of its files; 0: 4.9 GB
	Threads                int             `json:"threads"`                     // 0: the library chooses
	Sanity                 bool            `json:"sanity"`                      // check the devices before the training
	SlowPaths              []string        `json:"slow_paths,omitempty"`        // packing, head, linear, mlp, norm: not to be used fast
	Dry                    *Dry            `json:"dry,omitempty"`
}

// BaseModel says which model is trained and where its files are.
type BaseModel struct {
	Name string `json:"name"`
	Path string `json:"path"`
}

// Data is the data file, its digest, and what is done with it.
type Data struct {
	Path    string `json:"path"`
	SHA256  string `json:"sha256"`
	TooLong string `json:"too_long,omitempty"` // truncate_history, drop or error; empty for the first
	Merge   *bool  `json:"merge,omitempty"`    // whether rows of one conversation are computed together; nil for yes
}

// Hyperparameters are the settings of the optimisation.
type Hyperparameters struct {
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

	// EarlyStoppingPatience is how many evaluations without a gain end the
	// training: 0 for never, nil for the trainer's choice.
	EarlyStoppingPatience *int `json:"early_stopping_patience,omitempty"`
}

// Dry is the script of the dry backend.
type Dry struct {
	Steps           int        `json:"steps"`
	StepSeconds     float64    `json:"step_seconds"`
	Loss            [2]float64 `json:"loss"` // first and last
	ExitAtStep      int        `json:"exit_at_step"`
	ExitCode        int        `json:"exit_code"`
	IgnoreSIGTERM   bool       `json:"ignore_sigterm"`
	NonfiniteAtStep int        `json:"nonfinite_at_step"`
}

// WritePlan writes p to path, readable by this user alone.
func WritePlan(path string, p Plan) error {
	p.V = Version
	raw, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return fmt.Errorf("encode plan: %w", err)
	}
	if err := os.WriteFile(path, append(raw, '\n'), 0o600); err != nil {
		return fmt.Errorf("write plan: %w", err)
	}
	return nil
}

// Float is a number that may be NaN or infinite; JSON carries those as text.
type Float float64

// UnmarshalJSON reads a number or one of "NaN", "Infinity", "-Infinity".
func (f *Float) UnmarshalJSON(raw []byte) error {
	var v any
	if err := json.Unmarshal(raw, &v); err != nil {
		return err
	}
	switch v := v.(type) {
	case float64:
		*f = Float(v)
	case string:
		switch v {
		case "NaN":
			*f = Float(math.NaN())
		case "Infinity":
			*f = Float(math.Inf(1))
		case "-Infinity":
			*f = Float(math.Inf(-1))
		default:
			return fmt.Errorf("%q is not a number", v)
		}
	case nil:
		*f = Float(math.NaN())
	default:
		return fmt.Errorf("%T is not a number", v)
	}
	return nil
}

// MarshalJSON is UnmarshalJSON's inverse.
func (f Float) MarshalJSON() ([]byte, error) {
	switch v := float64(f); {
	case math.IsNaN(v):
		return []byte(`"NaN"`), nil
	case math.IsInf(v, 1):
		return []byte(`"Infinity"`), nil
	case math.IsInf(v, -1):
		return []byte(`"-Infinity"`), nil
	default:
		return strconv.AppendFloat(nil, v, 'g', -1, 64), nil
	}
}

// File is one file that the trainer wrote.
type File struct {
	Name   string `json:"name"`
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"`
}

// MemoryPlan says how the trainer means to use the device's memory, in bytes
// and tokens. BytesPerToken and DeviceTotal are 0 where nothing was measured.
type MemoryPlan struct {
	Weights       int64 `json:"weights"`
	Adapter       int64 `json:"adapter"`   // with its gradients
	Optimizer     int64 `json:"optimizer"` // two moments of each trained number
	BytesPerToken int64 `json:"bytes_per_token"`
	BudgetTokens  int64 `json:"budget_tokens"` // of a micro-batch
	Recompute     bool  `json:"recompute"`     // activations are computed twice instead of being kept
	DeviceTotal   int64 `json:"device_total"`
}

// Event is one line of the trainer. Ev says which of the fields have meaning;
// PROTOCOL.md lists them. The flat form keeps a transcript readable and lets
// unknown fields pass.
type Event struct {
	V       int    `json:"v"`
	Seq     uint64 `json:"seq"`
	TS      int64  `json:"ts"` // Unix time in milliseconds
	Job     string `json:"job"`
	Attempt int    `json:"attempt"`
	Ev      string `json:"ev"`

	// hello
	Trainer   string            `json:"trainer"`
	Backend   string            `json:"backend"`
	Python    string            `json:"python"`
	Libraries map[string]string `json:"libraries"`
	Device    string            `json:"device"`
	PID       int               `json:"pid"`

	Stage string `json:"stage"` // stage, heartbeat

	// plan
	TotalSteps          int    `json:"total_steps"`
	Epochs              Float  `json:"epochs"` // plan, result
	StartStep           int    `json:"start_step"`
	Examples            int    `json:"examples"`
	ValidationExamples  int    `json:"validation_examples"`
	Sequences           int    `json:"sequences"`
	TokensPerEpoch      int64  `json:"tokens_per_epoch"`
	LossTokensPerEpoch  int64  `json:"loss_tokens_per_epoch"`
	TrainableParameters int64  `json:"trainable_parameters"`
	DataSHA256          string `json:"data_sha256"`
	BaseModel           string `json:"base_model"`

	MemoryPlan *MemoryPlan `json:"memory_plan"` // nil from trainers that do not plan

	// sample, eval, checkpoint, heartbeat
	Step            int   `json:"step"`
	Epoch           Float `json:"epoch"`
	Loss            Float `json:"loss"`
	LearningRate    Float `json:"learning_rate"`
	GradNorm        Float `json:"grad_norm"`
	Tokens          int64 `json:"tokens"`
	LossTokens      int64 `json:"loss_tokens"`
	TokensPerSecond Float `json:"tokens_per_second"`
	Seconds         Float `json:"seconds"`
	Skipped         bool  `json:"skipped"`

	ValidationLoss     *Float `json:"validation_loss"` // eval, result
	Perplexity         *Float `json:"perplexity"`
	BaseValidationLoss *Float `json:"base_validation_loss"` // result
	Overfit            string `json:"overfit"`              // result: yes, no or unknown

	// checkpoint, result
	Path           string `json:"path"`
	ManifestSHA256 string `json:"manifest_sha256"`
	Bytes          int64  `json:"bytes"`
	Files          []File `json:"files"`
	Final          bool   `json:"final"`
	StallMS        Float  `json:"stall_ms"` // how long training stood still for the checkpoint
	Steps          int    `json:"steps"`
	TrainingLoss   Float  `json:"training_loss"`

	// log, error
	Level   string `json:"level"`
	Message string `json:"message"`
	Code    Code   `json:"code"` // log: a word; exit: a number
	Kind    string `json:"kind"`
	Hint    string `json:"hint"`
	Detail  string `json:"detail"`

	// exit
	Reason             string `json:"reason"`
	LastCheckpointStep int    `json:"last_checkpoint_step"`

	RSSBytes int64 `json:"rss_bytes"` // heartbeat

	// sanity
	Index    int    `json:"index"`                 // of the device among the attempt's
	Wrong    string `json:"wrong"`                 // empty: all was well
	Check    string `json:"check"`                 // what did not go well: product, repeat or copy
	FLOPS    Float  `json:"flops"`                 // of matrix products, floating-point operations a second
	CopyRate Float  `json:"copy_bytes_per_second"` // inside the device's memory, read and written
}

// Code is the word of a log event or the number of an exit event, as text.
type Code string

// UnmarshalJSON reads a word or a number.
func (c *Code) UnmarshalJSON(raw []byte) error {
	var s string
	if json.Unmarshal(raw, &s) == nil {
		*c = Code(s)
		return nil
	}
	*c = Code(raw)
	return nil
}

// At is the trainer's clock when it sent the event.
func (e Event) At() time.Time { return time.UnixMilli(e.TS).UTC() }

// ErrProtocol marks an event that cannot be understood.
var ErrProtocol = errors.New("trainer protocol")

// Parse decodes one event.
func Parse(line []byte) (Event, error) {
	var e Event
	if err := json.Unmarshal(line, &e); err != nil {
		return Event{}, fmt.Errorf("%w: decode event: %w", ErrProtocol, err)
	}
	switch {
	case e.V > Version:
		return Event{}, fmt.Errorf("%w: event speaks version %d, this agent version %d: upgrade the agent", ErrProtocol, e.V, Version)
	case e.V < 1, e.Seq == 0, e.Ev == "":
		return Event{}, fmt.Errorf("%w: event without v, seq or ev", ErrProtocol)
	}
	return e, nil
}

// Decoder reads events and proves that none is missing.
type Decoder struct {
	scan *bufio.Scanner
	last uint64
}

// NewDecoder reads events from r, whose first must have seq 1.
func NewDecoder(r io.Reader) *Decoder {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, 64<<10), MaxLine)
	return &Decoder{scan: s}
}

// Next returns the next event and its line, or io.EOF. The line is only valid
// until the next call. Errors wrap ErrProtocol or come from the reader.
func (d *Decoder) Next() (Event, []byte, error) {
	if !d.scan.Scan() {
		switch err := d.scan.Err(); {
		case errors.Is(err, bufio.ErrTooLong):
			return Event{}, nil, fmt.Errorf("%w: an event is longer than %d bytes", ErrProtocol, MaxLine)
		case err != nil:
			return Event{}, nil, fmt.Errorf("read events: %w", err)
		}
		return Event{}, nil, io.EOF
	}
	e, err := Parse(d.scan.Bytes())
	if err != nil {
		return Event{}, nil, err
	}
	if e.Seq != d.last+1 {
		return Event{}, nil, fmt.Errorf("%w: event %d follows event %d", ErrProtocol, e.Seq, d.last)
	}
	d.last = e.Seq
	return e, d.scan.Bytes(), nil
}

// exits gives each exit code of the protocol the job kind that it stands for.
var exits = map[int]string{
	64: "plan_invalid", 65: "dataset_invalid", 66: "input_missing", 69: "device_unavailable",
	70: "trainer_crashed", 71: "gpu_fault", 73: "disk_full", 75: "preempted",
	81: "out_of_memory", 82: "diverged", 83: "hang",
}

// KindOfExit names the kind of failure that an exit code stands for; empty for
// 0, trainer_crashed for a code that the protocol does not know.
func KindOfExit(code int) string {
	if code == 0 {
		return ""
	}
	if k, ok := exits[code]; ok {
		return k
	}
	return "trainer_crashed"
}
