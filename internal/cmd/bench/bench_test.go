package main

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"lorayard/internal/devstack/services"
)

// The quick variants run, so that the tool does not rot; what they measure is
// nobody's business. What starts real processes is left to `make bench`.
func TestTheTablesAreMadeAndTheInvariantsHold(t *testing.T) {
	var out bytes.Buffer
	err := run(t.Context(), []string{"--quick", "--only", "throughput,handover,storage,trace", "--profile", t.TempDir()}, &out)
	if errors.Is(err, services.ErrMissing) && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	for _, want := range []string{"INSERT to fenced accept", "Throughput: 100 jobs", "Fleet trace: 20 jobs of 2 queues", "baseline (same run)", "CPUs, load"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the tables do not say %q:\n%s", want, out.String())
		}
	}
	if strings.Index(out.String(), "INSERT to") > strings.Index(out.String(), "Throughput") {
		t.Errorf("the tables are not in their own order:\n%s", out.String())
	}
}

func TestAMistypedBenchmarkIsNamed(t *testing.T) {
	err := run(t.Context(), []string{"--only", "handover,nonsense"}, &bytes.Buffer{})
	if err == nil || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("got %v, want an error that names it", err)
	}
}

func TestRealProcessesAreAskedForInWords(t *testing.T) {
	b := benches[1]
	if err := measure(t.Context(), b, &ground{}, options{bin: t.TempDir(), python: "python"}, &bytes.Buffer{}); !b.binaries || err == nil || !strings.Contains(err.Error(), "make bench") {
		t.Errorf("%s without binaries: %v", b.name, err)
	}
}
