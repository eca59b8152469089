//go:build linux

package proc

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// cgroupRemoveLimit is how long a group whose last process was reaped may
// still be busy in the kernel.
const cgroupRemoveLimit = time.Second

// cgroup is a control group of our own for one child. Whatever the child
// starts is born in it, and the kernel kills all of it in one step in which
// nobody can fork (cgroup.kill, Linux 5.14).
type cgroup struct {
	path string
	dir  *os.File
}

// newCgroup makes a group below our own. It fails where the hierarchy is not
// ours to write: without delegation, in most containers, on version 1.
func newCgroup() (*cgroup, error) {
	parent, err := ownCgroup()
	if err != nil {
		return nil, err
	}
	// With the start time nobody else will ever have the name: whoever finds it
	// in the files of a killed shim may kill what is in it.
	self, _ := statOf(os.Getpid())
	g := &cgroup{path: filepath.Join(parent, fmt.Sprintf("child-%d-%d", self.pid, self.start))}
	if err := os.Mkdir(g.path, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	if _, err := os.Stat(filepath.Join(g.path, "cgroup.kill")); err != nil {
		_ = os.Remove(g.path)
		return nil, fmt.Errorf("kernel too old: %w", err)
	}
	if g.dir, err = os.Open(g.path); err != nil {
		_ = os.Remove(g.path)
		return nil, fmt.Errorf("open cgroup: %w", err)
	}
	return g, nil
}

// ownCgroup is the directory of the version 2 group that we are in.
func ownCgroup() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	groups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(groups)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return cgroupDir(string(mounts), path)
		}
	}
	return "", errors.New("no cgroup version 2")
}

// cgroupDir finds where path of the hierarchy is mounted: "id parent major:minor
// root mountpoint options... - type source superoptions" is a line of mountinfo.
func cgroupDir(mountinfo, path string) (string, error) {
	for line := range strings.Lines(mountinfo) {
		before, after, _ := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		if len(fields) < 5 || !strings.HasPrefix(after, "cgroup2 ") {
			continue
		}
		if rel, err := filepath.Rel(fields[3], path); err == nil && filepath.IsLocal(rel) {
			return filepath.Join(fields[4], rel), nil
		}
	}
	return "", errors.New("no cgroup version 2 is mounted")
}

// name is the group's directory; empty for no group.
func (g *cgroup) name() string {
	if g == nil {
		return ""
	}
	return g.path
}

// kill ends every process in the group.
func (g *cgroup) kill() { killCgroup(g.path) }

func killCgroup(path string) {
	// It may be gone, which is what we want.
	_ = os.WriteFile(filepath.Join(path, "cgroup.kill"), []byte("1"), 0)
}

// remove gives the group up; its processes must be dead.
func (g *cgroup) remove() {
	_ = g.dir.Close()
	removeCgroup(g.path)
}

func removeCgroup(path string) {
	for end := time.Now().Add(cgroupRemoveLimit); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if err := syscall.Rmdir(path); !errors.Is(err, syscall.EBUSY) {
			return
		}
	}
}
