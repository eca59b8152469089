// Package trace tells the story of a job as OpenTelemetry spans, across
// dispatchers, agents and trainers, to whoever collects them over OTLP. It is
// the only room that knows OpenTelemetry, and off unless an endpoint is set.
//
// No context travels with a task: the trace of a job follows from its id, and
// the span of an attempt from its number, so that every process knows where
// its own spans belong. Spans are told when they are over, from the times that
// were measured anyway; when nobody collects them they are dropped.
package trace

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"lorayard/internal/job"
)

// Tracer sends spans; a nil one sends none.
type Tracer struct {
	provider *sdk.TracerProvider
	tracer   trace.Tracer
}

// Config says who tells, and whom.
type Config struct {
	Endpoint string // OTLP over HTTP, such as http://collector:4318
	// Service, Instance and Version name the process.
	Service, Instance, Version string
	Log                        *slog.Logger
}

// Open sends spans to an endpoint; none gives a nil Tracer.
func Open(ctx context.Context, c Config) (*Tracer, error) {
	if c.Endpoint == "" {
		return nil, nil
	}
	exporter, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(strings.TrimSuffix(c.Endpoint, "/")+"/v1/traces"), otlptracehttp.WithTimeout(5*time.Second))
	if err != nil {
		return nil, fmt.Errorf("open the endpoint for traces: %w", err)
	}
	// It would write to stderr by itself, once a second while nobody collects.
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { c.Log.Debug("spans not sent", "err", err) }))
	provider := sdk.NewTracerProvider(
		sdk.WithBatcher(exporter, sdk.WithBatchTimeout(time.Second), sdk.WithMaxQueueSize(4096)), // full: dropped
		sdk.WithIDGenerator(ids{}),
		sdk.WithResource(resource.NewSchemaless(
			attribute.String("service.name", c.Service), attribute.String("service.instance.id", c.Instance), attribute.String("service.version", c.Version),
		)),
	)
	return &Tracer{provider, provider.Tracer("lorayard")}, nil
}

// Close sends what waits, for a second at most.
func (t *Tracer) Close() {
	if t == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = t.provider.Shutdown(ctx) // a collector that is away loses spans, that is all
}

// Span is something that happened to an attempt.
type Span struct {
	Ref         job.Ref
	Name        string
	Began, Over time.Time
	Failed      string            // why, in a word; empty: it went well
	About       map[string]string // what else is known
}

// Tell sends a part of an attempt.
func (t *Tracer) Tell(s Span) {
	if t == nil || s.Began.IsZero() {
		return
	}
	t.send(context.Background(), s, spanOf("attempt", s.Ref.Job, s.Ref.Attempt))
}

// TellAttempt sends the span of an attempt as a whole.
func (t *Tracer) TellAttempt(s Span) {
	if t == nil {
		return
	}
	t.send(wanted(spanOf("attempt", s.Ref.Job, s.Ref.Attempt)), s, spanOf("job", s.Ref.Job, 0))
}

// TellJob sends the span that all others of the job are under.
func (t *Tracer) TellJob(s Span) {
	if t == nil {
		return
	}
	t.send(wanted(spanOf("job", s.Ref.Job, 0)), s, trace.SpanID{})
}

func (t *Tracer) send(ctx context.Context, s Span, parent trace.SpanID) {
	// A parent that is not there yet is given as one of another process, which it
	// mostly is; without one the generator is asked for the trace as well.
	if parent.IsValid() {
		ctx = trace.ContextWithRemoteSpanContext(ctx, trace.NewSpanContext(trace.SpanContextConfig{
			TraceID: traceOf(s.Ref.Job), SpanID: parent, TraceFlags: trace.FlagsSampled, Remote: true,
		}))
	} else {
		ctx = context.WithValue(ctx, traceKey{}, traceOf(s.Ref.Job))
	}
	attributes := []attribute.KeyValue{attribute.String("job", string(s.Ref.Job)), attribute.Int("attempt", s.Ref.Attempt)}
	for k, v := range s.About {
		attributes = append(attributes, attribute.String(k, v))
	}
	_, span := t.tracer.Start(ctx, s.Name, trace.WithTimestamp(s.Began), trace.WithAttributes(attributes...))
	if s.Failed != "" {
		span.SetStatus(codes.Error, s.Failed)
	}
	span.End(trace.WithTimestamp(s.Over))
}

// ID is the trace of a job, as collectors show it; for exemplars.
func (t *Tracer) ID(id job.ID) string {
	if t == nil {
		return ""
	}
	return traceOf(id).String()
}

func traceOf(id job.ID) (t trace.TraceID) {
	sum := sha256.Sum256(fmt.Appendf(nil, "lorayard:trace:%s", id))
	copy(t[:], sum[:])
	return t
}

func spanOf(what string, id job.ID, attempt int) (s trace.SpanID) {
	sum := sha256.Sum256(fmt.Appendf(nil, "lorayard:span:%s:%s:%d", what, id, attempt))
	copy(s[:], sum[:])
	return s
}

type (
	traceKey struct{}
	spanKey  struct{}
)

// wanted asks ids for a span id that others can tell.
func wanted(s trace.SpanID) context.Context {
	return context.WithValue(context.Background(), spanKey{}, s)
}

// ids draws what nobody asked for at random.
type ids struct{}

// NewIDs is of sdk.IDGenerator.
func (g ids) NewIDs(ctx context.Context) (trace.TraceID, trace.SpanID) {
	t, _ := ctx.Value(traceKey{}).(trace.TraceID)
	return t, g.NewSpanID(ctx, t)
}

// NewSpanID is of sdk.IDGenerator.
func (ids) NewSpanID(ctx context.Context, _ trace.TraceID) (s trace.SpanID) {
	if s, asked := ctx.Value(spanKey{}).(trace.SpanID); asked {
		return s
	}
	_, _ = rand.Read(s[:]) // never fails, by its documentation
	return s
}
