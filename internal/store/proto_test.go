package store_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"lorayard/internal/job"
	"lorayard/internal/proto"
	"lorayard/internal/store"
	"lorayard/internal/storetest"
)

// sqlRules are the rules that the database keeps: all of them.
var sqlRules = proto.Rules{}

// real is one job in a real database, and the two agents that it may be given
// to; the events of package proto are done to it through the store.
type real struct {
	db     *storetest.DB
	n      int // tells this job's agents and nonces from those of others
	id     job.ID
	user   string
	agents map[string]string // name in the protocol → agent id
}

func newReal(t *testing.T, db *storetest.DB, user, dataset string, n int) *real {
	t.Helper()
	r := &real{db: db, n: n, id: job.ID(db.Job(user, dataset)), user: user, agents: map[string]string{}}
	admit(t, db, r.id)
	for _, name := range []string{"a", "b"} {
		r.agents[name] = fmt.Sprintf("%s%d", name, n)
	}
	return r
}

// agent is a process of an agent; boots and nonces are small numbers as text.
func (r *real) agent(name, boot string) store.Agent {
	a := agent(r.agents[name], 0)
	a.Boot, a.Instance, a.Generation = r.uuid(boot), home(name), int64(generation(boot))
	return a
}

// generation is that of a process, which its boot counts too.
func generation(boot string) (n int) {
	fmt.Sscan(boot, &n)
	return n
}

// home is an agent's data directory.
func home(name string) string { return "home of " + name }

func (r *real) uuid(small string) string {
	var n int
	fmt.Sscan(small, &n)
	return nonce(r.n*1000 + n)
}

func (r *real) ref(e proto.Event) job.Ref {
	return job.Ref{Job: r.id, Attempt: e.Attempt, Nonce: r.uuid(e.Nonce)}
}

// kinds are failures with every combination of what a settlement asks of them.
func kindOf(e proto.Event) job.Kind {
	switch {
	case e.Outcome == proto.HandedBack:
		return job.Preempted
	case !e.Retryable:
		return job.OutOfMemory
	case e.Counted:
		return job.TrainerCrashed
	}
	return job.DiskFull
}

const leaseForTests = time.Hour // leases end here when the test says so

// do carries out one event and returns the answer in the protocol's words.
func (r *real) do(ctx context.Context, e proto.Event) (proto.Answer, error) {
	st := r.db.Store
	done := func(ok bool, err error) (proto.Answer, error) {
		switch {
		case lost(err) || err == nil && !ok:
			return proto.Answer{Kind: proto.Stale}, nil
		case errors.Is(err, store.ErrReplaced):
			return proto.Answer{Kind: proto.Replaced}, nil
		case err != nil:
			return proto.Answer{}, err
		}
		return proto.Answer{Kind: proto.Done}, nil
	}
	mine := func(ref job.Ref) bool { return ref.Job == r.id }
	sent := func(sends []store.Send, err error) (proto.Answer, error) {
		i := slices.IndexFunc(sends, func(s store.Send) bool { return mine(s.Task.Ref) })
		ans, err := done(i >= 0, err)
		if i >= 0 {
			ans.Send, ans.Attempt, ans.Agent = sends[i].Task.Send, sends[i].Task.Ref.Attempt, sends[i].Agent
		}
		return ans, err
	}
	switch e.Do {
	case proto.Assign:
		a := r.agent(e.Agent, "0")
		return sent(st.Assign(ctx, []store.Assignment{{Job: r.id, Attempt: e.Attempt, Agent: a.ID, Devices: []string{a.Devices[0].UUID}}}))
	case proto.Resend:
		return sent(st.Resend(ctx, 0))
	case proto.TakeBack:
		refs, err := st.TakeBack(ctx, 0, nil)
		return done(slices.ContainsFunc(refs, mine), err)
	case proto.Lose:
		refs, err := st.Reap(ctx, leader, time.Minute, patience)
		return done(slices.ContainsFunc(refs, mine), err)
	case proto.SettleCancelled:
		ids, err := st.SettleCancelled(ctx)
		return done(slices.Contains(ids, r.id), err)
	case proto.ReportDeath:
		return done(st.ReportDeath(ctx, r.agents[e.Agent], r.uuid(e.Boot), r.ref(e), "x"))
	case proto.Want:
		var missing *store.NotFoundError
		switch e.Desired {
		case job.DesirePreempt:
			refs, err := st.Preempt(ctx, []job.Ref{{Job: r.id, Attempt: e.Attempt}})
			return done(slices.ContainsFunc(refs, mine), err)
		case job.DesirePause:
			err := st.Pause(ctx, r.id)
			return done(err == nil, ignore(err, &missing))
		default:
			err := st.Resume(ctx, r.id)
			return done(err == nil, ignore(err, &missing))
		}
	case proto.Cancel:
		var n int64
		err := r.db.As(r.user, func(tx pgx.Tx) error { // as the app writes it
			tag, err := tx.Exec(ctx, `UPDATE training_jobs SET status = 'cancelled', completed_at = now(), final_cost = 0 WHERE id = $1`, r.id)
			n = tag.RowsAffected()
			return err
		})
		return done(n == 1, err)
	case proto.Register:
		a := r.agent(e.Agent, e.Boot)
		a.Instance = e.Instance
		kept, err := st.Register(ctx, a, leaseForTests, []job.Ref{r.ref(e)})
		if errors.Is(err, store.ErrInUse) {
			return proto.Answer{Kind: proto.InUse}, nil
		}
		ans, err := done(true, err)
		if slices.Contains(kept, r.ref(e)) {
			ans.Desired = adopted
		}
		return ans, err
	case proto.Renew:
		if e.Unlisted { // whatever is accepted was accepted long ago
			r.db.Exec(`UPDATE lorayard.attempts SET assigned_at = assigned_at - interval '1 minute', accepted_at = accepted_at - interval '1 minute',
				renewed_at = renewed_at - interval '1 minute', ended_at = ended_at - interval '1 minute' WHERE job_id = $1`, r.id)
			r.db.Exec(`UPDATE lorayard.usage_intervals SET during = tstzrange(lower(during) - interval '1 minute', upper(during) - interval '1 minute') WHERE job_id = $1`, r.id)
		}
		wanted, err := st.Renew(ctx, r.agent(e.Agent, e.Boot), leaseForTests, store.AgentState{}, []job.Ref{r.ref(e)})
		ans, err := done(true, err)
		ans.Desired = wanted.Attempts[r.ref(e)]
		return ans, err
	case proto.Accept:
		_, err := st.Accept(ctx, r.agent(e.Agent, e.Boot), r.ref(e))
		return done(true, err)
	case proto.Append:
		return done(true, st.Append(ctx, r.ref(e), nil, []job.Line{{Seq: 1, At: time.Now(), Level: "info", Message: "x"}}, &job.Progress{Status: job.Running, Stage: job.StageTraining}))
	case proto.Settle:
		end := store.End{Outcome: store.Outcome(e.Outcome)}
		switch e.Outcome {
		case proto.Completed:
			end.Artifact = &store.Artifact{ID: r.ref(e).Nonce, Files: map[string]string{}, QualityMetrics: map[string]any{}, TrainingSummary: map[string]any{}}
		case proto.Failed, proto.HandedBack:
			end.Failure = &job.Failure{Kind: kindOf(e), Err: errors.New("x")}
		}
		status, err := st.Settle(ctx, r.ref(e), end)
		ans, err := done(true, err)
		ans.Status = status
		return ans, err
	}
	return proto.Answer{}, fmt.Errorf("no such event: %s", e.Do)
}

const patience = 10 * time.Minute

// leader is the dispatcher that reaps; it has led for long.
const leader = "00000000-0000-4000-8000-999999999999"

// adopted stands for whatever is wanted of an attempt that goes on: the
// database tells that at the next renewal.
const adopted job.Desired = "adopted"

// ignore is nil for an error of the type that as points to.
func ignore[E error](err error, as *E) error {
	if errors.As(err, as) {
		return nil
	}
	return err
}

// look reads what the database knows, in the protocol's words, and as text
// what the rest of the world sees of it.
func (r *real) look() (j proto.Job, rest string) {
	pool, ctx := r.db.Pool, context.Background()
	small := func(uuid *string) string {
		for i := range 1000 {
			if uuid != nil && *uuid == nonce(r.n*1000+i) {
				return fmt.Sprint(i)
			}
		}
		return ""
	}
	err := pool.QueryRow(ctx, `SELECT t.status, j.state, j.desired, j.send, j.failures, j.losses,
		(SELECT count(*) FROM model_artifacts m WHERE m.job_id = t.id), (t.final_cost IS NOT NULL AND j.state = 'settled')::integer,
		concat_ws(' ', (SELECT count(*) FROM cost_records c WHERE c.job_id = t.id),
			(SELECT string_agg(n.type, ',' ORDER BY n.type) FROM notifications n WHERE n.metadata ->> 'job_id' = t.id::text AND n.type <> 'job_queued'))
		FROM training_jobs t JOIN lorayard.jobs j ON j.job_id = t.id WHERE t.id = $1`, r.id).
		Scan(&j.Status, &j.Control, &j.Desired, &j.Send, &j.Failures, &j.Losses, &j.Artifacts, &j.Settlements, &rest)
	if err != nil {
		panic(err)
	}
	rows, err := pool.Query(ctx, `SELECT attempt, agent_id, boot::text, nonce::text, coalesce(outcome, '') FROM lorayard.attempts WHERE job_id = $1 ORDER BY attempt`, r.id)
	if err != nil {
		panic(err)
	}
	j.Attempts, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (a proto.Attempt, err error) {
		var n int
		var boot, nonce *string
		err = row.Scan(&n, &a.Agent, &boot, &nonce, &a.Outcome)
		a.Agent, a.Boot, a.Nonce = a.Agent[:1], small(boot), small(nonce)
		return a, err
	})
	if err != nil {
		panic(err)
	}
	return j, rest
}

// expire lets an agent's lease run out, in the database's past.
func (r *real) expire(name string, l proto.Lease) {
	ago := map[proto.Lease]time.Duration{proto.LeaseOver: time.Second, proto.LeaseSilent: 2 * patience}[l]
	r.db.Exec(`UPDATE lorayard.agents SET lease_until = clock_timestamp() - $2::interval WHERE id = $1`, r.agents[name], ago)
}

// sight is what the rest of the world should see: a cost record when GPU time
// is billed, and each notification once.
func sight(j proto.Job, begun, billed bool) string {
	var notes []string
	if j.Artifacts > 0 {
		notes = append(notes, "artifact_ready")
	}
	if j.Status == job.Completed || j.Status == job.Failed {
		notes = append(notes, "job_"+string(j.Status))
	}
	if begun {
		notes = append(notes, "job_started")
	}
	costs := "0"
	if billed && j.Control == proto.Settled {
		costs = "1"
	}
	for i, n := range notes {
		if i == 0 {
			costs += " "
		} else {
			costs += ","
		}
		costs += n
	}
	return costs
}

// Random events are done to the protocol and to the database; both must give
// the same answer and stand the same afterwards, whatever came before.
func TestTheDatabaseDoesWhatTheProtocolSays(t *testing.T) {
	db := storetest.New(t)
	user := db.User()
	dataset := db.Dataset(user)
	if _, err := db.Store.Campaign(t.Context(), store.Dispatcher{ID: leader}, time.Hour); err != nil {
		t.Fatal(err)
	}
	db.Exec(`UPDATE lorayard.leader SET since = now() - interval '1 hour'`)
	began, n, events := time.Now(), 0, 0
	seen := map[proto.Verb]map[proto.Kind]int{}
	rapid.Check(t, func(rt *rapid.T) {
		if n >= 60 && time.Since(began) > 10*time.Second && !t.Failed() {
			return // enough for one run; the next has other seeds
		}
		n++
		r := newReal(t, db, user, dataset, n)
		want, rows := proto.New(), map[string]proto.Agent{}
		billed := false
		apply := func(e proto.Event) {
			events++
			if e.Do == proto.Register {
				e.Generation = generation(e.Boot)
			}
			name := e.Agent
			if cur, _ := want.Current(); name == "" {
				name = cur.Agent
			}
			before := want
			s, ans := sqlRules.Next(proto.State{Job: want, Agent: rows[name]}, e)
			want = s.Job
			if name != "" {
				rows[name] = s.Agent
			}
			if _, at := before.Current(); e.Do == proto.Settle && before.Held(e.Attempt, e.Nonce) && at == e.Attempt {
				closed := want.Attempts[at-1].Outcome
				billed = billed || closed == proto.Completed || closed == proto.Cancelled || closed == proto.HandedBack || closed == proto.Failed && !e.Retryable
			}
			if e.Do == proto.Register && ans.Desired != "" {
				ans.Desired = adopted
			}
			if e.Do != proto.Settle {
				ans.Status = ""
			}
			if seen[e.Do] == nil {
				seen[e.Do] = map[proto.Kind]int{}
			}
			seen[e.Do][ans.Kind]++
			got, err := r.do(context.Background(), e)
			if err != nil {
				rt.Fatalf("%+v: %v", e, err)
			}
			if got.Agent != "" {
				got.Agent = got.Agent[:1]
			}
			if got != ans {
				rt.Fatalf("%+v\nanswers %+v\nwant    %+v", e, got, ans)
			}
			have, rest := r.look()
			if fmt.Sprintf("%+v", have) != fmt.Sprintf("%+v", want) {
				rt.Fatalf("%+v\nleaves %+v\nwant   %+v", e, have, want)
			}
			begun := slices.ContainsFunc(want.Attempts, func(a proto.Attempt) bool { return a.Nonce != "" })
			if w := sight(want, begun, billed); rest != w {
				rt.Fatalf("%+v\nshows %s\nwant  %s", e, rest, w)
			}
		}
		boot := map[string]int{"a": 1, "b": 2}
		for _, a := range []string{"a", "b"} {
			apply(proto.Event{Do: proto.Register, Agent: a, Boot: fmt.Sprint(boot[a]), Instance: home(a)})
		}
		who := rapid.SampledFrom([]string{"a", "b"})
		// speaker is somebody who believes to run an attempt: mostly who does.
		speaker := func(rt *rapid.T, do proto.Verb) proto.Event {
			cur, at := want.Current()
			e := proto.Event{Do: do, Agent: cur.Agent, Boot: cur.Boot, Attempt: at, Nonce: cur.Nonce}
			if e.Agent == "" || rapid.IntRange(0, 4).Draw(rt, "stranger") == 0 {
				e.Agent = who.Draw(rt, "agent")
			}
			if e.Boot == "" || rapid.IntRange(0, 4).Draw(rt, "other boot") == 0 {
				e.Boot = fmt.Sprint(rapid.IntRange(boot[e.Agent]%2, boot[e.Agent]).Draw(rt, "boot"))
				if rapid.Bool().Draw(rt, "its own") {
					e.Boot = fmt.Sprint(boot[e.Agent])
				}
			}
			if rapid.IntRange(0, 4).Draw(rt, "other attempt") == 0 {
				e.Attempt = max(1, at+rapid.IntRange(-2, 1).Draw(rt, "off by"))
				if e.Attempt <= at {
					e.Nonce = want.Attempts[e.Attempt-1].Nonce
				}
			}
			if e.Nonce == "" || rapid.IntRange(0, 4).Draw(rt, "other nonce") == 0 {
				e.Nonce = fmt.Sprint(100 + 10*e.Attempt + rapid.IntRange(0, 2).Draw(rt, "nonce"))
			}
			return e
		}
		plain := func(do proto.Verb) func(*rapid.T) { return func(*rapid.T) { apply(proto.Event{Do: do}) } }
		speak := func(do proto.Verb) func(*rapid.T) {
			return func(rt *rapid.T) { apply(speaker(rt, do)) }
		}
		rt.Repeat(map[string]func(*rapid.T){
			"assign": func(rt *rapid.T) {
				_, at := want.Current()
				e := proto.Event{Do: proto.Assign, Agent: who.Draw(rt, "agent"), Attempt: at}
				if rapid.IntRange(0, 5).Draw(rt, "slow dispatcher") == 0 {
					e.Attempt = max(0, at-1)
				}
				if rows[e.Agent].Lease == proto.LeaseHeld { // the dispatcher offers no other
					apply(e)
				}
			},
			"go on": func(rt *rapid.T) { // what happens when nothing goes wrong
				cur, at := want.Current()
				e := proto.Event{Agent: cur.Agent, Attempt: at, Nonce: cur.Nonce}
				switch want.Control {
				case proto.Queued:
					e.Do, e.Agent = proto.Assign, who.Draw(rt, "agent")
					if rows[e.Agent].Lease != proto.LeaseHeld {
						apply(proto.Event{Do: proto.Register, Agent: e.Agent, Boot: rows[e.Agent].Boot, Instance: rows[e.Agent].Instance})
					}
				case proto.Assigned:
					e.Do, e.Boot, e.Nonce = proto.Accept, rows[e.Agent].Boot, fmt.Sprint(100+10*at)
				default:
					e.Do = proto.Append
				}
				apply(e)
			},
			"re-send":          plain(proto.Resend),
			"take back":        plain(proto.TakeBack),
			"settle cancelled": plain(proto.SettleCancelled),
			"reap": func(*rapid.T) {
				_, at := want.Current()
				apply(proto.Event{Do: proto.Lose, Attempt: at})
			},
			"time": func(rt *rapid.T) {
				name, l := who.Draw(rt, "agent"), rapid.SampledFrom([]proto.Lease{proto.LeaseOver, proto.LeaseSilent}).Draw(rt, "lease")
				r.expire(name, l)
				row := rows[name]
				row.Lease = l
				rows[name] = row
			},
			"cancel": func(rt *rapid.T) {
				if rapid.IntRange(0, 3).Draw(rt, "seldom") == 0 || want.Control == proto.Settled {
					apply(proto.Event{Do: proto.Cancel})
				}
			},
			"register": func(rt *rapid.T) {
				name := who.Draw(rt, "agent")
				if rapid.Bool().Draw(rt, "a new process") {
					boot[name] += 2
				}
				e := proto.Event{Do: proto.Register, Agent: name, Boot: fmt.Sprint(boot[name]), Instance: home(name)}
				if boot[name] > 2 && rapid.IntRange(0, 5).Draw(rt, "late, of the process before") == 0 {
					e.Boot = fmt.Sprint(boot[name] - 2)
				}
				if rapid.IntRange(0, 5).Draw(rt, "another host") == 0 {
					e.Instance = "elsewhere"
				}
				if cur, at := want.Current(); rapid.Bool().Draw(rt, "adopt") {
					e.Attempt, e.Nonce = at, cur.Nonce
					if rapid.IntRange(0, 4).Draw(rt, "wrong nonce") == 0 {
						e.Nonce = fmt.Sprint(100 + 10*at + 3)
					}
				}
				apply(e)
			},
			"report death": speak(proto.ReportDeath),
			"want": func(rt *rapid.T) {
				_, at := want.Current()
				d := rapid.SampledFrom([]job.Desired{job.DesirePreempt, job.DesirePause, job.DesireRun, job.DesireRun}).Draw(rt, "desired")
				apply(proto.Event{Do: proto.Want, Desired: d, Attempt: at})
			},
			"renew": speak(proto.Renew),
			"renew without it": func(rt *rapid.T) {
				e := speaker(rt, proto.Renew)
				e.Attempt, e.Nonce, e.Unlisted = 0, "", true
				apply(e)
			},
			"accept":       speak(proto.Accept),
			"accept again": speak(proto.Accept),
			"append":       speak(proto.Append),
			"settle": func(rt *rapid.T) {
				e := speaker(rt, proto.Settle)
				end := rapid.SampledFrom([]proto.Event{
					{Outcome: proto.Completed},
					{Outcome: proto.Cancelled},
					{Outcome: proto.HandedBack, Retryable: true},
					{Outcome: proto.Failed, Retryable: true, Counted: true},
					{Outcome: proto.Failed, Retryable: true, Counted: true},
					{Outcome: proto.Failed, Retryable: true},
					{Outcome: proto.Failed},
				}).Draw(rt, "end")
				e.Outcome, e.Retryable, e.Counted = end.Outcome, end.Retryable, end.Counted
				apply(e)
			},
		})
		// Whatever happened, the job settles.
		apply(proto.Event{Do: proto.Cancel})
		for _, name := range []string{"a", "b"} {
			r.expire(name, proto.LeaseSilent)
			row := rows[name]
			row.Lease = proto.LeaseSilent
			rows[name] = row
		}
		_, at := want.Current()
		apply(proto.Event{Do: proto.Lose, Attempt: at})
		apply(proto.Event{Do: proto.SettleCancelled})
		if want.Control != proto.Settled {
			rt.Fatalf("not settled: %+v", want)
		}
	})
	t.Logf("%d jobs, %d events: %v", n, events, seen)
	for _, do := range []proto.Verb{proto.Assign, proto.Resend, proto.TakeBack, proto.Lose, proto.SettleCancelled, proto.Cancel, proto.Accept, proto.Append, proto.Settle} {
		if !t.Failed() && (seen[do][proto.Done] == 0 || seen[do][proto.Stale] == 0) {
			t.Errorf("%s was not both done and stale: %v", do, seen[do])
		}
	}
	storetest.Check(t, db.Pool)
}
