package storage

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

const copyBuffer = 256 << 10

// Download fetches an object into localPath, which appears whole or not at all,
// with mode 0600 and durable. It goes on where a connection was cut. When
// wantSHA256 (hex) is not empty and the bytes have another digest, the error is
// ErrDigest and localPath is left as it was.
func (c *Client) Download(ctx context.Context, bucket, key, localPath, wantSHA256 string) (Object, error) {
	about := Error{Op: "download", Bucket: bucket, Key: key}
	if err := check(about.Op, bucket, key); err != nil {
		return Object{}, err
	}
	if err := c.needKey(about.Op, bucket, key); err != nil {
		return Object{}, err
	}
	return c.download(ctx, about, download{at: "/object/authenticated/" + path(bucket, key), withKey: true}, localPath, wantSHA256)
}

// DownloadSigned is Download with a signed URL in place of the key. Only the
// object and the token are taken from the URL: the host is always this client's
// own, and no key is sent. When the store does not take the URL any more, renew
// (optional) gives the next one for the same object.
func (c *Client) DownloadSigned(ctx context.Context, signedURL, localPath, wantSHA256 string, renew func(context.Context) (string, error)) (Object, error) {
	about := Error{Op: "download"}
	at, err := signed(signedURL, &about)
	if err != nil {
		return Object{}, err
	}
	first := about
	return c.download(ctx, about, download{at: at, renew: func(ctx context.Context) (string, error) {
		if renew == nil {
			return "", nil
		}
		next, err := renew(ctx)
		if err != nil {
			return "", err
		}
		about := Error{Op: "download"}
		at, err := signed(next, &about)
		if err == nil && about != first {
			err = &Error{Op: "download", Err: errors.New("the next signed URL is of another object")}
		}
		return at, err
	}}, localPath, wantSHA256)
}

// signed takes a signed URL apart: about gets the object, and at is where to
// ask for it.
func signed(signedURL string, about *Error) (at string, err error) {
	const mark = "/object/sign/"
	u, err := url.Parse(signedURL)
	if err != nil {
		about.Err = errors.New("the signed URL cannot be parsed")
		return "", about
	}
	_, name, _ := strings.Cut(u.Path, mark)
	about.Bucket, about.Key, _ = strings.Cut(name, "/")
	token := u.Query().Get("token")
	if name == "" || token == "" {
		about.Err = errors.New("this is not a signed URL")
		return "", about
	}
	if err := check(about.Op, about.Bucket, about.Key); err != nil {
		return "", err
	}
	return mark + path(about.Bucket, about.Key) + "?token=" + url.QueryEscape(token), nil
}

func (c *Client) download(ctx context.Context, about Error, how download, localPath, want string) (_ Object, err error) {
	defer func() {
		var e *Error
		if err != nil && !errors.As(err, &e) {
			about.Err = err
			err = &about
		}
	}()
	dir := filepath.Dir(localPath)
	f, err := os.CreateTemp(dir, "."+filepath.Base(localPath)+".*.part")
	if err != nil {
		return Object{}, err
	}
	defer func() {
		_ = f.Close()
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	d := &download{c: c, about: about, at: how.at, withKey: how.withKey, renew: how.renew, file: f, hash: sha256.New(), total: -1}
	if err := d.run(ctx); err != nil {
		return Object{}, err
	}
	obj := Object{Bucket: about.Bucket, Key: about.Key, Bytes: d.offset, SHA256: hex.EncodeToString(d.hash.Sum(nil))}
	if want != "" && !strings.EqualFold(want, obj.SHA256) {
		return Object{}, fmt.Errorf("%w: %d bytes arrived with %s, not %s", ErrDigest, obj.Bytes, obj.SHA256, want)
	}
	if err := f.Sync(); err != nil {
		return Object{}, err
	}
	if err := f.Close(); err != nil {
		return Object{}, err
	}
	if err := os.Rename(f.Name(), localPath); err != nil {
		return Object{}, err
	}
	return obj, syncDir(dir)
}

// syncDir makes a rename durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// download is one object on its way to a temporary file.
type download struct {
	c       *Client
	about   Error
	at      string
	withKey bool
	renew   func(context.Context) (at string, err error) // nil with the key

	file   *os.File
	hash   hash.Hash
	offset int64 // bytes in file and hash
	total  int64 // -1: not known
	etag   string
}

func (d *download) run(ctx context.Context) error {
	best := int64(0)
	for p := d.c.pacer(); ; {
		err := d.fetch(ctx)
		if err == nil {
			return nil
		}
		if d.offset > best {
			best = d.offset
			p.progress()
		}
		var e *Error
		if errors.As(err, &e) && e.Status == http.StatusRequestedRangeNotSatisfiable && d.offset > 0 {
			// The object is not the one that was begun.
			if err := d.reset(); err != nil {
				return err
			}
			if err := p.pause(ctx, e); err != nil {
				return err
			}
			continue
		}
		if d.renew != nil && e != nil && denied(e) {
			if at, renewErr := d.renew(ctx); renewErr != nil {
				return renewErr
			} else if at != "" {
				d.at = at
				if err := p.pause(ctx, e); err != nil {
					return err
				}
				continue
			}
		}
		if err := p.again(ctx, err); err != nil {
			return err
		}
	}
}

// reset begins anew.
func (d *download) reset() error {
	if _, err := d.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	d.hash.Reset()
	d.offset, d.total, d.etag = 0, -1, ""
	return d.file.Truncate(0)
}

// fetch asks for the rest of the object and writes what comes.
func (d *download) fetch(ctx context.Context) error {
	g := d.c.guard(ctx)
	defer g.stop()
	req, err := http.NewRequestWithContext(g.ctx, http.MethodGet, d.c.root+d.at, nil)
	if err != nil {
		return err
	}
	if d.withKey {
		d.c.authorize(req.Header)
	}
	if d.offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", d.offset))
	}
	resp, err := d.c.send(ctx, d.about, req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := d.begin(ctx, resp); err != nil {
		return err
	}
	w := &sink{d: d}
	_, err = io.CopyBuffer(w, struct{ io.Reader }{aliveReader{resp.Body, g.alive}}, make([]byte, copyBuffer))
	switch {
	case w.err != nil:
		return w.err
	case err != nil:
		if errors.Is(context.Cause(g.ctx), errStalled) {
			err = errStalled
		}
		return d.c.unanswered(ctx, d.about, err)
	case d.total >= 0 && d.offset != d.total:
		return d.c.unanswered(ctx, d.about, io.ErrUnexpectedEOF)
	}
	return nil
}

// begin decides what the answer is a part of.
func (d *download) begin(ctx context.Context, resp *http.Response) error {
	etag := strings.TrimPrefix(resp.Header.Get("ETag"), "W/") // a proxy may weaken it
	if resp.StatusCode == http.StatusPartialContent {
		from, total, ok := contentRange(resp.Header.Get("Content-Range"))
		if ok && from == d.offset && etag == d.etag && (d.total < 0 || total == d.total) {
			d.total = total
			return nil
		}
		if err := d.reset(); err != nil {
			return err
		}
		return d.c.unanswered(ctx, d.about, errors.New("the object changed while it was read"))
	}
	if d.offset > 0 { // no ranges here, or another object: from the start
		if err := d.reset(); err != nil {
			return err
		}
	}
	d.total, d.etag = resp.ContentLength, etag
	return nil
}

func contentRange(v string) (from, total int64, ok bool) {
	v, found := strings.CutPrefix(v, "bytes ")
	span, size, _ := strings.Cut(v, "/")
	start, _, _ := strings.Cut(span, "-")
	from, err := strconv.ParseInt(start, 10, 64)
	total, err2 := strconv.ParseInt(size, 10, 64)
	return from, total, found && err == nil && err2 == nil
}

// sink writes to file and digest and keeps the disk's error apart from the
// network's: only the latter is worth another try.
type sink struct {
	d   *download
	err error
}

func (s *sink) Write(p []byte) (int, error) {
	n, err := s.d.file.Write(p)
	_, _ = s.d.hash.Write(p[:n])
	s.d.offset += int64(n)
	s.err = err
	return n, err
}

// aliveReader reports every read as progress.
type aliveReader struct {
	r     io.Reader
	alive func()
}

func (r aliveReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if n > 0 {
		r.alive()
	}
	return n, err
}
