package attempt

import (
	"context"
	"errors"
	"fmt"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/trainer"
)

// DeviceFault is why an attempt ends whose device broke. Whoever trained on it
// is ended at once: what it computes from then on may be wrong, and it may hang
// for ever.
type DeviceFault struct {
	Device string // as people call it, GPU 3 of gpu-host-1
	Reason string // XID 79, the GPU has fallen off the bus

	told time.Time // when we heard of it
}

func (f *DeviceFault) Error() string { return f.Device + " failed: " + f.Reason }

// failure is infrastructure's: it is neither billed nor counted against the job.
func (f *DeviceFault) failure() *job.Failure {
	return &job.Failure{
		Kind: job.GPUFault, Err: f,
		Message: f.Device + " failed during the training (" + f.Reason + "). It is not caused by your settings, and you do not pay for this attempt: the training goes on by itself on another GPU, from its last checkpoint.",
	}
}

// Devices is what an agent tells an attempt of its devices, and wants to hear.
// Any part may be missing.
type Devices struct {
	// Check asks for a sanity check before the training.
	Check bool
	// Checked hears how it went on the device of that place among the
	// attempt's; wrong is empty when all was well.
	Checked func(place int, wrong string)
	// Doubt hears that the trainer blamed its devices.
	Doubt func(why string)
	// Program says which error of its own program, by the driver's word, the
	// attempt has just had; empty: none.
	Program func() string
	// Near is where their memory and processors are.
	Near Near
}

// Near is where a trainer runs best.
type Near = trainer.Near

// Break ends the attempt because a device of it is lost: a trainer is killed
// now, before anything else is done; a preparation is called off. What has been
// trained already needs no device any more, and goes on. The first fault is the
// one that is told.
func (l *Live) Break(f *DeviceFault) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fault != nil {
		return
	}
	f.told = time.Now()
	l.fault = f
	if l.child != nil {
		l.child.Kill()
	}
	if l.callOff != nil {
		l.callOff(f)
	}
	if l.broken != nil {
		close(l.broken)
	}
}

// Fault is what broke; nil when nothing did.
func (l *Live) Fault() *DeviceFault {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fault
}

// Broken is closed by Break.
func (l *Live) Broken() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken == nil {
		l.broken = make(chan struct{})
		if l.fault != nil {
			close(l.broken)
		}
	}
	return l.broken
}

// breakable is ctx until release is called, or a device breaks.
func (l *Live) breakable(ctx context.Context) (_ context.Context, release func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fault != nil {
		cancel(l.fault)
	}
	l.callOff = func(f *DeviceFault) { cancel(f) }
	return ctx, func() {
		l.mu.Lock()
		l.callOff = nil
		l.mu.Unlock()
		cancel(nil)
	}
}

// afterthought is how long a trainer that crashed is looked at before its
// crash counts as its own: the driver's word about the device may come after
// what the device did to the program.
const afterthought = time.Second

// faultBehind is the fault of a device that explains why a trainer failed.
func (x *run) faultBehind(ctx context.Context, kind job.Kind) *DeviceFault {
	if f := x.live.Fault(); f != nil || x.Config.Pretend || kind != job.TrainerCrashed && kind != job.GPUFault {
		return f
	}
	select {
	case <-x.live.Broken():
	case <-ctx.Done():
	case <-time.After(afterthought):
	}
	return x.live.Fault()
}

// killLimit is how long a trainer on a broken device may take to die. In a call
// to a driver that does not answer it cannot, for hours or for ever.
const killLimit = 20 * time.Second

// followed is a trainer as attend needs it; *trainer.Run is one, a test brings
// another that cannot be killed.
type followed interface {
	Events() <-chan trainer.Event
	Wait() error
	PID() int
}

// attend hears a trainer to its end and returns how it failed. One that Break
// killed and that does not die is given up after killLimit.
func (x *run) attend(child followed, each func(trainer.Event)) error {
	broken := x.live.Broken()
	var hopeless <-chan time.Time
	events, waited := child.Events(), make(chan error, 1)
	for {
		select {
		case e, more := <-events:
			if more {
				each(e)
				continue
			}
			events = nil
			go func() { waited <- child.Wait() }()
		case failure := <-waited:
			if f := x.live.Fault(); f != nil && failure != nil {
				x.Metrics.KillSeconds.Observe(time.Since(f.told).Seconds())
			}
			return failure
		case <-broken:
			broken, hopeless = nil, time.After(killLimit)
		case <-hopeless:
			x.abandon(child, events, waited)
			return x.live.Fault().failure()
		}
	}
}

// abandon gives up a trainer that cannot be killed: the job goes elsewhere, the
// devices stay taken until it is gone. It can do no harm: what it would write is
// refused, and its files are of this attempt alone. events is nil when they have
// ended, and waited is to be told then.
func (x *run) abandon(child followed, events <-chan trainer.Event, waited <-chan error) {
	x.log.Error("the trainer on a broken device cannot be killed; its devices stay taken until it is gone, the host may have to be restarted", "pid", child.PID())
	free := x.live.Free
	x.live.Free = nil
	go func() { // nobody can wait for it, that is the point
		if events != nil {
			for range events {
			}
			_ = child.Wait()
		} else {
			<-waited
		}
		if free != nil {
			free()
		}
	}()
}

// blame says whose fault a failure of the device is. What broke is said in the
// job's log, with what comes next. A trainer that blamed its devices by itself
// is believed, unless the driver blames the program: then the failure is the
// trainer's own and counts against the job, or it would be tried twenty times.
func (x *run) blame(err error) error {
	f, ok := errors.AsType[*job.Failure](err)
	if !ok || f.Kind != job.GPUFault {
		return err
	}
	if broken := x.live.Fault(); broken != nil {
		x.ship.Say("error", broken.Error()+"; the attempt was ended, and the job goes on elsewhere from its last checkpoint", "device_fault")
		return err
	}
	d := x.live.Devices
	if d.Program != nil {
		if said := d.Program(); said != "" {
			return &job.Failure{Kind: job.TrainerCrashed, Err: fmt.Errorf("the driver blames the program: %s: %w", said, f)}
		}
	}
	if d.Doubt != nil {
		d.Doubt(job.ForUser(err))
	}
	return err
}

// hearCheck takes a sanity check to the agent and the job's log.
func (x *run) hearCheck(e trainer.Event) {
	uuid := x.deviceAt(e.Index)
	if e.Wrong != "" {
		x.log.Error("device failed the sanity check", "device", uuid, "err", e.Wrong)
		x.Metrics.SanityRuns.WithLabelValues("failed").Inc()
		x.Metrics.SanityFailures.WithLabelValues(uuid, e.Check).Inc()
	} else {
		x.Metrics.SanityRuns.WithLabelValues("ok").Inc()
		x.Metrics.SanityFlops.WithLabelValues(uuid).Set(float64(e.FLOPS))
		x.Metrics.SanityCopy.WithLabelValues(uuid).Set(float64(e.CopyRate))
		x.Metrics.SanityLast.WithLabelValues(uuid).SetToCurrentTime()
		x.ship.Say("info", fmt.Sprintf("device %d checked in %.2f s: %.3g FLOP/s, copies %.3g bytes/s", e.Index, float64(e.Seconds), float64(e.FLOPS), float64(e.CopyRate)), "device_checked")
	}
	if x.live.Devices.Checked != nil {
		x.live.Devices.Checked(e.Index, e.Wrong)
	}
}

func (x *run) deviceAt(i int) string {
	if i < 0 || i >= len(x.as.Devices) {
		return ""
	}
	return x.as.Devices[i]
}
