package presence

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// firstRetry, doubled each time, leaves room for three more tries within the
	// 2 s after which a dispatcher counts an agent as gone.
	firstRetry = 200 * time.Millisecond
	// mostRetry bounds how long a dispatcher that is back stays unnoticed.
	mostRetry = 10 * time.Second
	// welcomeTimeout covers a dispatcher whose database is slow to answer, and
	// its backlog after a restart.
	welcomeTimeout = 10 * time.Second
	// quietAfter is the number of failures in a row after which an operator is
	// told, once.
	quietAfter = 5
)

// Client is an agent's end: it keeps one stream to every dispatcher. Set the
// fields, give it addresses at any time, and call Run once.
type Client struct {
	Agent   string
	Boot    string // the UUID that this process has registered with; a secret
	Version string
	// Look says: read what is wanted of you now. It is called at each welcome,
	// because looks sent meanwhile were lost, and at each push; by several
	// goroutines, so it should set a flag and return.
	Look func()
	// Refused (optional) says that the dispatcher at address knows another
	// process as this agent. The client goes on asking, slowly: what counts is
	// the database's answer to the next renewal.
	Refused func(address, words string)
	// Roots are those that a tls dispatcher's certificate must lead to; the
	// system's if nil.
	Roots *x509.CertPool
	Log   *slog.Logger // nothing is logged if nil
	// Dial and Jitter are for simulations; the network, and the upper half of
	// the pause, if nil.
	Dial   func(ctx context.Context, address string) (net.Conn, error)
	Jitter func(time.Duration) time.Duration

	mu        sync.Mutex
	addresses []string
	changed   chan struct{} // holds one; made by signal
	connected atomic.Int64
}

// SetAddresses says where dispatchers listen: tcp://host:port or
// tls://host:port. Streams to others end.
func (c *Client) SetAddresses(addresses []string) {
	c.mu.Lock()
	c.addresses = slices.Clone(addresses)
	c.mu.Unlock()
	select {
	case c.signal() <- struct{}{}:
	default:
	}
}

// Connected is the number of dispatchers that have this agent's stream.
func (c *Client) Connected() int { return int(c.connected.Load()) }

func (c *Client) signal() chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.changed == nil {
		c.changed = make(chan struct{}, 1)
	}
	return c.changed
}

// Run keeps the streams until ctx ends.
func (c *Client) Run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	kept := map[string]context.CancelFunc{}
	for {
		c.mu.Lock()
		wanted := c.addresses
		c.mu.Unlock()
		for address, end := range kept {
			if !slices.Contains(wanted, address) {
				end()
				delete(kept, address)
			}
		}
		for _, address := range wanted {
			if kept[address] == nil {
				sctx, end := context.WithCancel(ctx)
				kept[address] = end
				wg.Go(func() { c.keep(sctx, address) })
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-c.signal():
		}
	}
}

// keep opens a stream to address again and again.
func (c *Client) keep(ctx context.Context, address string) {
	b := backoff{first: firstRetry, most: mostRetry, jitter: c.Jitter}
	if b.jitter == nil {
		b.jitter = jitter
	}
	for failures := 0; ; {
		welcomed, err := c.stream(ctx, address)
		if ctx.Err() != nil {
			return
		}
		if welcomed {
			// Also when it was short: a stream that is cut again and again must
			// come back in time every time.
			failures, b.next = 0, 0
		}
		failures++
		level := slog.LevelDebug
		switch {
		case errors.Is(err, ErrRefused):
			b.next = mostRetry
			level = slog.LevelWarn
		case failures == 1:
			level = slog.LevelInfo
		case failures == quietAfter:
			level = slog.LevelWarn
		}
		pause := b.pause()
		c.log().Log(ctx, level, "no presence stream", "dispatcher", address, "again_in", pause, "err", err)
		if !sleep(ctx, pause) {
			return
		}
	}
}

// stream says hello and listens until the stream ends; it tells whether it was
// welcomed before that.
func (c *Client) stream(ctx context.Context, address string) (welcomed bool, err error) {
	conn, err := c.dial(ctx, address)
	if err != nil {
		return false, err
	}
	defer hangUp(conn)
	defer context.AfterFunc(ctx, func() { hangUp(conn) })()
	_ = conn.SetDeadline(time.Now().Add(welcomeTimeout))
	if _, err := conn.Write(message{Hello: &hello{Agent: c.Agent, Boot: c.Boot, Version: c.Version}}.line()); err != nil {
		return false, fmt.Errorf("say hello: %w", err)
	}
	r := newReader(conn)
	m, err := read(r)
	switch {
	case err != nil:
		return false, fmt.Errorf("wait for the welcome: %w", err)
	case m.Refused != "":
		if c.Refused != nil {
			c.Refused(address, m.Refused)
		}
		return false, fmt.Errorf("%w: %s", ErrRefused, m.Refused)
	case m.Error != "":
		return false, fmt.Errorf("dispatcher says: %s", m.Error)
	case m.Welcome == nil:
		return false, fmt.Errorf("%w: no answer to hello", errProtocol)
	}
	_ = conn.SetDeadline(time.Time{})
	c.connected.Add(1)
	defer c.connected.Add(-1)
	c.log().InfoContext(ctx, "presence stream", "dispatcher", address)
	c.Look()
	for {
		m, err := read(r)
		if err != nil {
			return true, fmt.Errorf("presence stream ended: %w", err)
		}
		if m.Look {
			c.Look()
		}
	}
}

func (c *Client) dial(ctx context.Context, address string) (net.Conn, error) {
	if c.Dial != nil {
		return c.Dial(ctx, address)
	}
	return dial(ctx, address, c.Roots)
}

func (c *Client) log() *slog.Logger {
	if c.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return c.Log
}
