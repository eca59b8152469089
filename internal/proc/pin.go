//go:build linux

package proc

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// parseList reads a list as the kernel writes it: 0-3,8,10-11.
func parseList(s string, most int) ([]int, error) {
	var out []int
	for part := range strings.SplitSeq(strings.TrimSpace(s), ",") {
		first, last, ranged := strings.Cut(part, "-")
		from, err := strconv.Atoi(first)
		to := from
		if err == nil && ranged {
			to, err = strconv.Atoi(last)
		}
		if err != nil || from < 0 || to < from || to >= most {
			return nil, fmt.Errorf("%q is not a list of numbers below %d", s, most)
		}
		for n := from; n <= to; n++ {
			out = append(out, n)
		}
	}
	return out, nil
}

// pin moves the calling thread, and with it whatever it forks, to processors
// and memory. Memory is preferred and not demanded: a full node must not end a
// training. The thread must be locked.
func pin(cpus, memory string) error {
	if cpus != "" {
		list, err := parseList(cpus, 64*len(unix.CPUSet{}))
		if err != nil {
			return fmt.Errorf("pin to processors: %w", err)
		}
		var set unix.CPUSet
		for _, n := range list {
			set.Set(n)
		}
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			return fmt.Errorf("pin to processors %s: %w", cpus, err)
		}
	}
	if memory != "" {
		const nodes = 1024 // the kernel's limit on any architecture we run on
		list, err := parseList(memory, nodes)
		if err != nil {
			return fmt.Errorf("pin to memory: %w", err)
		}
		var mask [nodes / bits.UintSize]uint
		for _, n := range list {
			mask[n/bits.UintSize] |= 1 << (n % bits.UintSize)
		}
		const preferredMany, preferred = 5, 1 // MPOL_PREFERRED_MANY (Linux 5.15), MPOL_PREFERRED
		mode := uintptr(preferredMany)
		if len(list) == 1 {
			mode = preferred
		}
		if _, _, errno := unix.Syscall(unix.SYS_SET_MEMPOLICY, mode, uintptr(unsafe.Pointer(&mask)), nodes+1); errno != 0 {
			return fmt.Errorf("pin to memory of node %s: %w", memory, errno)
		}
	}
	return nil
}
