package queue

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"lorayard/internal/job"
)

// This file is the one place that says why an option of Asynq or go-redis has
// its value. Facts about Asynq are of v0.26.0, whose source was read for them.

// Paces of our own.
const (
	// defaultMaxWait is how long an agent goes without looking into its queue
	// when no wake-up reaches it. The dispatcher re-sends every second and takes
	// an assignment back after 5 s, so this only matters when PUBLISH is lost.
	defaultMaxWait = 5 * time.Second
	// errorPause is between dequeues that Redis did not answer. Asynq itself
	// does not pause there: with a client that fails fast it would spin.
	errorPause = 250 * time.Millisecond
	// listenPause is between two tries to subscribe.
	listenPause = 200 * time.Millisecond
	// quiet is how long a subscription may be silent before it is asked for a
	// sign of life; as long again without one, and it is given up. A connection
	// that a firewall dropped says nothing for a quarter of an hour otherwise.
	quiet = 30 * time.Second
	// canaryWait is how long a started server may take to show its first
	// dequeue. It is its first act; the rest is for a host that is starved.
	canaryWait = 3 * time.Second
	// fallbackPoll is the stock polling that replaces a gate which does not
	// recognise the dequeue: 50 ms of delay at the median for ten scripts/s.
	fallbackPoll = 100 * time.Millisecond
	// sendTimeout bounds one send with its wake-up. The dispatcher's round waits
	// for it and comes back in a second anyway.
	sendTimeout = 2 * time.Second
	// sendsAtOnce keeps a far Redis busy; near ones do 5,000/s with four.
	sendsAtOnce = 16
)

// taskOptions are those of every task.
func taskOptions(agent string, t job.Task) []asynq.Option {
	return []asynq.Option{
		// A queue per agent: placement has chosen the host before anything is sent.
		asynq.Queue(queueOf(agent)),
		// The id has the send count in it: Asynq refuses an id that exists in
		// any state, so an earlier send that is stuck (active with a dead agent,
		// archived for 90 days) would block its own re-send.
		asynq.TaskID(fmt.Sprintf("%s:%d:%d", t.Ref.Job, t.Ref.Attempt, t.Send)),
		// The handler never fails a task, so this counts one thing only: lost
		// acknowledgements (agent killed or Redis away between dequeue and
		// ack), found by Asynq's recoverer a minute or two later. With 0 the
		// recoverer archives each of them for 90 days, up to 10,000 per queue,
		// for nobody to read. With some it delivers again, the fence calls it
		// stale, and it is gone. 20 and not more: a task that ends the
		// agent's process each time must end somewhere.
		asynq.MaxRetry(20),
		// An accept takes milliseconds. None at all means 30 minutes to Asynq.
		asynq.Timeout(time.Minute),
		// Nothing is read back. (No Unique either: its locks outlive archived
		// tasks, and uniqueness is Postgres's.)
		asynq.Retention(0),
	}
}

// serverConfig is that of an agent's Asynq server. With the gate, poll is what
// remains between two of its answers; without, it is the polling itself.
func serverConfig(s Server, poll time.Duration) asynq.Config {
	return asynq.Config{
		// Accepts last milliseconds; devices are counted by the agent. Enough
		// that a re-send is answered beside accepts that wait for Postgres.
		Concurrency: s.Concurrency,
		// Exactly one. With none that is valid Asynq would listen on "default".
		Queues:            map[string]int{queueOf(s.Agent): 1},
		TaskCheckInterval: poll,
		// Nothing of ours is scheduled; the retry set only sees what the
		// recoverer found. Two scripts each time.
		DelayedTaskCheckInterval: time.Minute,
		// It deletes completed tasks whose retention is over; we have none.
		JanitorInterval: time.Hour,
		// An accept that still waits then (for Postgres) is pushed back to the
		// queue. The default of 8 s is a third of a systemd stop.
		ShutdownTimeout: 5 * time.Second,
		// Only the recoverer asks, and the task has waited a minute already.
		RetryDelayFunc: func(int, error, *asynq.Task) time.Duration { return time.Second },
		// Never set: BaseContext (to cancel by it releases the slot while the
		// handler runs), HealthCheckFunc (one more PING; the gate knows),
		// GroupAggregator, ErrorHandler (Accept logs for itself), IsFailure.
		Logger:   logger{s.Log},
		LogLevel: asynq.WarnLevel,
	}
}

// gatePoll is Asynq's pause between two answers of the gate, which does the
// waiting. Shutdown waits for one and a half of it.
const gatePoll = time.Millisecond

// options parses a URL and sets what holds for every client. The text of
// go-redis's own error has the password in it.
func options(url string) (*redis.Options, error) {
	o, err := redis.ParseURL(url)
	if err != nil {
		return nil, errors.New("parse the Redis URL: it is not of the form redis://[:password@]host:port/number")
	}
	// Redis answers in a millisecond or not at all. The default of 5 dials of
	// 5 s each kept a heartbeat in the dark for a minute.
	o.DialTimeout, o.DialerRetries = 2*time.Second, 1
	o.ReadTimeout, o.WriteTimeout = 2*time.Second, 2*time.Second
	o.ContextTimeoutEnabled = true // else a context's deadline does not bound a command
	// Fewer commands on each new connection: Redis coming back to 1,000
	// agents has enough to do.
	o.DisableIdentity = true
	// Nothing of ours is larger than a kilobyte; the default is 32 KiB each way
	// and connection.
	o.ReadBufferSize, o.WriteBufferSize = 4<<10, 4<<10
	o.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	return o, nil
}

// sender is the dispatcher's client.
func sender(o redis.Options) *redis.Client {
	// One retry: a connection that an earlier Redis had kept is found dead only
	// when used. An enqueue may be repeated, its id sees to that.
	o.MaxRetries, o.MinRetryBackoff = 1, 10*time.Millisecond
	o.PoolSize = sendsAtOnce
	return redis.NewClient(&o)
}

// receiver is the client under an agent's Asynq server.
func receiver(o redis.Options) *redis.Client {
	// No retry: heartbeats and acknowledgements are to know quickly, and the
	// gate paces what is tried again. Without the gate this spins when Redis is
	// away, so polled servers get the defaults.
	o.MaxRetries = -1
	// An idle agent keeps two connections, plus one subscription of Asynq's and
	// one of ours: Redis's maxclients of 10,000 is 2,400 agents. More are opened
	// only while accepts are acknowledged. The pool is larger than that needs
	// because after as many failed dials as it is large, go-redis probes Redis
	// once a second only: a restart of 8 s is noticed sooner.
	o.PoolSize, o.MaxIdleConns = 32, 2
	return redis.NewClient(&o)
}

// polled is the client under a server without the gate.
func polled(o redis.Options) *redis.Client {
	// Asynq asks again at once after an error: let the client's backoff pace it.
	o.MaxRetries, o.MinRetryBackoff, o.MaxRetryBackoff = 3, 50*time.Millisecond, 500*time.Millisecond
	o.PoolSize = 6
	return redis.NewClient(&o)
}

// listener is the client of the subscription for wake-ups. It has no hook: the
// gate must not be able to hold up what opens it.
func listener(o redis.Options) *redis.Client {
	o.PoolSize = 1 // subscriptions are not of the pool
	return redis.NewClient(&o)
}

// jitter is d, up to a part of it more or less, so that a thousand agents do
// not march in step.
func jitter(d time.Duration, part float64) time.Duration {
	return d + time.Duration((rand.Float64()*2-1)*part*float64(d))
}

// logger lets Asynq speak through slog.
type logger struct{ log *slog.Logger }

func (l logger) Debug(args ...any) { l.log.Debug("asynq: " + fmt.Sprint(args...)) }
func (l logger) Info(args ...any)  { l.log.Info("asynq: " + fmt.Sprint(args...)) }
func (l logger) Warn(args ...any)  { l.log.Warn("asynq: " + fmt.Sprint(args...)) }
func (l logger) Error(args ...any) { l.log.Warn("asynq: " + fmt.Sprint(args...)) }
func (l logger) Fatal(args ...any) { l.log.Error("asynq: " + fmt.Sprint(args...)) }

// LogTo lets go-redis speak through log, at debug level: it tells of every
// failed dial, and what matters is said once by us. The logger of go-redis is
// one for the whole process, so this is for a program's start.
func LogTo(log *slog.Logger) { redis.SetLogger(printer{log}) }

type printer struct{ log *slog.Logger }

func (p printer) Printf(ctx context.Context, format string, v ...any) {
	p.log.DebugContext(ctx, "redis: "+fmt.Sprintf(format, v...))
}
