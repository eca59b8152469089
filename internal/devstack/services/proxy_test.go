package services_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"lorayard/internal/devstack/services"
)

// echo serves what a client sends back to it, and closes when the client does.
func echo(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return ln.Addr().String()
}

func proxy(t *testing.T, target string) *services.FaultProxy {
	t.Helper()
	p, err := services.Proxy(target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func connect(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.DialTimeout("tcp4", addr, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// ask sends word and returns what came back within patience.
func ask(t *testing.T, c net.Conn, word string, patience time.Duration) (string, error) {
	t.Helper()
	if _, err := io.WriteString(c, word); err != nil {
		return "", err
	}
	buf := make([]byte, len(word))
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	n, err := io.ReadFull(c, buf)
	return string(buf[:n]), err
}

func works(t *testing.T, c net.Conn) {
	t.Helper()
	if got, err := ask(t, c, "hello", 10*time.Second); got != "hello" || err != nil {
		t.Errorf("got %q, %v, want hello", got, err)
	}
}

func do(t *testing.T, f func() error) {
	t.Helper()
	if err := f(); err != nil {
		t.Fatal(err)
	}
}

// ends waits for the end of c and returns how it came: io.EOF or an error.
func ends(t *testing.T, c net.Conn) error {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	_, err := c.Read(make([]byte, 1))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection did not end")
	}
	return err
}

// until waits for a condition that has no event.
func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited 10 s for %s", what)
		}
	}
}

// hangs reports whether connecting ended because its time was up.
func hangs(err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout()
}

func TestTheProxyPassesBytesAndEnds(t *testing.T) {
	p := proxy(t, echo(t))
	c := connect(t, p.Addr())
	works(t, c)
	if p.Conns() != 1 || p.Accepted() != 1 {
		t.Errorf("conns %d, accepted %d, want 1", p.Conns(), p.Accepted())
	}
	// What was sent before the end must arrive after it.
	if _, err := io.WriteString(c, "last words"); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); string(got) != "last words" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	until(t, "the pair's end", func() bool { return p.Conns() == 0 })
}

func TestTheProxyRefusesAndPassesAgainOnTheSamePort(t *testing.T) {
	p := proxy(t, echo(t))
	for _, tc := range []struct {
		refuse func() error
		kept   bool
	}{{p.Refuse, false}, {p.RefuseNew, true}} {
		old := connect(t, p.Addr())
		works(t, old)
		do(t, tc.refuse)
		do(t, tc.refuse) // again changes nothing
		if _, err := net.DialTimeout("tcp4", p.Addr(), 5*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial: %v, want connection refused", err)
		}
		if tc.kept {
			works(t, old)
		} else if err := ends(t, old); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("old connection: %v, want reset", err)
		}
		do(t, p.Pass)
		works(t, connect(t, p.Addr()))
		if tc.kept {
			works(t, old)
		}
	}
}

func TestABlackholeSwallowsBytesAndMakesConnectingHang(t *testing.T) {
	p := proxy(t, echo(t))
	talker, idle, leaver := connect(t, p.Addr()), connect(t, p.Addr()), connect(t, p.Addr())
	works(t, talker)
	works(t, idle)
	works(t, leaver)
	for round := range 2 {
		do(t, p.Blackhole)
		do(t, p.Blackhole) // again changes nothing

		// Several at once: none may slip into the backlog.
		const dials = 5
		errs := make(chan error, dials)
		for range dials {
			go func() {
				c, err := net.DialTimeout("tcp4", p.Addr(), 300*time.Millisecond)
				if err == nil {
					c.Close()
				}
				errs <- err
			}()
		}
		for range dials {
			if err := <-errs; !hangs(err) {
				t.Errorf("round %d: dial: %v, want that it hangs", round, err)
			}
		}
		if got, err := ask(t, talker, "lost", 50*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("round %d: got %q, %v, want silence", round, got, err)
		}
		leaver.Close() // nobody learns of it
		accepted := p.Accepted()
		do(t, p.Pass)
		works(t, connect(t, p.Addr()))
		works(t, idle)
		if got, err := ask(t, talker, "hole", 50*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("round %d: a connection with a hole in it says %q, %v", round, got, err)
		}
		if n := p.Accepted() - accepted; n != 1 {
			t.Errorf("round %d: %d connections were accepted, want 1", round, n)
		}
	}
}

func TestAConnectionThatWaitsBeforeABlackholeIsMadeAfterIt(t *testing.T) {
	p := proxy(t, echo(t))
	do(t, p.Blackhole)
	made := make(chan error, 1)
	ready := make(chan struct{})
	var c net.Conn
	go func() {
		d := net.Dialer{Timeout: 20 * time.Second, Control: func(string, string, syscall.RawConn) error { close(ready); return nil }}
		var err error
		c, err = d.Dial("tcp4", p.Addr())
		made <- err
	}()
	<-ready
	select {
	case err := <-made:
		t.Fatalf("it did not hang: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	do(t, p.Pass)
	if err := <-made; err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	works(t, c)
}

func TestEveryModeFollowsEveryOther(t *testing.T) {
	p := proxy(t, echo(t))
	modes := map[string]func() error{"pass": p.Pass, "refuse": p.Refuse, "refuse new": p.RefuseNew, "blackhole": p.Blackhole}
	for from, set := range modes {
		for to, then := range modes {
			do(t, set)
			do(t, then)
			c, err := net.DialTimeout("tcp4", p.Addr(), 100*time.Millisecond)
			switch to {
			case "pass":
				if err != nil {
					t.Errorf("%s, then %s: %v", from, to, err)
				}
			case "blackhole":
				if !hangs(err) {
					t.Errorf("%s, then %s: %v, want that it hangs", from, to, err)
				}
			default:
				if !errors.Is(err, syscall.ECONNREFUSED) {
					t.Errorf("%s, then %s: %v, want connection refused", from, to, err)
				}
			}
			if err == nil {
				c.Close()
			}
		}
	}
}

func TestLatencyHoldsBackEachChunk(t *testing.T) {
	p := proxy(t, echo(t))
	c := connect(t, p.Addr())
	works(t, c)
	const d = 60 * time.Millisecond
	p.Latency(d)
	begun := time.Now()
	works(t, c)
	if e := time.Since(begun); e < 2*d {
		t.Errorf("there and back took %s, want %s at least", e, 2*d)
	}
	p.Latency(time.Hour)
	if got, err := ask(t, c, "slow", 50*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %q, %v, want nothing yet", got, err)
	}
	p.Reset() // must not wait for the hour
	p.Latency(0)
	works(t, connect(t, p.Addr()))
}

func TestResetsReachBothSides(t *testing.T) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	p := proxy(t, ln.Addr().String())
	var clients, servers []net.Conn
	for range 3 {
		clients = append(clients, connect(t, p.Addr()))
		s, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		servers = append(servers, s)
	}
	// A byte through each, so that no pair is still being made.
	for i, c := range clients {
		if _, err := c.Write([]byte{'x'}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(servers[i], make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if !p.ResetOne() {
		t.Error("there was none to reset")
	}
	for _, c := range []net.Conn{clients[0], servers[0]} {
		if err := ends(t, c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the oldest: %v, want reset", err)
		}
	}
	if p.Conns() != 2 {
		t.Errorf("%d connections left, want 2", p.Conns())
	}
	if n := p.Reset(); n != 2 {
		t.Errorf("reset %d, want 2", n)
	}
	for _, c := range append(clients[1:], servers[1:]...) {
		if err := ends(t, c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("another: %v, want reset", err)
		}
	}
	if p.ResetOne() || p.Reset() != 0 {
		t.Error("reset what was not there")
	}
}

func TestConnectionsAreClosedOneByOne(t *testing.T) {
	p := proxy(t, echo(t))
	var conns []net.Conn
	for range 4 {
		c := connect(t, p.Addr())
		works(t, c)
		conns = append(conns, c)
	}
	const interval = 30 * time.Millisecond
	begun := time.Now()
	if n := p.CloseOneByOne(t.Context(), interval); n != 4 {
		t.Errorf("closed %d, want 4", n)
	}
	if e := time.Since(begun); e < 3*interval {
		t.Errorf("took %s, want three pauses of %s", e, interval)
	}
	for _, c := range conns {
		if err := ends(t, c); !errors.Is(err, io.EOF) {
			t.Errorf("%v, want an orderly end", err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	works(t, connect(t, p.Addr()))
	last := connect(t, p.Addr())
	works(t, last)
	if n := p.CloseOneByOne(ctx, time.Hour); n != 1 {
		t.Errorf("closed %d under an ended context, want 1", n)
	}
	works(t, last)
}

func TestATargetThatIsAwayResetsItsClients(t *testing.T) {
	port, err := services.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	p := proxy(t, fmt.Sprintf("127.0.0.1:%d", port))
	c, err := net.DialTimeout("tcp4", p.Addr(), 10*time.Second)
	if err == nil { // else the reset was faster
		defer c.Close()
		err = ends(t, c)
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%v, want reset", err)
	}
	do(t, p.Close)
	do(t, p.Close)
	if err := p.Pass(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("pass after close: %v, want closed", err)
	}
}
