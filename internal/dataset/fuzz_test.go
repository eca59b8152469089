package dataset_test

import (
	"bytes"
	"encoding/json"
	"testing"
	"testing/iotest"
	"unicode/utf8"

	"lorayard/internal/dataset"
)

// FuzzValidate looks for panics, for verdicts that depend on how the bytes
// arrive, for lines that pass here and not elsewhere, and for normalised files
// that are not what they were made of. Its seeds are the table of cases.
func FuzzValidate(f *testing.F) {
	for _, h := range table(f) {
		if raw := h.content(f); len(raw) < 4096 {
			f.Add(raw)
		}
	}
	limits := dataset.Options{MostBytes: 1 << 20, MostLineBytes: 4096}
	f.Fuzz(func(t *testing.T, raw []byte) {
		var out bytes.Buffer
		o := limits
		o.Normalised = &out
		r, err := dataset.Validate(bytes.NewReader(raw), o)
		if err != nil {
			t.Fatal(err)
		}
		pieces, err := dataset.Validate(iotest.HalfReader(bytes.NewReader(raw)), limits)
		if err != nil || pieces.OK != r.OK || pieces.BadLines != r.BadLines || pieces.Tokens != r.Tokens {
			t.Fatalf("in pieces: %v %+v, at once: %+v", err, pieces, r)
		}
		if said, err := json.Marshal(r); err != nil || !utf8.Valid(said) {
			t.Fatalf("a report that cannot be stored: %v", err)
		}
		for _, s := range r.Samples {
			for _, turn := range s.Turns {
				if !utf8.ValidString(turn.Content) {
					t.Fatal("a sample that is not UTF-8")
				}
			}
		}
		if r.OK != (len(r.Problems) == 0) || r.OK && r.Examples == 0 || r.TrainingPairs+r.ValidationPairs != r.Examples {
			t.Fatalf("%+v", r)
		}
		if !r.OK {
			return
		}
		for line := range bytes.Lines(out.Bytes()) {
			if string(line) != "\n" && !json.Valid(line) {
				t.Fatalf("encoding/json refuses %q", line)
			}
		}
		var again bytes.Buffer
		o.Normalised, o.MostLineBytes, o.MostBytes = &again, 8192, 2<<20
		n, err := dataset.Validate(bytes.NewReader(out.Bytes()), o)
		if err != nil || !n.OK || n.Examples != r.Examples || n.Turns != r.Turns || n.Tokens != r.Tokens || n.ValidationPairs != r.ValidationPairs {
			t.Fatalf("normalised: %v\n%+v\n%+v", err, n, r)
		}
		if !bytes.Equal(again.Bytes(), out.Bytes()) {
			t.Fatalf("normalising twice changes\n%s\n%s", out.Bytes(), again.Bytes())
		}
	})
}
