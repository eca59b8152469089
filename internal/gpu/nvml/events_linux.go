//go:build linux && cgo

package nvml

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"

	"github.com/NVIDIA/go-nvml/pkg/nvml"

	"lorayard/internal/gpu"
)

const (
	waitMillis   = 1000
	xidDoubleBit = 48
	noInstance   = math.MaxUint32 // the whole device, or it is not known which
)

// errAnew says that the library was opened anew: events have to be asked for
// again.
var errAnew = errors.New("the driver was opened anew")

// Events hands over errors of devices as the driver tells them, until ctx ends
// or the driver has no more to tell. It does not see every error: some reach
// the kernel log alone.
func (d *Driver) Events(ctx context.Context, heard func(gpu.Fault)) error {
	for _, s := range []string{symSetCreate, symSetWait, symSetFree, symSupported, symRegister} {
		if !d.has[s] {
			return fmt.Errorf("the driver's library has no %s", s)
		}
	}
	ended := make(chan error, 1)
	go func() { // a wait may hang: nobody waits for this thread when ctx ends
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		for {
			err := d.listen(ctx, heard)
			if !errors.Is(err, errAnew) {
				ended <- err
				return
			}
		}
	}()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return nil
	}
}

func (d *Driver) listen(ctx context.Context, heard func(gpu.Fault)) error {
	set, handles, err := d.register()
	if err != nil {
		return err
	}
	opened := d.opened.Load()
	defer func() {
		d.open.RLock()
		defer d.open.RUnlock()
		if d.opened.Load() == opened {
			_ = set.Free() // nothing can be done about a failure
		}
	}()
	for ctx.Err() == nil {
		d.open.RLock()
		if d.opened.Load() != opened {
			d.open.RUnlock()
			return errAnew
		}
		e, ret := d.lib.EventSetWait(set, waitMillis)
		d.open.RUnlock()
		switch ret {
		case nvml.SUCCESS:
			f, ok := fault(e)
			for _, p := range handles[e.Device] {
				// What happened in one instance is nothing to the others.
				if f.UUID = p.uuid; ok && ctx.Err() == nil && (e.GpuInstanceId == noInstance || p.instance < 0 || int(e.GpuInstanceId) == p.instance) {
					heard(f)
				}
			}
		case nvml.ERROR_TIMEOUT:
		default:
			// It names no device: the next poll finds out which one it was.
			return fmt.Errorf("wait for events: %s", words(ret))
		}
	}
	return nil
}

// register asks for the errors of every whole device.
func (d *Driver) register() (nvml.EventSet, map[nvml.Device][]part, error) {
	d.open.RLock()
	defer d.open.RUnlock()
	handles := d.handles.Load()
	if handles == nil {
		return nil, nil, errors.New("there is no inventory yet")
	}
	set, ret := d.lib.EventSetCreate()
	if ret != nvml.SUCCESS {
		return nil, nil, fmt.Errorf("create a set of events: %s", words(ret))
	}
	for h := range *handles {
		types, ret := h.GetSupportedEventTypes()
		if ret == nvml.SUCCESS {
			ret = h.RegisterEvents(types&(nvml.EventTypeXidCriticalError|nvml.EventTypeDoubleBitEccError), set)
		}
		// A device that is lost or tells none does not keep the others from being heard.
		_ = ret
	}
	return set, *handles, nil
}

// fault is what an event says; other kinds of events carry numbers that are no
// XID.
func fault(e nvml.EventData) (gpu.Fault, bool) {
	f := gpu.Fault{Origin: gpu.FromEvent}
	switch e.EventType {
	case nvml.EventTypeXidCriticalError:
		f.XID = int(e.EventData)
	case nvml.EventTypeDoubleBitEccError:
		f.XID, f.Text = xidDoubleBit, "a memory error that could not be corrected"
	}
	return f, f.XID != 0
}
