//go:build linux

package proc

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// boottime is the time since the machine started, sleep included. It is the
// same for all processes, and nobody sets it.
func boottime() time.Duration {
	var ts unix.Timespec
	// The clock exists since Linux 2.6.39; there is no other way to fail.
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return time.Duration(ts.Nano())
}

// alarm rings when boottime has reached a set time. A timer of Go's would
// stand still while the machine sleeps.
type alarm struct {
	rings chan struct{}
	file  *os.File
	fd    int
	at    time.Duration // 0: never
}

func newAlarm() (*alarm, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_BOOTTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make timer: %w", err)
	}
	a := &alarm{rings: make(chan struct{}, 1), file: os.NewFile(uintptr(fd), "timer"), fd: fd}
	go func() { // ends with the process
		var count [8]byte
		for {
			if _, err := a.file.Read(count[:]); err != nil {
				return
			}
			select {
			case a.rings <- struct{}{}:
			default:
			}
		}
	}()
	return a, nil
}

// set moves the alarm to at; one in the past rings at once.
func (a *alarm) set(at time.Duration) error {
	a.at = at
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(max(0, at)))}
	if err := unix.TimerfdSettime(a.fd, unix.TFD_TIMER_ABSTIME, &spec, nil); err != nil {
		return fmt.Errorf("set timer: %w", err)
	}
	return nil
}

// passed tells whether the time has come: a ring may be of an earlier setting.
func (a *alarm) passed() bool { return a.at != 0 && boottime() >= a.at }
