package storage

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// ErrChanged says that an object was replaced while it was read: what was read
// of it is of no use. It is reached with errors.Is.
var ErrChanged = errors.New("the object changed while it was read")

// Read returns the bytes of an object as a stream, which goes on where a
// connection was cut. It holds nothing but one connection. Errors are found
// when it is read: see IsNotFound and ErrChanged. The caller closes it.
func (c *Client) Read(ctx context.Context, bucket, key string) io.ReadCloser {
	r := &reader{c: c, ctx: ctx, about: Error{Op: "read", Bucket: bucket, Key: key}, p: c.pacer(), total: -1}
	if r.err = check(r.about.Op, bucket, key); r.err == nil {
		r.err = c.needKey(r.about.Op, bucket, key)
	}
	return r
}

// reader is one object on its way to whoever reads it.
type reader struct {
	c     *Client
	ctx   context.Context // of the whole stream: io.Reader has none
	about Error
	p     *pacer

	body   io.ReadCloser // nil between two connections
	g      *guard        // of body
	offset int64         // bytes given out
	total  int64         // -1: not known
	etag   string
	err    error // the end
}

func (r *reader) Read(b []byte) (int, error) {
	for r.err == nil {
		if r.body == nil {
			if err := r.connect(); err != nil {
				r.err = r.p.again(r.ctx, err)
				continue
			}
		}
		r.g.alive() // whoever reads may have taken their time
		n, err := r.body.Read(b)
		r.offset += int64(n)
		if n > 0 {
			r.g.alive()
			r.p.progress()
		}
		if err != nil {
			r.end(err)
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, r.err
}

// end drops a connection and decides whether there is more to come.
func (r *reader) end(err error) {
	stalled := errors.Is(context.Cause(r.g.ctx), errStalled)
	r.drop()
	switch {
	case errors.Is(err, io.EOF) && (r.total < 0 || r.offset == r.total):
		r.err = io.EOF
		return
	case errors.Is(err, io.EOF):
		err = io.ErrUnexpectedEOF
	case stalled:
		err = errStalled
	}
	r.err = r.p.again(r.ctx, r.c.unanswered(r.ctx, r.about, err))
}

func (r *reader) drop() {
	if r.body != nil {
		_ = r.body.Close()
		r.g.stop()
		r.body = nil
	}
}

// Close drops the connection.
func (r *reader) Close() error {
	r.drop()
	if r.err == nil {
		r.err = errors.New("read of a closed stream")
	}
	return nil
}

// connect asks for the rest of the object.
func (r *reader) connect() error {
	g := r.c.guard(r.ctx)
	req, err := http.NewRequestWithContext(g.ctx, http.MethodGet, r.c.root+"/object/authenticated/"+path(r.about.Bucket, r.about.Key), nil)
	if err != nil {
		g.stop()
		return err
	}
	r.c.authorize(req.Header)
	if r.offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", r.offset))
	}
	resp, err := r.c.send(r.ctx, r.about, req)
	if err != nil {
		g.stop()
		var e *Error
		if r.offset > 0 && errors.As(err, &e) && (e.Status == http.StatusRequestedRangeNotSatisfiable || e.Status == http.StatusNotFound) {
			return r.changed()
		}
		return err
	}
	if err := r.take(resp); err != nil {
		_ = resp.Body.Close()
		g.stop()
		return err
	}
	r.body, r.g = resp.Body, g
	return nil
}

// take decides what an answer is a part of.
func (r *reader) take(resp *http.Response) error {
	etag := strings.TrimPrefix(resp.Header.Get("ETag"), "W/") // a proxy may weaken it
	if r.offset == 0 {
		r.total, r.etag = resp.ContentLength, etag
		return nil
	}
	from, total, ok := contentRange(resp.Header.Get("Content-Range"))
	switch {
	case etag != r.etag:
		return r.changed()
	case resp.StatusCode == http.StatusPartialContent:
		if !ok || from != r.offset || r.total >= 0 && total != r.total {
			return r.changed()
		}
		r.total = total
		return nil
	case r.total >= 0 && resp.ContentLength != r.total:
		return r.changed()
	}
	// No ranges here: what was given out is skipped.
	if _, err := io.CopyN(io.Discard, resp.Body, r.offset); err != nil {
		return r.c.unanswered(r.ctx, r.about, err)
	}
	return nil
}

func (r *reader) changed() error {
	e := r.about
	e.Err = ErrChanged
	return &e
}
