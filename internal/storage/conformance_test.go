package storage_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	mrand "math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"lorayard/internal/storage"
	"lorayard/internal/storage/local"
)

const serviceKey = "service-key-of-the-test"

// endpoint is a store to test against.
type endpoint struct {
	url, key string
	client   *storage.Client
	keyless  *storage.Client
	bucket   string
}

// startLocal runs the local server and returns its address.
func startLocal(t *testing.T, c local.Config) string {
	t.Helper()
	if c.Dir == "" {
		c.Dir = t.TempDir()
	}
	c.Secret, c.ServiceKey, c.AnonKey = "a-secret-of-at-least-thirty-two-bytes", serviceKey, "anon-key"
	h, err := local.New(c)
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(h)
	t.Cleanup(func() {
		s.Close()
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return s.URL
}

func open(t *testing.T, c storage.Config) *storage.Client {
	t.Helper()
	if c.Backoff == 0 {
		c.Backoff = 5 * time.Millisecond
	}
	cl, err := storage.Open(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cl.Close)
	return cl
}

// withBucket makes a bucket for one test on a local server.
func withBucket(t *testing.T) endpoint {
	t.Helper()
	return prepare(t, startLocal(t, local.Config{}), serviceKey)
}

func prepare(t *testing.T, url, key string) endpoint {
	t.Helper()
	e := endpoint{url: url, key: key, bucket: "conformance-" + strings.ToLower(rand.Text())}
	e.client = open(t, storage.Config{URL: url, Key: key})
	e.keyless = open(t, storage.Config{URL: url})
	if err := e.client.EnsureBucket(t.Context(), e.bucket, storage.BucketOptions{FileSizeLimit: 40 << 20}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.WithoutCancel(t.Context())
		var keys []string
		for o, err := range e.client.List(ctx, e.bucket, "") {
			if err != nil {
				t.Error(err)
				return
			}
			keys = append(keys, o.Key)
		}
		if _, err := e.client.Remove(ctx, e.bucket, keys...); err != nil {
			t.Error(err)
		}
		if err := e.client.RemoveBucket(ctx, e.bucket); err != nil {
			t.Error(err)
		}
	})
	return e
}

// file writes n bytes that are the same in every run and returns their digest.
func file(t *testing.T, n int) (name, sum string) {
	t.Helper()
	data := make([]byte, n)
	r := mrand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)})
	_, _ = r.Read(data)
	name = filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	s := sha256.Sum256(data)
	return name, hex.EncodeToString(s[:])
}

func upload(t *testing.T, e endpoint, key string, n int) storage.Object {
	t.Helper()
	name, _ := file(t, n)
	o, err := e.client.Upload(t.Context(), e.bucket, key, name, storage.Options{ContentType: "application/octet-stream"})
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func TestConformance(t *testing.T) {
	t.Run("local", func(t *testing.T) { conform(t, prepare(t, startLocal(t, local.Config{}), serviceKey)) })
	t.Run("real", func(t *testing.T) {
		url, key := os.Getenv("STORAGE_URL"), os.Getenv("STORAGE_KEY")
		if url == "" || key == "" {
			t.Skip("STORAGE_URL and STORAGE_KEY are not set")
		}
		conform(t, prepare(t, url, key))
	})
}

// conform is what we rely on, whoever serves it.
func conform(t *testing.T, e endpoint) {
	ctx := t.Context()

	t.Run("ping takes the key and refuses a wrong one", func(t *testing.T) {
		if err := e.client.Ping(ctx); err != nil {
			t.Error(err)
		}
		err := open(t, storage.Config{URL: e.url, Key: "no-such-key"}).Ping(ctx)
		var f *storage.Error
		if !errors.As(err, &f) || f.Status < 400 || f.Retryable() {
			t.Errorf("err = %v, want a final refusal", err)
		}
	})

	t.Run("ensuring a bucket twice changes nothing", func(t *testing.T) {
		for range 2 {
			if err := e.client.EnsureBucket(ctx, e.bucket, storage.BucketOptions{FileSizeLimit: 40 << 20}); err != nil {
				t.Error(err)
			}
		}
	})

	// Around the border between one request and parts, and an empty file.
	for _, n := range []int{0, 1, storage.ChunkBytes - 1, storage.ChunkBytes, storage.ChunkBytes + 1, 2*storage.ChunkBytes + 12345} {
		t.Run(fmt.Sprintf("%d bytes go up and come down the same", n), func(t *testing.T) {
			name, sum := file(t, n)
			key := fmt.Sprintf("round/%d.bin", n)
			o, err := e.client.Upload(ctx, e.bucket, key, name, storage.Options{
				ContentType: "application/x-tensors", CacheControl: "max-age=60", Metadata: map[string]string{"step": "7"},
			})
			if err != nil {
				t.Fatal(err)
			}
			want := storage.Object{Bucket: e.bucket, Key: key, Bytes: int64(n), SHA256: sum}
			if o != want {
				t.Errorf("uploaded %+v, want %+v", o, want)
			}
			i, err := e.client.Info(ctx, e.bucket, key)
			if err != nil {
				t.Fatal(err)
			}
			if i.Bytes != int64(n) || i.SHA256 != sum || i.Metadata["step"] != "7" || i.ContentType != "application/x-tensors" || i.Created.IsZero() {
				t.Errorf("info = %+v", i)
			}
			to := filepath.Join(t.TempDir(), "back")
			if o, err = e.client.Download(ctx, e.bucket, key, to, sum); err != nil || o != want {
				t.Fatalf("downloaded %+v, %v, want %+v", o, err, want)
			}
			same(t, name, to)
		})

		t.Run(fmt.Sprintf("%d bytes go up by token and come down by signed URL, without a key", n), func(t *testing.T) {
			name, sum := file(t, n)
			key := fmt.Sprintf("signed/%d.bin", n)
			token, err := e.client.SignUpload(ctx, e.bucket, key)
			if err != nil {
				t.Fatal(err)
			}
			o, err := e.keyless.Upload(ctx, e.bucket, key, name, storage.Options{Token: token, SHA256: sum})
			if err != nil || o.SHA256 != sum || o.Bytes != int64(n) {
				t.Fatalf("uploaded %+v, %v", o, err)
			}
			signed, err := e.client.SignedURL(ctx, e.bucket, key, time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			to := filepath.Join(t.TempDir(), "back")
			if o, err = e.keyless.DownloadSigned(ctx, signed, to, sum, nil); err != nil || o.Key != key {
				t.Fatalf("downloaded %+v, %v", o, err)
			}
			same(t, name, to)
			if got := get(t, signed); !bytes.Equal(got, read(t, name)) {
				t.Error("a plain GET of the signed URL has other bytes")
			}
		})
	}

	t.Run("a token of one object opens no other", func(t *testing.T) {
		token, err := e.client.SignUpload(ctx, e.bucket, "token/a")
		if err != nil {
			t.Fatal(err)
		}
		name, _ := file(t, 100)
		if _, err := e.keyless.Upload(ctx, e.bucket, "token/b", name, storage.Options{Token: token}); err == nil {
			t.Error("it did")
		}
		if ok, err := e.client.Exists(ctx, e.bucket, "token/b"); ok || err != nil {
			t.Errorf("exists = %v, %v", ok, err)
		}
	})

	for _, n := range []int{2000, storage.ChunkBytes + 2000} {
		t.Run(fmt.Sprintf("%d bytes are never overwritten, the same ones may be sent again", n), func(t *testing.T) {
			key := fmt.Sprintf("once/%d", n)
			name, sum := file(t, n)
			for range 2 {
				if _, err := e.client.Upload(ctx, e.bucket, key, name, storage.Options{}); err != nil {
					t.Fatal(err)
				}
			}
			other, _ := file(t, n+1)
			if _, err := e.client.Upload(ctx, e.bucket, key, other, storage.Options{}); !storage.IsExists(err) {
				t.Errorf("err = %v, want exists", err)
			}
			if i, err := e.client.Info(ctx, e.bucket, key); err != nil || i.SHA256 != sum {
				t.Errorf("info = %+v, %v", i, err)
			}
		})
	}

	t.Run("every character of the alphabet is kept apart", func(t *testing.T) {
		keys := []string{
			"odd/a b", "odd/a+b", "odd/a?b", "odd/a&b=c", "odd/a;b", "odd/a:b@c", "odd/(a)*'!$", "odd/a,b",
			"odd/A", "odd/a", "odd/a/b", "odd/a.b", "odd/.a", "odd/a..b",
		}
		for i, k := range keys {
			upload(t, e, k, 10+i)
		}
		var listed []string
		for o, err := range e.client.List(ctx, e.bucket, "odd/") {
			if err != nil {
				t.Fatal(err)
			}
			listed = append(listed, o.Key)
			if want := int64(10 + slices.Index(keys, o.Key)); o.Bytes != want {
				t.Errorf("%q has %d bytes, want %d", o.Key, o.Bytes, want)
			}
		}
		slices.Sort(keys)
		slices.Sort(listed)
		if !slices.Equal(keys, listed) {
			t.Errorf("listed %q, want %q", listed, keys)
		}
		for _, k := range keys {
			if _, err := e.client.Download(ctx, e.bucket, k, filepath.Join(t.TempDir(), "x"), ""); err != nil {
				t.Error(err)
			}
		}
		if n, err := e.client.Remove(ctx, e.bucket, keys...); n != len(keys) || err != nil {
			t.Errorf("removed %d, %v", n, err)
		}
	})

	t.Run("what is not there is not found", func(t *testing.T) {
		to := filepath.Join(t.TempDir(), "x")
		_, err := e.client.Download(ctx, e.bucket, "no/such", to, "")
		if !storage.IsNotFound(err) {
			t.Errorf("download: %v", err)
		}
		if entries, _ := os.ReadDir(filepath.Dir(to)); len(entries) != 0 {
			t.Errorf("left behind: %v", entries)
		}
		if _, err := e.client.SignedURL(ctx, e.bucket, "no/such", time.Minute); !storage.IsNotFound(err) {
			t.Errorf("sign: %v", err)
		}
		if ok, err := e.client.Exists(ctx, "no-such-bucket", "k"); ok || err != nil {
			t.Errorf("exists = %v, %v", ok, err)
		}
		name, _ := file(t, 10)
		if _, err := e.client.Upload(ctx, "no-such-bucket", "k", name, storage.Options{}); !storage.IsNotFound(err) {
			t.Errorf("upload: %v", err)
		}
		if n, err := e.client.Remove(ctx, e.bucket, "no/such"); n != 0 || err != nil {
			t.Errorf("removed %d, %v", n, err)
		}
	})

	t.Run("the bucket's limit holds for both ways up", func(t *testing.T) {
		small := "small-" + e.bucket
		if err := e.client.EnsureBucket(ctx, small, storage.BucketOptions{FileSizeLimit: 1000}); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := e.client.RemoveBucket(context.WithoutCancel(ctx), small); err != nil {
				t.Error(err)
			}
		}()
		for _, n := range []int{1001, storage.ChunkBytes + 1} {
			name, _ := file(t, n)
			_, err := e.client.Upload(ctx, small, "k", name, storage.Options{})
			var f *storage.Error
			if !errors.As(err, &f) || f.Status != http.StatusRequestEntityTooLarge || f.Retryable() {
				t.Errorf("%d bytes: %v, want status 413", n, err)
			}
		}
	})

	t.Run("another digest than the wanted one leaves nothing", func(t *testing.T) {
		upload(t, e, "digest/a", 5000)
		to := filepath.Join(t.TempDir(), "x")
		if err := os.WriteFile(to, []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := e.client.Download(ctx, e.bucket, "digest/a", to, strings.Repeat("0", 64))
		if !errors.Is(err, storage.ErrDigest) {
			t.Errorf("err = %v, want ErrDigest", err)
		}
		if got := string(read(t, to)); got != "old" {
			t.Errorf("the file has %q", got)
		}
		if entries, _ := os.ReadDir(filepath.Dir(to)); len(entries) != 1 {
			t.Errorf("left behind: %v", entries)
		}
	})

	t.Run("the upload limit is told", func(t *testing.T) {
		if n, err := e.keyless.MaxUploadBytes(ctx); n <= 0 || err != nil {
			t.Errorf("limit %d, %v", n, err)
		}
	})
}

func TestListPagesAndStopsEarly(t *testing.T) {
	e := withBucket(t)
	name, _ := file(t, 1)
	for i := range 2100 {
		if _, err := e.client.Upload(t.Context(), e.bucket, fmt.Sprintf("p/%04d", i), name, storage.Options{}); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	for o, err := range e.client.List(t.Context(), e.bucket, "p/") {
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("p/%04d", n); o.Key != want {
			t.Fatalf("key %s, want %s", o.Key, want)
		}
		n++
	}
	if n != 2100 {
		t.Errorf("listed %d of 2100", n)
	}
	for range e.client.List(t.Context(), e.bucket, "p/") {
		break
	}
	var keys []string
	for i := range 2100 {
		keys = append(keys, fmt.Sprintf("p/%04d", i))
	}
	if n, err := e.client.Remove(t.Context(), e.bucket, keys...); n != 2100 || err != nil {
		t.Errorf("removed %d, %v", n, err)
	}
}

func same(t *testing.T, a, b string) {
	t.Helper()
	if !bytes.Equal(read(t, a), read(t, b)) {
		t.Errorf("%s and %s differ", a, b)
	}
}

func read(t *testing.T, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func get(t *testing.T, url string) []byte {
	t.Helper()
	resp, err := http.Get(url)
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
