//go:build linux

package proc_test

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"lorayard/internal/proc"
)

// allowed gives the line of a status file that lists its processors.
func allowed(t *testing.T, status string) string {
	t.Helper()
	_, rest, ok := strings.Cut(status, "Cpus_allowed_list:")
	if !ok {
		t.Fatalf("no list in %q", status)
	}
	line, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(line)
}

func TestAChildRunsOnTheProcessorsItWasGiven(t *testing.T) {
	run := func(cpus, memory string) string {
		t.Helper()
		var out bytes.Buffer
		p, err := proc.Start(proc.Cmd{
			Path: "/bin/sh", Args: []string{"-c", "cat /proc/self/status; grep -m1 -o prefer:0 /proc/self/numa_maps || :"}, Stdout: &out,
			Shim: []string{"/proc/self/exe", "shim"}, CPUs: cpus, Memory: memory,
		})
		if err != nil {
			t.Fatal(err)
		}
		if exit, err := p.Wait(); err != nil || exit.Code != 0 {
			t.Fatalf("%v, %v", exit, err)
		}
		return out.String()
	}
	ours, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	before := allowed(t, string(ours))
	one, _, _ := strings.Cut(before, ",")
	one, _, _ = strings.Cut(one, "-") // the first processor that this test may use
	if got := run(one, "0"); allowed(t, got) != one {
		t.Errorf("runs on %s, want %s", allowed(t, got), one)
	} else if _, err := os.Stat("/proc/self/numa_maps"); err == nil && !strings.Contains(got, "prefer:0") {
		t.Error("its memory is not of the node that it was given")
	}
	// What there is not, and what is no list, is left.
	for _, cpus := range []string{"1023", "0-", "3-1", "x"} {
		if got := allowed(t, run(cpus, "")); got != before {
			t.Errorf("with %q it runs on %s, want %s", cpus, got, before)
		}
	}
	if ours, err = os.ReadFile("/proc/self/status"); err != nil || allowed(t, string(ours)) != before {
		t.Error("the agent itself was moved")
	}
}
