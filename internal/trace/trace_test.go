package trace_test

import (
	"compress/gzip"
	"encoding/hex"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"lorayard/internal/job"
	"lorayard/internal/trace"
)

func config(endpoint string) trace.Config {
	return trace.Config{Endpoint: endpoint, Service: "service", Instance: "instance", Version: "1", Log: slog.New(slog.DiscardHandler)}
}

// Two processes that never spoke to each other tell one tree.
func TestSpansOfSeveralProcessesAreOneTree(t *testing.T) {
	var mu sync.Mutex
	got := map[string]*tracepb.Span{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body io.Reader = r.Body
		if r.Header.Get("Content-Encoding") == "gzip" {
			body, _ = gzip.NewReader(body)
		}
		raw, _ := io.ReadAll(body)
		var req collectorpb.ExportTraceServiceRequest
		if err := proto.Unmarshal(raw, &req); err != nil {
			t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, rs := range req.ResourceSpans {
			for _, ss := range rs.ScopeSpans {
				for _, s := range ss.Spans {
					got[s.Name] = s
				}
			}
		}
	}))
	defer srv.Close()
	began := time.Unix(1000, 0)
	ref := job.Ref{Job: "j", Attempt: 2}
	span := trace.Span{Ref: ref, Began: began, Over: began.Add(time.Second)}
	named := func(name string) trace.Span { span.Name = name; return span }
	var id string
	for _, tell := range []func(*trace.Tracer){
		func(x *trace.Tracer) { x.Tell(named("training")) },
		func(x *trace.Tracer) { x.TellAttempt(named("attempt")); x.TellJob(named("job")); id = x.ID("j") },
	} {
		x, err := trace.Open(t.Context(), config(srv.URL))
		if err != nil {
			t.Fatal(err)
		}
		tell(x)
		x.Close()
	}
	root, attempt, part := got["job"], got["attempt"], got["training"]
	if root == nil || attempt == nil || part == nil {
		t.Fatalf("told: %v", got)
	}
	if len(root.ParentSpanId) != 0 || string(attempt.ParentSpanId) != string(root.SpanId) || string(part.ParentSpanId) != string(attempt.SpanId) {
		t.Errorf("%x under %x under %x", part.ParentSpanId, attempt.SpanId, root.SpanId)
	}
	for name, s := range got {
		if hex.EncodeToString(s.TraceId) != id {
			t.Errorf("%s is of trace %x, the job's is %s", name, s.TraceId, id)
		}
		if s.StartTimeUnixNano != uint64(began.UnixNano()) || s.EndTimeUnixNano-s.StartTimeUnixNano != uint64(time.Second) {
			t.Errorf("%s took from %d to %d", name, s.StartTimeUnixNano, s.EndTimeUnixNano)
		}
	}
}

// A collector that takes a connection and says nothing is waited for by nobody.
func TestACollectorThatIsAwayIsInNobodysWay(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	x, err := trace.Open(t.Context(), config("http://"+l.Addr().String()))
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for range 20_000 { // far more than the queue holds
		x.Tell(trace.Span{Ref: job.Ref{Job: "j", Attempt: 1}, Name: "x", Began: began, Over: began})
	}
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("telling took %v", took)
	}
	x.Close()
	if took := time.Since(began); took > 4*time.Second {
		t.Errorf("closing took until %v", took)
	}
}

func TestWithoutAnEndpointNothingIsTold(t *testing.T) {
	x, err := trace.Open(t.Context(), config(""))
	if x != nil || err != nil {
		t.Fatal(x, err)
	}
	x.Tell(trace.Span{})
	x.TellAttempt(trace.Span{})
	x.TellJob(trace.Span{})
	x.Close()
	if x.ID("j") != "" {
		t.Error("there is a trace")
	}
}
