package presence

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"
)

const (
	helloTimeout  = 5 * time.Second // from accept to the first line
	verifyTimeout = 2 * time.Second // for one question to the database
	diedTimeout   = 5 * time.Second // for one fenced statement, and the answer
	writeTimeout  = 10 * time.Second

	defaultReconnect = 2 * time.Second
	defaultStrangers = 1000
	// forgetAfter is how long State remembers an agent that is gone.
	forgetAfter = time.Hour
)

// Server is a dispatcher's end, leader or standby. Set the fields, then call
// Serve once; the other methods may be called from anywhere at any time.
type Server struct {
	// Verify asks the database whether boot is the registered process of agent.
	// An error that wraps ErrRefused sends it away for good; any other makes it
	// come back later, because a database that is away proves nothing.
	Verify func(ctx context.Context, agent, boot string) error
	// Died runs the fenced statement that gives the attempt away. It may be
	// asked several times for one death, by several dispatchers at once. An
	// error that wraps ErrRefused says that the report is stale.
	Died func(context.Context, Death) error
	// Connected (optional) says that an agent is present that was not, or that
	// a new process of it is; a stream that came back in time is no news. Gone
	// (optional) says that one did not come back within Reconnect. It is not
	// called for a process that a newer one replaced. The hooks run one at a
	// time in the order of events, and hold up the next: they must not block.
	Connected func(agent, boot string)
	Gone      func(agent, boot string)
	// Reconnect is how long an ended stream may take to come back; 2 s if zero.
	Reconnect time.Duration
	// Strangers bounds the connections that have not proven who they are; what
	// is beyond waits in the kernel's backlog. 1,000 if zero.
	Strangers int
	Log       *slog.Logger // nothing is logged if nil

	hooks sync.Mutex // before mu: serialises events with their hooks
	mu    sync.Mutex
	seq   uint64 // of the last hello
	peers map[string]*peer
	over  bool // Serve has returned
	wg    sync.WaitGroup
}

// Peer is what a dispatcher knows of an agent.
type Peer struct {
	Agent   string
	Version string
	Addr    string    // of its latest stream
	Present bool      // it has a stream, or lost it less than Reconnect ago
	Since   time.Time // Present: of the stream's begin; else: of its end
}

// peer is an agent's entry: its latest stream, alive or not.
type peer struct {
	latest *stream
	begun  time.Time
	ended  time.Time // zero while the stream is alive
	gone   bool
	timer  *time.Timer // waits for the return, then for forgetting
}

// stream is one connection of a verified process.
//
//	           Push             Push
//	idle ──► writing ──► writing, again ─┐
//	 ▲          │   ▲                    │ written
//	 └─ written ┘   └────────────────────┘
//
// A look that is asked for while a line is being written is written after it:
// the peer may have read that line, and the database, before the change.
type stream struct {
	hello
	seq  uint64
	conn net.Conn

	writing, again bool // guarded by Server.mu
}

// Serve serves agents and shims on ln, which it closes, until ctx ends; then it
// closes every stream and returns nil once all is quiet. It returns earlier
// only with the error of a listener that was closed by somebody else.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	if s.Verify == nil || s.Died == nil { // or the first stranger finds out
		ln.Close()
		return errors.New("serve agents: Verify and Died must be set")
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer func() {
		cancel()
		stop()
		ln.Close()
		s.wg.Wait()
		s.end()
	}()
	free := make(chan struct{}, cmp.Or(s.Strangers, defaultStrangers))
	for {
		select {
		case <-ctx.Done():
			return nil
		case free <- struct{}{}:
		}
		conn, err := ln.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				hangUp(conn)
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept agents: %w", err)
		case err != nil: // out of descriptors, most likely
			<-free
			s.log().WarnContext(ctx, "cannot accept a connection", "err", err)
			sleep(ctx, 100*time.Millisecond)
			continue
		}
		s.wg.Go(func() {
			known := sync.OnceFunc(func() { <-free })
			defer known()
			s.serve(ctx, conn, known)
		})
	}
}

// end keeps every timer and hook from running after Serve.
func (s *Server) end() {
	s.hooks.Lock()
	defer s.hooks.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.over = true
	for _, p := range s.peers {
		if p.timer != nil {
			p.timer.Stop()
		}
	}
}

// serve hears who is calling.
func (s *Server) serve(ctx context.Context, conn net.Conn, known func()) {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { hangUp(conn) })()
	setUserTimeout(conn)
	_ = conn.SetDeadline(time.Now().Add(helloTimeout))
	r := newReader(conn)
	m, err := read(r)
	switch {
	case err != nil:
		s.log().DebugContext(ctx, "a connection said nothing of use", "addr", address(conn), "err", err)
	case m.Death != nil:
		s.death(ctx, conn, *m.Death)
	case m.Hello != nil:
		st, ok := s.admit(ctx, conn, *m.Hello)
		if !ok {
			return
		}
		known()
		_ = conn.SetReadDeadline(time.Time{})
		s.send(st, message{Welcome: &struct{}{}}.line())
		for err == nil { // nothing that an agent may say has a meaning yet
			_, err = readLine(r)
		}
		s.leave(ctx, st, err)
	}
}

// death answers a shim.
func (s *Server) death(ctx context.Context, conn net.Conn, d Death) {
	ctx, cancel := context.WithTimeout(ctx, diedTimeout)
	defer cancel()
	_ = conn.SetDeadline(time.Now().Add(diedTimeout + time.Second))
	log := s.log().With("agent", d.Agent, "job", d.Job, "attempt", d.Attempt)
	var answer message
	switch err := s.Died(ctx, d); {
	case err == nil:
		log.InfoContext(ctx, "a shim reported the death of its agent")
		answer.OK = true
	case errors.Is(err, ErrRefused):
		log.InfoContext(ctx, "a shim's report was stale")
		answer.Refused = "this report is stale"
	default:
		log.WarnContext(ctx, "a shim's report could not be recorded", "err", err)
		answer.Error = "the report could not be recorded now"
	}
	_, _ = conn.Write(answer.line())
}

// admit makes a stream of a connection whose process is the registered one.
//
// A process registers before it says hello. So when two processes of an agent
// both pass, the older one was checked before the newer one registered, and
// hence said hello first: the later hello wins, whoever is checked faster.
func (s *Server) admit(ctx context.Context, conn net.Conn, h hello) (*stream, bool) {
	s.mu.Lock()
	s.seq++
	st := &stream{hello: h, seq: s.seq, conn: conn, writing: true} // the welcome is on its way
	s.mu.Unlock()

	vctx, cancel := context.WithTimeout(ctx, verifyTimeout)
	err := s.Verify(vctx, h.Agent, h.Boot)
	cancel()
	_ = conn.SetDeadline(time.Now().Add(writeTimeout))
	switch {
	case errors.Is(err, ErrRefused):
		s.log().InfoContext(ctx, "refused a process that is not the agent's registered one", "agent", h.Agent, "addr", address(conn))
		_, _ = conn.Write(message{Refused: "not the registered process of this agent"}.line())
		return nil, false
	case err != nil:
		s.log().WarnContext(ctx, "cannot check who an agent is", "agent", h.Agent, "err", err)
		_, _ = conn.Write(message{Error: "cannot check who you are now"}.line())
		return nil, false
	}
	return st, s.enter(ctx, st)
}

// enter makes st the stream of its agent, unless a later one is.
func (s *Server) enter(ctx context.Context, st *stream) bool {
	s.hooks.Lock()
	defer s.hooks.Unlock()
	s.mu.Lock()
	if s.peers == nil {
		s.peers = map[string]*peer{}
	}
	p, news := s.peers[st.Agent], false
	switch {
	case p == nil:
		p, news = &peer{}, true
		s.peers[st.Agent] = p
	case p.latest.seq > st.seq:
		s.mu.Unlock()
		return false
	default:
		news = p.gone || p.latest.Boot != st.Boot
		hangUp(p.latest.conn)
	}
	if p.timer != nil {
		p.timer.Stop() // if it is too late for that, lost sees another stream
	}
	*p = peer{latest: st, begun: time.Now()}
	s.mu.Unlock()
	if news {
		s.log().InfoContext(ctx, "agent present", "agent", st.Agent, "version", st.Version, "addr", address(st.conn))
		if s.Connected != nil {
			s.Connected(st.Agent, st.Boot)
		}
	}
	return true
}

// leave begins to wait for the return of an agent whose stream has ended.
func (s *Server) leave(ctx context.Context, st *stream, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.peers[st.Agent]
	if p == nil || p.latest != st { // replaced
		return
	}
	p.ended = time.Now()
	if ctx.Err() != nil { // it is us who leave
		return
	}
	p.timer = time.AfterFunc(cmp.Or(s.Reconnect, defaultReconnect), func() { s.lost(p, st) })
	s.log().DebugContext(ctx, "presence stream ended", "agent", st.Agent, "err", err)
}

// lost declares an agent gone that did not come back after st.
func (s *Server) lost(p *peer, st *stream) {
	s.hooks.Lock()
	defer s.hooks.Unlock()
	s.mu.Lock()
	if s.over || p.latest != st {
		s.mu.Unlock()
		return
	}
	p.gone = true
	p.timer = time.AfterFunc(forgetAfter, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if p.latest == st && !s.over {
			delete(s.peers, st.Agent)
		}
	})
	s.mu.Unlock()
	s.log().Info("agent gone", "agent", st.Agent, "addr", address(st.conn))
	if s.Gone != nil {
		s.Gone(st.Agent, st.Boot)
	}
}

// Push tells an agent to read what is wanted of it. It never waits: looks that
// are asked for while one is on its way become one more. It reports false when
// the agent has no stream here at this moment; when it comes back it looks
// unasked.
func (s *Server) Push(agent string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.peers[agent]
	if p == nil || !p.ended.IsZero() || s.over {
		return false
	}
	st := p.latest
	if st.writing {
		st.again = true
		return true
	}
	st.writing = true
	// The stream's own goroutine has not left, so Serve still waits.
	s.wg.Go(func() { s.send(st, lookLine()) })
	return true
}

func lookLine() []byte { return []byte(`{"look":true}` + "\n") }

// send writes line, and then the look that was asked for meanwhile. A peer
// that does not read loses its stream.
func (s *Server) send(st *stream, line []byte) {
	for {
		_ = st.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		if _, err := st.conn.Write(line); err != nil {
			hangUp(st.conn) // and writing stays true: nothing is sent after this
			return
		}
		s.mu.Lock()
		again := st.again
		st.writing, st.again = again, false
		s.mu.Unlock()
		if !again {
			return
		}
		line = lookLine()
	}
}

// State tells what is known of an agent; false when it had no stream here for
// an hour or since the start, which proves nothing.
func (s *Server) State(agent string) (Peer, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.peers[agent]
	if p == nil {
		return Peer{}, false
	}
	return p.state(), true
}

// Present lists the agents that are present, by id.
func (s *Server) Present() []Peer {
	s.mu.Lock()
	defer s.mu.Unlock()
	present := make([]Peer, 0, len(s.peers))
	for _, p := range s.peers {
		if !p.gone {
			present = append(present, p.state())
		}
	}
	slices.SortFunc(present, func(a, b Peer) int { return cmp.Compare(a.Agent, b.Agent) })
	return present
}

func (p *peer) state() Peer {
	since := p.begun
	if p.gone {
		since = p.ended
	}
	return Peer{Agent: p.latest.Agent, Version: p.latest.Version, Addr: address(p.latest.conn), Present: !p.gone, Since: since}
}

func (s *Server) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}

// address is where a connection comes from.
func address(conn net.Conn) string { return conn.RemoteAddr().String() }
