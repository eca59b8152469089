package queue

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"lorayard/internal/devstack/services"
)

// asked is a gate over a Redis that answers what it is told, and notes when it
// was asked.
type asked struct {
	gate    *gate
	process redis.ProcessHook
	answer  error
	begin   time.Time
	times   []time.Duration
}

func newAsked(admit func() bool) *asked {
	a := &asked{gate: newGate(defaultMaxWait, admit, isDequeue), begin: time.Now()}
	a.process = a.gate.ProcessHook(func(context.Context, redis.Cmder) error {
		a.times = append(a.times, time.Since(a.begin))
		return a.answer
	})
	return a
}

func (a *asked) dequeue() error { return a.process(context.Background(), dequeueOf("agent:a")) }

func dequeueOf(queue string) redis.Cmder {
	k := "asynq:{" + queue + "}:"
	return redis.NewCmd(context.Background(), "evalsha", "0123", 4, k+"pending", k+"paused", k+"active", k+"lease", 1, k+"t:")
}

func yes() bool { return true }

func TestTheGateLooksAtOnceAfterATaskAndRarelyAfterNone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAsked(yes)
		for range 3 {
			if err := a.dequeue(); err != nil {
				t.Fatal(err)
			}
		}
		a.answer = redis.Nil
		for range 3 {
			if err := a.dequeue(); err != redis.Nil {
				t.Fatalf("got %v, want redis.Nil as Redis said it", err)
			}
		}
		for i, at := range a.times {
			// Three tasks and the first look that finds nothing are at once.
			low, high := time.Duration(0), time.Duration(0)
			if n := time.Duration(i - 3); n > 0 {
				low, high = n*defaultMaxWait*9/10, n*defaultMaxWait*11/10
			}
			if at < low || at > high {
				t.Errorf("look %d came after %s, want %s to %s", i, at, low, high)
			}
		}
	})
}

func TestAWakeUpOpensTheGateOnceHoweverManyCome(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAsked(yes)
		a.answer = redis.Nil
		_ = a.dequeue()
		for range 5 {
			a.gate.wake()
		}
		_ = a.dequeue()
		if at := a.times[1]; at != 0 {
			t.Errorf("the look after a wake-up came %s late", at)
		}
		_ = a.dequeue()
		if at := a.times[2]; at < 4*time.Second {
			t.Errorf("five wake-ups at once made a second look after %s", at)
		}
	})
}

func TestTheGateDoesNotSpinWhenRedisIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAsked(yes)
		a.answer = errors.New("connection refused")
		for time.Since(a.begin) < 10*time.Second {
			if err := a.dequeue(); err != a.answer {
				t.Fatalf("got %v", err)
			}
		}
		if n := len(a.times); n < 25 || n > 82 {
			t.Errorf("%d looks in 10 s, want about 40", n)
		}
	})
}

func TestARefusedTaskCostsNoTraffic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		admit := false
		a := newAsked(func() bool { return admit })
		for range 3 {
			a.gate.wake()
			if err := a.dequeue(); err != redis.Nil {
				t.Fatalf("got %v, want redis.Nil", err)
			}
		}
		if len(a.times) != 0 {
			t.Errorf("Redis was asked %d times", len(a.times))
		}
		if took := time.Since(a.begin); took > 0 {
			t.Errorf("wake-ups were answered after %s", took)
		}
		_ = a.dequeue()
		if took := time.Since(a.begin); took < 4*time.Second {
			t.Errorf("refusing spins: asked again after %s", took)
		}
		admit = true
		a.gate.wake()
		_ = a.dequeue()
		if len(a.times) != 1 {
			t.Error("Redis was not asked although a task may come in again")
		}
	})
}

func TestAReleasedGateHoldsNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAsked(yes)
		a.answer = redis.Nil
		_ = a.dequeue()
		held := make(chan error)
		go func() { held <- a.dequeue() }()
		synctest.Wait()
		a.gate.release()
		if err := <-held; err != redis.Nil {
			t.Errorf("the dequeue that was held got %v", err)
		}
		a.gate.wake()
		a.gate.pause = 0
		if err := a.dequeue(); err != redis.Nil || len(a.times) != 1 || time.Since(a.begin) > 0 {
			t.Errorf("after the release: %v, Redis asked %d times, %s", err, len(a.times), time.Since(a.begin))
		}
	})
}

func TestTheScriptFollowsItsDigestAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAsked(yes)
		a.answer = redis.Nil
		_ = a.dequeue()
		a.gate.wake()
		a.answer = reply("NOSCRIPT No matching script. Please use EVAL.")
		_ = a.dequeue()
		a.answer = nil
		_ = a.dequeue()
		if at := a.times[2]; at != 0 {
			t.Errorf("EVAL came %s after EVALSHA", at)
		}
	})
}

// reply is an error that Redis itself answered with.
type reply string

func (r reply) Error() string { return string(r) }
func (reply) RedisError()     {}

func TestOtherCommandsPassTheGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		k := "asynq:{agent:a}:"
		a := newAsked(func() bool { return false })
		for i, cmd := range []redis.Cmder{
			redis.NewCmd(ctx, "ping"),
			redis.NewCmd(ctx, "evalsha", "0", 4),
			redis.NewCmd(ctx, "evalsha", "0", 3, k+"pending", k+"paused", k+"active"),
			redis.NewCmd(ctx, "evalsha", "0", 4, k+"pending", k+"active", k+"paused", k+"lease"),
			redis.NewCmd(ctx, "evalsha", "0", 4, k+"pending", k+"paused", "asynq:{agent:b}:active", k+"lease"),
			redis.NewCmd(ctx, "evalsha", "0", 4, "other:{agent:a}:pending", "other:{agent:a}:paused", "other:{agent:a}:active", "other:{agent:a}:lease"),
			redis.NewCmd(ctx, "evalsha", "0", 4, 1, 2, 3, 4),
			redis.NewCmd(ctx, "fcall", "f", 4, k+"pending", k+"paused", k+"active", k+"lease"),
		} {
			if err := a.process(ctx, cmd); err != nil || len(a.times) != i+1 {
				t.Errorf("%v was held back", cmd.Args())
			}
		}
	})
}

// tape is a hook that writes down every command, and what came of it.
type tape struct {
	mu   sync.Mutex
	told []told
	news chan struct{}
}

type told struct {
	args    []any
	dequeue bool // to the gate
	task    bool // it brought one
	err     error
}

func (p *tape) DialHook(next redis.DialHook) redis.DialHook { return next }

func (p *tape) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (p *tape) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		v, ok := cmd.(*redis.Cmd)
		p.mu.Lock()
		defer p.mu.Unlock()
		p.told = append(p.told, told{args: cmd.Args(), dequeue: isDequeue(cmd), task: ok && err == nil && v.Val() != nil, err: err})
		select {
		case p.news <- struct{}{}:
		default:
		}
		return err
	}
}

// A new version of Asynq that dequeues otherwise fails here, before the canary
// has to find it in the field.
func TestAsynqDequeuesInTheShapeThatTheGateKnows(t *testing.T) {
	t.Parallel()
	srv := redisServer(t, services.RedisConfig{})
	o, err := options(srv.URL())
	if err != nil {
		t.Fatal(err)
	}
	rdb := redis.NewClient(o)
	defer rdb.Close()
	p := &tape{news: make(chan struct{}, 1)}
	rdb.AddHook(p)
	c := asynq.NewClientFromRedisClient(rdb)
	if _, err := c.Enqueue(asynq.NewTask(acceptTask, []byte("{}")), taskOptions("a", task(1))...); err != nil {
		t.Fatal(err)
	}
	handled := make(chan struct{})
	// As stock as it gets, so that every kind of command shows up.
	as := asynq.NewServerFromRedisClient(rdb, asynq.Config{
		Queues: map[string]int{queueOf("a"): 1}, Concurrency: 1, Logger: logger{discard}, TaskCheckInterval: 10 * time.Millisecond,
		DelayedTaskCheckInterval: 10 * time.Millisecond, JanitorInterval: 10 * time.Millisecond,
	})
	if err := as.Start(asynq.HandlerFunc(func(context.Context, *asynq.Task) error { close(handled); return nil })); err != nil {
		t.Fatal(err)
	}
	within(t, 5*time.Second, handled, "the task was not handled")
	// The dequeue that finds nothing comes after the one that found the task.
	empty := func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return slices.ContainsFunc(p.told, func(c told) bool { return c.dequeue && c.err == redis.Nil })
	}
	for !empty() {
		within(t, 5*time.Second, p.news, "the gate recognised no dequeue of an empty queue")
	}
	as.Shutdown()

	found := false
	for _, c := range p.told {
		args := fmt.Sprint(c.args...)
		if !c.dequeue {
			// Whatever else takes from the pending list would go around the gate.
			if len(c.args) > 3 && c.args[3] == "asynq:{agent:a}:pending" {
				t.Errorf("not recognised, and begins with the pending list: %s", args)
			}
			continue
		}
		found = found || c.task
		if n := len(c.args); n != 9 {
			t.Errorf("the dequeue has %d words, the gate was made for 9: %s", n, args)
		}
		if prefix := c.args[len(c.args)-1]; prefix != "asynq:{agent:a}:t:" {
			t.Errorf("the dequeue ends with %v, the gate was made for the prefix of tasks", prefix)
		}
	}
	if !found {
		t.Error("no dequeue that the gate recognises brought the task")
	}
}
