package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"

	"lorayard/internal/config"
	"lorayard/internal/job"
	"lorayard/internal/queue"
	"lorayard/internal/store"
)

// operation are the settings of the operator's verbs.
type operation struct {
	DatabaseURL config.Secret `flag:"database-url" env:"DATABASE_URL" required:"true" example:"postgres://user:password@host:5432/postgres" help:"the app's Postgres"`
	RedisURL    config.Secret `flag:"redis-url" env:"REDIS_URL" example:"redis://:password@host:6379/0" help:"forget: Redis, to remove the agent's queue as well"`
	Reason      string        `flag:"reason" env:"REASON" help:"cordon, drain: why, for whoever looks at the list"`
	Within      time.Duration `flag:"within" env:"WITHIN" default:"30m" help:"drain: how long attempts may go on; after that they save a checkpoint and go elsewhere"`
	Limit       int           `flag:"limit" env:"LIMIT" default:"200" help:"jobs: the most to list"`
}

// operate carries out one of the operator's verbs. What it asks for is written
// into the database: it needs no dispatcher to run, and is not lost if none
// does.
func operate(ctx context.Context, verb string, args, environ []string, stdout io.Writer) error {
	// What the verb is about comes first, so that flags may follow it.
	var named []string
	for len(args) > 0 && len(args[0]) > 0 && (args[0][0] != '-' || isNumber(args[0])) {
		named, args = append(named, args[0]), args[1:]
	}
	var o operation
	rest, err := config.Load(&o, args, environ)
	if errors.Is(err, config.ErrHelp) {
		config.Usage(stdout, &o)
		return nil
	}
	if err != nil {
		return err
	}
	named = append(named, rest...)
	if want := arguments[verb]; len(named) != len(want) {
		return fmt.Errorf("usage: dispatcher %s [flags]", strings.Join(append([]string{verb}, want...), " "))
	}
	if len(named) > 0 && arguments[verb][0] == "JOB" && uuid.Validate(named[0]) != nil {
		return fmt.Errorf("%q is not the id of a job; `dispatcher jobs` lists them", named[0])
	}
	st, err := store.Open(ctx, o.DatabaseURL.Reveal(), store.Options{Name: "lorayard-operator", MaxConns: 1})
	if err != nil {
		return err
	}
	defer st.Close()
	if err := carryOut(ctx, st, verb, named, o, stdout); err != nil {
		if missing, ok := errors.AsType[*store.NotFoundError](err); ok && missing.What == "agent" {
			return fmt.Errorf("%w: `dispatcher agents` lists those that there are", err)
		}
		return err
	}
	return nil
}

// arguments names what each verb is about.
var arguments = map[string][]string{
	"agents": {}, "jobs": {}, "cordon": {"AGENT"}, "uncordon": {"AGENT"}, "drain": {"AGENT"},
	"forget": {"AGENT"}, "pause": {"JOB"}, "resume": {"JOB"}, "prioritize": {"JOB", "N"},
}

func isNumber(s string) bool {
	_, err := strconv.Atoi(s)
	return err == nil
}

func carryOut(ctx context.Context, st *store.Store, verb string, named []string, o operation, stdout io.Writer) error {
	name := ""
	if len(named) > 0 {
		name = named[0]
	}
	id := job.ID(name)
	var err error
	var done string
	switch verb {
	case "agents":
		return listAgents(ctx, st, stdout)
	case "jobs":
		return listJobs(ctx, st, o.Limit, stdout)
	case "cordon":
		err, done = st.Cordon(ctx, name, o.Reason), "agent "+name+" is given nothing new"
	case "uncordon":
		err, done = st.Uncordon(ctx, name), "agent "+name+" takes work again"
	case "drain":
		err, done = st.Drain(ctx, name, o.Within, o.Reason), fmt.Sprintf("agent %s is drained: its attempts may go on for %v", name, o.Within)
	case "forget":
		err, done = forget(ctx, st, name, o.RedisURL.Reveal()), "agent "+name+" is forgotten"
	case "pause":
		err, done = st.Pause(ctx, id), "job "+name+" is paused; `dispatcher resume "+name+"` lets it go on"
	case "resume":
		err, done = st.Resume(ctx, id), "job "+name+" goes on when there is room"
	case "prioritize":
		n, bad := strconv.Atoi(named[1])
		if bad != nil {
			return fmt.Errorf("%q is not a whole number", named[1])
		}
		err, done = st.Prioritize(ctx, id, n), fmt.Sprintf("job %s has priority %d", name, n)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(stdout, done)
	return err
}

// forget removes an agent from the database and, where its address is known,
// from Redis; there its queue harms nobody.
func forget(ctx context.Context, st *store.Store, agent, redisURL string) error {
	if err := st.Forget(ctx, agent); err != nil || redisURL == "" {
		return err
	}
	q, err := queue.Dial(redisURL)
	if err != nil {
		return err
	}
	defer q.Close()
	return q.Forget(ctx, agent)
}

func listAgents(ctx context.Context, st *store.Store, stdout io.Writer) error {
	agents, err := st.Agents(ctx)
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "AGENT\tHOST\tVERSION\tSTATE\tDEVICES\tHELD\tUNFIT\tCLASSES")
	for _, a := range agents {
		state := "takes work"
		switch {
		case a.LeaseLeft < 0:
			state = "silent for " + (-a.LeaseLeft).Round(time.Second).String()
		case a.Closed != "":
			state = a.Closed
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%d\t%d\t%s\n", a.Agent, a.Hostname, a.Version, state, a.Devices, a.Held, a.Unfit, a.Classes)
	}
	return w.Flush()
}

func listJobs(ctx context.Context, st *store.Store, n int, stdout io.Writer) error {
	jobs, err := st.Jobs(ctx, n)
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "JOB\tSTATE\tSTAGE\tATTEMPT\tPRIORITY\tAGENT\tSTART\tWHY IT WAITS")
	for _, j := range jobs {
		start := ""
		if j.Earliest != nil {
			start = j.Earliest.Local().Format("Jan 2 15:04")
			if j.Latest != nil {
				start += " to " + j.Latest.Local().Format("15:04")
			}
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%s\t%s\t%s\n", j.Job, j.State, j.Stage, j.Attempt, j.Priority, j.Agent, start, j.Waiting)
	}
	return w.Flush()
}
