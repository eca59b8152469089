package attempt

import (
	"context"
	"errors"
	"testing"
	"time"

	"lorayard/internal/job"
)

// deaths counts what a trainer was told.
type deaths int

func (*deaths) Extend(time.Duration) error { return nil }
func (d *deaths) Kill()                    { *d++ }

var fellOff = &DeviceFault{Device: "GPU 3 of gpu-host-1", Reason: "XID 79, the GPU has fallen off the bus"}

func TestABreakReachesAnAttemptWhereverItIs(t *testing.T) {
	// While it trains.
	var l Live
	var d deaths
	l.Attach(&d)
	l.Break(fellOff)
	l.Break(&DeviceFault{Device: "GPU 4 of gpu-host-1", Reason: "its link fell off too"})
	if d != 1 || l.Fault() != fellOff {
		t.Errorf("killed %d times for %v", d, l.Fault())
	}
	<-l.Broken()

	// While it prepares: what it waits for is called off, with the reason.
	l = Live{}
	ctx, release := l.breakable(t.Context())
	l.Break(fellOff)
	<-ctx.Done()
	if k := job.KindOf(stopped(ctx)); k != job.GPUFault {
		t.Errorf("stopped as %s", k)
	}
	release()

	// Between the two: the trainer is killed as it begins.
	d = 0
	if l.Attach(&d); d != 1 {
		t.Error("a trainer on a broken device lives")
	}
	if ctx, release = l.breakable(t.Context()); ctx.Err() == nil {
		t.Error("a preparation for a broken device goes on")
	}
	release()

	// Once it is over: what is trained is not given up.
	l = Live{}
	ctx, release = l.breakable(context.Background())
	release()
	l.Attach(&d)
	l.Attach(nil)
	d = 0
	l.Break(fellOff)
	if d != 0 || errors.Is(context.Cause(ctx), fellOff) {
		t.Error("an attempt that needs no device any more was ended")
	}
}

func TestABrokenDeviceIsInfrastructures(t *testing.T) {
	f := fellOff.failure()
	if f.Kind.Billable() || f.Kind.Counted() || !f.Kind.Retryable() {
		t.Errorf("kind %s", f.Kind)
	}
	x := &run{}
	if e := x.end(nil, f); e.Delay != 0 || e.Failure.Kind != job.GPUFault {
		t.Errorf("settled as %+v", e)
	}
	if e := x.end(nil, &job.Failure{Kind: job.GPUFault, Err: errors.New("CUDA error")}); e.Delay == 0 {
		t.Error("a device that nobody else complains of is tried again at once")
	}
}
