package storage

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"
)

var (
	// ErrDigest says that the bytes are not the ones that were asked for. It is
	// reached with errors.Is.
	ErrDigest = errors.New("the SHA-256 digest does not match")

	errStalled  = errors.New("no byte moved within the stall timeout")
	errRedirect = errors.New("the store answered with a redirect, which is not followed: check the URL")
)

const (
	maxBackoff    = 10 * time.Second
	maxRetryAfter = 2 * time.Minute
	maxErrorBody  = 64 << 10
	maxMessage    = 300
)

// Error is what went wrong with one call. It never contains the key, nor the
// token of a signed URL.
type Error struct {
	Op     string // what was being done, such as "upload"
	Bucket string
	Key    string // the object's key, or empty
	// Status is the status that the store meant: it puts most errors into the
	// body of an HTTP 400. 0: there was no answer.
	Status     int
	Code       string        // the store's own word, such as NoSuchKey
	Message    string        // the store's sentence for people
	RetryAfter time.Duration // how long the store asked us to wait; 0 if it did not
	Err        error         // the cause when there was no answer

	transient bool // no answer, and the same call may get one
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Op)
	if e.Bucket != "" {
		b.WriteString(" " + e.Bucket)
		if e.Key != "" {
			b.WriteString("/" + e.Key)
		}
	}
	if e.Status != 0 {
		fmt.Fprintf(&b, ": status %d", e.Status)
	}
	if e.Code != "" {
		b.WriteString(" " + e.Code)
	}
	if e.Message != "" {
		b.WriteString(": " + e.Message)
	}
	if e.Err != nil {
		b.WriteString(": " + e.Err.Error())
	}
	return b.String()
}

// Unwrap returns the cause, if there was no answer.
func (e *Error) Unwrap() error { return e.Err }

// Retryable says whether the same call may succeed later with nothing changed.
func (e *Error) Retryable() bool {
	switch e.Code {
	case "SlowDown", "DatabaseTimeout", "ResourceLocked", "LockTimeout", "too_many_connections":
		return true
	}
	switch e.Status {
	case 0:
		return e.transient
	case http.StatusRequestTimeout, http.StatusLocked, http.StatusTooEarly, http.StatusTooManyRequests:
		return true
	case http.StatusNotImplemented, http.StatusHTTPVersionNotSupported:
		return false
	}
	return e.Status >= 500
}

// IsNotFound says whether the bucket or the object is not there, or is hidden
// from this key: the store does not tell which.
func IsNotFound(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Status == http.StatusNotFound
}

// IsExists says whether the key or the bucket is already taken.
func IsExists(err error) bool {
	var e *Error
	if !errors.As(err, &e) || e.Status != http.StatusConflict {
		return false
	}
	switch e.Code {
	case "KeyAlreadyExists", "ResourceAlreadyExists", "BucketAlreadyExists", "Duplicate":
		return true
	}
	// The resumable endpoint answers in plain text.
	return strings.Contains(e.Message, "already exists")
}

// unanswered is the error of a call that got no answer. An error of a cancelled
// context is final, any other may pass.
func (c *Client) unanswered(ctx context.Context, e Error, err error) *Error {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // its text has the URL, and with it the token of a signed one
	}
	var cert *tls.CertificateVerificationError
	switch {
	case ctx.Err() != nil:
		err = ctx.Err()
		if cause := context.Cause(ctx); !errors.Is(cause, err) {
			err = fmt.Errorf("%w: %w", err, cause)
		}
	case errors.As(err, &cert), errors.Is(err, errRedirect):
	default:
		e.transient = true
	}
	e.Err = err
	return &e
}

// refused reads the answer of a call that was not granted and closes it.
func (c *Client) refused(e Error, resp *http.Response) *Error {
	defer resp.Body.Close()
	raw, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
	e.Status = resp.StatusCode
	e.RetryAfter = retryAfter(resp.Header.Get("Retry-After"), time.Now())
	var body struct {
		StatusCode json.RawMessage `json:"statusCode"`
		Code       string          `json:"code"`
		Error      string          `json:"error"`
		Message    string          `json:"message"`
	}
	switch {
	case resp.StatusCode < 400:
		e.Err = errRedirect
		return &e
	case json.Unmarshal(raw, &body) == nil:
		if n, err := strconv.Atoi(strings.Trim(string(body.StatusCode), `"`)); err == nil && n >= 400 && n < 600 {
			e.Status = n
		}
		e.Code = c.clean(body.Code)
		if e.Code == "" {
			e.Code = c.clean(body.Error)
		}
		e.Message = c.clean(body.Message)
	case strings.HasPrefix(resp.Header.Get("Content-Type"), "text/html"), len(raw) == 0:
		// A proxy in front of the store: its page says no more than the status.
		e.Message = http.StatusText(resp.StatusCode)
	default:
		e.Message = c.clean(string(raw))
	}
	if e.Code == "InvalidRange" || resp.StatusCode == http.StatusRequestedRangeNotSatisfiable {
		e.Status = http.StatusRequestedRangeNotSatisfiable
	}
	return &e
}

// clean makes a stranger's text fit for a log line and takes the key out of it.
func (c *Client) clean(s string) string {
	if c.key != "" {
		s = strings.ReplaceAll(s, c.key, "[key]")
	}
	s = strings.TrimSpace(strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?")))
	if r := []rune(s); len(r) > maxMessage {
		s = string(r[:maxMessage]) + "..."
	}
	return s
}

func retryAfter(v string, now time.Time) time.Duration {
	if n, err := strconv.Atoi(v); err == nil && n > 0 && n < 1<<30 {
		return time.Duration(n) * time.Second
	}
	if at, err := http.ParseTime(v); err == nil && at.After(now) {
		return at.Sub(now)
	}
	return 0
}

// pacer decides whether a failed call is tried again, and waits.
type pacer struct {
	c        *Client
	failures int // in a row, since the last progress
}

func (c *Client) pacer() *pacer { return &pacer{c: c} }

// progress forgives the failures so far.
func (p *pacer) progress() { p.failures = 0 }

// again waits and returns nil when the call that ended with err is to be
// repeated, and otherwise the error to return.
func (p *pacer) again(ctx context.Context, err error) error {
	var e *Error
	if !errors.As(err, &e) || !e.Retryable() {
		return err
	}
	return p.pause(ctx, e)
}

// pause is again for an error that the caller knows how to deal with.
func (p *pacer) pause(ctx context.Context, e *Error) error {
	p.failures++
	if p.failures >= p.c.attempts || e.RetryAfter > maxRetryAfter {
		return e
	}
	p.c.retried(e.Op)
	t := time.NewTimer(max(p.delay(), e.RetryAfter))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return p.c.unanswered(ctx, Error{Op: e.Op, Bucket: e.Bucket, Key: e.Key}, e)
	}
}

func (p *pacer) delay() time.Duration {
	d := p.c.backoff
	for range p.failures - 1 {
		if d *= 2; d >= maxBackoff {
			d = maxBackoff
			break
		}
	}
	return d/2 + rand.N(d/2+1)
}
