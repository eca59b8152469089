package sim

import (
	"flag"
	"testing"
	"testing/synctest"
	"time"

	"lorayard/internal/metrics"
)

var one = flag.Int("sim.seed", -1, "the one seed to simulate; -v shows what happens")

var many = flag.Int("sim.seeds", 100, "how many seeds to simulate")

var shared = Metrics{Agent: metrics.NewAgent(), Dispatcher: metrics.NewDispatcher()}

func simulate(t *testing.T, o Options) (res Result) {
	t.Helper()
	o.Metrics = shared
	synctest.Test(t, func(t *testing.T) { res = Run(o) })
	return res
}

func TestSimulation(t *testing.T) {
	if *one >= 0 {
		res := simulate(t, Options{Seed: uint64(*one), Trace: func(l string) { t.Log(l) }})
		t.Logf("%+v", res)
		if res.Bad != "" {
			t.Error(res.Bad)
		}
		return
	}
	t0 := time.Now()
	n := *many
	var virtual time.Duration
	events := 0
	for seed := range n {
		res := simulate(t, Options{Seed: uint64(seed)})
		virtual += res.Virtual
		events += res.Events
		if res.Bad != "" {
			t.Errorf("seed %d: %s", seed, res.Bad)
		}
	}
	t.Logf("%d seeds, %.0f/s, %v virtual, %d events", n, float64(n)/time.Since(t0).Seconds(), virtual/time.Duration(n), events/n)
}

func TestASeedIsAlwaysTheSameWorld(t *testing.T) {
	for seed := range *many {
		a, b := simulate(t, Options{Seed: uint64(seed)}), simulate(t, Options{Seed: uint64(seed)})
		if a.Hash != b.Hash || a.Events != b.Events || a.Virtual != b.Virtual {
			t.Errorf("seed %d: %+v and %+v", seed, a, b)
		}
	}
}
