package services

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// backlog is what a listener asks for while it works; the kernel takes less
	// if net.core.somaxconn says so.
	backlog = 4096
	// fillTimeout bounds one connection that fills the backlog of a black hole.
	fillTimeout = 250 * time.Millisecond
	// chunk is the most that is forwarded, or delayed, at once.
	chunk = 32 << 10
)

// FaultProxy stands between a client and a server on TCP, and misbehaves when
// it is told to. Its address stays the same through all faults. Its methods may
// be called from several goroutines at once.
//
//	        new connections              existing ones
//	Pass    forwarded                    forwarded
//	Refuse  refused                      reset
//	RefuseNew  refused                   forwarded
//	Blackhole  neither made nor refused  their bytes vanish
type FaultProxy struct {
	target string
	addr   string
	dark   atomic.Bool  // Blackhole
	delay  atomic.Int64 // ns for each chunk
	total  atomic.Int64 // accepted so far

	// turn is held by a change of mode: one at a time, and before mu.
	turn      sync.Mutex
	closed    bool
	listener  *net.TCPListener // nil: refusing
	accepting chan struct{}    // closed when the accept loop has ended; nil: none
	filler    []net.Conn       // fills the backlog of a black hole

	mu    sync.Mutex
	pairs []*pair // in the order in which they were accepted
	wg    sync.WaitGroup
}

// pair is a client's connection and the one to the target that it is given.
type pair struct {
	ctx    context.Context // ends with the pair
	end    context.CancelFunc
	client *net.TCPConn
	// dark: bytes of this pair have vanished, or an end of it. It stays silent
	// also after the fault: what it carries has a hole, and a server that went
	// on reading would see what no network does to it.
	dark atomic.Bool

	mu     sync.Mutex
	server *net.TCPConn // nil before it is connected
	over   bool
}

// Proxy listens on a free port of 127.0.0.1 and forwards to target (host:port),
// which need not be up yet. Close ends it.
func Proxy(target string) (*FaultProxy, error) {
	if _, _, err := net.SplitHostPort(target); err != nil {
		return nil, fmt.Errorf("starting a proxy: %w", err)
	}
	var last error
	for range 10 { // somebody may take the port before we do
		port, err := FreePort()
		if err != nil {
			return nil, fmt.Errorf("starting a proxy: %w", err)
		}
		p := &FaultProxy{target: target, addr: fmt.Sprintf("127.0.0.1:%d", port)}
		if last = p.Pass(); last == nil {
			return p, nil
		}
	}
	return nil, fmt.Errorf("starting a proxy: %w", last)
}

// Addr is where the proxy listens, as host:port.
func (p *FaultProxy) Addr() string { return p.addr }

// Conns is the number of connections that exist now.
func (p *FaultProxy) Conns() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.pairs)
}

// Accepted is the number of connections that were accepted so far.
func (p *FaultProxy) Accepted() int { return int(p.total.Load()) }

// Latency holds back each chunk, in each direction, by d from now on; 0 ends
// that. It is independent of the mode.
func (p *FaultProxy) Latency(d time.Duration) { p.delay.Store(int64(d)) }

// Pass ends every fault but Latency. A connection that was waiting in front of
// a black hole is made when its client's kernel tries again, about a second
// after the first time, then two, four... A connection whose bytes vanished
// stays silent.
func (p *FaultProxy) Pass() error {
	p.turn.Lock()
	defer p.turn.Unlock()
	if err := p.open(); err != nil {
		return err
	}
	if p.accepting != nil {
		return nil // passing already
	}
	if err := p.relisten(backlog); err != nil {
		return err
	}
	p.dark.Store(false)
	ours := p.drain()
	if err := p.listener.SetDeadline(time.Time{}); err != nil {
		return fmt.Errorf("proxy %s: %w", p.addr, err)
	}
	p.accepting = make(chan struct{})
	go p.accept(p.listener, ours, p.accepting)
	return nil
}

// Refuse closes the listener, so that connecting is refused, and resets every
// connection: the server's process is gone.
func (p *FaultProxy) Refuse() error {
	err := p.RefuseNew()
	p.Reset()
	return err
}

// RefuseNew is Refuse that leaves existing connections as they are.
func (p *FaultProxy) RefuseNew() error {
	p.turn.Lock()
	defer p.turn.Unlock()
	p.dark.Store(false)
	return p.refuse()
}

// Blackhole makes the network vanish: what existing connections send is
// swallowed both ways, their ends included, and connecting hangs. It returns
// when that is so. What had been sent but not read by the proxy is swallowed
// too.
func (p *FaultProxy) Blackhole() error {
	p.turn.Lock()
	defer p.turn.Unlock()
	if err := p.open(); err != nil {
		return err
	}
	p.dark.Store(true)
	p.stopAccepting()
	if p.filler != nil {
		return nil
	}
	// Nobody accepts any more, and a full queue makes the kernel drop each SYN.
	if err := p.relisten(0); err != nil {
		return err
	}
	return p.fill()
}

// Reset ends every connection with an RST to both sides and says how many.
func (p *FaultProxy) Reset() int {
	pairs := p.snapshot()
	for _, c := range pairs {
		p.cut(c, true)
	}
	return len(pairs)
}

// ResetOne resets the oldest connection; false when there is none.
func (p *FaultProxy) ResetOne() bool {
	pairs := p.snapshot()
	if len(pairs) == 0 {
		return false
	}
	p.cut(pairs[0], true)
	return true
}

// CloseOneByOne ends the connections that exist now in an orderly way, the
// oldest first, with a pause of interval before each but the first. It returns
// when all are closed, or ctx ends, and says how many it closed.
func (p *FaultProxy) CloseOneByOne(ctx context.Context, interval time.Duration) int {
	pairs := p.snapshot()
	for i, c := range pairs {
		if i > 0 {
			select {
			case <-ctx.Done():
				return i
			case <-time.After(interval):
			}
		}
		p.cut(c, false)
	}
	return len(pairs)
}

// Close ends the proxy and resets its connections. A second call does nothing.
func (p *FaultProxy) Close() error {
	p.turn.Lock()
	defer p.turn.Unlock()
	err := p.refuse()
	p.closed = true
	p.Reset()
	p.wg.Wait()
	return err
}

// open makes the listener if there is none.
func (p *FaultProxy) open() error {
	if p.closed {
		return fmt.Errorf("proxy %s: %w", p.addr, net.ErrClosed)
	}
	if p.listener != nil {
		return nil
	}
	// Without multipath TCP, which is the default for listeners: its sockets
	// have no queue whose length we could set.
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	ln, err := lc.Listen(context.Background(), "tcp4", p.addr)
	if err != nil {
		return fmt.Errorf("proxy %s: %w", p.addr, err)
	}
	p.listener = ln.(*net.TCPListener)
	return nil
}

func (p *FaultProxy) refuse() error {
	if p.listener == nil {
		return nil
	}
	p.stopAccepting()
	err := p.listener.Close()
	p.listener = nil
	p.drain()
	if err != nil {
		return fmt.Errorf("proxy %s: %w", p.addr, err)
	}
	return nil
}

// stopAccepting returns when nothing that connects is seen any more.
func (p *FaultProxy) stopAccepting() {
	if p.accepting == nil {
		return
	}
	_ = p.listener.SetDeadline(time.Unix(1, 0)) // cannot fail while it is open
	<-p.accepting
	p.accepting = nil
}

// relisten gives the listener's socket a queue for n connections beyond one.
func (p *FaultProxy) relisten(n int) error {
	if err := p.control(func(fd int) error { return syscall.Listen(fd, n) }); err != nil {
		return fmt.Errorf("proxy %s: listen with a backlog of %d: %w", p.addr, n, err)
	}
	return nil
}

func (p *FaultProxy) control(f func(fd int) error) error {
	rc, err := p.listener.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := rc.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// fill connects to the proxy itself until its queue is full, so that the next
// one to connect hangs.
func (p *FaultProxy) fill() error {
	p.filler = []net.Conn{}
	for range 2 * backlog {
		full := false
		err := p.control(func(fd int) error {
			// Of a listening socket these two are the queue's length and its
			// limit; it is full when it is longer.
			info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
			full = err == nil && info.Unacked > info.Sacked
			return err
		})
		if full {
			return nil
		}
		if err != nil {
			return fmt.Errorf("proxy %s: measure the backlog: %w", p.addr, err)
		}
		c, err := net.DialTimeout("tcp4", p.addr, fillTimeout)
		switch {
		case err == nil:
			p.filler = append(p.filler, c)
		case hangs(err):
			return nil
		default:
			return fmt.Errorf("proxy %s: fill the backlog: %w", p.addr, err)
		}
	}
	return fmt.Errorf("proxy %s: the backlog does not fill", p.addr)
}

func hangs(err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout()
}

// drain gives the fillers up and returns where they came from. Their other ends
// are still in the listener's queue, if there is one.
func (p *FaultProxy) drain() map[string]bool {
	ours := map[string]bool{}
	for _, c := range p.filler {
		ours[c.LocalAddr().String()] = true
		_ = c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	p.filler = nil
	return ours
}

// accept makes pairs until the listener has a deadline or is closed. The first
// connection from each address in ours is a filler of the queue.
func (p *FaultProxy) accept(ln *net.TCPListener, ours map[string]bool, done chan<- struct{}) {
	defer close(done)
	for {
		client, err := ln.AcceptTCP()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, net.ErrClosed):
			return
		case err != nil: // aborted, or out of descriptors
			time.Sleep(pollEvery)
			continue
		case ours[client.RemoteAddr().String()]:
			delete(ours, client.RemoteAddr().String())
			client.Close()
			continue
		}
		p.total.Add(1)
		ctx, end := context.WithCancel(context.Background())
		c := &pair{ctx: ctx, end: end, client: client}
		p.mu.Lock()
		p.pairs = append(p.pairs, c)
		p.mu.Unlock()
		p.wg.Go(func() { p.serve(c) })
	}
}

// serve connects the pair to the target and forwards until both ways have
// ended.
func (p *FaultProxy) serve(c *pair) {
	defer c.end()
	var d net.Dialer
	server, err := d.DialContext(c.ctx, "tcp", p.target)
	if err != nil {
		p.cut(c, true)
		return
	}
	c.mu.Lock()
	c.server = server.(*net.TCPConn)
	over := c.over
	c.mu.Unlock()
	if over {
		server.Close()
		return
	}
	var both sync.WaitGroup
	both.Go(func() { p.pump(c, c.server, c.client) })
	both.Go(func() { p.pump(c, c.client, c.server) })
	both.Wait()
	p.cut(c, false)
}

// pump forwards one way.
func (p *FaultProxy) pump(c *pair, to, from *net.TCPConn) {
	buf := make([]byte, chunk)
	for {
		n, err := from.Read(buf)
		if d := time.Duration(p.delay.Load()); d > 0 {
			late := time.NewTimer(d)
			select {
			case <-late.C:
			case <-c.ctx.Done():
				late.Stop()
			}
		}
		if p.dark.Load() {
			c.dark.Store(true)
		}
		if n > 0 && !c.dark.Load() {
			if _, err := to.Write(buf[:n]); err != nil {
				p.cut(c, true)
				return
			}
		}
		switch {
		case err == nil:
		case c.dark.Load(): // the other side must not learn of it
			return
		case errors.Is(err, io.EOF):
			_ = to.CloseWrite() // it may be gone already
			return
		default: // reset by its peer, or cut by us already
			p.cut(c, true)
			return
		}
	}
}

func (p *FaultProxy) snapshot() []*pair {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.pairs)
}

// cut ends a pair, with RST or FIN to both sides.
func (p *FaultProxy) cut(c *pair, reset bool) {
	p.mu.Lock()
	if i := slices.Index(p.pairs, c); i >= 0 {
		p.pairs = slices.Delete(p.pairs, i, i+1)
	}
	p.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over {
		return
	}
	c.over = true
	for _, conn := range []*net.TCPConn{c.client, c.server} {
		if conn == nil {
			continue
		}
		if reset {
			_ = conn.SetLinger(0) // closing sends RST
		}
		conn.Close()
	}
	c.end()
}
