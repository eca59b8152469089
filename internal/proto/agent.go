package proto

import (
	"fmt"
	"time"

	"lorayard/internal/job"
)

// Act is what an agent does next about one attempt.
type Act string

// The acts. Kill ends the trainer at once and forgets the attempt; the device
// is free when the trainer is dead and not before.
const (
	GoOn     Act = "go on"          // and its deadline moves
	Ignore   Act = "change nothing" // out of touch is not dead
	Start    Act = "start the trainer"
	AskAgain Act = "ask again"            // with the same nonce, the same outcome
	Forget   Act = "forget it"            // write nothing more
	Kill     Act = "kill it"              // and write nothing more
	KillAll  Act = "kill all and exit"    // another process is this agent
	End      Act = "kill it, then settle" // as cancelled
	Save     Act = "save, then hand back" // a checkpoint first
)

// AfterAccept is what follows from the answer to an accept. Without an answer
// the accept may have happened, and then nobody but us knows its nonce: an
// agent asks again. It may give up after that: a renewal that does not list the
// attempt loses it.
func (r Rules) AfterAccept(a Answer) Act {
	switch {
	case a.Kind == Done:
		return Start
	case a.Kind == Unknown:
		return AskAgain
	}
	return Forget
}

// AfterRenew is what follows from a renewal for an attempt that is held now;
// asked tells whether the renewal named it when it was sent. An attempt that
// was accepted meanwhile is neither judged nor prolonged by an answer that
// could not know it.
func (r Rules) AfterRenew(a Answer, asked bool) Act {
	switch {
	case a.Kind == Replaced:
		return KillAll
	case a.Kind != Done || !asked && !r.JudgeUnasked && !r.ExtendUnasked:
		return Ignore
	case !asked && r.ExtendUnasked:
		return GoOn
	case a.Desired == "" && !r.IgnoreLost:
		return Kill
	case a.Desired == job.DesireCancel:
		return End
	case a.Desired == job.DesirePreempt, a.Desired == job.DesirePause:
		return Save
	}
	return GoOn
}

// AfterSettle is what follows from the answer to a settlement. What the attempt
// did is lost with it, so it asks until it knows.
func (r Rules) AfterSettle(a Answer) Act {
	if (a.Kind == Unknown || a.Kind == Refused) && !r.GiveUpSettle {
		return AskAgain
	}
	return Forget
}

// MayAccept reports whether a task may be accepted: its devices must be free
// by the agent's own book, whatever the database believes.
func (r Rules) MayAccept(free bool) bool { return free || r.ShareDevices }

// MayRegister reports whether a process may register: what an earlier one left
// alive on the devices, and is not adopted, must be dead.
func (r Rules) MayRegister(orphans bool) bool { return !orphans || r.RegisterOverOrphans }

// Deadline is when a shim ends its trainer unless a newer renewal moves it,
// longest after the renewal. The time counts from when the renewal was sent:
// the database granted the lease later than that, so that a longest of no more
// than the lease ends the trainer before anybody may take its job. The answer
// may have been underway for any time, and an accept moves nothing, because it
// does not move the lease: a new trainer has the deadline of the last renewal
// that was answered before its accept was sent, until one names it.
func (r Rules) Deadline(sent, answered time.Time, longest time.Duration) time.Time {
	if r.DeadlineFromAnswer {
		return answered.Add(longest)
	}
	return sent.Add(longest)
}

// TaskID names a message. It has the send in it, because a message that was
// archived (its reader died with it) blocks every later one of its name.
func (r Rules) TaskID(id job.ID, attempt, send int) string {
	if r.SameTaskID {
		send = 0
	}
	return fmt.Sprintf("%s:%d:%d", id, attempt, send)
}

// Due lists what a dispatcher has to do about a job of a given agent, all of
// it safe to do at any time and twice. late tells whether an assignment was
// not accepted in time.
func (r Rules) Due(s State, late bool) []Verb {
	switch j := s.Job; {
	case j.Control == Settled:
		return nil
	case j.Status == job.Cancelled && j.Control != Accepted:
		if r.NeverSettleCancelled {
			return nil
		}
		return []Verb{SettleCancelled}
	case j.Control == Queued && j.Desired != job.DesirePause:
		return []Verb{Assign}
	case j.Control == Assigned:
		var due []Verb
		if !r.NeverTakeBack && (late || s.Agent.Lease != LeaseHeld) {
			due = append(due, TakeBack)
		}
		if !r.NeverResend {
			due = append(due, Resend)
		}
		return due
	case j.Control == Accepted && s.Agent.Lease == LeaseSilent && !r.NeverReap:
		return []Verb{Lose}
	}
	return nil
}
