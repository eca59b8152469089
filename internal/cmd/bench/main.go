// Bench measures the control plane as a whole: the real dispatcher and real
// agents on a real Postgres and Redis, each figure beside a baseline of the
// same run and beside its goal. It judges nothing: figures belong to the
// machine that they are printed with. Support only, never shipped.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"time"

	"lorayard/internal/daemon"
	"lorayard/internal/queue/queuebench"
)

func main() {
	ctx, stop := daemon.Signals(context.Background())
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// options are the flags.
type options struct {
	only    string
	quick   bool
	jobs    int    // of throughput
	profile string // directory for CPU profiles; empty: none
	bin     string // directory of the binaries agent and dispatcher
	python  string // for the trainer behind a real agent
	trainer string // scripts/train
}

// bench is one benchmark: it returns its table.
type bench struct {
	name, says string
	// binaries says that it starts real processes.
	binaries bool
	run      func(ctx context.Context, g *ground, o options) (queuebench.Table, error)
}

var benches = []bench{
	{"handover", "INSERT to fenced accept on an idle fleet", false, handover},
	{"kill", "kill -9 of a real agent to accepted elsewhere", true, kills},
	{"freeze", "SIGSTOP of a real agent to accepted elsewhere", true, freezes},
	{"throughput", "jobs through the whole path with work that does nothing", false, throughput},
	{"idle", "what a thousand agents without work cost", false, idle},
	{"queued", "a real dispatcher with 10,000 jobs queued", true, queued},
	{"datasets", "the validation of data sets", true, datasets},
	{"storage", "uploads and downloads beside curl", false, storages},
	{"trace", "Kueue's fleet trace on the real control plane", false, trace},
}

func run(ctx context.Context, args []string, out io.Writer) error {
	var o options
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.StringVar(&o.only, "only", "", "names of benchmarks, separated by commas; empty: all")
	fs.BoolVar(&o.quick, "quick", false, "fewer samples: shows that it works, not how fast")
	fs.IntVar(&o.jobs, "jobs", 5000, "how many jobs throughput takes through")
	fs.StringVar(&o.profile, "profile", "", "write a CPU profile, and what took Postgres its time, of each benchmark into this directory")
	fs.StringVar(&o.bin, "bin", "bin", "directory of the binaries agent and dispatcher")
	fs.StringVar(&o.python, "trainer-python", os.Getenv("TRAINER_PYTHON"), "interpreter of the trainer's environment, for real agents")
	fs.StringVar(&o.trainer, "trainer-dir", "scripts/train", "directory that holds the package lora_train")
	fs.Usage = func() {
		fmt.Fprintln(fs.Output(), "bench measures the control plane.")
		fs.PrintDefaults()
		for _, b := range benches {
			fmt.Fprintf(fs.Output(), "  %-12s %s\n", b.name, b.says)
		}
	}
	if err := fs.Parse(args); err != nil {
		return err
	}
	chosen, err := choose(o.only)
	if err != nil {
		return err
	}
	g, err := open(ctx, o.profile)
	if err != nil {
		return err
	}
	defer g.close()
	var errs []error
	for _, b := range chosen {
		if err := measure(ctx, b, g, o, out); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", b.name, err))
		}
		if ctx.Err() != nil {
			break
		}
	}
	return errors.Join(errs...)
}

// choose finds benchmarks by their names, in their own order.
func choose(only string) ([]bench, error) {
	if only == "" {
		return benches, nil
	}
	names := strings.Split(only, ",")
	var out []bench
	for _, b := range benches {
		if i := slices.Index(names, b.name); i >= 0 {
			out = append(out, b)
			names = slices.Delete(names, i, i+1)
		}
	}
	if len(names) > 0 {
		return nil, fmt.Errorf("no benchmark is named %s", strings.Join(names, " or "))
	}
	return out, nil
}

func measure(ctx context.Context, b bench, g *ground, o options, out io.Writer) error {
	if b.binaries && (o.python == "" || !runnable(filepath.Join(o.bin, "agent")) || !runnable(filepath.Join(o.bin, "dispatcher"))) {
		return errors.New("it starts real processes: run `make bench`, which builds them, or say where they are with --bin and --trainer-python")
	}
	stop, err := profile(o.profile, b.name)
	if err != nil {
		return err
	}
	began := time.Now()
	t, err := b.run(ctx, g, o)
	stop()
	if err != nil {
		return err
	}
	if err := t.Print(out); err != nil {
		return err
	}
	fmt.Fprintf(out, "  (%s took %.0f s)\n", b.name, time.Since(began).Seconds())
	return nil
}

func runnable(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o111 != 0
}

// profile starts a CPU profile; what it returns ends it.
func profile(dir, name string) (stop func(), err error) {
	if dir == "" {
		return func() {}, nil
	}
	f, err := os.Create(filepath.Join(dir, name+".cpu.prof"))
	if err != nil {
		return nil, fmt.Errorf("make a profile: %w", err)
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, fmt.Errorf("make a profile: %w", err)
	}
	return func() {
		pprof.StopCPUProfile()
		f.Close()
		runtime.GC()
	}, nil
}

// goal is a row of a table: what | baseline | ours | ratio | goal | met.
type goal struct {
	what, baseline, ours, ratio, goal string
	met                               string // yes, no, or empty where nothing is asked
}

// table is the shape that every benchmark has.
func table(title string, goals ...goal) queuebench.Table {
	t := queuebench.Table{Title: title, Head: []string{"what", "baseline (same run)", "ours", "ratio", "goal", "met?"}, Figures: map[string]float64{}}
	for _, r := range goals {
		t.Rows = append(t.Rows, []string{r.what, or(r.baseline), r.ours, or(r.ratio), or(r.goal), or(r.met)})
	}
	return t
}

func or(s string) string {
	if s == "" {
		return "–"
	}
	return s
}

func yes(ok bool) string {
	if ok {
		return "yes"
	}
	return "no"
}

// at is a quantile of sorted durations.
func at(sorted []time.Duration, q float64) time.Duration {
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// ms prints a time in milliseconds.
func ms(d time.Duration) string {
	return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
}
