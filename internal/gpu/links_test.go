package gpu_test

import (
	"fmt"
	"testing"

	"lorayard/internal/gpu"
)

func slots(n int) []gpu.Device {
	out := make([]gpu.Device, n)
	for i := range out {
		out[i] = gpu.Device{UUID: fmt.Sprint(i), Bus: fmt.Sprintf("0000:%02x:00", i+1)}
	}
	return out
}

func TestLinksOfHostsThatAreSold(t *testing.T) {
	// A board of eight behind switches: all are linked equally well, as far as
	// they have links at all.
	devices := slots(8)
	wires := make([][]gpu.Wire, 8)
	for i := range wires {
		for range 18 {
			wires[i] = append(wires[i], gpu.Wire{Switch: true})
		}
	}
	wires[5] = wires[5][:9] // half of them are down
	sockets := func(i, j int) gpu.Path {
		if i/4 == j/4 {
			return gpu.PathNode
		}
		return gpu.PathSystem
	}
	l := gpu.Links(devices, wires, sockets)
	if l[0][1] != 180_020 || l[0][7] != 180_010 || l[5][6] != 90_020 || l[0][0] != 0 {
		t.Errorf("behind switches: %v", l)
	}

	// A cube of two bridges and single links, as the driver writes addresses.
	devices = slots(4)
	to := func(js ...int) (out []gpu.Wire) {
		for _, j := range js {
			out = append(out, gpu.Wire{Remote: fmt.Sprintf("00000000:%02X:00.0", j+1)})
		}
		return out
	}
	l = gpu.Links(devices, [][]gpu.Wire{to(1, 1, 2), to(0, 0, 3), to(0, 3), to(1, 2)}, nil)
	for pair, want := range map[[2]int]int{{0, 1}: 20_000, {0, 2}: 10_000, {0, 3}: 0, {2, 3}: 10_000, {1, 3}: 10_000, {1, 2}: 0} {
		if l[pair[0]][pair[1]] != want || l[pair[1]][pair[0]] != want {
			t.Errorf("%v: %d, want %d", pair, l[pair[0]][pair[1]], want)
		}
	}
	// What one end says is up and the other not, is not.
	if l = gpu.Links(devices[:2], [][]gpu.Wire{to(1, 1), to(0)}, nil); l[0][1] != 10_000 {
		t.Errorf("half a link counts: %v", l)
	}

	// No NVLink: the shorter way.
	paths := []gpu.Path{gpu.PathUnknown, gpu.PathSystem, gpu.PathNode, gpu.PathBridge, gpu.PathSwitches, gpu.PathSwitch, gpu.PathBoard}
	last := -1
	for _, p := range paths {
		l = gpu.Links(devices[:2], nil, func(int, int) gpu.Path { return p })
		if l[0][1] <= last {
			t.Errorf("path %d weighs %d, no more than the longer one", p, l[0][1])
		}
		last = l[0][1]
	}
	// All paths of the largest host weigh less than one NVLink.
	if l[0][1]*16*15/2 >= 10_000 {
		t.Errorf("PCIe may decide over NVLink: %d", l[0][1])
	}
}
