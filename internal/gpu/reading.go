package gpu

import (
	"math"
	"time"
)

// Reading is what polls found out about one device, in base units. A number
// that is not known is NaN.
type Reading struct {
	UUID          string
	Lost          bool // the driver says that the device is lost
	ResetRequired bool // the driver refuses to speak to it until it is reset
	Returned      int  // how often it answered again after one of these

	Utilization        float64 // share of the last sampling period in which a kernel ran
	MemoryTotal        float64 // bytes
	MemoryUsed         float64 // without what is reserved
	MemoryReserved     float64 // kept by the driver
	Power              float64 // watts
	Energy             float64 // joules since the driver was loaded
	Temperature        float64 // of the chip, degrees Celsius
	MemoryTemperature  float64
	Recovery           float64 // see Recovery
	ECCCorrected       float64 // errors since the driver was loaded
	ECCUncorrected     float64
	RemapsCorrected    float64 // rows of memory replaced, by the kind of error
	RemapsUncorrected  float64
	RemapPending       float64 // 0 or 1
	RemapFailed        float64
	PCIeReplays        float64
	Throttled          [5]float64 // seconds since the driver was loaded, see Throttles
	Reasons            uint64     // why it is slowed down now, as nvmlClocksEventReason bits
	PowerLimit         float64    // this and what follows: every 15 s
	TemperatureMargin  float64    // degrees until it slows down
	ClockSM, ClockMem  float64    // hertz
	PCIeWidth          float64    // share of the lanes that it could have
	NVLinksUp, NVLinks float64
	NVLinkErrors       [3]float64 // see NVLinkErrorKinds
}

// Throttles are the reasons of Reading.Throttled in its order.
var Throttles = [5]string{"power_cap", "hw_slowdown", "hw_thermal", "power_brake", "sw_thermal"}

// NVLinkErrorKinds are the kinds of Reading.NVLinkErrors in its order.
var NVLinkErrorKinds = [3]string{"crc", "replay", "recovery"}

// BlankReading is a reading in which nothing is known.
func BlankReading(uuid string) Reading {
	n := math.NaN()
	return Reading{
		UUID: uuid, Utilization: n, MemoryTotal: n, MemoryUsed: n, MemoryReserved: n, Power: n, Energy: n, Temperature: n,
		MemoryTemperature: n, Recovery: n, ECCCorrected: n, ECCUncorrected: n, RemapsCorrected: n, RemapsUncorrected: n,
		RemapPending: n, RemapFailed: n, PCIeReplays: n, Throttled: [5]float64{n, n, n, n, n}, PowerLimit: n, TemperatureMargin: n,
		ClockSM: n, ClockMem: n, PCIeWidth: n, NVLinksUp: n, NVLinks: n, NVLinkErrors: [3]float64{n, n, n},
	}
}

// Facts is what the judge wants to know of it. A device that answers again after
// it was lost was reset, as all are when the driver is loaded anew.
func (r Reading) Facts(generation int) Facts {
	f := Facts{Lost: r.Lost, ResetRequired: r.ResetRequired, RemapPending: r.RemapPending > 0, RemapFailed: r.RemapFailed > 0, Generation: generation + r.Returned}
	if !math.IsNaN(r.Recovery) {
		v := Recovery(r.Recovery)
		f.Recovery = &v
	}
	if !math.IsNaN(r.ECCUncorrected) {
		v := uint64(r.ECCUncorrected)
		f.Uncorrectable = &v
	}
	if !math.IsNaN(r.MemoryUsed) {
		v := int64(r.MemoryUsed)
		f.UsedBytes = &v
	}
	return f
}

// Snapshot is the newest reading of every device.
type Snapshot struct {
	At           time.Time // of the readings of every second
	Generation   int       // grows when the driver was loaded anew
	Driver, CUDA string    // versions; empty: not known
	Devices      []Reading // in the order of the inventory
}
