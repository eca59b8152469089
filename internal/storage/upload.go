package storage

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	metaSHA256 = "sha256" // the metadata under which the digest is kept

	tusVersion  = "1.0.0"
	tidyTimeout = 2 * time.Second
)

var (
	errChanged   = errors.New("the file changed while it was uploaded")
	cacheControl = regexp.MustCompile(`^(?:no-cache|max-age=([0-9]{1,10}))$`)
)

// Options say how an object is stored.
type Options struct {
	ContentType  string            // empty: application/octet-stream
	CacheControl string            // "no-cache" or "max-age=<seconds>"; empty: max-age=3600
	Metadata     map[string]string // kept with the object; sha256 is added
	// SHA256 is the digest of the file in hex, where it is known. A file that
	// differs is not uploaded; a large one is read once instead of twice.
	SHA256 string
	// Token is a signed upload token. With it no key is sent.
	Token string
	// Renew (optional, with Token) returns a new token when the store does not
	// take the one before any more.
	Renew func(ctx context.Context) (string, error)
	// Look (optional, with Token) says what the store knows of the object, for
	// a client without a key; an error of IsNotFound when it is not there.
	Look func(ctx context.Context) (Info, error)
	// Note (optional) is a file that remembers where a resumable upload goes
	// on, for another process. It is removed when the upload is done or given up.
	Note string
}

// Upload stores the file at localPath under key and never overwrites: see
// IsExists. A key that already holds the same bytes, by size and digest, is a
// success, so an upload may be repeated. Up to ChunkBytes go in one request,
// more in parts of that size, which go on where they were cut. Memory is
// bounded by one part. A client without a key compares by Options.Look, or gets
// the error.
func (c *Client) Upload(ctx context.Context, bucket, key, localPath string, o Options) (Object, error) {
	about := Error{Op: "upload", Bucket: bucket, Key: key}
	if err := check(about.Op, bucket, key); err != nil {
		return Object{}, err
	}
	if o.Token == "" {
		if err := c.needKey(about.Op, bucket, key); err != nil {
			return Object{}, err
		}
	}
	obj, err := c.upload(ctx, about, localPath, o)
	if err == nil {
		return obj, nil
	}
	var e *Error
	if errors.As(err, &e) {
		return Object{}, err
	}
	about.Err = err
	return Object{}, &about
}

func (c *Client) upload(ctx context.Context, about Error, localPath string, o Options) (Object, error) {
	if o.ContentType == "" {
		o.ContentType = "application/octet-stream"
	}
	if o.CacheControl == "" {
		o.CacheControl = "max-age=3600"
	}
	if !cacheControl.MatchString(o.CacheControl) {
		return Object{}, fmt.Errorf("cache control %q is neither no-cache nor max-age=<seconds>", o.CacheControl)
	}
	f, err := os.Open(localPath)
	if err != nil {
		return Object{}, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return Object{}, err
	}
	if !fi.Mode().IsRegular() {
		return Object{}, fmt.Errorf("%s is not a regular file", localPath)
	}
	obj := Object{Bucket: about.Bucket, Key: about.Key, Bytes: fi.Size(), SHA256: strings.ToLower(o.SHA256)}
	// A token gives no way to ask whether an unanswered POST was carried out;
	// the resumable protocol does.
	if obj.Bytes <= ChunkBytes && o.Token == "" {
		return c.uploadWhole(ctx, about, obj, f, o)
	}
	if obj.SHA256 == "" {
		// The digest goes ahead of the bytes, so they are read once before.
		if obj.SHA256, err = digest(ctx, f); err != nil {
			return Object{}, err
		}
	}
	meta, err := metadata(o.Metadata, obj.SHA256)
	if err != nil {
		return Object{}, err
	}
	t := &resumable{c: c, about: about, obj: obj, file: f, o: o, meta: meta, hash: sha256.New()}
	return obj, t.run(ctx)
}

// Digest is the size and the SHA-256 of a local file.
func Digest(ctx context.Context, path string) (obj Object, err error) {
	f, err := os.Open(path)
	if err != nil {
		return obj, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return obj, err
	}
	obj.Bytes = fi.Size()
	obj.SHA256, err = digest(ctx, f)
	return obj, err
}

func digest(ctx context.Context, f *os.File) (string, error) {
	h := sha256.New()
	if _, err := io.CopyBuffer(h, struct{ io.Reader }{ctxReader{ctx, f}}, make([]byte, 1<<20)); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// ctxReader ends with its context.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (r ctxReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

func metadata(own map[string]string, sum string) ([]byte, error) {
	m := maps.Clone(own)
	if m == nil {
		m = map[string]string{}
	}
	m[metaSHA256] = sum
	return json.Marshal(m)
}

func (c *Client) uploadWhole(ctx context.Context, about Error, obj Object, f *os.File, o Options) (Object, error) {
	data := make([]byte, obj.Bytes)
	if _, err := io.ReadFull(f, data); err != nil {
		return Object{}, fmt.Errorf("%w: %w", errChanged, err)
	}
	sum := sha256.Sum256(data)
	if got := hex.EncodeToString(sum[:]); obj.SHA256 == "" {
		obj.SHA256 = got
	} else if got != obj.SHA256 {
		return Object{}, fmt.Errorf("%w: the file has %s, not %s", ErrDigest, got, obj.SHA256)
	}
	meta, err := metadata(o.Metadata, obj.SHA256)
	if err != nil {
		return Object{}, err
	}
	for p := c.pacer(); ; {
		err := c.post(ctx, about, data, meta, o)
		if err == nil {
			return obj, nil
		}
		if IsExists(err) {
			return obj, c.ours(ctx, obj, o, err)
		}
		if err := p.again(ctx, err); err != nil {
			return Object{}, err
		}
	}
}

func (c *Client) post(ctx context.Context, about Error, data, meta []byte, o Options) error {
	g := c.guard(ctx)
	defer g.stop()
	req, err := http.NewRequestWithContext(g.ctx, http.MethodPost, c.root+"/object/"+path(about.Bucket, about.Key), nil)
	if err != nil {
		return err
	}
	c.authorize(req.Header)
	req.Header.Set("Content-Type", o.ContentType)
	req.Header.Set("Cache-Control", o.CacheControl)
	req.Header.Set("x-upsert", "false")
	req.Header.Set("x-metadata", base64.StdEncoding.EncodeToString(meta))
	setBody(req, data, g.alive)
	resp, err := c.send(ctx, about, req)
	if err != nil {
		return err
	}
	drain(resp)
	return nil
}

// payload is the body of one request. The transport may still read a body when
// its request has been answered, so the bytes belong to it until idle.
type payload struct {
	data  []byte
	alive func()
	mu    sync.Mutex
	open  int // bodies that are not closed
}

// setBody sends data with its length: a body of unknown length escapes the
// bucket's size limit.
func setBody(req *http.Request, data []byte, alive func()) *payload {
	p := &payload{data: data, alive: alive}
	req.ContentLength = int64(len(data))
	req.GetBody = func() (io.ReadCloser, error) {
		if len(data) == 0 {
			return http.NoBody, nil
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.open++
		return &payloadReader{p: p}, nil
	}
	req.Body, _ = req.GetBody()
	return p
}

// idle says that nobody reads the bytes any more.
func (p *payload) idle() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.open == 0
}

type payloadReader struct {
	p      *payload
	at     int
	closed bool
}

// Read holds the lock while it touches the bytes: Close may come from another
// goroutine.
func (r *payloadReader) Read(b []byte) (int, error) {
	r.p.mu.Lock()
	defer r.p.mu.Unlock()
	switch {
	case r.closed:
		return 0, http.ErrBodyReadAfterClose
	case r.at == len(r.p.data):
		return 0, io.EOF
	}
	n := copy(b, r.p.data[r.at:])
	r.at += n
	r.p.alive()
	return n, nil
}

func (r *payloadReader) Close() error {
	r.p.mu.Lock()
	defer r.p.mu.Unlock()
	if !r.closed {
		r.closed = true
		r.p.open--
	}
	return nil
}

// ours turns "already exists" into a success when the object holds our bytes.
func (c *Client) ours(ctx context.Context, obj Object, o Options, exists error) error {
	if c.key == "" && o.Look == nil {
		return exists
	}
	i, err := c.look(ctx, obj, o)
	if err != nil {
		if IsNotFound(err) {
			return exists
		}
		return err
	}
	if i.Bytes != obj.Bytes || i.SHA256 != obj.SHA256 {
		return exists
	}
	return nil
}

func (c *Client) look(ctx context.Context, obj Object, o Options) (Info, error) {
	if c.key == "" {
		return o.Look(ctx)
	}
	return c.Info(ctx, obj.Bucket, obj.Key)
}

// resumable is one upload by the TUS protocol.
//
//	       create             part, offset from the server
//	new ───────────► located ──────────────────────────────► done
//	 ▲                │   ▲                                   ▲
//	 │ upload is gone │   └── ask for the offset ◄── a failure│
//	 └────────────────┘             └── offset = size ────────┘
type resumable struct {
	c     *Client
	about Error
	obj   Object
	file  *os.File
	o     Options
	meta  []byte

	hash   hash.Hash
	hashed int64 // so many bytes from the start went through hash
	buf    []byte
	sent   *payload // what was made of buf last

	location string // where the parts go; empty: not created
	offset   int64  // how many bytes the store has
	sure     bool   // offset is the store's last word
	best     int64  // the largest offset since the upload was created
	restarts int
	resumed  bool   // an earlier process created it
	failure  *Error // the last one
	done     bool
}

func (t *resumable) run(ctx context.Context) error {
	t.location = t.noted()
	t.resumed = t.location != ""
	for p := t.c.pacer(); !t.done; {
		err := t.step(ctx)
		if t.offset > t.best {
			t.best = t.offset
			p.progress()
		}
		if err == nil {
			continue
		}
		if err := t.recover(ctx, p, err); err != nil {
			t.abandon(ctx, err)
			return err
		}
	}
	t.note("")
	return nil
}

// noted is where an earlier process of the same upload left off, if it noted it.
func (t *resumable) noted() string {
	if t.o.Note == "" {
		return ""
	}
	raw, err := os.ReadFile(t.o.Note)
	if err != nil {
		return ""
	}
	var n note
	if json.Unmarshal(raw, &n) != nil || n.Object != t.obj {
		return ""
	}
	at, err := t.locate(n.Location)
	if err != nil {
		return ""
	}
	return at
}

// note writes down where the upload goes on; empty: nowhere. Without the note
// another process begins anew, so that it is not there is no error.
func (t *resumable) note(location string) {
	if t.o.Note == "" {
		return
	}
	if location == "" {
		_ = os.Remove(t.o.Note)
		return
	}
	raw, err := json.Marshal(note{Object: t.obj, Location: location})
	if err == nil {
		_ = os.WriteFile(t.o.Note, raw, 0o600)
	}
}

// note is what a file of Options.Note holds.
type note struct {
	Object   Object
	Location string
}

// step makes the one request that is due.
func (t *resumable) step(ctx context.Context) error {
	switch {
	case t.location == "":
		return t.create(ctx)
	case !t.sure:
		return t.ask(ctx)
	}
	return t.part(ctx)
}

// recover brings the upload to where it can go on, or returns the error that
// ends it.
func (t *resumable) recover(ctx context.Context, p *pacer, err error) error {
	var e *Error
	if !errors.As(err, &e) || ctx.Err() != nil {
		return err
	}
	t.sure, t.failure = false, e
	switch located := t.location != ""; {
	case IsExists(e):
		if err := t.c.ours(ctx, t.obj, t.o, e); err != nil {
			return err
		}
		t.done = true
		return nil
	case located && (e.Status == http.StatusNotFound || e.Status == http.StatusGone):
		// The upload expired, or it was completed and tidied up: a new one is
		// answered with "already exists" if so.
		return t.restart(ctx, p)
	case located && e.Status == http.StatusConflict:
		// The store has another offset: a part that was cut may still be on its
		// way to the disk.
		return p.pause(ctx, e)
	case t.o.Token != "" && t.o.Renew != nil && denied(e):
		if err := p.pause(ctx, e); err != nil {
			return err
		}
		token, err := t.o.Renew(ctx)
		t.o.Token = token
		return err
	}
	return p.again(ctx, e)
}

// denied says whether the store may have refused a token for its age. It names
// that in many ways.
func denied(e *Error) bool {
	return e.Status == http.StatusBadRequest || e.Status == http.StatusUnauthorized || e.Status == http.StatusForbidden
}

func (t *resumable) restart(ctx context.Context, p *pacer) error {
	if t.restarts++; t.restarts >= t.c.attempts {
		return t.failure
	}
	t.location, t.offset, t.best, t.sure = "", 0, 0, false
	t.note("")
	return p.pause(ctx, t.failure)
}

func (t *resumable) create(ctx context.Context) error {
	req, g, err := t.request(ctx, http.MethodPost, t.c.root+"/upload/resumable"+t.suffix())
	if err != nil {
		return err
	}
	defer g.stop()
	seconds := t.o.CacheControl // this endpoint wants the number alone
	if m := cacheControl.FindStringSubmatch(seconds); m[1] != "" {
		seconds = m[1]
	}
	req.Header.Set("Upload-Length", strconv.FormatInt(t.obj.Bytes, 10))
	req.Header.Set("Upload-Metadata", strings.Join([]string{
		pair("bucketName", t.obj.Bucket),
		pair("objectName", t.obj.Key),
		pair("contentType", t.o.ContentType),
		pair("cacheControl", seconds),
		pair("metadata", string(t.meta)),
	}, ","))
	resp, err := t.c.send(ctx, t.about, req)
	if err != nil {
		return err
	}
	drain(resp)
	if t.location, err = t.locate(resp.Header.Get("Location")); err != nil {
		return err
	}
	t.note(t.location)
	t.offset, t.best, t.sure = 0, 0, true
	t.done = t.obj.Bytes == 0
	return nil
}

func pair(name, value string) string {
	return name + " " + base64.StdEncoding.EncodeToString([]byte(value))
}

func (t *resumable) suffix() string {
	if t.o.Token != "" {
		return "/sign"
	}
	return ""
}

// locate puts the upload's address onto our own base: the store builds it from
// whatever host a proxy told it, and the key goes to no other.
func (t *resumable) locate(header string) (string, error) {
	const mark = "/upload/resumable/"
	u, err := url.Parse(header)
	if err == nil {
		if _, id, ok := strings.Cut(u.EscapedPath(), mark); ok && id != "" && !strings.Contains(id, "..") {
			at := t.c.root + mark + id
			if u.RawQuery != "" {
				at += "?" + u.RawQuery
			}
			return at, nil
		}
	}
	return "", errors.New("the store named no usable address for the upload")
}

// ask learns how many bytes the store has.
func (t *resumable) ask(ctx context.Context) error {
	req, g, err := t.request(ctx, http.MethodHead, t.location)
	if err != nil {
		return err
	}
	defer g.stop()
	resp, err := t.c.send(ctx, t.about, req)
	if err != nil {
		return err
	}
	drain(resp)
	if err := t.take(resp); err != nil {
		return err
	}
	if t.offset == t.obj.Bytes {
		return t.confirm(ctx)
	}
	return nil
}

// confirm is called when the store has every byte but its last answer was not
// a success. It is done if the object is there, otherwise it begins anew.
func (t *resumable) confirm(ctx context.Context) error {
	if t.c.key == "" && t.o.Look == nil {
		// Without a key only the cause tells: an answer that was lost on the
		// way does not undo the upload, an error of the store may have.
		if t.done = t.failure == nil || t.failure.Status == 0; t.done {
			return nil
		}
		return t.notThere()
	}
	i, err := t.c.look(ctx, t.obj, t.o)
	switch {
	case IsNotFound(err):
		return t.notThere()
	case err != nil:
		return err
	case i.Bytes != t.obj.Bytes || i.SHA256 != t.obj.SHA256:
		e := t.about
		e.Status, e.Code, e.Message = http.StatusConflict, "KeyAlreadyExists", "the key holds another object"
		return &e
	}
	t.done = true
	return nil
}

// notThere is the error that makes recover begin anew.
func (t *resumable) notThere() error {
	e := t.about
	e.Status, e.Message = http.StatusGone, "the store has every byte and no object"
	return &e
}

// part sends the next bytes.
func (t *resumable) part(ctx context.Context) error {
	data, err := t.read()
	if err != nil {
		return err
	}
	req, g, err := t.request(ctx, http.MethodPatch, t.location)
	if err != nil {
		return err
	}
	defer g.stop()
	before := t.offset
	req.Header.Set("Upload-Offset", strconv.FormatInt(before, 10))
	req.Header.Set("Content-Type", "application/offset+octet-stream")
	t.sent = setBody(req, data, g.alive)
	resp, err := t.c.send(ctx, t.about, req)
	if err != nil {
		return err
	}
	drain(resp)
	// The store's word counts: a part that was pushed aside by another request
	// is answered with success and a smaller offset.
	if err := t.take(resp); err != nil {
		return err
	}
	if t.offset <= before {
		return t.c.unanswered(ctx, t.about, errors.New("the store took no byte of a part"))
	}
	t.done = t.offset == t.obj.Bytes
	return nil
}

// take reads the offset of an answer.
func (t *resumable) take(resp *http.Response) error {
	n, err := strconv.ParseInt(resp.Header.Get("Upload-Offset"), 10, 64)
	if err == nil && t.resumed && n > t.hashed && n <= t.obj.Bytes {
		if err := t.catchUp(n); err != nil {
			return err
		}
	}
	if err != nil || n < 0 || n > t.hashed { // never more than was read here
		e := t.about
		e.transient, e.Err = true, errors.New("the store named no usable offset")
		return &e
	}
	t.offset, t.sure = n, true
	return nil
}

// catchUp reads what an earlier process has sent, for the digest.
func (t *resumable) catchUp(n int64) error {
	got, err := io.Copy(t.hash, io.NewSectionReader(t.file, t.hashed, n-t.hashed))
	t.hashed += got
	if err == nil && t.hashed < n {
		err = errChanged
	}
	return err
}

// read fills the buffer from the offset and brings the digest up to date. The
// last part is not given out when the digest is not the announced one: what is
// stored under a digest has it.
func (t *resumable) read() ([]byte, error) {
	if t.buf == nil || t.sent != nil && !t.sent.idle() {
		t.buf = make([]byte, min(ChunkBytes, t.obj.Bytes))
	}
	data := t.buf[:min(int64(len(t.buf)), t.obj.Bytes-t.offset)]
	if _, err := t.file.ReadAt(data, t.offset); err != nil {
		if errors.Is(err, io.EOF) {
			err = errChanged
		}
		return nil, err
	}
	end := t.offset + int64(len(data))
	if t.hashed >= t.offset && t.hashed < end {
		_, _ = t.hash.Write(data[t.hashed-t.offset:])
		t.hashed = end
	}
	if end == t.obj.Bytes && t.hashed == end {
		if got := hex.EncodeToString(t.hash.Sum(nil)); got != t.obj.SHA256 {
			return nil, fmt.Errorf("%w: the bytes sent have %s, not %s: %w", ErrDigest, got, t.obj.SHA256, errChanged)
		}
	}
	return data, nil
}

// request is what all requests of the protocol share.
func (t *resumable) request(ctx context.Context, method, at string) (*http.Request, *guard, error) {
	g := t.c.guard(ctx)
	req, err := http.NewRequestWithContext(g.ctx, method, at, nil)
	if err != nil {
		g.stop()
		return nil, nil, err
	}
	req.Header.Set("Tus-Resumable", tusVersion)
	if t.o.Token != "" {
		req.Header.Set("x-signature", t.o.Token)
	} else {
		t.c.authorize(req.Header)
		req.Header.Set("x-upsert", "false") // every part is asked, not only the first
	}
	return req, g, nil
}

// abandon takes back what will not be finished, so that it does not lie on the
// store's disk; when the network is away there is nobody to tell.
func (t *resumable) abandon(ctx context.Context, why error) {
	var e *Error
	if t.location == "" || errors.As(why, &e) && e.transient || ctx.Err() != nil && t.o.Note != "" {
		return // somebody may go on
	}
	t.note("")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tidyTimeout)
	defer cancel()
	req, g, err := t.request(ctx, http.MethodDelete, t.location)
	if err != nil {
		return
	}
	defer g.stop()
	if resp, err := t.c.send(ctx, t.about, req); err == nil {
		drain(resp)
	}
}
