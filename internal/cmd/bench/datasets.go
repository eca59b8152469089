package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"lorayard/internal/dataset"
	"lorayard/internal/queue/queuebench"
)

// datasets measures the validation of house-format lines like the app's real
// ones: speed on one core, by CPU time, and the memory of a process of its own.
func datasets(ctx context.Context, _ *ground, o options) (queuebench.Table, error) {
	size, large := 64<<20, 500<<20
	if o.quick {
		size, large = 4<<20, 32<<20
	}
	raw, err := os.ReadFile(filepath.Join(o.trainer, "testdata", "demo.jsonl"))
	if err != nil {
		return queuebench.Table{}, fmt.Errorf("read the demo's data: %w", err)
	}
	data := talks(raw, size)
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	if _, err := z.Write(data); err != nil {
		return queuebench.Table{}, err
	}
	if err := z.Close(); err != nil {
		return queuebench.Table{}, err
	}
	plain, err := pace(len(data), func() error { return decode(data) })
	if err != nil {
		return queuebench.Table{}, err
	}
	ours, err := pace(len(data), func() error { return check(bytes.NewReader(data)) })
	if err != nil {
		return queuebench.Table{}, err
	}
	packed, err := pace(len(data), func() error { return check(bytes.NewReader(zipped.Bytes())) })
	if err != nil {
		return queuebench.Table{}, err
	}
	memory, err := memoryOf(ctx, filepath.Join(o.bin, "dispatcher"), data, large)
	if err != nil {
		return queuebench.Table{}, err
	}
	mb := func(rate float64) string { return fmt.Sprintf("%.0f MB/s", rate/1e6) }
	t := table(
		fmt.Sprintf("Data sets: %d MB of house-format lines, one core, by CPU time; the baseline only decodes", size>>20),
		goal{"every check, statistics, normalised file and its digest", "encoding/json " + mb(plain), mb(ours), fmt.Sprintf("%.1f", ours/plain), "≥ 300 MB/s", yes(ours >= 300e6)},
		goal{what: "the same of a gzip file, of what is in it", ours: mb(packed), ratio: fmt.Sprintf("%.1f", packed/plain)},
		goal{what: fmt.Sprintf("resident memory for %d MB", large>>20), ours: fmt.Sprintf("%d MiB", memory>>20), goal: "≤ 64 MiB", met: yes(memory <= 64<<20)},
	)
	t.Figures["validate_bytes_per_second"], t.Figures["decode_bytes_per_second"], t.Figures["validate_memory_bytes"] = ours, plain, float64(memory)
	return t, nil
}

// talks are the lines of a file again and again, each with words of its own.
func talks(raw []byte, size int) []byte {
	rows := strings.Split(strings.TrimSpace(string(raw)), "\n")[1:] // without _meta
	var out bytes.Buffer
	for n := 0; out.Len() < size; n++ {
		row := strings.Replace(rows[n%len(rows)], `"conversation_id": "`, fmt.Sprintf(`"conversation_id": "%d-`, n/len(rows)), 1)
		out.WriteString(strings.Replace(row, `"target_response": "`, fmt.Sprintf(`"target_response": "On visit %d: `, n), 1))
		out.WriteByte('\n')
	}
	return out.Bytes()
}

// pace is the best of three, in bytes a second of CPU time on one core.
func pace(size int, run func() error) (best float64, err error) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	for range 3 {
		runtime.GC()
		before, err := ownCPU()
		if err != nil {
			return 0, err
		}
		if err := run(); err != nil {
			return 0, err
		}
		after, err := ownCPU()
		if err != nil {
			return 0, err
		}
		best = max(best, float64(size)/(after-before).Seconds())
	}
	return best, nil
}

func ownCPU() (time.Duration, error) {
	var own syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &own); err != nil {
		return 0, fmt.Errorf("read our own CPU time: %w", err)
	}
	return time.Duration(own.Utime.Nano() + own.Stime.Nano()), nil
}

func decode(data []byte) error {
	s := bufio.NewScanner(bytes.NewReader(data))
	s.Buffer(make([]byte, 1<<20), dataset.MostLineBytes)
	for s.Scan() {
		var row map[string]any
		if err := json.Unmarshal(s.Bytes(), &row); err != nil {
			return err
		}
	}
	return s.Err()
}

func check(r io.Reader) error {
	report, err := dataset.Validate(r, dataset.Options{Normalised: io.Discard})
	if err == nil && !report.OK {
		err = fmt.Errorf("the benchmark's own data is bad: %s", report.Problems[0].Message)
	}
	return err
}

// memoryOf is the most resident memory, in bytes, of a process that validates
// size bytes from a pipe, as a dispatcher does from Storage.
func memoryOf(ctx context.Context, dispatcher string, data []byte, size int) (int64, error) {
	cmd := exec.CommandContext(ctx, dispatcher, "validate", "/dev/stdin", "--normalised", os.DevNull)
	in, err := cmd.StdinPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start %s: %w", dispatcher, err)
	}
	for written := 0; written < size; {
		n, err := in.Write(data)
		if err != nil {
			break // its exit says why
		}
		written += n
	}
	// Not the rusage of its end: that counts what this process had when it
	// started it.
	status, statusErr := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	_ = in.Close()
	if err := errors.Join(cmd.Wait(), statusErr); err != nil {
		return 0, fmt.Errorf("validate %d bytes: %w", size, err)
	}
	_, peak, _ := strings.Cut(string(status), "VmHWM:")
	var kib int64
	if _, err := fmt.Sscan(peak, &kib); err != nil {
		return 0, fmt.Errorf("read the memory of the validation: %w", err)
	}
	return kib << 10, nil
}
