package gpu

import (
	"fmt"
	"slices"
	"strings"
)

// Detail is what takes longer to read and seldom changes. It is read before a
// device is lent. What is not known is nil.
type Detail struct {
	UUID        string    `json:"uuid"`
	Persistence *bool     `json:"persistence,omitempty"`  // the driver stays loaded while nobody uses the device
	ComputeMode *int      `json:"compute_mode,omitempty"` // as nvmlComputeMode_t
	ECC         *Mode     `json:"ecc,omitempty"`
	MIG         *Mode     `json:"mig,omitempty"`
	Rows        *Rows     `json:"rows,omitempty"`
	InfoROM     *bool     `json:"inforom,omitempty"`   // its checksum is right
	SRAMWorn    *bool     `json:"sram_worn,omitempty"` // more errors in SRAM than the vendor allows
	Fabric      *Fabric   `json:"fabric,omitempty"`    // nil: the device needs none
	PCIe        *[2]int   `json:"pcie_gen,omitempty"`  // generation now, which is lower when idle, and at most
	Processes   []Process `json:"processes,omitempty"` // that have a context on it
	ProcessesOK bool      `json:"processes_known"`     // Processes could be read
}

// Mode is a switch that only a reset moves.
type Mode struct {
	Now  bool `json:"now"`
	Next bool `json:"next"` // after a reset
}

// Rows counts banks of memory by how many spare rows each has left.
type Rows struct {
	Max     int `json:"max"`
	High    int `json:"high"`
	Partial int `json:"partial"`
	Low     int `json:"low"`
	None    int `json:"none"`
}

// Fabric is how a device stands on an NVSwitch fabric.
type Fabric struct {
	Ready    bool `json:"ready"` // it may speak to its peers
	Degraded bool `json:"degraded"`
}

// Process is one that uses a device. A driver does not always tell numbers of
// processes as the agent sees them.
type Process struct {
	PID   int   `json:"pid"`
	Bytes int64 `json:"bytes"` // -1: not known
}

const computeProhibited = 2

// Problem says why nothing can run on the device, with what to do; empty: it
// can.
func (d Detail) Problem() string {
	switch {
	case d.ComputeMode != nil && *d.ComputeMode == computeProhibited:
		return "its compute mode is prohibited: set it to default (nvidia-smi -c 0 -i " + d.UUID + ")"
	case d.MIG != nil && d.MIG.Now != d.MIG.Next:
		return "its MIG mode changes at the next reset: " + ActionReset.Words(d.UUID)
	case d.ECC != nil && d.ECC.Now != d.ECC.Next:
		return "its ECC mode changes at the next reset: " + ActionReset.Words(d.UUID)
	case d.Rows != nil && d.Rows.None > 0:
		return fmt.Sprintf("%d banks of its memory have no spare row left: have it replaced", d.Rows.None)
	case d.SRAMWorn != nil && *d.SRAMWorn:
		return "it had more SRAM errors than the vendor allows: have it replaced"
	}
	return ""
}

// Remarks are what a person should know and nothing depends on.
func (d Detail) Remarks() (out []string) {
	if d.Persistence != nil && !*d.Persistence {
		out = append(out, "persistence mode is off: every job begins slowly (nvidia-smi -pm 1)")
	}
	if d.InfoROM != nil && !*d.InfoROM {
		out = append(out, "its InfoROM is damaged")
	}
	if d.ECC != nil && !d.ECC.Now {
		out = append(out, "ECC is off: memory errors go unseen")
	}
	if d.Fabric != nil && !d.Fabric.Ready {
		out = append(out, "it has no place on the NVLink fabric: jobs on several devices will fail (is nvidia-fabricmanager running?)")
	}
	if d.Fabric != nil && d.Fabric.Degraded {
		out = append(out, "its NVLink fabric is degraded")
	}
	return out
}

// GangProblem says why devices cannot work together; empty: they can.
func GangProblem(ds []Detail) string {
	var bad []string
	for _, d := range ds {
		if d.Fabric != nil && !d.Fabric.Ready {
			bad = append(bad, d.UUID)
		}
	}
	if len(ds) < 2 || len(bad) == 0 {
		return ""
	}
	slices.Sort(bad)
	return "not on the NVLink fabric: " + strings.Join(bad, ", ") + " (is nvidia-fabricmanager running?)"
}
