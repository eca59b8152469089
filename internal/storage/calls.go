package storage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"

	storage_go "github.com/supabase-community/storage-go"
)

const (
	listPage    = 1000 // the most that the server returns at once
	removeBatch = 500
	maxAnswer   = 16 << 20
)

// Info is what the store knows about an object.
type Info struct {
	Bucket      string
	Key         string
	Bytes       int64
	ContentType string
	ETag        string            // not a digest of the content
	SHA256      string            // as the uploader gave it, or empty
	Metadata    map[string]string // the uploader's own, values that are text; not in lists
	Created     time.Time
	Updated     time.Time
}

// BucketOptions are the settings that EnsureBucket keeps.
type BucketOptions struct {
	Public        bool  // readable by everybody; ours never are
	FileSizeLimit int64 // the largest file in bytes; 0 leaves it as it is
}

// Ping proves that the store answers and takes the key.
func (c *Client) Ping(ctx context.Context) error {
	var buckets []struct{}
	return c.json(ctx, Error{Op: "ping"}, http.MethodGet, "/bucket", nil, &buckets)
}

// EnsureBucket makes the bucket, or brings an existing one to the options.
func (c *Client) EnsureBucket(ctx context.Context, name string, o BucketOptions) error {
	about := Error{Op: "ensure bucket", Bucket: name}
	if err := checkBucket(name); err != nil {
		about.Err = err
		return &about
	}
	type settings struct {
		ID            string `json:"id,omitempty"`
		Name          string `json:"name,omitempty"`
		Public        bool   `json:"public"`
		FileSizeLimit *int64 `json:"file_size_limit,omitempty"`
	}
	want := settings{ID: name, Name: name, Public: o.Public}
	if o.FileSizeLimit > 0 {
		want.FileSizeLimit = &o.FileSizeLimit
	}
	var made struct{}
	err := c.json(ctx, about, http.MethodPost, "/bucket", want, &made)
	if err == nil || !IsExists(err) {
		return err
	}
	at := "/bucket/" + url.PathEscape(name)
	var have settings
	if err := c.json(ctx, about, http.MethodGet, at, nil, &have); err != nil {
		return err
	}
	limited := want.FileSizeLimit == nil || have.FileSizeLimit != nil && *have.FileSizeLimit == *want.FileSizeLimit
	if have.Public == want.Public && limited {
		return nil
	}
	return c.json(ctx, about, http.MethodPut, at, want, &made)
}

// Limit is the largest object in bytes that a bucket takes: the lower one of the
// bucket's own limit and the project's. 0 when the store names none.
func (c *Client) Limit(ctx context.Context, bucket string) (int64, error) {
	about := Error{Op: "ask for the limit of bucket", Bucket: bucket}
	if err := checkBucket(bucket); err != nil {
		about.Err = err
		return 0, &about
	}
	var have struct {
		FileSizeLimit *int64 `json:"file_size_limit"`
	}
	if err := c.json(ctx, about, http.MethodGet, "/bucket/"+url.PathEscape(bucket), nil, &have); err != nil {
		return 0, err
	}
	project, err := c.MaxUploadBytes(ctx)
	if err != nil || have.FileSizeLimit == nil || *have.FileSizeLimit == 0 {
		return project, err
	}
	if project == 0 {
		return *have.FileSizeLimit, nil
	}
	return min(project, *have.FileSizeLimit), nil
}

// RemoveBucket deletes an empty bucket.
func (c *Client) RemoveBucket(ctx context.Context, name string) error {
	about := Error{Op: "remove bucket", Bucket: name}
	if err := checkBucket(name); err != nil {
		about.Err = err
		return &about
	}
	var done struct{}
	return c.json(ctx, about, http.MethodDelete, "/bucket/"+url.PathEscape(name), struct{}{}, &done)
}

// List yields every object whose key begins with prefix, in the order of the
// keys, a page at a time. A failure is yielded last.
func (c *Client) List(ctx context.Context, bucket, prefix string) iter.Seq2[Info, error] {
	about := Error{Op: "list", Bucket: bucket, Key: prefix}
	return func(yield func(Info, error) bool) {
		err := checkBucket(bucket)
		if err == nil && !keyAlphabet.MatchString(prefix) {
			err = errors.New("the prefix has a character that no key has")
		}
		if err != nil {
			about.Err = err
			yield(Info{}, &about)
			return
		}
		type query struct {
			Prefix string `json:"prefix"`
			Limit  int    `json:"limit"`
			Cursor string `json:"cursor,omitempty"`
		}
		q := query{Prefix: prefix, Limit: listPage}
		for {
			var page struct {
				HasNext    bool   `json:"hasNext"`
				NextCursor string `json:"nextCursor"`
				Objects    []struct {
					Name     string    `json:"name"`
					Created  time.Time `json:"created_at"`
					Updated  time.Time `json:"updated_at"`
					Metadata struct {
						Size     int64  `json:"size"`
						Mimetype string `json:"mimetype"`
						ETag     string `json:"eTag"`
					} `json:"metadata"`
				} `json:"objects"`
			}
			if err := c.json(ctx, about, http.MethodPost, "/object/list-v2/"+url.PathEscape(bucket), q, &page); err != nil {
				yield(Info{}, err)
				return
			}
			for _, o := range page.Objects {
				i := Info{
					Bucket: bucket, Key: o.Name, Bytes: o.Metadata.Size, ContentType: o.Metadata.Mimetype,
					ETag: o.Metadata.ETag, Created: o.Created, Updated: o.Updated,
				}
				if !yield(i, nil) {
					return
				}
			}
			if !page.HasNext {
				return
			}
			if page.NextCursor == "" || page.NextCursor == q.Cursor {
				about.Err = errors.New("the store's list does not move on")
				yield(Info{}, &about)
				return
			}
			q.Cursor = page.NextCursor
		}
	}
}

// Remove deletes objects, in batches, and returns how many there were. A key
// that is not there is no error.
func (c *Client) Remove(ctx context.Context, bucket string, keys ...string) (int, error) {
	for _, k := range keys {
		if err := check("remove", bucket, k); err != nil {
			return 0, err
		}
	}
	removed := 0
	for len(keys) > 0 {
		batch := keys[:min(removeBatch, len(keys))]
		keys = keys[len(batch):]
		about := Error{Op: "remove", Bucket: bucket}
		if len(batch) == 1 {
			about.Key = batch[0]
		}
		var gone []struct{}
		body := map[string][]string{"prefixes": batch}
		if err := c.json(ctx, about, http.MethodDelete, "/object/"+url.PathEscape(bucket), body, &gone); err != nil {
			return removed, err
		}
		removed += len(gone)
	}
	return removed, nil
}

// SignedURL returns an address under which anybody can download the object
// until ttl, a whole number of seconds, is over. It cannot be taken back.
func (c *Client) SignedURL(ctx context.Context, bucket, key string, ttl time.Duration) (string, error) {
	about := Error{Op: "sign", Bucket: bucket, Key: key}
	if err := check(about.Op, bucket, key); err != nil {
		return "", err
	}
	if ttl < time.Second {
		about.Err = fmt.Errorf("a signed URL must live for a second or longer, not %v", ttl)
		return "", &about
	}
	var answer struct {
		SignedURL string `json:"signedURL"`
	}
	at := "/object/sign/" + path(bucket, key)
	if err := c.json(ctx, about, http.MethodPost, at, map[string]int64{"expiresIn": int64(ttl / time.Second)}, &answer); err != nil {
		return "", err
	}
	token := tokenOf(answer.SignedURL)
	if token == "" {
		about.Err = errors.New("the store's answer has no token")
		return "", &about
	}
	// The server's path is not escaped, so ours is used.
	return c.root + at + "?token=" + url.QueryEscape(token), nil
}

// SignUpload returns a token with which a client without a key can upload this
// one object once (Options.Token). The store decides how long it lives: two
// hours when hosted, a minute by default when self-hosted.
func (c *Client) SignUpload(ctx context.Context, bucket, key string) (string, error) {
	about := Error{Op: "sign upload", Bucket: bucket, Key: key}
	if err := check(about.Op, bucket, key); err != nil {
		return "", err
	}
	var answer struct {
		URL   string `json:"url"`
		Token string `json:"token"`
	}
	if err := c.json(ctx, about, http.MethodPost, "/object/upload/sign/"+path(bucket, key), struct{}{}, &answer); err != nil {
		return "", err
	}
	if answer.Token == "" {
		answer.Token = tokenOf(answer.URL)
	}
	if answer.Token == "" {
		about.Err = errors.New("the store's answer has no token")
		return "", &about
	}
	return answer.Token, nil
}

func tokenOf(signed string) string {
	u, err := url.Parse(signed)
	if err != nil {
		return ""
	}
	return u.Query().Get("token")
}

// Info returns what the store knows about an object; see IsNotFound.
func (c *Client) Info(ctx context.Context, bucket, key string) (Info, error) {
	about := Error{Op: "info", Bucket: bucket, Key: key}
	if err := check(about.Op, bucket, key); err != nil {
		return Info{}, err
	}
	if err := c.needKey(about.Op, bucket, key); err != nil {
		return Info{}, err
	}
	var o struct {
		Size        int64          `json:"size"`
		ContentType string         `json:"content_type"`
		ETag        string         `json:"etag"`
		Metadata    map[string]any `json:"metadata"`
		Created     time.Time      `json:"created_at"`
		Updated     time.Time      `json:"last_modified"`
	}
	for p := c.pacer(); ; {
		err := c.ask(ctx, about, http.MethodGet, "/object/info/"+path(bucket, key), nil, &o)
		if err == nil {
			break
		}
		if err := p.again(ctx, err); err != nil {
			return Info{}, err
		}
	}
	i := Info{
		Bucket: bucket, Key: key, Bytes: o.Size, ContentType: o.ContentType, ETag: o.ETag,
		Metadata: map[string]string{}, Created: o.Created, Updated: o.Updated,
	}
	for k, v := range o.Metadata {
		if s, ok := v.(string); ok {
			i.Metadata[k] = s
		}
	}
	i.SHA256 = i.Metadata[metaSHA256]
	return i, nil
}

// Exists says whether the object is there and this key may see it.
func (c *Client) Exists(ctx context.Context, bucket, key string) (bool, error) {
	_, err := c.Info(ctx, bucket, key)
	if IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// MaxUploadBytes returns the largest file that the project takes, in bytes, or
// 0 when the store names no limit. It needs no key. A bucket's own limit may be
// lower.
func (c *Client) MaxUploadBytes(ctx context.Context) (int64, error) {
	about := Error{Op: "ask for the upload limit"}
	for p := c.pacer(); ; {
		n, err := c.maxUploadBytes(ctx, about)
		if err == nil {
			return n, nil
		}
		if err := p.again(ctx, err); err != nil {
			return 0, err
		}
	}
}

func (c *Client) maxUploadBytes(ctx context.Context, about Error) (int64, error) {
	limited, cancel := context.WithTimeout(ctx, c.call)
	defer cancel()
	req, err := http.NewRequestWithContext(limited, http.MethodOptions, c.root+"/upload/resumable", nil)
	if err != nil {
		about.Err = err
		return 0, &about
	}
	resp, err := c.send(ctx, about, req)
	if err != nil {
		return 0, err
	}
	defer drain(resp)
	v := resp.Header.Get("Tus-Max-Size")
	if v == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(v, 10, 64)
	if err != nil || n < 0 {
		about.Err = fmt.Errorf("the store's limit %q is not a number of bytes", c.clean(v))
		return 0, &about
	}
	return n, nil
}

// json makes one small call through storage-go, as often as it takes. Each of
// these calls may be repeated without harm.
func (c *Client) json(ctx context.Context, about Error, method, at string, body, into any) error {
	if err := c.needKey(about.Op, about.Bucket, about.Key); err != nil {
		return err
	}
	for p := c.pacer(); ; {
		err := c.jsonOnce(ctx, about, method, at, body, into)
		if err == nil {
			return nil
		}
		if err := p.again(ctx, err); err != nil {
			return err
		}
	}
}

func (c *Client) jsonOnce(ctx context.Context, about Error, method, at string, body, into any) error {
	limited, cancel := context.WithTimeout(ctx, c.call)
	defer cancel()
	// One per call: the headers of a shared one are written by every upload.
	sg := storage_go.NewClient(c.root, c.key, map[string]string{"apikey": c.key})
	req, err := sg.NewRequest(method, c.root+at, body)
	if err != nil {
		about.Err = err
		return &about
	}
	resp, err := doOneHop(sg, req.WithContext(limited), into)
	if resp == nil {
		return c.unanswered(ctx, about, err)
	}
	defer resp.Body.Close()
	switch s := resp.StatusCode; {
	case s >= 200 && s < 300:
		if err == nil {
			return nil
		}
		return c.unanswered(ctx, about, fmt.Errorf("reading the answer: %w", err))
	case s < 400:
		return c.unanswered(ctx, about, errRedirect)
	case s == http.StatusBadRequest:
		// Almost every refusal comes as a 400 with the real status and code in
		// the body, which storage-go has read and thrown away. Ask once more to
		// learn them.
		return c.ask(ctx, about, method, at, body, into)
	}
	about.Status = resp.StatusCode
	about.RetryAfter = retryAfter(resp.Header.Get("Retry-After"), time.Now())
	about.Message = http.StatusText(resp.StatusCode)
	if err != nil && err.Error() != "" {
		about.Message = c.clean(err.Error())
	}
	return &about
}

// secondHop is what doOneHop panics with to leave storage-go.
type secondHop struct{}

// doOneHop is sg.Do without redirects. storage-go's transport adds the key to
// every request that passes, also to one that a redirect sends to a stranger,
// and neither its client nor its transport can be reached to forbid that. The
// trace can: the hook runs in this goroutine before a connection is looked for,
// and once an answer has begun, the only reason to look for one is a redirect.
// A cancelled context would not do: net/http may still pick an idle connection.
func doOneHop(sg *storage_go.Client, req *http.Request, into any) (resp *http.Response, err error) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case secondHop:
			resp, err = nil, errRedirect
		default:
			panic(r)
		}
	}()
	var answered atomic.Bool
	ctx := httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
		GotFirstResponseByte: func() { answered.Store(true) },
		GetConn: func(string) {
			if answered.Load() {
				panic(secondHop{})
			}
		},
	})
	return sg.Do(req.WithContext(ctx), into)
}

// ask makes one small call through our own client, once.
func (c *Client) ask(ctx context.Context, about Error, method, at string, body, into any) error {
	limited, cancel := context.WithTimeout(ctx, c.call)
	defer cancel()
	var r io.Reader
	if body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			about.Err = err
			return &about
		}
		r = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(limited, method, c.root+at, r)
	if err != nil {
		about.Err = err
		return &about
	}
	c.authorize(req.Header)
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.send(ctx, about, req)
	if err != nil {
		return err
	}
	defer drain(resp)
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(into); err != nil {
		return c.unanswered(ctx, about, fmt.Errorf("reading the answer: %w", err))
	}
	return nil
}

// send makes one request through our own client and turns everything but a
// success into an error. The caller closes the body of a success. ctx is the
// caller's, without the limits that the request has.
func (c *Client) send(ctx context.Context, about Error, req *http.Request) (*http.Response, error) {
	resp, err := c.http.Do(req)
	if err != nil {
		if errors.Is(context.Cause(req.Context()), errStalled) {
			err = errStalled
		}
		return nil, c.unanswered(ctx, about, err)
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		return nil, c.refused(about, resp)
	}
	return resp, nil
}

// drain closes a body so that its connection can be used again.
func drain(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, 4096)
	_ = resp.Body.Close()
}
