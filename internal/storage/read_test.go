package storage_test

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"lorayard/internal/storage"
)

// source lends an object of n bytes behind a server that cuts connections; the
// second and later requests go to another key, if there is one.
func source(t *testing.T, n int, ranges bool, later string) (c *storage.Client, bucket string, want []byte, cuts *atomic.Int64) {
	t.Helper()
	e := withBucket(t)
	name, _ := file(t, n)
	if _, err := e.client.Upload(t.Context(), e.bucket, "old", name, storage.Options{}); err != nil {
		t.Fatal(err)
	}
	if later != "" {
		upload(t, e, later, n)
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(e.url)
	if err != nil {
		t.Fatal(err)
	}
	cuts = new(atomic.Int64)
	front := httptest.NewServer(&httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(u)
			if !ranges {
				r.Out.Header.Del("Range")
			}
			if later != "" && cuts.Load() > 0 {
				r.Out.URL.Path = strings.Replace(r.Out.URL.Path, "/old", "/"+later, 1)
			}
		},
		ModifyResponse: func(r *http.Response) error {
			if cuts.Add(1) <= 3 {
				// Further than what a server without ranges gave before.
				r.Body = struct {
					io.Reader
					io.Closer
				}{io.MultiReader(io.LimitReader(r.Body, cuts.Load()<<20), broken{}), r.Body}
			}
			return nil
		},
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	})
	t.Cleanup(front.Close)
	return open(t, storage.Config{URL: front.URL, Key: e.key}), e.bucket, want, cuts
}

func TestAStreamGoesOnWhereItWasCut(t *testing.T) {
	for name, ranges := range map[string]bool{"ranges": true, "no ranges": false} {
		t.Run(name, func(t *testing.T) {
			c, bucket, want, requests := source(t, 9<<20, ranges, "")
			r := c.Read(t.Context(), bucket, "old")
			got, err := io.ReadAll(r)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d of %d bytes: %v", len(got), len(want), err)
			}
			if n := requests.Load(); n != 4 {
				t.Errorf("%d requests", n)
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestAStreamOfAnObjectThatWasReplacedEnds(t *testing.T) {
	c, bucket, _, _ := source(t, 9<<20, true, "new")
	r := c.Read(t.Context(), bucket, "old")
	defer r.Close()
	if n, err := io.Copy(io.Discard, r); !errors.Is(err, storage.ErrChanged) {
		t.Errorf("%d bytes: %v", n, err)
	}
}

func TestAStreamOfNothing(t *testing.T) {
	e := withBucket(t)
	upload(t, e, "empty", 0)
	for key, check := range map[string]func(error) bool{
		"missing": storage.IsNotFound,
		"a/../b":  func(err error) bool { return err != nil && !storage.IsNotFound(err) },
		"empty":   func(err error) bool { return err == nil },
	} {
		r := e.client.Read(t.Context(), e.bucket, key)
		if n, err := io.Copy(io.Discard, r); n != 0 || !check(err) {
			t.Errorf("%s: %d bytes, %v", key, n, err)
		}
		r.Close()
		if _, err := r.Read(make([]byte, 1)); err == nil {
			t.Errorf("%s: read after Close", key)
		}
	}
}
