package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"lorayard/internal/agent"
	"lorayard/internal/config"
)

// quarantine lists how the running agent's devices stand, or takes one out of
// quarantine.
func quarantine(ctx context.Context, args, environ []string, stdout io.Writer) error {
	var t telling
	rest, err := config.Load(&t, args, environ)
	switch {
	case errors.Is(err, config.ErrHelp):
		config.Usage(stdout, &t)
		return nil
	case err != nil:
		return err
	case len(rest) == 0:
		s, err := ask(ctx, t.DataDir, agent.Command{Do: "status"})
		if err != nil {
			return err
		}
		return listDevices(stdout, s.Devices)
	case len(rest) != 2 || rest[0] != "lift":
		return fmt.Errorf("%q is not known here: `agent quarantine` lists devices, `agent quarantine lift UUID` lets one be used again", strings.Join(rest, " "))
	}
	s, err := ask(ctx, t.DataDir, agent.Command{Do: "lift", Device: rest[1]})
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "device %s may be used again; the next job on it begins with a check\n", rest[1])
	return listDevices(stdout, s.Devices)
}

func listDevices(w io.Writer, devices []agent.DeviceStatus) error {
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "GPU\tUUID\tSTATE\tSINCE\tJOB\tWHY")
	for _, d := range devices {
		index, since := "-", "-"
		if d.Index >= 0 {
			index = fmt.Sprint(d.Index)
		}
		if !d.Since.IsZero() && d.State != "ok" {
			since = d.Since.Local().Format(time.DateTime)
		}
		why := d.Reason
		if d.Todo != "" {
			why += ": " + d.Todo
		}
		if d.State == "ok" && d.Check {
			why = "the next job on it begins with a check"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", index, d.UUID, d.State, since, d.Job, why)
	}
	return tw.Flush()
}
