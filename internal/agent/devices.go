package agent

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"lorayard/internal/attempt"
	"lorayard/internal/gpu"
	"lorayard/internal/job"
	"lorayard/internal/store"
)

// Offer is what a dispatcher is told of devices. links, where they are known,
// say how well each is connected to the others, in the same order.
func Offer(devices []gpu.Device, links [][]int) []store.Device {
	out := make([]store.Device, len(devices))
	for i, d := range devices {
		out[i] = store.Device{UUID: d.UUID, Index: d.Index, Name: d.Name, Class: d.Class, MemoryBytes: d.MemoryBytes, Pretend: d.Pretend, Fault: d.Fault, Node: d.Node}
		if len(links) == len(devices) {
			out[i].Links = links[i]
		}
	}
	return out
}

// self is what we say of ourselves, with devices as they stand now.
func (a *Agent) self() store.Agent {
	self, faults := a.Self, a.Ledger.Faults()
	self.Devices = slices.Clone(self.Devices)
	for i := range self.Devices {
		self.Devices[i].Fault = faults[self.Devices[i].UUID]
	}
	return self
}

// watch joins the attempts of this agent to the health of its devices.
func (a *Agent) watch() {
	if a.Health == nil {
		return
	}
	a.Health.Listen(a.lost, a.changed, a.counted)
}

// changed makes a renewal due: the dispatcher must not give us what broke, and
// may give us what is well.
func (a *Agent) changed(c gpu.Change) {
	a.Look()
	a.gauges()
	out := func(s gpu.State) bool { return s == gpu.StateQuarantined || s == gpu.StateMissing }
	switch {
	case out(c.State) && !out(c.Before):
		a.Metrics.Quarantines.WithLabelValues(c.UUID, string(c.Cause)).Inc()
	case !out(c.State) && out(c.Before):
		a.Metrics.Returns.WithLabelValues(c.UUID).Inc()
	}
}

func (a *Agent) counted(f gpu.Fault, x gpu.XID) {
	class := x.Class
	if class == gpu.XIDVerdict {
		class = gpu.XIDInfo
	}
	a.Metrics.XIDs.WithLabelValues(f.UUID, strconv.Itoa(f.XID), string(class), string(f.Origin)).Inc()
	a.Metrics.XIDLast.WithLabelValues(f.UUID, strconv.Itoa(f.XID), string(class)).SetToCurrentTime()
}

// lost ends whatever has a device that is lost.
func (a *Agent) lost(v gpu.Verdict) {
	a.mu.Lock()
	var hit []*held
	for _, h := range a.running {
		if slices.Contains(h.as.Devices, v.UUID) {
			hit = append(hit, h)
		}
	}
	a.mu.Unlock()
	for _, h := range hit {
		h.live.Break(&attempt.DeviceFault{Device: a.called(v.UUID), Reason: v.Reason})
	}
	for _, h := range hit {
		a.Log.Error("attempt ended: its device is lost", "job", h.as.Ref.Job, "attempt", h.as.Ref.Attempt, "device", v.UUID, "xid", v.XID, "err", v.Reason)
	}
}

// called is how people call a device.
func (a *Agent) called(uuid string) string {
	for _, d := range a.Self.Devices {
		if d.UUID == uuid {
			return fmt.Sprintf("GPU %d of %s", d.Index, a.Self.ID)
		}
	}
	return "GPU " + uuid
}

// join tells an attempt about its devices, and their health about the attempt.
func (a *Agent) join(as job.Assignment, live *attempt.Live) {
	live.Devices.Near = a.near(as.Devices)
	if a.Health == nil {
		return
	}
	live.Devices.Check = a.Health.NeedsCheck(as.Devices)
	live.Devices.Checked = func(place int, wrong string) {
		for i, uuid := range as.Devices {
			// Who trains on the processor has looked at that, for all devices that
			// it pretends to have.
			if i == place || a.pretended(uuid) {
				a.Health.Checked(uuid, wrong)
			}
		}
	}
	live.Devices.Doubt = func(why string) { a.Health.Doubt(as.Devices, string(as.Ref.Job), why) }
	live.Devices.Program = func() string { return a.Health.Program(as.Devices, string(as.Ref.Job)) }
	free := live.Free
	live.Free = func() {
		a.Health.Returned(as.Devices)
		free()
	}
	a.Health.Lent(as.Devices, string(as.Ref.Job))
}

func (a *Agent) pretended(uuid string) bool {
	return slices.ContainsFunc(a.Self.Devices, func(d store.Device) bool { return d.UUID == uuid && d.Pretend })
}

// breakLost ends an attempt whose device was lost before it was listed as
// running: nobody could tell it then.
func (a *Agent) breakLost(as job.Assignment, live *attempt.Live) {
	if a.Health == nil {
		return
	}
	for _, uuid := range as.Devices {
		if v := a.Health.Verdict(uuid); v.Fatal && v.Fault() != "" {
			live.Break(&attempt.DeviceFault{Device: a.called(uuid), Reason: v.Reason})
		}
	}
}

// near is where an attempt on these devices runs best, and its share of the
// processors there.
func (a *Agent) near(uuids []string) attempt.Near {
	if a.Places == nil {
		return attempt.Near{}
	}
	p := a.Places.Near(uuids)
	return attempt.Near{CPUs: p.CPUs, Memory: p.Memory, Threads: p.Threads}
}

// DeviceStatus is how one device stands.
type DeviceStatus struct {
	UUID   string    `json:"uuid"`
	Index  int       `json:"index"` // -1: it is not listed any more
	Name   string    `json:"name"`
	State  string    `json:"state"` // see gpu.State
	Reason string    `json:"reason,omitempty"`
	Todo   string    `json:"todo,omitempty"` // what a person has to do
	XID    int       `json:"xid,omitempty"`
	Since  time.Time `json:"since"`
	Check  bool      `json:"check,omitempty"` // the next attempt begins with a sanity check
	Job    string    `json:"job,omitempty"`   // that holds it
}

// Devices is how all devices stand, those that are missing last.
func (a *Agent) Devices() []DeviceStatus {
	holder := map[string]string{}
	a.mu.Lock()
	for ref, h := range a.running {
		for _, uuid := range h.as.Devices {
			holder[uuid] = string(ref.Job)
		}
	}
	a.mu.Unlock()
	faults := a.Ledger.Faults()
	verdicts := map[string]gpu.Verdict{}
	if a.Health != nil {
		for _, v := range a.Health.Verdicts() {
			verdicts[v.UUID] = v
		}
	}
	out := []DeviceStatus{}
	add := func(uuid string, index int, name string) {
		v, known := verdicts[uuid]
		if !known {
			v = gpu.Verdict{UUID: uuid, State: gpu.StateOK}
		}
		delete(verdicts, uuid)
		if v.Fault() == "" && faults[uuid] != "" { // the driver cannot read it, or nothing can run on it
			v.State, v.Reason = gpu.StateQuarantined, faults[uuid]
		}
		out = append(out, DeviceStatus{
			UUID: uuid, Index: index, Name: name, State: string(v.State), Reason: v.Reason, Todo: v.Action.Words(uuid), XID: v.XID, Since: v.Since, Check: v.Check, Job: holder[uuid],
		})
	}
	for _, d := range a.Self.Devices {
		add(d.UUID, d.Index, d.Name)
	}
	for _, uuid := range slices.Sorted(maps.Keys(verdicts)) {
		add(uuid, -1, "")
	}
	return out
}

// lift takes a device out of quarantine by an operator's word.
func (a *Agent) lift(uuid string) error {
	if a.Health == nil {
		return errors.New("this agent does not judge its devices")
	}
	if err := a.Health.Lift(uuid); err != nil {
		return err
	}
	a.Log.Warn("quarantine lifted by hand", "device", uuid)
	return nil
}
