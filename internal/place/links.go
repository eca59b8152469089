package place

import (
	"math/bits"
	"slices"
)

// exactly is how many devices choose tries all sets of. 16 is the largest host
// that is sold (two baseboards of 8); half of 16 are 12,870 sets.
const exactly = 16

// choose picks k of the devices that are eligible: those with the best links
// among each other, then those that leave the best links among the rest, then
// those on the fewest NUMA nodes, then the first by UUID.
func (p *pool) choose(k int, eligible func(*device) bool) []*device {
	var from []*device
	for _, d := range p.devices {
		if eligible(d) {
			from = append(from, d)
		}
	}
	apart := slices.ContainsFunc(from, func(d *device) bool { return d.node != from[0].node })
	if k == len(from) || p.links == nil && !apart {
		return from[:k]
	}
	weight := func(_, _ *device) int { return 0 }
	if p.links != nil {
		weight = func(a, b *device) int { return p.links[a.at][b.at] }
	}
	sums := make([]int, len(from)) // of each device's links to the others
	even := true
	for i, a := range from {
		for j, b := range from {
			if i != j {
				sums[i] += weight(a, b)
				even = even && weight(a, b) == weight(from[0], from[1])
			}
		}
	}
	switch {
	case even && !apart:
		return from[:k]
	case len(from) > exactly:
		return peel(from, k, weight, sums)
	}
	// The rest's links are all links less those of the chosen to anybody, and
	// the total does not change: the less the chosen were linked to the rest,
	// the better.
	var best uint32
	most, lost, over := 0, 0, 0
	nodes := nodesOf(from)
	for set, end := uint32(1)<<k-1, uint32(1)<<len(from); set < end; set = following(set) {
		inside, all := 0, 0
		for m := set; m != 0; m &= m - 1 {
			i := bits.TrailingZeros32(m)
			all += sums[i]
			for o := m & (m - 1); o != 0; o &= o - 1 {
				inside += weight(from[i], from[bits.TrailingZeros32(o)])
			}
		}
		if best != 0 && (inside < most || inside == most && all > lost) {
			continue
		}
		if n := spread(nodes, set); best == 0 || inside > most || all < lost || n < over {
			best, most, lost, over = set, inside, all, n
		}
	}
	var out []*device
	for i, d := range from {
		if best&(1<<i) != 0 {
			out = append(out, d)
		}
	}
	return out
}

// nodesOf gives the devices of each NUMA node as a set.
func nodesOf(from []*device) []uint32 {
	at := map[int]int{}
	var sets []uint32
	for i, d := range from {
		n, known := at[d.node]
		if !known {
			n = len(sets)
			at[d.node] = n
			sets = append(sets, 0)
		}
		sets[n] |= 1 << i
	}
	return sets
}

// spread is on how many nodes a set is.
func spread(nodes []uint32, set uint32) (n int) {
	for _, node := range nodes {
		if node&set != 0 {
			n++
		}
	}
	return n
}

// following is the next larger number with as many bits (Gosper's hack).
func following(set uint32) uint32 {
	low := set & -set
	up := set + low
	return up | (set^up)>>2/low
}

// peel takes away the worst linked device until k are left: near enough for
// hosts larger than any that is sold. One alone is the worst linked, so that
// the rest stays well linked.
func peel(from []*device, k int, weight func(a, b *device) int, sums []int) []*device {
	worst := func() int {
		w := len(sums) - 1
		for i := w - 1; i >= 0; i-- {
			if sums[i] < sums[w] {
				w = i
			}
		}
		return w
	}
	if k == 1 {
		w := worst()
		return from[w : w+1]
	}
	left := slices.Clone(from)
	for len(left) > k {
		w := worst()
		for i := range left {
			if i != w {
				sums[i] -= weight(left[i], left[w])
			}
		}
		left = slices.Delete(left, w, w+1)
		sums = slices.Delete(sums, w, w+1)
	}
	return left
}
