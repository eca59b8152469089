package proto_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/proto"
)

// result is what a walk through every reachable world found.
type result struct {
	states, transitions int
	bad                 string   // the first rule broken, empty for none
	trace               []string // how to get there
}

func (r result) String() string {
	return fmt.Sprintf("%d states, %d transitions", r.states, r.transitions)
}

// What every state must be able to reach, without faults and without anybody
// starting a process again (unless none is left); for the last two nobody may
// have to wait for the end of somebody's patience either.
const (
	neverSettles  = "it never settles"
	neverAccepted = "an assigned attempt is never accepted though its agent lives"
	neverFreed    = "a device is never freed of an orphan"
)

type edge struct {
	from, to uint32
	patience bool
}

// explore walks breadth-first and stops at the first rule broken. Then it
// looks back from every good end for worlds that reach none.
func (m *model) explore(limit int) result {
	var res result
	ids := map[key]uint32{}
	type parent struct {
		id uint32
		n  uint16
	}
	var parents []parent
	var good, lonely, waits, served, freed []bool
	var edges []edge
	var buf []byte
	var steps []step
	var k key

	add := func(w *world, from uint32, n int) (uint32, bool) {
		k, buf = keyOf(w, buf)
		if id, ok := ids[k]; ok {
			return id, false
		}
		id := uint32(len(parents))
		ids[k] = id
		parents = append(parents, parent{from, uint16(n)})
		good = append(good, m.settled(*w))
		lonely = append(lonely, !anyAlive(*w))
		_, there := w.current(owner(w.job))
		waiting := w.job.Control == proto.Assigned && w.job.Status == job.Queued && there && w.rows[owner(w.job)].Lease == proto.LeaseHeld
		waits = append(waits, waiting)
		served = append(served, w.job.Control != proto.Assigned)
		freed = append(freed, !anyOrphan(*w))
		return id, true
	}
	trace := func(id uint32) []string {
		var path []uint16
		for ; id != 0; id = parents[id].id {
			path = append(path, parents[id].n)
		}
		w := start()
		var out []string
		for i := len(path) - 1; i >= 0; i-- {
			s := m.steps(w, nil)[path[i]]
			out = append(out, s.String())
			w = s.to
		}
		return out
	}

	first := start()
	add(&first, 0, 0)
	level := []world{first}
	base := uint32(0)
	for len(level) > 0 {
		var next []world
		for i := range level {
			from := base + uint32(i)
			steps = m.steps(level[i], steps)
			res.transitions += len(steps)
			for n := range steps {
				s := &steps[n]
				if s.bad == "" {
					s.bad = m.broken(s.to)
				}
				if s.bad != "" {
					res.bad, res.states, res.trace = s.bad, len(parents), append(trace(from), s.String())
					return res
				}
				to, fresh := add(&s.to, from, n)
				if fresh {
					next = append(next, s.to)
				}
				if s.fault == noFault && (!s.optional || lonely[from]) && to != from {
					edges = append(edges, edge{from, to, s.patience})
				}
			}
		}
		base += uint32(len(level))
		level = next
		if len(parents) > limit {
			res.bad, res.states = fmt.Sprintf("more than %d states", limit), len(parents)
			return res
		}
	}
	res.states = len(parents)

	back(edges, good, true)
	back(edges, served, false)
	back(edges, freed, false)
	for id := range good {
		switch {
		case !good[id]:
			res.bad = neverSettles
		case waits[id] && !served[id]:
			res.bad = neverAccepted
		case !freed[id]:
			res.bad = neverFreed
		default:
			continue
		}
		res.trace = trace(uint32(id))
		break
	}
	return res
}

// back marks every state from which a marked one is reached; with patience by
// all edges, else by those that nobody has to wait for.
func back(edges []edge, marked []bool, patience bool) {
	n := len(marked)
	first := make([]uint32, n+1)
	for _, e := range edges {
		first[e.to+1]++
	}
	for i := range n {
		first[i+1] += first[i]
	}
	at := append([]uint32(nil), first...)
	into := make([]uint32, len(edges))
	for i, e := range edges {
		into[at[e.to]] = uint32(i)
		at[e.to]++
	}
	var todo []uint32
	for id, m := range marked {
		if m {
			todo = append(todo, uint32(id))
		}
	}
	for len(todo) > 0 {
		id := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, i := range into[first[id]:first[id+1]] {
			if e := edges[i]; (patience || !e.patience) && !marked[e.from] {
				marked[e.from] = true
				todo = append(todo, e.from)
			}
		}
	}
}

func (r result) explain() string {
	return fmt.Sprintf("%s, after %d steps:\n  %s", r.bad, len(r.trace), strings.Join(r.trace, "\n  "))
}

// The bounds: so many faults of different kinds (or, each up to twice, of any),
// and so many attempts. LORAYARD_MODEL=long goes further, for minutes.
type bounds struct {
	each            uint8
	total, attempts int
}

func TestEveryReachableStateIsSafeAndSettles(t *testing.T) {
	all := []bounds{{1, 1, 3}, {1, 2, 2}}
	switch {
	case os.Getenv("LORAYARD_MODEL") == "long":
		all = []bounds{{2, 2, 3}, {2, 3, 2}}
	case raced:
		all = []bounds{{1, 1, 2}} // one goroutine, and fifteen times slower
	}
	for _, b := range all {
		nets := []bool{true}
		if b.total == 1 { // without it there is less to find
			nets = []bool{true, false}
		}
		for _, strict := range []bool{true, false} {
			for _, net := range nets {
				t0 := time.Now()
				m := newModel(proto.Rules{}, strict, b.each, b.total, b.attempts)
				m.net = net
				r := m.explore(200_000_000)
				t.Logf("%d faults, %d attempts, strict %t, net %t: %v, %.1f s", b.total, b.attempts, strict, net, r, time.Since(t0).Seconds())
				if r.bad != "" {
					t.Error(r.explain())
				}
			}
		}
	}
}
