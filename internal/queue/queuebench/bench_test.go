package queuebench_test

import (
	"bytes"
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"lorayard/internal/devstack/services"
	"lorayard/internal/queue/queuebench"
)

// bench runs a measurement once, on a Redis of its own, and prints its table.
func bench(b *testing.B, measure func(ctx context.Context, url string) (queuebench.Table, error)) {
	srv, err := services.Redis(b.Context(), services.RedisConfig{Real: true, AppendOnly: true})
	if err != nil {
		b.Fatal(err)
	}
	defer srv.Stop()
	for b.Loop() {
		t, err := measure(b.Context(), srv.URL())
		if err != nil {
			b.Fatal(err)
		}
		if err := t.Print(os.Stdout); err != nil {
			b.Fatal(err)
		}
		for unit, v := range t.Figures {
			b.ReportMetric(v, unit)
		}
		b.ReportMetric(0, "ns/op") // says nothing here
		if err := srv.FlushAll(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkHandover(b *testing.B) { bench(b, queuebench.Handover) }

func BenchmarkSends(b *testing.B) { bench(b, queuebench.Sends) }

func BenchmarkIdleAgents(b *testing.B) {
	bench(b, func(ctx context.Context, url string) (queuebench.Table, error) {
		return queuebench.Idle(ctx, url, 10*time.Second, 100, 1000)
	})
}

// The tables come from the real thing, so that what they say can be trusted.
func TestAnIdleAgentWithTheGateAsksLessThanStock(t *testing.T) {
	srv, err := services.Redis(t.Context(), services.RedisConfig{Real: true})
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Stop()
	table, err := queuebench.Idle(t.Context(), srv.URL(), 5*time.Second, 3)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := table.Print(&out); err != nil {
		t.Fatal(err)
	}
	if ours, stock := table.Figures["cmd/s-gate-3"], table.Figures["cmd/s-stock-3"]; ours <= 0 || ours >= stock {
		t.Errorf("commands per second: %.2f with the gate, %.2f without\n%s", ours, stock, out.String())
	}
	if !strings.Contains(out.String(), "3 ") || len(table.Rows) != 2 {
		t.Errorf("printed:\n%s", out.String())
	}
}
