package metrics

import (
	"math"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Device is what is known of one device at a moment, in base units. A number
// that is not known is NaN and makes no series; Blank has all of them so.
type Device struct {
	UUID, Name, Class   string
	PCI, Driver, CUDA   string
	Index, NUMA         int    // NUMA node; -1: not known
	Busy                bool   // an attempt holds it
	Health              string // ok, suspect, quarantined, missing or foreign
	Utilization         float64
	MemoryTotal         float64 // bytes
	MemoryUsed          float64 // without what is reserved
	MemoryReserved      float64
	MemoryForeign       float64 // used by processes that are not ours
	Power, PowerLimit   float64 // watts
	Temperature         float64 // degrees Celsius, of the chip
	MemoryTemperature   float64
	TemperatureMargin   float64            // degrees until it slows down
	ClockSM, ClockMem   float64            // hertz
	Energy              float64            // joules, never falling
	Throttled           map[string]float64 // reason → seconds, never falling
	ECCCorrected        float64            // errors, never falling
	ECCUncorrected      float64
	RemapPending        float64 // 0 or 1
	RemapFailed         float64
	RemapsCorrected     float64 // rows remapped, by the kind of error that was the cause
	RemapsUncorrected   float64
	RecoveryAction      float64 // the driver's verdict: 0 none, 1 reset, 2 reboot, ...
	PCIeReplays         float64 // never falling
	PCIeWidth           float64 // share of the lanes that it could have
	NVLinksUp, NVLinksN float64
	NVLinkErrors        map[string]float64 // kind → count, never falling
}

// Blank is a device of which no number is known.
func Blank() Device {
	n := math.NaN()
	return Device{
		NUMA: -1, Health: "ok", Utilization: n, MemoryTotal: n, MemoryUsed: n, MemoryReserved: n, MemoryForeign: n, Power: n, PowerLimit: n,
		Temperature: n, MemoryTemperature: n, TemperatureMargin: n, ClockSM: n, ClockMem: n, Energy: n, ECCCorrected: n, ECCUncorrected: n,
		RemapPending: n, RemapFailed: n, RemapsCorrected: n, RemapsUncorrected: n, RecoveryAction: n, PCIeReplays: n, PCIeWidth: n, NVLinksUp: n, NVLinksN: n,
	}
}

var (
	healths = []string{"ok", "suspect", "quarantined", "missing", "foreign"}
	states  = []string{"busy", "idle", "quarantined", "missing", "foreign"}
)

// state is what a device is good for: one that is held is busy, whatever is
// thought of its health.
func (d Device) state() string {
	switch {
	case d.Busy:
		return "busy"
	case d.Health == "ok" || d.Health == "suspect" || d.Health == "":
		return "idle"
	default:
		return d.Health
	}
}

// stateClock adds up how long devices were in which state.
type stateClock struct {
	last  map[string]string // by device
	at    time.Time
	spent map[string]map[string]float64
}

func newStateClock() *stateClock {
	return &stateClock{last: map[string]string{}, spent: map[string]map[string]float64{}}
}

// tick charges what passed and returns seconds by device and state. A device
// that is not listed any more is charged no more, and its series end.
func (c *stateClock) tick(ds []Device, now time.Time) map[string]map[string]float64 {
	passed := now.Sub(c.at).Seconds()
	out := make(map[string]map[string]float64, len(ds))
	last := make(map[string]string, len(ds))
	for _, d := range ds {
		spent := c.spent[d.UUID]
		if spent == nil {
			spent = make(map[string]float64, len(states))
			for _, s := range states {
				spent[s] = 0
			}
			c.spent[d.UUID] = spent
		}
		if was, known := c.last[d.UUID]; known && passed > 0 {
			spent[was] += passed
		}
		last[d.UUID] = d.state()
		copied := make(map[string]float64, len(spent))
		for s, v := range spent {
			copied[s] = v
		}
		out[d.UUID] = copied
	}
	c.last, c.at = last, now
	return out
}

// readings turns devices into series at each scrape.
type readings struct {
	from  func() ([]Device, map[string]map[string]float64)
	descs []*prometheus.Desc

	info, health, busy, spent                                 *prometheus.Desc
	util, memory, foreign, power, limit, temp, margin, clocks *prometheus.Desc
	energy, throttled, ecc, pending, failed, remaps, action   *prometheus.Desc
	replays, width, links, linkErrors                         *prometheus.Desc
}

func newReadings(s *set, from func() ([]Device, map[string]map[string]float64)) *readings {
	r := &readings{from: from}
	add := func(t Type, name, help string, ls ...dimension) *prometheus.Desc {
		d := s.desc(t, name, help, append([]dimension{gpuUUID}, ls...)...)
		r.descs = append(r.descs, d)
		return d
	}
	r.info = add(Gauge, "lorayard_gpu_info", "1, with what the device is.", label("index"), label("name"), label("class"), label("pci"), label("driver"), label("cuda"), label("numa"))
	r.health = add(Gauge, "lorayard_gpu_health", "1 for the state of health that the device is in.", label("state", healths...))
	r.busy = add(Gauge, "lorayard_gpu_busy", "1 while an attempt holds the device.")
	r.spent = add(Counter, "lorayard_gpu_state_seconds_total", "Time that the device was in a state; all states together are the time since the agent started.", label("state", states...))
	r.util = add(Gauge, "lorayard_gpu_utilization_ratio", "Share of the last sampling period in which a kernel ran.")
	r.memory = add(Gauge, "lorayard_gpu_memory_bytes", "Memory of the device: all of it, used, and kept by the driver.", label("kind", "total", "used", "reserved"))
	r.foreign = add(Gauge, "lorayard_gpu_foreign_memory_bytes", "Memory that processes use which are not ours.")
	r.power = add(Gauge, "lorayard_gpu_power_watts", "Power that the device draws.")
	r.limit = add(Gauge, "lorayard_gpu_power_limit_watts", "Power that it may draw.")
	r.temp = add(Gauge, "lorayard_gpu_temperature_celsius", "Temperature of chip and memory.", label("sensor", "chip", "memory"))
	r.margin = add(Gauge, "lorayard_gpu_temperature_margin_celsius", "Degrees until the device slows down for its heat.")
	r.clocks = add(Gauge, "lorayard_gpu_clock_hertz", "Clocks of the device.", label("domain", "sm", "memory"))
	r.energy = add(Counter, "lorayard_gpu_energy_joules_total", "Energy that the device took; it does not fall when the driver is loaded anew.")
	r.throttled = add(Counter, "lorayard_gpu_throttled_seconds_total", "Time in which the device was slowed down, by reason.",
		label("reason", "power_cap", "hw_slowdown", "hw_thermal", "power_brake", "sw_thermal"))
	r.ecc = add(Counter, "lorayard_gpu_ecc_errors_total", "Memory errors, by whether they were corrected.", label("kind", "corrected", "uncorrected"))
	r.pending = add(Gauge, "lorayard_gpu_row_remap_pending", "1 while a bad row of memory waits for a reset to be replaced.")
	r.failed = add(Gauge, "lorayard_gpu_row_remap_failed", "1 when a bad row of memory could not be replaced.")
	r.remaps = add(Counter, "lorayard_gpu_row_remaps_total", "Rows of memory that were replaced, by the kind of error.", label("cause", "corrected", "uncorrected"))
	r.action = add(Gauge, "lorayard_gpu_recovery_action", "What the driver wants done with the device: 0 nothing, 1 reset, 2 reboot, 3 drain peers, 4 drain and reset.")
	r.replays = add(Counter, "lorayard_gpu_pcie_replays_total", "Transfers over PCIe that were repeated.")
	r.width = add(Gauge, "lorayard_gpu_pcie_width_ratio", "Share of the PCIe lanes that are in use.")
	r.links = add(Gauge, "lorayard_gpu_nvlinks", "NVLinks of the device, by state.", label("state", "up", "down"))
	r.linkErrors = add(Counter, "lorayard_gpu_nvlink_errors_total", "Errors on NVLinks, by kind.", label("kind", "crc", "replay", "recovery"))
	return r
}

// Describe is of prometheus.Collector.
func (r *readings) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range r.descs {
		ch <- d
	}
}

// Collect is of prometheus.Collector.
func (r *readings) Collect(ch chan<- prometheus.Metric) {
	devices, spent := r.from()
	for i := range devices {
		d := &devices[i]
		put := func(t prometheus.ValueType, desc *prometheus.Desc, v float64, ls ...string) {
			if !math.IsNaN(v) {
				ch <- prometheus.MustNewConstMetric(desc, t, v, append([]string{d.UUID}, ls...)...)
			}
		}
		gauge := func(desc *prometheus.Desc, v float64, ls ...string) { put(prometheus.GaugeValue, desc, v, ls...) }
		count := func(desc *prometheus.Desc, v float64, ls ...string) { put(prometheus.CounterValue, desc, v, ls...) }
		numa := ""
		if d.NUMA >= 0 {
			numa = strconv.Itoa(d.NUMA)
		}
		gauge(r.info, 1, strconv.Itoa(d.Index), d.Name, d.Class, d.PCI, d.Driver, d.CUDA, numa)
		for _, h := range healths {
			gauge(r.health, one(d.Health == h), h)
		}
		gauge(r.busy, one(d.Busy))
		for _, s := range states {
			count(r.spent, spent[d.UUID][s], s)
		}
		gauge(r.util, d.Utilization)
		gauge(r.memory, d.MemoryTotal, "total")
		gauge(r.memory, d.MemoryUsed, "used")
		gauge(r.memory, d.MemoryReserved, "reserved")
		gauge(r.foreign, d.MemoryForeign)
		gauge(r.power, d.Power)
		gauge(r.limit, d.PowerLimit)
		gauge(r.temp, d.Temperature, "chip")
		gauge(r.temp, d.MemoryTemperature, "memory")
		gauge(r.margin, d.TemperatureMargin)
		gauge(r.clocks, d.ClockSM, "sm")
		gauge(r.clocks, d.ClockMem, "memory")
		count(r.energy, d.Energy)
		for reason, s := range d.Throttled {
			count(r.throttled, s, reason)
		}
		count(r.ecc, d.ECCCorrected, "corrected")
		count(r.ecc, d.ECCUncorrected, "uncorrected")
		gauge(r.pending, d.RemapPending)
		gauge(r.failed, d.RemapFailed)
		count(r.remaps, d.RemapsCorrected, "corrected")
		count(r.remaps, d.RemapsUncorrected, "uncorrected")
		gauge(r.action, d.RecoveryAction)
		count(r.replays, d.PCIeReplays)
		gauge(r.width, d.PCIeWidth)
		gauge(r.links, d.NVLinksUp, "up")
		gauge(r.links, d.NVLinksN-d.NVLinksUp, "down")
		for kind, n := range d.NVLinkErrors {
			count(r.linkErrors, n, kind)
		}
	}
}

func one(is bool) float64 {
	if is {
		return 1
	}
	return 0
}
