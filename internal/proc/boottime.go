//go:build linux

package proc

import "time"

// Boottime is the time since the machine started, sleep included: the clock of
// deadlines.
func Boottime() time.Duration { return boottime() }
