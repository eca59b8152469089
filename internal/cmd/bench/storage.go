package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"lorayard/internal/queue/queuebench"
	"lorayard/internal/storage"
	"lorayard/internal/storage/local"
)

const storageKey = "key-of-the-benchmark"

// storages compares our transfers with curl's, against the local store: what the
// client costs, not what a network gives. Digests are part of ours.
func storages(ctx context.Context, _ *ground, o options) (_ queuebench.Table, err error) {
	large, small := int64(1<<30), 20
	if o.quick {
		large, small = 24<<20, 3
	}
	dir, err := os.MkdirTemp("", "lorayard-bench-storage")
	if err != nil {
		return queuebench.Table{}, err
	}
	defer os.RemoveAll(dir)
	srv, err := local.New(local.Config{Dir: filepath.Join(dir, "store"), Secret: "secret-of-the-benchmark", ServiceKey: storageKey})
	if err != nil {
		return queuebench.Table{}, err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return queuebench.Table{}, err
	}
	server := &http.Server{Handler: srv, ReadHeaderTimeout: time.Minute}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	s := &shop{dir: dir, base: "http://" + l.Addr().String()}
	if s.client, err = storage.Open(storage.Config{URL: s.base, Key: storageKey}); err != nil {
		return queuebench.Table{}, err
	}
	defer s.client.Close()
	if err := s.client.EnsureBucket(ctx, "b", storage.BucketOptions{}); err != nil {
		return queuebench.Table{}, err
	}
	one, err := s.file("one", storage.ChunkBytes)
	if err != nil {
		return queuebench.Table{}, err
	}
	big, err := s.file("big", large)
	if err != nil {
		return queuebench.Table{}, err
	}
	times := 3
	if o.quick {
		times = 1
	}
	whole, err := s.compare(ctx, small, s.up(one), s.curlUp(one))
	if err != nil {
		return queuebench.Table{}, err
	}
	if _, err := s.up(big)(ctx); err != nil { // and the files are in the page cache
		return queuebench.Table{}, err
	}
	memory, err := peak(func() error { _, err := s.up(big)(ctx); return err })
	if err != nil {
		return queuebench.Table{}, err
	}
	parts, err := s.compare(ctx, times, s.up(big), s.curlUp(big))
	if err != nil {
		return queuebench.Table{}, err
	}
	down, err := s.compare(ctx, times, s.down, s.curlDown)
	if err != nil {
		return queuebench.Table{}, err
	}
	row := func(what string, size int64, m [2]time.Duration, goalText string, atLeast float64) goal {
		rate := func(d time.Duration) string {
			if d == 0 {
				return ""
			}
			return fmt.Sprintf("%.0f MiB/s", float64(size>>20)/d.Seconds())
		}
		g := goal{what: what, ours: rate(m[0]), goal: goalText}
		if m[1] > 0 {
			ratio := m[1].Seconds() / m[0].Seconds()
			g.baseline, g.ratio = "curl "+rate(m[1]), fmt.Sprintf("%.2f", ratio)
			if atLeast > 0 {
				g.met = yes(ratio >= atLeast)
			}
		}
		return g
	}
	t := table(fmt.Sprintf("Storage: our client, digests included, against curl without; the local store, medians of %d and %d", small, times),
		row("upload of 6 MiB in one request", storage.ChunkBytes, whole, "≥ 0.95 of curl", 0.95),
		row(fmt.Sprintf("upload of %d MiB in parts of 6 MiB, each where it left off", large>>20), large, parts, "", 0),
		row(fmt.Sprintf("download of %d MiB", large>>20), large, down, "≥ 0.95 of curl", 0.95),
		goal{what: "resident memory at most during that upload, of client and store", ours: fmt.Sprintf("%d MiB more than before", memory>>20)},
	)
	t.Figures["upload_seconds"], t.Figures["download_seconds"] = parts[0].Seconds(), down[0].Seconds()
	return t, nil
}

// peak is by how many bytes of resident memory this process grew at most while f
// ran.
func peak(f func() error) (int64, error) {
	runtime.GC()
	debug.FreeOSMemory()
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil { // the peak begins anew
		return 0, err
	}
	before, err := resident()
	if err != nil {
		return 0, err
	}
	if err := f(); err != nil {
		return 0, err
	}
	after, err := resident()
	return after - before, err
}

// resident is the peak of this process's resident memory, in bytes.
func resident() (int64, error) {
	raw, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(raw)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kb, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(v), " kB"), 10, 64)
			return kb << 10, err
		}
	}
	return 0, errors.New("/proc/self/status has no VmHWM")
}

// shop is a store with objects, and the files that they are made of.
type shop struct {
	dir, base string
	client    *storage.Client
	n         int    // objects so far
	last      string // key of the newest one
}

func (s *shop) file(name string, size int64) (string, error) {
	path := filepath.Join(s.dir, name)
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	_, err = io.CopyN(f, rand.Reader, size)
	return path, errors.Join(err, f.Close())
}

func (s *shop) key() string {
	s.n++
	s.last = "o" + strconv.Itoa(s.n)
	return s.last
}

func (s *shop) up(path string) func(context.Context) (time.Duration, error) {
	return func(ctx context.Context) (time.Duration, error) {
		began := time.Now()
		_, err := s.client.Upload(ctx, "b", s.key(), path, storage.Options{})
		return time.Since(began), err
	}
}

func (s *shop) down(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	_, err := s.client.Download(ctx, "b", s.last, filepath.Join(s.dir, "back"), "")
	return time.Since(began), err
}

func (s *shop) curlUp(path string) func(context.Context) (time.Duration, error) {
	return func(ctx context.Context) (time.Duration, error) {
		return s.curl(ctx, "-X", "POST", "-H", "Content-Type: application/octet-stream", "-H", "Expect:", "-T", path, s.base+"/storage/v1/object/b/"+s.key())
	}
}

func (s *shop) curlDown(ctx context.Context) (time.Duration, error) {
	return s.curl(ctx, "-o", filepath.Join(s.dir, "back by curl"), s.base+"/storage/v1/object/authenticated/b/"+s.last)
}

// curl is the time of a transfer as curl itself tells it, without its start; 0
// where there is no curl.
func (s *shop) curl(ctx context.Context, args ...string) (time.Duration, error) {
	bin, err := exec.LookPath("curl")
	if err != nil {
		return 0, nil
	}
	cmd := exec.CommandContext(ctx, bin, append([]string{"-sS", "--fail", "-H", "Authorization: Bearer " + storageKey, "-w", "\n%{time_total}"}, args...)...)
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("curl: %w", err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	seconds, err := strconv.ParseFloat(lines[len(lines)-1], 64)
	if err != nil {
		return 0, fmt.Errorf("read curl's time: %w", err)
	}
	return time.Duration(seconds * float64(time.Second)), nil
}

// compare runs two ways in turns and returns the median of each.
func (s *shop) compare(ctx context.Context, n int, ways ...func(context.Context) (time.Duration, error)) (m [2]time.Duration, err error) {
	var all [2][]time.Duration
	for range n {
		for i, way := range ways {
			d, err := way(ctx)
			if err != nil {
				return m, err
			}
			all[i] = append(all[i], d)
		}
	}
	for i := range m {
		slices.Sort(all[i])
		m[i] = all[i][len(all[i])/2]
	}
	return m, nil
}
