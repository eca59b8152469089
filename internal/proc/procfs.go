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
	pid, parent, group, session int
	start                       uint64 // clock ticks after the machine started
	zombie                      bool
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
		if s, ok := statOf(pid); ok {
			f(s)
		}
	}
}

// statOf reads about one process; a zombie is one too.
func statOf(pid int) (stat, bool) {
	raw, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return stat{}, false
	}
	return parseStat(pid, raw)
}

// parseStat reads a line of /proc/<pid>/stat: "pid (name) state parent group
// session ...", the start time is field 22. The name is the process's own
// choice and may hold spaces and brackets, so the fields are counted from its
// last bracket.
func parseStat(pid int, raw []byte) (stat, bool) {
	fields := bytes.Fields(raw[bytes.LastIndexByte(raw, ')')+1:])
	if len(fields) < 20 {
		return stat{}, false
	}
	s := stat{pid: pid, zombie: fields[0][0] == 'Z' || fields[0][0] == 'X'}
	var errs [4]error
	s.parent, errs[0] = strconv.Atoi(string(fields[1]))
	s.group, errs[1] = strconv.Atoi(string(fields[2]))
	s.session, errs[2] = strconv.Atoi(string(fields[3]))
	s.start, errs[3] = strconv.ParseUint(string(fields[19]), 10, 64)
	return s, errors.Join(errs[:]...) == nil
}
