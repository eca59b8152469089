package e2e_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// confirm says that an upload is done, as the app does.
func (s *stack) confirm(user, dataset string) {
	s.t.Helper()
	s.must(s.As(s.t.Context(), user, func(tx pgx.Tx) error {
		_, err := tx.Exec(context.Background(), `UPDATE datasets SET status = 'validating' WHERE id = $1`, dataset)
		return err
	}))
}

// A compressed file in a format that the trainer alone could not have had is
// validated by a dispatcher with the rights of its role, and the trainer gets
// what was made of it. Nothing of it stands in a log.
func TestADataSetIsValidatedAndTrainedOn(t *testing.T) {
	s := start(t, dry(5, 10*time.Millisecond)...)
	s.fakeModel()
	s.dispatcher("dispatcher-1")
	s.dispatcher("dispatcher-2")
	s.agent("host-1")
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	for i := range 20 {
		fmt.Fprintf(z, `{"instruction":"canary-1f3 %d","input":"","output":"Look at the wear first."}`+"\n", i)
	}
	s.must(z.Close())
	user, good := s.dataset(s.write("talks.jsonl.gz", packed.String()))
	bad, err := s.Upload(t.Context(), user, s.write("bad.jsonl", oneTalk+`{"instruction":"canary-1f3"}`+"\n"), "bad talks")
	s.must(err)
	s.confirm(user, good)
	s.confirm(user, bad)
	s.until("two verdicts", `SELECT count(*) = 2 FROM datasets WHERE status IN ('ready', 'error')`)
	if got := s.text(`SELECT concat_ws(' ', status, training_ready, total_training_pairs + total_validation_pairs) FROM datasets WHERE id = $1`, good); got != "ready t 20" {
		t.Errorf("the good one: %s", got)
	}
	if got := s.text(`SELECT concat_ws(' ', status, training_ready, validation_errors -> 0 ->> 'line') FROM datasets WHERE id = $1`, bad); got != "error f 2" {
		t.Errorf("the bad one: %s", got)
	}
	if got := s.text(`SELECT string_agg(type, ',' ORDER BY type) FROM notifications WHERE user_id = $1`, user); got != "dataset_error,dataset_ready" {
		t.Errorf("notifications: %s", got)
	}

	id := s.insert(user, good, nil)
	s.status(id, "completed")
	s.until("the trainer's file is the normalised one", `SELECT EXISTS (SELECT 1 FROM job_logs l, lorayard.validations v
		WHERE l.job_id = $1 AND v.dataset_id = $2 AND l.message LIKE 'downloaded data set%' || v.sha256 || '%')`, id, good)
	refused := s.insert(user, bad, nil)
	s.until("refusal", `SELECT status = 'failed' AND error_message LIKE '%did not pass validation%' FROM training_jobs WHERE id = $1`, refused)

	logs, err := filepath.Glob(filepath.Join(s.Dir, "*.log"))
	s.must(err)
	for _, path := range logs {
		raw, err := os.ReadFile(path)
		s.must(err)
		if strings.Contains(string(raw), "canary-1f3") {
			t.Errorf("%s has text of the data set", filepath.Base(path))
		}
	}
	if n := s.text(`SELECT count(*) FROM notifications WHERE message LIKE '%canary-1f3%'`); n != "0" {
		t.Error("a notification has text of the data set")
	}
}
