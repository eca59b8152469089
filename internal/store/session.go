package store

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Listen sends every notification of channel "lorayard" to wake until ctx ends
// or the connection breaks; it sends one empty wake-up as soon as it listens,
// because what was notified before that is lost. It returns why it ended.
// Behind a transaction pooler LISTEN succeeds and hears nothing, so Listen
// first has to hear itself.
func (s *Store) Listen(ctx context.Context, wake func(payload string)) error {
	conn, err := pgx.ConnectConfig(ctx, s.session)
	if err != nil {
		return fmt.Errorf("connect to listen: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, `LISTEN lorayard`); err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	if _, err := conn.Exec(ctx, `SELECT pg_notify('lorayard', 'probe')`); err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	probe, cancel := context.WithTimeout(ctx, 2*time.Second)
	_, err = conn.WaitForNotification(probe)
	cancel()
	if err != nil {
		return fmt.Errorf("notifications do not arrive (is the database URL a transaction pooler?): %w", err)
	}
	wake("")
	for {
		n, err := conn.WaitForNotification(ctx)
		if err != nil {
			return fmt.Errorf("wait for a notification: %w", err)
		}
		wake(n.Payload)
	}
}

// leaderLock is the advisory lock that the leading dispatcher holds.
const leaderLock = 0x79617264 // "yard"

// Lead runs lead while this process holds the leader's lock; it returns at
// once with false when another process holds it. The context of lead ends when
// the lock's connection does: another process may lead from then on.
func (s *Store) Lead(ctx context.Context, lead func(context.Context) error) (bool, error) {
	conn, err := pgx.ConnectConfig(ctx, s.session)
	if err != nil {
		return false, fmt.Errorf("connect to lead: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var mine bool
	if err := conn.QueryRow(ctx, `SELECT pg_try_advisory_lock($1)`, leaderLock).Scan(&mine); err != nil {
		return false, fmt.Errorf("try the leader's lock: %w", err)
	}
	if !mine {
		return false, nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Nothing is ever notified here: this waits for the connection's end.
		for {
			if _, err := conn.WaitForNotification(ctx); err != nil {
				cancel(fmt.Errorf("the leader's connection ended: %w", err))
				return
			}
		}
	}()
	err = lead(ctx)
	cancel(nil)
	<-done
	return true, err
}
