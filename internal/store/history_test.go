package store_test

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"lorayard/internal/job"
	"lorayard/internal/proto"
	"lorayard/internal/storetest"
)

// history records what everybody who works on one job asked of the database
// and what they were answered, with the times.
type history struct {
	*real
	start time.Time

	mu   sync.Mutex
	ops  []porcupine.Operation
	last int       // newest attempt that anybody heard of
	sent [2][]int  // attempts sent to agent a and b
	held []job.Ref // what agents believe to hold, for ever

	cancelAt int           // so many calls were made when the user cancels
	reached  chan struct{} // closed then
}

// ask does e and records it. Now and then the answer is not waited for: then
// the event may have happened, may happen yet, or never.
func (h *history) ask(rng *rand.Rand, client int, e proto.Event) proto.Answer {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if rng.IntN(8) == 0 {
		t := time.AfterFunc(time.Duration(rng.IntN(2000))*time.Microsecond, cancel)
		defer t.Stop()
	}
	call := time.Since(h.start).Nanoseconds()
	ans, err := h.try(ctx, e)
	end := time.Since(h.start).Nanoseconds()
	if err != nil {
		ans, end = proto.Answer{}, math.MaxInt64
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, porcupine.Operation{ClientId: client, Input: e, Output: ans, Call: call, Return: end})
	if len(h.ops) == h.cancelAt {
		close(h.reached)
	}
	return ans
}

// try is do, but for the reaper's second step alone: the first one, which
// looks at every agent's lease, is about more than one job.
func (h *history) try(ctx context.Context, e proto.Event) (proto.Answer, error) {
	if e.Do != proto.Lose {
		ans, err := h.do(ctx, e)
		ans.Agent = ""
		return ans, err
	}
	var status string
	err := h.db.Pool.QueryRow(ctx, `SELECT lorayard.lose_attempt($1, $2, 'x')`, h.id, e.Attempt).Scan(&status)
	if status == "stale" {
		return proto.Answer{Kind: proto.Stale}, err
	}
	return proto.Answer{Kind: proto.Done, Status: job.Status(status)}, err
}

// dispatch is one of two dispatchers: it assigns and reaps on what it heard
// last, which may be long over.
func (h *history) dispatch(rng *rand.Rand, client, steps int) {
	for range steps {
		h.mu.Lock()
		last := h.last
		h.mu.Unlock()
		to := rng.IntN(2)
		e := proto.Event{Do: proto.Assign, Agent: []string{"a", "b"}[to], Attempt: last}
		if rng.IntN(3) == 0 {
			e = proto.Event{Do: proto.Lose, Attempt: max(1, last-rng.IntN(2))}
		}
		if ans := h.ask(rng, client, e); e.Do == proto.Assign && ans.Kind != proto.Stale {
			h.mu.Lock()
			h.last = max(h.last, last+1)
			h.sent[to] = append(h.sent[to], last+1)
			h.mu.Unlock()
		}
	}
}

// work is an agent that never learns: what it once accepted it writes and
// settles for ever after.
func (h *history) work(rng *rand.Rand, client, agent, steps int) {
	name, boot := []string{"a", "b"}[agent], fmt.Sprint(agent+1)
	for range steps {
		e := proto.Event{Agent: name, Boot: boot}
		h.mu.Lock()
		sent := h.sent[agent]
		if n := len(h.held); n > 0 {
			ref := h.held[max(0, n-1-rng.IntN(3))]
			e.Attempt, e.Nonce = ref.Attempt, ref.Nonce
		}
		if len(sent) > 0 {
			h.last = max(h.last, sent[len(sent)-1])
		}
		h.mu.Unlock()
		switch x := rng.IntN(10); {
		case x < 4 && len(sent) > 0 || e.Nonce == "" && len(sent) > 0:
			e.Do, e.Attempt = proto.Accept, sent[max(0, len(sent)-1-rng.IntN(3))]
			e.Nonce = fmt.Sprint(100*(agent+1) + 10*(e.Attempt%10) + rng.IntN(2))
		case e.Nonce == "":
			e.Do, e.Attempt, e.Nonce = proto.Renew, 1, "99"
		case x < 6:
			e.Do = proto.Renew
		case x < 8:
			e.Do = proto.Append
		default:
			e.Do, e.Outcome, e.Retryable = proto.Settle, proto.HandedBack, true
			switch rng.IntN(10) {
			case 0:
				e.Outcome, e.Retryable = proto.Completed, false
			case 1:
				e.Outcome = proto.Failed
			}
		}
		if ans := h.ask(rng, client, e); e.Do == proto.Accept && ans.Kind != proto.Stale {
			h.mu.Lock()
			h.held = append(h.held, job.Ref{Attempt: e.Attempt, Nonce: e.Nonce})
			h.mu.Unlock()
		}
	}
}

// record lets two agents, two dispatchers and a user work at once on each of
// n jobs, and returns what they asked and heard, a history for each job.
func record(t *testing.T, db *storetest.DB, n int) [][]porcupine.Operation {
	t.Helper()
	user := db.User()
	dataset := db.Dataset(user)
	var out [][]porcupine.Operation
	for i := range n {
		h := &history{real: newReal(t, db, user, dataset, i+1), start: time.Now(), cancelAt: 1 + i, reached: make(chan struct{})}
		for a, name := range []string{"a", "b"} {
			if _, err := h.do(t.Context(), proto.Event{Do: proto.Register, Agent: name, Boot: fmt.Sprint(a + 1)}); err != nil {
				t.Fatal(err)
			}
		}
		var g sync.WaitGroup
		for c := range 5 {
			rng := rand.New(rand.NewPCG(uint64(i), uint64(c)))
			g.Go(func() {
				switch {
				case c < 2:
					h.work(rng, c, c, 16)
				case c < 4:
					h.dispatch(rng, c, 12)
				case i%4 == 0:
					<-h.reached
					h.ask(rng, c, proto.Event{Do: proto.Cancel})
				}
			})
		}
		g.Wait()
		out = append(out, h.ops)
	}
	return out
}

// model is the protocol as porcupine wants it, for one job.
func model(r proto.Rules) porcupine.Model {
	agent := func(boot string) proto.Agent { return proto.Agent{Boot: boot} }
	return porcupine.Model{
		Init: func() any { return proto.New() },
		Step: func(state, input, output any) (bool, any) {
			e := input.(proto.Event)
			s := proto.State{Job: state.(proto.Job)}
			switch e.Agent {
			case "a":
				s.Agent = agent("1")
			case "b":
				s.Agent = agent("2")
			}
			next, want := r.Next(s, e)
			if want.Agent = ""; e.Do != proto.Settle && e.Do != proto.Lose {
				want.Status = ""
			}
			got := output.(proto.Answer)
			return got.Kind == proto.Unknown || got == want, next.Job
		},
		Equal: func(a, b any) bool { return reflect.DeepEqual(a, b) },
	}
}

// linear counts the histories that some order of their events explains, each
// event taking place between its call and its answer.
func linear(t *testing.T, r proto.Rules, histories [][]porcupine.Operation) (ok int) {
	t.Helper()
	m := model(r)
	for i, ops := range histories {
		switch porcupine.CheckOperationsTimeout(m, ops, 10*time.Second) {
		case porcupine.Ok:
			ok++
		case porcupine.Unknown:
			t.Errorf("history %d: not decided in time", i)
		}
	}
	return ok
}

// The reaper's second step does not look at the lease again.
var concurrentRules = proto.Rules{RegisterAnyInstance: true, LoseBlindly: true}

func TestWhatEverybodyHearsHasOneOrder(t *testing.T) {
	const n = 30
	histories := record(t, storetest.New(t), n)
	ops, open := 0, 0
	for _, h := range histories {
		for _, op := range h {
			ops++
			if op.Return == math.MaxInt64 {
				open++
			}
		}
	}
	t0 := time.Now()
	got := linear(t, concurrentRules, histories)
	t.Logf("%d jobs, %d calls, %d without an answer; checked in %v", n, ops, open, time.Since(t0).Round(time.Millisecond))
	if got != n {
		t.Errorf("%d of %d histories have no order", n-got, n)
	}
	// The same histories do not fit a protocol without one of its rules.
	for name, mutate := range map[string]func(*proto.Rules){
		"writes unfenced":         func(r *proto.Rules) { r.WriteUnfenced = true },
		"accept once":             func(r *proto.Rules) { r.AcceptOnce = true },
		"settle forgets":          func(r *proto.Rules) { r.SettleForgets = true },
		"assign does not compare": func(r *proto.Rules) { r.AssignBlindly = true },
	} {
		r := concurrentRules
		mutate(&r)
		if linear(t, r, histories) == n {
			t.Errorf("%s: nothing in %d histories speaks against it", name, n)
		}
	}
}

func TestADatabaseWithoutTheFenceIsFoundOut(t *testing.T) {
	db := storetest.New(t)
	db.Exec(`CREATE OR REPLACE FUNCTION lorayard.may_write(p_job uuid, p_attempt integer, p_nonce uuid) RETURNS boolean
		LANGUAGE sql AS $$ SELECT true $$`)
	const n = 10
	if got := linear(t, concurrentRules, record(t, db, n)); got == n {
		t.Errorf("%d histories of a database that lets everybody write have an order", n)
	}
}

// An accept that is under way while a new process registers comes before the
// registration, and is lost by it, or after, and is refused. Passing each
// other unseen they left an attempt accepted that no process knew of, under a
// lease that the new process renewed for ever.
func TestAnAcceptAndANewProcessDoNotPassEachOther(t *testing.T) {
	db := storetest.New(t)
	user := db.User()
	r := newReal(t, db, user, db.Dataset(user), 1)
	for _, e := range []proto.Event{{Do: proto.Register, Agent: "a", Boot: "1"}, {Do: proto.Assign, Agent: "a"}} {
		if ans, err := r.do(t.Context(), e); err != nil || ans.Kind != proto.Done {
			t.Fatalf("%s: %+v, %v", e.Do, ans, err)
		}
	}
	tx, err := db.Pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	a := r.agent("a", "1")
	if _, err := tx.Exec(t.Context(), `SELECT lorayard.accept($1, $2, $3, 1, $4)`, a.ID, a.Boot, r.id, r.uuid("111")); err != nil {
		t.Fatal(err)
	}
	registered := make(chan error, 1)
	go func() {
		_, err := r.do(t.Context(), proto.Event{Do: proto.Register, Agent: "a", Boot: "3"})
		registered <- err
	}()
	// Until the registration waits for the accept, or is through.
	for db.Text(`SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`) == "0" && len(registered) == 0 {
		time.Sleep(time.Millisecond)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-registered; err != nil {
		t.Fatal(err)
	}
	if j, _ := r.look(); j.Control != proto.Queued {
		t.Errorf("the job is %s by a process that is gone", j.Control)
	}
	storetest.Check(t, db.Pool)
}
