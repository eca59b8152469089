package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"lorayard/internal/config"
	"lorayard/internal/devstack"
)

// fleetSettings are those of a pretended fleet.
type fleetSettings struct {
	Dir        string        `flag:"dir" env:"DEVSTACK_DIR" default:".data/stack" help:"where everything is kept"`
	Bin        string        `flag:"bin" env:"DEVSTACK_BIN" default:"bin" help:"directory of the binaries agent and dispatcher"`
	Python     string        `flag:"trainer-python" env:"TRAINER_PYTHON" required:"true" help:"interpreter of the trainer's environment"`
	TrainerDir string        `flag:"trainer-dir" env:"TRAINER_DIR" default:"scripts/train" help:"directory of the package lora_train"`
	Data       string        `flag:"data" env:"DATA" default:"scripts/train/testdata/demo.jsonl" help:"data file of every job"`
	Prometheus string        `flag:"prometheus" env:"PROMETHEUS" help:"directory of the binaries prometheus and promtool; empty or unreachable: none runs"`
	Agents     int           `flag:"agents" env:"AGENTS" default:"4" help:"hosts"`
	GPUs       int           `flag:"gpus" env:"GPUS" default:"4" help:"pretended GPUs of each host"`
	Every      time.Duration `flag:"every" env:"EVERY" default:"5s" help:"a job arrives about so often"`
	Faults     time.Duration `flag:"faults" env:"FAULTS" default:"40s" help:"a fault is planted about so often; 0: never"`
	For        time.Duration `flag:"for" env:"FOR" default:"0s" help:"stop after; 0: when told to"`
}

// runFleet runs a pretended fleet with arriving jobs and planted faults until it
// is told to stop.
func runFleet(ctx context.Context, args []string) (err error) {
	var s fleetSettings
	if _, err := config.Load(&s, args, os.Environ()); errors.Is(err, config.ErrHelp) {
		config.Usage(os.Stdout, &s)
		return nil
	} else if err != nil {
		return err
	}
	if s.Prometheus == "unreachable" {
		s.Prometheus = ""
	}
	dir, err := filepath.Abs(filepath.Join(s.Dir, "fleet-"+time.Now().Format("20060102-150405")))
	if err != nil {
		return err
	}
	for _, p := range []*string{&s.TrainerDir, &s.Bin, &s.Data} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	rules, err := filepath.Abs("deploy/prometheus/rules")
	if err != nil {
		return err
	}
	begin := time.Now()
	say := func(what string) { fmt.Printf("  %6.1f s  %s\n", time.Since(begin).Seconds(), what) }
	fmt.Println("Lorayard's pretended fleet, data in", dir)
	st, err := devstack.Start(ctx, devstack.Config{
		Dir: dir, Bin: s.Bin, Python: s.Python, TrainerDir: s.TrainerDir, BaseModels: []string{model}, Say: say,
		Settings: []string{"CHECKPOINT_EVERY=10s", "PATIENCE=5s", "MIN_FREE_BYTES=1048576"},
	})
	if err != nil {
		return err
	}
	defer func() {
		say("stopping everything")
		err = errors.Join(err, st.Stop())
	}()
	if err := st.EmptyModel(model); err != nil {
		return err
	}
	f, err := st.Fleet(ctx, devstack.FleetConfig{
		Agents: s.Agents, GPUs: s.GPUs, Steps: 100, StepTime: 500 * time.Millisecond, Data: s.Data, Prometheus: s.Prometheus, Rules: rules, Scrape: 2 * time.Second,
	})
	if err != nil {
		return err
	}
	fmt.Printf("\n  Postgres     %s\n", st.DatabaseURL)
	if f.Watch != nil {
		fmt.Printf("  Prometheus   %s/alerts\n", f.Watch.OpsURL())
		fmt.Printf("  Grafana      where you have one: LORAYARD_PROMETHEUS_URL=%s and deploy/grafana, see docs/observing.md\n", f.Watch.OpsURL())
	} else {
		fmt.Println("  Prometheus   none is here; scripts/setup test unpacks Debian's")
	}
	fmt.Print("\nJobs arrive and faults are planted. Ctrl-C stops everything.\n\n")
	if s.For > 0 {
		var stop context.CancelFunc
		ctx, stop = context.WithTimeout(ctx, s.For)
		defer stop()
	}
	return live(ctx, f, s, say)
}

// live lets jobs arrive and plants faults, one kind after the other.
func live(ctx context.Context, f *devstack.Fleet, s fleetSettings, say func(string)) error {
	arrivals, board := time.NewTicker(s.Every), time.NewTicker(15*time.Second)
	defer arrivals.Stop()
	defer board.Stop()
	faults := make(<-chan time.Time)
	if s.Faults > 0 {
		t := time.NewTicker(s.Faults)
		defer t.Stop()
		faults = t.C
	}
	lost := make(chan error, 1)
	planted := 0
	for range s.Agents * s.GPUs { // begin with a busy fleet
		if _, err := f.Arrive(ctx); err != nil {
			return ended(ctx, err)
		}
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-arrivals.C:
			if _, err := f.Arrive(ctx); err != nil {
				return ended(ctx, err)
			}
		case err := <-lost:
			if err != nil {
				return ended(ctx, err)
			}
		case <-faults:
			planted++
			if err := trouble(ctx, f, planted, lost, say); err != nil {
				return ended(ctx, err)
			}
		case <-board.C:
			line, err := oneLine(ctx, f)
			if err != nil {
				return ended(ctx, err)
			}
			say(line)
		}
	}
}

// ended takes what came of the end of ctx for no error.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// trouble is the n-th: errors of devices, a repair, a host that dies.
func trouble(ctx context.Context, f *devstack.Fleet, n int, lost chan<- error, say func(string)) error {
	switch n % 5 {
	case 3:
		n, err := f.Repair(ctx)
		if n > 0 {
			say(fmt.Sprintf("repaired %d devices", n))
		}
		return err
	case 0:
		say("a host loses power for 20 s")
		go func() {
			_, err := f.Lose(ctx, 20*time.Second)
			lost <- err
		}()
		return nil
	}
	x, err := f.Plant(ctx, map[int]int{1: 79, 2: 31, 4: 119}[n%5])
	if x != nil {
		say(fmt.Sprintf("planted XID %d on %s of %s, under attempt %d of job %s", x.XID, x.Device, x.Agent, x.Attempt, x.Job))
	}
	return err
}

// oneLine is the fleet in a line.
func oneLine(ctx context.Context, f *devstack.Fleet) (string, error) {
	var line string
	err := f.Pool.QueryRow(ctx, `SELECT format('%s running, %s waiting, %s completed, %s attempts failed or lost, %s devices out of use',
		count(*) FILTER (WHERE j.state = 'accepted'), count(*) FILTER (WHERE j.state = 'queued'), count(*) FILTER (WHERE t.status = 'completed'),
		(SELECT count(*) FROM lorayard.attempts WHERE outcome IN ('failed', 'lost')), (SELECT count(*) FROM lorayard.devices WHERE fault <> ''))
		FROM lorayard.jobs j JOIN training_jobs t ON t.id = j.job_id`).Scan(&line)
	if err != nil || f.Watch == nil {
		return line, err
	}
	firing, err := f.Watch.Ask(ctx, `count by (alertname) (ALERTS{alertstate="firing"})`)
	var names []string
	for _, p := range firing {
		names = append(names, p.Labels["alertname"])
	}
	if len(names) > 0 {
		line += "; alerts: " + strings.Join(names, ", ")
	}
	return line, err
}
