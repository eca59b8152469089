package vet_test

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"lorayard/internal/devstack/services"
	"lorayard/internal/metrics"
	"lorayard/internal/queue"
	"lorayard/internal/storage"
	"lorayard/internal/storage/local"
	"lorayard/internal/storetest"
	"lorayard/internal/vet"
)

func TestMain(m *testing.M) { storetest.Main(m) }

const chat = `{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}` + "\n"

// world is a dispatcher's part that validates, on real services.
type world struct {
	t      *testing.T
	db     *storetest.DB
	s      *storage.Client
	user   string
	events chan string // of the channel lorayard
	away   atomic.Bool // Storage answers 503
	dir    string
}

func start(t *testing.T, notified bool) *world {
	t.Helper()
	w := &world{t: t, db: storetest.New(t), events: make(chan string, 100), dir: t.TempDir()}
	w.user = w.db.User()
	srv, err := local.New(local.Config{Dir: t.TempDir(), Secret: "secret-of-this-test", ServiceKey: "key"})
	w.must(err)
	web := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if w.away.Load() {
			rw.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		srv.ServeHTTP(rw, r)
	}))
	t.Cleanup(web.Close)
	w.s, err = storage.Open(storage.Config{URL: web.URL, Key: "key", Attempts: 2, Backoff: time.Millisecond})
	w.must(err)
	t.Cleanup(w.s.Close)
	w.must(w.s.EnsureBucket(t.Context(), "lora-datasets", storage.BucketOptions{}))
	redis, err := services.Redis(t.Context(), services.RedisConfig{})
	w.must(err)
	q, err := queue.Dial(redis.URL())
	w.must(err)

	// A dispatcher was killed here, and another one is at work.
	for name, age := range map[string]time.Duration{"lorayard-dataset-1.jsonl": 3 * time.Hour, "lorayard-dataset-2.jsonl": 0} {
		name = filepath.Join(w.dir, name)
		w.must(os.WriteFile(name, nil, 0o600))
		w.must(os.Chtimes(name, time.Now(), time.Now().Add(-age)))
	}
	v := &vet.Vetter{Store: w.db.Store, Storage: w.s, Queue: q, RedisURL: redis.URL(), Dir: w.dir, Metrics: metrics.NewDispatcher(""), Log: slog.New(slog.DiscardHandler)}
	ctx, stop := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := v.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	listening := make(chan struct{})
	running.Go(func() {
		_ = w.db.Store.Listen(ctx, func(payload string) {
			switch {
			case payload == "":
				close(listening)
			case notified && strings.HasPrefix(payload, "dataset:"):
				v.Wake()
			}
			w.events <- payload
		})
	})
	<-listening
	t.Cleanup(func() {
		stop()
		running.Wait()
		_ = q.Close()
		if err := redis.Stop(); err != nil {
			t.Error(err)
		}
	})
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// upload stores a file and confirms it, as the app does.
func (w *world) upload(content string) (set string) {
	w.t.Helper()
	set = w.db.Dataset(w.user)
	if content != "" {
		name := filepath.Join(w.t.TempDir(), "train.jsonl")
		w.must(os.WriteFile(name, []byte(content), 0o600))
		_, err := w.s.Upload(w.t.Context(), "lora-datasets", w.db.Text(`SELECT storage_path FROM datasets WHERE id = $1`, set), name, storage.Options{})
		w.must(err)
	}
	w.db.Exec(`UPDATE datasets SET status = 'validating', training_ready = false WHERE id = $1`, set)
	return set
}

func (w *world) wait(set string) {
	w.t.Helper()
	late := time.After(20 * time.Second)
	for {
		select {
		case e := <-w.events:
			if e == "validated:"+set {
				return
			}
		case <-late:
			w.t.Fatalf("no verdict; trouble: %s", w.db.Text(`SELECT string_agg(v::text, ';') FROM lorayard.validations v`))
		}
	}
}

func (w *world) app(set string) string {
	return w.db.Text(`SELECT concat_ws('|', status, training_ready, total_training_pairs, error_message, validation_errors) FROM datasets WHERE id = $1`, set)
}

func TestAGoodFileIsReadyWithinASecond(t *testing.T) {
	w := start(t, true)
	w.wait(w.upload(chat)) // whatever is slow the first time
	var set string
	best := time.Hour // of three: the machine that tests run on may be busy
	for range 3 {
		began := time.Now()
		set = w.upload(strings.Repeat(chat, 20_000))
		w.wait(set)
		best = min(best, time.Since(began))
	}
	t.Logf("from upload to verdict %v", best)
	if best > time.Second {
		t.Errorf("took %v", best)
	}
	if got := w.app(set); got != "ready|t|20000" {
		t.Errorf("the app sees %s", got)
	}
	var samples []struct {
		Turns []struct{ Role, Content string }
	}
	w.must(json.Unmarshal([]byte(w.db.Text(`SELECT sample_data FROM datasets WHERE id = $1`, set)), &samples))
	if len(samples) != 1 || samples[0].Turns[1].Content != "a" {
		t.Errorf("samples %+v", samples)
	}
	path, sum := w.db.Text(`SELECT path FROM lorayard.validations WHERE dataset_id = $1`, set), w.db.Text(`SELECT sha256 FROM lorayard.validations WHERE dataset_id = $1`, set)
	if path != w.user+"/"+set+"/normalised-"+sum+".jsonl" {
		t.Errorf("the normalised file is %s", path)
	}
	obj, err := w.s.Download(t.Context(), "lora-datasets", path, filepath.Join(t.TempDir(), "x"), sum)
	if err != nil || obj.SHA256 != sum {
		t.Errorf("%+v, %v", obj, err)
	}
	if left, err := os.ReadDir(w.dir); err != nil || len(left) != 1 || left[0].Name() != "lorayard-dataset-2.jsonl" {
		t.Errorf("left behind: %v, %v", left, err)
	}
	// Validating the same again stores nothing new and is no error.
	w.db.Exec(`UPDATE datasets SET status = 'validating' WHERE id = $1`, set)
	w.wait(set)
	if got := w.app(set); got != "ready|t|20000" {
		t.Errorf("the second time the app sees %s", got)
	}
}

func TestABadFileIsExplained(t *testing.T) {
	w := start(t, true)
	set := w.upload(chat + strings.Repeat(`{"x":NaN}`+"\n", 30))
	w.wait(set)
	var shown []map[string]any
	w.must(json.Unmarshal([]byte(w.db.Text(`SELECT validation_errors FROM datasets WHERE id = $1`, set)), &shown))
	if len(shown) != 10 || shown[0]["line"] != 2.0 || shown[0]["error"] == "" || shown[0]["suggestion"] == "" || len(shown[0]) != 3 {
		t.Errorf("the app shows %v", shown)
	}
	if got := w.db.Text(`SELECT report ->> 'bad_lines' FROM lorayard.validations WHERE dataset_id = $1`, set); got != "30" {
		t.Errorf("%s bad lines", got)
	}
	if got := w.db.Text(`SELECT string_agg(type || ': ' || message, ';') FROM notifications`); !strings.HasPrefix(got, "dataset_error: 30 lines cannot be trained on. The first is line 2: ") {
		t.Errorf("the user reads %s", got)
	}
	none := w.upload("")
	w.wait(none)
	if got := w.app(none); !strings.HasPrefix(got, "error|f|0|The data set's file is not in storage.") {
		t.Errorf("without a file the app sees %s", got)
	}
}

func TestARowThatNobodyToldOfIsFound(t *testing.T) {
	w := start(t, false)
	set := w.upload(chat)
	w.wait(set)
	if got := w.app(set); !strings.HasPrefix(got, "ready|t|1") {
		t.Errorf("the app sees %s", got)
	}
}

func TestStorageThatIsAwayIsNoVerdict(t *testing.T) {
	w := start(t, true)
	name := w.upload(chat) // the row and the file first
	w.wait(name)
	w.away.Store(true)
	w.db.Exec(`UPDATE datasets SET status = 'validating' WHERE id = $1`, name)
	for w.db.Text(`SELECT failures FROM lorayard.validations`) == "0" { // until it was tried in vain
		select {
		case <-t.Context().Done():
			t.Fatal("not tried")
		case <-time.After(20 * time.Millisecond):
		}
	}
	if got := w.app(name); !strings.HasPrefix(got, "validating|") {
		t.Errorf("the app sees %s", got)
	}
	w.away.Store(false)
	w.wait(name)
	if got := w.app(name); !strings.HasPrefix(got, "ready|") {
		t.Errorf("the app sees %s", got)
	}
}
