package sim

import (
	"flag"
	"reflect"
	"slices"
	"strings"
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
		if a.Hash == b.Hash && a.Events == b.Events && a.Virtual == b.Virtual {
			continue
		}
		x, y := history(t, seed), history(t, seed)
		for i := range min(len(x), len(y)) {
			if x[i] != y[i] {
				t.Errorf("seed %d:\n%s\nor\n%s", seed, strings.Join(x[max(0, i-6):i+1], "\n"), y[i])
				break
			}
		}
		t.Errorf("seed %d: %+v\nand %+v", seed, a, b)
	}
}

func history(t *testing.T, seed int) (lines []string) {
	simulate(t, Options{Seed: uint64(seed), Trace: func(l string) { lines = append(lines, l) }})
	return slices.DeleteFunc(lines, func(l string) bool { return strings.Contains(l, " says: ") })
}

// mutants are all of them, by name.
func mutants() map[string]Mutant {
	out := map[string]Mutant{}
	var m Mutant
	for i := range reflect.TypeOf(m).NumField() {
		f := reflect.TypeOf(m).Field(i)
		if f.Type.Kind() == reflect.Bool {
			m = Mutant{}
			reflect.ValueOf(&m).Elem().Field(i).SetBool(true)
			out[f.Name] = m
		}
	}
	rules := reflect.TypeOf(m.Rules)
	for i := range rules.NumField() {
		m = Mutant{}
		reflect.ValueOf(&m.Rules).Elem().Field(i).SetBool(true)
		out[rules.Field(i).Name] = m
	}
	return out
}

func TestMutants(t *testing.T) {
	for name, m := range mutants() {
		t.Run(name, func(t *testing.T) {
			for seed := range *many {
				if res := simulate(t, Options{Seed: uint64(seed), Mutant: m}); res.Bad != "" {
					t.Logf("seed %d: %s", seed, res.Bad)
					return
				}
			}
			t.Error("nobody noticed")
		})
	}
}
