package e2e_test

import (
	"compress/gzip"
	"encoding/hex"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"lorayard/internal/devstack"
)

// collector takes spans as an OpenTelemetry collector does.
type collector struct {
	t   *testing.T
	url string

	mu    sync.Mutex
	spans []told
}

type told struct {
	*tracepb.Span
	service string
}

func (s told) about(key string) string {
	for _, a := range s.Attributes {
		if a.Key == key {
			return a.Value.GetStringValue()
		}
	}
	return ""
}

func collect(t *testing.T) *collector {
	t.Helper()
	c := &collector{t: t}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body io.Reader = r.Body
		if r.Header.Get("Content-Encoding") == "gzip" {
			z, err := gzip.NewReader(body)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			body = z
		}
		raw, err := io.ReadAll(body)
		var req collectorpb.ExportTraceServiceRequest
		if err == nil {
			err = proto.Unmarshal(raw, &req)
		}
		if err != nil || r.URL.Path != "/v1/traces" {
			http.Error(w, "not OTLP", http.StatusBadRequest)
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, rs := range req.ResourceSpans {
			service := ""
			for _, a := range rs.Resource.Attributes {
				if a.Key == "service.name" {
					service = a.Value.GetStringValue()
				}
			}
			for _, ss := range rs.ScopeSpans {
				for _, s := range ss.Spans {
					c.spans = append(c.spans, told{s, service})
				}
			}
		}
	}))
	t.Cleanup(srv.Close)
	c.url = srv.URL
	return c
}

// of are the spans of a job, by the names of their services and themselves.
func (c *collector) of(job string) (spans []told, names []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.spans {
		if s.about("job") == job {
			spans = append(spans, s)
			names = append(names, strings.TrimPrefix(s.service, "lorayard-")+" "+s.Name)
		}
	}
	return spans, names
}

// story holds that the spans of a job that lost a device are one tree, though no
// process told another of it.
func (c *collector) story(x *devstack.Fault) {
	c.t.Helper()
	want := []string{
		"dispatcher job", "dispatcher attempt", "dispatcher queued", "dispatcher placed", "dispatcher sent", "dispatcher handed over",
		"agent accepted", "agent downloading", "agent preparing", "agent loading_model", "agent training", "agent saving", "agent uploading", "agent settle",
	}
	var spans []told
	var names []string
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		spans, names = c.of(x.Job)
		if !slices.ContainsFunc(want, func(w string) bool { return !slices.Contains(names, w) }) {
			break
		}
		if time.Now().After(end) {
			c.t.Fatalf("of %v there are only %v", want, names)
		}
	}
	root, failed := "", 0
	attempts := map[string]bool{}
	for _, s := range spans {
		switch s.Name {
		case "job":
			root = hex.EncodeToString(s.SpanId)
		case "attempt":
			attempts[hex.EncodeToString(s.SpanId)] = true
			if s.Status.GetCode() == tracepb.Status_STATUS_CODE_ERROR && s.Status.Message == "gpu_fault" {
				failed++
			}
		}
	}
	if failed != 1 || len(attempts) < 2 {
		c.t.Errorf("%d of %d attempts failed for the device", failed, len(attempts))
	}
	for _, s := range spans {
		parent := hex.EncodeToString(s.ParentSpanId)
		if string(s.TraceId) != string(spans[0].TraceId) {
			c.t.Errorf("%s is of another trace", s.Name)
		}
		if s.EndTimeUnixNano < s.StartTimeUnixNano {
			c.t.Errorf("%s ends before it begins", s.Name)
		}
		switch {
		case s.Name == "job" && parent != "", s.Name == "attempt" && parent != root, s.Name != "job" && s.Name != "attempt" && !attempts[parent]:
			c.t.Errorf("%s hangs under %q", s.Name, parent)
		}
	}
}
