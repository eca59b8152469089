package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"lorayard/internal/agent"
	"lorayard/internal/config"
)

// telling are the settings of the verbs that talk to the running agent.
type telling struct {
	DataDir string        `flag:"data-dir" env:"DATA_DIR" default:"/var/lib/lorayard" help:"data directory of the running agent"`
	Within  time.Duration `flag:"within" env:"WITHIN" default:"0s" help:"drain: how long attempts may go on; after that they save a checkpoint and are handed back"`
	NoWait  bool          `flag:"no-wait" env:"NO_WAIT" help:"drain, restart: do not wait until it is done"`
}

// tell tells the running agent to drain, to restart, or to say what it does.
func tell(ctx context.Context, verb string, args, environ []string, stdout io.Writer) error {
	var t telling
	rest, err := config.Load(&t, args, environ)
	if errors.Is(err, config.ErrHelp) {
		config.Usage(stdout, &t)
		return nil
	}
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("%q is neither a flag nor expected here", rest[0])
	}
	if err != nil {
		return err
	}
	before, err := ask(ctx, t.DataDir, agent.Command{Do: verb, WithinSeconds: t.Within.Seconds()})
	if err != nil {
		return err
	}
	switch verb {
	case "status":
		return report(stdout, before)
	case "drain":
		fmt.Fprintf(stdout, "agent %s takes nothing new; %d attempts have %v to end\n", before.Agent, len(before.Attempts), t.Within)
	case "restart":
		fmt.Fprintf(stdout, "agent %s steps aside; %d attempts go on\n", before.Agent, len(before.Attempts))
	}
	if t.NoWait {
		return nil
	}
	return await(ctx, t.DataDir, verb, before, stdout)
}

// await looks twice a second until the drain or the restart is over: the
// process that could tell is the one that ends.
func await(ctx context.Context, dataDir, verb string, before agent.Status, stdout io.Writer) error {
	left := len(before.Attempts)
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("not waiting any longer; the %s goes on", verb)
		case <-time.After(500 * time.Millisecond):
		}
		now, err := ask(ctx, dataDir, agent.Command{Do: "status"})
		switch {
		case errors.Is(err, agent.ErrNoAgent) && verb == "drain":
			fmt.Fprintf(stdout, "agent %s has left\n", before.Agent)
			return nil
		case err == nil && verb == "restart" && now.State == "takes work" && now.Started.After(before.Started):
			fmt.Fprintf(stdout, "agent %s is back with %d attempts\n", now.Agent, len(now.Attempts))
			return nil
		case err == nil && verb == "drain" && len(now.Attempts) < left:
			left = len(now.Attempts)
			fmt.Fprintf(stdout, "%d attempts left\n", left)
		}
	}
}

func ask(ctx context.Context, dataDir string, c agent.Command) (agent.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return agent.Tell(ctx, dataDir, c)
}

func report(w io.Writer, s agent.Status) error {
	fmt.Fprintf(w, "agent %s, process %d, since %s: %s\n", s.Agent, s.PID, s.Started.Local().Format(time.DateTime), s.State)
	slices.SortFunc(s.Attempts, func(a, b agent.AttemptStatus) int { return strings.Compare(a.Job, b.Job) })
	for _, a := range s.Attempts {
		fmt.Fprintf(w, "  job %s, attempt %d, for %v\n", a.Job, a.Attempt, time.Since(a.Since).Round(time.Second))
	}
	if len(s.Attempts) == 0 {
		fmt.Fprintln(w, "  runs nothing")
	}
	return nil
}
