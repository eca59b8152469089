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
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"lorayard/internal/agent"
	"lorayard/internal/config"
	"lorayard/internal/gpu"
	"lorayard/internal/gpu/nvml"
)

type gpusSettings struct {
	DataDir string        `flag:"data-dir" env:"DATA_DIR" default:"/var/lib/lorayard" help:"data directory of the running agent, which knows who holds a GPU and whether it is fit"`
	Library string        `flag:"gpu-library" env:"GPU_LIBRARY" help:"path of NVIDIA's libnvidia-ml.so.1; empty: where the system has it"`
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
	look, done := gpuReader(ctx, s)
	defer done()
	screen := !s.JSON && isTerminal(stdout)
	for first := true; ; first = false {
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
			var b bytes.Buffer
			if s.Watch {
				fmt.Fprintln(&b, time.Now().Format(time.DateTime))
			}
			if err := listGPUs(&b, seen, notes, screen); err != nil {
				return err
			}
			if err := paint(stdout, b.String(), s.Watch, screen, first); err != nil {
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
func gpuReader(ctx context.Context, s gpusSettings) (look func() ([]seenGPU, []string, error), done func()) {
	driver, driverErr := nvml.Open(nvml.Options{Path: s.Library, Patience: 2 * time.Second}) // a person waits
	done = func() {
		if driver != nil {
			driver.Close()
		}
	}
	var devices []gpu.Device
	var details map[string]gpu.Detail
	var detailsAt time.Time
	return func() ([]seenGPU, []string, error) {
		var out []seenGPU
		var notes []string
		status, agentErr := ask(ctx, s.DataDir, agent.Command{Do: "status"})
		if driverErr != nil && agentErr != nil {
			return nil, nil, fmt.Errorf("nobody can tell: %w; %w", driverErr, agentErr)
		}
		if driverErr != nil {
			notes = append(notes, driverErr.Error())
		}
		if agentErr != nil {
			notes = append(notes, "no jobs are known, and states are those of before: "+agentErr.Error())
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
			if time.Since(detailsAt) > detailsEvery {
				detailsAt, details = time.Now(), detailsOf(ctx, driver, devices)
			}
			for i, d := range devices {
				known[d.UUID] = len(out)
				out = append(out, seeGPU(d, readings[i], details[d.UUID]))
			}
		}
		if agentErr != nil {
			status.Devices = remembered(s.DataDir, devices)
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
			g.State, g.Job = d.State, d.Job
			if d.Reason != "" {
				g.Reason, g.Todo = d.Reason, d.Todo
			}
		}
		return out, notes, nil
	}, done
}

// detailsEvery is how often the driver is asked for what takes it long to tell.
const detailsEvery = 15 * time.Second

func detailsOf(ctx context.Context, driver *nvml.Driver, devices []gpu.Device) map[string]gpu.Detail {
	var uuids []string
	for _, d := range devices {
		uuids = append(uuids, d.UUID)
	}
	out := map[string]gpu.Detail{}
	ds, _ := driver.Details(ctx, uuids) // nothing depends on them
	for _, d := range ds {
		out[d.UUID] = d
	}
	return out
}

// remembered is what the agent that ran last thought of the devices, those that
// are gone included.
func remembered(dataDir string, devices []gpu.Device) (out []agent.DeviceStatus) {
	for _, v := range gpu.Remembered(dataDir) {
		d := agent.DeviceStatus{UUID: v.UUID, Index: -1, State: string(v.State), Reason: v.Reason, Todo: v.Action.Words(v.UUID), XID: v.XID, Since: v.Since}
		for _, x := range devices {
			if x.UUID == v.UUID {
				d.Index, d.Name = x.Index, x.Name
			}
		}
		if d.Index >= 0 || v.Fault() != "" {
			out = append(out, d)
		}
	}
	return out
}

func seeGPU(d gpu.Device, r gpu.Reading, detail gpu.Detail) seenGPU {
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
	case g.Reason == "":
		g.Reason = detail.Problem()
	}
	g.Watch = append(g.Watch, detail.Remarks()...)
	if len(detail.Processes) > 0 {
		g.Watch = append(g.Watch, "used by "+users(detail.Processes))
	}
	return g
}

// users names the processes that use a device. A driver may tell numbers that
// are of another namespace.
func users(ps []gpu.Process) string {
	var out []string
	for _, p := range ps {
		who := fmt.Sprintf("process %d", p.PID)
		if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", p.PID)); err == nil {
			who += " (" + strings.TrimSpace(string(name)) + ")"
		}
		out = append(out, who)
	}
	return strings.Join(out, ", ")
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
		todo := "when its job has ended, reset it"
		switch gpu.Recovery(r.Recovery) {
		case gpu.RecoveryReset, gpu.RecoveryBusReset:
			todo = "reset it"
		case gpu.RecoveryReboot, gpu.RecoverySystemReboot:
			todo = "restart the host"
		}
		out = append(out, "the driver wants it to be recovered: "+todo)
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

// paint writes a table, on a screen over the one before.
func paint(w io.Writer, table string, watch, screen, first bool) error {
	const home, clearAll, clearLine, clearRest = "\x1b[H", "\x1b[2J", "\x1b[K", "\x1b[J"
	switch {
	case watch && screen && first:
		table = clearAll + home + table
	case watch && screen:
		table = home + strings.ReplaceAll(table, "\n", clearLine+"\n") + clearRest
	case watch && !first:
		table = "\n" + table
	}
	_, err := io.WriteString(w, table)
	return err
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// coloured marks the line of a device that is not well.
func coloured(line string, g seenGPU) string {
	const yellow, red, plain = "\x1b[33m", "\x1b[31m", "\x1b[0m"
	switch {
	case g.State == string(gpu.StateSuspect) || g.State == string(gpu.StateForeign):
		return yellow + line + plain
	case g.Reason != "":
		return red + line + plain
	}
	return line
}

func listGPUs(w io.Writer, gpus []seenGPU, notes []string, screen bool) error {
	cell := func(v *float64, format string, scale float64) string {
		if v == nil {
			return "-"
		}
		return fmt.Sprintf(format, *v*scale)
	}
	of := func(v, all *float64, unit string, format string, scale float64) string {
		if v == nil && all == nil {
			return "-"
		}
		return cell(v, format, scale) + " / " + cell(all, "%.0f", scale) + " " + unit
	}
	var b bytes.Buffer
	tw := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "GPU\tNAME\tSTATE\tBUSY\tMEMORY\tTEMP\tLEFT\tPOWER\tCLOCK\tECC\tLINKS\tUUID\tJOB")
	for _, g := range gpus {
		state := g.State
		if state == "" {
			state = "-"
		}
		const gib = 1.0 / (1 << 30)
		index := "-" // it is not listed any more
		if g.Index >= 0 {
			index = strconv.Itoa(g.Index)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", index, g.Name, state, cell(g.Utilization, "%.0f %%", 100),
			of(g.Used, g.Total, "GiB", "%.1f", gib), cell(g.Celsius, "%.0f °C", 1), cell(g.Margin, "%.0f °C", 1), of(g.Watts, g.PowerLimit, "W", "%.0f", 1),
			cell(g.ClockHertz, "%.0f MHz", 1e-6), cell(g.Uncorrected, "%.0f", 1), cell(g.NVLinks, "%.0f", 1), g.UUID, g.Job)
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for i, line := range strings.SplitAfter(b.String(), "\n") {
		if screen && i > 0 && i <= len(gpus) {
			line = coloured(strings.TrimSuffix(line, "\n"), gpus[i-1]) + "\n"
		}
		if _, err := io.WriteString(w, line); err != nil {
			return err
		}
	}
	for _, g := range gpus {
		called := fmt.Sprintf("GPU %d", g.Index)
		if g.Index < 0 {
			called = g.UUID
		}
		if g.Reason != "" {
			fmt.Fprintf(w, "%s: %s", called, g.Reason)
			if g.Todo != "" {
				fmt.Fprintf(w, ": %s", g.Todo)
			}
			fmt.Fprintln(w)
		}
		if len(g.Watch) > 0 && g.Reason == "" {
			fmt.Fprintf(w, "%s: %s\n", called, strings.Join(g.Watch, "; "))
		}
	}
	for _, n := range notes {
		fmt.Fprintln(w, "note:", n)
	}
	return nil
}
