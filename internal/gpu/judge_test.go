package gpu_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"lorayard/internal/gpu"
)

// bench is a judge with two devices and a clock that only the test moves.
type bench struct {
	*gpu.Judge
	t   *testing.T
	now time.Time
}

const a, b = "GPU-a", "GPU-b"

func sit(t *testing.T) *bench { return again(t, "boot-1", nil) }

func again(t *testing.T, boot string, saved []byte) *bench {
	t.Helper()
	j, err := gpu.NewJudge(boot, saved)
	if err != nil {
		t.Fatal(err)
	}
	x := &bench{Judge: j, t: t, now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	x.Inventory(x.now, []string{a, b})
	for _, u := range []string{a, b} {
		x.Checked(x.now, u, "")
	}
	x.Changes()
	return x
}

func (x *bench) saved() []byte {
	x.t.Helper()
	raw, err := x.Save()
	if err != nil {
		x.t.Fatal(err)
	}
	return raw
}

func (x *bench) fault(xid int, o gpu.Origin) bool {
	return x.Fault(x.now, gpu.Fault{UUID: a, XID: xid, Origin: o})
}

// facts are those of a device that answers.
func (x *bench) facts(f gpu.Facts) {
	if f.UsedBytes == nil {
		f.UsedBytes = new(int64)
	}
	x.Facts(x.now, a, f)
}

func (x *bench) pass(d time.Duration) {
	x.now = x.now.Add(d)
	x.Tick(x.now)
}

// stands fails unless device a stands so, with a reason that says so, and b is
// untouched; it returns whether a fatal change was told.
func (x *bench) stands(s gpu.State, act gpu.Action, reason string) (fatal bool) {
	x.t.Helper()
	v := x.Verdict(a)
	if v.State != s || v.Action != act || !strings.Contains(v.Reason, reason) || reason == "" && v.Reason != "" {
		x.t.Errorf("stands at %+v, want %s, %q, %q", v, s, act, reason)
	}
	if v := x.Verdict(b); v.State != gpu.StateOK {
		x.t.Errorf("the other device stands at %+v", v)
	}
	for _, c := range x.Changes() {
		if c.UUID != a {
			x.t.Errorf("a change of %s", c.UUID)
		}
		fatal = fatal || c.Lost
	}
	return fatal
}

func TestTheTableOfXIDsIsWhole(t *testing.T) {
	count := map[gpu.XIDClass]int{}
	for code := range 400 {
		x := gpu.LookUp(code)
		if x.Code != code || x.Name == "" {
			t.Errorf("%d: %+v", code, x)
		}
		count[x.Class]++
	}
	// As many as the policy lists; a code that stood in two classes would make
	// one of these smaller.
	want := map[gpu.XIDClass]int{gpu.XIDApp: 51, gpu.XIDContained: 1, gpu.XIDReset: 15, gpu.XIDReboot: 2, gpu.XIDLink: 8, gpu.XIDInfo: 23, gpu.XIDVerdict: 1}
	for class, n := range want {
		if count[class] != n {
			t.Errorf("%d of class %s, want %d", count[class], class, n)
		}
	}
}

func TestWhatEachXIDLeadsTo(t *testing.T) {
	for _, c := range []struct {
		xid    int
		state  gpu.State
		action gpu.Action
		reason string
		fatal  bool
	}{
		{48, gpu.StateQuarantined, gpu.ActionReset, "XID 48", true},
		{119, gpu.StateQuarantined, gpu.ActionReset, "XID 119", true},
		{79, gpu.StateMissing, gpu.ActionReboot, "XID 79, the GPU has fallen off the bus", true},
		{151, gpu.StateQuarantined, gpu.ActionReboot, "XID 151", true},
		{94, gpu.StateSuspect, "", "XID 94", true},
		{31, gpu.StateOK, "", "", false},
		{63, gpu.StateOK, "", "", false},
		{92, gpu.StateSuspect, "", "XID 92", false},
		{154, gpu.StateOK, "", "", false},
		{74, gpu.StateSuspect, "", "XID 74", false}, // alone on the device
		{333, gpu.StateSuspect, "", "XID 333", false},
	} {
		t.Run(fmt.Sprint(c.xid), func(t *testing.T) {
			x := sit(t)
			x.Lent(a, "job", 1)
			if !x.fault(c.xid, gpu.FromEvent) {
				t.Error("it was not new")
			}
			if fatal := x.stands(c.state, c.action, c.reason); fatal != c.fatal {
				t.Errorf("fatal: %t", fatal)
			}
			v := x.Verdict(a)
			if offered := v.Fault() == ""; offered != (c.state == gpu.StateOK || c.state == gpu.StateSuspect) {
				t.Errorf("offered: %t", offered)
			}
			if v.Check != (c.state != gpu.StateOK) && c.action == "" {
				t.Errorf("check: %t", v.Check)
			}
		})
	}
}

func TestALinkErrorEndsAGangAndNotAJobOfOneDevice(t *testing.T) {
	x := sit(t)
	x.Lent(a, "gang", 2)
	x.Fault(x.now, gpu.Fault{UUID: a, XID: 145, Origin: gpu.FromKernel, NonFatal: true})
	if x.stands(gpu.StateOK, "", "") {
		t.Error("an error that the link mended ended a job")
	}
	x.pass(time.Minute)
	x.fault(145, gpu.FromKernel)
	if !x.stands(gpu.StateQuarantined, gpu.ActionReset, "NVLink") {
		t.Error("the gang trains on")
	}
}

// Three origins tell of each fault, in any order and within moments: each
// counts once.
func TestOneFaultFromThreeOriginsCountsOnce(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		x := sit(t)
		var told []gpu.Origin
		n := 1 + r.IntN(4)
		for _, o := range []gpu.Origin{gpu.FromEvent, gpu.FromKernel, gpu.FromPoll} {
			for range n {
				told = append(told, o)
			}
		}
		r.Shuffle(len(told), func(i, j int) { told[i], told[j] = told[j], told[i] })
		counted := 0
		for _, o := range told {
			x.now = x.now.Add(time.Duration(r.IntN(300)) * time.Millisecond)
			if x.fault(31, o) {
				counted++
			}
		}
		if counted != n {
			t.Fatalf("%v: counted %d, want %d", told, counted, n)
		}
	}
	x := sit(t)
	x.fault(31, gpu.FromEvent)
	x.pass(time.Minute)
	if !x.fault(31, gpu.FromKernel) {
		t.Error("a fault of a minute later is not new")
	}
	if x.Fault(x.now, gpu.Fault{UUID: "GPU-of-another-host", XID: 79, Origin: gpu.FromKernel}) || len(x.Verdicts()) != 2 {
		t.Error("a device that is not here was judged")
	}
}

func TestACleanUpIsTheConsequenceOfItsSibling(t *testing.T) {
	for name, when := range map[string]time.Duration{"before": -time.Second, "after": time.Second, "alone": time.Minute} {
		t.Run(name, func(t *testing.T) {
			x := sit(t)
			// Two jobs with errors of programs within a day make a device suspect.
			x.Lent(a, "one", 1)
			x.fault(13, gpu.FromEvent)
			x.pass(time.Hour)
			x.Lent(a, "two", 1)
			if when < 0 {
				x.fault(66, gpu.FromEvent) // a note, so that it alone does nothing
				x.pass(-when)
			}
			x.fault(45, gpu.FromEvent)
			if when > 0 {
				x.pass(when)
				x.fault(66, gpu.FromEvent)
			}
			x.pass(5 * time.Second)
			if suspect := x.Verdict(a).State == gpu.StateSuspect; suspect != (name == "alone") {
				t.Errorf("suspect: %t", suspect)
			}
		})
	}
}

func TestProgramsOfTwoJobsMakeADeviceSuspect(t *testing.T) {
	x := sit(t)
	x.Lent(a, "one", 1)
	for range 5 {
		x.fault(31, gpu.FromEvent)
		x.pass(time.Minute)
	}
	x.stands(gpu.StateOK, "", "")
	x.pass(25 * time.Hour)
	x.Lent(a, "two", 1)
	x.fault(31, gpu.FromEvent)
	x.stands(gpu.StateOK, "", "") // the other job's were yesterday
	x.pass(time.Hour)
	x.Lent(a, "three", 1)
	x.fault(13, gpu.FromEvent)
	if x.stands(gpu.StateSuspect, "", "in 2 jobs within a day") {
		t.Error("a job was ended for it")
	}
	x.Checked(x.now, a, "")
	x.stands(gpu.StateOK, "", "")
}

func recovery(r gpu.Recovery) gpu.Facts { return gpu.Facts{Recovery: &r} }

func TestTheDriversWordHasTheLastSay(t *testing.T) {
	for r, want := range map[gpu.Recovery]struct {
		action gpu.Action
		fatal  bool
	}{
		gpu.RecoveryReset: {gpu.ActionReset, true}, gpu.RecoveryReboot: {gpu.ActionReboot, true}, gpu.RecoveryDrainP2P: {gpu.ActionDrain, false},
		gpu.RecoveryDrainReset: {gpu.ActionDrain, false}, gpu.RecoveryBusReset: {gpu.ActionReset, true}, gpu.RecoverySystemReboot: {gpu.ActionReboot, true},
	} {
		x := sit(t)
		x.facts(recovery(gpu.RecoveryNone))
		x.facts(recovery(r))
		if fatal := x.stands(gpu.StateQuarantined, want.action, "recovered"); fatal != want.fatal {
			t.Errorf("%d: fatal %t", r, fatal)
		}
		if x.facts(recovery(r)); len(x.Changes()) > 0 {
			t.Errorf("%d: told again", r)
		}
	}
	// It makes more of an XID, and less, after a minute; of memory, only a reset
	// does.
	x := sit(t)
	x.fault(119, gpu.FromEvent)
	x.facts(recovery(gpu.RecoveryReboot))
	x.stands(gpu.StateQuarantined, gpu.ActionReboot, "XID 119")

	x = sit(t)
	x.fault(109, gpu.FromEvent)
	x.facts(recovery(gpu.RecoveryNone))
	x.pass(59 * time.Second)
	x.facts(recovery(gpu.RecoveryNone))
	x.stands(gpu.StateQuarantined, gpu.ActionReset, "XID 109")
	x.pass(2 * time.Second)
	x.facts(recovery(gpu.RecoveryNone))
	x.stands(gpu.StateSuspect, "", "needs no reset")
	x.pass(time.Hour)
	x.fault(109, gpu.FromEvent)
	for range 100 { // once a day
		x.pass(10 * time.Second)
		x.facts(recovery(gpu.RecoveryNone))
	}
	x.stands(gpu.StateQuarantined, gpu.ActionReset, "XID 109")

	x = sit(t)
	x.fault(48, gpu.FromEvent)
	for range 100 {
		x.facts(recovery(gpu.RecoveryNone))
		x.pass(10 * time.Second)
	}
	x.stands(gpu.StateQuarantined, gpu.ActionReset, "XID 48")
}

func TestADeviceComesBackByAResetACheckAndNothingElse(t *testing.T) {
	for name, reset := range map[string]func(*bench) *bench{
		"the driver's word": func(x *bench) *bench {
			x.facts(recovery(gpu.RecoveryReset))
			x.pass(time.Minute)
			x.facts(recovery(gpu.RecoveryNone))
			return x
		},
		"driver loaded anew": func(x *bench) *bench {
			x.facts(gpu.Facts{Generation: 1})
			x.stands(gpu.StateQuarantined, gpu.ActionReset, "XID 48")
			x.facts(gpu.Facts{Generation: 2})
			return x
		},
		"host started anew": func(x *bench) *bench {
			j, err := gpu.NewJudge("boot-2", x.saved())
			if err != nil {
				t.Fatal(err)
			}
			x.Judge = j
			x.Inventory(x.now, []string{a, b})
			x.Checked(x.now, b, "")
			x.Changes()
			return x
		},
		"lifted by hand": func(x *bench) *bench {
			if err := x.Lift(x.now, a); err != nil {
				t.Error(err)
			}
			return x
		},
	} {
		t.Run(name, func(t *testing.T) {
			x := sit(t)
			x.fault(48, gpu.FromKernel)
			x = reset(x)
			x.stands(gpu.StateSuspect, "", "XID 48")
			if v := x.Verdict(a); !v.Check || v.Fault() != "" {
				t.Errorf("%+v", v)
			}
			x.Checked(x.now, a, "")
			x.stands(gpu.StateOK, "", "")
			if x.Verdict(a).Check {
				t.Error("it is to be checked again")
			}
		})
	}
	// Another process of the agent changes nothing.
	x := sit(t)
	x.fault(48, gpu.FromKernel)
	x = again(t, "boot-1", x.saved())
	x.stands(gpu.StateQuarantined, gpu.ActionReset, "XID 48")
	if x.Lift(x.now, b) == nil || x.Lift(x.now, "GPU-c") == nil {
		t.Error("lifted what is not in quarantine")
	}
}

func TestWhatAResetDoesNotMendIsReplaced(t *testing.T) {
	x := sit(t)
	for range 2 {
		x.fault(119, gpu.FromKernel)
		x.stands(gpu.StateQuarantined, gpu.ActionReset, "XID 119")
		x.facts(recovery(gpu.RecoveryReset))
		x.facts(recovery(gpu.RecoveryNone))
		x.Checked(x.now, a, "")
		x.pass(24 * time.Hour)
	}
	x.fault(119, gpu.FromKernel)
	x.stands(gpu.StateQuarantined, gpu.ActionReplace, "again after 2 resets")
	x = again(t, "boot-2", x.saved())
	x.stands(gpu.StateQuarantined, gpu.ActionReplace, "again after 2 resets")

	x = sit(t)
	x.Checked(x.now, a, "2 of 8 products were wrong")
	x.stands(gpu.StateQuarantined, gpu.ActionReset, "sanity check: 2 of 8")
	x.facts(gpu.Facts{Generation: 1})
	x.facts(gpu.Facts{Generation: 2})
	x.Checked(x.now, a, "2 of 8 products were wrong")
	x.stands(gpu.StateQuarantined, gpu.ActionReplace, "sanity check")
}

func count(n uint64) gpu.Facts { return gpu.Facts{Uncorrectable: &n} }

func TestMemoryErrorsWithoutAWordQuarantine(t *testing.T) {
	x := sit(t)
	x.facts(count(7)) // of before our time
	x.pass(time.Minute)
	x.facts(count(7))
	x.stands(gpu.StateOK, "", "")
	x.facts(count(8))
	x.pass(time.Second)
	x.facts(count(8))
	x.stands(gpu.StateOK, "", "") // an event may explain it
	x.pass(2 * time.Second)
	if !x.stands(gpu.StateQuarantined, gpu.ActionReset, "wrong data") {
		t.Error("the job trains on")
	}
	for _, eventFirst := range []bool{true, false} {
		x := sit(t)
		x.facts(count(0))
		if eventFirst {
			x.fault(94, gpu.FromEvent)
		}
		x.facts(count(1))
		if !eventFirst {
			x.pass(time.Second)
			x.fault(94, gpu.FromEvent)
		}
		x.pass(time.Minute)
		x.facts(count(1))
		x.stands(gpu.StateSuspect, "", "XID 94")
	}
}

func TestRowsThatWaitToBeReplacedLetTheJobEnd(t *testing.T) {
	x := sit(t)
	x.Lent(a, "job", 1)
	x.facts(gpu.Facts{RemapPending: true})
	if x.stands(gpu.StateQuarantined, gpu.ActionDrain, "next reset") {
		t.Error("the job was ended")
	}
	x.Facts(x.now, a, gpu.Facts{}) // it tells nothing
	x.stands(gpu.StateQuarantined, gpu.ActionDrain, "next reset")
	x.facts(gpu.Facts{})
	x.stands(gpu.StateSuspect, "", "it was reset")
	x.facts(gpu.Facts{RemapFailed: true})
	x.stands(gpu.StateQuarantined, gpu.ActionReplace, "cannot be replaced")
}

func TestALostDeviceIsMissingUntilTheDriverIsLoadedAnew(t *testing.T) {
	x := sit(t)
	x.Lent(a, "job", 1)
	x.facts(gpu.Facts{Generation: 1})
	x.facts(gpu.Facts{Lost: true, Generation: 1})
	if !x.stands(gpu.StateMissing, gpu.ActionReboot, "lost") {
		t.Error("the job trains on")
	}
	x.fault(79, gpu.FromKernel) // the same
	x.facts(gpu.Facts{Lost: true, Generation: 1})
	x.facts(gpu.Facts{Generation: 1})
	x.stands(gpu.StateMissing, gpu.ActionReboot, "lost")
	x.facts(gpu.Facts{Lost: true, Generation: 2})
	x.stands(gpu.StateMissing, gpu.ActionReboot, "lost")
	x.Facts(x.now, a, gpu.Facts{Generation: 3}) // it tells nothing
	x.stands(gpu.StateMissing, gpu.ActionReboot, "lost")
	x.facts(gpu.Facts{Generation: 3})
	x.stands(gpu.StateSuspect, "", "loaded anew")
}

func TestADeviceThatIsNotListedIsMissing(t *testing.T) {
	x := sit(t)
	x.Inventory(x.now, []string{b})
	x.stands(gpu.StateMissing, gpu.ActionReboot, "does not list it")
	x = func() *bench { // another process
		j, err := gpu.NewJudge("boot-1", x.saved())
		if err != nil {
			t.Fatal(err)
		}
		return &bench{Judge: j, t: t, now: x.now}
	}()
	x.Inventory(x.now, []string{b})
	x.Checked(x.now, b, "")
	x.stands(gpu.StateMissing, gpu.ActionReboot, "does not list it")
	x.Inventory(x.now, []string{a, b})
	x.stands(gpu.StateSuspect, "", "lists it again")
	x.Inventory(x.now, []string{b})
	if err := x.Lift(x.now, a); err != nil || len(x.Verdicts()) != 1 {
		t.Errorf("not forgotten: %v, %v", err, x.Verdicts())
	}
}

func used(gib float64) gpu.Facts {
	n := int64(gib * (1 << 30))
	return gpu.Facts{UsedBytes: &n}
}

func TestForeignMemoryKeepsADeviceFromBeingLent(t *testing.T) {
	x := sit(t)
	x.Lent(a, "job", 1)
	for range 10 {
		x.facts(used(60))
		x.pass(time.Second)
	}
	x.stands(gpu.StateOK, "", "") // ours
	x.Returned(x.now, a)
	for range 3 {
		x.facts(used(9.1)) // the driver takes a moment
		x.pass(time.Second)
	}
	x.stands(gpu.StateOK, "", "")
	for range 4 {
		x.facts(used(9.1))
		x.pass(time.Second)
	}
	if x.stands(gpu.StateForeign, "", "busy: 9.1 GiB used by a process that is not ours") {
		t.Error("fatal")
	}
	if x.Verdict(a).Fault() == "" {
		t.Error("it is offered")
	}
	for range 4 {
		x.facts(used(0.1))
		x.pass(time.Second)
	}
	x.stands(gpu.StateOK, "", "")
	x.facts(used(9.1)) // one look alone says nothing
	x.pass(time.Second)
	x.facts(used(0.1))
	x.stands(gpu.StateOK, "", "")
}

func TestTrainersThatBlameADevice(t *testing.T) {
	x := sit(t)
	x.fault(31, gpu.FromEvent)
	x.Doubt(x.now, a, "one", "CUDA error")
	x.stands(gpu.StateOK, "", "") // the driver told us why
	x.pass(time.Hour)
	x.Doubt(x.now, a, "one", "CUDA error")
	x.stands(gpu.StateSuspect, "", "CUDA error")
	x.Doubt(x.now, a, "one", "CUDA error")
	x.Doubt(x.now, a, "one", "CUDA error")
	x.stands(gpu.StateSuspect, "", "CUDA error") // it may be the job's own doing
	x.Doubt(x.now, a, "two", "CUDA error")
	x.stands(gpu.StateQuarantined, gpu.ActionReset, "4 trainers failed on it within a day")
}

func TestAnErrorOfAProgramIsToldFromOneOfTheDevice(t *testing.T) {
	x := sit(t)
	x.Lent(a, "one", 1)
	told := func() string { return x.Program(x.now, a, "one") }
	if x.fault(31, gpu.FromKernel); !strings.Contains(told(), "XID 31") || x.Program(x.now, a, "two") != "" || x.Program(x.now, b, "one") != "" {
		t.Errorf("told: %q", told())
	}
	if x.pass(time.Minute); told() != "" {
		t.Errorf("a minute later: %q", told())
	}
	x.fault(31, gpu.FromKernel)
	if x.fault(94, gpu.FromKernel); told() != "" {
		t.Errorf("memory broke, and the program is blamed: %q", told())
	}
}

// Whatever comes, the judge speaks of the device that was spoken of, knows no
// other states, and goes on from what it saved as if nothing had been.
func TestTheJudgeStandsUnderAnything(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 0))
		x := sit(t)
		for range 200 {
			x.now = x.now.Add(time.Duration(r.IntN(3000)) * time.Millisecond)
			switch r.IntN(8) {
			case 0:
				x.fault(r.IntN(170), []gpu.Origin{gpu.FromEvent, gpu.FromKernel, gpu.FromPoll}[r.IntN(3)])
			case 1:
				f := gpu.Facts{Lost: r.IntN(20) == 0, ResetRequired: r.IntN(20) == 0, RemapPending: r.IntN(10) == 0, RemapFailed: r.IntN(50) == 0, Generation: r.IntN(3)}
				rec, n, m := gpu.Recovery(r.IntN(9)), uint64(r.IntN(3)), int64(r.IntN(10))<<28
				f.Recovery, f.Uncorrectable, f.UsedBytes = &rec, &n, &m
				x.facts(f)
			case 2:
				x.Lent(a, fmt.Sprint(r.IntN(3)), 1+r.IntN(2))
			case 3:
				x.Returned(x.now, a)
			case 4:
				x.Checked(x.now, a, []string{"", "wrong"}[r.IntN(2)])
			case 5:
				x.Doubt(x.now, a, fmt.Sprint(r.IntN(3)), "it said so")
			case 6:
				x.Tick(x.now)
			case 7:
				if r.IntN(10) == 0 {
					_ = x.Lift(x.now, a)
				}
			}
			v := x.Verdict(a)
			if (v.State == gpu.StateOK) != (v.Reason == "") || (v.State == gpu.StateQuarantined || v.State == gpu.StateMissing) != (v.Action != "") {
				t.Fatalf("seed %d: %+v", seed, v)
			}
			for _, c := range x.Changes() {
				if c.UUID != a {
					t.Fatalf("seed %d: a change of %s", seed, c.UUID)
				}
			}
		}
		was := x.Verdict(a)
		heir, err := gpu.NewJudge("boot-1", x.saved())
		if err != nil {
			t.Fatal(err)
		}
		heir.Inventory(x.now, []string{a, b})
		if is := heir.Verdict(a); was.State != gpu.StateForeign && is != was {
			t.Fatalf("seed %d: the next process thinks\n%+v, not\n%+v", seed, is, was)
		}
	}
}

func TestAJudgeWithoutAMemoryBeginsAnew(t *testing.T) {
	j, err := gpu.NewJudge("boot", []byte("rubbish"))
	if err == nil || j == nil {
		t.Errorf("%v %v", j, err)
	}
}
