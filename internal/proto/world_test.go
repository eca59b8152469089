package proto_test

import (
	"fmt"
	"hash/maphash"
	"slices"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/proto"
)

// This file is the world around one job that the model checker walks through:
// two agents, of which "a" has a spare host that may start under the same id,
// messages in Redis, requests and reports that outlive their senders, and
// faults. Every step is one atomic thing that happens somewhere; whatever may
// happen between two steps does, in some path. So a process that is stopped,
// slow or cut off needs no state of its own: it is one that takes no step while
// others take theirs, and the fault is that its lease runs out meanwhile.

// The hosts, one device each. An agent's process runs on one.
const (
	hostA    = iota // agent a
	hostTwin        // somewhere else, and by mistake agent a as well
	hostB           // agent b
	hosts
)

var (
	hostName  = [hosts]string{"host a", "twin of a", "host b"}
	agentOf   = [hosts]int{0, 0, 1}
	agentName = [2]string{"a", "b"}
	instances = [hosts]string{"A", "T", "B"}
)

// The faults, each with a budget.
type fault uint8

const (
	noFault      fault = iota
	loseMessage        // Redis forgets a message
	crash              // the dispatcher ends, or hears no acknowledgement, between assignment and send
	double             // a message is delivered twice
	killAgent          // kill -9
	silence            // the lease runs out while its agent lives: SIGSTOP, a cut network
	loseAck            // no answer comes, whether the database did it or not
	cancelJob          // the app cancels, blindly
	preempt            // the platform or an operator ends an attempt: preempt, or pause
	slowDecision       // a dispatcher acts long after it looked: a second one works meanwhile
	rollBack           // a failover of the database loses its last commits
	twin               // another host starts under the id of agent a
	trainerFails       // the trainer fails, and another try may help
	lateRenewal        // a renewal is answered long after it was sent
	faults
)

var faultName = [faults]string{
	"", "lost message", "crash before send", "doubled message", "kill -9", "silence", "no answer", "cancel", "preempt or pause",
	"slow dispatcher", "database rolled back", "two agents with one id", "trainer fails", "late renewal",
}

// Limits of what can be told apart.
const (
	maxAttempts = 3
	maxSends    = 3 // message slots of an attempt
)

type ref struct{ attempt, nonce uint8 } // nonce: an index, 0 for none

type phase uint8

const (
	idle phase = iota
	accepting
	preparing // accepted; the trainer does not run yet
	running
	ending      // it ended; the attempt is being settled
	registering // of a ghost alone
)

var outcomes = [...]proto.Event{
	{Outcome: proto.Completed},
	{Outcome: proto.Failed, Retryable: true, Counted: true},
	{Outcome: proto.HandedBack, Retryable: true},
	{Outcome: proto.Cancelled},
}

// What an agent says at settlement: indices into outcomes.
const (
	completed uint8 = iota
	failed
	handedBack
	cancelled
)

// process is what is on one host: the agent's process, the trainer, and the
// attempt's directory, which a dead process leaves.
type process struct {
	alive, registered bool
	boot              uint8 // counts processes of this host
	phase             phase
	ref               ref // unless idle
	send              uint8
	outcome           uint8 // when ending
	trainer           ref   // that computes; its process may be dead
	late              bool  // its deadline lies beyond the end of the lease (mutants only)
	past              bool  // its deadline is over
	unasked           bool  // a renewal that named nothing is under way
	ghost             ghost // a request whose sender is dead
	report            ref   // of a shim, under way
	reportBoot        uint8
}

type ghost struct {
	do            phase // accepting, ending or registering
	ref           ref
	boot, outcome uint8
}

// decision is what a slow dispatcher is about to do.
type decision struct {
	do      uint8 // 0 nothing, 1 assign, 2 lose
	attempt uint8 // that it saw
	agent   uint8
}

// A message slot has, for each agent's queue, a bit for a message that waits
// and one for a message that is archived.
func waitsFor(a int) uint8   { return 1 << a }
func archivedAt(a int) uint8 { return 4 << a }

type world struct {
	job   proto.Job
	rows  [2]proto.Agent
	procs [hosts]process
	tasks [maxAttempts][maxSends]uint8
	slow  decision
	era   uint8 // times the database was rolled back
	spent [faults]uint8
}

// The names of processes and nonces: nonces are never drawn twice, and the
// checker's are told apart by who drew them and for what.
const maxBoots = 3

func bootName(host int, boot uint8) string { return bootNames[host][boot] }

var (
	bootNames  [hosts][maxBoots + 1]string
	nonceNames [1 + hosts*maxBoots*maxAttempts*2]string
)

func nonceOf(host int, boot, attempt, era uint8) uint8 {
	return 1 + ((uint8(host)*maxBoots+boot-1)*maxAttempts+attempt-1)*2 + era&1
}

func nameAll() {
	for h := range hosts {
		for b := range maxBoots {
			bootNames[h][b+1] = fmt.Sprintf("%s%d", instances[h], b+1)
		}
	}
	for i := 1; i < len(nonceNames); i++ {
		nonceNames[i] = "n" + string(byte('0'+i))
	}
}

func start() world {
	nameAll()
	w := world{job: proto.New()}
	for _, h := range []int{hostA, hostB} {
		w.procs[h] = process{alive: true, registered: true, boot: 1}
		w.rows[agentOf[h]] = proto.Agent{Boot: bootName(h, 1), Instance: instances[h]}
	}
	return w
}

// model is what is checked: the rules, and whether a trainer may be out of
// touch for no longer than a lease (strict), or for much longer (loose, the
// default of the product).
type model struct {
	rules  proto.Rules
	strict bool
	budget [faults]uint8
	total  int // of all faults together
	// A job that is queued again after so many attempts is as good as new, and
	// is not followed any further.
	attempts int
	sends    int // told apart, one more than may be archived
	// Renewals lose what their agent does not run, and so agents may give up an
	// accept. It mends what other rules prevent: those are proven without it.
	net bool

	lateFromAnswer bool // a deadline from an answer lies beyond the lease
	oneSlot        bool // sends of an attempt share a name
}

func newModel(r proto.Rules, strict bool, each uint8, total, attempts int) *model {
	m := &model{rules: r, strict: strict, total: total, attempts: attempts, sends: int(each) + 1, net: true}
	for f := range m.budget {
		m.budget[f] = each
	}
	// A renewal is sent, then the database grants a lease, then it is answered.
	sent := time.Unix(0, 0)
	lease := time.Minute
	granted, answered := sent.Add(time.Second), sent.Add(2*time.Second)
	m.lateFromAnswer = r.Deadline(sent, answered, lease).After(granted.Add(lease))
	m.oneSlot = r.TaskID("j", 1, 1) == r.TaskID("j", 1, 2)
	return m
}

// step is one thing that may happen.
type step struct {
	what  string
	host  int8 // or -1
	fault fault
	// optional steps are not counted on: nobody has to start a process again.
	optional bool
	patience bool   // it happens when somebody has waited for long
	bad      string // the rule that this step broke
	to       world
}

func (s step) String() string {
	out := s.what
	if s.host >= 0 {
		out = hostName[s.host] + ": " + out
	}
	if s.fault != noFault {
		out += " [" + faultName[s.fault] + "]"
	}
	return out
}

// walker collects the steps out of one world.
type walker struct {
	*model
	from  world
	steps []step
}

func (m *model) steps(w world, into []step) []step {
	k := walker{model: m, from: w, steps: into[:0]}
	k.dispatcher()
	k.app()
	k.redis()
	for h := range hosts {
		k.process(h)
		k.shim(h)
	}
	for a := range agentName {
		k.time(a)
	}
	return k.steps
}

// may reports whether f is still in the budget.
func (k *walker) may(f fault) bool {
	sum := 0
	for _, n := range k.from.spent {
		sum += int(n)
	}
	return k.from.spent[f] < k.budget[f] && sum < k.total
}

func (k *walker) add(s step) {
	if s.fault != noFault {
		s.to.spent[s.fault]++
	}
	if s.bad == "" {
		if was := k.from.job.Status; was.Final() && s.to.job.Status != was && s.fault != rollBack {
			s.bad = "a final status changed"
		}
	}
	k.steps = append(k.steps, s)
}

// next applies e for agent a to w.
func (k *walker) next(w *world, a int, e proto.Event) proto.Answer {
	s, ans := k.rules.Next(proto.State{Job: w.job, Agent: w.rows[a]}, e)
	w.job, w.rows[a] = s.Job, s.Agent
	if ans.Kind != proto.Done {
		return ans
	}
	if e.Do == proto.Resend {
		w.job.Send = (w.job.Send-1)%k.sends + 1 // they go round
	}
	// Of the messages of an attempt that is over, one stays to come late.
	_, n := w.job.Current()
	for i := range n {
		if t := &w.tasks[i]; i < n-1 || w.job.Control != proto.Assigned {
			for x := range maxSends {
				late := t[x] & 3
				t[x] = 0
				t[0] |= late
			}
		}
	}
	return ans
}

// owner is the agent of the current attempt, agent a when there is none.
func owner(j proto.Job) int {
	if cur, _ := j.Current(); cur.Agent == agentName[1] {
		return 1
	}
	return 0
}

func (k *walker) slot(send int) int {
	if k.oneSlot {
		return 0
	}
	return (send - 1) % k.sends
}

// send puts a message into Redis, unless one of its name is there.
func (k *walker) send(w *world, ans proto.Answer) {
	a := owner(w.job)
	if t := &w.tasks[ans.Attempt-1][k.slot(ans.Send)]; *t&archivedAt(a) == 0 {
		*t |= waitsFor(a)
	}
}

func (k *walker) dispatcher() {
	w := k.from
	a := owner(w.job)
	_, n := w.job.Current()
	for _, do := range k.rules.Due(proto.State{Job: w.job, Agent: w.rows[a]}, true) {
		switch do {
		case proto.Assign:
			for to := range agentName {
				if n == k.attempts || w.rows[to].Lease != proto.LeaseHeld {
					continue
				}
				next := w
				if ans := k.next(&next, to, proto.Event{Do: do, Agent: agentName[to], Attempt: n}); ans.Kind == proto.Done {
					if k.may(crash) {
						k.add(step{what: "assign to " + agentName[to] + ", not sent", host: -1, fault: crash, to: next})
					}
					k.send(&next, ans)
					k.add(step{what: "assign to " + agentName[to], host: -1, to: next})
				}
				if k.may(slowDecision) && w.slow.do == 0 {
					next := w
					next.slow = decision{1, uint8(n), uint8(to)}
					k.add(step{what: "a slow dispatcher decides to assign to " + agentName[to], host: -1, fault: slowDecision, to: next})
				}
			}
		case proto.Lose:
			next := w
			k.next(&next, a, proto.Event{Do: do, Attempt: n})
			k.add(step{what: "reap", host: -1, to: next})
			if k.may(slowDecision) && w.slow.do == 0 {
				next := w
				next.slow = decision{2, uint8(n), uint8(a)}
				k.add(step{what: "a slow dispatcher decides to reap", host: -1, fault: slowDecision, to: next})
			}
		case proto.Resend:
			// A message beside one that is still there is a doubled message,
			// and that is a fault.
			if t := w.tasks[n-1]; !slices.ContainsFunc(t[:], func(x uint8) bool { return x&waitsFor(a) != 0 }) {
				next := w
				k.send(&next, k.next(&next, a, proto.Event{Do: do}))
				k.add(step{what: "re-send", host: -1, to: next})
			}
		default:
			next := w
			k.next(&next, a, proto.Event{Do: do})
			k.add(step{what: string(do), host: -1, patience: do == proto.TakeBack, to: next})
		}
	}
	if d := w.slow; d.do != 0 {
		next := w
		next.slow = decision{}
		s := step{what: "the slow dispatcher does it", host: -1}
		switch {
		case d.do == 1 && n < k.attempts:
			if ans := k.next(&next, int(d.agent), proto.Event{Do: proto.Assign, Agent: agentName[d.agent], Attempt: int(d.attempt)}); ans.Kind == proto.Done {
				k.send(&next, ans)
			}
		case d.do == 2:
			ans := k.next(&next, int(d.agent), proto.Event{Do: proto.Lose, Attempt: int(d.attempt)})
			if ans.Kind == proto.Done && int(d.attempt) != n {
				s.bad = "an attempt was lost that nobody had judged"
			}
		}
		s.to = next
		k.add(s)
	}
	if k.may(preempt) && w.job.Control == proto.Accepted {
		for _, d := range []job.Desired{job.DesirePreempt, job.DesirePause} {
			next := w
			if k.next(&next, a, proto.Event{Do: proto.Want, Desired: d}).Kind == proto.Done {
				k.add(step{what: "want " + string(d), host: -1, fault: preempt, to: next})
			}
		}
	}
	if w.job.Desired == job.DesirePause {
		next := w
		if k.next(&next, a, proto.Event{Do: proto.Want, Desired: job.DesireRun}).Kind == proto.Done {
			k.add(step{what: "resume", host: -1, to: next})
		}
	}
}

// app cancels; and the database fails over to a copy without the last commits:
// the accept, or everything since the assignment. That nothing older is lost
// is what the rules can stand (a settlement that is rolled back is not).
func (k *walker) app() {
	w := k.from
	if k.may(cancelJob) {
		next := w
		if k.next(&next, 0, proto.Event{Do: proto.Cancel}).Kind == proto.Done {
			k.add(step{what: "cancel", host: -1, fault: cancelJob, to: next})
		}
	}
	cur, n := w.job.Current()
	if !k.may(rollBack) || w.job.Status.Final() || w.job.Control != proto.Assigned && w.job.Control != proto.Accepted {
		return
	}
	before := w.job.Attempts[:n-1]
	next := w
	next.era++
	next.job.Status, next.job.Control, next.job.Send, next.job.Attempts = job.Queued, proto.Queued, 0, before
	if w.job.Desired == job.DesirePreempt { // it was wanted of the accepted attempt
		next.job.Desired = job.DesireRun
	}
	k.add(step{what: "the assignment is rolled back", host: -1, fault: rollBack, to: next})
	if w.job.Control == proto.Accepted {
		next.job.Control, next.job.Send = proto.Assigned, 1
		next.job.Attempts = append(append([]proto.Attempt{}, before...), proto.Attempt{Agent: cur.Agent})
		k.add(step{what: "the accept is rolled back", host: -1, fault: rollBack, to: next})
	}
}

// redis loses messages.
func (k *walker) redis() {
	for a := range k.from.tasks {
		for i, t := range k.from.tasks[a] {
			if t&3 != 0 && k.may(loseMessage) {
				next := k.from
				next.tasks[a][i] &^= 3
				k.add(step{what: fmt.Sprint("message of attempt ", a+1, " is lost"), host: -1, fault: loseMessage, to: next})
			}
		}
	}
}

// compute starts the trainer of r on h.
func compute(w *world, h int, r ref, s *step) {
	if w.procs[h].trainer != (ref{}) {
		s.bad = "two trainers on one device"
	}
	w.procs[h].trainer = r
}

func (r ref) event(do proto.Verb, h int, boot uint8) proto.Event {
	return proto.Event{Do: do, Agent: agentName[agentOf[h]], Boot: bootName(h, boot), Instance: instances[h], Generation: int(boot), Attempt: int(r.attempt), Nonce: nonceNames[r.nonce]}
}

func (p *process) rest() { p.phase, p.ref, p.send, p.outcome, p.late = idle, ref{}, 0, 0, false }

// stop ends the trainer of the current attempt, and what is left is to settle.
func (p *process) stop(out uint8) {
	if p.phase == preparing || p.phase == running {
		p.trainer, p.phase, p.outcome, p.late = ref{}, ending, out, false
	}
}

func (k *walker) process(h int) {
	w, p, a := k.from, k.from.procs[h], agentOf[h]
	if !p.alive {
		switch {
		case h == hostTwin && p.boot == 0 && k.may(twin):
			next := w
			next.procs[h] = process{alive: true, boot: 1}
			k.add(step{what: "starts", host: int8(h), fault: twin, to: next})
		case h == hostA && p.boot < maxBoots:
			next := w
			q := &next.procs[h]
			q.alive, q.boot = true, p.boot+1
			if p.phase != idle { // the attempt's directory is there, and its trainer or its result
				k.add(step{what: "starts, to adopt", host: int8(h), optional: true, to: next})
				q.rest()
			}
			k.add(step{what: "starts", host: int8(h), optional: true, to: next})
		}
		return
	}
	if k.may(killAgent) {
		k.kill(h)
	}
	if !p.registered {
		k.register(h)
		return
	}
	k.renew(h)
	switch p.phase {
	case idle, preparing, running, ending:
		k.deliver(h)
	}
	switch p.phase {
	case accepting:
		k.accept(h)
	case preparing:
		next := w
		s := step{what: "starts the trainer", host: int8(h)}
		if k.rules.StartBeforeAccept {
			next.procs[h].phase = running
		} else if p.past && !k.rules.StartLate {
			s.what = "the shim refuses to start the trainer: the deadline is over"
			next.procs[h].stop(handedBack)
		} else {
			next.procs[h].phase = running
			compute(&next, h, p.ref, &s)
		}
		s.to = next
		k.add(s)
	case running:
		next := w
		next.procs[h].stop(completed)
		k.add(step{what: "the trainer is done", host: int8(h), to: next})
		if k.may(trainerFails) {
			next := w
			next.procs[h].stop(failed)
			k.add(step{what: "the trainer fails", host: int8(h), fault: trainerFails, to: next})
		}
	case ending:
		e := p.ref.event(proto.Settle, h, p.boot)
		e.Outcome, e.Retryable, e.Counted = outcomes[p.outcome].Outcome, outcomes[p.outcome].Retryable, outcomes[p.outcome].Counted
		next := w
		ans := k.next(&next, a, e)
		s := step{what: "settles as " + string(e.Outcome), host: int8(h)}
		if at := next.job.Attempts; ans.Kind == proto.Stale && len(at) >= e.Attempt && at[e.Attempt-1].Nonce == e.Nonce && at[e.Attempt-1].Outcome == e.Outcome {
			s.bad = "an agent is told that it lost what it settled"
		}
		lost := next
		if k.rules.AfterSettle(ans) == proto.Forget {
			next.procs[h].rest()
		}
		s.to = next
		k.add(s)
		if k.may(loseAck) {
			undone := w
			if k.rules.AfterSettle(proto.Answer{}) == proto.Forget {
				lost.procs[h].rest()
				undone.procs[h].rest()
			}
			s.to, s.fault = lost, loseAck
			k.add(s)
			s.to, s.what = undone, "fails to settle"
			k.add(s)
		}
	}
}

func (k *walker) register(h int) {
	w, p, a := k.from, k.from.procs[h], agentOf[h]
	if !k.rules.MayRegister(p.orphan()) {
		return
	}
	next := w
	ans := k.next(&next, a, p.ref.event(proto.Register, h, p.boot))
	if ans.Kind != proto.Done { // in use elsewhere: it gives up after a while
		next.procs[h].alive = false
		k.add(step{what: "may not register and exits", host: int8(h), to: next})
		return
	}
	if k.may(loseAck) {
		k.add(step{what: "registers", host: int8(h), fault: loseAck, to: next})
	}
	q := &next.procs[h]
	q.registered, q.past = true, false
	if p.phase != idle && ans.Desired == "" { // not ours any more: Discard
		q.trainer = ref{}
		q.rest()
	}
	k.add(step{what: "registers", host: int8(h), to: next})
}

func (k *walker) renew(h int) {
	w, p, a := k.from, k.from.procs[h], agentOf[h]
	named := p.phase == preparing || p.phase == running || p.phase == ending
	r := p.ref
	if p.unasked || !named {
		r = ref{}
	}
	next := w
	ans := k.next(&next, a, r.event(proto.Renew, h, p.boot))
	if ans.Kind == proto.Done && k.may(loseAck) {
		k.add(step{what: "renews", host: int8(h), fault: loseAck, to: next})
	}
	q := &next.procs[h]
	q.unasked = false
	s := step{what: "renews", host: int8(h)}
	act := k.rules.AfterRenew(ans, named && !p.unasked)
	if !named && act != proto.KillAll { // nothing to judge
		act = proto.Ignore
		if ans.Kind == proto.Done {
			q.past = false
		}
	}
	switch act {
	case proto.Kill:
		q.trainer = ref{}
		q.rest()
	case proto.KillAll:
		if w.rows[a].Instance == instances[h] && w.rows[a].Generation < int(p.boot) {
			s.bad = "the newest process of a host is told that an earlier one replaced it"
		}
		q.trainer = ref{}
		q.rest()
		q.alive, q.registered, q.past = false, false, false
	case proto.End:
		q.stop(cancelled)
	case proto.Save:
		q.stop(handedBack)
	case proto.GoOn:
		q.past, q.late = false, p.late || (p.phase == preparing || p.phase == running) && k.lateFromAnswer
		if named && !p.unasked && ans.Kind == proto.Done && ans.Desired == "" && q.trainer != (ref{}) {
			s.bad = "a trainer goes on although its agent heard that the attempt is lost"
		}
	}
	s.to = next
	k.add(s)
	if k.net && p.phase == idle && !p.unasked { // and has run nothing for a while
		next := w
		e := r.event(proto.Renew, h, p.boot)
		e.Unlisted = true
		if k.next(&next, a, e); next.job.Control != w.job.Control {
			k.add(step{what: "renews without what it does not run", host: int8(h), patience: true, to: next})
		}
	}
	if p.phase == idle && !p.unasked && k.may(lateRenewal) {
		next := w
		next.procs[h].unasked = true
		k.add(step{what: "sends a renewal", host: int8(h), fault: lateRenewal, to: next})
	}
}

// deliver hands messages for this agent to this process.
func (k *walker) deliver(h int) {
	w, p, a := k.from, k.from.procs[h], agentOf[h]
	for n := range w.tasks {
		for i, t := range w.tasks[n] {
			if t&waitsFor(a) == 0 {
				continue
			}
			attempt := uint8(n + 1)
			r := ref{attempt, nonceOf(h, p.boot, attempt, w.era)}
			next := w
			next.tasks[n][i] &^= waitsFor(a)
			s := step{what: fmt.Sprint("gets the message of attempt ", attempt), host: int8(h)}
			switch free := p.phase == idle && (p.trainer == ref{} || k.rules.RegisterOverOrphans); {
			case !k.rules.MayAccept(free):
			case !free: // a mutant: would a second trainer start?
				probe := next
				if k.next(&probe, a, r.event(proto.Accept, h, p.boot)).Kind == proto.Done && p.trainer != (ref{}) {
					s.bad = "two trainers on one device"
				}
			default:
				q := &next.procs[h]
				q.phase, q.ref, q.send = accepting, r, uint8(i)
				if k.rules.StartBeforeAccept {
					compute(&next, h, r, &s)
				}
			}
			s.to = next
			k.add(s)
			if k.may(double) {
				s.to.tasks[n][i] = t
				s.fault = double
				k.add(s)
			}
		}
	}
}

func (k *walker) accept(h int) {
	w, p, a := k.from, k.from.procs[h], agentOf[h]
	next := w
	ans := k.next(&next, a, p.ref.event(proto.Accept, h, p.boot))
	s := step{what: fmt.Sprint("accepts attempt ", p.ref.attempt), host: int8(h)}
	if w.job.Control == proto.Assigned && w.job.Status == job.Cancelled && next.job.Control == proto.Accepted {
		s.bad = "a cancelled job is begun"
	}
	lost := next
	q := &next.procs[h]
	if k.rules.AfterAccept(ans) == proto.Start {
		q.phase, q.send = preparing, 0
		if k.rules.DeadlineFromAccept {
			q.late, q.past = true, false
		}
	} else {
		if q.trainer == p.ref {
			q.trainer = ref{}
		}
		q.rest()
		s.what += ", refused"
	}
	s.to = next
	k.add(s)
	if ans.Kind == proto.Done && k.may(loseAck) {
		s.to, s.fault = lost, loseAck
		k.add(s)
		if !k.net {
			return
		}
		// It gave up: the accept has happened, or happens yet.
		s.what += ", gives up"
		q := &lost.procs[h]
		if q.trainer == p.ref { // a mutant's, that began before
			q.trainer = ref{}
		}
		q.rest()
		s.to = lost
		k.add(s)
		if p.ghost.do == idle {
			late := w
			q := &late.procs[h]
			q.ghost = ghost{do: accepting, ref: p.ref, boot: p.boot}
			if q.trainer == p.ref {
				q.trainer = ref{}
			}
			q.rest()
			s.to = late
			k.add(s)
		}
	}
}

// kill ends the process. Its directory, its trainer, its request on the way
// and the message that it had in hand stay.
func (k *walker) kill(h int) {
	next, p := k.from, k.from.procs[h]
	q := &next.procs[h]
	q.alive, q.registered, q.unasked, q.past = false, false, false, false
	s := step{what: "is killed", host: int8(h), fault: killAgent}
	left := ghost{do: p.phase, ref: p.ref, boot: p.boot, outcome: p.outcome}
	switch p.phase {
	case accepting:
		if t := &next.tasks[p.ref.attempt-1][p.send]; *t&waitsFor(agentOf[h]) == 0 {
			*t |= archivedAt(agentOf[h]) // by Asynq's recoverer, after its lease
		}
		q.rest()
	case preparing: // what has no trainer is not worth adopting
		left = ghost{}
		q.rest()
	case idle, running:
		left = ghost{}
	}
	if !p.registered { // what it listed is not in it: nobody knows it any more
		left = ghost{do: registering, boot: p.boot}
	}
	if h != hostA { // nobody comes back here: the directory is of no use
		q.rest()
	}
	s.to = next
	k.add(s)
	if left.do != idle && p.ghost.do == idle {
		s.to.procs[h].ghost = left
		s.what = "is killed, its request is on the way"
		k.add(s)
	}
}

// orphan reports whether the trainer has no agent's process.
func (p process) orphan() bool {
	return p.trainer != (ref{}) && (!p.alive || p.phase == idle || p.ref != p.trainer)
}

// shim ends trainers; and what dead processes left on the way arrives, or not.
func (k *walker) shim(h int) {
	w, p, a := k.from, k.from.procs[h], agentOf[h]
	if p.orphan() && !k.rules.NoOrphanKill {
		next := w
		q := &next.procs[h]
		q.trainer = ref{}
		if !p.alive {
			q.rest()
		}
		k.add(step{what: "the shim ends the orphan", host: int8(h), to: next})
		if !p.alive && p.report == (ref{}) {
			q.report, q.reportBoot = p.trainer, p.boot
			s := step{what: "the shim ends the orphan and reports", host: int8(h), to: next}
			if k.rules.ReportBeforeDeath {
				s.to.procs[h].trainer = p.trainer
			}
			k.add(s)
		}
	}
	// Out of touch for too long, in the loose model.
	row := w.rows[a]
	if p.trainer != (ref{}) && !k.strict && !k.rules.NoDeadline && (!p.alive || row.Lease != proto.LeaseHeld || row.Boot != bootName(h, p.boot)) {
		next := w
		next.procs[h].expire()
		k.add(step{what: "the shim's deadline comes", host: int8(h), patience: true, to: next})
	}
	if p.report != (ref{}) {
		next := w
		next.procs[h].report, next.procs[h].reportBoot = ref{}, 0
		k.next(&next, a, p.report.event(proto.ReportDeath, h, p.reportBoot))
		k.add(step{what: "the shim's report arrives", host: int8(h), to: next})
	}
	if g := p.ghost; g.do != idle {
		next := w
		next.procs[h].ghost = ghost{}
		k.add(step{what: "the dead process's request vanishes", host: int8(h), to: next})
		do := proto.Accept
		switch g.do {
		case ending:
			do = proto.Settle
		case registering:
			do = proto.Register
		}
		e := g.ref.event(do, h, g.boot)
		if do == proto.Settle {
			o := outcomes[g.outcome]
			e.Outcome, e.Retryable, e.Counted = o.Outcome, o.Retryable, o.Counted
		}
		k.next(&next, a, e)
		k.add(step{what: "the dead process's request arrives", host: int8(h), to: next})
	}
}

// expire is a trainer ended by its deadline.
func (p *process) expire() {
	if p.orphan() {
		p.trainer = ref{}
		if !p.alive {
			p.rest()
		}
		return
	}
	if p.phase == running {
		p.stop(handedBack)
	} else {
		p.trainer = ref{}
	}
}

// time lets a lease run out, and then the reaper's patience.
func (k *walker) time(a int) {
	w := k.from
	switch w.rows[a].Lease {
	case proto.LeaseHeld:
		s := step{what: "the lease of " + agentName[a] + " runs out", host: -1, patience: true}
		for h, p := range w.procs {
			if agentOf[h] == a && p.alive && p.registered && (bootName(h, p.boot) == w.rows[a].Boot || k.rules.RenewAnyBoot) {
				s.fault = silence
			}
		}
		if s.fault != noFault && !k.may(silence) {
			return
		}
		w.rows[a].Lease = proto.LeaseOver
		for h := range w.procs {
			// The deadline of a trainer is before the end of the lease.
			p := &w.procs[h]
			if agentOf[h] != a || !k.strict || k.rules.NoDeadline || p.late {
				continue
			}
			p.past = p.alive && p.registered
			if p.trainer != (ref{}) {
				p.expire()
			}
		}
		s.to = w
		k.add(s)
	case proto.LeaseOver:
		w.rows[a].Lease = proto.LeaseSilent
		k.add(step{what: "the patience with " + agentName[a] + " ends", host: -1, patience: true, to: w})
	}
}

// broken names the rule that w breaks, empty for none.
func (m *model) broken(w world) string {
	j := w.job
	cur, n := j.Current()
	switch {
	case j.Artifacts > 1 || j.Settlements > 1:
		return "settled twice"
	case (j.Control == proto.Settled) != (j.Settlements == 1), j.Control == proto.Settled && !j.Status.Final():
		return "settled and final do not agree"
	case j.Status != job.Cancelled && j.Status.Final() && j.Control != proto.Settled:
		return "final without a settlement"
	case (j.Status == job.Completed) != (j.Artifacts == 1):
		return "completed and an artifact do not agree"
	case (j.Control == proto.Queued || j.Control == proto.Assigned) && j.Status != job.Queued && j.Status != job.Cancelled:
		return "it waits, and the app's status says otherwise"
	case n > 0 && (cur.Outcome == "") != (j.Control == proto.Assigned || j.Control == proto.Accepted):
		return "the current attempt and its outcome do not agree"
	}
	for i, a := range j.Attempts {
		if i < n-1 && (a.Outcome == "" || a.Outcome == proto.Completed) {
			return "an earlier attempt is open or completed"
		}
	}
	// Who may write?
	writer := ref{}
	for h, p := range w.procs {
		for _, r := range [...]ref{p.ref, p.trainer, p.ghost.ref} {
			if r == (ref{}) {
				continue
			}
			e := r.event(proto.Append, h, max(p.boot, 1))
			_, ans := m.rules.Next(proto.State{Job: j, Agent: w.rows[agentOf[h]]}, e)
			if ans.Kind != proto.Done {
				continue
			}
			if !j.Held(e.Attempt, e.Nonce) {
				return "an attempt writes that is not accepted"
			}
			if writer != (ref{}) && writer != r {
				return "two attempts may write"
			}
			writer = r
		}
	}
	// Who computes? In the strict model nobody without the right to write,
	// but for what a rolled-back database forgot. In the loose one a zombie
	// may, until it hears (checked where it hears).
	if m.strict && w.era == 0 {
		for _, p := range w.procs {
			if p.trainer != (ref{}) && !j.Held(int(p.trainer.attempt), nonceNames[p.trainer.nonce]) {
				return "a trainer computes for an attempt that is not accepted"
			}
		}
	}
	return ""
}

// settled reports whether everything is over, or the job is back in the queue
// at the bound of what is explored.
func (m *model) settled(w world) bool {
	if _, n := w.job.Current(); w.job.Control == proto.Queued && n == m.attempts && w.job.Status == job.Queued && w.job.Desired == job.DesireRun {
		return true
	}
	for _, p := range w.procs {
		if p.trainer != (ref{}) || p.alive && p.phase != idle {
			return false
		}
	}
	return w.job.Control == proto.Settled
}

// current is the process that the database takes for agent a.
func (w *world) current(a int) (process, bool) {
	for h, p := range w.procs {
		if agentOf[h] == a && p.alive && p.registered && bootName(h, p.boot) == w.rows[a].Boot {
			return p, true
		}
	}
	return process{}, false
}

func anyOrphan(w world) bool {
	return slices.ContainsFunc(w.procs[:], process.orphan)
}

func anyAlive(w world) bool {
	for _, p := range w.procs {
		if p.alive {
			return true
		}
	}
	return false
}

// key is the canonical encoding of w, hashed to 128 bits: among a hundred
// million states two with the same key are one chance in 10^22.
type key [2]uint64

var seeds = [2]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed()}

func encode(w *world, b []byte) []byte {
	two := func(s string) {
		if s == "" {
			b = append(b, 0, 0)
			return
		}
		b = append(b, s[0], s[1])
	}
	flag := func(fs ...bool) {
		x := byte(0)
		for i, f := range fs {
			if f {
				x |= 1 << i
			}
		}
		b = append(b, x)
	}
	b = b[:0]
	j := &w.job
	two(string(j.Status))
	two(string(j.Control))
	two(string(j.Desired))
	b = append(b, byte(j.Send), byte(j.Failures), byte(j.Losses), byte(j.Artifacts), byte(j.Settlements), byte(len(j.Attempts)))
	for _, a := range j.Attempts {
		b = append(b, a.Agent[0])
		two(a.Boot)
		two(a.Nonce)
		two(string(a.Outcome))
	}
	for _, r := range w.rows {
		two(r.Boot)
		b = append(b, byte(r.Lease))
	}
	for i := range w.procs {
		p := &w.procs[i]
		flag(p.alive, p.registered, p.late, p.past, p.unasked)
		b = append(b, p.boot, byte(p.phase), p.ref.attempt, p.ref.nonce, p.send, p.outcome, p.trainer.attempt, p.trainer.nonce,
			byte(p.ghost.do), p.ghost.ref.attempt, p.ghost.ref.nonce, p.ghost.boot, p.ghost.outcome, p.report.attempt, p.report.nonce, p.reportBoot)
	}
	for i := range w.tasks {
		b = append(b, w.tasks[i][:]...)
	}
	b = append(b, w.slow.do, w.slow.attempt, w.slow.agent, w.era)
	return append(b, w.spent[:]...)
}

func keyOf(w *world, b []byte) (key, []byte) {
	b = encode(w, b)
	return key{maphash.Bytes(seeds[0], b), maphash.Bytes(seeds[1], b)}, b
}
