package dataset_test

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"lorayard/internal/dataset"
)

// hostile is one case of the table that the trainer's reader is held to as
// well (scripts/train/tests/test_data.py). Bad lists the lines that must be
// reported, and no others; line 0 is the whole file.
type hostile struct {
	Name   string
	Text   string
	Base64 string // in place of Text
	Head   string // or these: Head, Times × Unit, Tail
	Unit   string
	Times  int
	Tail   string
	// Numbered puts 0, 1, 2 ... for each # of Unit.
	Numbered bool
	Gzip     bool
	Format   dataset.Format // empty: not said
	Bad      [][2]any
}

func (h hostile) content(tb testing.TB) []byte {
	units := strings.Repeat(h.Unit, h.Times)
	if h.Numbered {
		var b strings.Builder
		for i := range h.Times {
			b.WriteString(strings.ReplaceAll(h.Unit, "#", strconv.Itoa(i)))
		}
		units = b.String()
	}
	raw := []byte(h.Text + h.Head + units + h.Tail)
	if h.Base64 != "" {
		var err error
		if raw, err = base64.StdEncoding.DecodeString(h.Base64); err != nil {
			tb.Fatal(err)
		}
	}
	if h.Gzip {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		_, _ = z.Write(raw)
		z.Close()
		raw = b.Bytes()
	}
	return raw
}

func table(tb testing.TB) []hostile {
	tb.Helper()
	raw, err := os.ReadFile("testdata/cases.json")
	if err != nil {
		tb.Fatal(err)
	}
	var cases []hostile
	if err := json.Unmarshal(raw, &cases); err != nil {
		tb.Fatal(err)
	}
	return cases
}

// What good cases become, for the trainer's test to compare.
const becomes = "testdata/normalised.json"

var update = flag.Bool("update", false, "write "+becomes)

func TestTheTableOfCases(t *testing.T) {
	cases := table(t)
	if len(cases) < 300 {
		t.Errorf("only %d cases", len(cases))
	}
	written := map[string]string{}
	used := map[dataset.Code]bool{dataset.FileTooLarge: true} // of 1 GiB: in TestLimits
	for _, h := range cases {
		var out bytes.Buffer
		r, err := dataset.Validate(bytes.NewReader(h.content(t)), dataset.Options{Normalised: &out})
		if err != nil {
			t.Errorf("%s: %v", h.Name, err)
			continue
		}
		var got, want []string
		for _, p := range r.Problems {
			got = append(got, fmt.Sprint(p.Line, " ", p.Code))
			used[p.Code] = true
			if p.Message == "" || p.Suggestion == "" {
				t.Errorf("%s: no words for %s", h.Name, p.Code)
			}
		}
		for _, b := range h.Bad {
			want = append(want, fmt.Sprint(b[0], " ", b[1]))
		}
		if fmt.Sprint(got) != fmt.Sprint(want) || r.OK != (len(want) == 0) {
			t.Errorf("%s: got %v, want %v", h.Name, got, want)
		}
		if h.Format != "" && r.Format != h.Format {
			t.Errorf("%s: format %q, want %q", h.Name, r.Format, h.Format)
		}
		if !r.OK {
			continue
		}
		if out.Len() < 10_000 {
			written[h.Name] = out.String()
		}
		// What is good stays good, and the same, when it is normalised.
		// A line may grow by a third; the trainer takes twice as much.
		n, err := dataset.Validate(bytes.NewReader(out.Bytes()), dataset.Options{MostLineBytes: 2 * dataset.MostLineBytes})
		if err != nil || !n.OK || n.Examples != r.Examples || n.Turns != r.Turns || n.Tokens != r.Tokens {
			t.Errorf("%s: normalised: %v %+v", h.Name, err, n)
		}
	}
	golden(t, written)
	for _, c := range dataset.Codes() {
		if !used[c] {
			t.Errorf("no case has the code %s", c)
		}
	}
}

func golden(t *testing.T, written map[string]string) {
	t.Helper()
	got, err := json.MarshalIndent(written, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		if err := os.WriteFile(becomes, append(got, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(becomes)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(bytes.TrimSpace(want), got) {
		t.Errorf("%s is not what is written today; look at what -update changes", becomes)
	}
}
