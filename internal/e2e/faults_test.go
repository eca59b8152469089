package e2e_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"lorayard/internal/devstack"
	"lorayard/internal/devstack/services"
	"lorayard/internal/job"
	"lorayard/internal/queue"
	"lorayard/internal/storetest"
)

// The tests of faults: the real binaries, each test on a database and a
// redis-server of its own, with a proxy in front of both where the network is
// what fails. After each of them every invariant holds, nothing is left to be
// settled, and the files of every artifact are in Storage.

// faulty is a stack for such a test.
type faulty struct {
	*stack
	user, data string
	// Settings that lead the parts started later through proxies.
	dispatchers, agents []string
	wires               []*services.FaultProxy
}

// Times of the faults: long enough that a machine with other things to do loses
// nothing that it should keep, short enough to wait for. What must be away for
// too long is away for longer than lease and patience, and the windows in which
// a task is accepted.
const (
	lease    = 3 * time.Second
	patience = 2 * time.Second
	tooLong  = 10 * time.Second
)

// faults starts a stack on the shared cluster, with one data set.
func faults(t *testing.T, settings ...string) *faulty {
	t.Helper()
	t.Parallel()
	python(t) // skips before anything is started
	return faultsOn(t, storetest.New(t).URL, settings...)
}

func faultsOn(t *testing.T, database string, settings ...string) *faulty {
	t.Helper()
	f := &faulty{}
	t.Cleanup(func() { // after the stack has ended
		for _, p := range f.wires {
			p.Close()
		}
	})
	f.stack = startOn(t, database, append([]string{
		"LEASE=" + lease.String(), "PATIENCE=" + patience.String(), "RENEW=500ms", "ACCEPT=3s", "RESEND=500ms", "LEADER_TERM=2s", "CHECKPOINT_EVERY=500ms",
	}, settings...)...)
	t.Cleanup(func() { // before the stack ends, which is to be undisturbed
		for _, p := range f.wires {
			p.Latency(0)
			f.must(p.Pass())
		}
		if t.Failed() {
			return
		}
		storetest.CheckSettled(t, f.Pool)
		f.artifacts()
		if n := f.trainers(""); n != 0 {
			t.Errorf("%d trainers are left", n)
		}
	})
	f.fakeModel()
	f.user, f.data = f.dataset(f.write("talks.jsonl", strings.Repeat(oneTalk, 20)))
	return f
}

// wire puts a proxy before a server.
func (f *faulty) wire(target string) *services.FaultProxy {
	f.t.Helper()
	p, err := services.Proxy(target)
	f.must(err)
	f.wires = append(f.wires, p)
	return p
}

// wireDatabase puts a proxy between the database and every part started later.
func (f *faulty) wireDatabase() *services.FaultProxy {
	f.t.Helper()
	c := f.Pool.Config().ConnConfig
	p := f.wire(fmt.Sprintf("%s:%d", c.Host, c.Port))
	f.dispatchers = append(f.dispatchers, "DATABASE_URL="+f.DatabaseAt(p.Addr()))
	f.agents = append(f.agents, "DATABASE_URL="+f.AgentDatabaseAt(p.Addr()))
	return p
}

// wireRedis is the like for Redis.
func (f *faulty) wireRedis() *services.FaultProxy {
	f.t.Helper()
	p := f.wire(f.Redis.Addr())
	f.dispatchers = append(f.dispatchers, "REDIS_URL="+f.RedisAt(p.Addr()))
	f.agents = append(f.agents, "REDIS_URL="+f.RedisAt(p.Addr()))
	return p
}

func (f *faulty) dispatcher(name string, settings ...string) *devstack.Process {
	f.t.Helper()
	return f.stack.dispatcher(name, slices.Concat(f.dispatchers, settings)...)
}

func (f *faulty) agent(id string, settings ...string) *devstack.Process {
	f.t.Helper()
	return f.stack.agent(id, slices.Concat(f.agents, settings)...)
}

func (f *faulty) job() string {
	f.t.Helper()
	return f.insert(f.user, f.data, nil)
}

// steps waits until a job has trained so many steps.
func (f *faulty) steps(id string, n int) {
	f.t.Helper()
	f.until(fmt.Sprintf("step %d", n), `SELECT coalesce(max(step), 0) >= $2::int FROM lorayard.samples WHERE job_id = $1`, id, n)
}

// attempts is what became of each attempt of a job that was accepted.
func (f *faulty) attempts(id string) string {
	f.t.Helper()
	return f.text(`SELECT string_agg(attempt || ' ' || agent_id || ' ' || coalesce(outcome, 'open'), ', ' ORDER BY attempt) FROM lorayard.attempts WHERE job_id = $1 AND accepted_at IS NOT NULL`, id)
}

// completed waits for a job, and asks for one bill, one artifact, one of each
// notification, every step from the first to the last, and for these attempts.
func (f *faulty) completed(id string, steps int, attempts string) {
	f.t.Helper()
	f.status(id, "completed")
	if got := f.attempts(id); got != attempts {
		f.t.Errorf("attempts: %s; want %s", got, attempts)
	}
	got := f.text(`SELECT format('steps %s to %s, %s in all; %s artifact, %s bill, %s notifications',
		(SELECT min(step) FROM lorayard.samples WHERE job_id = $1), (SELECT max(step) FROM lorayard.samples WHERE job_id = $1),
		(SELECT count(DISTINCT step) FROM lorayard.samples WHERE job_id = $1), (SELECT count(*) FROM model_artifacts WHERE job_id = $1),
		(SELECT count(*) FROM cost_records WHERE job_id = $1), (SELECT count(*) FROM notifications WHERE metadata ->> 'job_id' = $1))`, id)
	if want := fmt.Sprintf("steps 1 to %d, %d in all; 1 artifact, 1 bill, 3 notifications", steps, steps); got != want {
		f.t.Errorf("%s; want %s", got, want)
	}
	// One attempt has each step once. The trainer's own count is the spool's.
	if !strings.Contains(attempts, ",") {
		if n := f.text(`SELECT count(*) FROM lorayard.samples WHERE job_id = $1 AND validation_loss IS NULL`, id); n != strconv.Itoa(steps) {
			f.t.Errorf("%s samples of %d steps", n, steps)
		}
	}
}

// artifacts reads every file of every artifact from Storage and compares it
// with its recorded digest.
func (f *faulty) artifacts() {
	f.t.Helper()
	rows, err := f.Pool.Query(context.Background(), `SELECT a.value, f ->> 'sha256' FROM model_artifacts m, jsonb_each_text(m.artifacts) a, jsonb_array_elements(m.training_summary -> 'files') f
		WHERE f ->> 'name' = a.key`)
	f.must(err)
	type file struct{ Path, SHA256 string }
	files, err := pgx.CollectRows(rows, pgx.RowToStructByPos[file])
	f.must(err)
	for i, x := range files {
		if _, err := f.Store.Download(context.Background(), "lora-models", x.Path, filepath.Join(f.t.TempDir(), strconv.Itoa(i)), x.SHA256); err != nil {
			f.t.Error(err)
		}
	}
}

// trainers counts the trainers of this stack whose command line has the word.
func (f *faulty) trainers(word string) int { return f.processes(f.Dir, "lora_train", word) }

// processes counts those whose command line has all the words, without shims,
// which name their child.
func (f *faulty) processes(words ...string) (n int) {
	f.t.Helper()
	found, err := filepath.Glob("/proc/[0-9]*/cmdline")
	f.must(err)
next:
	for _, path := range found {
		raw, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		for _, w := range words {
			if !strings.Contains(string(raw), w) || strings.Contains(string(raw), "\x00shim\x00") {
				continue next
			}
		}
		n++
	}
	return n
}

// eventually waits for something outside of the database.
func (f *faulty) eventually(what string, so func() bool) {
	f.t.Helper()
	for deadline := time.Now().Add(time.Minute); !so(); time.Sleep(20 * time.Millisecond) { // a poll of the outside
		if time.Now().After(deadline) {
			f.t.Fatalf("%s did not happen", what)
		}
	}
}

// metric is one number of a part's /metrics; 0 where it is not there.
func (f *faulty) metric(p *devstack.Process, name string) float64 {
	f.t.Helper()
	text, err := p.Metrics()
	f.must(err)
	m := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(name) + ` (\S+)$`).FindStringSubmatch(text)
	if m == nil {
		return 0
	}
	v, err := strconv.ParseFloat(m[1], 64)
	f.must(err)
	return v
}

// accepts is how many tasks an agent got, by what came of them.
func (f *faulty) accepts(p *devstack.Process, result string) float64 {
	f.t.Helper()
	return f.metric(p, `lorayard_agent_accepts_total{result="`+result+`"}`)
}

// away lets a fault last.
func away(d time.Duration) { time.Sleep(d) } // the fault is the time

func TestRedisIsFlushedInTraffic(t *testing.T) {
	f := faults(t, dry(4, 20*time.Millisecond)...)
	f.dispatcher("dispatcher")
	f.agent("host-1")
	f.agent("host-2")
	stop, flushed := make(chan struct{}), make(chan error, 1)
	var flushes int
	go func() {
		for {
			select {
			case <-stop:
				flushed <- nil
				return
			case <-time.After(20 * time.Millisecond):
				if err := f.Redis.FlushAll(context.Background()); err != nil {
					flushed <- err
					return
				}
				flushes++
			}
		}
	}()
	var ids []string
	for range 16 {
		ids = append(ids, f.job())
	}
	for _, id := range ids {
		f.status(id, "completed")
	}
	close(stop)
	f.must(<-flushed)
	t.Logf("%d flushes; %s attempts for %d jobs", flushes, f.text(`SELECT count(*) FROM lorayard.attempts`), len(ids))
	for _, id := range ids {
		if got := f.text(`SELECT count(*) FROM lorayard.attempts WHERE job_id = $1 AND accepted_at IS NOT NULL`, id); got != "1" {
			t.Errorf("job %s was accepted %s times", id, got)
		}
	}
}

// Redis is away for longer than a lease with its patience, and than the window
// of an accept: what runs does not notice, what is inserted waits.
func TestRedisIsAwayForLong(t *testing.T) {
	f := faults(t, dry(200, 100*time.Millisecond)...)
	f.dispatcher("dispatcher")
	f.agent("host-1")
	id := f.job()
	f.steps(id, 5)
	f.must(f.Redis.Kill())
	late := f.insert(f.user, f.data, nil)
	f.until("an assignment that cannot be sent", `SELECT state = 'assigned' FROM lorayard.jobs WHERE job_id = $1`, late)
	away(tooLong)
	if got := f.text(`SELECT state || ' ' || attempt FROM lorayard.jobs WHERE job_id = $1`, id); got != "accepted 1" {
		t.Errorf("the running job without Redis: %s", got)
	}
	f.must(f.Redis.Restart(t.Context()))
	f.until("the hand-over of what waited", `SELECT state = 'accepted' FROM lorayard.jobs WHERE job_id = $1`, late)
	f.must2(f.Cancel(t.Context(), f.user, late))
	f.completed(id, 200, "1 host-1 completed")
	f.status(late, "cancelled")
}

// must2 is must for a call that also says whether it did anything.
func (s *stack) must2(done bool, err error) {
	s.t.Helper()
	s.must(err)
	if !done {
		s.t.Fatal("nothing was done")
	}
}

// A Redis that comes back from an old snapshot brings tasks of attempts that
// are over. They are refused.
func TestRedisComesBackFromAnOldSnapshot(t *testing.T) {
	f := faults(t, dry(10, 50*time.Millisecond)...)
	proxy := f.wireRedis()
	f.dispatchers = nil // it reaches Redis directly
	f.dispatcher("dispatcher")
	host := f.agent("host-1")
	first := f.job()
	f.completed(first, 10, "1 host-1 completed")

	// The tasks of the next one stay in Redis for as long as its agent does not
	// reach it.
	f.must(proxy.Refuse())
	id := f.job()
	f.until("a second send", `SELECT send >= 2 FROM lorayard.jobs WHERE job_id = $1`, id)
	old, err := f.Redis.Snapshot()
	f.must(err)
	f.must(proxy.Pass())
	f.status(id, "completed")
	before := f.text(`SELECT string_agg(row_to_json(j)::text, ' ' ORDER BY job_id) FROM lorayard.jobs j`) + f.attempts(id)
	stale := f.accepts(host, "stale")
	f.must(f.Redis.Restore(t.Context(), old))
	f.eventually("the refusal of an old task", func() bool { return f.accepts(host, "stale") > stale })
	last := f.job()
	f.completed(last, 10, "1 host-1 completed")
	if got := f.text(`SELECT string_agg(row_to_json(j)::text, ' ' ORDER BY job_id) FROM lorayard.jobs j WHERE job_id <> $1`, last) + f.attempts(id); got != before {
		t.Errorf("old tasks changed %s to %s", before, got)
	}
}

// Redis's connections go dead without a word: nothing is refused, nothing
// answers. What runs does not notice; what waits is handed over afterwards.
func TestRedisVanishesWithoutAWord(t *testing.T) {
	f := faults(t, dry(120, 100*time.Millisecond)...)
	proxy := f.wireRedis()
	f.dispatcher("dispatcher")
	f.agent("host-1")
	id := f.job()
	f.steps(id, 5)
	f.must(proxy.Blackhole())
	late := f.job()
	away(lease + patience + time.Second)
	if got := f.text(`SELECT state || ' ' || attempt FROM lorayard.jobs WHERE job_id = $1`, id); got != "accepted 1" {
		t.Errorf("the running job without Redis: %s", got)
	}
	f.must(proxy.Pass())
	f.until("the hand-over of what waited", `SELECT state = 'accepted' FROM lorayard.jobs WHERE job_id = $1`, late)
	f.must2(f.Cancel(t.Context(), f.user, late))
	f.completed(id, 120, "1 host-1 completed")
	f.status(late, "cancelled")
}

// Postgres is restarted, and later stands still for longer than lease and
// patience, under two running jobs. A cluster of its own: the others need theirs.
func TestPostgresIsRestartedAndStandsStill(t *testing.T) {
	t.Parallel()
	python(t)
	f := faultsOn(t, "", dry(200, 100*time.Millisecond)...)
	f.dispatcher("dispatcher")
	f.agent("host-1")
	ids := []string{f.job(), f.job()}
	for _, id := range ids {
		f.steps(id, 5)
	}
	f.must(f.PG.Restart(t.Context()))
	f.Pool.Reset()
	for _, id := range ids {
		f.steps(id, 60) // connections are made anew
	}
	f.must(f.PG.Freeze())
	away(lease + patience + 2*time.Second)
	f.must(f.PG.Thaw())
	for _, id := range ids {
		f.completed(id, 200, "1 host-1 completed")
	}
}

// Postgres is away for several times lease and patience. Every run trains on
// and spools, none is given away, and what was said is written once, in order.
// One job ends meanwhile, another is begun by nobody.
func TestPostgresIsAwayForLong(t *testing.T) {
	for name, fail := range map[string]func(*services.FaultProxy) error{
		"refusing": (*services.FaultProxy).Refuse, // the server's process is gone
		"silent":   (*services.FaultProxy).Blackhole,
	} {
		t.Run(name, func(t *testing.T) {
			f := faults(t)
			proxy := f.wireDatabase()
			f.dispatcher("dispatcher")
			f.agent("host-1", dry(200, 100*time.Millisecond)...)
			long := f.job()
			f.steps(long, 5)
			f.must(f.operate("cordon", "host-1"))
			f.agent("host-2", dry(40, 100*time.Millisecond)...)
			short := f.job()
			f.steps(short, 5)

			f.must(fail(proxy))
			queued := f.job()
			if n := f.text(`SELECT count(*) FROM lorayard.jobs WHERE state = 'accepted'`); n != "2" {
				t.Fatalf("%s jobs run", n)
			}
			before := f.text(`SELECT max(step) FROM lorayard.samples WHERE job_id = $1`, long)
			away(tooLong)
			if n := f.text(`SELECT count(*) FROM lorayard.samples WHERE job_id = $1 AND step > $2::int + 10`, long, before); n != "0" {
				t.Errorf("%s samples came through an outage", n)
			}
			if n := f.trainers(long); n != 1 {
				t.Errorf("%d trainers run on", n)
			}
			f.must(proxy.Pass())
			f.completed(short, 40, "1 host-2 completed")
			f.completed(long, 200, "1 host-1 completed")
			f.completed(queued, 40, "1 host-2 completed")
		})
	}
}

func (s *stack) operate(args ...string) error {
	_, err := s.Operate(s.t.Context(), args...)
	return err
}

// Every connection of an agent goes dead without a word, and new ones work: a
// firewall has forgotten them. The lease is kept on a new one, long before
// anybody loses patience.
func TestForgottenConnectionsAreReplaced(t *testing.T) {
	f := faults(t, append(dry(110, 100*time.Millisecond), "PATIENCE=5s")...)
	f.dispatcher("dispatcher")
	proxy := f.wireDatabase()
	f.agent("host-1")
	id := f.job()
	f.steps(id, 3)
	f.must(proxy.Blackhole())
	away(time.Second) // every connection has something to say by now
	f.must(proxy.Pass())
	f.completed(id, 110, "1 host-1 completed")
}

// Connections to Postgres are cut one by one all the time, then every answer
// takes long: jobs are run as ever.
func TestPostgresIsCutAndSlow(t *testing.T) {
	f := faults(t, append(dry(50, 50*time.Millisecond), "LEASE=10s", "LEADER_TERM=3s")...)
	proxy := f.wireDatabase()
	f.dispatcher("dispatcher")
	f.agent("host-1")
	ctx, stop := context.WithCancel(t.Context())
	var cuts int
	var cutter sync.WaitGroup
	cutter.Go(func() {
		for ctx.Err() == nil {
			cuts += proxy.CloseOneByOne(ctx, 150*time.Millisecond)
			if proxy.ResetOne() {
				cuts++
			}
			away(50 * time.Millisecond)
		}
	})
	var ids []string
	for range 2 {
		ids = append(ids, f.job())
	}
	for _, id := range ids {
		// An attempt whose accept was cut off may go back to the queue.
		f.status(id, "completed")
		f.completed(id, 50, f.text(`SELECT attempt FROM lorayard.jobs WHERE job_id = $1`, id)+" host-1 completed")
	}
	stop()
	cutter.Wait()
	t.Logf("%d connections cut", cuts)
	if cuts < 10 {
		t.Errorf("only %d connections were cut", cuts)
	}
	proxy.Latency(100 * time.Millisecond) // each way
	id := f.job()
	f.completed(id, 50, "1 host-1 completed")
}

// Tasks come twice, late, to the wrong agent, of attempts that never were: each
// is refused and changes nothing.
func TestDoubledAndLateTasksChangeNothing(t *testing.T) {
	f := faults(t)
	f.dispatcher("dispatcher")
	first := f.agent("host-1", append(dry(10_000, 100*time.Millisecond), "PRETEND_GPUS=2")...)
	id := f.job()
	f.steps(id, 3)
	f.must(f.operate("cordon", "host-1"))
	second := f.agent("host-2", append(dry(5, 20*time.Millisecond), "PRETEND_GPUS=1")...)
	over := f.job()
	f.completed(over, 5, "1 host-2 completed")
	q, err := queue.Dial(f.RedisURL)
	f.must(err)
	defer q.Close()
	mine := strings.Trim(f.text(`SELECT array_to_string(devices, ',') FROM lorayard.jobs WHERE job_id = $1`, id), "{}")
	free := f.text(`SELECT uuid FROM lorayard.devices WHERE agent_id = 'host-1' AND uuid <> $1`, mine)
	others := f.text(`SELECT uuid FROM lorayard.devices WHERE agent_id = 'host-2'`)
	stands := func() string {
		return f.text(`SELECT string_agg(row_to_json(j)::text, ' ' ORDER BY job_id) || (SELECT json_agg((a.job_id, a.attempt, a.nonce, a.agent_id, a.outcome) ORDER BY job_id, attempt)::text FROM lorayard.attempts a) FROM lorayard.jobs j`)
	}
	refusals := func() float64 {
		n := 0.0
		for _, p := range []*devstack.Process{first, second} {
			for _, r := range []string{"stale", "refused", "error"} {
				n += f.accepts(p, r)
			}
		}
		return n
	}
	before := stands()
	for i, x := range []struct {
		agent, job string
		attempt    int
		device     string
	}{
		{"host-1", id, 1, mine},   // the very attempt that runs, again
		{"host-1", id, 1, free},   // with a device that is free
		{"host-2", id, 1, others}, // elsewhere
		{"host-1", id, 2, free},   // one that was never assigned
		{"host-2", id, 0, others},
		{"host-2", over, 1, others}, // late
		{"host-1", over, 1, free},
		{"host-2", over, 2, others},
	} {
		had := refusals()
		// Each with a send count of its own: Redis refuses to hold a task twice.
		f.must(q.Send(t.Context(), x.agent, job.Task{Ref: job.Ref{Job: job.ID(x.job), Attempt: x.attempt}, Send: 100 + i, Devices: []string{x.device}}))
		f.eventually("a refusal", func() bool { return refusals() > had })
		if got := stands(); got != before {
			t.Fatalf("task %d for %s changed %s to %s", i, x.agent, before, got)
		}
	}
	if n := f.trainers(""); n != 1 {
		t.Errorf("%d trainers run", n)
	}
	if n := f.accepts(first, "accepted") + f.accepts(second, "accepted"); n != 2 {
		t.Errorf("%v accepts", n)
	}
	f.must2(f.Cancel(t.Context(), f.user, id))
	f.status(id, "cancelled")
}

// Many jobs are cancelled around the moment of their completion. Each ends as
// one or the other, as the app was told, and is billed accordingly.
func TestCancelsRaceCompletions(t *testing.T) {
	f := faults(t, append(dry(3, 10*time.Millisecond), "PRETEND_GPUS=4")...)
	f.dispatcher("dispatcher")
	f.agent("host-1")
	const n = 24
	won := make([]bool, n) // the app was told that the job is cancelled
	ids := make([]string, n)
	for i := range ids {
		ids[i] = f.job()
	}
	var racers sync.WaitGroup
	for i, id := range ids {
		racers.Go(func() {
			// Near the end of the path, each at a moment of its own.
			at := []string{"training", "saving", "uploading"}[i%3]
			for {
				var stage, status string
				if err := f.Pool.QueryRow(context.Background(), `SELECT current_stage, status FROM training_jobs WHERE id = $1`, id).Scan(&stage, &status); err != nil || stage == at || job.Status(status).Final() {
					break
				}
				away(2 * time.Millisecond)
			}
			away(rand.N(40 * time.Millisecond))
			// An error is the database's own refusal: the status is final.
			done, err := f.Cancel(context.Background(), f.user, id)
			won[i] = done && err == nil
		})
	}
	racers.Wait()
	ends := map[string]int{}
	for i, id := range ids {
		want := map[bool]string{true: "cancelled", false: "completed"}[won[i]]
		f.status(id, want)
		ends[want]++
		if got := f.text(`SELECT (SELECT count(*) FROM model_artifacts WHERE job_id = $1) || ' ' || (SELECT count(*) FROM notifications WHERE metadata ->> 'job_id' = $1 AND type = 'job_completed')`, id); got != map[bool]string{true: "0 0", false: "1 1"}[won[i]] {
			t.Errorf("a %s job has artifacts, notifications: %s", want, got)
		}
	}
	t.Logf("%v", ends)
	if ends["cancelled"] == 0 {
		t.Error("nothing was cancelled")
	}
}
