package fleet_test

import (
	"context"
	"fmt"
	"os"
	"testing"

	"lorayard/internal/devstack/services"
	"lorayard/internal/fleet"
	"lorayard/internal/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

// ground lends a database and a Redis of its own.
func ground(t testing.TB) (*storetest.DB, *services.RedisServer) {
	t.Helper()
	db := storetest.New(t)
	r, err := services.Redis(t.Context(), services.RedisConfig{Real: os.Getenv("CI") == "true"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Stop(); err != nil {
			t.Error(err)
		}
	})
	return db, r
}

func TestEveryJobIsSettledOnce(t *testing.T) {
	db, redis := ground(t)
	f, err := fleet.Start(t.Context(), fleet.Config{DatabaseURL: db.URL, RedisURL: redis.URL(), Agents: 4, GPUs: 4, Models: []string{"m"}, Dispatchers: 2})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	settled := db.Settled(ctx)
	user := db.User()
	set := db.Dataset(user)
	const n = 200
	for range n {
		db.Job(user, set)
	}
	for range n {
		if _, ok := <-settled; !ok {
			t.Fatal("the listener ended")
		}
	}
	if got := db.Text(`SELECT count(*) FILTER (WHERE status = 'completed') || ' ' || max(attempt) FROM training_jobs t JOIN lorayard.jobs j ON j.job_id = t.id`); got != fmt.Sprintf("%d 1", n) {
		t.Errorf("completed, attempts: %s", got)
	}
	if err := f.Stop(); err != nil {
		t.Error(err)
	}
	storetest.Check(t, db.Pool)
}
