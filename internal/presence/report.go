package presence

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	// reportTimeout is how long a shim tries. The lease has run out before that,
	// and the reaper has found out by itself.
	reportTimeout = 60 * time.Second
	firstResend   = 50 * time.Millisecond
	mostResend    = 5 * time.Second
)

// Report is what a shim must know to report a death that has not happened yet.
type Report struct {
	Addresses []string `json:"addresses"`    // of the dispatchers, as in Client
	CA        string   `json:"ca,omitempty"` // PEM; a tls dispatcher's certificate must lead to it; empty: the system's
	Death     Death    `json:"death"`
}

// WriteReport writes r to path, readable by this user alone, in one step: a
// shim that wakes up while it is being renewed reads the old or the new one.
func WriteReport(path string, r Report) error {
	if len(r.Death.Message) > maxMessage {
		r.Death.Message = strings.ToValidUTF8(r.Death.Message[:maxMessage], "")
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode death report: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return fmt.Errorf("write death report: %w", err)
	}
	_, err = f.Write(append(raw, '\n'))
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("write death report: %w", err)
	}
	return nil
}

// SendReport sends the report at path to all its dispatchers at once, and again
// for a minute, until one has recorded it or called it stale. The first try
// begins at once: the job waits for it. The file stays.
func SendReport(ctx context.Context, path string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("send death report: %w", err)
	}
	var r Report
	if err := json.Unmarshal(raw, &r); err != nil {
		return fmt.Errorf("send death report: decode %s: %w", path, err)
	}
	if len(r.Addresses) == 0 {
		return fmt.Errorf("send death report: %s names no dispatcher", path)
	}
	var roots *x509.CertPool
	if r.CA != "" {
		roots = x509.NewCertPool()
		if !roots.AppendCertsFromPEM([]byte(r.CA)) {
			return fmt.Errorf("send death report: %s holds no certificate", path)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, reportTimeout)
	defer cancel()
	results := make(chan error)
	for _, address := range r.Addresses {
		go func() { results <- resend(ctx, address, roots, r.Death) }()
	}
	var errs []error
	for range r.Addresses {
		err := <-results
		if err == nil {
			cancel() // and wait for the others
		}
		errs = append(errs, err)
	}
	for _, err := range errs {
		if err == nil {
			return nil
		}
	}
	return fmt.Errorf("send death report: %w", errors.Join(errs...))
}

// resend tries until the dispatcher at address has answered for good.
func resend(ctx context.Context, address string, roots *x509.CertPool, d Death) error {
	b := backoff{first: firstResend, most: mostResend, jitter: jitter}
	for {
		err := send(ctx, address, roots, d)
		if err == nil || errors.Is(err, ErrRefused) {
			return nil
		}
		if !sleep(ctx, b.pause()) {
			return err
		}
	}
}

// send tries once.
func send(ctx context.Context, address string, roots *x509.CertPool, d Death) error {
	conn, err := dial(ctx, address, roots)
	if err != nil {
		return err
	}
	defer hangUp(conn)
	defer context.AfterFunc(ctx, func() { hangUp(conn) })()
	_ = conn.SetDeadline(time.Now().Add(diedTimeout + dialTimeout))
	if _, err := conn.Write(message{Death: &d}.line()); err != nil {
		return fmt.Errorf("report to %s: %w", address, err)
	}
	m, err := read(newReader(conn))
	switch {
	case err != nil:
		return fmt.Errorf("report to %s: wait for the answer: %w", address, err)
	case m.OK:
		return nil
	case m.Refused != "":
		return fmt.Errorf("report to %s: %w: %s", address, ErrRefused, m.Refused)
	case m.Error != "":
		return fmt.Errorf("report to %s: dispatcher says: %s", address, m.Error)
	}
	return fmt.Errorf("report to %s: %w: no answer to a death", address, errProtocol)
}
