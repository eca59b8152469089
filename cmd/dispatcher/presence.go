package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"

	"lorayard/internal/daemon"
	"lorayard/internal/job"
	"lorayard/internal/metrics"
	"lorayard/internal/presence"
	"lorayard/internal/store"
)

// presenceOf opens the port of the agents' streams and notes its address in
// self. There is no server when it is off.
func presenceOf(ctx context.Context, s settings, self *store.Dispatcher, log *slog.Logger) (*presence.Server, []daemon.Part, error) {
	if s.Presence == "off" || s.Presence == "" {
		return nil, nil, nil
	}
	var conf *tls.Config
	if s.TLSCert != "" || s.TLSKey != "" {
		pair, err := tls.LoadX509KeyPair(s.TLSCert, s.TLSKey)
		if err != nil {
			return nil, nil, fmt.Errorf("load the certificate of PRESENCE_TLS_CERT and PRESENCE_TLS_KEY: %w", err)
		}
		conf = &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	}
	l, err := presence.Listen(ctx, s.Presence, conf)
	if err != nil {
		return nil, nil, fmt.Errorf("listen on PRESENCE: %w", err)
	}
	if self.Address = s.Advertise; self.Address == "" {
		self.Address = addressOf(s.Presence, l.Addr(), self.Name)
	}
	srv := &presence.Server{Log: log}
	return srv, []daemon.Part{{Name: "presence", Run: func(ctx context.Context) error { return srv.Serve(ctx, l) }}}, nil
}

// addressOf is how agents reach a listener: at the host that it was told to
// listen on, or by the host's name where that is all of its addresses.
func addressOf(setting string, l net.Addr, hostname string) string {
	scheme := "tcp"
	if before, _, ok := strings.Cut(setting, "://"); ok {
		scheme = before
	}
	host, port, err := net.SplitHostPort(l.String())
	if err != nil {
		return setting
	}
	if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
		host = hostname
	}
	return scheme + "://" + net.JoinHostPort(host, port)
}

func verify(st *store.Store) func(ctx context.Context, agent, boot string) error {
	return func(ctx context.Context, agent, boot string) error {
		ok, err := st.Registered(ctx, agent, boot)
		if err == nil && !ok {
			err = fmt.Errorf("%w: agent %s is run by another process, or not registered", presence.ErrRefused, agent)
		}
		return err
	}
}

func died(st *store.Store, m *metrics.Dispatcher, log *slog.Logger) func(context.Context, presence.Death) error {
	return func(ctx context.Context, d presence.Death) error {
		ref := job.Ref{Job: d.Job, Attempt: d.Attempt, Nonce: d.Nonce}
		ok, err := st.ReportDeath(ctx, d.Agent, d.Boot, ref, d.Message)
		switch {
		case err != nil && store.IsData(err):
			m.Deaths.WithLabelValues("refused").Inc()
			return errors.Join(presence.ErrRefused, err)
		case err != nil:
			m.Deaths.WithLabelValues("error").Inc()
			return err
		case !ok:
			m.Deaths.WithLabelValues("refused").Inc()
			return fmt.Errorf("%w: the attempt is not that agent's any more", presence.ErrRefused)
		}
		m.Deaths.WithLabelValues("believed").Inc()
		log.WarnContext(ctx, "attempt lost: its shim reports that the agent died", "job", ref.Job, "attempt", ref.Attempt, "agent", d.Agent)
		return nil
	}
}
