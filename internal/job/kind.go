package job

import "errors"

// Kind is the durable name of a cause of failure. Customers, retry policy,
// billing and dashboards key on it: kinds are appended, never renamed.
type Kind string

// The kinds.
const (
	SpecInvalid        Kind = "spec_invalid"        // the row asks for something that cannot be
	PlanInvalid        Kind = "plan_invalid"        // the trainer refused the plan
	DatasetInvalid     Kind = "dataset_invalid"     // the data file is not usable
	DatasetMissing     Kind = "dataset_missing"     // the data file is not in Storage
	InputMissing       Kind = "input_missing"       // a file of the plan was not there
	ModelMissing       Kind = "model_missing"       // the host lacks the base model
	DeviceUnavailable  Kind = "device_unavailable"  // no usable device
	GPUFault           Kind = "gpu_fault"           // the GPU or its driver broke
	OutOfMemory        Kind = "out_of_memory"       // does not fit the devices
	Diverged           Kind = "diverged"            // loss or gradients stopped being finite
	Hang               Kind = "hang"                // no progress
	DiskFull           Kind = "disk_full"           // no room on the host
	TrainerCrashed     Kind = "trainer_crashed"     // a bug, or a signal nobody sent
	Protocol           Kind = "protocol"            // the trainer spoke nonsense
	StorageUnavailable Kind = "storage_unavailable" // Storage did not answer in time
	Preempted          Kind = "preempted"           // the platform ended the attempt, checkpoint saved
	LeaseLost          Kind = "lease_lost"          // another attempt owns the job
	AgentLost          Kind = "agent_lost"          // the agent stopped renewing
	NotAccepted        Kind = "not_accepted"        // the agent never took the attempt
	CancelledByUser    Kind = "cancelled"           // a person ended the job
	Internal           Kind = "internal"            // none of the above
)

// policy says what follows from a kind.
type policy struct {
	retryable bool // another attempt may help
	counted   bool // the attempt counts against the job's own budget of failures
	billable  bool // the customer pays for the GPU time used
}

// Infrastructure and bugs are on us; what the user's own settings or data
// cause after training began is on the user; a bad data file costs nothing,
// because no training came of it.
var policies = map[Kind]policy{
	SpecInvalid:        {},
	PlanInvalid:        {},
	DatasetInvalid:     {},
	DatasetMissing:     {},
	InputMissing:       {retryable: true, counted: true},
	ModelMissing:       {retryable: true},
	DeviceUnavailable:  {retryable: true},
	GPUFault:           {retryable: true},
	OutOfMemory:        {billable: true},
	Diverged:           {billable: true},
	Hang:               {retryable: true, counted: true},
	DiskFull:           {retryable: true},
	TrainerCrashed:     {retryable: true, counted: true},
	Protocol:           {retryable: true, counted: true},
	StorageUnavailable: {retryable: true},
	Preempted:          {retryable: true, billable: true},
	LeaseLost:          {retryable: true},
	AgentLost:          {retryable: true},
	NotAccepted:        {retryable: true},
	CancelledByUser:    {billable: true},
	Internal:           {retryable: true, counted: true},
}

// Retryable reports whether another attempt may help.
func (k Kind) Retryable() bool { return policies[k].retryable }

// Counted reports whether the attempt counts against the job's budget of
// failures; what infrastructure lost has a budget of its own.
func (k Kind) Counted() bool { return policies[k].counted }

// Billable reports whether the customer pays for the GPU time of the attempt.
func (k Kind) Billable() bool { return policies[k].billable }

// Failure is an error with a durable cause and words for the user.
type Failure struct {
	Kind    Kind
	Message string // for the user: what is wrong and what to change; may be empty
	Err     error  // for operators; may be nil
}

// Error is what a person reads.
func (f *Failure) Error() string {
	switch {
	case f.Err == nil:
		return string(f.Kind) + ": " + f.Message
	case f.Message == "":
		return string(f.Kind) + ": " + f.Err.Error()
	default:
		return string(f.Kind) + ": " + f.Message + " (" + f.Err.Error() + ")"
	}
}

// Unwrap gives the operator's error.
func (f *Failure) Unwrap() error { return f.Err }

// KindOf finds the kind of err, Internal when it has none.
func KindOf(err error) Kind {
	if f, ok := errors.AsType[*Failure](err); ok {
		return f.Kind
	}
	return Internal
}

// ForUser gives the words of err that a user may read. Errors without a
// Failure are internal and tell the user nothing of our insides.
func ForUser(err error) string {
	f, ok := errors.AsType[*Failure](err)
	if ok && f.Message != "" {
		return f.Message
	}
	if ok {
		return "The training stopped (" + string(f.Kind) + "). It is not caused by your settings; try again, and tell us the job's id if it happens again."
	}
	return "The training stopped for an internal reason. It is not caused by your settings; try again, and tell us the job's id if it happens again."
}
