package main

import (
	"bytes"
	"io"
	"regexp"
	"testing"
)

// Nothing is set and nothing is there: each line says so, and none is a warning
// only that keeps jobs from running.
func TestTheDoctorTellsEverythingThatIsMissing(t *testing.T) {
	var out bytes.Buffer
	environ := []string{"DATA_DIR=" + t.TempDir(), "MODELS_DIR=" + t.TempDir(), "PRETEND_GPUS=1"}
	if err := run(t.Context(), []string{"doctor"}, environ, &out, io.Discard); err == nil {
		t.Error("all is well")
	}
	for _, line := range []string{
		`fail +settings +.*DATABASE_URL`, `ok +devices`, `fail +base models`, `fail +trainer`, `fail +Postgres`, `fail +Redis`, `fail +Storage`, `ok +disk`, `(ok|warn) +cgroup`,
	} {
		if !regexp.MustCompile(`(?m)^` + line).Match(out.Bytes()) {
			t.Errorf("no line %s in\n%s", line, out.Bytes())
		}
	}
}
