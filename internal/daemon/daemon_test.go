package daemon_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"lorayard/internal/daemon"
)

var quiet = slog.New(slog.DiscardHandler)

func TestPartsStopInReverse(t *testing.T) {
	var mu sync.Mutex
	var order []string
	part := func(name string) daemon.Part {
		return daemon.Part{Name: name, Run: func(ctx context.Context) error {
			<-ctx.Done()
			mu.Lock()
			defer mu.Unlock()
			order = append(order, name)
			return nil
		}}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := daemon.Run(ctx, quiet, part("ops"), part("store"), part("queue")); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(order, []string{"queue", "store", "ops"}) {
		t.Errorf("stopped in order %v", order)
	}
}

func TestOnePartsEndStopsAll(t *testing.T) {
	broken := errors.New("broken")
	err := daemon.Run(t.Context(), quiet,
		daemon.Part{Name: "a", Run: func(ctx context.Context) error { <-ctx.Done(); return nil }},
		daemon.Part{Name: "b", Run: func(context.Context) error { return broken }},
		daemon.Part{Name: "c", Run: func(context.Context) error { panic("ouch") }})
	if !errors.Is(err, broken) || !strings.Contains(err.Error(), "b: broken") || !strings.Contains(err.Error(), "c: panic: ouch") {
		t.Errorf("err = %v", err)
	}
}

func TestOpsTellsReadiness(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var notReady error = errors.New("reach postgres://me:hunter2@db: no")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "up 1\n") })
	go func() { done <- daemon.ServeOps(ctx, l, metrics, func() error { return notReady }) }()
	get := func(path string) (int, string) {
		resp, err := http.Get("http://" + l.Addr().String() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		raw, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(raw)
	}
	if code, body := get("/readyz"); code != 503 || strings.Contains(body, "hunter2") {
		t.Errorf("readyz: %d %s", code, body)
	}
	for path, want := range map[string]string{"/healthz": "ok\n", "/metrics": "up 1\n"} {
		if code, body := get(path); code != 200 || body != want {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestLogsHideSecrets(t *testing.T) {
	var out bytes.Buffer
	log := daemon.Logger(&out, "info", "auto")
	log.Info("connect postgres://u:hunter2@h/db", "err", errors.New("Bearer abcdefghijkl refused"), "key", "sb_secret_abc",
		"jwt", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl")
	for _, bad := range []string{"hunter2", "abcdefghijkl", "sb_secret_abc", "c2lnbmF0dXJl"} {
		if strings.Contains(out.String(), bad) {
			t.Errorf("%s is in the log: %s", bad, out.String())
		}
	}
	if !strings.HasPrefix(out.String(), "{") {
		t.Errorf("not JSON: %s", out.String())
	}
}
