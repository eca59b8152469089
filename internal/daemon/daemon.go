// Package daemon is what every long-running binary needs and none should write
// twice: parts that start in order and stop in reverse, the ops port, the
// logger, the signals.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"os/signal"
	"regexp"
	"runtime/debug"
	"strings"
	"syscall"
	"time"
)

// Part is something that runs until its context ends.
type Part struct {
	Name string
	Run  func(context.Context) error
}

// ErrSignal is the cause of a context that a signal ended.
var ErrSignal = errors.New("stopped by a signal")

// Run starts parts in order and waits. When ctx ends, or one part does, the
// last started is stopped first and waited for before the one before it. It
// returns the joined errors of all parts; a panic is an error too.
func Run(ctx context.Context, log *slog.Logger, parts ...Part) error {
	type ended struct {
		i   int
		err error
	}
	first := make(chan ended, len(parts))
	stops := make([]context.CancelCauseFunc, len(parts))
	dones := make([]chan struct{}, len(parts))
	errs := make([]error, len(parts))
	for i, p := range parts {
		// A part outlives ctx until it is its turn to stop.
		own, stop := context.WithCancelCause(context.WithoutCancel(ctx))
		stops[i], dones[i] = stop, make(chan struct{})
		go func() {
			defer close(dones[i])
			errs[i] = guarded(own, p)
			first <- ended{i, errs[i]}
		}()
	}
	cause := error(nil)
	select {
	case <-ctx.Done():
		cause = context.Cause(ctx)
	case e := <-first:
		cause = fmt.Errorf("part %s ended", parts[e.i].Name)
		if e.err == nil { // it was told to by somebody else than ctx
			log.InfoContext(ctx, "a part is done, stopping", "part", parts[e.i].Name)
		} else {
			log.ErrorContext(ctx, "a part ended, stopping", "part", parts[e.i].Name, "err", e.err)
		}
	}
	for i := len(parts) - 1; i >= 0; i-- {
		stops[i](cause)
		<-dones[i]
	}
	for i, err := range errs {
		if err != nil {
			errs[i] = fmt.Errorf("%s: %w", parts[i].Name, err)
		}
	}
	return errors.Join(errs...)
}

func guarded(ctx context.Context, p Part) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	return p.Run(ctx)
}

// Signals returns a context that the first SIGTERM or SIGINT ends, with cause
// ErrSignal; the second one ends the process at once with code 130.
func Signals(parent context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(parent)
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, syscall.SIGTERM, os.Interrupt)
	done := make(chan struct{})
	go func() {
		select {
		case <-ch:
			cancel(ErrSignal)
		case <-done:
			return
		}
		select {
		case <-ch:
			os.Exit(130)
		case <-done:
		}
	}()
	return ctx, func() {
		signal.Stop(ch)
		close(done)
		cancel(nil)
	}
}

// Ops serves /metrics, /healthz and /readyz on addr, and /debug/pprof when addr
// is a loopback address. ready says why the process must not be given work.
func Ops(addr string, metrics http.Handler, ready func() error) Part {
	return Part{Name: "ops", Run: func(ctx context.Context) error {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
		if err != nil {
			return fmt.Errorf("listen on the ops address: %w", err)
		}
		return ServeOps(ctx, l, metrics, ready)
	}}
}

// ServeOps is Ops on a listener that is open already; it closes it.
func ServeOps(ctx context.Context, l net.Listener, metrics http.Handler, ready func() error) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", metrics)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := ready(); err != nil {
			http.Error(w, redact(err.Error()), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	if a, ok := l.Addr().(*net.TCPAddr); ok && a.IP.IsLoopback() {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve the ops port: %w", err)
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Second)
	defer cancel()
	err := srv.Shutdown(grace)
	<-served
	return err
}

// Logger writes text to a terminal and JSON elsewhere; format "text" or "json"
// decides otherwise. level is debug, info, warn or error. What looks like a
// secret is taken out of every text.
func Logger(w io.Writer, level, format string) *slog.Logger {
	var lv slog.Level
	if err := lv.UnmarshalText([]byte(level)); err != nil {
		lv = slog.LevelInfo
	}
	o := &slog.HandlerOptions{Level: lv, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		switch v := a.Value.Any().(type) {
		case string:
			a.Value = slog.StringValue(redact(v))
		case error:
			a.Value = slog.StringValue(redact(v.Error()))
		}
		return a
	}}
	if format == "text" || (format != "json" && terminal(w)) {
		return slog.New(slog.NewTextHandler(w, o))
	}
	return slog.New(slog.NewJSONHandler(w, o))
}

func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}

// secrets are shapes that never belong into a log: passwords in URLs, bearer
// tokens, JWTs, Supabase secret keys.
var secrets = []struct {
	shape *regexp.Regexp
	with  string
}{
	{regexp.MustCompile(`([a-z][a-z0-9+.-]*://[^\s:/@]*):[^\s@/]+@`), "$1:[redacted]@"},
	{regexp.MustCompile(`(?i)(bearer\s+)[A-Za-z0-9._~+/=-]{8,}`), "$1[redacted]"},
	{regexp.MustCompile(`eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*`), "[redacted]"},
	{regexp.MustCompile(`sb_secret_[A-Za-z0-9_-]+`), "[redacted]"},
}

func redact(s string) string {
	if !strings.ContainsAny(s, "@._ ") {
		return s
	}
	for _, x := range secrets {
		s = x.shape.ReplaceAllString(s, x.with)
	}
	return s
}
