//go:build linux

package proc

import (
	"bytes"
	"errors"
	"os"
	"strconv"
	"syscall"
	"time"
)

// stat is what /proc says of a process.
type stat struct {
	pid, parent, group int
	zombie             bool
}

// children names the processes whose parent is pid, dead ones too.
func children(pid int) []int {
	var pids []int
	eachProcess(func(s stat) {
		if s.parent == pid {
			pids = append(pids, s.pid)
		}
	})
	return pids
}

// awaitGroup returns when no process of the group is alive. A zombie that its
// parent does not reap holds nothing, and is not waited for.
func awaitGroup(group int) {
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		if err := syscall.Kill(-group, 0); errors.Is(err, syscall.ESRCH) {
			return
		}
		alive := false
		eachProcess(func(s stat) { alive = alive || s.group == group && !s.zombie })
		if !alive {
			return
		}
		time.Sleep(pause)
	}
}

// eachProcess calls f for every process that /proc shows; those that end
// meanwhile are left out.
func eachProcess(f func(stat)) {
	dir, err := os.Open("/proc")
	if err != nil {
		return
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		raw, err := os.ReadFile("/proc/" + name + "/stat")
		if err != nil {
			continue
		}
		if s, ok := parseStat(pid, raw); ok {
			f(s)
		}
	}
}

// parseStat reads a line of /proc/<pid>/stat: "pid (name) state parent group
// ...". The name is the process's own choice and may hold spaces and brackets,
// so the fields are counted from its last bracket.
func parseStat(pid int, raw []byte) (stat, bool) {
	fields := bytes.Fields(raw[bytes.LastIndexByte(raw, ')')+1:])
	if len(fields) < 3 {
		return stat{}, false
	}
	parent, err := strconv.Atoi(string(fields[1]))
	if err != nil {
		return stat{}, false
	}
	group, err := strconv.Atoi(string(fields[2]))
	if err != nil {
		return stat{}, false
	}
	state := fields[0][0]
	return stat{pid: pid, parent: parent, group: group, zombie: state == 'Z' || state == 'X'}, true
}
