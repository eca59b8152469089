// Package queue is the only room that knows Redis and Asynq. They carry the
// hand-over and nothing else: a task of a few hundred bytes tells one agent
// which attempt to accept. The truth is in Postgres, so a task may be lost,
// doubled, late or brought back from an old snapshot: an attempt that is not
// accepted is sent again, and the accept is fenced.
package queue

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"

	"lorayard/internal/job"
)

// acceptTask is Asynq's type name of our only kind of task.
const acceptTask = "lorayard:accept"

// queueOf names the queue of one agent. A queue per agent, because placement
// has chosen the host before anything is sent.
func queueOf(agent string) string { return "agent:" + agent }

// Client sends tasks.
type Client struct {
	rdb   redis.UniversalClient
	asynq *asynq.Client
}

// Dial prepares a client for a redis:// or rediss:// URL. It does not wait for
// Redis: a dispatcher starts and serves while Redis is away.
func Dial(url string) (*Client, error) {
	rdb, err := open(url)
	if err != nil {
		return nil, err
	}
	return &Client{rdb: rdb, asynq: asynq.NewClientFromRedisClient(rdb)}, nil
}

func open(url string) (*redis.Client, error) {
	o, err := redis.ParseURL(url)
	if err != nil {
		return nil, errors.New("parse the Redis URL: it is not of the form redis://[:password@]host:port/number")
	}
	o.DialTimeout = 2 * time.Second
	o.ReadTimeout = 2 * time.Second
	o.WriteTimeout = 2 * time.Second
	o.ContextTimeoutEnabled = true
	return redis.NewClient(o), nil
}

// Close closes the connections.
func (c *Client) Close() error { return c.rdb.Close() }

// Ping asks Redis for a sign of life.
func (c *Client) Ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if err := c.rdb.Ping(ctx).Err(); err != nil {
		return fmt.Errorf("reach Redis: %w", err)
	}
	return nil
}

// Send puts t on the agent's queue. The id has the send count in it: an
// archived task of an earlier send would block its own re-send for 90 days.
// Sending the same again is not an error.
func (c *Client) Send(ctx context.Context, agent string, t job.Task) error {
	raw, err := json.Marshal(t)
	if err != nil {
		return fmt.Errorf("encode task: %w", err)
	}
	_, err = c.asynq.EnqueueContext(ctx, asynq.NewTask(acceptTask, raw),
		asynq.Queue(queueOf(agent)),
		asynq.TaskID(fmt.Sprintf("%s:%d:%d", t.Ref.Job, t.Ref.Attempt, t.Send)),
		asynq.MaxRetry(0),          // the dispatcher re-sends; a retry by Asynq would come too late
		asynq.Timeout(time.Minute), // an accept takes milliseconds; no timeout at all means 30 minutes to Asynq
		asynq.Retention(0),         // nothing is read back
	)
	if errors.Is(err, asynq.ErrTaskIDConflict) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("send %s to agent %s: %w", t.Ref, agent, err)
	}
	return nil
}

// Serve hands the agent's tasks to accept until ctx ends. accept must return
// within moments: a run never lives inside a task. What it returns is only
// counted, because the dispatcher sends again what was not accepted.
func Serve(ctx context.Context, url, agent string, log *slog.Logger, accept func(context.Context, job.Task) error) error {
	rdb, err := open(url)
	if err != nil {
		return err
	}
	defer rdb.Close()
	srv := asynq.NewServerFromRedisClient(rdb, asynq.Config{
		Concurrency:              4, // accepts last milliseconds; devices are ours to count
		Queues:                   map[string]int{queueOf(agent): 1},
		TaskCheckInterval:        50 * time.Millisecond, // poll of an idle queue: 26 ms at the median
		DelayedTaskCheckInterval: time.Minute,           // nothing of ours is ever delayed
		JanitorInterval:          time.Hour,             // nothing of ours is retained
		ShutdownTimeout:          5 * time.Second,
		RetryDelayFunc:           func(int, error, *asynq.Task) time.Duration { return time.Second },
		Logger:                   logger{log},
		LogLevel:                 asynq.WarnLevel,
	})
	handler := asynq.HandlerFunc(func(ctx context.Context, at *asynq.Task) error {
		var t job.Task
		if err := json.Unmarshal(at.Payload(), &t); err != nil || t.Ref.Job == "" {
			return fmt.Errorf("a task that is not ours: %w", asynq.RevokeTask)
		}
		if err := accept(ctx, t); err != nil {
			log.WarnContext(ctx, "attempt not accepted", "job", t.Ref.Job, "attempt", t.Ref.Attempt, "err", err)
			return asynq.RevokeTask // gone from Redis; the dispatcher decides
		}
		return nil
	})
	// Asynq's Start pings Redis and gives up; an agent starts without Redis too.
	for {
		err := srv.Start(handler)
		if err == nil {
			break
		}
		log.WarnContext(ctx, "Redis is not there yet", "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
	}
	<-ctx.Done()
	srv.Shutdown()
	return nil
}

// logger lets Asynq speak through slog.
type logger struct{ log *slog.Logger }

func (l logger) Debug(args ...any) { l.log.Debug("asynq: " + fmt.Sprint(args...)) }
func (l logger) Info(args ...any)  { l.log.Info("asynq: " + fmt.Sprint(args...)) }
func (l logger) Warn(args ...any)  { l.log.Warn("asynq: " + fmt.Sprint(args...)) }
func (l logger) Error(args ...any) { l.log.Warn("asynq: " + fmt.Sprint(args...)) }
func (l logger) Fatal(args ...any) { l.log.Error("asynq: " + fmt.Sprint(args...)) }
