// Package gpu keeps the books on the devices of one host: what each is, which
// class it counts as, and which attempt holds it. It reads no driver; gpu/nvml
// does.
package gpu

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"sync"

	"lorayard/internal/job"
)

// Device is one GPU or MIG instance as seen at one moment.
type Device struct {
	UUID        string
	Index       int    // as the driver counts; only for people, UUIDs choose
	Name        string // as the driver says
	Class       string // see Classify
	MemoryBytes int64
	Pretend     bool   // no GPU at all: the trainer runs on the CPU
	Fault       string // why it must not be used; empty: fit
	Bus         string // PCI address, see NormalBus; empty: not known
	Node        int    // NUMA node of its slot; -1: not known
}

// Classify gives the class of a device by the driver's name and its memory,
// from the table of package job. A MIG instance and an unknown device get a class of their own, so that
// nobody who asked for a whole known GPU gets one.
func Classify(name string, memoryBytes int64) string {
	words := strings.FieldsFunc(strings.ToLower(name), func(r rune) bool { return r == ' ' || r == '-' || r == '_' })
	gib := memoryBytes >> 30
	if slices.Contains(words, "mig") {
		return fmt.Sprintf("MIG-%dGB", gib)
	}
	for _, c := range job.Classes() {
		if gib >= c.LeastGiB && !slices.ContainsFunc(c.Words, func(w string) bool { return !slices.Contains(words, w) }) {
			return c.Name
		}
	}
	return fmt.Sprintf("%s-%dGB", strings.Join(words, "-"), gib)
}

// Pretend makes n devices of a class that do not exist, for development. Their
// UUIDs follow from host, so a restarted agent has the same ones; the PCI
// addresses, of a domain that no host has, from 1 on.
func Pretend(n int, class, host string) []Device {
	memory := int64(80)
	for _, c := range job.Classes() {
		if c.Name == class {
			memory = int64(c.GB)
		}
	}
	out := make([]Device, n)
	for i := range out {
		h := sha256.Sum256(fmt.Appendf(nil, "lorayard pretend %s %d", host, i))
		out[i] = Device{
			UUID: fmt.Sprintf("GPU-%x-%x-%x-%x-%x", h[:4], h[4:6], h[6:8], h[8:10], h[10:16]), Index: i,
			Name: "pretended " + class, Class: class, MemoryBytes: memory << 30, Pretend: true, Bus: fmt.Sprintf("ffff:%02x:00", i+1), Node: -1,
		}
	}
	return out
}

// Ledger lends devices to attempts. It is safe for concurrent use.
type Ledger struct {
	mu      sync.Mutex
	devices []Device
	lent    map[string]*Reservation // by UUID
}

// Reservation is a set of lent devices.
type Reservation struct{ Devices []string }

// NewLedger starts with every fit device free.
func NewLedger(devices []Device) *Ledger {
	return &Ledger{devices: slices.Clone(devices), lent: map[string]*Reservation{}}
}

// UnavailableError says which devices of a wish cannot be lent, and why.
type UnavailableError struct{ Reasons map[string]string } // UUID → reason

func (e *UnavailableError) Error() string {
	var parts []string
	for uuid, why := range e.Reasons {
		parts = append(parts, uuid+" "+why)
	}
	slices.Sort(parts)
	return "devices not available: " + strings.Join(parts, ", ")
}

// Reserve lends all of uuids or none; the error is an *UnavailableError.
func (l *Ledger) Reserve(uuids []string) (*Reservation, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.reserve(uuids)
}

func (l *Ledger) reserve(uuids []string) (*Reservation, error) {
	bad := map[string]string{}
	seen := map[string]bool{}
	for _, u := range uuids {
		i := slices.IndexFunc(l.devices, func(d Device) bool { return d.UUID == u })
		switch {
		case seen[u]:
			bad[u] = "is asked for twice"
		case i < 0:
			bad[u] = "is not on this host"
		case l.devices[i].Fault != "":
			bad[u] = "is not fit: " + l.devices[i].Fault
		case l.lent[u] != nil:
			bad[u] = "is lent to another attempt"
		}
		seen[u] = true
	}
	if len(bad) > 0 {
		return nil, &UnavailableError{Reasons: bad}
	}
	r := &Reservation{Devices: slices.Clone(uuids)}
	for _, u := range uuids {
		l.lent[u] = r
	}
	return r, nil
}

// Reclaim lends devices to an attempt that had them already: they may have
// become unfit under it.
func (l *Ledger) Reclaim(uuids []string) (*Reservation, error) {
	l.mu.Lock()
	kept := map[string]string{}
	for i := range l.devices {
		if d := &l.devices[i]; slices.Contains(uuids, d.UUID) && d.Fault != "" {
			kept[d.UUID], d.Fault = d.Fault, ""
		}
	}
	r, err := l.reserve(uuids)
	for i := range l.devices {
		if fault, ok := kept[l.devices[i].UUID]; ok {
			l.devices[i].Fault = fault
		}
	}
	l.mu.Unlock()
	return r, err
}

// SetFault says why a device must not be lent any more; empty: it may. Whoever
// has it keeps it.
func (l *Ledger) SetFault(uuid, fault string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range l.devices {
		if l.devices[i].UUID == uuid {
			l.devices[i].Fault = fault
		}
	}
}

// Faults says of every device that is not fit why.
func (l *Ledger) Faults() map[string]string {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[string]string{}
	for _, d := range l.devices {
		if d.Fault != "" {
			out[d.UUID] = d.Fault
		}
	}
	return out
}

// Release takes the devices of r back. Releasing twice changes nothing.
func (l *Ledger) Release(r *Reservation) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, u := range r.Devices {
		if l.lent[u] == r {
			delete(l.lent, u)
		}
	}
}

// Free lists the fit devices that nobody holds.
func (l *Ledger) Free() []Device {
	l.mu.Lock()
	defer l.mu.Unlock()
	var free []Device
	for _, d := range l.devices {
		if d.Fault == "" && l.lent[d.UUID] == nil {
			free = append(free, d)
		}
	}
	return free
}
