// Package store is the only room that knows Postgres. SQL stands beside the
// function that runs it; above this door nobody sees a row, a column or a
// pgx type. What an agent may do is a function of the database (migration
// 20261124000004 and later ones); what the dispatcher does is written out here.
package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"golang.org/x/sys/unix"

	"lorayard/internal/job"
)

// Store is a pool of connections to the app's database.
type Store struct {
	pool *pgxpool.Pool
	// vital are connections of their own for what must not wait behind
	// anything: leases.
	vital *pgxpool.Pool
	// session opens connections of their own for LISTEN and advisory locks,
	// which do not survive a transaction pooler.
	session *pgx.ConnConfig
}

// Options say who is connecting and how much of the database it may take.
type Options struct {
	Name     string // application_name
	MaxConns int32  // 0 means 8
	// LeaseConns are the connections for leases; 0 means 1, which is enough for
	// one agent or dispatcher. A few more are made while one is being buried.
	LeaseConns int32
	// Session is the URL for LISTEN and locks when URL is a transaction
	// pooler; empty means the same URL.
	Session string
	// CallLimit ends a call that has no earlier deadline; 0 means 20 s, a little
	// more than the database's own limit for a statement.
	CallLimit time.Duration
}

// Open connects and proves that the database answers.
func Open(ctx context.Context, rawURL string, o Options) (*Store, error) {
	cfg, err := pgxpool.ParseConfig(rawURL)
	if err != nil {
		return nil, fmt.Errorf("parse database URL: %w", hideURL(err))
	}
	cfg.MaxConns = o.MaxConns
	if cfg.MaxConns == 0 {
		cfg.MaxConns = 8
	}
	cfg.MaxConnLifetime = 30 * time.Minute
	cfg.MaxConnLifetimeJitter = 5 * time.Minute
	cfg.MaxConnIdleTime = 5 * time.Minute
	cfg.PingTimeout = idlePing
	configure(cfg.ConnConfig, o.Name)
	cfg.ConnConfig.Tracer = limited(cmp.Or(o.CallLimit, callLimit))

	session := cfg.ConnConfig.Copy()
	if o.Session != "" {
		if session, err = pgx.ParseConfig(o.Session); err != nil {
			return nil, fmt.Errorf("parse session database URL: %w", hideURL(err))
		}
		configure(session, o.Name)
	}
	lease := cfg.Copy()
	lease.MaxConns = max(1, o.LeaseConns) + buried
	lease.ConnConfig.ConnectTimeout = leaseConnect
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open database pool: %w", err)
	}
	s := &Store{pool: pool, session: session}
	if s.vital, err = pgxpool.NewWithConfig(ctx, lease); err != nil {
		pool.Close()
		return nil, fmt.Errorf("open database pool for leases: %w", err)
	}
	if err := s.Ping(ctx); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// buried is how many connections of the lease may lie in their graves. One that
// went silent keeps its place in the pool for the 15 s in which pgx tries to
// part from it in good order: with a single place, nobody could renew or lead
// for as long after the network was back.
const buried = 3

// idlePing bounds the pool's question whether a connection that was idle still
// works, which is otherwise as patient as its caller.
const idlePing = 2 * time.Second

// leaseConnect bounds a dial of the lease's connection: a renewal that has to
// dial first should still come in time, also over a line of half a second there
// and back.
const leaseConnect = 4 * time.Second

func configure(c *pgx.ConnConfig, name string) {
	c.RuntimeParams["application_name"] = name
	c.RuntimeParams["statement_timeout"] = "15000"
	c.RuntimeParams["timezone"] = "UTC"
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = 5 * time.Second
	}
	c.DialFunc = (&net.Dialer{KeepAliveConfig: keepAlive, ControlContext: boundUnanswered}).DialContext
	// Behind a transaction pooler three of four prepared statements fail.
	if c.Port == 6543 || strings.Contains(c.Host, "pooler") {
		c.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
	}
}

// callLimit is longer than a statement may take: an answer that is not there by
// then never comes.
const callLimit = 20 * time.Second

// limited gives every call a deadline. A proxy or a NAT that forgot a connection
// may acknowledge what is sent to it for ever and answer nothing, so that the
// kernel sees no fault; a caller without a deadline of its own would wait as
// long. pgx asks its tracer for the context of each call.
type limited time.Duration

type cancelKey struct{}

func (l limited) begin(ctx context.Context) context.Context {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(l))
	return context.WithValue(ctx, cancelKey{}, cancel)
}

func (l limited) end(ctx context.Context) {
	if cancel, ok := ctx.Value(cancelKey{}).(context.CancelFunc); ok {
		cancel()
	}
}

// TraceQueryStart and the three after it are pgx's.
func (l limited) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return l.begin(ctx)
}

// TraceQueryEnd is called when the rows are closed.
func (l limited) TraceQueryEnd(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryEndData) { l.end(ctx) }

// TraceBatchStart is the like for a batch.
func (l limited) TraceBatchStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	return l.begin(ctx)
}

// TraceBatchQuery is told of each query of a batch.
func (l limited) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}

// TraceBatchEnd is called when the results are closed.
func (l limited) TraceBatchEnd(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchEndData) { l.end(ctx) }

// keepAlive finds a peer that went away without a word within about 25 s on a
// connection that nobody writes to, such as the one that listens.
var keepAlive = net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 3}

// unanswered is how long what we wrote may stay unacknowledged; the kernel's
// own patience is a quarter of an hour.
const unanswered = 15 * time.Second

func boundUnanswered(_ context.Context, network, _ string, c syscall.RawConn) error {
	if !strings.HasPrefix(network, "tcp") {
		return nil
	}
	var err error
	if cerr := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unanswered.Milliseconds()))
	}); cerr != nil {
		return cerr
	}
	return err
}

// hideURL keeps the password of a URL that does not parse out of the message.
func hideURL(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	return errors.New("it is not of the form postgres://user:password@host:port/database")
}

// partLimit is how long Close waits for connections to end in good order.
const partLimit = 5 * time.Second

// Close closes every connection. One that went silent is not waited for: pgx
// takes 15 s to part from it, in which the next process of an agent that was
// restarted would not renew its lease.
func (s *Store) Close() {
	var pools sync.WaitGroup
	pools.Go(s.vital.Close)
	pools.Go(s.pool.Close)
	closed := make(chan struct{})
	go func() {
		pools.Wait()
		close(closed)
	}()
	late := time.NewTimer(partLimit)
	defer late.Stop()
	select {
	case <-closed:
	case <-late.C:
	}
}

// Ping asks the database for a sign of life.
func (s *Store) Ping(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := s.pool.Ping(ctx); err != nil {
		return fmt.Errorf("reach the database: %w", err)
	}
	return nil
}

// ErrReplaced says that another process registered this agent's id.
var ErrReplaced = errors.New("another process registered this agent id")

// ErrInUse says that a process on another host holds this agent id, or one of
// its devices, and its lease.
var ErrInUse = errors.New("in use by another agent")

// IsData reports whether err is about values (classes 22 and 23): trying the
// same again cannot help.
func IsData(err error) bool {
	pg, ok := errors.AsType[*pgconn.PgError](err)
	return ok && (strings.HasPrefix(pg.Code, "22") || strings.HasPrefix(pg.Code, "23"))
}

func stale(ref job.Ref) error {
	return &job.Failure{Kind: job.LeaseLost, Err: fmt.Errorf("%s is not ours to write", ref)}
}
