package e2e_test

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"lorayard/internal/storetest"
)

// The clock of a host cannot be set for one process: Go reads it from the
// kernel's page, and a time namespace does not move it. What counts is how far
// it is from the database's, so the database's is moved. Only the functions
// that read the clock are replaced, in the one database.
func moveClock(db *storetest.DB, by time.Duration) {
	const move = `CREATE OR REPLACE FUNCTION pg_catalog.%s RETURNS timestamptz LANGUAGE sql %s PARALLEL SAFE AS $$ SELECT pg_catalog.%s + interval '%d seconds' $$`
	db.Exec(fmt.Sprintf(move, "clock_timestamp()", "VOLATILE", "timeofday()::timestamptz", int(by.Seconds())))
	db.Exec(fmt.Sprintf(move, "now()", "STABLE", "transaction_timestamp()", int(by.Seconds())))
}

// Every host is an hour behind, or before, the database: leases, reaping and
// money know only the database's clock, so all is as ever, a lost agent
// included. What a host stamps is told in the database's time.
func TestHostsAreAnHourOff(t *testing.T) {
	for name, by := range map[string]time.Duration{"behind": time.Hour, "ahead": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			python(t)
			db := storetest.New(t)
			moveClock(db, by)
			f := faultsOn(t, db.URL, dry(60, 100*time.Millisecond)...)
			if got := f.text(`SELECT round(extract(epoch FROM clock_timestamp() - timeofday()::timestamptz))::int`); got != fmt.Sprint(int(by.Seconds())) {
				t.Fatalf("the clock is moved by %s s", got)
			}
			f.dispatcher("dispatcher")
			f.agent("host-1", "PRETEND_GPUS=1")
			id := f.job()
			f.steps(id, 3)
			two := f.agent("host-2", "PRETEND_GPUS=1")
			lost := f.job()
			f.until("a checkpoint", `SELECT count(*) > 0 FROM checkpoints WHERE job_id = $1`, lost)
			frozen := f.tree(two.PID())
			f.signal(frozen, syscall.SIGSTOP)
			f.completed(id, 60, "1 host-1 completed")
			f.completed(lost, 60, "1 host-2 lost, 2 host-1 completed")
			f.signal(frozen, syscall.SIGCONT)
			if got := f.text(`SELECT max(upper(during) - lower(during)) < interval '1 minute' FROM lorayard.usage_intervals`); got != "t" {
				t.Error("somebody pays for the clock")
			}
			for _, table := range []string{"metrics_points", "job_logs"} {
				if got := f.text(`SELECT count(*) FROM ` + table + ` m JOIN training_jobs t ON t.id = m.job_id WHERE m.timestamp NOT BETWEEN t.started_at - interval '5 seconds' AND t.completed_at + interval '5 seconds'`); got != "0" {
					t.Errorf("%s rows of %s lie outside of their jobs' time", got, table)
				}
			}
		})
	}
}
