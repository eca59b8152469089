package e2e_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lorayard/internal/storage"
)

// A dispatcher and an agent with the logins that the README tells to make do
// all their work, and so do an operator's verbs.
func TestTheRolesSuffice(t *testing.T) {
	s := start(t, dry(40, 100*time.Millisecond)...)
	s.fakeModel()
	s.dispatcher("dispatcher")
	s.agent("host-1")
	user, data := s.dataset(s.write("talks.jsonl", strings.Repeat(oneTalk, 20)))
	id := s.insert(user, data, nil)
	s.until("training", `SELECT current_step > 2 FROM training_jobs WHERE id = $1`, id)
	for _, verb := range []string{"agents", "jobs", "prioritize " + id + " 3", "cordon host-1 --reason fan", "uncordon host-1", "pause " + id, "resume " + id, "drain host-1 --within 1h", "uncordon host-1"} {
		cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "dispatcher"), strings.Fields(verb)...)
		cmd.Env = []string{"DATABASE_URL=" + s.DispatcherURL()}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("dispatcher %s: %v\n%s", verb, err, out)
		}
	}
	bad := s.insert(user, data, map[string]any{"learning_rate": -1})
	s.status(bad, "failed")
	s.status(id, "completed")
	logs, err := filepath.Glob(filepath.Join(s.Dir, "*.log"))
	s.must(err)
	for _, path := range logs {
		raw, err := os.ReadFile(path)
		s.must(err)
		for line := range strings.Lines(string(raw)) {
			if strings.Contains(line, "permission denied") || strings.Contains(line, "42501") {
				t.Errorf("%s: %s", filepath.Base(path), line)
			}
		}
	}
	// Neither bypasses row level security, nor owns anything.
	if got := s.text(`SELECT string_agg(rolname, ' ') FROM pg_roles WHERE rolname LIKE 'lorayard%' AND (rolbypassrls OR rolsuper OR rolcreaterole OR rolcreatedb)`); got != "" {
		t.Errorf("%s may too much", got)
	}
}

// The limit of the bucket is known before anything is trained for it.
func TestWhatCannotBeStoredIsNotTrained(t *testing.T) {
	s := start(t, dry(1000, 100*time.Millisecond)...)
	s.fakeModel()
	c, err := storage.Open(storage.Config{URL: s.SupabaseURL, Key: s.SupabaseKey})
	s.must(err)
	s.must(c.EnsureBucket(t.Context(), "lora-models", storage.BucketOptions{FileSizeLimit: 1500}))
	s.dispatcher("dispatcher")
	s.agent("host-1")
	user, data := s.dataset(s.write("talks.jsonl", strings.Repeat(oneTalk, 20)))
	id := s.insert(user, data, nil)
	s.status(id, "failed")
	if got := s.text(`SELECT error_message FROM training_jobs WHERE id = $1`, id); !strings.Contains(got, "lora-models takes 0.0 MB") || !strings.Contains(got, "lower rank") {
		t.Errorf("the user reads %q", got)
	}
	if got := s.text(`SELECT count(*) FROM checkpoints WHERE job_id = $1`, id); got != "0" {
		t.Errorf("%s checkpoints were published", got)
	}
}
