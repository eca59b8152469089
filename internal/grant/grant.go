// Package grant lets agents touch single objects of Storage without a key. An
// attempt asks in the database, which knows what is its own; a dispatcher,
// which holds the key, signs a URL or an upload token for each object, and the
// attempt reads it. Every dispatcher does it, leader or standby.
package grant

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"lorayard/internal/metrics"
	"lorayard/internal/storage"
	"lorayard/internal/store"
)

const (
	// urlTTL is how long a download may begin or go on without a new URL. It
	// cannot be taken back, so it is short.
	urlTTL = 30 * time.Minute
	// poll finds what no notification told of.
	poll = time.Second
	// sweep removes the tokens of attempts that are over.
	sweep = time.Minute
	// side bounds calls of Storage at once.
	side = 8
	// answerLimit bounds one answer; the store lets another dispatcher try after it.
	answerLimit = 30 * time.Second
	// limitAge is how long what a bucket takes is believed.
	limitAge = 5 * time.Minute
)

// Minter answers what agents ask for.
type Minter struct {
	Store   *store.Store
	Storage *storage.Client // with the key
	Metrics *metrics.Dispatcher
	Log     *slog.Logger

	wake chan struct{}
	once sync.Once

	mu     sync.Mutex
	limits map[string]bucketLimit
}

// Wake says that somebody asked.
func (m *Minter) Wake() {
	select {
	case m.signal() <- struct{}{}:
	default:
	}
}

func (m *Minter) signal() chan struct{} {
	m.once.Do(func() { m.wake = make(chan struct{}, 1) })
	return m.wake
}

// Run answers until ctx ends.
func (m *Minter) Run(ctx context.Context) error {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	var swept time.Time
	for {
		if err := m.round(ctx); err != nil && ctx.Err() == nil {
			m.Log.WarnContext(ctx, "grants not answered", "err", err)
		}
		if time.Since(swept) >= sweep {
			if err := m.Store.SweepGrants(ctx); err != nil && ctx.Err() == nil {
				m.Log.WarnContext(ctx, "old grants not swept", "err", err)
			}
			swept = time.Now()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-m.signal():
		case <-tick.C:
		}
	}
}

// round answers all that is asked.
func (m *Minter) round(ctx context.Context) error {
	for {
		asked, err := m.Store.Asked(ctx, 4*side)
		if err != nil || len(asked) == 0 {
			return err
		}
		errs := make([]error, len(asked))
		var wg sync.WaitGroup
		free := make(chan struct{}, side)
		for i, a := range asked {
			free <- struct{}{}
			wg.Go(func() {
				defer func() { <-free }()
				errs[i] = m.answer(ctx, a)
			})
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			return err // what failed may wait for the next tick
		}
	}
}

// answer signs what is asked. What only Storage keeps it from is given back.
func (m *Minter) answer(ctx context.Context, a store.Asked) error {
	ctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	g, err := m.sign(ctx, a)
	if e, ok := errors.AsType[*storage.Error](err); ok && !e.Retryable() && ctx.Err() == nil {
		m.Log.WarnContext(ctx, "Storage refuses to sign", "job", a.Job, "verb", a.Verb, "err", err)
		g, err = store.Grant{Refused: e.Error()}, nil
	}
	if err != nil {
		m.Metrics.Grants.WithLabelValues("error").Inc()
		return errors.Join(err, m.Store.GiveBack(context.WithoutCancel(ctx), a.ID))
	}
	result := "granted"
	if g.Refused != "" {
		result = "refused"
	}
	m.Metrics.Grants.WithLabelValues(result).Inc()
	return m.Store.Answer(ctx, a.ID, g)
}

// limit is what a bucket takes, asked for now and then. An operator raises it
// seldom, and a bucket whose limit is not known takes what it takes.
func (m *Minter) limit(ctx context.Context, bucket string) int64 {
	m.mu.Lock()
	known, ok := m.limits[bucket]
	m.mu.Unlock()
	if ok && time.Since(known.at) < limitAge {
		return known.bytes
	}
	n, err := m.Storage.Limit(ctx, bucket)
	if err != nil {
		m.Log.WarnContext(ctx, "limit of a bucket not known", "err", err)
		return known.bytes
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.limits == nil {
		m.limits = map[string]bucketLimit{}
	}
	m.limits[bucket] = bucketLimit{n, time.Now()}
	return n
}

type bucketLimit struct {
	bytes int64
	at    time.Time
}

func (m *Minter) sign(ctx context.Context, a store.Asked) (g store.Grant, err error) {
	if a.Verb == store.GrantWrite {
		g.Token, err = m.Storage.SignUpload(ctx, a.Bucket, a.Key)
		if storage.IsExists(err) {
			return store.Grant{Exists: true}, nil
		}
		if err == nil {
			g.Limit = m.limit(ctx, a.Bucket)
		}
		return g, err
	}
	i, err := m.Storage.Info(ctx, a.Bucket, a.Key)
	if storage.IsNotFound(err) {
		return store.Grant{Missing: true}, nil
	}
	if err != nil {
		return g, err
	}
	g.Bytes, g.ETag, g.SHA256 = i.Bytes, i.ETag, i.SHA256
	g.URL, err = m.Storage.SignedURL(ctx, a.Bucket, a.Key, urlTTL)
	return g, err
}
