package queue

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/hibiken/asynq"
)

// Dispatchers share one queue of data sets to validate. Its tasks are hints,
// like an agent's: whoever gets one asks Postgres whether there is anything to
// do, and what was not begun is sent again.

const (
	validateTask = "lorayard:validate"
	datasetQueue = "datasets"
	// datasetPoll is the longest that a task waits for an idle dispatcher. There
	// are few dispatchers, so they need no wake-up.
	datasetPoll = 100 * time.Millisecond
	// datasetTimeout ends a validation that hangs; another try follows.
	datasetTimeout = time.Hour
)

// Check is a data set to validate. Run and Send make the task's id.
type Check struct {
	Dataset string `json:"dataset"`
	Run     int64  `json:"run"`
	Send    int    `json:"send"`
}

// SendChecks puts data sets on the dispatchers' queue. Sending the same again
// is not an error. The first error ends it.
func (c *Client) SendChecks(ctx context.Context, checks []Check) error {
	for _, check := range checks {
		if err := c.sendCheck(ctx, check); err != nil {
			return fmt.Errorf("send data set %s to be validated: %w", check.Dataset, err)
		}
	}
	return nil
}

func (c *Client) sendCheck(ctx context.Context, check Check) error {
	raw, err := json.Marshal(check)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, sendTimeout)
	defer cancel()
	_, err = c.asynq.EnqueueContext(
		ctx, asynq.NewTask(validateTask, raw),
		asynq.Queue(datasetQueue),
		asynq.TaskID(fmt.Sprintf("%s:%d:%d", check.Dataset, check.Run, check.Send)),
		asynq.MaxRetry(20), // as for every task: counts lost acknowledgements only
		asynq.Timeout(datasetTimeout),
		asynq.Retention(0),
	)
	if errors.Is(err, asynq.ErrTaskIDConflict) {
		return nil
	}
	return err
}

// Checker is a dispatcher's end of the queue of data sets.
type Checker struct {
	URL string // redis:// or rediss://
	// Side is how many data sets are validated at once.
	Side int
	Log  *slog.Logger
	// Validate gets each data set. Its context ends with the one of
	// ServeChecks. It says for itself what went wrong: the task is gone when it
	// returns, because what has no verdict is sent again.
	Validate func(ctx context.Context, dataset string)
}

// ServeChecks hands data sets to c.Validate until ctx ends, and waits for those
// under way. Redis may be away at the start and at any time after it.
func ServeChecks(ctx context.Context, c Checker) error {
	o, err := options(c.URL)
	if err != nil {
		return err
	}
	rdb := polled(*o)
	defer rdb.Close()
	// Asynq started without Redis tells its log so every second, and v0.26.0
	// loses a connection per failed subscription (its issue 1095).
	for rdb.Ping(ctx).Err() != nil {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(jitter(time.Second, 0.2)):
		}
	}
	cfg := serverConfig(Server{Agent: "", Concurrency: c.Side, Log: c.Log}, datasetPoll)
	cfg.Queues = map[string]int{datasetQueue: 1}
	srv := asynq.NewServerFromRedisClient(rdb, cfg)
	if err := srv.Start(c.handler(ctx)); err != nil {
		return fmt.Errorf("start Asynq: %w", err)
	}
	<-ctx.Done()
	srv.Shutdown()
	return nil
}

func (c Checker) handler(serving context.Context) asynq.Handler {
	return asynq.HandlerFunc(func(ctx context.Context, at *asynq.Task) error {
		var check Check
		if err := json.Unmarshal(at.Payload(), &check); err != nil || check.Dataset == "" || at.Type() != validateTask {
			c.Log.WarnContext(ctx, "a task that is not ours is dropped", "type", at.Type(), "err", err)
			return nil
		}
		// Asynq's own context goes on while it shuts down.
		ctx, stop := context.WithCancel(ctx)
		defer stop()
		defer context.AfterFunc(serving, stop)()
		c.Validate(ctx, check.Dataset)
		return nil
	})
}
