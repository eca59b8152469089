package gpu

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Places knows where in the host each device is: which processors and which
// memory are next to it. A trainer on the far side of the host reads its data
// through the link between the sockets.
type Places struct {
	nodes map[string]int // by UUID; those that are not known are not in it
	cpus  map[int]string // by node, as the kernel lists them
	count map[int]int    // processors of a node
	on    map[int]int    // devices of a node
}

// Place is where an attempt on some devices runs best. What is not known is
// empty.
type Place struct {
	CPUs    string // a list as the kernel writes it
	Memory  string // NUMA nodes, in the same form
	Threads int    // a fair share of the processors for each device
}

// FindPlaces reads sysfs at root ("/sys") and gives each device the node of its
// slot, where it was not known.
func FindPlaces(root string, devices []Device) *Places {
	p := &Places{nodes: map[string]int{}, cpus: map[int]string{}, count: map[int]int{}, on: map[int]int{}}
	for i := range devices {
		d := &devices[i]
		if d.Pretend {
			continue
		}
		slot := filepath.Join(root, "bus/pci/devices", d.Bus+".0")
		if d.Node < 0 {
			d.Node = -1
			// A host of one socket says -1.
			if n, err := strconv.Atoi(readLine(filepath.Join(slot, "numa_node"))); err == nil && n >= 0 {
				d.Node = n
			}
		}
		if d.Node < 0 {
			continue
		}
		p.nodes[d.UUID] = d.Node
		p.on[d.Node]++
		list := readLine(filepath.Join(root, "devices/system/node", "node"+strconv.Itoa(d.Node), "cpulist"))
		if list == "" {
			list = readLine(filepath.Join(slot, "local_cpulist"))
		}
		p.cpus[d.Node], p.count[d.Node] = list, countList(list)
	}
	return p
}

func readLine(path string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(raw))
}

// countList counts the numbers of a list such as 0-3,8; 0 when it is none.
func countList(s string) (n int) {
	for part := range strings.SplitSeq(s, ",") {
		first, last, ranged := strings.Cut(part, "-")
		from, err := strconv.Atoi(first)
		to := from
		if err == nil && ranged {
			to, err = strconv.Atoi(last)
		}
		if err != nil || to < from {
			return 0
		}
		n += to - from + 1
	}
	return n
}

// Near is where an attempt on these devices runs best. When the place of one of
// them is not known, it is left to the host.
func (p *Places) Near(uuids []string) Place {
	var nodes []int
	share := 0
	for _, u := range uuids {
		n, known := p.nodes[u]
		if !known || p.count[n] == 0 {
			return Place{}
		}
		if !slices.Contains(nodes, n) {
			nodes = append(nodes, n)
		}
		share += p.count[n] / p.on[n]
	}
	if len(nodes) == 0 {
		return Place{}
	}
	slices.Sort(nodes)
	out := Place{Threads: max(1, share/len(uuids))}
	for i, n := range nodes {
		if i > 0 {
			out.CPUs, out.Memory = out.CPUs+",", out.Memory+","
		}
		out.CPUs, out.Memory = out.CPUs+p.cpus[n], out.Memory+strconv.Itoa(n)
	}
	return out
}
