// Package job is the vocabulary of the house: what a job is, where it may
// stand, what one attempt at it is called, and why it may fail. It does no
// I/O and imports no other room; every other room speaks in its words.
package job

import (
	"cmp"
	"fmt"
	"slices"
	"time"
)

// ID names a row of training_jobs (a UUID in text form).
type ID string

// Ref names one attempt at one job. Attempt is the fencing token: only the
// dispatcher increments it, when it assigns. Nonce is drawn by the agent for
// each accept, because an agent's name is not a fence: a duplicated task once
// ran a job twice on the same agent.
type Ref struct {
	Job     ID     `json:"job"`
	Attempt int    `json:"attempt"`
	Nonce   string `json:"nonce,omitempty"`
}

// String is how a person reads a reference.
func (r Ref) String() string { return fmt.Sprintf("attempt %d of job %s", r.Attempt, r.Job) }

// SortRefs puts refs in an order that does not depend on where they came from.
func SortRefs(refs []Ref) {
	slices.SortFunc(refs, func(a, b Ref) int {
		return cmp.Or(cmp.Compare(a.Job, b.Job), cmp.Compare(a.Attempt, b.Attempt), cmp.Compare(a.Nonce, b.Nonce))
	})
}

// Status is where a job stands, in the app's words (training_jobs.status).
type Status string

// The statuses of the app. The last three are final and absorbing.
const (
	Queued       Status = "queued"
	Initializing Status = "initializing"
	Running      Status = "running"
	Completed    Status = "completed"
	Failed       Status = "failed"
	Cancelled    Status = "cancelled"
)

// Final reports whether no transition leaves s.
func (s Status) Final() bool { return s == Completed || s == Failed || s == Cancelled }

// next holds every legal transition. A job goes back to queued when its
// attempt was lost, handed back or failed in a way that another try may cure.
var next = map[Status][]Status{
	Queued:       {Initializing, Failed, Cancelled},
	Initializing: {Running, Queued, Completed, Failed, Cancelled},
	Running:      {Queued, Completed, Failed, Cancelled},
}

// CanBecome reports whether a job may go from s to t. Staying is not a
// transition.
func (s Status) CanBecome(t Status) bool {
	for _, n := range next[s] {
		if n == t {
			return true
		}
	}
	return false
}

// Stage is what an attempt is doing (training_jobs.current_stage).
type Stage string

// The stages in the order in which an attempt passes them; validating and
// saving come back during training.
const (
	StageQueued      Stage = "queued"
	StageDownloading Stage = "downloading"
	StagePreparing   Stage = "preparing"
	StageLoading     Stage = "loading_model"
	StageTraining    Stage = "training"
	StageValidating  Stage = "validating"
	StageSaving      Stage = "saving"
	StageUploading   Stage = "uploading"
	StageCompleted   Stage = "completed"
)

// Desired is what the control plane wants of a running attempt.
type Desired string

// The desired states; anything unknown counts as DesireRun.
const (
	DesireRun     Desired = "run"
	DesireCancel  Desired = "cancel"  // a person ended the job: stop at once, keep nothing
	DesirePreempt Desired = "preempt" // the platform ends the attempt: checkpoint, hand back
	DesirePause   Desired = "pause"   // as preempt, and the job waits until somebody resumes it
)

// Task is what travels to an agent: which attempt to accept and on which
// devices. It carries no nonce: the agent draws one when it accepts.
type Task struct {
	Ref     Ref      `json:"ref"`
	Send    int      `json:"send"`    // counts re-sends of the same attempt, from 1
	Devices []string `json:"devices"` // device UUIDs
}

// File is one file of a checkpoint or an adapter.
type File struct {
	Name   string `json:"name"`
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"` // lower-case hex
}

// Checkpoint is trainer state in Storage that an attempt may resume from.
type Checkpoint struct {
	Step           int     `json:"step"`
	Epoch          float64 `json:"epoch"`
	Loss           float64 `json:"loss"` // may be NaN
	Bucket         string  `json:"bucket"`
	Path           string  `json:"path"` // folder inside the bucket
	ManifestSHA256 string  `json:"manifest_sha256"`
	Files          []File  `json:"files"`
}

// Bytes is the size of all files.
func (c Checkpoint) Bytes() (n int64) {
	for _, f := range c.Files {
		n += f.Bytes
	}
	return n
}

// Dataset says where the data file of a job is.
type Dataset struct {
	ID     string `json:"id"`
	Name   string `json:"name"`
	Bucket string `json:"bucket"`
	Path   string `json:"path"`
	Bytes  int64  `json:"bytes"`
}

// Assignment is what an agent learns when it accepts an attempt.
type Assignment struct {
	Ref         Ref
	User        string
	Devices     []string
	Spec        Spec
	Dataset     Dataset
	Checkpoints []Checkpoint // newest first, of earlier attempts
	// Skew is the database's time minus this host's when the attempt was
	// accepted: what a host stamps is told in the database's time.
	Skew time.Duration
}

// Sample is one measured step. Floats may be NaN or infinite here; the store
// fits them to the app's columns.
type Sample struct {
	Seq             uint64
	At              time.Time
	Step            int
	Epoch           float64  // epochs done, 1.5 is the middle of the second
	Loss            float64  // nats per trained token
	ValidationLoss  *float64 // only at an evaluation
	LearningRate    float64
	GradNorm        float64
	TokensPerSecond float64
	Skipped         bool // not finite: the step changed nothing
}

// Line is one log line.
type Line struct {
	Seq     uint64
	At      time.Time
	Level   string // debug, info, warn, error
	Message string
	Code    string // short word for machines, may be empty
}

// Progress is the newest standing of an attempt, as the app's page shows it.
type Progress struct {
	Status          Status // Initializing or Running
	Stage           Stage
	Step            int
	TotalSteps      int
	Epoch           int // 1-based
	TotalEpochs     int
	Percent         float64 // 0..100
	Loss            *float64
	ValidationLoss  *float64
	LearningRate    *float64
	TokensPerSecond *float64
	GPUUtilization  *float64 // percent, mean over the reservation
	Remaining       time.Duration
}

// Result is what a trained attempt hands in at settlement.
type Result struct {
	ArtifactID       string
	Files            map[string]string // file name → path in bucket lora-models
	Digests          []File
	Steps            int
	Epochs           float64
	TrainingLoss     float64
	ValidationLoss   *float64
	BaseValidation   *float64 // validation loss before the first step
	Perplexity       *float64
	Overfit          string // yes, no, unknown; empty from a trainer that does not judge
	Tokens           int64
	TrainingDuration time.Duration
}
