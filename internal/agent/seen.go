package agent

import (
	"slices"
	"strings"

	"lorayard/internal/metrics"
)

// What operators see of an agent, made at each scrape of what it knows anyway.

// Readings tells of each device what it is, who holds it and how it is.
func (a *Agent) Readings() []metrics.Device {
	stands := map[string]DeviceStatus{}
	for _, d := range a.Devices() {
		stands[d.UUID] = d
	}
	out := make([]metrics.Device, len(a.Self.Devices))
	for i, d := range a.Self.Devices {
		out[i] = metrics.Blank()
		r := &out[i]
		r.UUID, r.Name, r.Class, r.Index, r.Busy, r.MemoryTotal = d.UUID, d.Name, d.Class, d.Index, stands[d.UUID].Job != "", float64(d.MemoryBytes)
		r.Health = stands[d.UUID].State
		if a.Reading != nil {
			a.Reading(r)
		}
	}
	return out
}

// Standings tells of each attempt under way how it stands.
func (a *Agent) Standings() []metrics.Job {
	a.mu.Lock()
	held := make([]*held, 0, len(a.running))
	for _, h := range a.running {
		held = append(held, h)
	}
	a.mu.Unlock()
	out := make([]metrics.Job, len(held))
	for i, h := range held {
		s := h.live.Standing()
		out[i] = metrics.Job{
			ID: string(h.as.Ref.Job), Attempt: h.as.Ref.Attempt, Devices: h.as.Devices, Class: a.classOf(h.as.Devices), BaseModel: h.as.Spec.BaseModel,
			Stage: string(s.Stage), Step: s.Step, Steps: s.Steps, Loss: s.Loss, TokensPerSecond: s.TokensPerSecond, Saved: s.Saved, Started: h.started,
			SpoolRecords: s.SpoolRecords, SpoolBytes: s.SpoolBytes, SpoolOldest: s.SpoolOldest,
		}
	}
	slices.SortFunc(out, func(a, b metrics.Job) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// classOf is the class of an attempt's devices, which is one.
func (a *Agent) classOf(devices []string) string {
	for _, d := range a.Self.Devices {
		if slices.Contains(devices, d.UUID) {
			return d.Class
		}
	}
	return ""
}
