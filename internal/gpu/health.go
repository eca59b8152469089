package gpu

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// memoryFile is what is known of the devices, in the data directory.
const memoryFile = "devices.json"

// HealthConfig is what a Health is made of.
type HealthConfig struct {
	Dir     string // the data directory; empty: nothing outlives the process
	Boot    string // names the run of the host's kernel, see BootID
	Devices []Device
	Ledger  *Ledger
	Log     *slog.Logger
	// Now tells the time; nil: time.Now.
	Now func() time.Time
}

// Health keeps the devices of a host: it hears all sources, asks the judge, and
// carries its verdicts out, in this order: end what is lost, lend no more,
// write it down. It is safe for concurrent use.
type Health struct {
	HealthConfig

	lost    func(Verdict)
	changed func(Change)
	counted func(Fault, XID)

	mu      sync.Mutex // of the judge, and of the order of what follows from it
	judge   *Judge
	buses   map[string]string // UUIDs by PCI address
	strange map[string]bool   // addresses that the kernel log spoke of in vain
	unread  map[string]string // why the driver lets nothing run on a device: no verdict takes it back, see Unfit

	// A disk may be slow; nobody who ends a job waits for it.
	disk    sync.Mutex
	written string
	failing bool // the last write failed, and it was said
}

// BootID names the run of the host's kernel, empty when it is not told.
func BootID() string {
	raw, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(raw))
}

// OpenHealth begins with what an earlier process knew, and takes what is not
// fit out of the ledger.
func OpenHealth(c HealthConfig) (*Health, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	h := &Health{HealthConfig: c, buses: map[string]string{}, strange: map[string]bool{}, unread: map[string]string{}}
	var saved []byte
	if c.Dir != "" {
		var err error
		if saved, err = os.ReadFile(filepath.Join(c.Dir, memoryFile)); err != nil && !os.IsNotExist(err) {
			return nil, fmt.Errorf("read what is known of the devices: %w", err)
		}
	}
	var err error
	if h.judge, err = NewJudge(c.Boot, saved); err != nil {
		// Every device begins with a check then.
		c.Log.Error("what was known of the devices is lost", "err", err)
	}
	var uuids []string
	for _, d := range c.Devices {
		if bus := NormalBus(d.Bus); bus != "" {
			h.buses[bus] = d.UUID
		}
		if d.Fault != "" {
			h.unread[d.UUID] = d.Fault
			continue
		}
		uuids = append(uuids, d.UUID)
	}
	h.decide(func(j *Judge, now time.Time) { j.Inventory(now, uuids) })
	h.write()
	for _, d := range c.Devices {
		h.offer(h.Verdict(d.UUID))
	}
	return h, nil
}

// Remembered is what an agent that used a data directory thought of its
// devices, those that it listed and that are not there any more included.
func Remembered(dir string) []Verdict {
	saved, err := os.ReadFile(filepath.Join(dir, memoryFile))
	if err != nil {
		return nil
	}
	j, err := NewJudge(BootID(), saved)
	if err != nil {
		return nil
	}
	return j.Verdicts()
}

// Listen has lost called first of all when whatever runs on a device is lost,
// changed for every change of a verdict, and counted for every new fault. lost
// is called while nobody else is heard: it may not wait, and ask nothing back.
func (h *Health) Listen(lost func(Verdict), changed func(Change), counted func(Fault, XID)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lost, h.changed, h.counted = lost, changed, counted
}

// Run hears the kernel log at path, and judges what time alone makes due, until
// ctx ends. Without a path only the other sources speak.
func (h *Health) Run(ctx context.Context, path string) {
	var wg sync.WaitGroup
	defer wg.Wait()
	if path != "" {
		wg.Go(func() {
			if err := FollowKernelLog(ctx, path, h.Kernel); err != nil {
				h.Log.WarnContext(ctx, "the kernel log cannot be read: a GPU that falls off the bus is noticed later, by the driver's answers; let the agent read it (CAP_SYSLOG, or group adm)", "err", err)
			}
		})
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	defer h.write()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			h.decide(func(j *Judge, now time.Time) { j.Tick(now) })
			h.write()
		}
	}
}

// do asks the judge, carries out what changed, and writes it down. What changes
// nothing, as errors of programs do by the thousand, is written by Run.
func (h *Health) do(ask func(*Judge, time.Time)) {
	if h.decide(ask) {
		h.write()
	}
}

// decide is do without the writing; it reports whether anything changed.
func (h *Health) decide(ask func(*Judge, time.Time)) bool {
	changes, changed := h.carryOut(ask)
	if changed != nil {
		for _, c := range changes {
			changed(c)
		}
	}
	return len(changes) > 0
}

func (h *Health) carryOut(ask func(*Judge, time.Time)) ([]Change, func(Change)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	ask(h.judge, h.Now())
	changes := h.judge.Changes()
	for _, c := range changes {
		if c.Lost && h.lost != nil {
			h.lost(c.Verdict)
		}
	}
	for _, c := range changes {
		h.offer(c.Verdict)
		switch {
		case c.State == StateOK:
			h.Log.Info("device is well", "device", c.UUID, "before", c.Before)
		case c.State == StateQuarantined || c.State == StateMissing:
			h.Log.Error("device is out of use", "device", c.UUID, "state", c.State, "xid", c.XID, "err", c.Verdict.Fault())
		default:
			h.Log.Warn("device is looked at", "device", c.UUID, "state", c.State, "xid", c.XID, "err", c.Reason)
		}
	}
	return changes, h.changed
}

// offer lends a device or does not, as its verdict is.
func (h *Health) offer(v Verdict) {
	fault := v.Fault()
	if fault == "" {
		fault = h.unread[v.UUID]
	}
	h.Ledger.SetFault(v.UUID, fault)
}

// write saves what is known, if it is news.
func (h *Health) write() {
	if h.Dir == "" {
		return
	}
	h.disk.Lock()
	defer h.disk.Unlock()
	h.mu.Lock()
	if !h.judge.News() && !h.failing {
		h.mu.Unlock()
		return
	}
	raw, err := h.judge.Save()
	h.mu.Unlock()
	if err == nil && string(raw) == h.written {
		return
	}
	if err == nil {
		err = replaceFile(filepath.Join(h.Dir, memoryFile), raw)
	}
	if err != nil {
		if !h.failing {
			h.Log.Error("what is known of the devices is not written down: after a restart of the agent a bad one would be used", "err", err)
		}
		h.failing = true
		return
	}
	h.written, h.failing = string(raw), false
}

// replaceFile writes a file that survives a crash of the host whole, old or new.
func replaceFile(path string, raw []byte) error {
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(raw)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	return err
}

// Fault hears an error of a device.
func (h *Health) Fault(f Fault) {
	fresh := false
	var counted func(Fault, XID)
	h.do(func(j *Judge, now time.Time) { fresh, counted = j.Fault(now, f), h.counted })
	if fresh {
		x := LookUp(f.XID)
		h.Log.Warn("the driver reports an error", "device", f.UUID, "xid", f.XID, "class", x.Class, "origin", f.Origin, "text", f.Text)
		if counted != nil {
			counted(f, x)
		}
	}
}

// Kernel hears a line of the kernel log.
func (h *Health) Kernel(l KernelLine) {
	h.mu.Lock()
	uuid := h.buses[l.Bus]
	if l.UUID != "" && uuid == "" && slices.ContainsFunc(h.Devices, func(d Device) bool { return d.UUID == l.UUID }) {
		uuid, h.buses[l.Bus] = l.UUID, l.UUID
	}
	first := uuid == "" && l.XID != 0 && !h.strange[l.Bus]
	if first {
		h.strange[l.Bus] = true
	}
	h.mu.Unlock()
	switch {
	case first:
		h.Log.Warn("the kernel log tells of a device that is not ours to use", "bus", l.Bus, "xid", l.XID, "text", l.Text)
	case uuid != "" && l.XID != 0:
		h.Fault(Fault{UUID: uuid, XID: l.XID, Origin: FromKernel, Text: l.Text, NonFatal: l.Link && !l.LinkFatal})
	}
}

// Facts hears what a poll found out about a device.
func (h *Health) Facts(uuid string, f Facts) {
	h.do(func(j *Judge, now time.Time) { j.Facts(now, uuid, f) })
}

// Unfit hears why a device can run nothing though nothing is wrong with it, or,
// when why is empty, that it can again.
func (h *Health) Unfit(uuid, why string) {
	h.mu.Lock()
	if h.unread[uuid] == why {
		h.mu.Unlock()
		return
	}
	if why == "" {
		delete(h.unread, uuid)
		h.Log.Info("device can be used again", "device", uuid)
	} else {
		h.unread[uuid] = why
		h.Log.Error("device cannot be used", "device", uuid, "err", why)
	}
	v, changed := h.judge.Verdict(uuid), h.changed
	h.offer(v)
	h.mu.Unlock()
	if changed != nil {
		changed(Change{Verdict: v, Before: v.State})
	}
}

// Lent hears that a job has devices.
func (h *Health) Lent(uuids []string, job string) {
	h.do(func(j *Judge, _ time.Time) {
		for _, u := range uuids {
			j.Lent(u, job, len(uuids))
		}
	})
}

// Returned hears that devices are free.
func (h *Health) Returned(uuids []string) {
	h.do(func(j *Judge, now time.Time) {
		for _, u := range uuids {
			j.Returned(now, u)
		}
	})
}

// Checked hears how the sanity check on a device went; wrong is empty when all
// was well.
func (h *Health) Checked(uuid, wrong string) {
	h.decide(func(j *Judge, now time.Time) { j.Checked(now, uuid, wrong) })
	h.write()
}

// Doubt hears that a trainer blamed its devices.
func (h *Health) Doubt(uuids []string, job, why string) {
	h.do(func(j *Judge, now time.Time) {
		for _, u := range uuids {
			j.Doubt(now, u, job, why)
		}
	})
}

// Program says which error of its own program a job has just had on one of these
// devices; empty: none that no device is to blame for.
func (h *Health) Program(uuids []string, job string) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, u := range uuids {
		if said := h.judge.Program(h.Now(), u, job); said != "" {
			return said
		}
	}
	return ""
}

// Lift is an operator's word that a device may be used again.
func (h *Health) Lift(uuid string) error {
	var err error
	h.do(func(j *Judge, now time.Time) { err = j.Lift(now, uuid) })
	return err
}

// Verdict is how a device stands.
func (h *Health) Verdict(uuid string) Verdict {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.judge.Verdict(uuid)
}

// Verdicts is how all devices stand, by UUID; those that are missing as well.
func (h *Health) Verdicts() []Verdict {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.judge.Verdicts()
}

// NeedsCheck reports whether an attempt on these devices begins with a check.
func (h *Health) NeedsCheck(uuids []string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.ContainsFunc(uuids, func(u string) bool { return h.judge.Verdict(u).Check })
}
