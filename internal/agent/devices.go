package agent

import (
	"lorayard/internal/gpu"
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
