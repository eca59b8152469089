package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"lorayard/internal/config"
	"lorayard/internal/dataset"
)

// validation are the settings of validate.
type validation struct {
	JSON       bool   `flag:"json" env:"VALIDATE_JSON" help:"print the whole report as JSON"`
	Normalised string `flag:"normalised" env:"VALIDATE_NORMALISED" help:"write the file that the trainer would read to this path"`
	Show       int    `flag:"show" env:"VALIDATE_SHOW" default:"20" help:"the most problems to print"`
}

// validate judges a local data file as the dispatcher judges one in Storage. A
// file that cannot be trained on is an error.
func validate(args, environ []string, stdout io.Writer) error {
	var named []string
	for len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		named, args = append(named, args[0]), args[1:]
	}
	var o validation
	rest, err := config.Load(&o, args, environ)
	if errors.Is(err, config.ErrHelp) {
		config.Usage(stdout, &o)
		return nil
	}
	if err != nil {
		return err
	}
	if named = append(named, rest...); len(named) != 1 {
		return errors.New("usage: dispatcher validate [flags] FILE")
	}
	r, err := judge(named[0], o.Normalised)
	if err != nil {
		return err
	}
	if o.JSON {
		e := json.NewEncoder(stdout)
		e.SetIndent("", "  ")
		err = e.Encode(r)
	} else {
		err = printReport(stdout, r, o.Show)
	}
	if err == nil && !r.OK {
		err = fmt.Errorf("%s cannot be trained on: %s", named[0], counted(r.BadLines, "problem"))
	}
	return err
}

func judge(path, normalised string) (r *dataset.Report, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if normalised == "" {
		return dataset.Validate(f, dataset.Options{})
	}
	in, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi, err := os.Stat(normalised); err == nil && os.SameFile(in, fi) {
		return nil, errors.New("--normalised names the data file itself, which would be lost")
	}
	out, err := os.Create(normalised)
	if err != nil {
		return nil, err
	}
	r, err = dataset.Validate(f, dataset.Options{Normalised: out})
	fi, statErr := out.Stat()
	err = errors.Join(err, statErr, out.Close())
	if (err != nil || !r.OK) && statErr == nil && fi.Mode().IsRegular() { // half a file helps nobody; a device stays
		err = errors.Join(err, os.Remove(normalised))
	}
	return r, err
}

func counted(n int64, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func printReport(stdout io.Writer, r *dataset.Report, show int) error {
	w := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(w, name+"\t"+format+"\n", args...) }
	if r.Format != "" {
		row("format", "%s", r.Format)
	}
	row("size", "%d bytes, %s", r.Bytes, counted(r.Lines, "line"))
	if r.Examples > 0 {
		row("examples", "%d: %d to train on, %d to measure with, of %s", r.Examples, r.TrainingPairs, r.ValidationPairs, counted(r.Conversations, "conversation"))
		row("turns", "%d, %.2f a conversation", r.Turns, r.AvgTurnsPerConversation)
		row("tokens", "about %d, %d of them in answers, %.2f a turn", r.Tokens, r.TrainedTokens, r.AvgTokensPerTurn)
		row("length", "half of the examples up to %d tokens, 90 %% up to %d, 99 %% up to %d, the longest %d", r.Lengths.P50, r.Lengths.P90, r.Lengths.P99, r.Lengths.Max)
		var roles []string
		for _, role := range slices.Sorted(maps.Keys(r.Roles)) {
			roles = append(roles, fmt.Sprintf("%s %d", role, r.Roles[role]))
		}
		row("roles", "%s", strings.Join(roles, ", "))
	}
	if n := r.Normalised; n != nil {
		row("normalised", "%d bytes, sha256 %s", n.Bytes, n.SHA256)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for i, p := range r.Problems {
		if i == show {
			fmt.Fprintf(stdout, "\nand %s more\n", counted(r.BadLines-int64(show), "problem"))
			break
		}
		where := "the whole file"
		if p.Line > 0 {
			where = fmt.Sprintf("line %d", p.Line)
		}
		if p.Column > 0 {
			where += fmt.Sprintf(", column %d", p.Column)
		}
		if p.Pointer != "" {
			where += ", " + p.Pointer
		}
		fmt.Fprintf(stdout, "\n%s: %s\n  %s\n  %s\n", where, p.Code, p.Message, p.Suggestion)
	}
	for _, f := range r.Findings {
		fmt.Fprintf(stdout, "\nworth a look: %s", f.Code)
		if f.LineCount > 0 {
			fmt.Fprintf(stdout, ", %d in %s:", f.Count, counted(f.LineCount, "line"))
			for _, n := range f.Lines {
				fmt.Fprintf(stdout, " %d", n)
			}
			if f.LineCount > int64(len(f.Lines)) {
				fmt.Fprint(stdout, " ...")
			}
		}
		fmt.Fprintf(stdout, "\n  %s\n  %s\n", f.Message, f.Suggestion)
	}
	_, err := fmt.Fprintln(stdout)
	return err
}
