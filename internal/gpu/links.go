package gpu

// Path is the way between two devices over PCIe, as the driver tells it
// (nvmlGpuTopologyLevel_t): the smaller, the shorter.
type Path int

// The driver's numbers.
const (
	PathBoard    Path = 0  // two chips of one board
	PathSwitch   Path = 10 // one PCIe switch
	PathSwitches Path = 20 // several switches, no host bridge
	PathBridge   Path = 30 // one host bridge
	PathNode     Path = 40 // one NUMA node
	PathSystem   Path = 50 // the link between the sockets
	PathUnknown  Path = -1
)

// Wire is one NVLink of a device that is up.
type Wire struct {
	Switch bool   // it ends in an NVSwitch: from there it reaches every device that does as well
	Remote string // else the PCI address of the device at its other end, see NormalBus
}

// wireWeight is what one NVLink weighs against PCIe: all paths of a host
// together weigh less, so that the number of NVLinks decides first.
const wireWeight = 10_000

// Links says how well each two devices of a host are connected, for placement:
// larger is better, symmetric. wires are the NVLinks of each device, path tells
// the way over PCIe between two; nil: nothing is known of that.
func Links(devices []Device, wires [][]Wire, path func(i, j int) Path) [][]int {
	n := len(devices)
	out := make([][]int, n)
	for i := range out {
		out[i] = make([]int, n)
	}
	for i := range n {
		for j := range i {
			w := 0
			if i < len(wires) && j < len(wires) {
				w = wireWeight * between(devices[i].Bus, wires[i], devices[j].Bus, wires[j])
			}
			if path != nil {
				if p := path(i, j); p >= PathBoard && p <= PathSystem {
					w += 60 - int(p)
				}
			}
			out[i][j], out[j][i] = w, w
		}
	}
	return out
}

// between counts the NVLinks that two devices can use together. A link is up
// when both ends say so; behind switches, the device with fewer links is the
// narrow place.
func between(busA string, a []Wire, busB string, b []Wire) int {
	direct := min(count(a, Wire{Remote: busB}), count(b, Wire{Remote: busA}))
	return direct + min(count(a, Wire{Switch: true}), count(b, Wire{Switch: true}))
}

func count(wires []Wire, like Wire) (n int) {
	for _, w := range wires {
		if w.Switch && like.Switch || !w.Switch && !like.Switch && like.Remote != "" && NormalBus(w.Remote) == like.Remote {
			n++
		}
	}
	return n
}
