package storage_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lorayard/internal/storage"
)

const secret = "sb_secret_must_never_be_seen"

// calls are all kinds of requests that carry the key.
func calls(t *testing.T, c *storage.Client) map[string]func() error {
	t.Helper()
	ctx := t.Context()
	small, _ := file(t, 100)
	big, _ := file(t, storage.ChunkBytes+1)
	return map[string]func() error{
		"ping":   func() error { return c.Ping(ctx) },
		"sign":   func() error { _, err := c.SignedURL(ctx, "b", "k", time.Minute); return err },
		"remove": func() error { _, err := c.Remove(ctx, "b", "k"); return err },
		"bucket": func() error { return c.EnsureBucket(ctx, "b", storage.BucketOptions{}) },
		"info":   func() error { _, err := c.Info(ctx, "b", "k"); return err },
		"list": func() error {
			for _, err := range c.List(ctx, "b", "") {
				return err
			}
			return nil
		},
		"download": func() error {
			_, err := c.Download(ctx, "b", "k", filepath.Join(t.TempDir(), "x"), "")
			return err
		},
		"upload":    func() error { _, err := c.Upload(ctx, "b", "k", small, storage.Options{}); return err },
		"resumable": func() error { _, err := c.Upload(ctx, "b", "k", big, storage.Options{}); return err },
	}
}

// storage-go adds the key to every hop, also to one on another host.
func TestRedirectNeverGetsTheKey(t *testing.T) {
	var stolen atomic.Int64
	thief := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		stolen.Add(1)
		_, _ = io.WriteString(w, `[]`)
	}))
	t.Cleanup(thief.Close)
	// An idle connection to the thief makes it the harder to stop in time.
	get(t, thief.URL)
	stolen.Store(0)
	for _, status := range []int{301, 302, 303, 307, 308} {
		for _, to := range []string{thief.URL + "/x", "/elsewhere"} {
			var asked atomic.Int64
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				if r.URL.Path == "/elsewhere" {
					stolen.Add(1)
				}
				http.Redirect(w, r, to, status)
			}))
			c := open(t, storage.Config{URL: s.URL, Key: secret})
			for what, call := range calls(t, c) {
				asked.Store(0)
				err := call()
				var e *storage.Error
				if !errors.As(err, &e) || e.Retryable() || !strings.Contains(e.Error(), "redirect") {
					t.Errorf("%d %s: %v", status, what, err)
				}
				if asked.Load() != 1 {
					t.Errorf("%d %s: asked %d times", status, what, asked.Load())
				}
			}
			s.Close()
		}
	}
	if n := stolen.Load(); n != 0 {
		t.Errorf("%d requests went where a redirect sent them", n)
	}
}

// A redirect without an address is a success for storage-go.
func TestRedirectWithoutAddressIsNoSuccess(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusMovedPermanently)
		_, _ = io.WriteString(w, `[]`)
	}))
	t.Cleanup(s.Close)
	for what, call := range calls(t, open(t, storage.Config{URL: s.URL, Key: secret})) {
		if err := call(); err == nil {
			t.Errorf("%s: no error", what)
		}
	}
}

func TestKeyIsInNoError(t *testing.T) {
	answers := map[string]http.HandlerFunc{
		"echo": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusForbidden)
			_, _ = fmt.Fprintf(w, "not for %s at %s", r.Header.Get("Authorization"), r.URL)
		},
		"echo in JSON": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusBadRequest)
			_, _ = fmt.Fprintf(w, `{"statusCode":"403","code":%q,"message":%q}`, r.Header.Get("apikey"), r.Header.Get("Authorization"))
		},
		"cut": func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
	}
	for name, h := range answers {
		s := httptest.NewServer(h)
		c := open(t, storage.Config{URL: s.URL, Key: secret, Attempts: 2, Backoff: time.Millisecond})
		for what, call := range calls(t, c) {
			err := call()
			if err == nil {
				t.Errorf("%s, %s: no error", name, what)
				continue
			}
			if s := fmt.Sprintf("%v %+v %q", err, err, err.Error()); strings.Contains(s, secret) {
				t.Errorf("%s, %s: %s", name, what, s)
			}
		}
		const token = "the-token-of-a-signed-url"
		_, err := c.DownloadSigned(t.Context(), s.URL+"/storage/v1/object/sign/b/k?token="+token, filepath.Join(t.TempDir(), "x"), "", nil)
		if name == "cut" && (err == nil || strings.Contains(err.Error(), token)) {
			t.Errorf("%s: %v", name, err)
		}
		s.Close()
	}
}

// storage-go sends "../other/stolen" into another bucket, and a#b as a.
func TestKeysThatClientsMisreadAreRefused(t *testing.T) {
	var asked atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked.Add(1) }))
	t.Cleanup(s.Close)
	c := open(t, storage.Config{URL: s.URL, Key: secret})
	name, _ := file(t, 10)
	for _, key := range []string{
		"", ".", "..", "../other/stolen", "a/../b", "a/./b", "a//b", "/a", "a/", "a#b", "100%", "a%20b", "a\\b",
		"ä", "a\nb", "a\x00b", "a~b", "a[0]", strings.Repeat("k", 1025),
	} {
		errs := []error{}
		_, err := c.Upload(t.Context(), "b", key, name, storage.Options{})
		errs = append(errs, err)
		_, err = c.Download(t.Context(), "b", key, filepath.Join(t.TempDir(), "x"), "")
		errs = append(errs, err)
		_, err = c.Remove(t.Context(), "b", "fine", key)
		errs = append(errs, err)
		_, err = c.SignedURL(t.Context(), "b", key, time.Minute)
		errs = append(errs, err)
		_, err = c.SignUpload(t.Context(), "b", key)
		errs = append(errs, err)
		_, err = c.Info(t.Context(), "b", key)
		errs = append(errs, err)
		for i, err := range errs {
			var e *storage.Error
			if !errors.As(err, &e) || e.Retryable() {
				t.Errorf("key %q, call %d: %v", key, i, err)
			}
		}
	}
	for _, bucket := range []string{"", ".", "..", "a/b", "a%2fb", "ä"} {
		if _, err := c.Info(t.Context(), bucket, "k"); err == nil {
			t.Errorf("bucket %q was taken", bucket)
		}
	}
	if n := asked.Load(); n != 0 {
		t.Errorf("%d requests were sent", n)
	}
}

func TestErrorsAreClassedByTheBodyFirst(t *testing.T) {
	for _, c := range []struct {
		name      string
		status    int
		kind      string
		body      string
		want      storage.Error
		retryable bool
	}{
		{
			"a refusal inside a 400", 400, "application/json",
			`{"statusCode":"404","error":"not_found","message":"Object not found","code":"NoSuchKey"}`,
			storage.Error{Status: 404, Code: "NoSuchKey", Message: "Object not found"},
			false,
		},
		{
			"an older server without codes", 400, "application/json",
			`{"statusCode":"409","error":"Duplicate","message":"The resource already exists"}`,
			storage.Error{Status: 409, Code: "Duplicate", Message: "The resource already exists"},
			false,
		},
		{
			"overload inside a 400", 400, "application/json",
			`{"statusCode":"503","error":"x","message":"m","code":"SlowDown"}`,
			storage.Error{Status: 503, Code: "SlowDown", Message: "m"},
			true,
		},
		{
			"a lock inside a 400", 400, "application/json", `{"statusCode":"423","code":"ResourceLocked","message":"m"}`,
			storage.Error{Status: 423, Code: "ResourceLocked", Message: "m"},
			true,
		},
		{
			"a number for a status", 400, "application/json", `{"statusCode":544,"message":"m"}`,
			storage.Error{Status: 544, Message: "m"},
			true,
		},
		{
			"a page of a proxy", 502, "text/html", "<html>nginx</html>",
			storage.Error{Status: 502, Message: "Bad Gateway"},
			true,
		},
		{
			"too large for a proxy", 413, "text/html; charset=utf-8", "<html>cloudflare</html>",
			storage.Error{Status: 413, Message: "Request Entity Too Large"},
			false,
		},
		{"nothing at all", 500, "", "", storage.Error{Status: 500, Message: "Internal Server Error"}, true},
		{"a refusal of a gateway", 401, "application/json", `{"message":"Invalid API key"}`, storage.Error{Status: 401, Message: "Invalid API key"}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", c.kind)
				w.WriteHeader(c.status)
				_, _ = io.WriteString(w, c.body)
			}))
			t.Cleanup(s.Close)
			client := open(t, storage.Config{URL: s.URL, Key: secret, Attempts: 1})
			name, _ := file(t, 10)
			_, byBytes := client.Upload(t.Context(), "b", "k", name, storage.Options{})
			_, byJSON := client.SignedURL(t.Context(), "b", "k", time.Minute)
			for what, err := range map[string]error{"bytes": byBytes, "json": byJSON} {
				var e *storage.Error
				if !errors.As(err, &e) {
					t.Fatalf("%s: %v", what, err)
				}
				got := storage.Error{Status: e.Status, Code: e.Code, Message: e.Message}
				if what == "json" && c.status >= 500 {
					got.Message = c.want.Message // storage-go kept no text
				}
				// A conflict is looked into, which this server does not survive.
				if c.want.Status == 409 && what == "bytes" {
					continue
				}
				if got != c.want {
					t.Errorf("%s: %+v, want %+v", what, got, c.want)
				}
				if e.Retryable() != c.retryable {
					t.Errorf("%s: retryable = %v", what, e.Retryable())
				}
				if e.Bucket != "b" || e.Key != "k" || e.Op == "" || e.Error() == "" {
					t.Errorf("%s: %+v", what, e)
				}
			}
		})
	}
}

func TestPassingFailuresAreTriedAgainAndOthersNot(t *testing.T) {
	for _, c := range []struct {
		status int
		asked  int64
	}{{503, 3}, {429, 3}, {544, 3}, {408, 3}, {403, 1}, {401, 1}, {413, 1}, {501, 1}} {
		var asked atomic.Int64
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			asked.Add(1)
			w.WriteHeader(c.status)
		}))
		client := open(t, storage.Config{URL: s.URL, Key: secret, Attempts: 3, Backoff: time.Millisecond})
		for what, call := range calls(t, client) {
			asked.Store(0)
			if err := call(); err == nil {
				t.Errorf("%d %s: no error", c.status, what)
			}
			if asked.Load() != c.asked {
				t.Errorf("%d %s: asked %d times, want %d", c.status, what, asked.Load(), c.asked)
			}
		}
		s.Close()
	}
}

func TestRetryAfterIsHonoured(t *testing.T) {
	var times []time.Time
	var mu sync.Mutex
	wait := "1"
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		times = append(times, time.Now())
		n := len(times)
		mu.Unlock()
		if n == 1 {
			w.Header().Set("Retry-After", wait)
			w.WriteHeader(http.StatusTooManyRequests)
			return
		}
		_, _ = io.WriteString(w, `[]`)
	}))
	t.Cleanup(s.Close)
	client := open(t, storage.Config{URL: s.URL, Key: secret})
	if err := client.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	if d := times[1].Sub(times[0]); d < time.Second {
		t.Errorf("asked again after %v, not after a second", d)
	}
	times, wait = nil, "86400"
	err := client.Ping(t.Context())
	var e *storage.Error
	if !errors.As(err, &e) || e.RetryAfter != 24*time.Hour || len(times) != 1 {
		t.Errorf("err = %v after %d calls, want it at once when the wait is long", err, len(times))
	}
}

// Uploads of one storage-go client race on its header map and mix up their
// content types; a setting of one call sticks to the next.
func TestManyAtOnceKeepTheirOwnSettings(t *testing.T) {
	e := withBucket(t)
	var all sync.WaitGroup
	for i := range 64 {
		all.Go(func() {
			key, kind := fmt.Sprintf("c/%d", i), fmt.Sprintf("application/x-%d", i)
			name := filepath.Join(t.TempDir(), "f")
			if err := os.WriteFile(name, []byte(key), 0o600); err != nil {
				t.Error(err)
				return
			}
			if _, err := e.client.Upload(t.Context(), e.bucket, key, name, storage.Options{ContentType: kind, CacheControl: "no-cache"}); err != nil {
				t.Error(err)
				return
			}
			if i, err := e.client.Info(t.Context(), e.bucket, key); err != nil || i.ContentType != kind {
				t.Errorf("%s: %+v, %v", key, i, err)
			}
			if _, err := e.client.SignedURL(t.Context(), e.bucket, key, time.Minute); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
}

func TestOneOfManyWritersOfAKeyWins(t *testing.T) {
	e := withBucket(t)
	var won atomic.Int64
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			name, _ := file(t, storage.ChunkBytes+10+i)
			_, err := e.client.Upload(t.Context(), e.bucket, "k", name, storage.Options{})
			if err == nil {
				won.Add(1)
			} else if !storage.IsExists(err) {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if won.Load() != 1 {
		t.Errorf("%d uploads succeeded", won.Load())
	}
}

func TestRequestsCarryKeyAndLength(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for _, h := range []string{"Authorization", "Apikey"} {
			if v := r.Header[h]; len(v) != 1 || strings.TrimPrefix(v[0], "Bearer ") != secret {
				t.Errorf("%s %s: %s = %q", r.Method, r.URL, h, v)
			}
		}
		if v := r.Header["Content-Type"]; len(v) > 1 {
			t.Errorf("%s %s: content types %q", r.Method, r.URL, v)
		}
		if len(r.TransferEncoding) != 0 || r.ContentLength < 0 {
			t.Errorf("%s %s: a body of unknown length", r.Method, r.URL)
		}
		if r.Header.Get("x-upsert") == "true" {
			t.Errorf("%s %s: overwrites", r.Method, r.URL)
		}
		w.WriteHeader(http.StatusForbidden)
	}))
	t.Cleanup(s.Close)
	for _, call := range calls(t, open(t, storage.Config{URL: s.URL, Key: secret})) {
		_ = call()
	}
}

func TestFileThatChangesIsNotStoredUnderItsOldDigest(t *testing.T) {
	e := withBucket(t)
	for _, n := range []int{100, storage.ChunkBytes + 100} {
		name, _ := file(t, n)
		_, err := e.client.Upload(t.Context(), e.bucket, "k", name, storage.Options{SHA256: strings.Repeat("0", 64)})
		if !errors.Is(err, storage.ErrDigest) {
			t.Errorf("%d bytes: %v", n, err)
		}
		if ok, err := e.client.Exists(t.Context(), e.bucket, "k"); ok || err != nil {
			t.Errorf("%d bytes: exists = %v, %v", n, ok, err)
		}
	}
}

func TestClientWithoutKeySendsNothingItMayNot(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("%s %s was sent", r.Method, r.URL)
	}))
	t.Cleanup(s.Close)
	for what, call := range calls(t, open(t, storage.Config{URL: s.URL})) {
		if err := call(); err == nil || !strings.Contains(err.Error(), "no key") {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestSignedURLOfAnotherHostStaysHere(t *testing.T) {
	e := withBucket(t)
	o := upload(t, e, "a b/c", 100)
	signed, err := e.client.SignedURL(t.Context(), e.bucket, "a b/c", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := strings.Replace(signed, e.url, "http://stranger.invalid", 1)
	got, err := e.keyless.DownloadSigned(t.Context(), elsewhere, filepath.Join(t.TempDir(), "x"), o.SHA256, nil)
	if err != nil || got != o {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestAddressesThatCannotBeOurs(t *testing.T) {
	for _, u := range []string{
		"", "ref.supabase.co", "ftp://host", "http://", "http://:80", "http://user:hunter2@host", "http://host?x=1", "http://host#x", "http://ho st", "://",
	} {
		if _, err := storage.Open(storage.Config{URL: u, Key: "k"}); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%q: %v", u, err)
		}
	}
	for _, k := range []string{"key with", "key\nwith", "kéy"} {
		if _, err := storage.Open(storage.Config{URL: "http://host", Key: k}); err == nil || strings.Contains(err.Error(), k) {
			t.Errorf("key %q: %v", k, err)
		}
	}
	for _, u := range []string{"http://host", "http://host/", "https://ref.supabase.co/storage/v1", "https://host/behind/a/proxy/"} {
		if _, err := storage.Open(storage.Config{URL: u, Key: "k"}); err != nil {
			t.Errorf("%q: %v", u, err)
		}
	}
}

func TestEnsureBucketBringsSettingsBack(t *testing.T) {
	e := withBucket(t)
	public := storage.BucketOptions{Public: true, FileSizeLimit: 5000}
	private := storage.BucketOptions{FileSizeLimit: 100}
	for _, o := range []storage.BucketOptions{public, private} {
		if err := e.client.EnsureBucket(t.Context(), e.bucket, o); err != nil {
			t.Fatal(err)
		}
		b := string(getWithKey(t, e, "/storage/v1/bucket/"+e.bucket))
		if !strings.Contains(b, fmt.Sprintf(`"public":%v`, o.Public)) || !strings.Contains(b, fmt.Sprintf(`"file_size_limit":%d`, o.FileSizeLimit)) {
			t.Errorf("bucket is %s, want %+v", b, o)
		}
	}
}

func getWithKey(t *testing.T, e endpoint, at string) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, e.url+at, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+e.key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return data
}
