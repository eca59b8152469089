package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// cpu is CPU time by who took it: on a machine that others use, too, it says
// more than the clock.
type cpu struct{ postgres, redis, self time.Duration }

// spent is what all took since they started.
func (g *ground) spent() (cpu, error) {
	pg, err := spentBy(g.pg.PID())
	if err != nil {
		return cpu{}, err
	}
	redis, err := spentBy(g.redis.PID())
	if err != nil {
		return cpu{}, err
	}
	var own syscall.Rusage // without children: the servers are children of ours
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &own); err != nil {
		return cpu{}, fmt.Errorf("read our own CPU time: %w", err)
	}
	return cpu{pg, redis, time.Duration(own.Utime.Nano() + own.Stime.Nano())}, nil
}

func (c cpu) since(before cpu) cpu {
	return cpu{c.postgres - before.postgres, c.redis - before.redis, c.self - before.self}
}

func (c cpu) all() time.Duration { return c.postgres + c.redis + c.self }

// each says who took how much for one of n.
func (c cpu) each(n int) string {
	per := func(d time.Duration) float64 { return d.Seconds() * 1e3 / float64(n) }
	return fmt.Sprintf("%.2f ms (Postgres %.2f, dispatcher and agents %.2f, Redis %.2f)", per(c.all()), per(c.postgres), per(c.self), per(c.redis))
}

// tick is the kernel's unit in /proc; it has been this for every Linux that Go
// runs on.
const tick = 10 * time.Millisecond

// spentBy is the CPU time of a process, of its children that live, and of those
// that it has seen end.
func spentBy(pid int) (time.Duration, error) {
	sum, err := ticks(filepath.Join("/proc", strconv.Itoa(pid)), 0)
	if err != nil {
		return 0, fmt.Errorf("read the CPU time of process %d: %w", pid, err)
	}
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, fmt.Errorf("list processes: %w", err)
	}
	for _, p := range all {
		if n, err := ticks(p, pid); err == nil { // it may have ended meanwhile
			sum += n
		}
	}
	return time.Duration(sum) * tick, nil
}

// ticks reads /proc/<pid>/stat: user and system time of the process and of its
// children that ended. With parent, 0 for everybody else's children.
func ticks(dir string, parent int) (sum int, err error) {
	raw, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(raw), ") ") // the name may hold spaces
	f := strings.Fields(rest)
	if len(f) < 15 {
		return 0, fmt.Errorf("%s/stat is not as we know it", dir)
	}
	if parent != 0 && f[1] != strconv.Itoa(parent) {
		return 0, nil
	}
	for _, s := range f[11:15] {
		n, err := strconv.Atoi(s)
		if err != nil {
			return 0, fmt.Errorf("%s/stat is not as we know it", dir)
		}
		sum += n
	}
	return sum, nil
}

// descendants lists a process and everything that it started, parents first.
func descendants(pid int) ([]int, error) {
	all, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	children := map[int][]int{}
	for _, path := range all {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := strings.Cut(string(raw), ") ")
		f := strings.Fields(rest)
		child, err1 := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		parent, err2 := strconv.Atoi(f[1])
		if err1 == nil && err2 == nil {
			children[parent] = append(children[parent], child)
		}
	}
	tree := []int{pid}
	for i := 0; i < len(tree); i++ {
		tree = append(tree, children[tree[i]]...)
	}
	return tree, nil
}
