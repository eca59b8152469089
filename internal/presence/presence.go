// Package presence is the wire between agents and dispatchers that costs
// nothing while nothing happens: one long TCP stream from every agent to every
// dispatcher. It carries hints alone, never truth. A dispatcher says "look",
// and the agent reads what is wanted of it from the database now instead of at
// its next renewal; an ended stream makes the dispatcher look at a lease
// earlier, but proves no death, because connections are reset for many reasons.
//
// What does prove a death is a report from the shim that outlives its agent; it
// comes on a connection of its own.
//
//	agent ── {"hello":{agent,boot,version}} ─────────► dispatcher, asks Verify
//	      ◄─ {"welcome":{}}, {"refused":…} or {"error":…}
//	      ◄─ {"look":true} …
//
//	shim ─── {"death":{agent,boot,job,attempt,nonce,message}} ► runs Died
//	      ◄─ {"ok":true}, {"refused":…} or {"error":…}
//
// Refused means that asking again cannot help, error that it may. The boot
// UUID, which only the process and the database know, and the nonce are the
// secrets that prove who speaks; they stand in no log and in no error.
package presence

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"time"
	"unicode"

	"lorayard/internal/job"
)

// MaxLine is the longest line in bytes, its end included.
const MaxLine = 16 << 10

const (
	maxName    = 256  // bytes of an agent's id, a boot, a nonce, a version
	maxMessage = 2000 // bytes of a death's words; escaped they still fit a line

	// dialTimeout bounds connecting, with the TLS handshake.
	dialTimeout = 2 * time.Second
	// userTimeout is how long sent bytes or keep-alive probes may stay without
	// an answer before the kernel ends the connection; without it a silent host
	// holds a stream for a quarter of an hour.
	userTimeout = 20 * time.Second
)

// ErrRefused says that asking again cannot help. Verify wraps it when the
// process is not the registered one, Died when the report is stale.
var ErrRefused = errors.New("refused")

// errProtocol marks a peer that does not speak as drawn above.
var errProtocol = errors.New("presence protocol")

// Death is what a shim reports of the agent that it has outlived.
type Death struct {
	Agent   string `json:"agent"`
	Boot    string `json:"boot"`
	job.Ref        // job, attempt and nonce that the agent was running
	Message string `json:"message,omitempty"` // how it ended, for a person; cut at 2,000 bytes
}

// hello is how an agent's process introduces itself.
type hello struct {
	Agent   string `json:"agent"`
	Boot    string `json:"boot"`
	Version string `json:"version,omitempty"`
}

// message is a line; exactly one field is set. Unknown fields pass, so that a
// newer peer may say more.
type message struct {
	Hello   *hello    `json:"hello,omitempty"`
	Death   *Death    `json:"death,omitempty"`
	Welcome *struct{} `json:"welcome,omitempty"`
	Look    bool      `json:"look,omitempty"`
	OK      bool      `json:"ok,omitempty"`
	Refused string    `json:"refused,omitempty"`
	Error   string    `json:"error,omitempty"`
}

// line encodes m. The types in it always encode.
func (m message) line() []byte {
	raw, _ := json.Marshal(m)
	return append(raw, '\n')
}

// parse decodes a line and checks what a stranger may have put into it. Its
// error repeats nothing of the line, which may hold a secret.
func parse(line []byte) (message, error) {
	var m message
	if json.Unmarshal(line, &m) != nil {
		return message{}, fmt.Errorf("%w: not a message", errProtocol)
	}
	if h := m.Hello; h != nil && (!name(h.Agent) || !name(h.Boot) || h.Version != "" && !name(h.Version)) {
		return message{}, fmt.Errorf("%w: hello without a proper agent, boot or version", errProtocol)
	}
	if d := m.Death; d != nil && (!name(d.Agent) || !name(d.Boot) || !name(string(d.Job)) || !name(d.Nonce) || d.Attempt < 1) {
		return message{}, fmt.Errorf("%w: death without a proper agent, boot, job, attempt or nonce", errProtocol)
	}
	return m, nil
}

// name reports whether s may be passed on as an identifier: Postgres takes no
// NUL, and a log no control characters.
func name(s string) bool {
	return s != "" && len(s) <= maxName && !strings.ContainsFunc(s, unicode.IsControl)
}

// newReader is small because most streams say nothing for hours.
func newReader(conn net.Conn) *bufio.Reader { return bufio.NewReaderSize(conn, 512) }

// read returns the next message. A line that was cut off is none.
func read(r *bufio.Reader) (message, error) {
	line, err := readLine(r)
	if err != nil {
		return message{}, err
	}
	return parse(line)
}

// readLine returns a line that is valid until the next read.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		switch {
		case len(line)+len(part) > MaxLine:
			return nil, fmt.Errorf("%w: a line is longer than %d bytes", errProtocol, MaxLine)
		case err == nil && line == nil:
			return part, nil
		case err == nil:
			return append(line, part...), nil
		case errors.Is(err, bufio.ErrBufferFull):
			line = append(line, part...)
		default:
			return nil, err
		}
	}
}

// Listen listens at address: tcp://host:port, tls://host:port, or host:port
// for tcp. The configuration with the certificate is for tls alone.
func Listen(ctx context.Context, address string, conf *tls.Config) (net.Listener, error) {
	hostport, secure, err := split(address)
	if err != nil {
		return nil, fmt.Errorf("listen for agents: %w", err)
	}
	if secure && conf == nil {
		return nil, fmt.Errorf("listen for agents at %s: tls needs a certificate", address)
	}
	lc := net.ListenConfig{KeepAliveConfig: keepAlive()}
	ln, err := lc.Listen(ctx, "tcp", hostport)
	if err != nil {
		return nil, fmt.Errorf("listen for agents: %w", err)
	}
	if secure {
		return tls.NewListener(ln, conf), nil
	}
	return ln, nil
}

// dial connects to address as Listen reads it. The roots, nil for the
// system's, are those that a tls server's certificate must lead to.
func dial(ctx context.Context, address string, roots *x509.CertPool) (net.Conn, error) {
	hostport, secure, err := split(address)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	d := net.Dialer{KeepAliveConfig: keepAlive()}
	conn, err := d.DialContext(ctx, "tcp", hostport)
	if err != nil {
		return nil, err
	}
	setUserTimeout(conn)
	if !secure {
		return conn, nil
	}
	host, _, _ := net.SplitHostPort(hostport) // split has checked it
	t := tls.Client(conn, &tls.Config{RootCAs: roots, ServerName: host, MinVersion: tls.VersionTLS13})
	if err := t.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("tls with %s: %w", hostport, err)
	}
	return t, nil
}

// split takes an address apart.
func split(address string) (hostport string, secure bool, err error) {
	scheme, rest, found := strings.Cut(address, "://")
	if !found {
		scheme, rest = "tcp", address
	}
	if scheme != "tcp" && scheme != "tls" {
		return "", false, fmt.Errorf("address %q: want tcp://host:port or tls://host:port", address)
	}
	if _, _, err := net.SplitHostPort(rest); err != nil {
		return "", false, fmt.Errorf("address %q: %w", address, err)
	}
	return rest, scheme == "tls", nil
}

// keepAlive finds a peer that vanished while nothing was said: the first probe
// after 15 s, the end after userTimeout, which overrules the count.
func keepAlive() net.KeepAliveConfig {
	return net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 2500 * time.Millisecond, Count: 3}
}

// raw is the connection below tls.
func raw(conn net.Conn) net.Conn {
	if t, ok := conn.(*tls.Conn); ok {
		return t.NetConn()
	}
	return conn
}

// hangUp ends a connection now. Closing tls politely may wait 5 s for a peer
// that does not read.
func hangUp(conn net.Conn) { _ = raw(conn).Close() }

// backoff yields the pauses between tries: the first up to first, each twice
// the one before, none above most.
type backoff struct {
	first, most time.Duration
	jitter      func(time.Duration) time.Duration
	next        time.Duration
}

func (b *backoff) pause() time.Duration {
	d := min(max(b.next, b.first), b.most)
	b.next = 2 * d
	return b.jitter(d)
}

// jitter draws from the upper half of d, so that what fell together does not
// come back together.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }

// sleep waits for d and reports whether ctx is still alive.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
