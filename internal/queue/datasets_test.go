package queue

import (
	"context"
	"testing"
	"time"

	"lorayard/internal/devstack/services"
)

func TestADataSetReachesOneOfTheDispatchers(t *testing.T) {
	srv := redisServer(t, services.RedisConfig{})
	c := dial(t, srv.URL())
	ctx, stop := context.WithCancel(t.Context())
	got, ended, done := make(chan string, 10), make(chan struct{}, 10), make(chan error, 2)
	checks := []Check{{Dataset: "a", Run: 1, Send: 1}, {Dataset: "b", Run: 1, Send: 1}}
	for range 2 { // twice is once, as long as it waits
		if err := c.SendChecks(ctx, checks[:1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.SendChecks(ctx, checks[1:]); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		go func() {
			done <- ServeChecks(ctx, Checker{URL: srv.URL(), Side: 2, Log: discard, Validate: func(ctx context.Context, id string) {
				got <- id
				if id == "long" {
					<-ctx.Done()
					ended <- struct{}{}
				}
			}})
		}()
	}
	seen := map[string]int{}
	for range 2 {
		select {
		case id := <-got:
			seen[id]++
		case <-time.After(10 * time.Second):
			t.Fatal("nobody got it")
		}
	}
	if seen["a"] != 1 || seen["b"] != 1 {
		t.Errorf("%v", seen)
	}
	// The same data set comes again under another number.
	if err := c.SendChecks(ctx, []Check{{Dataset: "a", Run: 2, Send: 1}, {Dataset: "long", Run: 1, Send: 1}}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		<-got
	}
	// Who stops takes what is under way along.
	stop()
	<-ended
	for range 2 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
