package storage_test

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"lorayard/internal/storage"
	"lorayard/internal/storage/local"
)

// cutter is a TCP proxy that resets every connection after so many bytes,
// whichever way they go.
type cutter struct {
	url  string
	cuts atomic.Int64
}

func startCutter(t *testing.T, target string, budget func() int64) *cutter {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{url: "http://" + l.Addr().String()}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", u.Host)
			if err != nil {
				_ = in.Close()
				return
			}
			all.Go(func() { c.join(in.(*net.TCPConn), out.(*net.TCPConn), budget()) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		all.Wait()
	})
	return c
}

func (c *cutter) join(a, b *net.TCPConn, budget int64) {
	var left atomic.Int64
	left.Store(budget)
	end := sync.OnceFunc(func() {
		// A reset, not an orderly end: what is on its way is lost.
		_ = a.SetLinger(0)
		_ = b.SetLinger(0)
		_ = a.Close()
		_ = b.Close()
	})
	defer end()
	var both sync.WaitGroup
	pump := func(to, from *net.TCPConn) {
		defer end()
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			if left.Add(-int64(n)) < 0 {
				c.cuts.Add(1)
				return
			}
			if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
				return
			}
		}
	}
	both.Go(func() { pump(a, b) })
	both.Go(func() { pump(b, a) })
	both.Wait()
}

// between draws budgets that are the same in every run.
func between(low, high int64) func() int64 {
	var mu sync.Mutex
	r := rand.New(rand.NewPCG(1, 2))
	return func() int64 {
		mu.Lock()
		defer mu.Unlock()
		return low + r.Int64N(high-low)
	}
}

func TestCutConnectionsDoNotHarmATransfer(t *testing.T) {
	const size = 36<<20 + 777
	for _, c := range []struct {
		name      string
		low, high int64
		token     bool
	}{
		{"cuts after 3 to 15 MiB", 3 << 20, 15 << 20, false},
		{"cuts before a part is through", 1 << 20, 4 << 20, false},
		{"cuts before a part is through, by token", 1 << 20, 4 << 20, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := withBucket(t)
			proxy := startCutter(t, e.url, between(c.low, c.high))
			name, sum := file(t, size)
			o := storage.Options{}
			client := open(t, storage.Config{URL: proxy.url, Key: e.key})
			if c.token {
				var err error
				if o.Token, err = e.client.SignUpload(t.Context(), e.bucket, "big"); err != nil {
					t.Fatal(err)
				}
				client = open(t, storage.Config{URL: proxy.url})
			}
			got, err := client.Upload(t.Context(), e.bucket, "big", name, o)
			if err != nil || got.SHA256 != sum {
				t.Fatalf("uploaded %+v, %v after %d cuts", got, err, proxy.cuts.Load())
			}
			up := proxy.cuts.Load()

			signed, err := e.client.SignedURL(t.Context(), e.bucket, "big", time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			to := filepath.Join(t.TempDir(), "back")
			if c.token {
				got, err = client.DownloadSigned(t.Context(), signed, to, sum, nil)
			} else {
				got, err = client.Download(t.Context(), e.bucket, "big", to, sum)
			}
			if err != nil || got.Bytes != size {
				t.Fatalf("downloaded %+v, %v", got, err)
			}
			same(t, name, to)
			down := proxy.cuts.Load() - up
			if up < 2 || down < 2 {
				t.Errorf("only %d cuts on the way up and %d on the way down", up, down)
			}
			t.Logf("%d cuts on the way up, %d on the way down", up, down)
		})
	}
}

// meddler is an HTTP proxy that may spoil answers.
type meddler struct {
	url   string
	spoil func(*http.Response) error
	mu    sync.Mutex
	seen  []string
}

func startMeddler(t *testing.T, target string, spoil func(*http.Response) error) *meddler {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	m := &meddler{spoil: spoil}
	p := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(u)
			// What a chain of proxies may make of the host.
			r.Out.Header.Set("X-Forwarded-Host", "storage.example.internal")
		},
		ModifyResponse: func(r *http.Response) error {
			m.mu.Lock()
			m.seen = append(m.seen, r.Request.Method+" "+r.Request.URL.Path)
			m.mu.Unlock()
			return spoil(r)
		},
		// The client gets nothing but a closed connection.
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	}
	s := httptest.NewServer(p)
	t.Cleanup(s.Close)
	m.url = s.URL
	return m
}

func (m *meddler) count(method string) (n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.seen {
		if strings.HasPrefix(s, method+" ") {
			n++
		}
	}
	return n
}

var errLost = errors.New("lost")

// once is true for the first call that matches.
func once(match func(*http.Response) bool) func(*http.Response) bool {
	var done atomic.Bool
	return func(r *http.Response) bool { return match(r) && done.CompareAndSwap(false, true) }
}

func TestLostLastAnswerIsNoFailure(t *testing.T) {
	name, sum := file(t, storage.ChunkBytes+100)
	small, smallSum := file(t, 100)
	for _, token := range []bool{false, true} {
		e := withBucket(t)
		last := once(func(r *http.Response) bool {
			return r.Request.Method == http.MethodPatch && r.Header.Get("Upload-Offset") == "6291556" ||
				r.Request.Method == http.MethodPost && strings.HasSuffix(r.Request.URL.Path, "/small")
		})
		m := startMeddler(t, e.url, func(r *http.Response) error {
			if last(r) {
				return errLost
			}
			return nil
		})
		client, o := open(t, storage.Config{URL: m.url, Key: e.key}), storage.Options{}
		if token {
			var err error
			if o.Token, err = e.client.SignUpload(t.Context(), e.bucket, "big"); err != nil {
				t.Fatal(err)
			}
			client = open(t, storage.Config{URL: m.url})
		}
		if got, err := client.Upload(t.Context(), e.bucket, "big", name, o); err != nil || got.SHA256 != sum {
			t.Errorf("token %v: uploaded %+v, %v", token, got, err)
		}
		if n := m.count(http.MethodPatch); n != 2 {
			t.Errorf("token %v: %d parts were sent, want 2: %q", token, n, m.seen)
		}
		if i, err := e.client.Info(t.Context(), e.bucket, "big"); err != nil || i.SHA256 != sum {
			t.Errorf("info %+v, %v", i, err)
		}
	}
	e := withBucket(t)
	lost := once(func(r *http.Response) bool { return r.Request.Method == http.MethodPost })
	m := startMeddler(t, e.url, func(r *http.Response) error {
		if lost(r) {
			return errLost
		}
		return nil
	})
	client := open(t, storage.Config{URL: m.url, Key: e.key})
	if got, err := client.Upload(t.Context(), e.bucket, "small", small, storage.Options{}); err != nil || got.SHA256 != smallSum {
		t.Errorf("uploaded %+v, %v", got, err)
	}
}

func TestUploadGoesOnFromTheOffsetOfTheStore(t *testing.T) {
	const size = 3*storage.ChunkBytes + 5
	name, sum := file(t, size)
	for what, spoil := range map[string]func(*http.Response) error{
		"a part pushed aside is a success with a smaller offset": func(r *http.Response) error {
			if r.Request.Method == http.MethodPatch && r.Header.Get("Upload-Offset") == "12582912" {
				r.Header.Set("Upload-Offset", "9000000")
			}
			return nil
		},
		"a success without an offset": func(r *http.Response) error {
			if r.Request.Method == http.MethodPatch && r.Header.Get("Upload-Offset") == "6291456" {
				r.Header.Del("Upload-Offset")
			}
			return nil
		},
	} {
		t.Run(what, func(t *testing.T) {
			e := withBucket(t)
			client := open(t, storage.Config{URL: startMeddler(t, e.url, spoil).url, Key: e.key})
			if got, err := client.Upload(t.Context(), e.bucket, "k", name, storage.Options{}); err != nil || got.SHA256 != sum {
				t.Fatalf("uploaded %+v, %v", got, err)
			}
			to := filepath.Join(t.TempDir(), "x")
			if _, err := e.client.Download(t.Context(), e.bucket, "k", to, sum); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestExpiredUploadBeginsAnew(t *testing.T) {
	e := withBucket(t)
	name, sum := file(t, 2*storage.ChunkBytes+5)
	second := once(func(r *http.Response) bool { return r.Header.Get("Upload-Offset") == "6291456" })
	m := startMeddler(t, e.url, func(r *http.Response) error {
		if r.Request.Method == http.MethodPatch && second(r) {
			// Somebody tidied up.
			del, err := http.NewRequestWithContext(r.Request.Context(), http.MethodDelete, r.Request.URL.String(), nil)
			if err != nil {
				return err
			}
			del.Header.Set("Tus-Resumable", "1.0.0")
			del.Header.Set("Authorization", "Bearer "+e.key)
			resp, err := http.DefaultClient.Do(del)
			if err != nil {
				return err
			}
			return resp.Body.Close()
		}
		return nil
	})
	client := open(t, storage.Config{URL: m.url, Key: e.key})
	if got, err := client.Upload(t.Context(), e.bucket, "k", name, storage.Options{}); err != nil || got.SHA256 != sum {
		t.Fatalf("uploaded %+v, %v: %q", got, err, m.seen)
	}
	if m.count(http.MethodPost) != 2 {
		t.Errorf("requests: %q", m.seen)
	}
}

func TestDownloadBeginsAnewWhenTheObjectIsAnother(t *testing.T) {
	e := withBucket(t)
	upload(t, e, "old", 3<<20)
	_, sum := file(t, 2<<20)
	upload(t, e, "new", 2<<20)
	first := once(func(*http.Response) bool { return true })
	m := startMeddler(t, e.url, func(r *http.Response) error {
		if first(r) {
			r.Body = struct {
				io.Reader
				io.Closer
			}{io.MultiReader(io.LimitReader(r.Body, 1<<20), broken{}), r.Body}
		}
		return nil
	})
	u, _ := url.Parse(m.url)
	// The key holds one object at first and another when the rest is asked for.
	var asked atomic.Int64
	front := httptest.NewServer(&httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(u)
			if asked.Add(1) > 1 {
				r.Out.URL.Path = strings.Replace(r.Out.URL.Path, "/old", "/new", 1)
			}
		},
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) },
	})
	t.Cleanup(front.Close)
	client := open(t, storage.Config{URL: front.URL, Key: e.key})
	to := filepath.Join(t.TempDir(), "x")
	if got, err := client.Download(t.Context(), e.bucket, "old", to, ""); err != nil || got.SHA256 != sum {
		t.Fatalf("downloaded %+v, %v, want %s", got, err, sum)
	}
}

type broken struct{}

func (broken) Read([]byte) (int, error) { return 0, errLost }

func TestStalledTransferEnds(t *testing.T) {
	stop := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			w.Header().Set("Content-Length", "1000")
			_, _ = w.Write(make([]byte, 10))
			_ = http.NewResponseController(w).Flush()
		}
		<-stop // no byte more, and no answer
	}))
	t.Cleanup(s.Close)
	t.Cleanup(func() { close(stop) })
	client := open(t, storage.Config{URL: s.URL, Key: "k", StallTimeout: 30 * time.Millisecond, CallTimeout: 30 * time.Millisecond, Attempts: 2})
	name, _ := file(t, 100)
	calls := map[string]func(context.Context) error{
		"download": func(ctx context.Context) error {
			_, err := client.Download(ctx, "b", "k", filepath.Join(t.TempDir(), "x"), "")
			return err
		},
		"upload": func(ctx context.Context) error {
			_, err := client.Upload(ctx, "b", "k", name, storage.Options{})
			return err
		},
		"resumable": func(ctx context.Context) error {
			_, err := client.Upload(ctx, "b", "k", name, storage.Options{Token: "t"})
			return err
		},
		"json": func(ctx context.Context) error { return client.Ping(ctx) },
	}
	for what, call := range calls {
		err := call(t.Context())
		var e *storage.Error
		if !errors.As(err, &e) || !e.Retryable() || e.Status != 0 {
			t.Errorf("%s: %v, want a passing failure", what, err)
		}
	}
}

func TestCancelledCallEndsAtOnce(t *testing.T) {
	stop := make(chan struct{})
	arrived := make(chan struct{}, 8)
	s := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		arrived <- struct{}{}
		<-stop
	}))
	t.Cleanup(s.Close)
	t.Cleanup(func() { close(stop) })
	client := open(t, storage.Config{URL: s.URL, Key: "k"})
	name, _ := file(t, 100)
	because := errors.New("the lease is lost")
	for what, call := range map[string]func(context.Context) error{
		"json": client.Ping,
		"upload": func(ctx context.Context) error {
			_, err := client.Upload(ctx, "b", "k", name, storage.Options{})
			return err
		},
		"download": func(ctx context.Context) error {
			_, err := client.Download(ctx, "b", "k", filepath.Join(t.TempDir(), "x"), "")
			return err
		},
	} {
		ctx, cancel := context.WithCancelCause(t.Context())
		go func() {
			<-arrived
			cancel(because)
		}()
		err := call(ctx)
		var e *storage.Error
		if !errors.As(err, &e) || e.Retryable() || !errors.Is(err, context.Canceled) || !errors.Is(err, because) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestCancelledUploadIsTakenBack(t *testing.T) {
	e := withBucket(t)
	name, _ := file(t, 2*storage.ChunkBytes)
	ctx, cancel := context.WithCancel(t.Context())
	m := startMeddler(t, e.url, func(r *http.Response) error {
		if r.Request.Method == http.MethodPatch {
			cancel()
		}
		return nil
	})
	client := open(t, storage.Config{URL: m.url, Key: e.key})
	if _, err := client.Upload(ctx, e.bucket, "k", name, storage.Options{}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	if m.count(http.MethodDelete) != 1 {
		t.Errorf("requests: %q", m.seen)
	}
}

func TestLocalServerKeepsObjectsAcrossRestarts(t *testing.T) {
	dir := t.TempDir()
	name, sum := file(t, 1000)
	for i := range 2 {
		t.Run("", func(t *testing.T) {
			client := open(t, storage.Config{URL: startLocal(t, local.Config{Dir: dir}), Key: serviceKey})
			if err := client.EnsureBucket(t.Context(), "b", storage.BucketOptions{}); err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				if _, err := client.Upload(t.Context(), "b", "k", name, storage.Options{}); err != nil {
					t.Fatal(err)
				}
				return
			}
			if _, err := client.Download(t.Context(), "b", "k", filepath.Join(t.TempDir(), "x"), sum); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestATokenThatIsTooOldIsRenewedOnTheWay(t *testing.T) {
	const size = 3*storage.ChunkBytes + 5
	e := withBucket(t)
	name, sum := file(t, size)
	// The store refuses the token of the second part, and the first URL.
	refuse := func(match func(*http.Response) bool) func(*http.Response) error {
		return func(r *http.Response) error {
			if match(r) {
				r.StatusCode = http.StatusForbidden
				r.Body = io.NopCloser(strings.NewReader(`{"statusCode":"403","error":"InvalidJWT","message":"\"exp\" claim timestamp check failed"}`))
			}
			return nil
		}
	}
	m := startMeddler(t, e.url, refuse(once(func(r *http.Response) bool { return r.Request.Method == http.MethodPatch })))
	client := open(t, storage.Config{URL: m.url, Backoff: time.Millisecond})
	token := func(ctx context.Context) (string, error) { return e.client.SignUpload(ctx, e.bucket, "big") }
	first, err := token(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	renewed := 0
	o := storage.Options{Token: first, Renew: func(ctx context.Context) (string, error) { renewed++; return token(ctx) }}
	if got, err := client.Upload(t.Context(), e.bucket, "big", name, o); err != nil || got.SHA256 != sum || renewed != 1 {
		t.Fatalf("uploaded %+v, %v, with %d new tokens", got, err, renewed)
	}

	m = startMeddler(t, e.url, refuse(once(func(r *http.Response) bool { return r.Request.Method == http.MethodGet })))
	client = open(t, storage.Config{URL: m.url, Backoff: time.Millisecond})
	url := func(ctx context.Context) (string, error) {
		return e.client.SignedURL(ctx, e.bucket, "big", time.Minute)
	}
	old, err := url(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(t.TempDir(), "back")
	if _, err := client.DownloadSigned(t.Context(), old, to, sum, nil); err == nil {
		t.Error("a refused URL was as good as any")
	}
	m = startMeddler(t, e.url, refuse(once(func(r *http.Response) bool { return r.Request.Method == http.MethodGet })))
	client = open(t, storage.Config{URL: m.url, Backoff: time.Millisecond})
	if got, err := client.DownloadSigned(t.Context(), old, to, sum, url); err != nil || got.Bytes != size {
		t.Fatalf("downloaded %+v, %v", got, err)
	}
	m = startMeddler(t, e.url, refuse(once(func(r *http.Response) bool { return r.Request.Method == http.MethodGet })))
	client = open(t, storage.Config{URL: m.url, Backoff: time.Millisecond})
	other := func(ctx context.Context) (string, error) {
		return e.client.SignedURL(ctx, e.bucket, "other", time.Minute)
	}
	if _, err := e.client.Upload(t.Context(), e.bucket, "other", name, storage.Options{}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.DownloadSigned(t.Context(), old, to, sum, other); err == nil {
		t.Error("a new URL of another object was taken")
	}
}

func TestAnotherProcessGoesOnWithAnUpload(t *testing.T) {
	const size = 4*storage.ChunkBytes + 5
	e := withBucket(t)
	name, sum := file(t, size)
	note := filepath.Join(t.TempDir(), "note")
	ctx, cancel := context.WithCancel(t.Context())
	parts := atomic.Int64{}
	m := startMeddler(t, e.url, func(r *http.Response) error {
		if r.Request.Method == http.MethodPatch && parts.Add(1) == 2 {
			cancel()
		}
		return nil
	})
	if _, err := open(t, storage.Config{URL: m.url, Key: e.key}).Upload(ctx, e.bucket, "big", name, storage.Options{Note: note}); err == nil {
		t.Fatal("it was not interrupted")
	}
	m = startMeddler(t, e.url, func(*http.Response) error { return nil })
	got, err := open(t, storage.Config{URL: m.url, Key: e.key}).Upload(t.Context(), e.bucket, "big", name, storage.Options{Note: note})
	if err != nil || got.SHA256 != sum {
		t.Fatalf("uploaded %+v, %v", got, err)
	}
	if m.count(http.MethodPost) != 0 || m.count(http.MethodPatch) != 3 {
		t.Errorf("the second process did not go on where the first one stood: %v", m.seen)
	}
	if _, err := os.Stat(note); err == nil {
		t.Error("the note is left")
	}
	to := filepath.Join(t.TempDir(), "back")
	if _, err := e.client.Download(t.Context(), e.bucket, "big", to, sum); err != nil {
		t.Error(err)
	}
}

func TestAFullDiskEndsADownloadAndLeavesNothing(t *testing.T) {
	e := withBucket(t)
	upload(t, e, "big", 3<<20)
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Skipf("a small disk cannot be mounted here: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	m := startMeddler(t, e.url, func(*http.Response) error { return nil })
	_, err := open(t, storage.Config{URL: m.url, Key: e.key}).Download(t.Context(), e.bucket, "big", filepath.Join(dir, "back"), "")
	var se *storage.Error
	if !errors.Is(err, syscall.ENOSPC) || !errors.As(err, &se) || se.Retryable() {
		t.Errorf("err = %v", err)
	}
	if n := m.count(http.MethodGet); n != 1 {
		t.Errorf("a full disk was tried %d times", n)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left on the disk: %v, %v", left, err)
	}
}

func FuzzCheckKey(f *testing.F) {
	for _, seed := range []string{"", "a", "a/b.c", "../x", "a//b", "a/../b", "a/./b", "/a", "a/", "ä", "a#b", "a%2e%2e", strings.Repeat("a", 1025)} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, key string) {
		if storage.CheckKey(key) != nil {
			return
		}
		// What passes is the same key to every URL parser, and stays below its bucket.
		u, err := url.Parse("http://h/object/b/" + strings.ReplaceAll(url.PathEscape(key), "%2F", "/"))
		if err != nil || u.Path != "/object/b/"+key || u.JoinPath().Path != u.Path {
			t.Errorf("key %q becomes %v, %v", key, u, err)
		}
	})
}
