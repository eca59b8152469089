// Package queuebench measures the hand-over against Asynq as it comes, on one
// Redis in one run, so that the ratios hold on any machine. Support only, never
// linked into a shipped binary.
package queuebench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"
	"golang.org/x/sync/errgroup"

	"lorayard/internal/job"
	"lorayard/internal/queue"
)

// Table is what a measurement has to show.
type Table struct {
	Title string
	Head  []string
	Rows  [][]string
	// Figures are those that a benchmark reports, by unit.
	Figures map[string]float64
}

// Print writes the table with its columns in line.
func (t Table) Print(w io.Writer) error {
	fmt.Fprintf(w, "\n%s (%s)\n", t.Title, machine())
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	for _, row := range append([][]string{t.Head}, t.Rows...) {
		fmt.Fprintln(tw, "  "+strings.Join(row, "\t"))
	}
	return tw.Flush()
}

// machine says what else a figure depends on.
func machine() string {
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return fmt.Sprintf("%d CPUs", runtime.NumCPU())
	}
	return fmt.Sprintf("%d CPUs, load %s", runtime.NumCPU(), strings.Fields(string(load))[0])
}

// way is one way to get a task from here to there.
type way struct {
	name string
	// send enqueues a task.
	send func(ctx context.Context, agent string, t job.Task) error
	// serve starts an agent that tells of each task, and returns when it is
	// ready; stop ends it and waits.
	serve func(ctx context.Context, agent string, took func()) (stop func() error, err error)
}

// gated is the way of this system.
func gated(url string, c *queue.Client) way {
	return way{
		name: "gate and wake-up", send: c.Send,
		serve: func(ctx context.Context, agent string, took func()) (func() error, error) {
			ctx, cancel := context.WithCancel(ctx)
			active, done := make(chan bool, 1), make(chan error, 1)
			go func() {
				done <- queue.Serve(ctx, queue.Server{
					URL: url, Agent: agent, Concurrency: concurrency, Log: slog.New(slog.DiscardHandler),
					Accept:     func(context.Context, job.Task) error { took(); return nil },
					GateActive: func(a bool) { active <- a },
				})
			}()
			stop := func() error { cancel(); return <-done }
			select {
			case a := <-active:
				if a {
					return stop, nil
				}
				return nil, errors.Join(errors.New("the gate does not know this Asynq"), stop())
			case <-ctx.Done():
				return nil, errors.Join(context.Cause(ctx), stop())
			}
		},
	}
}

// concurrency is that of an agent with 8 GPUs.
const concurrency = 20

// stock is Asynq as it comes, with every default but the polling.
func stock(name, url string, c *asynq.Client, poll time.Duration) way {
	return way{
		name: name,
		send: func(ctx context.Context, agent string, t job.Task) error {
			_, err := c.EnqueueContext(ctx, asynq.NewTask("bench", []byte(t.Ref.Job)), asynq.Queue("stock:"+agent))
			return err
		},
		serve: func(_ context.Context, agent string, took func()) (func() error, error) {
			opt, err := asynq.ParseRedisURI(url)
			if err != nil {
				return nil, err
			}
			srv := asynq.NewServer(opt, asynq.Config{
				Queues: map[string]int{"stock:" + agent: 1}, Concurrency: concurrency,
				TaskCheckInterval: poll, LogLevel: asynq.FatalLevel,
			})
			err = srv.Start(asynq.HandlerFunc(func(context.Context, *asynq.Task) error { took(); return nil }))
			return func() error { srv.Shutdown(); return nil }, err
		},
	}
}

// Handover measures the time from a send to its handler on an idle agent. It
// takes about half a minute.
func Handover(ctx context.Context, url string) (Table, error) {
	c, err := queue.Dial(url)
	if err != nil {
		return Table{}, err
	}
	defer c.Close()
	opt, err := asynq.ParseRedisURI(url)
	if err != nil {
		return Table{}, err
	}
	ac := asynq.NewClient(opt)
	defer ac.Close()
	t := Table{
		Title:   "Send to handler, idle agent",
		Head:    []string{"", "samples", "median ms", "p90 ms", "p99 ms", "max ms", "median against ours"},
		Figures: map[string]float64{},
	}
	ours := 0.0
	for _, m := range []struct {
		way
		agents, samples int           // agents run side by side, to gather slow samples sooner
		pause           time.Duration // up to this before each send, so that it comes at any phase of the polling
		figure          string
	}{
		{gated(url, c), 1, 1000, 10 * time.Millisecond, "gate"},
		{stock("Asynq, polling every 50 ms", url, ac, 50*time.Millisecond), 4, 100, 50 * time.Millisecond, "50ms"},
		{stock("Asynq, default (1 s)", url, ac, 0), 40, 10, time.Second, "default"},
	} {
		took, err := handover(ctx, m.way, m.agents, m.samples, m.pause)
		if err != nil {
			return Table{}, fmt.Errorf("measure %s: %w", m.name, err)
		}
		slices.Sort(took)
		at := func(q float64) float64 { return took[min(int(q*float64(len(took))), len(took)-1)].Seconds() * 1e3 }
		if ours == 0 {
			ours = at(.5)
		}
		t.Figures["ms-median-"+m.figure], t.Figures["ms-p99-"+m.figure] = at(.5), at(.99)
		t.Rows = append(t.Rows, []string{
			m.name, strconv.Itoa(len(took)), f2(at(.5)), f2(at(.9)), f2(at(.99)), f2(at(1)), fmt.Sprintf("× %.0f", at(.5)/ours),
		})
	}
	return t, nil
}

// Stock returns the times from a send to its handler of Asynq as it comes,
// polling every poll (0: its default, 1 s), sorted: samples sends to each of
// several agents side by side.
func Stock(ctx context.Context, url string, poll time.Duration, agents, samples int) ([]time.Duration, error) {
	opt, err := asynq.ParseRedisURI(url)
	if err != nil {
		return nil, err
	}
	c := asynq.NewClient(opt)
	defer c.Close()
	pause := poll
	if pause == 0 {
		pause = time.Second
	}
	took, err := handover(ctx, stock("", url, c, poll), agents, samples, pause)
	if err != nil {
		return nil, fmt.Errorf("measure Asynq polling every %v: %w", pause, err)
	}
	slices.Sort(took)
	return took, nil
}

func f2(v float64) string { return strconv.FormatFloat(v, 'f', 2, 64) }

// handover returns the times of samples sends to each of several agents.
func handover(ctx context.Context, w way, agents, samples int, pause time.Duration) ([]time.Duration, error) {
	took := make([][]time.Duration, agents)
	g, ctx := errgroup.WithContext(ctx)
	for a := range agents {
		g.Go(func() (err error) {
			name := fmt.Sprintf("handover-%d", a)
			handled := make(chan time.Time, samples+1) // a handler never waits for us
			stop, err := w.serve(ctx, name, func() { handled <- time.Now() })
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, stop()) }()
			for n := range samples + 1 { // the first warms everything up
				if err := pauseFor(ctx, rand.N(pause)); err != nil {
					return err
				}
				begin := time.Now()
				if err := w.send(ctx, name, taskOf(n)); err != nil {
					return err
				}
				select {
				case at := <-handled:
					if n > 0 {
						took[a] = append(took[a], at.Sub(begin))
					}
				case <-time.After(30 * time.Second): // seen 10 s on a machine that swapped
					return errors.New("a task was not handled within 30 s")
				}
			}
			return nil
		})
	}
	err := g.Wait()
	return slices.Concat(took...), err
}

func taskOf(n int) job.Task {
	return job.Task{
		Ref:  job.Ref{Job: job.ID(fmt.Sprintf("%08d-5d4e-4ad1-a2a0-7d1a29e24d4a", n)), Attempt: 1},
		Send: 1, Devices: []string{"GPU-6ee2a5a9-5b0c-4f8d-9b7c-0c8a7a6f3a41"},
	}
}

func pauseFor(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// Idle measures what agents without work cost Redis: each count of agents with
// the gate and as stock Asynq, for a window each. It needs four connections
// per agent, so maxclients and the limit on open files must allow them.
func Idle(ctx context.Context, url string, window time.Duration, counts ...int) (Table, error) {
	o, err := redis.ParseURL(url)
	if err != nil {
		return Table{}, errors.New("parse the Redis URL")
	}
	rdb := redis.NewClient(o)
	defer rdb.Close()
	t := Table{
		Title:   fmt.Sprintf("Idle agents in one process, %s each", window),
		Head:    []string{"agents", "", "Redis % of a core", "commands/s per agent", "with those in scripts", "connections per agent"},
		Figures: map[string]float64{},
	}
	for _, n := range counts {
		for _, m := range []struct {
			way
			figure string
		}{{gated(url, nil), "gate"}, {stock("Asynq, default (1 s)", url, nil, 0), "stock"}} {
			cost, err := idle(ctx, rdb, m.way, n, window)
			if err != nil {
				return Table{}, fmt.Errorf("measure %d agents, %s: %w", n, m.name, err)
			}
			t.Figures[fmt.Sprintf("%%core-%s-%d", m.figure, n)] = cost.cpu * 100
			t.Figures[fmt.Sprintf("cmd/s-%s-%d", m.figure, n)] = cost.asked / float64(n)
			t.Rows = append(t.Rows, []string{
				strconv.Itoa(n), m.name, f2(cost.cpu * 100), f2(cost.asked / float64(n)), f2(cost.commands / float64(n)), f2(cost.connections / float64(n)),
			})
		}
	}
	return t, nil
}

// usage is what Redis says of itself: sums since it started, or, as a
// difference, what one second took.
type usage struct {
	cpu         float64 // seconds of CPU
	asked       float64 // commands that clients sent, idle agents being the clients
	commands    float64 // those that scripts called, too
	connections float64 // at this moment
}

func idle(ctx context.Context, rdb *redis.Client, w way, agents int, window time.Duration) (cost usage, err error) {
	before, err := look(ctx, rdb)
	if err != nil {
		return usage{}, err
	}
	stops := make([]func() error, agents)
	var g errgroup.Group
	g.SetLimit(32) // a thousand at once would measure the listen queue
	for i := range agents {
		g.Go(func() (err error) {
			stops[i], err = w.serve(ctx, fmt.Sprintf("idle-%d", i), func() {})
			return err
		})
	}
	err = g.Wait()
	defer func() {
		var g errgroup.Group
		for _, stop := range stops {
			if stop != nil {
				g.Go(stop)
			}
		}
		err = errors.Join(err, g.Wait())
	}()
	if err != nil {
		return usage{}, err
	}
	if err := pauseFor(ctx, 5*time.Second); err != nil { // starting is not idling
		return usage{}, err
	}
	from, err := look(ctx, rdb)
	if err != nil {
		return usage{}, err
	}
	begin := time.Now()
	if err := pauseFor(ctx, window); err != nil {
		return usage{}, err
	}
	to, err := look(ctx, rdb)
	if err != nil {
		return usage{}, err
	}
	s := time.Since(begin).Seconds()
	return usage{
		cpu: (to.cpu - from.cpu) / s, asked: (to.asked - from.asked) / s, commands: (to.commands - from.commands) / s,
		connections: to.connections - before.connections,
	}, nil
}

func look(ctx context.Context, rdb *redis.Client) (usage, error) {
	var u usage
	for _, section := range []string{"cpu", "stats", "clients", "commandstats"} {
		text, err := rdb.Info(ctx, section).Result()
		if err != nil {
			return u, fmt.Errorf("ask Redis how it is: %w", err)
		}
		for line := range strings.Lines(text) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), ":")
			calls, _, _ := strings.Cut(strings.TrimPrefix(value, "calls="), ",")
			n, err := strconv.ParseFloat(calls, 64)
			if err != nil {
				continue
			}
			switch key {
			case "used_cpu_user", "used_cpu_sys":
				u.cpu += n
			case "total_commands_processed":
				u.commands = n
			case "connected_clients":
				u.connections = n
			case "cmdstat_evalsha", "cmdstat_zadd", "cmdstat_ping": // no script of an idle agent calls these
				u.asked += n
			}
		}
	}
	return u, nil
}

// Sends measures how many tasks a second a dispatcher can send.
func Sends(ctx context.Context, url string) (Table, error) {
	c, err := queue.Dial(url)
	if err != nil {
		return Table{}, err
	}
	defer c.Close()
	t := Table{Title: "Sends, each with its wake-up", Head: []string{"", "tasks", "tasks/s"}, Figures: map[string]float64{}}
	const n = 10_000
	for _, m := range []struct {
		name   string
		agents int
		all    bool
	}{
		{"one by one", 20, false},
		{"a batch for 20 agents", 20, true},
		{"a batch for one agent", 1, true},
	} {
		sends := make([]queue.Send, n)
		for i := range sends {
			sends[i] = queue.Send{Agent: fmt.Sprintf("%s-%d", m.name, i%m.agents), Task: taskOf(i)}
		}
		begin := time.Now()
		if m.all {
			err = errors.Join(c.SendAll(ctx, sends)...)
		} else {
			for _, s := range sends {
				err = errors.Join(err, c.Send(ctx, s.Agent, s.Task))
			}
		}
		if err != nil {
			return Table{}, fmt.Errorf("send %s: %w", m.name, err)
		}
		rate := n / time.Since(begin).Seconds()
		t.Figures[strings.ReplaceAll(m.name, " ", "-")+"/s"] = rate
		t.Rows = append(t.Rows, []string{m.name, strconv.Itoa(n), fmt.Sprintf("%.0f", rate)})
	}
	return t, nil
}
