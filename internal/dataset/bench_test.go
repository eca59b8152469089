package dataset_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"lorayard/internal/dataset"
)

const demo = "../../scripts/train/testdata/demo.jsonl"

// corpus yields house-format lines like the app's real ones, every one with
// words of its own, until size bytes.
func corpus(tb testing.TB, size int) []byte {
	tb.Helper()
	raw, err := os.ReadFile(demo)
	if err != nil {
		tb.Fatal(err)
	}
	rows := strings.Split(strings.TrimSpace(string(raw)), "\n")[1:]
	var out bytes.Buffer
	for n := 0; out.Len() < size; n++ {
		row := rows[n%len(rows)]
		row = strings.Replace(row, `"conversation_id": "`, fmt.Sprintf(`"conversation_id": "%d-`, n/len(rows)), 1)
		row = strings.Replace(row, `"target_response": "`, fmt.Sprintf(`"target_response": "On visit %d: `, n), 1)
		out.WriteString(row)
		out.WriteByte('\n')
	}
	return out.Bytes()
}

// BenchmarkValidate compares the whole validation (checks, statistics, personal
// data, split, the normalised file and its digest) with a loop that does
// nothing but decode each line.
func BenchmarkValidate(b *testing.B) {
	data := corpus(b, 32<<20)
	var rate [2]float64
	b.Run("encoding/json", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			s := bufio.NewScanner(bytes.NewReader(data))
			s.Buffer(make([]byte, 1<<20), 8<<20)
			for s.Scan() {
				var row map[string]any
				if err := json.Unmarshal(s.Bytes(), &row); err != nil {
					b.Fatal(err)
				}
			}
		}
		rate[0] = float64(len(data)) * float64(b.N) / b.Elapsed().Seconds()
	})
	b.Run("ours", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			r, err := dataset.Validate(bytes.NewReader(data), dataset.Options{Normalised: io.Discard})
			if err != nil || !r.OK {
				b.Fatal(err, r.Problems)
			}
		}
		rate[1] = float64(len(data)) * float64(b.N) / b.Elapsed().Seconds()
		if rate[0] > 0 {
			b.ReportMetric(rate[1]/rate[0], "x-encoding/json")
		}
	})
}
