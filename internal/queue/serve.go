package queue

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"lorayard/internal/job"
)

// Server is an agent's end of the hand-over.
type Server struct {
	URL   string // redis:// or rediss://
	Agent string
	// Concurrency is how many accepts may be under way at once.
	Concurrency int
	Log         *slog.Logger
	// Admit says whether a task may come in now; nil: always. While it says no,
	// nothing is fetched and Redis is not asked (an Asynq that has to be polled
	// fetches all the same, so Accept judges too). It is called before each fetch
	// and must not block.
	Admit func() bool
	// Accept gets each task. It must return within moments: a run never lives
	// inside a task. What it returns is logged and the task is gone, because the
	// dispatcher sends again what was not accepted.
	Accept func(context.Context, job.Task) error
	// GateActive, if not nil, is told once whether tasks come by wake-up (true)
	// or by polling because Asynq changed (false).
	GateActive func(bool)
	// MaxWait is how often the queue is looked into without a wake-up, give or
	// take a tenth; 0: 5 s.
	MaxWait time.Duration
}

// Serve hands the agent's tasks to s.Accept until ctx ends. Redis may be away
// at the start and at any time after it.
func Serve(ctx context.Context, s Server) error { return serve(ctx, s, isDequeue) }

func serve(ctx context.Context, s Server, recognise func(redis.Cmder) bool) error {
	o, err := options(s.URL)
	if err != nil {
		return err
	}
	if s.MaxWait == 0 {
		s.MaxWait = defaultMaxWait
	}
	if s.Admit == nil {
		s.Admit = func() bool { return true }
	}
	if s.GateActive == nil {
		s.GateActive = func(bool) {}
	}
	known, err := s.serveGated(ctx, *o, newGate(s.MaxWait, s.Admit, recognise))
	if known || err != nil {
		return err
	}
	s.Log.WarnContext(ctx, "Asynq's dequeue is not recognised: this Asynq is not the one that the gate was made for; polling", "interval", fallbackPoll)
	s.GateActive(false)
	return s.servePolled(ctx, *o)
}

// serveGated serves until ctx ends; known is false when it ended early, because
// in the first seconds the gate saw no dequeue.
func (s Server) serveGated(ctx context.Context, o redis.Options, g *gate) (known bool, err error) {
	ears := &ears{rdb: listener(o), channel: wakeOf(s.Agent), quiet: quiet, log: s.Log, wake: g.wake, heard: make(chan struct{})}
	var listening sync.WaitGroup
	defer listening.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	listening.Go(func() { ears.listen(ctx) })

	// Asynq started without Redis tells its log so every second, and v0.26.0
	// loses a connection per failed subscription (its issue 1095).
	select {
	case <-ctx.Done():
		return true, nil
	case <-ears.heard:
	}
	rdb := receiver(o)
	defer rdb.Close()
	rdb.AddHook(g)
	srv := asynq.NewServerFromRedisClient(rdb, serverConfig(s, gatePoll))
	if err := srv.Start(s.handler()); err != nil {
		return true, fmt.Errorf("start Asynq: %w", err)
	}
	defer srv.Shutdown()
	defer g.release()
	canary := time.NewTimer(canaryWait)
	defer canary.Stop()
	select {
	case <-g.seen:
	case <-ctx.Done():
		return true, nil
	case <-canary.C:
		return false, nil
	}
	s.GateActive(true)
	<-ctx.Done()
	return true, nil
}

// servePolled is Asynq as it comes, for one that the gate does not know.
func (s Server) servePolled(ctx context.Context, o redis.Options) error {
	rdb := polled(o)
	defer rdb.Close()
	srv := asynq.NewServerFromRedisClient(rdb, serverConfig(s, fallbackPoll))
	if err := srv.Start(s.handler()); err != nil {
		return fmt.Errorf("start Asynq: %w", err)
	}
	<-ctx.Done()
	srv.Shutdown()
	return nil
}

// handler decodes a task and hands it to Accept. It returns no error: Asynq
// would keep the task, and nothing of ours ever needs one again.
func (s Server) handler() asynq.Handler {
	return asynq.HandlerFunc(func(ctx context.Context, at *asynq.Task) error {
		var t job.Task
		if err := json.Unmarshal(at.Payload(), &t); err != nil || t.Ref.Job == "" || at.Type() != acceptTask {
			s.Log.WarnContext(ctx, "a task that is not ours is dropped", "type", at.Type(), "err", err)
			return nil
		}
		if err := s.Accept(ctx, t); err != nil {
			s.Log.WarnContext(ctx, "attempt not accepted", "job", t.Ref.Job, "attempt", t.Ref.Attempt, "err", err)
		}
		return nil
	})
}

// ears are the subscription to an agent's wake-ups.
type ears struct {
	rdb     *redis.Client
	channel string
	quiet   time.Duration // silence after which a sign of life is asked for
	log     *slog.Logger
	wake    func()
	heard   chan struct{} // closed by the first confirmed subscription
	once    sync.Once
}

// listen subscribes, again and again, until ctx ends. A subscription counts as
// a wake-up: whatever was sent before it went unheard.
func (e *ears) listen(ctx context.Context) {
	defer e.rdb.Close()
	away := false
	for ctx.Err() == nil {
		err := e.hear(ctx, &away)
		if ctx.Err() != nil {
			return
		}
		if !away {
			e.log.WarnContext(ctx, "Redis is away; a run does not need it", "err", err)
			away = true
		}
		select {
		case <-ctx.Done():
		case <-time.After(jitter(listenPause, 0.5)):
		}
	}
}

// hear holds one subscription until it breaks. go-redis's own channel of
// messages would do, but it never misses an answer to its pings, and leaves a
// goroutine behind that nobody waits for.
func (e *ears) hear(ctx context.Context, away *bool) error {
	sub := e.rdb.Subscribe(ctx, e.channel)
	defer sub.Close()
	defer context.AfterFunc(ctx, func() { sub.Close() })() // a read does not end with ctx
	asked := false
	for {
		msg, err := sub.ReceiveTimeout(ctx, e.quiet)
		var late net.Error
		switch {
		case err == nil:
			asked = false
		case errors.As(err, &late) && late.Timeout() && !asked:
			asked = true
			if err := sub.Ping(ctx); err != nil {
				return err
			}
		default:
			return err
		}
		switch msg.(type) {
		case *redis.Subscription:
			e.once.Do(func() { close(e.heard) })
			if *away {
				e.log.InfoContext(ctx, "Redis is back")
				*away = false
			}
			e.wake()
		case *redis.Message:
			e.wake()
		}
	}
}
