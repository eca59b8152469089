package queue

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// gate makes Asynq, which can only poll, fetch a task when there is one. It is
// a hook of the go-redis client under Asynq's server: it holds the dequeue
// script back, without a connection, until there is a reason to let it through.
//
//	Asynq's processor ── dequeue ──► gate ──────────► Redis
//	   ▲    (1 ms later, again)       ▲ │ refused: "nothing there", no traffic
//	   └──────────────────────────────┼─┘
//	              wake: PUBLISH after an enqueue, a subscription that came (back)
//	              or maxWait is over, or the last dequeue brought a task
type gate struct {
	maxWait   time.Duration          // between dequeues that nobody asked for
	admit     func() bool            // may a task come in now?
	recognise func(redis.Cmder) bool // is this the dequeue script?

	wakes chan struct{} // one slot: any number of wake-ups mean one look
	quit  chan struct{} // closed by release
	seen  chan struct{} // closed by the first dequeue: the canary
	first sync.Once

	// pause is before the next dequeue; 0 lets it through at once. Asynq has
	// one processor goroutine, and only that one dequeues.
	pause time.Duration
}

func newGate(maxWait time.Duration, admit func() bool, recognise func(redis.Cmder) bool) *gate {
	return &gate{
		maxWait: maxWait, admit: admit, recognise: recognise,
		wakes: make(chan struct{}, 1), quit: make(chan struct{}), seen: make(chan struct{}),
	}
}

// wake lets the next dequeue through.
func (g *gate) wake() {
	select {
	case g.wakes <- struct{}{}:
	default: // one is due already
	}
}

// release opens the gate for good: every dequeue is answered with "nothing
// there" at once. Asynq's Shutdown waits for the dequeue under way, so this
// comes before it. It must be called once.
func (g *gate) release() { close(g.quit) }

// DialHook lets dialling alone.
func (g *gate) DialHook(next redis.DialHook) redis.DialHook { return next }

// ProcessPipelineHook lets pipelines alone: the dequeue is a single command.
func (g *gate) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// ProcessHook holds the dequeue back and lets everything else pass.
func (g *gate) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if !g.recognise(cmd) {
			return next(ctx, cmd)
		}
		g.first.Do(func() { close(g.seen) })
		if !g.wait() || !g.admit() {
			// The answer that Asynq takes for an empty queue.
			g.pause = jitter(g.maxWait, 0.1)
			cmd.SetErr(redis.Nil)
			return redis.Nil
		}
		err := next(ctx, cmd)
		switch {
		case err == nil: // a task: there may be more
			g.pause = 0
		case err == redis.Nil:
			g.pause = jitter(g.maxWait, 0.1)
		case redis.HasErrorPrefix(err, "NOSCRIPT"): // the script itself follows
			g.pause = 0
		default:
			g.pause = jitter(errorPause, 0.5)
		}
		return err
	}
}

// wait returns true when it is time to dequeue, and false when the gate was
// released.
func (g *gate) wait() bool {
	if g.pause == 0 {
		select {
		case <-g.quit:
			return false
		default:
			return true
		}
	}
	t := time.NewTimer(g.pause)
	defer t.Stop()
	select {
	case <-g.quit:
		return false
	case <-g.wakes:
	case <-t.C:
	}
	return true
}

// isDequeue recognises Asynq's dequeue by its shape: a script on the keys
// asynq:{queue}:pending, paused, active and lease, in this order. The shape is
// internal to Asynq; TestAsynqDequeuesInTheShapeThatTheGateKnows fails when it
// changes, and the canary in Serve polls instead.
func isDequeue(cmd redis.Cmder) bool {
	if n := cmd.Name(); n != "evalsha" && n != "eval" {
		return false
	}
	args := cmd.Args() // name, script or its digest, number of keys, keys, arguments
	if len(args) < 7 || fmt.Sprint(args[2]) != "4" {
		return false
	}
	first, ok := args[3].(string)
	if !ok {
		return false
	}
	prefix, ok := strings.CutSuffix(first, "}:pending")
	if !ok || !strings.HasPrefix(prefix, "asynq:{") {
		return false
	}
	for i, name := range []string{"paused", "active", "lease"} {
		if args[4+i] != prefix+"}:"+name {
			return false
		}
	}
	return true
}
