// Package nvml reads devices through the NVIDIA driver's library. It is the
// only room that knows go-nvml, and the one guard around it. go-nvml resolves
// symbols lazily, and calling one that the installed driver lacks ends the
// process, with no panic and no defer: every symbol that is called here is
// looked up once when the library is opened, and what is missing is answered
// with "not supported" by ourselves.
//
// Calls run on one thread of their own and are waited for so long and no
// longer: a driver in trouble may keep a call for ever.
package nvml

import (
	"errors"
	"time"
)

// ErrUnavailable says that there is no driver library to read, or that this
// binary was built without cgo.
var ErrUnavailable = errors.New("the NVIDIA driver library (libnvidia-ml.so.1) is not available")

// Patience is how long a call of the driver may take.
const Patience = 10 * time.Second

// Options change where the library is and how long is waited for it.
type Options struct {
	Path     string        // of the library; empty: libnvidia-ml.so.1 of the system
	Patience time.Duration // 0: Patience
}

// Timing is how long the driver took for one kind of call.
type Timing struct {
	Call           string
	Answer         string // what it answered; ok, when all was well
	Times          int
	P50, P99, Most time.Duration
}
