package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"text/tabwriter"
	"time"

	"lorayard/internal/agent"
	"lorayard/internal/config"
	"lorayard/internal/gpu"
	"lorayard/internal/gpu/nvml"
)

type gpusSettings struct {
	DataDir string        `flag:"data-dir" env:"DATA_DIR" default:"/var/lib/lorayard" help:"data directory of the running agent, which knows who holds a GPU and whether it is fit"`
	Watch   bool          `flag:"watch" env:"WATCH" help:"show them again and again until interrupted"`
	Every   time.Duration `flag:"every" env:"EVERY" default:"1s" help:"watch: how often"`
	JSON    bool          `flag:"json" env:"JSON" help:"print JSON, one line a look"`
}

// seenGPU is a device as `agent gpus` shows it; what is not known is nil.
type seenGPU struct {
	Index       int      `json:"index"`
	UUID        string   `json:"uuid"`
	Name        string   `json:"name"`
	Class       string   `json:"class"`
	State       string   `json:"state"` // see gpu.State; empty: no agent runs that could tell
	Job         string   `json:"job,omitempty"`
	Reason      string   `json:"reason,omitempty"`
	Todo        string   `json:"todo,omitempty"`
	Utilization *float64 `json:"utilization"`  // share of the time
	Used        *float64 `json:"memory_used"`  // bytes, without what the driver keeps
	Total       *float64 `json:"memory_total"` // bytes
	Celsius     *float64 `json:"temperature"`
	Watts       *float64 `json:"power"`
	Uncorrected *float64 `json:"ecc_uncorrected"` // errors since the driver was loaded
	NVLinks     *float64 `json:"nvlinks_up"`
	Margin      *float64 `json:"temperature_margin"` // degrees until it slows down
	PowerLimit  *float64 `json:"power_limit"`
	ClockHertz  *float64 `json:"clock_sm"`
	PCIeWidth   *float64 `json:"pcie_width"`      // share of the lanes that it could have
	Watch       []string `json:"watch,omitempty"` // what a person should look at
}

// gpus lists the devices of this host: what the driver reads, and what the
// running agent thinks of them.
func gpus(ctx context.Context, args, environ []string, stdout io.Writer) error {
	var s gpusSettings
	rest, err := config.Load(&s, args, environ)
	switch {
	case errors.Is(err, config.ErrHelp):
		config.Usage(stdout, &s)
		return nil
	case err != nil:
		return err
	case len(rest) > 0:
		return fmt.Errorf("%q is neither a flag nor expected here", rest[0])
	}
	look, done := gpuReader(ctx, s.DataDir)
	defer done()
	for {
		seen, notes, err := look()
		if err != nil {
			return err
		}
		switch {
		case s.JSON:
			if err := json.NewEncoder(stdout).Encode(seen); err != nil {
				return err
			}
		default:
			if s.Watch {
				fmt.Fprint(stdout, "\x1b[H\x1b[2J", time.Now().Format(time.DateTime), "\n")
			}
			if err := listGPUs(stdout, seen, notes); err != nil {
				return err
			}
		}
		if !s.Watch {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(s.Every):
		}
	}
}

// gpuReader opens what there is to be asked: the driver, the running agent, or
// both.
func gpuReader(ctx context.Context, dataDir string) (look func() ([]seenGPU, []string, error), done func()) {
	driver, driverErr := nvml.Open(nvml.Options{})
	done = func() {
		if driver != nil {
			driver.Close()
		}
	}
	var devices []gpu.Device
	return func() ([]seenGPU, []string, error) {
		var out []seenGPU
		var notes []string
		status, agentErr := ask(ctx, dataDir, agent.Command{Do: "status"})
		if driverErr != nil && agentErr != nil {
			return nil, nil, fmt.Errorf("nobody can tell: %w; %w", driverErr, agentErr)
		}
		if driverErr != nil {
			notes = append(notes, driverErr.Error())
		}
		if agentErr != nil {
			notes = append(notes, "states and jobs are not known: "+agentErr.Error())
		}
		known := map[string]int{}
		if driver != nil {
			var err error
			if devices == nil {
				if devices, err = driver.Devices(ctx); err != nil {
					return nil, nil, err
				}
			}
			readings := make([]gpu.Reading, len(devices))
			if err := errors.Join(driver.Read(ctx, gpu.Hot, readings), driver.Read(ctx, gpu.Warm, readings)); err != nil {
				notes = append(notes, err.Error())
			}
			for i, d := range devices {
				known[d.UUID] = len(out)
				out = append(out, seeGPU(d, readings[i]))
			}
		}
		for _, d := range status.Devices {
			i, ok := known[d.UUID]
			if unnamed := fmt.Sprintf("unknown-%d", d.Index); !ok {
				// The driver does not tell the name of a device that is lost.
				if i, ok = known[unnamed]; ok {
					out[i].UUID, out[i].Name = d.UUID, d.Name
				}
			}
			if !ok {
				i = len(out)
				out = append(out, seenGPU{Index: d.Index, UUID: d.UUID, Name: d.Name})
			}
			g := &out[i]
			g.State, g.Job, g.Reason, g.Todo = d.State, d.Job, d.Reason, d.Todo
		}
		return out, notes, nil
	}, done
}

func seeGPU(d gpu.Device, r gpu.Reading) seenGPU {
	number := func(v float64) *float64 {
		if math.IsNaN(v) {
			return nil
		}
		return &v
	}
	g := seenGPU{
		Index: d.Index, UUID: d.UUID, Name: d.Name, Class: d.Class, Reason: d.Fault, Utilization: number(r.Utilization), Used: number(r.MemoryUsed),
		Total: number(r.MemoryTotal), Celsius: number(r.Temperature), Watts: number(r.Power), Uncorrected: number(r.ECCUncorrected), NVLinks: number(r.NVLinksUp),
		Margin: number(r.TemperatureMargin), PowerLimit: number(r.PowerLimit), ClockHertz: number(r.ClockSM), PCIeWidth: number(r.PCIeWidth), Watch: look(r),
	}
	switch {
	case r.Lost:
		g.Reason = "the driver has lost it"
	case r.ResetRequired:
		g.Reason = "the driver refuses it until it is reset"
	}
	return g
}

// look says what a person should look at, though the device works.
func look(r gpu.Reading) (out []string) {
	if r.RemapFailed > 0 {
		out = append(out, "a broken memory row cannot be replaced any more: have the GPU replaced")
	}
	if r.RemapPending > 0 {
		out = append(out, "a broken memory row is replaced at the next reset")
	}
	if r.Recovery > 0 {
		out = append(out, "the driver wants it to be recovered: "+map[gpu.Recovery]string{
			gpu.RecoveryReset: "reset it", gpu.RecoveryBusReset: "reset it", gpu.RecoveryReboot: "restart the host", gpu.RecoverySystemReboot: "restart the host",
		}[gpu.Recovery(r.Recovery)])
	}
	if r.TemperatureMargin <= 0 {
		out = append(out, "it is too hot: look at its cooling")
	}
	if r.PCIeWidth < 1 {
		out = append(out, fmt.Sprintf("it uses %.0f %% of its PCIe lanes: look at its seat", r.PCIeWidth*100))
	}
	if r.NVLinksUp < r.NVLinks {
		out = append(out, fmt.Sprintf("%.0f of %.0f NVLinks are down", r.NVLinks-r.NVLinksUp, r.NVLinks))
	}
	return out
}

func listGPUs(w io.Writer, gpus []seenGPU, notes []string) error {
	cell := func(v *float64, format string, scale float64) string {
		if v == nil {
			return "-"
		}
		return fmt.Sprintf(format, *v*scale)
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "GPU\tNAME\tSTATE\tBUSY\tMEMORY\tTEMP\tLEFT\tPOWER\tCLOCK\tECC\tLINKS\tUUID\tJOB")
	for _, g := range gpus {
		state := g.State
		if state == "" {
			state = "-"
		}
		const gib = 1.0 / (1 << 30)
		fmt.Fprintf(tw, "%d\t%s\t%s\t%s\t%s / %s\t%s\t%s\t%s / %s\t%s\t%s\t%s\t%s\t%s\n", g.Index, g.Name, state, cell(g.Utilization, "%.0f %%", 100),
			cell(g.Used, "%.1f", gib), cell(g.Total, "%.0f GiB", gib), cell(g.Celsius, "%.0f °C", 1), cell(g.Margin, "%.0f °C", 1),
			cell(g.Watts, "%.0f", 1), cell(g.PowerLimit, "%.0f W", 1), cell(g.ClockHertz, "%.0f MHz", 1e-6), cell(g.Uncorrected, "%.0f", 1), cell(g.NVLinks, "%.0f", 1), g.UUID, g.Job)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for _, g := range gpus {
		if g.Reason != "" {
			fmt.Fprintf(w, "GPU %d: %s", g.Index, g.Reason)
			if g.Todo != "" {
				fmt.Fprintf(w, ": %s", g.Todo)
			}
			fmt.Fprintln(w)
		}
		if len(g.Watch) > 0 && g.Reason == "" {
			fmt.Fprintf(w, "GPU %d: %s\n", g.Index, strings.Join(g.Watch, "; "))
		}
	}
	for _, n := range notes {
		fmt.Fprintln(w, "note:", n)
	}
	return nil
}
