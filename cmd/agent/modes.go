package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
)

// lookAtModes says what keeps jobs from running on a GPU, or makes them slow,
// though it is well: compute and persistence mode, changes that wait for a reset,
// memory without spare rows, the NVLink fabric.
func lookAtModes(ctx context.Context, h *host) finding {
	f := finding{what: "GPU modes", todo: "change what is named, on the host; the agent changes no mode"}
	switch {
	case h == nil:
		f.seen = "not known without a driver" // which is said already
		return f
	case h.driver == nil:
		f.seen = "pretended"
		return f
	}
	f.seen = "nothing is in a job's way"
	var said []string
	usable := 0
	details := detailsOf(ctx, h.driver, h.list)
	for _, d := range h.list {
		x, known := details[d.UUID]
		why := x.Problem()
		if known && why == "" {
			usable++
		}
		for _, words := range append([]string{why}, x.Remarks()...) {
			if words != "" {
				said = append(said, fmt.Sprintf("GPU %d: %s", d.Index, words))
			}
		}
	}
	if len(said) > 0 {
		f.err, f.mild = errors.New(strings.Join(said, "; ")), usable > 0
	}
	return f
}
