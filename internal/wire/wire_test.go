package wire_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"lorayard/internal/wire"
)

// The transcripts are written by the Python emitter; both sides read them.
func TestGoldenTranscriptsAreUnderstood(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.ndjson")
	if err != nil || len(paths) < 4 {
		t.Fatalf("transcripts: %v, %v", paths, err)
	}
	known := map[string]bool{
		"hello": true, "stage": true, "plan": true, "sample": true, "eval": true, "checkpoint": true,
		"log": true, "heartbeat": true, "error": true, "result": true, "exit": true,
	}
	for _, path := range paths {
		t.Run(filepath.Base(path), func(t *testing.T) {
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			d := wire.NewDecoder(f)
			var last wire.Event
			for {
				e, _, err := d.Next()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				if !known[e.Ev] {
					t.Errorf("event %q is not in PROTOCOL.md", e.Ev)
				}
				switch {
				case e.Ev == "sample" && (e.Step < 1 || e.TS == 0):
					t.Errorf("sample without step or time: %+v", e)
				case e.Ev == "checkpoint" && (len(e.Files) == 0 || e.ManifestSHA256 == "" || e.Path == ""):
					t.Errorf("checkpoint without files: %+v", e)
				case e.Ev == "error" && (e.Kind == "" || e.Message == "" || e.Hint == ""):
					t.Errorf("error without kind, message or hint: %+v", e)
				case e.Ev == "plan" && (e.MemoryPlan == nil || e.MemoryPlan.BudgetTokens == 0):
					t.Errorf("plan without a plan of the memory: %+v", e)
				case e.Ev == "result" && (len(e.Files) == 0 || e.Steps == 0):
					t.Errorf("result without files: %+v", e)
				}
				last = e
			}
			if last.Ev != "exit" {
				t.Errorf("the last event is %q, want exit", last.Ev)
			}
		})
	}
}

func TestDecoderRefuses(t *testing.T) {
	for name, lines := range map[string]string{
		"not json":    "{\n",
		"a gap":       `{"v":1,"seq":1,"ev":"hello"}` + "\n" + `{"v":1,"seq":3,"ev":"stage"}` + "\n",
		"a newer one": `{"v":2,"seq":1,"ev":"hello"}` + "\n",
		"no seq":      `{"v":1,"ev":"hello"}` + "\n",
		"too long":    `{"v":1,"seq":1,"ev":"log","message":"` + strings.Repeat("x", wire.MaxLine) + "\"}\n",
	} {
		d := wire.NewDecoder(strings.NewReader(lines))
		var err error
		for err == nil {
			_, _, err = d.Next()
		}
		if !errors.Is(err, wire.ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNonFiniteNumbersTravelAsText(t *testing.T) {
	for _, want := range []float64{1.25, math.Inf(1), math.Inf(-1), math.NaN(), 1e300, -0.1} {
		raw, err := json.Marshal(wire.Float(want))
		if err != nil {
			t.Fatal(err)
		}
		var got wire.Float
		if err := json.Unmarshal(raw, &got); err != nil {
			t.Fatal(err)
		}
		if float64(got) != want && !(math.IsNaN(want) && math.IsNaN(float64(got))) {
			t.Errorf("%v came back as %v", want, got)
		}
	}
	var f wire.Float
	if json.Unmarshal([]byte(`"many"`), &f) == nil {
		t.Error("a word is not a number")
	}
}

func FuzzDecoder(f *testing.F) {
	f.Add([]byte(`{"v":1,"seq":1,"ev":"sample","step":1,"loss":"NaN"}` + "\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		d := wire.NewDecoder(bytes.NewReader(raw))
		for n := uint64(1); ; n++ {
			e, line, err := d.Next()
			if err != nil {
				return
			}
			if e.Seq != n || len(line) == 0 {
				t.Fatalf("event %d has seq %d", n, e.Seq)
			}
		}
	})
}
