// Package storage is the only room that knows Supabase Storage. It moves
// files of any size between a disk and a bucket with bounded memory, goes on
// after a cut connection, and proves by digest that what arrived is what was
// sent. Nothing is ever overwritten: a key is written once.
//
// Two clients stand behind its door. The small JSON calls (list, sign, remove,
// buckets) go through storage-go, a fresh one per call and only through its
// NewRequest and Do, because its upload and download calls share a header map
// between goroutines, cannot be cancelled, read whole objects into memory and
// follow a redirect with the key in hand. Bytes go through our own
// http.Client.
//
// A Client without a key can still do what a signed upload token or a signed
// URL allows: that is all a host that trains ever gets.
//
// # Conformance
//
// The tests run one suite against the local server in the package local. The
// same suite runs against any real endpoint when both STORAGE_URL and
// STORAGE_KEY are set, with a key of the role service_role:
//
//	STORAGE_URL=https://ref.supabase.co STORAGE_KEY=... go test -run Conformance ./internal/storage/
//
// It makes one private bucket named conformance-<random> and removes it again.
package storage

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"
)

const (
	// ChunkBytes is the size of one part of a resumable upload, in bytes. The
	// hosted service accepts no other. Files up to this size go in one request.
	ChunkBytes = 6 << 20

	defaultStall    = 60 * time.Second
	defaultCall     = 30 * time.Second
	defaultAttempts = 6
	defaultBackoff  = 200 * time.Millisecond
)

// Config says where the store is and how patient to be with it.
type Config struct {
	// URL is the project's address, such as https://ref.supabase.co or
	// http://127.0.0.1:9000. The path /storage/v1 is added unless it is there.
	URL string
	// Key is a service or secret key. It is sent as bearer token and as apikey.
	// Empty: only calls with an upload token or a signed URL work.
	Key string
	// StallTimeout ends a transfer that moved no byte for so long; 0 means 60 s.
	// There is no limit on the whole transfer.
	StallTimeout time.Duration
	// CallTimeout ends one try of a small call; 0 means 30 s.
	CallTimeout time.Duration
	// Attempts is how often in a row a call may fail without progress before
	// its error is returned; 0 means 6.
	Attempts int
	// Backoff is the wait after the first failure; it doubles up to 10 s, less
	// a random part; 0 means 200 ms.
	Backoff time.Duration
	// Retried, if not nil, hears of each call that failed and is tried again, by
	// what it does: upload, download, list, sign ... It must not block.
	Retried func(op string)
}

// Client talks to one store. It is safe for use by many goroutines.
type Client struct {
	base     *url.URL
	root     string // base as text, without a slash at its end
	key      string
	http     *http.Client
	stall    time.Duration
	call     time.Duration
	attempts int
	backoff  time.Duration
	retried  func(op string)
}

// Object names one stored file and what was proven about it.
type Object struct {
	Bucket string
	Key    string
	Bytes  int64
	SHA256 string // lower-case hex
}

// Open checks the configuration and returns a client. It does not connect;
// Ping does.
func Open(c Config) (*Client, error) {
	base, err := baseURL(c.URL)
	if err != nil {
		return nil, fmt.Errorf("opening the store: %w", err)
	}
	for _, r := range c.Key {
		if r <= ' ' || r > '~' {
			return nil, errors.New("opening the store: the key contains a blank or a control character")
		}
	}
	cl := &Client{
		base:     base,
		root:     base.String(),
		key:      c.Key,
		stall:    orDefault(c.StallTimeout, defaultStall),
		call:     orDefault(c.CallTimeout, defaultCall),
		attempts: orDefault(c.Attempts, defaultAttempts),
		backoff:  orDefault(c.Backoff, defaultBackoff),
		retried:  c.Retried,
	}
	if cl.retried == nil {
		cl.retried = func(string) {}
	}
	cl.http = &http.Client{
		Transport: &http.Transport{
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
			TLSHandshakeTimeout:   10 * time.Second,
			ResponseHeaderTimeout: cl.stall,
			ForceAttemptHTTP2:     true,
			MaxIdleConnsPerHost:   8,
			IdleConnTimeout:       90 * time.Second,
			// A digest is of the bytes that are stored, not of what a proxy
			// makes of them.
			DisableCompression: true,
		},
		// The store has no reason to send us elsewhere, and whoever does must
		// not get the key.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return cl, nil
}

// Close drops idle connections. The client may be used again.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func orDefault[T int | time.Duration](v, otherwise T) T {
	if v <= 0 {
		return otherwise
	}
	return v
}

// baseURL is the address of the storage API: everything else is appended to it.
func baseURL(raw string) (*url.URL, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return nil, errors.New("the URL cannot be parsed")
	}
	switch {
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("the URL must begin with http:// or https://, not %q", u.Scheme)
	case u.Hostname() == "":
		return nil, errors.New("the URL has no host")
	case u.User != nil:
		return nil, errors.New("the URL must not contain a user or a password")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return nil, errors.New("the URL must not contain a query or a fragment")
	}
	path := strings.TrimRight(u.Path, "/")
	if !strings.HasSuffix(path, "/storage/v1") {
		path += "/storage/v1"
	}
	return &url.URL{Scheme: u.Scheme, Host: u.Host, Path: path}, nil
}

var (
	keyAlphabet    = regexp.MustCompile(`^[A-Za-z0-9_/!.*'() &$=@;:+,?-]*$`)
	bucketAlphabet = regexp.MustCompile(`^[A-Za-z0-9_!.*'() &$=@;:+,?-]{1,100}$`)
)

// CheckKey says why the store would not take a key, or nil. Beside the
// server's alphabet it refuses empty segments and "." and "..", which some
// clients and proxies resolve to another object or another bucket.
func CheckKey(key string) error {
	if key == "" {
		return errors.New("the key is empty")
	}
	if len(key) > 1024 {
		return errors.New("the key is longer than 1024 bytes")
	}
	if !keyAlphabet.MatchString(key) {
		return errors.New("the key has a character that the store refuses")
	}
	for s := range strings.SplitSeq(key, "/") {
		if s == "" || s == "." || s == ".." {
			return fmt.Errorf("the key has the segment %q", s)
		}
	}
	return nil
}

func checkBucket(name string) error {
	if !bucketAlphabet.MatchString(name) || name == "." || name == ".." {
		return errors.New("the bucket's name is empty or has a character that the store refuses")
	}
	return nil
}

func check(op, bucket, key string) error {
	if err := checkBucket(bucket); err != nil {
		return &Error{Op: op, Bucket: bucket, Key: key, Err: err}
	}
	if err := CheckKey(key); err != nil {
		return &Error{Op: op, Bucket: bucket, Key: key, Err: err}
	}
	return nil
}

// path is bucket and key for use in a URL, each segment escaped on its own.
func path(bucket, key string) string {
	var b strings.Builder
	b.WriteString(url.PathEscape(bucket))
	for s := range strings.SplitSeq(key, "/") {
		b.WriteByte('/')
		b.WriteString(url.PathEscape(s))
	}
	return b.String()
}

// authorize adds the key. New keys are not JWTs: they count as bearer token
// only where apikey says the same.
func (c *Client) authorize(h http.Header) {
	if c.key == "" {
		return
	}
	h.Set("Authorization", "Bearer "+c.key)
	h.Set("apikey", c.key)
}

// needKey refuses what only the holder of a key can do.
func (c *Client) needKey(op, bucket, key string) error {
	if c.key != "" {
		return nil
	}
	return &Error{Op: op, Bucket: bucket, Key: key, Err: errors.New("this client has no key")}
}

// guard ends one transfer when it stalls.
type guard struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
	stall  time.Duration
}

func (c *Client) guard(ctx context.Context) *guard {
	g := &guard{stall: c.stall}
	g.ctx, g.cancel = context.WithCancelCause(ctx)
	g.timer = time.AfterFunc(c.stall, func() { g.cancel(errStalled) })
	return g
}

// alive says that a byte has moved.
func (g *guard) alive() { g.timer.Reset(g.stall) }

func (g *guard) stop() {
	g.timer.Stop()
	g.cancel(nil)
}
