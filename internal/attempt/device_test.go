package attempt

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/trainer"
	"lorayard/internal/wire"
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

func TestWhoIsToBlameForATrainerThatBlamesItsDevice(t *testing.T) {
	said := &job.Failure{Kind: job.GPUFault, Message: "RuntimeError: CUDA error", Err: errors.New("CUDA error")}
	doubted, program := "", ""
	x := &run{live: &Live{Devices: Devices{Doubt: func(why string) { doubted = why }, Program: func() string { return program }}}}
	if err := x.blame(said); job.KindOf(err) != job.GPUFault || doubted != said.Message {
		t.Errorf("%v, doubted for %q", err, doubted)
	}
	doubted, program = "", "XID 31, GPU memory page fault"
	if err := x.blame(said); job.KindOf(err) != job.TrainerCrashed || doubted != "" || !errors.Is(err, said.Err) {
		t.Errorf("%v, doubted for %q", err, doubted)
	}
	for _, err := range []error{nil, errors.New("x"), &job.Failure{Kind: job.Hang}} {
		if got := x.blame(err); got != err || doubted != "" {
			t.Errorf("%v became %v", err, got)
		}
	}
}

func TestAFailedCheckIsHeardAsTheTrainerSaysIt(t *testing.T) {
	e, err := wire.Parse([]byte(`{"v":1,"seq":4,"ts":1,"job":"j","attempt":1,"ev":"sanity","index":1,"device":"cuda:1","wrong":"3 of 32 matrix products were wrong","check":"product","flops":7e14,"copy_bytes_per_second":3e12,"seconds":0.5}`))
	if err != nil {
		t.Fatal(err)
	}
	heard := map[int]string{}
	x := &run{
		Runner: &Runner{Metrics: metrics.NewAgent("test")}, as: job.Assignment{Devices: []string{"GPU-a", "GPU-b"}}, log: slog.New(slog.DiscardHandler),
		live: &Live{Devices: Devices{Checked: func(place int, wrong string) { heard[place] = wrong }}},
	}
	x.hearCheck(trainer.Event{Event: e})
	if len(heard) != 1 || heard[1] != "3 of 32 matrix products were wrong" {
		t.Errorf("heard %v", heard)
	}
}

// undead is a trainer that does not die of SIGKILL.
type undead struct {
	events chan trainer.Event
	gone   chan struct{}
}

func (u *undead) Events() <-chan trainer.Event { return u.events }
func (u *undead) Wait() error                  { <-u.gone; return errors.New("it ended at last") }
func (u *undead) PID() int                     { return 1 }

func TestATrainerThatCannotBeKilledKeepsItsDevicesAndNotItsJob(t *testing.T) {
	for _, deaf := range []bool{true, false} { // in the driver before its pipes were closed, or after
		synctest.Test(t, func(t *testing.T) {
			freed := false
			x := &run{Runner: &Runner{Metrics: metrics.NewAgent("test")}, live: &Live{Free: func() { freed = true }}, log: slog.New(slog.DiscardHandler)}
			u := &undead{events: make(chan trainer.Event), gone: make(chan struct{})}
			go func() {
				u.events <- trainer.Event{}
				time.Sleep(time.Hour)
				x.live.Break(fellOff)
				if !deaf {
					close(u.events)
				}
			}()
			began, n := time.Now(), 0
			err := x.attend(u, func(trainer.Event) { n++ })
			if took := time.Since(began); job.KindOf(err) != job.GPUFault || took != time.Hour+killLimit || n != 1 {
				t.Errorf("given up after %v with %v, %d events", took, err, n)
			}
			if x.live.free(); freed {
				t.Error("its devices are free")
			}
			if deaf {
				close(u.events)
			}
			close(u.gone)
			synctest.Wait()
			if !freed {
				t.Error("its devices are taken for ever")
			}
		})
	}
}
