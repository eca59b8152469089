package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"lorayard/internal/gpu"
	"lorayard/internal/gpu/nvml"
)

const recordHelp = `
  --record DIR
        also measure the driver and write what it says into DIR: inventory.json,
        latency.txt; this keeps the driver busy for a few seconds
`

// recordDir takes --record out of args.
func recordDir(args []string) (dir string, rest []string, err error) {
	for i := 0; i < len(args); i++ {
		value, is := strings.CutPrefix(args[i], "--record=")
		switch {
		case is:
			dir = value
		case args[i] == "--record" && i+1 < len(args):
			i++
			dir = args[i]
		case args[i] == "--record":
			return "", nil, errors.New("--record needs a directory")
		default:
			rest = append(rest, args[i])
		}
	}
	return dir, rest, nil
}

// recording is inventory.json.
type recording struct {
	Driver   string
	CUDA     string
	Missing  []string // symbols
	Devices  []gpu.Device
	Links    [][]int
	Readings []map[string]any // by device; numbers that are not known are left out
	Details  []gpu.Detail
}

const measureTimes = 200

// record writes what the driver says of this host, and how long it takes to.
func record(ctx context.Context, s settings, dir string, w io.Writer) error {
	d, err := nvml.Open(nvml.Options{Path: s.GPULibrary})
	if err != nil {
		return fmt.Errorf("record the driver: %w", err)
	}
	defer d.Close()
	r := recording{Missing: d.Missing()}
	r.Driver, r.CUDA = d.Versions()
	if r.Devices, err = d.Devices(ctx); err != nil {
		return fmt.Errorf("read the GPUs: %w", err)
	}
	if r.Links, err = d.Links(ctx); err != nil {
		return fmt.Errorf("read the links: %w", err)
	}
	readings := make([]gpu.Reading, len(r.Devices))
	for _, t := range []gpu.Tier{gpu.Hot, gpu.Warm} {
		if err := d.Read(ctx, t, readings); errors.Is(err, gpu.ErrWedged) {
			return err
		} // else the readings show what does not answer
	}
	var uuids []string
	for i, x := range r.Devices {
		uuids = append(uuids, x.UUID)
		r.Readings = append(r.Readings, withoutNaN(readings[i]))
	}
	if r.Details, err = d.Details(ctx, uuids); err != nil {
		return fmt.Errorf("read details: %w", err)
	}
	timings, err := d.Measure(ctx, measureTimes)
	if err != nil {
		return fmt.Errorf("measure the driver: %w", err)
	}
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("write down the inventory: %w", err)
	}
	table := latencies(r, timings)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	for name, text := range map[string][]byte{"inventory.json": append(raw, '\n'), "latency.txt": table} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			return fmt.Errorf("write the recording: %w", err)
		}
	}
	fmt.Fprintf(w, "\n%s\nwritten to %s: inventory.json, latency.txt\n", table, dir)
	return nil
}

func latencies(r recording, timings []nvml.Timing) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "driver %s, CUDA %s, %d devices\n\n", r.Driver, r.CUDA, len(r.Devices))
	tw := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "CALL\tTIMES\tP50\tP99\tMOST\tANSWER")
	micros := func(d time.Duration) string { return fmt.Sprintf("%.1f µs", float64(d.Nanoseconds())/1e3) }
	for _, t := range timings {
		if t.Times == 0 {
			fmt.Fprintf(tw, "%s\t-\t-\t-\t-\t%s\n", t.Call, t.Answer)
			continue
		}
		fmt.Fprintf(tw, "%s\t%d\t%s\t%s\t%s\t%s\n", t.Call, t.Times, micros(t.P50), micros(t.P99), micros(t.Most), t.Answer)
	}
	_ = tw.Flush() // into memory
	for _, t := range timings {
		if strings.HasPrefix(t.Call, "whole hot") {
			fmt.Fprintf(&b, "\nOne such poll a second keeps the driver busy for %.4f %% of the time.\n", float64(t.P50)/float64(time.Second)*100)
		}
	}
	return b.Bytes()
}

// withoutNaN turns a reading into what JSON can say.
func withoutNaN(r gpu.Reading) map[string]any {
	out := map[string]any{"Lost": r.Lost, "ResetRequired": r.ResetRequired, "Reasons": r.Reasons}
	for name, v := range map[string]float64{
		"Utilization": r.Utilization, "MemoryTotal": r.MemoryTotal, "MemoryUsed": r.MemoryUsed, "MemoryReserved": r.MemoryReserved, "Power": r.Power,
		"Energy": r.Energy, "Temperature": r.Temperature, "MemoryTemperature": r.MemoryTemperature, "Recovery": r.Recovery, "ECCCorrected": r.ECCCorrected,
		"ECCUncorrected": r.ECCUncorrected, "RemapsCorrected": r.RemapsCorrected, "RemapsUncorrected": r.RemapsUncorrected, "RemapPending": r.RemapPending,
		"RemapFailed": r.RemapFailed, "PCIeReplays": r.PCIeReplays, "PowerLimit": r.PowerLimit, "TemperatureMargin": r.TemperatureMargin,
		"ClockSM": r.ClockSM, "ClockMem": r.ClockMem, "PCIeWidth": r.PCIeWidth, "NVLinksUp": r.NVLinksUp, "NVLinks": r.NVLinks,
	} {
		if !math.IsNaN(v) {
			out[name] = v
		}
	}
	for i, reason := range gpu.Throttles {
		if !math.IsNaN(r.Throttled[i]) {
			out["Throttled "+reason] = r.Throttled[i]
		}
	}
	for i, kind := range gpu.NVLinkErrorKinds {
		if !math.IsNaN(r.NVLinkErrors[i]) {
			out["NVLinkErrors "+kind] = r.NVLinkErrors[i]
		}
	}
	return out
}
