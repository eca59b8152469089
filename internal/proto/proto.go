// Package proto is the protocol of the hand-over as one pure function: what
// the database does with each event of a job, and what an agent, its shim and
// a dispatcher do with what they learn. It is the specification. The SQL does
// the same (store's tests compare the two), the model checker in this
// package's tests proves it for every interleaving of a few faults, and the
// simulation keeps its jobs in it.
//
//	          assign: attempt+1, send 1     accept: agent, boot, attempt, nonce
//	┌────────┐ ──────────────► ┌──────────┐ ──────────────► ┌──────────┐─┐ renew, append,
//	│ queued │                 │ assigned │─┐ re-send:      │ accepted │ │ adopt: boot
//	└────────┘ ◄────────────── └──────────┘◄┘ send+1        └──────────┘◄┘
//	  │    ▲      take back         │                         │      │
//	  │    └────────────────────────┼─────────────────────────┘      │ settle: completed,
//	  │     lost, handed back, or failed and worth another try       │ failed, cancelled
//	  │ settle cancelled            │ settle cancelled               ▼
//	  └─────────────────────────────┴──────────────────────────► ┌─────────┐
//	                                                             │ settled │
//	                                                             └─────────┘
//
// The fence is (attempt, nonce) of an accepted attempt: only who knows it may
// renew it, write to it and settle it. Only an assignment moves the attempt,
// only an accept draws a nonce. Every event is a compare-and-set, so two
// dispatchers, doubled messages and late ones change nothing.
//
// A trainer may outlive its right to write: a host that is out of touch trains
// on. That zombie can change nothing shared, it never meets another trainer on
// its device, and it ends when its agent hears of it or its shim's deadline
// comes. Where that deadline is no longer than the lease there is none at all.
package proto

import (
	"slices"

	"lorayard/internal/job"
)

// Control is where a job stands between dispatcher and agents.
type Control string

// The control states. Settled is final.
const (
	Queued   Control = "queued"
	Assigned Control = "assigned"
	Accepted Control = "accepted"
	Settled  Control = "settled"
)

// Outcome is how an attempt ended; empty while it has not.
type Outcome string

// The outcomes; the first four are an agent's to say.
const (
	Completed   Outcome = "completed"
	Failed      Outcome = "failed"
	Cancelled   Outcome = "cancelled"
	HandedBack  Outcome = "handed_back"
	Lost        Outcome = "lost"
	NotAccepted Outcome = "not_accepted"
)

// A job ends as failed after so many attempts that failed by its own doing, or
// that infrastructure lost (lorayard.requeue_job).
const (
	MaxFailures = 3
	MaxLosses   = 20
)

// Job is what the database knows of one job. Attempts are numbered from 1; the
// last is the current one, and its number is the fencing token.
type Job struct {
	Status      job.Status
	Control     Control
	Attempts    []Attempt // never changed in place
	Desired     job.Desired
	Send        int // messages sent for the current attempt, 0 while queued
	Failures    int
	Losses      int
	Artifacts   int // models published: 1 when completed, else 0
	Settlements int // times that cost and final notification were written: 1 when settled
}

// New is an admitted job.
func New() Job { return Job{Status: job.Queued, Control: Queued, Desired: job.DesireRun} }

// Attempt is one try at a job.
type Attempt struct {
	Agent   string
	Boot    string // of the process that accepted or adopted it
	Nonce   string // empty until it is accepted
	Outcome Outcome
}

// Current is the last attempt and its number; the number is 0 before the
// first assignment.
func (j Job) Current() (Attempt, int) {
	if len(j.Attempts) == 0 {
		return Attempt{}, 0
	}
	return j.Attempts[len(j.Attempts)-1], len(j.Attempts)
}

// Held reports whether (attempt, nonce) is the accepted attempt.
func (j Job) Held(attempt int, nonce string) bool {
	a, n := j.Current()
	return j.Control == Accepted && n == attempt && a.Nonce == nonce
}

// Lease is how an agent stands with the database's clock.
type Lease int

// A lease is held, then it is over, and when the reaper's patience is over as
// well the agent is silent.
const (
	LeaseHeld Lease = iota
	LeaseOver
	LeaseSilent
)

// Agent is the database's row of one agent. The zero Agent never registered.
type Agent struct {
	Boot     string // the process that runs it
	Instance string // its data directory: the same one means the same host
	// Generation counts the processes that were started on the data directory.
	Generation int
	Lease      Lease
}

// State is what one event is about: a job, and the row of the agent that the
// event names, or of the job's own agent where it names none. An event about
// several jobs of one agent (Register, Renew) is applied to each with the same
// Agent: applying it again to the agent changes nothing.
type State struct {
	Job   Job
	Agent Agent
}

// Verb says what happens.
type Verb string

// The events. What each reads of an Event stands behind it; guards of time
// (assigned for too long, sent too long ago) are the caller's.
const (
	Assign          Verb = "assign"           // dispatcher: Agent, Attempt (the last one, not the new)
	Resend          Verb = "re-send"          // dispatcher
	TakeBack        Verb = "take back"        // dispatcher
	Lose            Verb = "lose"             // reaper: Attempt
	ReportDeath     Verb = "report death"     // dispatcher for a shim: Agent, Boot, Attempt, Nonce
	SettleCancelled Verb = "settle cancelled" // dispatcher
	Want            Verb = "want"             // dispatcher or operator: Desired (run resumes a paused job)
	Cancel          Verb = "cancel"           // the app, blindly
	Register        Verb = "register"         // agent: Agent, Boot, Instance, Generation; Attempt and Nonce of what it adopts of this job
	Renew           Verb = "renew"            // agent: Agent, Boot, and Attempt and Nonce when it asks for this job; Unlisted
	Accept          Verb = "accept"           // agent: Agent, Boot, Attempt, Nonce
	Append          Verb = "append"           // agent: Attempt, Nonce; a checkpoint is the same
	Settle          Verb = "settle"           // agent: Attempt, Nonce, Outcome, Retryable, Counted
)

// Event is one call of the database.
type Event struct {
	Do       Verb
	Agent    string
	Boot     string
	Instance string
	// Generation: register. One that is lower than its heir's comes late.
	Generation int
	Attempt    int
	Nonce      string
	Desired    job.Desired
	Outcome    Outcome
	Retryable  bool // failed: another attempt may help
	Counted    bool // the failure is the job's own
	Unlisted   bool // renew: an attempt that it does not ask for was accepted so long ago that its accept is not under way
}

// Kind is what an answer says.
type Kind string

// The kinds of answer.
const (
	Unknown  Kind = ""         // none came: the event may have happened, or may happen yet
	Done     Kind = "done"     // it happened, now or when it was asked before
	Stale    Kind = "stale"    // it is about something that is over: nothing changed
	Replaced Kind = "replaced" // another process runs this agent: nothing changed
	InUse    Kind = "in use"   // a process on another host runs this agent: nothing changed
	Refused  Kind = "refused"  // a final status would change: the transaction failed
)

// Answer is what the caller learns.
type Answer struct {
	Kind    Kind
	Status  job.Status  // Settle: the job's, afterwards
	Desired job.Desired // Renew, Register: what is wanted of the attempt; empty: it is not the agent's
	Send    int         // Assign, Resend: the message to send, with the new attempt
	Attempt int
	Agent   string
}

// Next is one transaction of the database. It changes neither what s points to
// nor anything else.
func (r Rules) Next(s State, e Event) (State, Answer) {
	before := s
	a := r.apply(&s, e)
	if a.Kind != Done {
		return before, a
	}
	return s, a
}

func (r Rules) apply(s *State, e Event) Answer {
	j := &s.Job
	cur, n := j.Current()
	switch e.Do {
	case Assign:
		if !r.AssignBlindly && (j.Control != Queued || n != e.Attempt) || j.Desired == job.DesirePause || s.Agent.Lease != LeaseHeld {
			return Answer{Kind: Stale}
		}
		j.Control, j.Send = Assigned, 1
		j.Attempts = append(slices.Clip(j.Attempts), Attempt{Agent: e.Agent})
		return Answer{Kind: Done, Send: 1, Attempt: n + 1, Agent: e.Agent}
	case Resend:
		if j.Control != Assigned {
			return Answer{Kind: Stale}
		}
		j.Send++
		return Answer{Kind: Done, Send: j.Send, Attempt: n, Agent: cur.Agent}
	case TakeBack:
		if j.Control != Assigned {
			return Answer{Kind: Stale}
		}
		j.close(NotAccepted)
		j.Control, j.Send = Queued, 0
		return Answer{Kind: Done}
	case Lose:
		if j.Control != Accepted || n != e.Attempt && !r.LoseAnyAttempt || s.Agent.Lease != LeaseSilent && !r.LoseBlindly {
			return Answer{Kind: Stale} // or it renewed while the reaper looked
		}
		return r.lose(j)
	case ReportDeath:
		if !j.Held(e.Attempt, e.Nonce) || cur.Agent != e.Agent {
			return Answer{Kind: Stale}
		}
		if s.Agent.Boot == e.Boot {
			s.Agent.Lease = max(s.Agent.Lease, LeaseOver)
		}
		return r.lose(j)
	case SettleCancelled:
		if j.Control != Queued && j.Control != Assigned || j.Status != job.Cancelled {
			return Answer{Kind: Stale}
		}
		j.close(Cancelled)
		return r.finish(j, job.Cancelled)
	case Want:
		return j.want(e.Desired)
	case Cancel:
		if j.Status.Final() && !r.FinalMayChange {
			return Answer{Kind: Stale}
		}
		j.Status = job.Cancelled
		return Answer{Kind: Done}
	case Register:
		return r.register(s, e)
	case Renew:
		if s.Agent.Boot != e.Boot && !r.RenewAnyBoot {
			return Answer{Kind: Replaced}
		}
		s.Agent.Lease = LeaseHeld
		if !r.held(*j, e) || cur.Agent != e.Agent {
			// Nothing is wanted of it: it is not the agent's. What the agent
			// has accepted and does not run, it lost.
			if e.Unlisted && j.Control == Accepted && cur.Agent == e.Agent && !r.KeepUnlisted {
				return Answer{Kind: r.lose(j).Kind}
			}
			return Answer{Kind: Done}
		}
		if j.Status == job.Cancelled {
			return Answer{Kind: Done, Desired: job.DesireCancel}
		}
		return Answer{Kind: Done, Desired: j.Desired}
	case Accept:
		return r.accept(s, e)
	case Append:
		if !r.held(*j, e) {
			return Answer{Kind: Stale}
		}
		if j.Status == job.Initializing {
			j.Status = job.Running
		}
		return Answer{Kind: Done}
	case Settle:
		return r.settle(j, e)
	}
	return Answer{Kind: Stale}
}

// held is the fence.
func (r Rules) held(j Job, e Event) bool {
	switch cur, n := j.Current(); {
	case r.WriteUnfenced:
		return n > 0
	case r.WriteWithoutNonce:
		return j.Control == Accepted && n == e.Attempt
	case r.SettleAgain && e.Do == Settle:
		return n == e.Attempt && cur.Nonce == e.Nonce
	}
	return e.Nonce != "" && j.Held(e.Attempt, e.Nonce)
}

func (r Rules) accept(s *State, e Event) Answer {
	j := &s.Job
	cur, n := j.Current()
	if n != e.Attempt && !r.AcceptAnyAttempt || cur.Agent != e.Agent || s.Agent.Boot != e.Boot && !r.AcceptAnyBoot {
		return Answer{Kind: Stale}
	}
	if j.Control == Accepted && cur.Nonce == e.Nonce && !r.AcceptOnce {
		return Answer{Kind: Done} // the answer before was lost
	}
	if j.Control != Assigned || j.Status != job.Queued && !r.AcceptCancelled {
		return Answer{Kind: Stale}
	}
	j.amend(func(a *Attempt) { a.Boot, a.Nonce = e.Boot, e.Nonce })
	j.Control = Accepted
	if j.Status == job.Queued {
		j.Status = job.Initializing
	}
	return Answer{Kind: Done}
}

func (r Rules) register(s *State, e Event) Answer {
	if s.Agent.Boot != e.Boot && s.Agent.Instance != e.Instance && s.Agent.Lease == LeaseHeld && s.Agent.Boot != "" && !r.RegisterAnyInstance {
		return Answer{Kind: InUse}
	}
	if s.Agent.Instance == e.Instance && e.Generation < s.Agent.Generation && !r.RegisterAnyGeneration {
		return Answer{Kind: Replaced}
	}
	s.Agent = Agent{Boot: e.Boot, Instance: e.Instance, Generation: e.Generation}
	j := &s.Job
	cur, _ := j.Current()
	if j.Control != Accepted || cur.Agent != e.Agent {
		return Answer{Kind: Done}
	}
	if j.Held(e.Attempt, e.Nonce) {
		j.amend(func(a *Attempt) { a.Boot = e.Boot })
		return Answer{Kind: Done, Desired: j.Desired}
	}
	if cur.Boot == e.Boot || r.RegisterKeepsAll {
		return Answer{Kind: Done} // asked again, or a mutant
	}
	return Answer{Kind: r.lose(j).Kind}
}

func (r Rules) settle(j *Job, e Event) Answer {
	if !r.held(*j, e) {
		if e.Attempt < 1 || e.Attempt > len(j.Attempts) || e.Nonce == "" || r.SettleForgets {
			return Answer{Kind: Stale}
		}
		if a := j.Attempts[e.Attempt-1]; a.Nonce != e.Nonce || a.Outcome != e.Outcome {
			return Answer{Kind: Stale}
		}
		return Answer{Kind: Done, Status: j.Status} // the answer before was lost
	}
	out := e.Outcome
	if j.Status == job.Cancelled && !r.CancelLoses {
		out = Cancelled
	}
	j.close(out)
	switch {
	case out == Completed:
		j.Artifacts++
		return r.finish(j, job.Completed)
	case out == Cancelled:
		return r.finish(j, job.Cancelled)
	case out == HandedBack || e.Retryable:
		return r.requeue(j, e.Counted, out == Failed && !e.Counted)
	}
	return r.finish(j, job.Failed)
}

// want notes a wish of the dispatcher or an operator. A pause holds for the
// job, whatever becomes of its attempt.
func (j *Job) want(d job.Desired) Answer {
	switch {
	case d == job.DesirePreempt && j.Control == Accepted && j.Desired == job.DesireRun:
	case d == job.DesirePause && j.Control != Settled:
	case d == job.DesireRun && j.Control != Settled && j.Desired == job.DesirePause:
	default:
		return Answer{Kind: Stale}
	}
	j.Desired = d
	return Answer{Kind: Done}
}

// lose gives an accepted attempt back. The user does not pay for it.
func (r Rules) lose(j *Job) Answer {
	j.close(Lost)
	return r.requeue(j, false, true)
}

// requeue sends a job back to the queue, or ends it when it was cancelled or
// has used up its attempts.
func (r Rules) requeue(j *Job, counted, lost bool) Answer {
	if j.Status.Final() && !r.RequeueCancelled {
		return r.finish(j, j.Status)
	}
	if counted {
		j.Failures++
	}
	if lost {
		j.Losses++
	}
	if j.Failures >= MaxFailures || j.Losses >= MaxLosses {
		return r.finish(j, job.Failed)
	}
	if j.Status.Final() && !r.FinalMayChange {
		return Answer{Kind: Refused}
	}
	j.Status, j.Control, j.Send = job.Queued, Queued, 0
	if j.Desired != job.DesirePause {
		j.Desired = job.DesireRun
	}
	return Answer{Kind: Done, Status: j.Status}
}

// finish settles a job. A final status that came first stays.
func (r Rules) finish(j *Job, to job.Status) Answer {
	if !j.Status.Final() || r.FinalMayChange {
		j.Status = to
	}
	j.Control = Settled
	j.Settlements++
	return Answer{Kind: Done, Status: j.Status}
}

// close ends the current attempt, if one is open.
func (j *Job) close(out Outcome) {
	j.amend(func(a *Attempt) {
		if a.Outcome == "" {
			a.Outcome = out
		}
	})
}

// amend changes a copy of the current attempt.
func (j *Job) amend(change func(*Attempt)) {
	if len(j.Attempts) == 0 {
		return
	}
	j.Attempts = slices.Clone(j.Attempts)
	change(&j.Attempts[len(j.Attempts)-1])
}
