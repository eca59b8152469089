package presence

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"lorayard/internal/devstack/services"
	"lorayard/internal/job"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// registry stands for the database: which boot is registered for an agent.
type registry struct {
	mu    sync.Mutex
	boots map[string]string
	away  error
	delay map[string]time.Duration // of the answer about a boot
}

func (r *registry) set(agent, boot string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.boots == nil {
		r.boots = map[string]string{}
	}
	r.boots[agent] = boot
}

func (r *registry) verify(ctx context.Context, agent, boot string) error {
	r.mu.Lock()
	away, known, delay := r.away, r.boots[agent] == boot, r.delay[boot]
	r.mu.Unlock()
	if delay > 0 && !sleep(ctx, delay) {
		return ctx.Err()
	}
	if away != nil {
		return away
	}
	if !known {
		return fmt.Errorf("agent %s: %w", agent, ErrRefused)
	}
	return nil
}

// unheard and unknown are for servers that nobody reports to, or connects to.
func unheard(context.Context, Death) error          { return errors.New("not expected") }
func unknown(context.Context, string, string) error { return ErrRefused }

// history records what the hooks say, with the time since its start.
type history struct {
	start time.Time
	mu    sync.Mutex
	lines []string
}

func (h *history) add(words ...any) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lines = append(h.lines, time.Since(h.start).String()+" "+strings.TrimSpace(fmt.Sprintln(words...)))
}

func (h *history) want(t *testing.T, want ...string) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	if !slices.Equal(h.lines, want) {
		t.Errorf("history:\n%s\nwant:\n%s", strings.Join(h.lines, "\n"), strings.Join(want, "\n"))
	}
}

// room is a server behind a listener in memory, for tests on synctest's clock.
type room struct {
	*Server
	registry
	history
	conns chan net.Conn
	done  chan struct{}

	mu    sync.Mutex
	down  bool
	ends  []net.Conn // the server's
	stop  func()
	dials atomic.Int64
}

func (r *room) Accept() (net.Conn, error) {
	select {
	case c := <-r.conns:
		return c, nil
	case <-r.done:
		return nil, net.ErrClosed
	}
}

func (r *room) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	select {
	case <-r.done:
	default:
		close(r.done)
	}
	return nil
}

func (r *room) Addr() net.Addr { return &net.UnixAddr{Name: "memory", Net: "pipe"} }

func (r *room) dial(ctx context.Context, _ string) (net.Conn, error) {
	r.dials.Add(1)
	r.mu.Lock()
	down := r.down
	r.mu.Unlock()
	if down {
		return nil, errors.New("connection refused")
	}
	ours, theirs := net.Pipe()
	select {
	case r.conns <- theirs:
		r.mu.Lock()
		r.ends = append(r.ends, theirs)
		r.mu.Unlock()
		return ours, nil
	case <-r.done:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// cut ends every connection; while down, no new one is made.
func (r *room) cut(down bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.down = down
	for _, c := range r.ends {
		c.Close()
	}
	r.ends = nil
}

func (r *room) up() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.down = false
}

func newRoom(t *testing.T) *room {
	r := &room{conns: make(chan net.Conn), done: make(chan struct{})}
	r.start = time.Now()
	r.Server = &Server{
		Verify:    r.verify,
		Died:      unheard,
		Connected: func(agent, boot string) { r.add("connected", agent, boot) },
		Gone:      func(agent, boot string) { r.add("gone", agent, boot) },
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan struct{})
	go func() {
		defer close(served)
		if err := r.Serve(ctx, r); err != nil {
			t.Errorf("serve: %v", err)
		}
	}()
	r.stop = sync.OnceFunc(func() { cancel(); <-served })
	t.Cleanup(r.stop)
	return r
}

// client starts an agent that counts its looks on the returned channel.
func (r *room) client(t *testing.T, agent, boot string) (c *Client, looks chan struct{}, stop func()) {
	looks = make(chan struct{}, 100)
	c = &Client{
		Agent: agent, Boot: boot, Version: "v1", Dial: r.dial,
		Jitter: func(d time.Duration) time.Duration { return d },
		Look:   func() { looks <- struct{}{} },
		Refused: func(_, words string) {
			r.add("refused", agent, boot, words)
		},
	}
	c.SetAddresses([]string{"memory"})
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan struct{})
	go func() { defer close(ran); c.Run(ctx) }()
	stop = sync.OnceFunc(func() { cancel(); <-ran })
	t.Cleanup(stop)
	return c, looks, stop
}

func TestAResetThatComesBackInTimeIsNoNews(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoom(t)
		r.set("a", "1")
		c, looks, stop := r.client(t, "a", "1")
		synctest.Wait()
		if c.Connected() != 1 || len(looks) != 1 {
			t.Fatalf("connected %d, looks %d, want one of each", c.Connected(), len(looks))
		}
		for range 20 { // cut again and again
			r.cut(false)
			time.Sleep(500 * time.Millisecond)
		}
		synctest.Wait()
		r.want(t, "0s connected a 1")
		if len(looks) != 21 {
			t.Errorf("%d looks, want one for each of 21 welcomes", len(looks))
		}
		if p, ok := r.State("a"); !ok || !p.Present || p.Version != "v1" {
			t.Errorf("state = %+v, %v", p, ok)
		}
		stop()
		r.stop()
	})
}

func TestGoneIsSaidAfterReconnectAndNeverEarlier(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoom(t)
		r.set("a", "1")
		_, _, stop := r.client(t, "a", "1")
		synctest.Wait()
		stop()
		time.Sleep(2*time.Second - time.Nanosecond)
		synctest.Wait()
		r.want(t, "0s connected a 1")
		if got := r.Present(); len(got) != 1 || got[0].Agent != "a" {
			t.Errorf("present = %+v, want a", got)
		}
		if r.Push("a") {
			t.Error("a push to an agent without a stream said true")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		r.want(t, "0s connected a 1", "2s gone a 1")
		p, ok := r.State("a")
		if !ok || p.Present || !p.Since.Equal(r.start) || len(r.Present()) != 0 {
			t.Errorf("state = %+v, %v, want gone since the stream's end", p, ok)
		}

		_, _, stop = r.client(t, "a", "1")
		synctest.Wait()
		r.want(t, "0s connected a 1", "2s gone a 1", "2s connected a 1")
		stop()
		time.Sleep(2 * time.Second)
		time.Sleep(forgetAfter)
		synctest.Wait()
		if p, ok := r.State("a"); ok {
			t.Errorf("an hour later it is still known: %+v", p)
		}
		r.stop()
	})
}

func TestEachLossHasItsOwnPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoom(t)
		r.set("a", "1")
		_, _, stop := r.client(t, "a", "1")
		synctest.Wait()
		for range 3 {
			r.cut(true)
			stop()
			time.Sleep(1900 * time.Millisecond)
			r.up()
			_, _, stop = r.client(t, "a", "1")
			time.Sleep(400 * time.Millisecond) // past the first loss's 2 s
			synctest.Wait()
		}
		r.want(t, "0s connected a 1")
		stop()
		r.stop()
	})
}

func TestThePausesGrowAndStayBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoom(t)
		r.set("a", "1")
		r.cut(true)
		c, _, stop := r.client(t, "a", "1")
		time.Sleep(time.Minute)
		synctest.Wait()
		// 0, 0.2, 0.6, 1.4, 3, 6.2, 12.6, then every 10 s.
		if n := r.dials.Load(); n != 11 {
			t.Errorf("%d dials in a minute, want 11", n)
		}
		r.up()
		time.Sleep(mostRetry)
		synctest.Wait()
		if c.Connected() != 1 {
			t.Error("not connected 10 s after the dispatcher came back")
		}
		stop()
		r.stop()
	})
}

func TestANewProcessReplacesTheOldOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoom(t)
		r.set("a", "1")
		old, _, stopOld := r.client(t, "a", "1")
		synctest.Wait()
		time.Sleep(time.Second)
		r.set("a", "2")
		_, looks, stop := r.client(t, "a", "2")
		time.Sleep(time.Second)
		synctest.Wait()
		if old.Connected() != 0 {
			t.Error("the old process is still connected")
		}
		before := r.dials.Load()
		time.Sleep(time.Minute)
		synctest.Wait()
		if n := r.dials.Load() - before; n > 6 {
			t.Errorf("the refused process dialled %d times in a minute, want 6 at most", n)
		}
		if !r.Push("a") {
			t.Error("no stream to push to")
		}
		synctest.Wait()
		if len(looks) != 2 {
			t.Errorf("the new process looked %d times, want 2", len(looks))
		}
		stopOld()
		stop()
		r.stop()
		words := "not the registered process of this agent"
		if got := r.lines[:3]; !slices.Equal(got, []string{"0s connected a 1", "1s connected a 2", "1.2s refused a 1 " + words}) {
			t.Errorf("history = %q", got)
		}
		for _, l := range r.lines {
			if strings.Contains(l, "gone a 1") {
				t.Errorf("%q: a replaced process is not gone", l)
			}
		}
	})
}

// The answer about the old process arrives after the new one is welcome.
func TestAnOlderProcessCheckedSlowlyDoesNotReplaceANewerOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoom(t)
		r.set("a", "1")
		r.delay = map[string]time.Duration{"1": time.Second}
		_, _, stopOld := r.client(t, "a", "1")
		synctest.Wait()
		r.set("a", "2")
		c, _, stop := r.client(t, "a", "2")
		time.Sleep(1100 * time.Millisecond)
		synctest.Wait()
		if c.Connected() != 1 {
			t.Error("the newer process has lost its stream")
		}
		r.want(t, "0s connected a 2")
		stopOld()
		stop()
		r.stop()
	})
}

func TestADatabaseThatIsAwayRefusesNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoom(t)
		r.set("a", "1")
		r.away = errors.New("no route to postgres")
		c, _, stop := r.client(t, "a", "1")
		time.Sleep(30 * time.Second)
		r.registry.mu.Lock()
		r.away = nil
		r.registry.mu.Unlock()
		time.Sleep(mostRetry)
		synctest.Wait()
		if c.Connected() != 1 || len(r.lines) != 1 {
			t.Errorf("connected %d, history %q, want one connection and nothing refused", c.Connected(), r.lines)
		}
		stop()
		r.stop()
	})
}

func TestAPeerThatDoesNotReadBlocksNobodyAndLosesItsStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoom(t)
		r.set("a", "1")
		conn, err := r.dial(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		in := newReader(conn)
		_, _ = conn.Write(message{Hello: &hello{Agent: "a", Boot: "1"}}.line())
		if m, err := read(in); err != nil || m.Welcome == nil {
			t.Fatalf("answer %+v, %v, want welcome", m, err)
		}
		synctest.Wait()
		for range 1000 {
			if !r.Push("a") {
				t.Fatal("no stream")
			}
		}
		synctest.Wait()
		// One line was being written when the others were asked for: two in all.
		for range 2 {
			if m, err := read(in); err != nil || !m.Look {
				t.Fatalf("got %+v, %v, want look", m, err)
			}
		}
		synctest.Wait()
		if !r.Push("a") { // nobody reads this one
			t.Fatal("no stream")
		}
		time.Sleep(writeTimeout)
		synctest.Wait()
		if r.Push("a") {
			t.Error("a stream that nobody reads is still there")
		}
		r.stop()
	})
}

func TestStrangersAreBoundedInNumberAndTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := &room{conns: make(chan net.Conn), done: make(chan struct{})}
		r.set("a", "1")
		r.Server = &Server{Verify: r.verify, Died: unheard, Strangers: 2}
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() { served <- r.Serve(ctx, r) }()
		for range 2 {
			if _, err := r.dial(ctx, ""); err != nil {
				t.Fatal(err)
			}
		}
		c, _, stop := r.client(t, "a", "1")
		time.Sleep(helloTimeout - time.Nanosecond)
		synctest.Wait()
		if c.Connected() != 0 {
			t.Error("a third stranger was served")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if c.Connected() != 1 {
			t.Error("silent strangers were not sent away in time")
		}
		// A verified agent is no stranger: two more may come.
		for range 2 {
			dctx, stop := context.WithTimeout(ctx, time.Millisecond)
			if _, err := r.dial(dctx, ""); err != nil {
				t.Errorf("dial: %v", err)
			}
			stop()
		}
		stop()
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

func TestAServerThatLeavesDeclaresNobodyGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRoom(t)
		r.set("a", "1")
		r.set("b", "1")
		_, _, stopA := r.client(t, "a", "1")
		_, _, stopB := r.client(t, "b", "1")
		synctest.Wait()
		stopB()
		time.Sleep(time.Second)
		r.stop()
		if r.Push("a") {
			t.Error("pushed through a server that has left")
		}
		time.Sleep(time.Minute)
		for _, l := range r.lines {
			if strings.Contains(l, "gone") {
				t.Errorf("history has %q", l)
			}
		}
		stopA()
	})
}

// serve starts a real server on loopback.
func serve(t testing.TB, s *Server, address string, conf *tls.Config) string {
	t.Helper()
	if s.Died == nil {
		s.Died = unheard
	}
	if s.Verify == nil {
		s.Verify = unknown
	}
	ln, err := Listen(t.Context(), address, conf)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return strings.Replace(address, "127.0.0.1:0", ln.Addr().String(), 1)
}

func run(t testing.TB, c *Client) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan struct{})
	go func() { defer close(ran); c.Run(ctx) }()
	stop = sync.OnceFunc(func() { cancel(); <-ran })
	t.Cleanup(stop)
	return stop
}

func wait[T any](t testing.TB, what string, ch <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-ch:
	case <-time.After(20 * time.Second):
		t.Fatalf("waited 20 s for %s", what)
	}
	return v
}

func TestAClientFollowsEveryDispatcher(t *testing.T) {
	var reg registry
	reg.set("a", "1")
	type event struct{ where, what string }
	events := make(chan event, 10)
	server := func(where string) *Server {
		return &Server{
			Verify: reg.verify, Reconnect: time.Millisecond,
			Connected: func(string, string) { events <- event{where, "connected"} },
			Gone:      func(string, string) { events <- event{where, "gone"} },
		}
	}
	first, second := server("first"), server("second")
	a1, a2 := serve(t, first, "tcp://127.0.0.1:0", nil), serve(t, second, "127.0.0.1:0", nil)
	looks := make(chan struct{}, 10)
	c := &Client{Agent: "a", Boot: "1", Look: func() { looks <- struct{}{} }}
	run(t, c)
	c.SetAddresses([]string{a1, a1})
	if got := wait(t, "the first", events); got != (event{"first", "connected"}) {
		t.Fatalf("got %v", got)
	}
	wait(t, "the look of the welcome", looks)
	c.SetAddresses([]string{a1, a2})
	if got := wait(t, "the second", events); got != (event{"second", "connected"}) {
		t.Fatalf("got %v", got)
	}
	wait(t, "the look of the welcome", looks)
	for _, s := range []*Server{first, second} {
		if !s.Push("a") {
			t.Error("no stream")
		}
		wait(t, "a pushed look", looks)
	}
	if c.Connected() != 2 {
		t.Errorf("connected %d, want 2", c.Connected())
	}
	c.SetAddresses([]string{a2})
	if got := wait(t, "the end of the first", events); got != (event{"first", "gone"}) {
		t.Fatalf("got %v", got)
	}
	if !second.Push("a") {
		t.Error("the second stream ended with the first")
	}
	wait(t, "a pushed look", looks)
}

func TestFaultsOfARealNetwork(t *testing.T) {
	var reg registry
	reg.set("a", "1")
	gone := make(chan struct{}, 10)
	s := &Server{Verify: reg.verify, Gone: func(string, string) { gone <- struct{}{} }}
	proxy, err := services.Proxy(serve(t, s, "127.0.0.1:0", nil))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { proxy.Close() })
	looks := make(chan struct{}, 10)
	c := &Client{Agent: "a", Boot: "1", Look: func() { looks <- struct{}{} }}
	c.SetAddresses([]string{"tcp://" + proxy.Addr()})
	run(t, c)
	wait(t, "the welcome", looks)
	for range 5 {
		if n := proxy.Reset(); n != 1 {
			t.Fatalf("reset %d connections, want 1", n)
		}
		wait(t, "the look of the next welcome", looks)
		if !s.Push("a") {
			t.Fatal("no stream after a reset")
		}
		wait(t, "a pushed look", looks)
	}
	if len(gone) != 0 {
		t.Error("a reset made the agent gone")
	}
	// A new connection hangs, and an old one is silent: nobody waits for it.
	if err := proxy.Blackhole(); err != nil {
		t.Fatal(err)
	}
	if !s.Push("a") {
		t.Error("silence is no end of a stream")
	}
	if err := proxy.Refuse(); err != nil {
		t.Fatal(err)
	}
	wait(t, "gone", gone)
	if err := proxy.Pass(); err != nil {
		t.Fatal(err)
	}
	wait(t, "the look of the return", looks)
	if len(looks) != 0 {
		t.Error("the swallowed look arrived")
	}
}

// certificate makes a self-signed one for 127.0.0.1.
func certificate(t *testing.T) (conf *tls.Config, ca string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "dispatcher"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	conf = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, MinVersion: tls.VersionTLS13}
	return conf, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestTLSCarriesStreamsAndReportsAndKeepsStrangersOut(t *testing.T) {
	conf, ca := certificate(t)
	var reg registry
	reg.set("a", "1")
	deaths := make(chan Death, 1)
	s := &Server{Verify: reg.verify, Died: func(_ context.Context, d Death) error { deaths <- d; return nil }}
	addr := serve(t, s, "tls://127.0.0.1:0", conf)
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(ca))
	looks := make(chan struct{}, 10)
	c := &Client{Agent: "a", Boot: "1", Roots: roots, Look: func() { looks <- struct{}{} }}
	c.SetAddresses([]string{addr})
	run(t, c)
	wait(t, "the look of the welcome", looks)
	if !s.Push("a") {
		t.Fatal("no stream")
	}
	wait(t, "a pushed look", looks)

	if conn, err := dial(t.Context(), addr, nil); err == nil {
		conn.Close()
		t.Error("an unknown certificate was believed")
	}
	path := filepath.Join(t.TempDir(), "report")
	d := Death{Agent: "a", Boot: "1", Ref: job.Ref{Job: "j", Attempt: 2, Nonce: "n"}, Message: "killed"}
	if err := WriteReport(path, Report{Addresses: []string{addr}, CA: ca, Death: d}); err != nil {
		t.Fatal(err)
	}
	if err := SendReport(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if got := <-deaths; got != d {
		t.Errorf("got %+v, want %+v", got, d)
	}
}

// silent is an address that accepts and never answers.
func silent(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return "tcp://" + ln.Addr().String()
}

func TestADeathIsReportedWhoeverElseIsAway(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refusing := "tcp://" + ln.Addr().String()
	ln.Close()

	tries := 0
	got := make(chan Death, 1)
	s := &Server{Died: func(_ context.Context, d Death) error {
		if tries++; tries < 3 {
			return errors.New("the database is away")
		}
		got <- d
		return nil
	}}
	addr := serve(t, s, "tcp://127.0.0.1:0", nil)
	path := filepath.Join(t.TempDir(), "report")
	d := Death{Agent: "a", Boot: "1", Ref: job.Ref{Job: "j", Attempt: 2, Nonce: "n"}, Message: strings.Repeat("\x01é", 5000)}
	if err := WriteReport(path, Report{Addresses: []string{refusing, silent(t), addr}, Death: d}); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o600 {
		t.Errorf("stat = %v, %v, want mode 0600", st.Mode(), err)
	}
	if files, _ := os.ReadDir(filepath.Dir(path)); len(files) != 1 {
		t.Errorf("%d files, want the report alone", len(files))
	}
	begun := time.Now()
	if err := SendReport(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if e := time.Since(begun); e > dialTimeout {
		t.Errorf("took %s: it waited for those that are away", e)
	}
	r := <-got
	if r.Ref != d.Ref || r.Agent != "a" || r.Boot != "1" || len(r.Message) > maxMessage || !strings.HasPrefix(d.Message, r.Message) {
		t.Errorf("got %+v", r)
	}
}

func TestAStaleReportIsGivenUpSilently(t *testing.T) {
	s := &Server{Died: func(context.Context, Death) error { return fmt.Errorf("attempt 2: %w", ErrRefused) }}
	addr := serve(t, s, "tcp://127.0.0.1:0", nil)
	path := filepath.Join(t.TempDir(), "report")
	d := Death{Agent: "a", Boot: "1", Ref: job.Ref{Job: "j", Attempt: 1, Nonce: "n"}}
	if err := WriteReport(path, Report{Addresses: []string{addr, silent(t)}, Death: d}); err != nil {
		t.Fatal(err)
	}
	if err := SendReport(t.Context(), path); err != nil {
		t.Error(err)
	}
}

func TestAReportEndsWithItsContext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "report")
	d := Death{Agent: "a", Boot: "boot-secret", Ref: job.Ref{Job: "j", Attempt: 1, Nonce: "nonce-secret"}}
	if err := WriteReport(path, Report{Addresses: []string{silent(t), "udp://x:1"}, Death: d}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	err := SendReport(ctx, path)
	if err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("err = %v, want one without secrets", err)
	}
}

func TestNothingSecretIsLogged(t *testing.T) {
	var reg registry
	reg.set("a", "boot-secret")
	var mu sync.Mutex
	var buf bytes.Buffer
	log := slog.New(slog.NewTextHandler(writer(func(p []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return buf.Write(p)
	}), &slog.HandlerOptions{Level: slog.LevelDebug}))
	refused := make(chan struct{}, 10)
	gone := make(chan struct{}, 10)
	s := &Server{
		Verify: reg.verify, Log: log, Reconnect: time.Millisecond,
		Gone: func(string, string) { gone <- struct{}{} },
		Died: func(context.Context, Death) error { return errors.New("no") },
	}
	addr := serve(t, s, "tcp://127.0.0.1:0", nil)
	looks := make(chan struct{}, 10)
	good := &Client{Agent: "a", Boot: "boot-secret", Log: log, Look: func() { looks <- struct{}{} }}
	bad := &Client{Agent: "a", Boot: "other-secret", Log: log, Look: func() {}, Refused: func(string, string) { refused <- struct{}{} }}
	good.SetAddresses([]string{addr})
	bad.SetAddresses([]string{addr})
	stop, stopBad := run(t, good), run(t, bad)
	wait(t, "a welcome", looks)
	wait(t, "a refusal", refused)
	for _, line := range []string{`{"hello":{"agent":"a","boot":"boot-secret` + "\n", `{"hello":{"agent":"","boot":"boot-secret"}}` + "\n"} {
		conn, err := dial(t.Context(), addr, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, line)
		_, _ = io.Copy(io.Discard, conn)
		conn.Close()
	}
	d := Death{Agent: "a", Boot: "boot-secret", Ref: job.Ref{Job: "j", Attempt: 1, Nonce: "nonce-secret"}, Message: "message-secret"}
	if err := send(t.Context(), addr, nil, d); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("err = %v, want one without secrets", err)
	}
	stop()
	stopBad()
	wait(t, "the end", gone)
	mu.Lock()
	defer mu.Unlock()
	if buf.Len() == 0 || strings.Contains(buf.String(), "secret") {
		t.Errorf("log:\n%s", buf.String())
	}
}

type writer func([]byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }

func TestGarbageEndsItsConnectionAlone(t *testing.T) {
	var reg registry
	reg.set("a", "1")
	s := &Server{Verify: reg.verify, Died: func(context.Context, Death) error { t.Error("garbage was a death"); return nil }}
	addr := serve(t, s, "tcp://127.0.0.1:0", nil)
	for _, garbage := range []string{
		"\n", "GET / HTTP/1.1\r\n\r\n", "{}\n", "null\n", `{"look":true}` + "\n", `{"death":{}}` + "\n",
		`{"death":{"agent":"a","boot":"1","job":"j","attempt":0,"nonce":"n"}}` + "\n", `{"hello":{"agent":"a\u0000","boot":"1"}}` + "\n",
		`{"hello":{"agent":"a","boot":"1"}`, strings.Repeat("x", MaxLine+1), "\x16\x03\x01\n",
	} {
		conn, err := dial(t.Context(), addr, nil)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, garbage)
		_ = conn.(*net.TCPConn).CloseWrite()
		if b, _ := io.ReadAll(conn); len(b) > 0 {
			t.Errorf("%.20q got the answer %q", garbage, b)
		}
		conn.Close()
	}
	looks := make(chan struct{}, 1)
	c := &Client{Agent: "a", Boot: "1", Look: func() { looks <- struct{}{} }}
	c.SetAddresses([]string{addr})
	run(t, c)
	wait(t, "the welcome of an honest agent", looks)
}

func TestAddressesSayWhatIsWrong(t *testing.T) {
	for address, want := range map[string]string{
		"udp://h:1": "want tcp://host:port or tls://host:port", "tcp://h": "missing port", "": "missing port",
		"tls://127.0.0.1:0": "needs a certificate",
	} {
		if _, err := Listen(t.Context(), address, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("listen %q: %v, want %q", address, err, want)
		}
	}
}

func FuzzRead(f *testing.F) {
	for _, m := range []message{
		{Hello: &hello{Agent: "a", Boot: "1"}},
		{Death: &Death{Agent: "a", Boot: "1", Ref: job.Ref{Job: "j", Attempt: 1, Nonce: "n"}}},
		{Welcome: &struct{}{}},
		{Refused: "words"},
		{Look: true},
	} {
		f.Add(m.line())
	}
	f.Add(append(bytes.Repeat([]byte("x"), MaxLine), '\n'))
	f.Fuzz(func(t *testing.T, raw []byte) {
		// A reader that starts with any number of bytes must find the same.
		a, b := bufio.NewReaderSize(bytes.NewReader(raw), 16), bufio.NewReaderSize(bytes.NewReader(raw), 2*MaxLine)
		for {
			la, errA := readLine(a)
			lb, errB := readLine(b)
			if (errA == nil) != (errB == nil) || !bytes.Equal(la, lb) {
				t.Fatalf("%q, %v with a small buffer, %q, %v with a large one", la, errA, lb, errB)
			}
			if errA != nil {
				return
			}
			if len(la) > MaxLine || la[len(la)-1] != '\n' {
				t.Fatalf("a line of %d bytes", len(la))
			}
			m, err := parse(la)
			if err != nil {
				continue
			}
			if h := m.Hello; h != nil {
				if again, err := parse(m.line()); err != nil || *again.Hello != *h {
					t.Fatalf("%+v became %+v, %v", h, again.Hello, err)
				}
			}
			if d := m.Death; d != nil {
				if again, err := parse(m.line()); err != nil || *again.Death != *d {
					t.Fatalf("%+v became %+v, %v", d, again.Death, err)
				}
			}
		}
	})
}

// memory is what this process uses after a collection, in bytes.
func memory() float64 {
	runtime.GC()
	runtime.GC() // the first leaves what finalizers hold
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapInuse + m.StackInuse)
}

// BenchmarkStream measures how long a stream takes to be welcome, and what an
// idle one costs the server; its other end here is a bare connection.
func BenchmarkStream(b *testing.B) {
	var reg registry
	s := &Server{Verify: reg.verify}
	addr := serve(b, s, "tcp://127.0.0.1:0", nil)
	before := memory()
	var conns [1000]net.Conn
	n := 0
	for b.Loop() {
		i := n % len(conns)
		if conns[i] != nil {
			conns[i].Close()
		}
		id := fmt.Sprint("agent-", i)
		reg.set(id, "1")
		conn, err := dial(b.Context(), addr, nil)
		if err != nil {
			b.Fatal(err)
		}
		_, _ = conn.Write(message{Hello: &hello{Agent: id, Boot: "1"}}.line())
		if m, err := read(newReader(conn)); err != nil || m.Welcome == nil {
			b.Fatal(m, err)
		}
		conns[i] = conn
		n++
	}
	b.ReportMetric((memory()-before)/float64(min(n, len(conns))), "B/stream")
	for _, conn := range conns[:min(n, len(conns))] {
		conn.Close()
	}
}

// BenchmarkPush measures push → look with 1,000 idle clients in this process.
func BenchmarkPush(b *testing.B) {
	const agents = 1000
	var reg registry
	s := &Server{Verify: reg.verify}
	addr := serve(b, s, "tcp://127.0.0.1:0", nil)
	looks := make(chan struct{}, agents)
	for i := range agents {
		id := fmt.Sprint("agent-", i)
		reg.set(id, "1")
		c := &Client{Agent: id, Boot: "1", Look: func() { looks <- struct{}{} }}
		c.SetAddresses([]string{addr})
		run(b, c)
	}
	for range agents {
		wait(b, "a welcome", looks)
	}
	took := make([]time.Duration, 0, 1<<20)
	for b.Loop() {
		begun := time.Now()
		if !s.Push(fmt.Sprint("agent-", len(took)%agents)) {
			b.Fatal("no stream")
		}
		<-looks
		took = append(took, time.Since(begun))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}

// BenchmarkReport measures a shim's report, from reading the file to the
// dispatcher's hook.
func BenchmarkReport(b *testing.B) {
	heard := make(chan struct{}, 1)
	s := &Server{Died: func(context.Context, Death) error { heard <- struct{}{}; return nil }}
	addr := serve(b, s, "tcp://127.0.0.1:0", nil)
	path := filepath.Join(b.TempDir(), "report")
	d := Death{Agent: "a", Boot: "1", Ref: job.Ref{Job: "j", Attempt: 1, Nonce: "n"}}
	if err := WriteReport(path, Report{Addresses: []string{addr}, Death: d}); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if err := SendReport(b.Context(), path); err != nil {
			b.Fatal(err)
		}
		<-heard
	}
}
