package queue

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"

	"lorayard/internal/devstack/services"
	"lorayard/internal/job"
)

// TestMain fails when anything outlives the tests. go-redis's prober of a dead
// Redis notices a Close only when it wakes, after up to a second, which is more
// than goleak waits by itself.
func TestMain(m *testing.M) {
	code := m.Run()
	var leak error
	for range 4 {
		if leak = goleak.Find(); leak == nil {
			break
		}
	}
	if code == 0 && leak != nil {
		fmt.Fprintln(os.Stderr, leak)
		code = 1
	}
	os.Exit(code)
}

var discard = slog.New(slog.DiscardHandler)

// seldom is a MaxWait that no test lives to see: what arrives came by a wake-up.
const seldom = time.Hour

func redisServer(t *testing.T, cfg services.RedisConfig) *services.RedisServer {
	t.Helper()
	cfg.Real = true
	srv, err := services.Redis(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := srv.Stop(); err != nil {
			t.Error(err)
		}
	})
	return srv
}

func dial(t *testing.T, url string) *Client {
	t.Helper()
	c, err := Dial(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func task(n int) job.Task {
	return job.Task{Ref: job.Ref{Job: job.ID(fmt.Sprintf("job-%d", n)), Attempt: 1}, Send: 1, Devices: []string{"GPU-0"}}
}

// agent is one that serves in a test; what it is handed comes out of got.
type agent struct {
	got   chan job.Task
	gated chan bool
	stop  func() // ends Serve and waits for it
}

func serveAgent(t *testing.T, url string, change func(*Server)) *agent {
	t.Helper()
	return serveWith(t, url, change, isDequeue)
}

func serveWith(t *testing.T, url string, change func(*Server), recognise func(redis.Cmder) bool) *agent {
	t.Helper()
	a := &agent{got: make(chan job.Task, 1000), gated: make(chan bool, 2)}
	s := Server{
		URL: url, Agent: "a", Concurrency: 4, Log: discard, MaxWait: seldom,
		Accept:     func(_ context.Context, t job.Task) error { a.got <- t; return nil },
		GateActive: func(active bool) { a.gated <- active },
	}
	if change != nil {
		change(&s)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, s, recognise) }()
	a.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(a.stop)
	return a
}

func within[T any](t *testing.T, d time.Duration, ch <-chan T, complaint string) T {
	t.Helper()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case v := <-ch:
		return v
	case <-timer.C:
		t.Fatal(complaint)
		panic("unreachable")
	}
}

func (a *agent) gets(t *testing.T, d time.Duration, want job.Task) {
	t.Helper()
	got := within(t, d, a.got, fmt.Sprintf("%s did not arrive within %s", want.Ref, d))
	if got.Ref != want.Ref || got.Send != want.Send || len(got.Devices) != len(want.Devices) {
		t.Fatalf("got %+v, want %+v", got, want)
	}
}

func (a *agent) hasGate(t *testing.T) {
	t.Helper()
	if !within(t, 10*time.Second, a.gated, "the server did not start") {
		t.Fatal("the gate is not active")
	}
}

func send(t *testing.T, c *Client, tk job.Task) {
	t.Helper()
	if err := c.Send(t.Context(), "a", tk); err != nil {
		t.Fatal(err)
	}
}

// sendUntilTaken sends as the dispatcher does.
func sendUntilTaken(t *testing.T, c *Client, a *agent, tk job.Task) {
	t.Helper()
	for tk.Send = 1; tk.Send < 100; tk.Send++ {
		_ = c.Send(t.Context(), "a", tk)
		select {
		case got := <-a.got:
			if got.Ref == tk.Ref {
				return
			}
		case <-time.After(100 * time.Millisecond):
		}
	}
	t.Fatalf("%s never arrived", tk.Ref)
}

// left is what Redis holds of the agent's tasks: all of it, by list.
func left(t *testing.T, c *Client) string {
	t.Helper()
	k := "asynq:{" + queueOf("a") + "}:"
	var parts []string
	add := func(name string, n int64, err error) {
		if err != nil {
			t.Fatal(err)
		}
		if n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, name))
		}
	}
	for _, list := range []string{"pending", "active"} {
		n, err := c.rdb.LLen(t.Context(), k+list).Result()
		add(list, n, err)
	}
	for _, set := range []string{"lease", "retry", "scheduled", "archived", "completed"} {
		n, err := c.rdb.ZCard(t.Context(), k+set).Result()
		add(set, n, err)
	}
	hashes, err := c.rdb.Keys(t.Context(), k+"t:*").Result()
	add("tasks", int64(len(hashes)), err)
	return strings.Join(parts, ", ")
}

// nothingLeft waits until Redis holds no task; there is no event for it.
func nothingLeft(t *testing.T, c *Client) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		l := left(t, c)
		if l == "" {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("Redis still holds: %s", l)
		}
	}
}

func TestATaskIsHandedOverAndAcknowledged(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	c := dial(t, srv.URL())
	a := serveAgent(t, srv.URL(), nil)
	a.hasGate(t)
	send(t, c, task(1))
	a.gets(t, 2*time.Second, task(1))
	nothingLeft(t, c)
}

func TestARefusedTaskIsGoneToo(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	c := dial(t, srv.URL())
	refused := make(chan struct{}, 1)
	a := serveAgent(t, srv.URL(), func(s *Server) {
		s.Accept = func(context.Context, job.Task) error {
			refused <- struct{}{}
			return errors.New("stale")
		}
	})
	a.hasGate(t)
	send(t, c, task(1))
	within(t, 2*time.Second, refused, "the task did not arrive")
	nothingLeft(t, c) // the dispatcher sends again; a second copy would only be in its way
}

func TestManyTasksWakeEachAgentOnce(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	c := dial(t, srv.URL())
	a := serveAgent(t, srv.URL(), nil)
	a.hasGate(t)
	b := serveAgent(t, srv.URL(), func(s *Server) { s.Agent = "b" })
	b.hasGate(t)
	ears := c.rdb.Subscribe(t.Context(), wakeOf("a"), wakeOf("b"))
	defer ears.Close()
	for range 2 {
		if _, err := ears.Receive(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	var sends []Send
	for n := range 100 {
		sends = append(sends, Send{"a", task(n)}, Send{"b", task(1000 + n)})
	}
	for i, err := range c.SendAll(t.Context(), sends) {
		if err != nil {
			t.Errorf("send %d: %v", i, err)
		}
	}
	seen := map[job.ID]bool{}
	for range 100 {
		seen[within(t, 5*time.Second, a.got, "a task is missing").Ref.Job] = true
		seen[within(t, 5*time.Second, b.got, "a task is missing").Ref.Job] = true
	}
	if len(seen) != 200 {
		t.Errorf("%d different jobs arrived, want 200", len(seen))
	}
	wakes := map[string]int{}
	for {
		msg, err := ears.ReceiveTimeout(t.Context(), 100*time.Millisecond)
		if err != nil {
			break
		}
		wakes[msg.(*redis.Message).Channel]++
	}
	if len(wakes) != 2 || wakes[wakeOf("a")] != 1 || wakes[wakeOf("b")] != 1 {
		t.Errorf("wake-ups: %v, want one each", wakes)
	}
	nothingLeft(t, c)
}

func TestSendAllGivesUpAtTheFirstErrorAndSaysSoForAll(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	c := dial(t, srv.URL())
	if err := srv.Kill(); err != nil {
		t.Fatal(err)
	}
	sends := make([]Send, 500)
	for n := range sends {
		sends[n] = Send{"a", task(n)}
	}
	begin := time.Now()
	errs := c.SendAll(t.Context(), sends)
	if took := time.Since(begin); took > 4*time.Second {
		t.Errorf("took %s", took)
	}
	for i, err := range errs {
		if err == nil {
			t.Fatalf("send %d to a dead Redis went well", i)
		}
	}
}

func TestTheSameSendTwiceIsOneTask(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	c := dial(t, srv.URL())
	for range 3 {
		send(t, c, task(1))
	}
	if l := left(t, c); l != "1 pending, 1 tasks" {
		t.Errorf("Redis holds %s", l)
	}
	again := task(1)
	again.Send = 2
	send(t, c, again)
	if l := left(t, c); l != "2 pending, 2 tasks" {
		t.Errorf("after a re-send Redis holds %s", l)
	}
	// What waited before the agent came needs no wake-up.
	a := serveAgent(t, srv.URL(), nil)
	a.gets(t, 5*time.Second, task(1))
	a.gets(t, time.Second, again)
	nothingLeft(t, c)
}

func TestAnAgentStartsWithoutRedis(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	c := dial(t, srv.URL())
	if err := srv.Kill(); err != nil {
		t.Fatal(err)
	}
	warned := make(chan struct{}, 100)
	a := serveAgent(t, srv.URL(), func(s *Server) { s.Log = slog.New(slog.NewTextHandler(signal(warned), nil)) })
	within(t, 5*time.Second, warned, "nobody was told that Redis is away")
	if err := c.Send(t.Context(), "a", task(1)); err == nil {
		t.Error("a send without Redis went well")
	}
	if err := srv.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	a.hasGate(t)
	sendUntilTaken(t, c, a, task(1))
}

func TestAnAgentLeavesWithoutRedis(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	never := serveAgent(t, srv.URL(), nil)
	never.hasGate(t)
	if err := srv.Kill(); err != nil {
		t.Fatal(err)
	}
	late := serveAgent(t, srv.URL(), nil)
	begin := time.Now()
	late.stop()
	never.stop()
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("two agents took %s to leave", took)
	}
}

// signal is a writer that tells of each write.
type signal chan struct{}

func (s signal) Write(b []byte) (int, error) {
	select {
	case s <- struct{}{}:
	default:
	}
	return len(b), nil
}

func TestTrafficGoesOnAfterAFlush(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	c := dial(t, srv.URL())
	a := serveAgent(t, srv.URL(), nil)
	a.hasGate(t)
	for n := range 60 {
		if n%20 == 10 {
			if err := c.Send(t.Context(), "a", task(1000+n)); err != nil { // it may be lost
				t.Fatal(err)
			}
			if err := srv.FlushAll(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		sendUntilTaken(t, c, a, task(n))
	}
	// Asynq's own tools find the queue again.
	queues, err := asynq.NewInspectorFromRedisClient(c.rdb).Queues()
	if err != nil || len(queues) != 1 || queues[0] != queueOf("a") {
		t.Errorf("queues: %v, %v", queues, err)
	}
}

func TestATaskFromAnOldSnapshotIsRefusedAndGone(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	srv := redisServer(t, services.RedisConfig{Dir: dir, AppendOnly: true})
	c := dial(t, srv.URL())
	send(t, c, task(1))
	snapshot := filepath.Join(t.TempDir(), "snapshot")
	aof := filepath.Join(dir, "appendonlydir")
	if err := os.CopyFS(snapshot, os.DirFS(aof)); err != nil {
		t.Fatal(err)
	}
	// The fence, for which the database stands: each attempt is accepted once.
	accepted, stale := make(chan struct{}, 10), make(chan struct{}, 10)
	var once sync.Once
	a := serveAgent(t, srv.URL(), func(s *Server) {
		s.Accept = func(context.Context, job.Task) error {
			err := errors.New("stale")
			once.Do(func() { err = nil })
			if err != nil {
				stale <- struct{}{}
				return err
			}
			accepted <- struct{}{}
			return nil
		}
	})
	a.hasGate(t)
	within(t, 5*time.Second, accepted, "the task did not arrive")
	nothingLeft(t, c)

	if err := srv.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(aof); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(aof, os.DirFS(snapshot)); err != nil {
		t.Fatal(err)
	}
	if err := srv.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	within(t, 5*time.Second, stale, "the task in the snapshot did not come again: this test tests nothing")
	nothingLeft(t, c)
	if len(accepted) != 0 {
		t.Error("accepted twice")
	}
}

func TestRedisAwayForThreeSecondsDelaysNothingAfterIt(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{AppendOnly: true})
	c := dial(t, srv.URL())
	var asks atomic.Int64
	a := serveAgent(t, srv.URL(), func(s *Server) {
		s.MaxWait = 0
		s.Admit = func() bool { asks.Add(1); return true }
	})
	a.hasGate(t)
	send(t, c, task(1))
	a.gets(t, 2*time.Second, task(1))
	nothingLeft(t, c) // else the kill may come between accept and acknowledgement
	if err := srv.Kill(); err != nil {
		t.Fatal(err)
	}
	before := asks.Load()
	time.Sleep(3 * time.Second) // the outage is the thing under test
	if n := asks.Load() - before; n > 40 {
		t.Errorf("asked %d times in three seconds without Redis", n)
	}
	if err := srv.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	back := time.Now()
	send(t, c, task(2))
	a.gets(t, 5*time.Second, task(2))
	took := time.Since(back)
	t.Logf("accepted %s after Redis was back", took.Round(time.Millisecond))
	if took > 1500*time.Millisecond {
		t.Errorf("accepted %s after Redis was back", took)
	}
	nothingLeft(t, c)
}

func TestALostAcknowledgementIsDeliveredAgainAndNotArchived(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	c := dial(t, srv.URL())
	send(t, c, task(1))
	// An agent fetched it a minute ago and was killed: Asynq's recoverer looks
	// for such tasks when a server starts.
	k := "asynq:{" + queueOf("a") + "}:"
	id, err := c.rdb.LMove(t.Context(), k+"pending", k+"active", "RIGHT", "LEFT").Result()
	if err != nil {
		t.Fatal(err)
	}
	old := float64(time.Now().Add(-time.Minute).Unix())
	if err := c.rdb.ZAdd(t.Context(), k+"lease", redis.Z{Score: old, Member: id}).Err(); err != nil {
		t.Fatal(err)
	}
	serveAgent(t, srv.URL(), nil).hasGate(t)
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		l := left(t, c)
		if l == "1 retry, 1 tasks" { // the forwarder brings it back within a minute
			return
		}
		if strings.Contains(l, "archived") || time.Now().After(end) {
			t.Fatalf("Redis holds: %s", l)
		}
	}
}

func TestASubscriberThatWasResetIsWokenAgain(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	c := dial(t, srv.URL())
	a := serveAgent(t, srv.URL(), nil)
	a.hasGate(t)
	for n := range 5 {
		if err := c.rdb.ClientKillByFilter(t.Context(), "TYPE", "pubsub").Err(); err != nil {
			t.Fatal(err)
		}
		send(t, c, task(n)) // nobody may be listening: subscribing anew is the wake-up
		a.gets(t, 2*time.Second, task(n))
	}
}

func TestASilentSubscriptionIsGivenUp(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	p := newProxy(t, srv.Addr())
	o, err := options(strings.Replace(srv.URL(), srv.Addr(), p.addr(), 1))
	if err != nil {
		t.Fatal(err)
	}
	wakes := make(chan struct{}, 10)
	e := &ears{
		rdb: listener(*o), channel: wakeOf("a"), quiet: 50 * time.Millisecond, log: discard,
		wake: func() { wakes <- struct{}{} }, heard: make(chan struct{}),
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { e.listen(ctx) })
	defer wg.Wait()
	defer cancel()
	within(t, 5*time.Second, wakes, "not subscribed")
	// Signs of life keep a silent subscription: a second one would wake.
	select {
	case <-wakes:
		t.Fatal("a living subscription was given up")
	case <-time.After(400 * time.Millisecond):
	}
	p.swallow()
	within(t, 5*time.Second, wakes, "a dead subscription was kept")
}

// proxy passes bytes on, until the connections it has are swallowed: they stay
// open and nothing comes through any more, as behind a firewall that forgot
// them. New ones work.
type proxy struct {
	l    net.Listener
	mu   sync.Mutex
	gone []*atomic.Bool
}

func newProxy(t *testing.T, to string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{l: l}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp4", to)
			if err != nil {
				in.Close()
				continue
			}
			gone := new(atomic.Bool)
			p.mu.Lock()
			p.gone = append(p.gone, gone)
			p.mu.Unlock()
			t.Cleanup(func() { in.Close(); out.Close() })
			wg.Go(func() { _, _ = io.Copy(sieve{out, gone}, in) })
			wg.Go(func() { _, _ = io.Copy(sieve{in, gone}, out) })
		}
	})
	t.Cleanup(func() { l.Close() })
	return p
}

func (p *proxy) addr() string { return p.l.Addr().String() }

func (p *proxy) swallow() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, g := range p.gone {
		g.Store(true)
	}
}

type sieve struct {
	net.Conn
	gone *atomic.Bool
}

func (s sieve) Write(b []byte) (int, error) {
	if s.gone.Load() {
		return len(b), nil
	}
	return s.Conn.Write(b)
}

func TestATaskThatIsNotOursIsDropped(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	c := dial(t, srv.URL())
	for i, at := range []*asynq.Task{
		asynq.NewTask(acceptTask, []byte("not JSON")),
		asynq.NewTask(acceptTask, []byte(`{"ref":{}}`)),
		asynq.NewTask("someone:else", []byte(`{"ref":{"job":"job-1","attempt":1}}`)),
	} {
		if _, err := c.asynq.Enqueue(at, taskOptions("a", task(i))...); err != nil {
			t.Fatal(err)
		}
	}
	a := serveAgent(t, srv.URL(), nil)
	a.hasGate(t)
	nothingLeft(t, c)
	if len(a.got) != 0 {
		t.Errorf("accepted %+v", <-a.got)
	}
}

func TestADrainingAgentFetchesNothing(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	c := dial(t, srv.URL())
	var takes atomic.Bool
	asks := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	a := serveAgent(t, srv.URL(), func(s *Server) {
		s.Admit = func() bool {
			select {
			case asks <- struct{}{}:
			case <-ctx.Done():
			}
			return takes.Load()
		}
	})
	for n := range 5 {
		send(t, c, task(n))
		within(t, 5*time.Second, asks, "the agent was not asked whether it takes a task")
	}
	cancel()
	if l := left(t, c); l != "5 pending, 5 tasks" {
		t.Errorf("Redis holds %s", l)
	}
	takes.Store(true)
	send(t, c, task(5))
	for range 6 {
		within(t, 5*time.Second, a.got, "a task of before was not fetched afterwards")
	}
}

func TestAnIdleAgentLeavesAtOnce(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	a := serveAgent(t, srv.URL(), func(s *Server) { s.MaxWait = 0 })
	a.hasGate(t)
	begin := time.Now()
	a.stop()
	took := time.Since(begin)
	t.Logf("left within %s", took.Round(time.Millisecond))
	if took > time.Second {
		t.Errorf("took %s", took)
	}
}

func TestAnUnknownAsynqIsPolled(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	c := dial(t, srv.URL())
	warned := make(chan struct{}, 1)
	a := serveWith(t, srv.URL(), func(s *Server) { s.Log = slog.New(slog.NewTextHandler(signal(warned), nil)) },
		func(redis.Cmder) bool { return false })
	if within(t, canaryWait+5*time.Second, a.gated, "the canary did not sing") {
		t.Fatal("the gate calls itself active without having seen a dequeue")
	}
	within(t, time.Second, warned, "nobody was told")
	send(t, c, task(1))
	a.gets(t, 2*time.Second, task(1))
	nothingLeft(t, c)
}

func TestAForgottenAgentLeavesNothingAndMayReturn(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	c := dial(t, srv.URL())
	a := serveAgent(t, srv.URL(), nil)
	a.hasGate(t)
	send(t, c, task(1))
	a.gets(t, 2*time.Second, task(1))
	nothingLeft(t, c)
	a.stop()
	// It died with one task under way and one waiting.
	send(t, c, task(2))
	send(t, c, task(3))
	if err := c.rdb.LMove(t.Context(), "asynq:{agent:a}:pending", "asynq:{agent:a}:active", "RIGHT", "LEFT").Err(); err != nil {
		t.Fatal(err)
	}
	if err := c.Send(t.Context(), "ab", task(4)); err != nil { // somebody else, of nearly the same name
		t.Fatal(err)
	}
	if err := c.Forget(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	keys, err := c.rdb.Keys(t.Context(), "asynq:{agent:a}:*").Result()
	if err != nil || len(keys) != 0 {
		t.Errorf("left behind: %v, %v", keys, err)
	}
	if queues := c.rdb.SMembers(t.Context(), allQueues).Val(); len(queues) != 1 || queues[0] != queueOf("ab") {
		t.Errorf("queues: %v", queues)
	}
	if err := c.Forget(t.Context(), "a*"); err != nil { // a name, not a pattern
		t.Fatal(err)
	}
	if n := c.rdb.LLen(t.Context(), "asynq:{agent:ab}:pending").Val(); n != 1 {
		t.Error("another agent's task is gone")
	}
	send(t, c, task(5))
	if !c.rdb.SIsMember(t.Context(), allQueues, queueOf("a")).Val() {
		t.Error("the agent that returned is not listed")
	}
	back := serveAgent(t, srv.URL(), nil)
	back.gets(t, 5*time.Second, task(5))
}

func TestASecretNeverStandsInAnError(t *testing.T) {
	t.Parallel()
	for _, url := range []string{"redis://:hunter2@[bad/0", "mysql://:hunter2@host/0", "redis://:hunter2@host:6379/zero"} {
		_, err := Dial(url)
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%v", err)
		}
		if err := Serve(t.Context(), Server{URL: url}); err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%v", err)
		}
	}
}
