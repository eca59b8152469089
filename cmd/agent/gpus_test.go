package main

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"lorayard/internal/gpu"
	"lorayard/internal/gpu/fakenvml"
)

// The tables that people read, of a host whose driver is a stand-in and on which
// no agent runs.
func TestPeopleSeeTheGPUs(t *testing.T) {
	dir := t.TempDir()
	library, err := fakenvml.Build(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	host, err := fakenvml.New(filepath.Join(dir, "state"), 4)
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	t.Setenv(fakenvml.StateEnv, host.Path)
	host.Busy(0, 87, 612, 70)
	host.Prohibit(1, true)
	host.UsedBy(2, os.Getpid())

	// What an agent that is gone thought of the last one.
	devices := []gpu.Device{{UUID: host.UUID(3)}}
	health, err := gpu.OpenHealth(gpu.HealthConfig{Dir: dir, Boot: gpu.BootID(), Devices: devices, Ledger: gpu.NewLedger(devices), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	health.Fault(gpu.Fault{UUID: host.UUID(3), XID: 119, Origin: gpu.FromKernel})

	environ := []string{"DATA_DIR=" + dir, "GPU_LIBRARY=" + library}
	out := func(args ...string) string {
		t.Helper()
		var b bytes.Buffer
		if err := run(t.Context(), args, environ, &b, io.Discard); err != nil && args[0] != "doctor" {
			t.Fatalf("agent %v: %v", args, err)
		}
		return b.String()
	}
	text := out("gpus")
	for _, line := range []string{
		`0 +NVIDIA H100 80GB HBM3 +- +87 % +0.0 / 80 GiB +70 °C .*612 / 700 W`, `3 +NVIDIA H100 80GB HBM3 +quarantined`,
		`GPU 1: its compute mode is prohibited: set it to default`, `GPU 2: used by process \d+ \(agent.test\)`, `GPU 3: XID 119.*: reset it`,
	} {
		if !regexp.MustCompile(`(?m)^` + line).MatchString(text) {
			t.Errorf("no line %s in\n%s", line, text)
		}
	}
	if strings.Contains(text, "\x1b") {
		t.Error("colours where there is no screen")
	}
	var seen []seenGPU
	if err := json.Unmarshal([]byte(out("gpus", "--json")), &seen); err != nil || len(seen) != 4 || *seen[0].Utilization != 0.87 || seen[3].State != "quarantined" {
		t.Errorf("%v: %+v", err, seen)
	}

	to := filepath.Join(dir, "recording")
	text = out("doctor", "--record", to)
	if !regexp.MustCompile(`(?s)ok +driver.*warn +GPU modes +GPU 1: its compute mode is prohibited.*whole hot poll of all devices`).MatchString(text) {
		t.Errorf("the doctor says\n%s", text)
	}
	raw, err := os.ReadFile(filepath.Join(to, "inventory.json"))
	var r recording
	if err != nil || json.Unmarshal(raw, &r) != nil || len(r.Devices) != 4 || len(r.Links) != 4 || r.Readings[0]["Power"] != 612.0 || len(r.Details) != 4 {
		t.Errorf("%v: %s", err, raw)
	}
}
