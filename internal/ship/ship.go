// Package ship carries what a trainer said from the spool to the store: in
// order, in batches, at least once. The trainer and the agent put into the
// spool and go on; a database that is away is waited for here and nowhere
// else.
package ship

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/spool"
	"lorayard/internal/wire"
)

// Sink takes batches; *store.Store is one, tests bring another.
type Sink interface {
	Append(ctx context.Context, ref job.Ref, samples []job.Sample, lines []job.Line, p *job.Progress) error
}

// Shipper is one attempt's carrier.
type Shipper struct {
	// Skew is added to every time that this host stamped: the database's clock
	// minus the host's. A job that moves between hosts has one curve, whose
	// points must not go back in time. To be set before anything is carried.
	Skew time.Duration

	ref     job.Ref
	spool   *spool.Spool
	sink    Sink
	metrics *metrics.Agent
	log     *slog.Logger
	permits func(error) bool // reports that the database refused the values

	mu       sync.Mutex
	progress *job.Progress // newest, nil when the sink has it
	poke     chan struct{}
	turn     chan struct{} // held by whoever carries: Run and a flush beside it
}

// interval is the time between batches, and what a sample may be behind. Each
// batch may change the job's row, once: Realtime authorises a change once for
// each subscriber, in one thread, so that more often would be unkind to the
// project.
const interval = time.Second

// most is the largest batch; 200 rows are written as fast as 1,000 a row.
const most = 500

// appendLimit is how long one batch may take; the server gives up as early.
const appendLimit = 15 * time.Second

// New carries from sp to sink. isData tells errors about values, which trying
// again cannot cure, from a database that is away.
func New(ref job.Ref, sp *spool.Spool, sink Sink, isData func(error) bool, m *metrics.Agent, log *slog.Logger) *Shipper {
	return &Shipper{ref: ref, spool: sp, sink: sink, permits: isData, metrics: m, log: log, poke: make(chan struct{}, 1), turn: make(chan struct{}, 1)}
}

// Accept puts one event of the trainer into the spool; events that are neither
// samples nor lines are left out.
func (s *Shipper) Accept(line []byte) error {
	if _, err := s.spool.Append(line); err != nil {
		return fmt.Errorf("spool an event of %s: %w", s.ref, err)
	}
	s.wake()
	return nil
}

// Say puts a line of the agent's own into the job's log.
func (s *Shipper) Say(level, message, code string) {
	raw, err := json.Marshal(map[string]any{
		"v": wire.Version, "ev": "log", "ts": time.Now().UnixMilli(), "level": level, "message": message, "code": code,
	})
	if err == nil {
		err = s.Accept(raw)
	}
	if err != nil {
		s.log.Warn("line not spooled", "job", s.ref.Job, "attempt", s.ref.Attempt, "err", err)
	}
}

// Show replaces the progress that goes out with the next batch.
func (s *Shipper) Show(p job.Progress) {
	s.mu.Lock()
	s.progress = &p
	s.mu.Unlock()
	s.wake()
}

func (s *Shipper) wake() {
	select {
	case s.poke <- struct{}{}:
	default:
	}
}

func (s *Shipper) takeProgress() *job.Progress {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.progress
	s.progress = nil
	return p
}

// shows reports whether progress waits to be written.
func (s *Shipper) shows() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.progress != nil
}

// giveBack keeps p for the next batch unless a newer one came.
func (s *Shipper) giveBack(p *job.Progress) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.progress == nil {
		s.progress = p
	}
}

// Run carries until ctx ends or the lease is lost (a failure of kind
// LeaseLost). What is left when ctx ends is Flush's.
func (s *Shipper) Run(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-s.poke:
		}
		next := time.After(interval)
		if err := s.carry(ctx, s.spool.Last()); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-next:
		}
	}
}

// Flush carries what is in the spool now, however long the database takes,
// until ctx ends. It may be called beside Run.
func (s *Shipper) Flush(ctx context.Context) error {
	last := s.spool.Last()
	if err := s.carry(ctx, last); err != nil {
		return err
	}
	if s.spool.Acked() < last {
		return fmt.Errorf("flush the spool of %s: %d records are left: %w", s.ref, s.pending(), context.Cause(ctx))
	}
	return nil
}

// Waiting is what is not in the sink yet, and since when the oldest of it waits;
// zero when nothing does.
func (s *Shipper) Waiting() (records int, bytes int64, since time.Time) {
	records, bytes = s.spool.Pending()
	if records == 0 {
		return 0, bytes, since
	}
	recs, err := s.spool.Read(s.spool.Acked(), 1)
	var e wire.Event
	if err == nil && len(recs) == 1 && json.Unmarshal(recs[0].Data, &e) == nil {
		since = e.At()
	}
	return records, bytes, since
}

func (s *Shipper) pending() int {
	n, _ := s.spool.Pending()
	return n
}

// carry writes the spool up to the record upto, and the newest progress once:
// what comes meanwhile is for the next time. It waits for a database that is
// away with growing, jittered pauses.
func (s *Shipper) carry(ctx context.Context, upto uint64) error {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return nil
	}
	wait := 200 * time.Millisecond
	shown := false
	for {
		if s.spool.Acked() >= upto && (shown || !s.shows()) {
			return nil
		}
		recs, err := s.spool.Read(s.spool.Acked(), most)
		if err != nil {
			return fmt.Errorf("read the spool of %s: %w", s.ref, err)
		}
		var p *job.Progress
		if !shown {
			p = s.takeProgress()
		}
		if len(recs) == 0 && p == nil {
			return nil
		}
		err = s.write(ctx, recs, p)
		switch {
		case err == nil:
			wait = 200 * time.Millisecond
			shown = shown || p != nil
			continue
		case job.KindOf(err) == job.LeaseLost:
			return err
		case ctx.Err() != nil:
			s.giveBack(p)
			return nil
		}
		s.giveBack(p)
		s.metrics.SinkErrors.Inc()
		s.log.WarnContext(ctx, "samples and lines wait in the spool", "job", s.ref.Job, "attempt", s.ref.Attempt, "records", len(recs), "err", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait/2 + rand.N(wait)):
		}
		wait = min(2*wait, 5*time.Second)
	}
}

// write brings one batch to the sink and acknowledges it. A batch that the
// database refuses for its values is halved until the one record is found and
// dropped: it must not hold up the others.
func (s *Shipper) write(ctx context.Context, recs []spool.Record, p *job.Progress) error {
	samples, lines := s.decode(recs)
	// A connection that went silent must not hold the spool for as long as the
	// kernel takes to notice.
	call, cancel := context.WithTimeout(ctx, appendLimit)
	sent := time.Now()
	err := s.sink.Append(call, s.ref, samples, lines, p)
	s.metrics.SinkSeconds.Observe(time.Since(sent).Seconds())
	cancel()
	if err == nil {
		return s.ack(recs)
	}
	if !s.permits(err) {
		return err
	}
	switch {
	case p != nil:
		s.log.ErrorContext(ctx, "progress refused by the database", "job", s.ref.Job, "attempt", s.ref.Attempt, "err", err)
		return s.write(ctx, recs, nil)
	case len(recs) <= 1:
		s.metrics.DroppedValues.Inc()
		s.log.ErrorContext(ctx, "record refused by the database", "job", s.ref.Job, "attempt", s.ref.Attempt, "err", err)
		return s.ack(recs)
	}
	half := len(recs) / 2
	return errors.Join(s.write(ctx, recs[:half], nil), s.write(ctx, recs[half:], nil))
}

func (s *Shipper) ack(recs []spool.Record) error {
	if len(recs) == 0 {
		return nil
	}
	return s.spool.Ack(recs[len(recs)-1].Seq)
}

// decode turns spooled events into rows. Their seq is the spool's, which the
// agent's own lines share.
func (s *Shipper) decode(recs []spool.Record) (samples []job.Sample, lines []job.Line) {
	for _, r := range recs {
		var e wire.Event
		if err := json.Unmarshal(r.Data, &e); err != nil {
			continue // Parse has seen it; only a damaged disk gets here
		}
		switch e.Ev {
		case "sample", "eval":
			sample := job.Sample{
				Seq: r.Seq, At: e.At().Add(s.Skew), Step: e.Step, Epoch: float64(e.Epoch), Loss: float64(e.Loss),
				LearningRate: float64(e.LearningRate), GradNorm: float64(e.GradNorm), TokensPerSecond: float64(e.TokensPerSecond), Skipped: e.Skipped,
			}
			if e.Ev == "eval" {
				// An evaluation has no gradient and no throughput of its own.
				sample.ValidationLoss, sample.GradNorm, sample.TokensPerSecond = Finite(e.ValidationLoss), math.NaN(), math.NaN()
			}
			samples = append(samples, sample)
		case "log":
			lines = append(lines, job.Line{Seq: r.Seq, At: e.At().Add(s.Skew), Level: e.Level, Message: e.Message, Code: string(e.Code)})
		}
	}
	return samples, lines
}

// Finite gives f as a plain number; nil when there is none.
func Finite(f *wire.Float) *float64 {
	if f == nil {
		return nil
	}
	v := float64(*f)
	return &v
}
