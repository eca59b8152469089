package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"lorayard/internal/job"
)

// Agent is what an agent says of itself and its host.
type Agent struct {
	ID       string `json:"-"`
	Boot     string `json:"-"`        // a UUID, new for each start of the process; who knows it is the process
	Instance string `json:"instance"` // names the data directory: the same one means the same host
	// Generation counts the processes that were started on the data directory.
	Generation int64             `json:"generation"`
	Hostname   string            `json:"hostname"`
	Version    string            `json:"version"`
	BaseModels []string          `json:"base_models"` // models that the host holds
	Labels     map[string]string `json:"labels"`
	Devices    []Device          `json:"devices"`
}

// Device is one device of an agent's host.
type Device struct {
	UUID        string `json:"uuid"`
	Index       int    `json:"index"`
	Name        string `json:"name"`
	Class       string `json:"class"`
	MemoryBytes int64  `json:"memory_bytes"`
	Pretend     bool   `json:"pretend"`
	Fault       string `json:"fault"`           // empty: fit for work
	Links       []int  `json:"links,omitempty"` // to the agent's devices in the order of Index, larger is better; empty: not known
	Node        int    `json:"node"`            // NUMA node; -1: not known
}

const register = `SELECT lorayard.register_agent($1, $2, $3, $4, $5)`

// Register makes this process the one that runs a.ID. What an earlier process
// of the same id had accepted goes on when it is in adopt, with its nonce, and
// goes back to the queue otherwise; Register returns what goes on. The error
// wraps ErrReplaced when a later process of the same data directory has
// registered, and ErrInUse when the id or a device is held by a process on another host.
func (s *Store) Register(ctx context.Context, a Agent, ttl time.Duration, adopt []job.Ref) ([]job.Ref, error) {
	if a.BaseModels == nil {
		a.BaseModels = []string{}
	}
	if a.Devices == nil {
		a.Devices = []Device{}
	}
	if a.Labels == nil {
		a.Labels = map[string]string{}
	}
	info, err := json.Marshal(a)
	if err != nil {
		return nil, fmt.Errorf("encode agent: %w", err)
	}
	refs, err := encodeRefs(adopt)
	if err != nil {
		return nil, err
	}
	var raw []byte
	if err := s.pool.QueryRow(ctx, register, a.ID, a.Boot, info, ttl, refs).Scan(&raw); err != nil {
		if pg, ok := errors.AsType[*pgconn.PgError](err); ok {
			switch pg.Code {
			case "LY001":
				return nil, fmt.Errorf("register agent %s: %w", a.ID, ErrReplaced)
			case "LY002", "LY003":
				return nil, fmt.Errorf("register agent %s: %w: %s", a.ID, ErrInUse, pg.Message)
			}
		}
		return nil, fmt.Errorf("register agent %s: %w", a.ID, err)
	}
	var kept []job.Ref
	if err := json.Unmarshal(raw, &kept); err != nil {
		return nil, fmt.Errorf("register agent %s: decode answer: %w", a.ID, err)
	}
	return kept, nil
}

func encodeRefs(refs []job.Ref) ([]byte, error) {
	if refs == nil {
		refs = []job.Ref{}
	}
	raw, err := json.Marshal(refs)
	if err != nil {
		return nil, fmt.Errorf("encode refs: %w", err)
	}
	return raw, nil
}

// AgentState is what an agent says of itself at each renewal.
type AgentState struct {
	Draining bool `json:"draining"` // it takes nothing new
	// Faults says why devices must not be used, by UUID; those that it does not
	// name are fit. Nil: nothing changed since the registration.
	Faults map[string]string `json:"faults,omitzero"`
}

// Wanted is what the control plane wants of an agent and its attempts.
type Wanted struct {
	Cordoned    bool                    // it is given nothing
	Drain       bool                    // an operator's drain
	DrainIn     time.Duration           // until then its attempts have left; only with Drain
	Dispatchers []string                // addresses of presence streams
	Attempts    map[job.Ref]job.Desired // those that are still the agent's
}

const renew = `SELECT lorayard.renew($1, $2, $3, $4, $5)`

// Renew extends the agent's lease by ttl from the database's now, accrues the
// usage of refs, and returns what is wanted. A ref that is not in the answer
// belongs to somebody else now. The error is ErrReplaced when another process
// runs this agent.
func (s *Store) Renew(ctx context.Context, a Agent, ttl time.Duration, state AgentState, refs []job.Ref) (Wanted, error) {
	rawState, err := json.Marshal(state)
	if err != nil {
		return Wanted{}, fmt.Errorf("encode the agent's state: %w", err)
	}
	rawRefs, err := encodeRefs(refs)
	if err != nil {
		return Wanted{}, err
	}
	var raw []byte
	if err := s.vital.QueryRow(ctx, renew, a.ID, a.Boot, ttl, rawState, rawRefs).Scan(&raw); err != nil {
		if pg, ok := errors.AsType[*pgconn.PgError](err); ok && pg.Code == "LY001" {
			return Wanted{}, ErrReplaced
		}
		return Wanted{}, fmt.Errorf("renew agent %s: %w", a.ID, err)
	}
	var doc struct {
		Cordoned    bool     `json:"cordoned"`
		DrainIn     *float64 `json:"drain_in"` // seconds
		Dispatchers []string `json:"dispatchers"`
		Attempts    []struct {
			job.Ref
			Desired job.Desired `json:"desired"`
		} `json:"attempts"`
	}
	if err := json.Unmarshal(raw, &doc); err != nil {
		return Wanted{}, fmt.Errorf("renew agent %s: decode answer: %w", a.ID, err)
	}
	w := Wanted{Cordoned: doc.Cordoned, Dispatchers: doc.Dispatchers, Attempts: map[job.Ref]job.Desired{}}
	if doc.DrainIn != nil {
		w.Drain, w.DrainIn = true, max(0, time.Duration(*doc.DrainIn*float64(time.Second)))
	}
	for _, r := range doc.Attempts {
		w.Attempts[r.Ref] = r.Desired
	}
	return w, nil
}

const accept = `SELECT lorayard.accept($1, $2, $3, $4, $5), clock_timestamp()`

// Accept takes an assigned attempt with the nonce in ref. A stale attempt
// gives a failure of kind LeaseLost. Asking again with the same nonce is safe.
func (s *Store) Accept(ctx context.Context, a Agent, ref job.Ref) (job.Assignment, error) {
	var raw []byte
	var now time.Time
	sent := time.Now()
	if err := s.pool.QueryRow(ctx, accept, a.ID, a.Boot, string(ref.Job), ref.Attempt, ref.Nonce).Scan(&raw, &now); err != nil {
		return job.Assignment{}, fmt.Errorf("accept %s: %w", ref, err)
	}
	if raw == nil {
		return job.Assignment{}, stale(ref)
	}
	as := job.Assignment{Ref: ref}
	if err := json.Unmarshal(raw, &as); err != nil {
		return job.Assignment{}, fmt.Errorf("accept %s: decode assignment: %w", ref, err)
	}
	// The database looked at its clock somewhere between.
	as.Skew = now.Sub(sent.Add(time.Since(sent) / 2))
	return as, nil
}

// number is a float as text, so that NaN and the infinities pass through JSON.
func number(f float64) string {
	switch {
	case math.IsInf(f, 1):
		return "Infinity"
	case math.IsInf(f, -1):
		return "-Infinity"
	}
	return strconv.FormatFloat(f, 'g', -1, 64)
}

func numberOf(f *float64) *string {
	if f == nil {
		return nil
	}
	s := number(*f)
	return &s
}

// clean makes text that Postgres takes: valid UTF-8 without NUL.
func clean(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
}

type sampleRow struct {
	Seq             uint64    `json:"seq"`
	At              time.Time `json:"at"`
	Step            int       `json:"step"`
	Epoch           string    `json:"epoch"`
	Loss            string    `json:"loss"`
	ValidationLoss  *string   `json:"validation_loss"`
	LearningRate    string    `json:"learning_rate"`
	GradNorm        string    `json:"grad_norm"`
	TokensPerSecond string    `json:"tokens_per_second"`
	Skipped         bool      `json:"skipped"`
}

type lineRow struct {
	Seq     uint64    `json:"seq"`
	At      time.Time `json:"at"`
	Level   string    `json:"level"`
	Message string    `json:"message"`
	Code    string    `json:"code"`
}

// progressDoc is what lorayard.append reads of a job.Progress.
func progressDoc(p *job.Progress) map[string]any {
	if p == nil {
		return nil
	}
	metrics := map[string]any{}
	put := func(name string, f *float64) {
		if f != nil && !math.IsNaN(*f) && !math.IsInf(*f, 0) {
			metrics[name] = *f
		}
	}
	put("training_loss", p.Loss)
	put("validation_loss", p.ValidationLoss)
	put("learning_rate", p.LearningRate)
	put("throughput", p.TokensPerSecond)
	put("gpu_utilization", p.GPUUtilization)
	doc := map[string]any{"status": p.Status, "stage": p.Stage, "percent": p.Percent, "metrics": metrics}
	if p.TotalSteps > 0 {
		doc["step"], doc["total_steps"] = p.Step, p.TotalSteps
		doc["epoch"], doc["total_epochs"] = p.Epoch, p.TotalEpochs
	}
	if p.Remaining > 0 {
		doc["remaining_seconds"] = p.Remaining.Seconds()
	}
	if u, ok := metrics["gpu_utilization"]; ok {
		doc["gpu_utilization"] = u
	}
	return doc
}

const appendBatch = `SELECT lorayard.append($1, $2, $3, $4, $5, $6)`

// Append writes samples and lines, each exactly once by attempt and seq, and
// the newest progress; nil progress leaves the job's row alone. Values that do
// not fit the app's columns are fitted, not refused. A stale ref gives a
// failure of kind LeaseLost.
func (s *Store) Append(ctx context.Context, ref job.Ref, samples []job.Sample, lines []job.Line, p *job.Progress) error {
	ss := make([]sampleRow, len(samples))
	for i, v := range samples {
		ss[i] = sampleRow{
			Seq: v.Seq, At: v.At, Step: v.Step, Epoch: number(v.Epoch), Loss: number(v.Loss),
			ValidationLoss: numberOf(v.ValidationLoss), LearningRate: number(v.LearningRate),
			GradNorm: number(v.GradNorm), TokensPerSecond: number(v.TokensPerSecond), Skipped: v.Skipped,
		}
	}
	ls := make([]lineRow, len(lines))
	for i, l := range lines {
		ls[i] = lineRow{Seq: l.Seq, At: l.At, Level: l.Level, Message: clean(l.Message), Code: clean(l.Code)}
	}
	var args [3]any
	for i, v := range []any{ss, ls, progressDoc(p)} {
		raw, err := json.Marshal(v)
		if err != nil {
			return fmt.Errorf("encode batch of %s: %w", ref, err)
		}
		args[i] = raw
	}
	if p == nil {
		args[2] = nil
	}
	return s.fenced(ctx, "append to", ref, appendBatch, args[:]...)
}

const addCheckpoint = `SELECT lorayard.add_checkpoint($1, $2, $3, $4)`

// AddCheckpoint publishes a checkpoint whose files are in Storage.
func (s *Store) AddCheckpoint(ctx context.Context, ref job.Ref, c job.Checkpoint) error {
	raw, err := json.Marshal(map[string]any{
		"step": c.Step, "epoch": number(c.Epoch), "loss": number(c.Loss), "bucket": c.Bucket, "path": c.Path,
		"bytes": c.Bytes(), "manifest_sha256": c.ManifestSHA256, "files": c.Files,
	})
	if err != nil {
		return fmt.Errorf("encode checkpoint of %s: %w", ref, err)
	}
	return s.fenced(ctx, "add checkpoint to", ref, addCheckpoint, raw)
}

const setResumeStep = `SELECT lorayard.set_resume_step($1, $2, $3, $4)`

// SetResumeStep records from which step an attempt goes on.
func (s *Store) SetResumeStep(ctx context.Context, ref job.Ref, step int) error {
	return s.fenced(ctx, "set resume step of", ref, setResumeStep, step)
}

// fenced runs a function that answers false when ref is stale.
func (s *Store) fenced(ctx context.Context, doing string, ref job.Ref, query string, args ...any) error {
	var ok bool
	all := append([]any{string(ref.Job), ref.Attempt, ref.Nonce}, args...)
	if err := s.pool.QueryRow(ctx, query, all...).Scan(&ok); err != nil {
		return fmt.Errorf("%s %s: %w", doing, ref, err)
	}
	if !ok {
		return stale(ref)
	}
	return nil
}

// Outcome is how an attempt ended.
type Outcome string

// The outcomes that an agent may settle with.
const (
	OutcomeCompleted  Outcome = "completed"
	OutcomeFailed     Outcome = "failed"
	OutcomeCancelled  Outcome = "cancelled"
	OutcomeHandedBack Outcome = "handed_back"
)

// End is how an attempt is settled.
type End struct {
	Outcome  Outcome
	Failure  *job.Failure // for failed and handed back
	Detail   string       // for operators, stored as error_stack
	Delay    time.Duration
	Idle     time.Duration // since the devices are free: nobody pays for it
	Artifact *Artifact     // for completed
}

// Artifact is the row that the app's model pages read.
type Artifact struct {
	ID              string            `json:"id"`
	Description     string            `json:"description"`
	Files           map[string]string `json:"files"` // file name → path in bucket lora-models
	QualityMetrics  map[string]any    `json:"quality_metrics"`
	TrainingSummary map[string]any    `json:"training_summary"`
	Metrics         map[string]any    `json:"metrics"` // joins the job's current_metrics
}

const settle = `SELECT lorayard.settle($1, $2, $3, $4)`

// Settle closes the attempt and, where it is due, the job, in one transaction:
// status, cost, artifact and notifications exist exactly once. A cancel that
// came first wins. It returns the job's status afterwards; asking again after
// a lost answer gives the same. A stale ref gives a failure of kind LeaseLost.
func (s *Store) Settle(ctx context.Context, ref job.Ref, e End) (job.Status, error) {
	doc := map[string]any{"outcome": e.Outcome, "billable": e.Outcome == OutcomeCompleted, "delay_seconds": e.Delay.Seconds(), "idle_seconds": e.Idle.Seconds()}
	if f := e.Failure; f != nil {
		doc["kind"], doc["message"], doc["detail"] = f.Kind, clean(job.ForUser(f)), clean(e.Detail)
		doc["retryable"], doc["counted"], doc["billable"] = f.Kind.Retryable(), f.Kind.Counted(), f.Kind.Billable()
	}
	if e.Artifact != nil {
		doc["artifact"] = e.Artifact
	}
	raw, err := json.Marshal(doc)
	if err != nil {
		return "", fmt.Errorf("encode settlement of %s: %w", ref, err)
	}
	var status string
	if err := s.pool.QueryRow(ctx, settle, string(ref.Job), ref.Attempt, ref.Nonce, raw).Scan(&status); err != nil {
		return "", fmt.Errorf("settle %s: %w", ref, err)
	}
	if status == "stale" {
		return "", stale(ref)
	}
	return job.Status(status), nil
}

const checkAgent = `
	SELECT coalesce(has_function_privilege(to_regprocedure('lorayard.accept(text,uuid,uuid,integer,uuid)')::oid, 'EXECUTE'), false)`

// CheckAgent reports whether this login may do an agent's work.
func (s *Store) CheckAgent(ctx context.Context) error {
	var ok bool
	if err := s.pool.QueryRow(ctx, checkAgent).Scan(&ok); err != nil {
		return fmt.Errorf("look for the agent's functions: %w", err)
	}
	if !ok {
		return errors.New("this login may not run the agent's functions, or the database is not migrated")
	}
	return nil
}
