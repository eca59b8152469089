package e2e_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
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
	id := s.insert(user, good, nil) // without waiting for the verdict
	s.until("two verdicts", `SELECT count(*) = 2 FROM datasets WHERE status IN ('ready', 'error')`)
	if got := s.text(`SELECT concat_ws(' ', status, training_ready, total_training_pairs + total_validation_pairs) FROM datasets WHERE id = $1`, good); got != "ready t 20" {
		t.Errorf("the good one: %s", got)
	}
	if got := s.text(`SELECT concat_ws(' ', status, training_ready, validation_errors -> 0 ->> 'line') FROM datasets WHERE id = $1`, bad); got != "error f 2" {
		t.Errorf("the bad one: %s", got)
	}
	if got := s.text(`SELECT string_agg(type, ',' ORDER BY type) FROM notifications WHERE user_id = $1 AND type LIKE 'dataset%'`, user); got != "dataset_error,dataset_ready" {
		t.Errorf("notifications: %s", got)
	}

	s.status(id, "completed")
	if got := s.text(`SELECT j.admitted_at >= d.validated_at FROM lorayard.jobs j, datasets d WHERE j.job_id = $1 AND d.id = $2`, id, good); got != "t" {
		t.Error("the job was admitted before its data set was")
	}
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

// The validation of a large file takes little memory, whatever its lines are
// like: house lines of 4 KB, or so many tiny ones that no more conversations
// are remembered. It reads from a pipe, as it does from Storage.
func TestAValidationTakesLittleMemory(t *testing.T) {
	demo, err := os.ReadFile("../../scripts/train/testdata/demo.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		bytes int
		block func(n int) []byte
	}{
		"house lines": {500 << 20, func(n int) []byte {
			if n == 0 {
				return demo
			}
			return demo[bytes.IndexByte(demo, '\n')+1:]
		}},
		"tiny lines": {100 << 20, func(n int) []byte {
			var b []byte
			for i := range 1000 {
				b = fmt.Appendf(b, `{"prompt":"what is %d","completion":"a number, %d"}`+"\n", n*1000+i, n*1000+i)
			}
			return b
		}},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "dispatcher"), "validate", "/dev/stdin", "--normalised", os.DevNull)
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			for n, written := 0, 0; written < c.bytes; n++ {
				m, err := in.Write(c.block(n))
				if err != nil {
					break // its exit says why
				}
				written += m
			}
			// Not the rusage of its end: that counts what the test had when it
			// started it.
			status, statusErr := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
			_ = in.Close()
			if err := errors.Join(cmd.Wait(), statusErr); err != nil {
				t.Fatalf("%v\n%s", err, out.String())
			}
			_, peak, _ := strings.Cut(string(status), "VmHWM:")
			var kib int
			if _, err := fmt.Sscan(peak, &kib); err != nil {
				t.Fatalf("read its memory: %v", err)
			}
			t.Logf("%d MiB at most", kib>>10)
			if kib > 64<<10 {
				t.Errorf("%d MiB of memory", kib>>10)
			}
		})
	}
}
