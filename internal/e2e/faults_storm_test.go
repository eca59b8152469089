package e2e_test

import (
	"context"
	"math/rand/v2"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"lorayard/internal/devstack"
	"lorayard/internal/storetest"
)

// Faults come all at once and in any order, while jobs are inserted and
// cancelled. When the storm is over every job is done or cancelled, none has
// failed, and all invariants hold; in the storm they hold as well. STORM_SEED
// repeats an order of faults, STORM is how long it lasts.
func TestAStormOfFaults(t *testing.T) {
	f := faults(t, append(dry(30, 50*time.Millisecond), "PATIENCE=1s", "CHECKPOINT_EVERY=200ms")...)
	seed, err := strconv.ParseUint(os.Getenv("STORM_SEED"), 10, 64)
	if err != nil {
		seed = rand.Uint64()
	}
	long, err := time.ParseDuration(os.Getenv("STORM"))
	if err != nil {
		long = 8 * time.Second
	}
	t.Logf("STORM_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	database := f.wireDatabase()
	redis := f.wireRedis()
	dispatchers := []string{"dispatcher-1", "dispatcher-2"}
	hosts := []string{"host-1", "host-2", "host-3"}
	up := map[string]*devstack.Process{}
	begin := func(name string) {
		if p := up[name]; p != nil {
			p.Kill()
		}
		if name[0] == 'd' {
			up[name] = f.dispatcher(name)
		} else {
			up[name] = f.agent(name)
		}
	}
	for _, name := range append(dispatchers, hosts...) {
		begin(name)
	}
	var ids []string
	ctx := context.Background()
	faults := []struct {
		name   string
		weight int
		do     func()
	}{
		{"insert", 40, func() { ids = append(ids, f.job()) }},
		{"cancel", 6, func() {
			if len(ids) > 0 {
				_, _ = f.Cancel(ctx, f.user, ids[r.IntN(len(ids))]) // it may be over
			}
		}},
		{"kill an agent", 5, func() { begin(hosts[r.IntN(len(hosts))]) }},
		{"kill a dispatcher", 3, func() { begin(dispatchers[r.IntN(len(dispatchers))]) }},
		{"restart an agent", 6, func() {
			_, err := f.Tell(ctx, hosts[r.IntN(len(hosts))], "restart", "--no-wait")
			if err != nil {
				t.Logf("restart: %v", err) // the one before is not over
			}
		}},
		{"freeze an agent", 5, func() {
			pids := f.tree(up[hosts[r.IntN(len(hosts))]].PID())
			for _, pid := range pids {
				_ = syscall.Kill(pid, syscall.SIGSTOP) // a trainer may have ended
			}
			away(time.Duration(r.IntN(1000)) * time.Millisecond)
			for _, pid := range pids {
				_ = syscall.Kill(pid, syscall.SIGCONT)
			}
		}},
		{"flush Redis", 5, func() { f.must(f.Redis.FlushAll(ctx)) }},
		{"cut a connection to the database", 15, func() { database.ResetOne() }},
		{"cut all connections to the database", 3, func() { database.Reset() }},
		{"cut all connections to Redis", 3, func() { redis.Reset() }},
		{"slow database", 4, func() { database.Latency(time.Duration(r.IntN(60)) * time.Millisecond) }},
		{"fast database", 6, func() { database.Latency(0) }},
		{"no database", 2, func() {
			f.must(database.Refuse())
			away(time.Duration(r.IntN(1500)) * time.Millisecond)
			f.must(database.Pass())
		}},
		{"forgotten connections", 2, func() {
			f.must(database.Blackhole())
			f.must(database.Pass())
		}},
		{"ask", 4, func() { storetest.Check(t, f.Pool) }},
	}
	weights := 0
	for _, x := range faults {
		weights += x.weight
	}
	for end := time.Now().Add(long); time.Now().Before(end); away(time.Duration(r.IntN(150)) * time.Millisecond) {
		n := r.IntN(weights)
		for _, x := range faults {
			if n -= x.weight; n < 0 {
				x.do()
				break
			}
		}
	}
	database.Latency(0)
	f.until("the end of every job", `SELECT NOT EXISTS (SELECT 1 FROM training_jobs t LEFT JOIN lorayard.jobs j ON j.job_id = t.id
		WHERE t.status NOT IN ('completed', 'failed', 'cancelled') OR coalesce(j.state, 'settled') <> 'settled')`)
	t.Log(f.text(`SELECT string_agg(n || ' ' || status, ', ') FROM (SELECT status, count(*) AS n FROM training_jobs GROUP BY 1) x`), "by",
		f.text(`SELECT string_agg(n || ' ' || outcome, ', ') FROM (SELECT outcome, count(*) AS n FROM lorayard.attempts GROUP BY 1) x`))
	if got := f.text(`SELECT string_agg(error_message, E'\n') FROM training_jobs WHERE status = 'failed'`); got != "" {
		t.Errorf("jobs failed: %s", got)
	}
}
