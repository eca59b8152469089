// Package queue is the only room that knows Redis and Asynq. They carry the
// hand-over and nothing else: a task of a few hundred bytes tells one agent
// which attempt to accept. The truth is in Postgres, so a task may be lost,
// doubled, late or brought back from an old snapshot: an attempt that is not
// accepted is sent again, and the accept is fenced.
//
//	Client.Send ─ enqueue, PUBLISH ─► Redis ─ wake ─► gate ─ dequeue ─► Accept
package queue

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/hibiken/asynq"
	"github.com/redis/go-redis/v9"
	"golang.org/x/sync/errgroup"

	"lorayard/internal/job"
)

// acceptTask is Asynq's type name of our only kind of task.
const acceptTask = "lorayard:accept"

// allQueues is the set in which Asynq's tools look for queues.
const allQueues = "asynq:queues"

// queueOf names the queue of one agent.
func queueOf(agent string) string { return "agent:" + agent }

// wakeOf names the channel on which an agent is told to look into its queue.
func wakeOf(agent string) string { return "lorayard:wake:" + agent }

// Client sends tasks.
type Client struct {
	rdb   *redis.Client
	asynq *asynq.Client
}

// Dial prepares a client for a redis:// or rediss:// URL. It does not wait for
// Redis: a dispatcher starts and serves while Redis is away.
func Dial(url string) (*Client, error) {
	o, err := options(url)
	if err != nil {
		return nil, err
	}
	rdb := sender(*o)
	return &Client{rdb: rdb, asynq: asynq.NewClientFromRedisClient(rdb)}, nil
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

// Send is a task and the agent that it is for.
type Send struct {
	Agent string
	Task  job.Task
}

// Send puts t on the agent's queue and wakes the agent. Sending the same again
// is not an error. It takes no longer than 2 s.
func (c *Client) Send(ctx context.Context, agent string, t job.Task) error {
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	if err := c.enqueue(ctx, agent, t); err != nil {
		return err
	}
	return c.wake(ctx, agent)
}

// SendAll sends many tasks, several at a time, and wakes each agent once, when
// all of its tasks are in the queue. The errors stand in the order of sends,
// nil where it went well. After the first error no more are tried, because the
// others would wait for the same Redis: what was not tried has that error too.
func (c *Client) SendAll(ctx context.Context, sends []Send) []error {
	errs := make([]error, len(sends))
	left := map[string]*atomic.Int64{} // tasks of an agent that are not in its queue yet
	for _, s := range sends {
		if left[s.Agent] == nil {
			left[s.Agent] = new(atomic.Int64)
		}
		left[s.Agent].Add(1)
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var g errgroup.Group
	g.SetLimit(sendsAtOnce)
	for i, s := range sends {
		g.Go(func() error {
			if ctx.Err() != nil {
				errs[i] = context.Cause(ctx)
				return nil
			}
			ctx, cancel := context.WithTimeout(ctx, sendTimeout)
			defer cancel()
			errs[i] = c.enqueue(ctx, s.Agent, s.Task)
			if left[s.Agent].Add(-1) == 0 && errs[i] == nil {
				errs[i] = c.wake(ctx, s.Agent)
			}
			if errs[i] != nil {
				stop(errs[i])
			}
			return nil
		})
	}
	_ = g.Wait() // errs has them
	return errs
}

func (c *Client) enqueue(ctx context.Context, agent string, t job.Task) error {
	raw, err := json.Marshal(t)
	if err != nil {
		return fmt.Errorf("encode task: %w", err)
	}
	_, err = c.asynq.EnqueueContext(ctx, asynq.NewTask(acceptTask, raw), taskOptions(agent, t)...)
	if err != nil && !errors.Is(err, asynq.ErrTaskIDConflict) {
		return fmt.Errorf("send %s to agent %s: %w", t.Ref, agent, err)
	}
	return nil
}

// wake tells the agent to look into its queue, and lists the queue. Asynq's
// client lists a queue once in its life: after a FLUSHALL, or a Forget by
// another process, its tools would not find the queue until the dispatcher
// starts anew.
func (c *Client) wake(ctx context.Context, agent string) error {
	_, err := c.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		p.SAdd(ctx, allQueues, queueOf(agent))
		p.Publish(ctx, wakeOf(agent), "")
		return nil
	})
	if err != nil {
		return fmt.Errorf("wake agent %s: %w", agent, err)
	}
	return nil
}

// Forget removes whatever Redis holds of an agent that is gone for good. It
// looks at every key, so it is not for the hot path. Asynq's own removal
// refuses a queue with a task that the agent died with, and leaves its counts.
// A later Send begins anew.
func (c *Client) Forget(ctx context.Context, agent string) error {
	mine := "asynq:{" + queueOf(agent) + "}:"
	scan := c.rdb.Scan(ctx, 0, globLiteral.Replace(mine)+"*", 1000).Iterator()
	var keys []string
	for scan.Next(ctx) {
		keys = append(keys, scan.Val())
	}
	err := scan.Err()
	if err == nil {
		_, err = c.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
			p.SRem(ctx, allQueues, queueOf(agent))
			for _, k := range keys {
				p.Unlink(ctx, k)
			}
			return nil
		})
	}
	if err != nil {
		return fmt.Errorf("forget agent %s: %w", agent, err)
	}
	return nil
}

// globLiteral makes a name mean itself in a pattern of Redis's.
var globLiteral = strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`, `]`, `\]`)
