package e2e_test

import (
	"testing"
	"time"
)

// The agent is killed the moment a checkpoint is published. Patience is endless
// here: what brings the job elsewhere is the report of its shim.
func TestAKilledAgentsJobIsElsewhereAtOnce(t *testing.T) {
	f := faults(t, append(dry(60, 50*time.Millisecond), "PATIENCE=1h")...)
	f.dispatcher("dispatcher")
	first := f.agent("host-1")
	id := f.job()
	f.steps(id, 1)
	f.agent("host-2")
	f.until("a checkpoint", `SELECT count(*) > 0 FROM checkpoints WHERE job_id = $1`, id)
	first.Kill()
	f.completed(id, 60, "1 host-1 lost, 2 host-2 completed")
	if got := f.text(`SELECT resume_step > 0 FROM lorayard.attempts WHERE job_id = $1 AND attempt = 2`, id); got != "t" {
		t.Error("attempt 2 began anew")
	}
	// The measured curve is that of an undisturbed run.
	whole := f.job()
	f.status(whole, "completed")
	f.sameCurve(id, whole)
}

// curve is the loss of every step; of a step that was done twice, the last.
const curve = `SELECT string_agg(step || ':' || loss, ' ' ORDER BY step) FROM (
	SELECT DISTINCT ON (step) step, loss FROM lorayard.samples WHERE job_id = $1 AND validation_loss IS NULL ORDER BY step, attempt DESC) s`

// sameCurve compares two jobs of the same settings.
func (f *faulty) sameCurve(a, b string) {
	f.t.Helper()
	if x, y := f.text(curve, a), f.text(curve, b); x != y || x == "" {
		f.t.Errorf("the losses differ:\n%s\n%s", x, y)
	}
}
