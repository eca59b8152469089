package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"lorayard/internal/devstack"
)

// The agent is killed the moment a checkpoint is published. Patience is endless
// here: what brings the job elsewhere is the report of its shim.
func TestAKilledAgentsJobIsElsewhereAtOnce(t *testing.T) {
	f := faults(t, append(dry(100, 50*time.Millisecond), "PATIENCE=1h")...)
	f.dispatcher("dispatcher")
	first := f.agent("host-1")
	id := f.job()
	f.steps(id, 1)
	f.agent("host-2")
	f.until("a checkpoint", `SELECT count(*) > 0 FROM checkpoints WHERE job_id = $1`, id)
	first.Kill()
	f.completed(id, 100, "1 host-1 lost, 2 host-2 completed")
	if got := f.text(`SELECT resume_step > 0 FROM lorayard.attempts WHERE job_id = $1 AND attempt = 2`, id); got != "t" {
		t.Error("attempt 2 began anew")
	}
	// The measured curve is that of an undisturbed run.
	whole := f.job()
	f.status(whole, "completed")
	f.sameCurve(id, whole)
}

// curve is the loss of every step; of a step that was done twice, the last.
const curve = `SELECT string_agg(step || ':' || loss, ' ' ORDER BY step) FROM (
	SELECT DISTINCT ON (step) step, loss FROM lorayard.samples WHERE job_id = $1 AND validation_loss IS NULL ORDER BY step, attempt DESC) s`

// sameCurve compares two jobs of the same settings.
func (f *faulty) sameCurve(a, b string) {
	f.t.Helper()
	if x, y := f.text(curve, a), f.text(curve, b); x != y || x == "" {
		f.t.Errorf("the losses differ:\n%s\n%s", x, y)
	}
}

// leader waits until one of the dispatchers leads, and returns it and the rest.
func (f *faulty) leader(ps ...*devstack.Process) (leads *devstack.Process, stands []*devstack.Process) {
	f.t.Helper()
	f.eventually("a leader", func() bool {
		leads, stands = nil, nil
		for _, p := range ps {
			if f.metric(p, "lorayard_dispatcher_leader") == 1 {
				leads = p
			} else {
				stands = append(stands, p)
			}
		}
		return leads != nil
	})
	return leads, stands
}

// Leaders are killed and frozen under a running job, which notices nothing. A
// standby leads when the term is over; with nobody left, the next one to start.
func TestLeadersAreKilledAndFrozen(t *testing.T) {
	f := faults(t, dry(250, 100*time.Millisecond)...)
	one, two := f.dispatcher("dispatcher-1"), f.dispatcher("dispatcher-2")
	f.agent("host-1", "PRETEND_GPUS=1")
	f.agent("host-2", append(dry(5, 20*time.Millisecond), "PRETEND_CLASS=H100")...)
	long := f.job()
	f.steps(long, 5)
	// short runs a job on the other host, while the long one runs.
	short := func() {
		t.Helper()
		id, err := f.Insert(t.Context(), devstack.Job{
			User: f.user, Dataset: f.data, Preset: "custom", GPUConfig: map[string]any{"type": "H100", "count": 1},
			Hyperparameters: map[string]any{"learning_rate": 1e-3, "batch_size": 4, "epochs": 2, "rank": 8, "alpha": 16, "dropout": 0},
		})
		f.must(err)
		f.completed(id, 5, "1 host-2 completed")
	}
	leads, stands := f.leader(one, two)
	leads.Kill()
	killed := time.Now()
	short()
	t.Logf("from the kill of the leader to a settled job: %.1f s", time.Since(killed).Seconds())

	// Nobody is left; then two again, of which one is frozen while it leads.
	stands[0].Kill()
	away(time.Second)
	three := f.dispatcher("dispatcher-3")
	leads, _ = f.leader(three)
	four := f.dispatcher("dispatcher-4")
	short()
	f.must(leads.Signal(syscall.SIGSTOP))
	f.leader(four)
	short()
	f.must(leads.Signal(syscall.SIGCONT)) // it believes to lead, until it looks
	short()
	f.eventually("the end of the old term", func() bool { return f.metric(leads, "lorayard_dispatcher_leader") == 0 })
	short()
	f.completed(long, 250, "1 host-1 completed")
	if n := f.text(`SELECT term FROM lorayard.leader`); n < "4" {
		t.Errorf("%s terms", n)
	}
}

// Dispatcher and agents are killed at once, so that no shim finds anybody to
// report to. One host comes back, and its job is begun again at once; the other
// does not, and is waited for as long as its lease and patience say.
func TestAgentAndDispatcherAreKilledTogether(t *testing.T) {
	f := faults(t, dry(100, 100*time.Millisecond)...)
	d := f.dispatcher("dispatcher")
	one := f.agent("host-1", "PRETEND_GPUS=1")
	back := f.job()
	f.steps(back, 3)
	two := f.agent("host-2", "PRETEND_GPUS=1")
	gone := f.job()
	f.steps(gone, 3)
	d.Kill()
	two.Kill()
	one.Kill()
	f.eventually("the end of the orphans", func() bool { return f.trainers("") == 0 })
	f.dispatcher("dispatcher")
	f.agent("host-1", "PRETEND_GPUS=1")
	f.completed(back, 100, "1 host-1 lost, 2 host-1 completed")
	f.completed(gone, 100, "1 host-2 lost, 2 host-1 completed")
	if got := f.text(`SELECT message FROM lorayard.attempts WHERE job_id = $1 AND attempt = 1`, gone); !strings.Contains(got, "stopped renewing") {
		t.Errorf("host-2's attempt was lost because: %s", got)
	}
}

// tree lists a process and all its descendants.
func (f *faulty) tree(pid int) []int {
	f.t.Helper()
	children := map[int][]int{}
	found, err := filepath.Glob("/proc/[0-9]*/stat")
	f.must(err)
	for _, path := range found {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		// pid (comm) state ppid; comm may hold anything.
		after := string(raw[strings.LastIndexByte(string(raw), ')')+1:])
		var state string
		var parent, self int
		if _, err := fmt.Sscan(after, &state, &parent); err != nil {
			continue
		}
		if self, err = strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil {
			children[parent] = append(children[parent], self)
		}
	}
	out := []int{pid}
	for i := 0; i < len(out); i++ {
		out = append(out, children[out[i]]...)
	}
	return out
}

func (f *faulty) signal(pids []int, sig syscall.Signal) {
	f.t.Helper()
	for _, pid := range pids {
		if err := syscall.Kill(pid, sig); err != nil {
			f.t.Fatalf("%s to %d: %v", sig, pid, err)
		}
	}
}

// A host stands still for longer than lease and patience, and its job goes
// elsewhere. When it wakes up it is a zombie with everything that a run needs:
// its writes are refused and its trainer ends.
func TestAFrozenAgentWakesUpTooLate(t *testing.T) {
	f := faults(t, dry(120, 100*time.Millisecond)...)
	f.dispatcher("dispatcher")
	zombie := f.agent("host-1")
	id := f.job()
	f.until("a checkpoint", `SELECT count(*) > 0 FROM checkpoints WHERE job_id = $1`, id)
	f.agent("host-2")
	frozen := f.tree(zombie.PID())
	if len(frozen) < 3 {
		t.Fatalf("agent, shim and trainer are %d processes", len(frozen))
	}
	f.signal(frozen, syscall.SIGSTOP)
	before := f.text(`SELECT count(*) FROM lorayard.samples WHERE job_id = $1 AND attempt = 1`, id)
	f.until("attempt 2", `SELECT state = 'accepted' AND attempt = 2 FROM lorayard.jobs WHERE job_id = $1`, id)
	f.signal(frozen, syscall.SIGCONT)
	f.eventually("the end of the zombie's trainer", func() bool { return f.trainers(filepath.Join(f.Dir, "host-1")) == 0 })
	if got := f.text(`SELECT state FROM lorayard.jobs WHERE job_id = $1`, id); got != "accepted" {
		t.Errorf("the zombie's trainer ended only when the job was %s", got)
	}
	f.giveUp(zombie, id, 120, before)
}

// giveUp waits for a zombie to learn what it is, and for its job to be done
// elsewhere; of it no more samples came than before.
func (f *faulty) giveUp(zombie *devstack.Process, id string, steps int, before string) {
	f.t.Helper()
	f.eventually("the zombie's insight", func() bool {
		return f.metric(zombie, `lorayard_agent_attempts_total{kind="lease_lost",outcome="lost"}`) == 1
	})
	f.completed(id, steps, "1 host-1 lost, 2 host-2 completed")
	if after := f.text(`SELECT count(*) FROM lorayard.samples WHERE job_id = $1 AND attempt = 1`, id); after != before {
		f.t.Errorf("the zombie had %s samples and now has %s", before, after)
	}
}

// An agent alone does not reach the database for longer than lease and patience.
// Its run goes on, and is given away; what it has spooled meanwhile is refused
// when it is back, and its trainer ends.
func TestAnAgentIsCutOffForTooLong(t *testing.T) {
	f := faults(t, dry(160, 100*time.Millisecond)...)
	f.dispatcher("dispatcher")
	proxy := f.wireDatabase()
	cut := f.agent("host-1")
	id := f.job()
	f.until("a checkpoint", `SELECT count(*) > 0 FROM checkpoints WHERE job_id = $1`, id)
	f.agents = nil // the other one reaches it
	f.agent("host-2")
	f.must(proxy.Refuse())
	f.until("attempt 2", `SELECT state = 'accepted' AND attempt = 2 FROM lorayard.jobs WHERE job_id = $1`, id)
	if n := f.trainers(filepath.Join(f.Dir, "host-1")); n != 1 {
		t.Errorf("%d trainers run where the database is away", n)
	}
	before := f.text(`SELECT count(*) FROM lorayard.samples WHERE job_id = $1 AND attempt = 1`, id)
	f.must(proxy.Pass())
	f.eventually("the end of the zombie's trainer", func() bool { return f.trainers(filepath.Join(f.Dir, "host-1")) == 0 })
	f.giveUp(cut, id, 160, before)
}

// A host stands still for longer than its lease, not for its patience: it goes
// on where it was.
func TestAFrozenAgentWakesUpInTime(t *testing.T) {
	f := faults(t, append(dry(80, 100*time.Millisecond), "PATIENCE=1m")...)
	f.dispatcher("dispatcher")
	host := f.agent("host-1")
	id := f.job()
	f.steps(id, 5)
	f.agent("host-2")
	frozen := f.tree(host.PID())
	f.signal(frozen, syscall.SIGSTOP)
	f.until("the end of the lease", `SELECT lease_until < now() - interval '1 second' FROM lorayard.agents WHERE id = 'host-1'`)
	f.signal(frozen, syscall.SIGCONT)
	f.completed(id, 80, "1 host-1 completed")
}

// An agent is restarted twice under a running job, the second time without a
// database, and the trainer never notices: one attempt, every step once, and
// the losses of a run that nobody disturbed.
func TestARestartedAgentAdoptsItsJob(t *testing.T) {
	f := faults(t, dry(150, 100*time.Millisecond)...)
	proxy := f.wireDatabase()
	f.dispatcher("dispatcher")
	f.agent("host-1")
	id, whole := f.job(), f.job()
	f.steps(id, 5)
	boot := f.text(`SELECT boot FROM lorayard.agents`)
	_, err := f.Tell(t.Context(), "host-1", "restart")
	f.must(err)
	if f.text(`SELECT boot FROM lorayard.agents`) == boot {
		t.Fatal("no other process registered")
	}
	f.steps(id, 30)

	f.must(proxy.Refuse())
	boot = f.text(`SELECT boot FROM lorayard.agents`)
	_, err = f.Tell(t.Context(), "host-1", "restart", "--no-wait")
	f.must(err)
	away(lease + patience + 2*time.Second)
	if n := f.trainers(""); n != 2 {
		t.Errorf("%d trainers run on", n)
	}
	f.must(proxy.Pass())
	f.completed(id, 150, "1 host-1 completed")
	if f.text(`SELECT boot FROM lorayard.agents`) == boot {
		t.Error("no other process registered")
	}
	f.completed(whole, 150, "1 host-1 completed")
	f.sameCurve(id, whole)
}

// A cordoned host finishes what it runs and gets nothing; uncordoned it works
// again. A draining one finishes within its time and leaves; what is left at
// the end of that time goes elsewhere from its newest checkpoint.
func TestCordonAndDrain(t *testing.T) {
	f := faults(t, dry(40, 100*time.Millisecond)...)
	f.dispatcher("dispatcher")
	host := f.agent("host-1")
	runs := f.job()
	f.steps(runs, 3)
	f.must(f.operate("cordon", "host-1", "--reason", "a new fan"))
	waits := f.job()
	f.until("words for it", `SELECT waiting <> '' FROM lorayard.jobs WHERE job_id = $1`, waits)
	t.Logf("a job before a cordoned host waits: %s", f.text(`SELECT waiting FROM lorayard.jobs WHERE job_id = $1`, waits))
	f.completed(runs, 40, "1 host-1 completed")
	if got := f.text(`SELECT state FROM lorayard.jobs WHERE job_id = $1`, waits); got != "queued" {
		t.Errorf("a job before a cordoned host is %s", got)
	}
	f.must(f.operate("uncordon", "host-1"))
	f.completed(waits, 40, "1 host-1 completed")

	finishes := f.job()
	f.steps(finishes, 3)
	_, err := f.Tell(t.Context(), "host-1", "drain", "--within", "1m", "--no-wait")
	f.must(err)
	f.agent("host-2", dry(100, 100*time.Millisecond)...)
	leaves := f.job()
	f.steps(leaves, 10)
	f.completed(finishes, 40, "1 host-1 completed")
	f.eventually("the end of the drained agent", func() bool {
		select {
		case <-host.Done():
			return true
		default:
			return false
		}
	})
	f.agent("host-1", dry(100, 100*time.Millisecond)...)
	_, err = f.Tell(t.Context(), "host-2", "drain", "--within", "100ms")
	f.must(err)
	f.completed(leaves, 100, "1 host-2 handed_back, 2 host-1 completed")
	if got := f.text(`SELECT resume_step >= 10 FROM lorayard.attempts WHERE job_id = $1 AND attempt = 2`, leaves); got != "t" {
		t.Error("the handed-back job began anew")
	}
}

// Two hosts with one id: the second is refused in words while the first holds
// its lease, and harms nothing.
func TestTwoAgentsWithOneId(t *testing.T) {
	f := faults(t, dry(90, 100*time.Millisecond)...)
	f.dispatcher("dispatcher")
	first := f.agent("host-1")
	id := f.job()
	f.steps(id, 3)
	other := f.agent("host-2", "AGENT_ID=host-1")
	f.eventually("the end of the second", func() bool {
		select {
		case <-other.Done():
			return true
		default:
			return false
		}
	})
	raw, err := os.ReadFile(other.Log)
	f.must(err)
	if !strings.Contains(string(raw), "is in use on host") || !strings.Contains(string(raw), "give each host an id of its own") {
		t.Errorf("the second agent says:\n%s", raw)
	}
	// On the same directory the second is refused at once.
	_, err = f.stack.Agent(t.Context(), "host-1")
	if err == nil {
		t.Error("two processes run on one data directory")
	}
	f.completed(id, 90, "1 host-1 completed")
	if n := f.accepts(first, "accepted"); n != 1 {
		t.Errorf("%v accepts", n)
	}
}
