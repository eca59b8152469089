package attempt

import (
	"sync"
	"time"

	"lorayard/internal/proc"
)

// Live is the thread between an attempt under way and its agent's renewals:
// each renewal extends the time after which the shim ends the trainer, and the
// attempt says when its devices are free. Its zero value is out of touch.
type Live struct {
	// Free is called once no process of the attempt is left and before it is
	// settled: whoever hears of the settlement may send the next attempt for
	// the same devices. nil does nothing.
	Free func()
	// Clock is what time is told by; nil: proc.Boottime, which a suspended host
	// does not stop. The simulation brings its own.
	Clock func() time.Duration
	// Devices is what is known of the devices; set before the attempt begins.
	Devices Devices

	mu       sync.Mutex
	until    time.Duration // on the clock
	child    Child
	standing func() Standing    // nil: nothing is known yet
	fault    *DeviceFault       // nil while no device is broken
	broken   chan struct{}      // closed then; nil: nobody asked
	callOff  func(*DeviceFault) // ends a preparation; nil: none is under way
}

// Child is a trainer with a deadline; *trainer.Run is one, the simulation
// brings another.
type Child interface {
	// Extend gives it so much time from now.
	Extend(time.Duration) error
	// Kill ends it now.
	Kill()
}

func (l *Live) now() time.Duration {
	if l.Clock != nil {
		return l.Clock()
	}
	return proc.Boottime()
}

// Extend gives the trainer so much time from now.
func (l *Live) Extend(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.until = max(l.until, l.now()+d)
	if l.child != nil {
		// A shim that does not listen any more ends by itself.
		_ = l.child.Extend(d)
	}
}

// left is the time that a trainer started now would have.
func (l *Live) left() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.until - l.now()
}

// Attach gives child what is left of the time, and passes every later extension
// on to it; nil ends that.
func (l *Live) Attach(child Child) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.child = child
	if child != nil {
		_ = child.Extend(l.until - l.now())
		if l.fault != nil {
			child.Kill()
		}
	}
}

func (l *Live) free() {
	if l.Free != nil {
		l.Free()
	}
}
