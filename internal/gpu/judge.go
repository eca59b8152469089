package gpu

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// State is how a device stands.
type State string

// The states. Only ok and suspect devices are lent.
const (
	StateOK          State = "ok"
	StateSuspect     State = "suspect"     // it may be at fault: the next attempt on it begins with a check
	StateForeign     State = "foreign"     // a process that is not ours uses its memory
	StateQuarantined State = "quarantined" // not to be used until somebody did what the action says
	StateMissing     State = "missing"     // it is gone: off the bus, or not listed by the driver
)

// States lists all of them, for whoever counts devices by state.
func States() []State {
	return []State{StateOK, StateSuspect, StateForeign, StateQuarantined, StateMissing}
}

// Action is what a device needs before it is used again.
type Action string

// The actions.
const (
	ActionNone    Action = ""
	ActionReset   Action = "reset"
	ActionReboot  Action = "reboot"
	ActionDrain   Action = "drain" // what runs on it may end; then a reset
	ActionReplace Action = "replace"
)

// Words says what a person has to do to a device.
func (a Action) Words(uuid string) string {
	switch a {
	case ActionReset:
		return "reset it (nvidia-smi --gpu-reset -i " + uuid + "), or restart the host"
	case ActionReboot:
		return "restart the host"
	case ActionDrain:
		return "when its job has ended, reset it (nvidia-smi --gpu-reset -i " + uuid + "), or restart the host"
	case ActionReplace:
		return "have it replaced; `agent quarantine lift " + uuid + "` when that is done"
	}
	return ""
}

// Origin is who told of a fault.
type Origin string

// The origins. Each misses some faults that another one sees.
const (
	FromEvent  Origin = "event"      // the driver's library, unasked
	FromKernel Origin = "kernel_log" // the kernel log
	FromPoll   Origin = "poll"       // return codes and counters
)

// Fault is an error of a device as one origin told it.
type Fault struct {
	UUID   string
	XID    int
	Origin Origin
	Text   string // as the origin has it, for people
	// NonFatal is set for a link error that its line calls so.
	NonFatal bool
}

// Recovery is what the driver itself says that a device needs
// (NVML_FI_DEV_GET_GPU_RECOVERY_ACTION).
type Recovery int

// The driver's numbers.
const (
	RecoveryNone Recovery = iota
	RecoveryReset
	RecoveryReboot
	RecoveryDrainP2P
	RecoveryDrainReset
	RecoveryIMEX
	RecoveryBusReset
	RecoverySystemReboot
)

// action says what follows, and whether what runs on the device is lost.
func (r Recovery) action() (a Action, fatal bool) {
	switch r {
	case RecoveryNone:
		return ActionNone, false
	case RecoveryReset, RecoveryBusReset:
		return ActionReset, true
	case RecoveryReboot, RecoverySystemReboot:
		return ActionReboot, true
	}
	return ActionDrain, false
}

// Facts are what a poll found out about a device. What it could not find out is
// nil.
type Facts struct {
	Lost          bool // the driver says that the device is lost
	ResetRequired bool // the driver refuses to speak to it until it is reset
	Recovery      *Recovery
	Uncorrectable *uint64 // memory errors since the driver was loaded
	RemapPending  bool    // a broken memory row is replaced at the next reset
	RemapFailed   bool    // there is nothing left to replace it with
	UsedBytes     *int64  // of memory, without what the driver keeps for itself
	Generation    int     // grows when the driver was loaded anew
}

// Verdict is how a device stands and why.
type Verdict struct {
	UUID   string
	State  State
	Reason string // in words; empty when ok
	Action Action
	XID    int // that led to it; 0: none
	Since  time.Time
	Check  bool // the next attempt on it has to begin with a sanity check
	Fatal  bool // what ran on it when it came to stand so is lost
}

// Fault says why the device must not be lent; empty: it may be.
func (v Verdict) Fault() string {
	if v.State == StateOK || v.State == StateSuspect {
		return ""
	}
	if words := v.Action.Words(v.UUID); words != "" {
		return v.Reason + ": " + words
	}
	return v.Reason
}

// Cause is a word for what led to a verdict, for counts.
type Cause string

// The causes.
const (
	CauseNone     Cause = ""
	CauseXID      Cause = "xid"
	CauseLost     Cause = "lost" // it does not answer, or is not listed
	CauseECC      Cause = "ecc"
	CauseRowRemap Cause = "row_remap"
	CauseRecovery Cause = "recovery_action"
	CauseSanity   Cause = "sanity"
	CauseDoubts   Cause = "suspect_repeated"
	CauseReturn   Cause = "return"
)

// Change is a verdict that differs from the one before.
type Change struct {
	Verdict
	Before State
	Cause  Cause
	// Lost is set when whatever runs on the device now is lost and has to be
	// ended. It may come without a change of state.
	Lost bool
}

// Times and numbers by which is judged.
const (
	sameFault     = 5 * time.Second  // two origins tell of one fault within
	sibling       = 2 * time.Second  // a consequence follows its cause within
	memoryOfDay   = 24 * time.Hour   // for how long errors of programs count together
	yieldAfter    = 60 * time.Second // a driver that says so long that nothing is needed is believed
	resetsAllowed = 2                // for the same XID; the next one is for the vendor
	foreignBytes  = 256 << 20        // more than a bare context of a monitoring tool
	foreignFor    = 2 * time.Second
	settleDown    = 3 * time.Second // after our own attempt has left
	doubtsAllowed = 2               // within memoryOfDay
)

// Judge decides how each device of a host stands. It is pure: told what was
// seen and when, it gives the same verdicts every time. It judges the device
// that is spoken of and never another one.
type Judge struct {
	boot    string
	records map[string]*record
	changes []Change
	news    bool // something that outlives the process is not as it was saved
}

// record is what the judge knows of a device; the exported part outlives the
// process.
type record struct {
	UUID    string    `json:"uuid"`
	State   State     `json:"state"`
	Reason  string    `json:"reason,omitempty"`
	Action  Action    `json:"action,omitempty"`
	XID     int       `json:"xid,omitempty"`
	Since   time.Time `json:"since"`
	Boot    string    `json:"boot,omitempty"`    // of the host when State came
	Checked string    `json:"checked,omitempty"` // boot in which it passed the sanity check
	Doubted bool      `json:"doubted,omitempty"` // it has to pass once more
	Resets  []mark    `json:"resets,omitempty"`  // that brought it back
	Apps    []mark    `json:"apps,omitempty"`    // errors of programs on it
	Doubts  []mark    `json:"doubts,omitempty"`  // trainers that blamed it
	Yielded time.Time `json:"yielded,omitzero"`  // when the driver's word undid a quarantine
	Fatal   bool      `json:"fatal,omitempty"`   // see Verdict
	Remap   bool      `json:"remap,omitempty"`   // a row waited to be replaced
	Absent  bool      `json:"absent,omitempty"`  // the driver did not list it

	present    bool
	job        string // that holds it; empty: nobody
	gang       int    // devices of that job
	freed      time.Time
	heard      map[int]*hearing
	lastFault  time.Time // of any XID but consequences
	lastOwn    time.Time // of one that no program is to blame for
	cleanups   []time.Time
	recovery   *Recovery
	clearFrom  time.Time // since when the driver has said that nothing is needed
	errors     *uint64
	errorsMore time.Time // when they grew without an explanation yet
	contained  time.Time
	generation int
	foreign    bool
	usedFrom   time.Time // since when more was used than by nobody
	unusedFrom time.Time
	used       int64
}

// mark is something that happened once.
type mark struct {
	XID int       `json:"xid,omitempty"`
	Job string    `json:"job,omitempty"`
	At  time.Time `json:"at"`
}

// hearing counts what each origin told of one XID of late.
type hearing struct {
	by      map[Origin]int
	counted int
	last    time.Time
}

// NewJudge begins with what an earlier process saved. boot names the run of the
// host's kernel: a host that was started anew has reset its devices.
func NewJudge(boot string, saved []byte) (*Judge, error) {
	j := &Judge{boot: boot, records: map[string]*record{}}
	if len(saved) == 0 {
		return j, nil
	}
	var rs []*record
	if err := json.Unmarshal(saved, &rs); err != nil {
		return j, fmt.Errorf("read what is known of the devices: %w", err)
	}
	for _, r := range rs {
		if r != nil {
			j.records[r.UUID] = r
		}
	}
	return j, nil
}

// Save is what NewJudge takes.
func (j *Judge) Save() ([]byte, error) {
	j.news = false
	rs := slices.SortedFunc(maps.Values(j.records), func(a, b *record) int { return strings.Compare(a.UUID, b.UUID) })
	raw, err := json.MarshalIndent(rs, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("write what is known of the devices: %w", err)
	}
	return append(raw, '\n'), nil
}

// News reports whether Save would give something else than the last time.
func (j *Judge) News() bool { return j.news }

// Changes returns the changes since the last call, in order.
func (j *Judge) Changes() []Change {
	out := j.changes
	j.changes = nil
	return out
}

// Verdict is how a device stands.
func (j *Judge) Verdict(uuid string) Verdict {
	r, ok := j.records[uuid]
	if !ok {
		return Verdict{UUID: uuid, State: StateOK}
	}
	return j.verdict(r)
}

// Verdicts lists every device, those that are missing as well, by UUID.
func (j *Judge) Verdicts() []Verdict {
	var out []Verdict
	for _, uuid := range slices.Sorted(maps.Keys(j.records)) {
		out = append(out, j.verdict(j.records[uuid]))
	}
	return out
}

func (j *Judge) verdict(r *record) Verdict {
	v := Verdict{UUID: r.UUID, State: r.State, Reason: r.Reason, Action: r.Action, XID: r.XID, Since: r.Since, Check: r.Doubted || r.Checked != j.boot, Fatal: r.Fatal}
	if r.foreign && v.Fault() == "" {
		v.State, v.Action, v.XID = StateForeign, ActionNone, 0
		v.Reason = fmt.Sprintf("busy: %.1f GiB used by a process that is not ours", float64(r.used)/(1<<30))
		v.Since = r.usedFrom
	}
	return v
}

// Inventory tells which devices the driver lists. One that was there before and
// is not now is missing; one that a restart of the host has reset is to be
// checked and used.
func (j *Judge) Inventory(now time.Time, uuids []string) {
	j.news = true
	for _, r := range j.records {
		r.present = false
	}
	for _, uuid := range uuids {
		r := j.records[uuid]
		if r == nil {
			r = &record{UUID: uuid, State: StateOK, Since: now, Boot: j.boot}
			j.records[uuid] = r
		}
		r.present = true
		absent := r.Absent
		r.Absent = false
		switch {
		case r.State == StateOK || r.State == StateSuspect || r.Action == ActionReplace:
		case r.Boot != j.boot:
			j.back(now, r, "the host was started anew")
		case absent:
			j.back(now, r, "the driver lists it again")
		}
	}
	for _, uuid := range slices.Sorted(maps.Keys(j.records)) {
		r := j.records[uuid]
		if r.present || r.Absent {
			continue
		}
		r.Absent = true
		if r.State != StateMissing && r.Action != ActionReplace {
			j.set(now, r, CauseLost, StateMissing, ActionReboot, r.XID, "the driver does not list it any more", r.job != "")
		}
	}
}

// set gives a device another verdict. fatal ends what runs on it.
func (j *Judge) set(now time.Time, r *record, c Cause, s State, a Action, xid int, reason string, fatal bool) {
	j.news = true
	before := j.verdict(r)
	if r.State != s {
		r.Since = now
	}
	r.State, r.Action, r.XID, r.Reason, r.Boot = s, a, xid, reason, j.boot
	r.Fatal = fatal && (s == StateQuarantined || s == StateMissing)
	r.clearFrom = time.Time{}
	j.tell(r, before, c, fatal)
}

func (j *Judge) tell(r *record, before Verdict, c Cause, fatal bool) {
	after := j.verdict(r)
	if fatal || after.State != before.State || after.Reason != before.Reason || after.Action != before.Action {
		j.changes = append(j.changes, Change{Verdict: after, Before: before.State, Cause: c, Lost: fatal})
	}
}

// out takes a device out of use. What is worse already stays as it is: the
// first reason is the one that an operator has to know.
func (j *Judge) out(now time.Time, r *record, c Cause, s State, a Action, xid int, reason string, fatal bool) {
	if a == ActionReset && xid != 0 {
		same := 0
		for _, m := range r.Resets {
			if m.XID == xid {
				same++
			}
		}
		if same >= resetsAllowed {
			a = ActionReplace
			reason += fmt.Sprintf(", again after %d resets", same)
		}
	}
	if r.State != StateOK && r.State != StateSuspect && severity(r.Action) >= severity(a) && (r.State == StateMissing || s != StateMissing) {
		if fatal && r.job != "" {
			r.Fatal, j.news = true, true
			j.tell(r, j.verdict(r), c, true)
		}
		return
	}
	j.set(now, r, c, s, a, xid, reason, fatal)
}

func severity(a Action) int {
	return slices.Index([]Action{ActionNone, ActionDrain, ActionReset, ActionReboot, ActionReplace}, a)
}

// back brings a device back after a reset: it is used again, and the first
// attempt on it begins with a check.
func (j *Judge) back(now time.Time, r *record, how string) {
	was := r.Reason
	r.Resets = append(within(r.Resets, now, 90*memoryOfDay), mark{XID: r.XID, At: now})
	r.Doubted, r.errors, r.recovery, r.heard = true, nil, nil, nil
	j.set(now, r, CauseReturn, StateSuspect, ActionNone, 0, fmt.Sprintf("%s after: %s; the next job on it begins with a check", how, was), false)
}

// suspect keeps a device in use, with a check first.
func (j *Judge) suspect(now time.Time, r *record, xid int, reason string, fatal bool) {
	r.Doubted, j.news = true, true
	if r.State == StateOK || r.State == StateSuspect {
		j.set(now, r, CauseNone, StateSuspect, ActionNone, xid, reason, fatal)
	} else if fatal {
		j.tell(r, j.verdict(r), CauseNone, true)
	}
}

func within(ms []mark, now time.Time, d time.Duration) []mark {
	return slices.DeleteFunc(ms, func(m mark) bool { return now.Sub(m.At) > d })
}

// jobs counts the different jobs among marks.
func jobs(ms []mark) int {
	seen := map[string]bool{}
	for _, m := range ms {
		seen[m.Job] = true
	}
	return len(seen)
}

// Fault tells of an error. It reports whether it is a new one: what two origins
// tell of one fault counts once.
func (j *Judge) Fault(now time.Time, f Fault) bool {
	r := j.records[f.UUID]
	if r == nil || f.XID <= 0 || !r.fresh(now, f) {
		return false
	}
	x := LookUp(f.XID)
	if f.XID == xidCleanup {
		r.cleanups = append(r.cleanups, now) // judged by Tick: its cause may come after it
		return true
	}
	r.lastFault = now
	if x.Class != XIDApp && x.Class != XIDInfo {
		r.lastOwn = now
	}
	reason := x.String()
	switch x.Class {
	case XIDApp:
		j.app(now, r, x)
	case XIDContained:
		r.contained, r.errorsMore = now, time.Time{}
		j.suspect(now, r, f.XID, reason, true)
	case XIDReset:
		j.out(now, r, CauseXID, StateQuarantined, ActionReset, f.XID, reason, true)
	case XIDReboot:
		s := StateQuarantined
		if f.XID == xidFellOff {
			s = StateMissing
		}
		j.out(now, r, CauseXID, s, ActionReboot, f.XID, reason, true)
	case XIDLink:
		switch {
		case f.NonFatal: // the link goes on
		case r.gang > 1:
			j.out(now, r, CauseXID, StateQuarantined, ActionReset, f.XID, reason, true)
		default:
			// Whoever needs no link goes on; it is told, and the next gang that
			// it breaks for takes it out of use.
			j.suspect(now, r, f.XID, reason, false)
		}
	case XIDInfo:
		if f.XID == xidCorrection {
			j.suspect(now, r, f.XID, reason, false)
		}
	case XIDVerdict: // the next poll reads it
	default:
		j.suspect(now, r, f.XID, reason, false)
	}
	return true
}

// app counts an error of a program: where programs of different jobs fail, the
// device may be the reason.
func (j *Judge) app(now time.Time, r *record, x XID) {
	j.news = true
	// One mark a job and number is enough: a program may fail ten thousand times.
	r.Apps = slices.DeleteFunc(within(r.Apps, now, memoryOfDay), func(m mark) bool { return m.XID == x.Code && m.Job == r.job })
	r.Apps = append(r.Apps, mark{XID: x.Code, Job: r.job, At: now})
	if n := jobs(r.Apps); n > 1 {
		j.suspect(now, r, x.Code, fmt.Sprintf("%s, in %d jobs within a day", x, n), false)
	}
}

// fresh reports whether f is more than other origins have told already.
func (r *record) fresh(now time.Time, f Fault) bool {
	if r.heard == nil {
		r.heard = map[int]*hearing{}
	}
	h := r.heard[f.XID]
	if h == nil || now.Sub(h.last) > sameFault {
		h = &hearing{by: map[Origin]int{}}
		r.heard[f.XID] = h
	}
	h.last = now
	h.by[f.Origin]++
	if h.by[f.Origin] <= h.counted {
		return false
	}
	h.counted = h.by[f.Origin]
	return true
}

// Facts tells what a poll found out.
func (j *Judge) Facts(now time.Time, uuid string, f Facts) {
	r := j.records[uuid]
	if r == nil {
		return
	}
	// A device that told nothing this time has not come back.
	answered := f.Recovery != nil || f.Uncorrectable != nil || f.UsedBytes != nil
	if f.Generation > r.generation && (answered || r.generation == 0) {
		if r.generation > 0 && (r.State == StateQuarantined || r.State == StateMissing) && r.Action != ActionReplace && !f.Lost && !f.ResetRequired {
			j.back(now, r, "the driver was loaded anew")
		}
		r.generation, r.errors = f.Generation, nil
	}
	switch {
	case f.Lost:
		if r.State != StateMissing && r.fresh(now, Fault{XID: xidFellOff, Origin: FromPoll}) {
			j.out(now, r, CauseLost, StateMissing, ActionReboot, xidFellOff, "the driver has lost it", true)
		}
		return // nothing else of it can be believed
	case f.ResetRequired:
		j.out(now, r, CauseRecovery, StateQuarantined, ActionReset, 0, "the driver refuses it until it is reset", true)
		return
	}
	j.heedRecovery(now, r, f.Recovery)
	r.countErrors(now, f.Uncorrectable)
	switch {
	case f.RemapFailed:
		j.out(now, r, CauseRowRemap, StateQuarantined, ActionReplace, 0, "a broken memory row cannot be replaced any more", false)
	case f.RemapPending:
		// What it computes is right; the row is replaced when it is reset.
		if !r.Remap {
			r.Remap, j.news = true, true
		}
		j.out(now, r, CauseRowRemap, StateQuarantined, ActionDrain, 0, "a broken memory row is replaced at the next reset", false)
	case r.Remap && answered:
		r.Remap, j.news = false, true
		if r.State == StateQuarantined && r.Action == ActionDrain {
			j.back(now, r, "it was reset")
		}
	}
	if f.UsedBytes != nil {
		j.watchMemory(now, r, *f.UsedBytes)
	}
	j.tick(now, r)
}

// heedRecovery lets the driver's word decide.
func (j *Judge) heedRecovery(now time.Time, r *record, said *Recovery) {
	if said == nil {
		return
	}
	was := r.recovery
	r.recovery = said
	if action, fatal := said.action(); action != ActionNone {
		r.clearFrom = time.Time{}
		if was == nil || *was != *said {
			j.out(now, r, CauseRecovery, StateQuarantined, action, r.XID, r.reasonOr("the driver wants it to be recovered"), fatal)
		}
		return
	}
	switch {
	case r.State != StateQuarantined || r.Action == ActionReplace || r.Action == ActionReboot:
		r.clearFrom = time.Time{}
	case was != nil && *was != RecoveryNone:
		j.back(now, r, "it was reset")
	case r.XID == 0 || LookUp(r.XID).memory():
		// Nobody but a reset mends these.
	case r.clearFrom.IsZero():
		r.clearFrom = now
	case now.Sub(r.clearFrom) >= yieldAfter && now.Sub(r.Yielded) > memoryOfDay:
		r.Yielded = now
		j.back(now, r, "the driver says that it needs no reset")
	}
}

func (r *record) reasonOr(words string) string {
	if r.Reason != "" && (r.State == StateQuarantined || r.State == StateMissing) {
		return r.Reason
	}
	return words
}

// countErrors looks whether memory gave wrong data since the last poll. The
// number grows for a contained error too, which we may hear of a moment later:
// tick judges.
func (r *record) countErrors(now time.Time, n *uint64) {
	if n == nil {
		return
	}
	if r.errors != nil && *n > *r.errors && r.errorsMore.IsZero() {
		r.errorsMore = now
	}
	r.errors = n
}

// watchMemory looks for users of the device that are not ours.
func (j *Judge) watchMemory(now time.Time, r *record, used int64) {
	before := j.verdict(r)
	r.used = used
	switch {
	case r.job != "" || now.Sub(r.freed) < settleDown:
		r.foreign, r.usedFrom, r.unusedFrom = false, time.Time{}, time.Time{}
	case used > foreignBytes:
		r.unusedFrom = time.Time{}
		if r.usedFrom.IsZero() {
			r.usedFrom = now
		}
		r.foreign = r.foreign || now.Sub(r.usedFrom) >= foreignFor
	case r.foreign:
		if r.unusedFrom.IsZero() {
			r.unusedFrom = now
		}
		if now.Sub(r.unusedFrom) >= foreignFor {
			r.foreign, r.usedFrom = false, time.Time{}
		}
	default:
		r.usedFrom = time.Time{}
	}
	if after := j.verdict(r); after.State != before.State { // the size alone is no news
		j.tell(r, before, CauseNone, false)
	}
}

// Tick judges what had to wait for what may come after it.
func (j *Judge) Tick(now time.Time) {
	for _, uuid := range slices.Sorted(maps.Keys(j.records)) {
		j.tick(now, j.records[uuid])
	}
}

func (j *Judge) tick(now time.Time, r *record) {
	for len(r.cleanups) > 0 && now.Sub(r.cleanups[0]) > sibling {
		at := r.cleanups[0]
		r.cleanups = r.cleanups[1:]
		if d := at.Sub(r.lastFault); r.lastFault.IsZero() || d.Abs() > sibling {
			j.app(now, r, LookUp(xidCleanup))
		}
	}
	if !r.errorsMore.IsZero() && now.Sub(r.errorsMore) > sibling {
		explained := !r.contained.IsZero() && r.errorsMore.Sub(r.contained).Abs() <= 2*sameFault
		r.errorsMore = time.Time{}
		if !explained {
			j.out(now, r, CauseECC, StateQuarantined, ActionReset, 0, "its memory gave wrong data", true)
		}
	}
}

// Lent tells that a job holds a device, with gang devices in all.
func (j *Judge) Lent(uuid, job string, gang int) {
	if r := j.records[uuid]; r != nil {
		r.job, r.gang = job, gang
	}
}

// Returned tells that nobody holds a device any more.
func (j *Judge) Returned(now time.Time, uuid string) {
	if r := j.records[uuid]; r != nil {
		r.job, r.gang, r.freed = "", 0, now
	}
}

// Checked tells how the sanity check on a device went; wrong is empty when it
// went well, else what was wrong.
func (j *Judge) Checked(now time.Time, uuid, wrong string) {
	r := j.records[uuid]
	if r == nil {
		return
	}
	j.news = true
	if wrong == "" {
		before := j.verdict(r)
		r.Checked, r.Doubted = j.boot, false
		if r.State == StateSuspect {
			r.State, r.Reason, r.XID, r.Since = StateOK, "", 0, now
		}
		j.tell(r, before, CauseNone, false)
		return
	}
	action := ActionReset
	if n := len(r.Resets); n > 0 && now.Sub(r.Resets[n-1].At) < memoryOfDay {
		action = ActionReplace // a reset did not help
	}
	r.Doubted = true
	j.out(now, r, CauseSanity, StateQuarantined, action, 0, "it failed the sanity check: "+wrong, false)
}

// Doubt tells that a trainer ended and blamed the device, or fell silent on it.
// The driver's own word counts more: after a fault of the device that is known,
// it says nothing new.
func (j *Judge) Doubt(now time.Time, uuid, job, why string) {
	r := j.records[uuid]
	if r == nil || !r.lastFault.IsZero() && now.Sub(r.lastFault) < 2*sameFault {
		return
	}
	j.news = true
	r.Doubts = append(within(r.Doubts, now, memoryOfDay), mark{Job: job, At: now})
	if len(r.Doubts) > doubtsAllowed && jobs(r.Doubts) > 1 {
		j.out(now, r, CauseDoubts, StateQuarantined, ActionReset, 0, fmt.Sprintf("%d trainers failed on it within a day, the last one with: %s", len(r.Doubts), why), false)
		return
	}
	j.suspect(now, r, 0, "a trainer failed on it: "+why, false)
}

// Program says which error of its own program a job has just had on a device;
// empty: none, or the device had one of its own as well.
func (j *Judge) Program(now time.Time, uuid, job string) string {
	r := j.records[uuid]
	if r == nil || now.Sub(r.lastOwn) < 2*sameFault {
		return ""
	}
	for _, m := range slices.Backward(r.Apps) {
		if m.Job == job && now.Sub(m.At) < 2*sameFault {
			return LookUp(m.XID).String()
		}
	}
	return ""
}

// Lift is an operator's word that a device may be used again: the first attempt
// on it begins with a check. One that is not there any more is forgotten.
func (j *Judge) Lift(now time.Time, uuid string) error {
	r := j.records[uuid]
	switch {
	case r == nil:
		return fmt.Errorf("there is no device %s on this host", uuid)
	case r.State == StateOK || r.State == StateSuspect:
		return fmt.Errorf("device %s is not in quarantine", uuid)
	case !r.present:
		delete(j.records, uuid)
		j.news = true
		return nil
	}
	r.Resets, r.Doubts, r.Apps, r.Remap = nil, nil, nil, false
	j.back(now, r, "lifted by hand")
	return nil
}
