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

// Dispatcher is what a dispatcher says of itself.
type Dispatcher struct {
	ID      string // a UUID, new for each start of the process
	Name    string
	Address string // of its presence stream, as agents dial it; empty for none
	Version string
}

const campaign = `
	WITH here AS (
		INSERT INTO lorayard.dispatchers AS d (id, name, address, version, lease_until)
		VALUES ($1, $2, $3, $4, clock_timestamp() + $5::interval)
		ON CONFLICT (id) DO UPDATE SET address = excluded.address, lease_until = greatest(d.lease_until, excluded.lease_until)
	), won AS (
		UPDATE lorayard.leader l SET holder = $1, term = l.term + (l.holder IS DISTINCT FROM $1)::integer,
			since = CASE WHEN l.holder = $1 AND l.lease_until >= clock_timestamp() THEN l.since ELSE clock_timestamp() END,
			lease_until = greatest(l.lease_until, clock_timestamp() + $5::interval)
		WHERE l.holder = $1 OR l.lease_until < clock_timestamp()
		RETURNING l.term
	)
	SELECT coalesce((SELECT term FROM won), 0)`

// Campaign says that dispatcher d is here for another ttl, and makes it the
// leader for as long when nobody else is. The term is 0 for a standby; it
// grows with every change of the leader.
func (s *Store) Campaign(ctx context.Context, d Dispatcher, ttl time.Duration) (term int64, err error) {
	if err := s.vital.QueryRow(ctx, campaign, d.ID, d.Name, d.Address, d.Version, ttl).Scan(&term); err != nil {
		return 0, fmt.Errorf("campaign for leader: %w", err)
	}
	return term, nil
}

const resign = `
	WITH gone AS (DELETE FROM lorayard.dispatchers WHERE id = $1 OR lease_until < clock_timestamp() - interval '1 hour'),
	over AS (UPDATE lorayard.leader SET lease_until = clock_timestamp(), holder = NULL WHERE holder = $1 RETURNING term)
	SELECT pg_notify('lorayard', 'leader:' || term) FROM over`

// Resign takes dispatcher id off the list and, when it leads, makes room at
// once.
func (s *Store) Resign(ctx context.Context, id string) error {
	if _, err := s.pool.Exec(ctx, resign, id); err != nil {
		return fmt.Errorf("resign: %w", err)
	}
	return nil
}
