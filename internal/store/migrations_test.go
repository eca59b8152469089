package store_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"lorayard/deploy"
	"lorayard/internal/job"
	"lorayard/internal/store"
	"lorayard/internal/storetest"
)

// A migration that a database may have run is never changed: that database would
// not get the change. testdata/migrations.txt holds their digests;
// UPDATE_GOLDEN=1 adds those that are new, and changes none.
func TestMigrationsThatWereReleasedStay(t *testing.T) {
	const golden = "testdata/migrations.txt"
	raw, err := os.ReadFile(golden)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	known := map[string]string{}
	for line := range strings.Lines(string(raw)) {
		var digest, name string
		if _, err := fmt.Sscan(line, &digest, &name); err != nil {
			t.Fatalf("%s: %q: %v", golden, line, err)
		}
		known[name] = digest
	}
	ms, err := store.Migrations(deploy.Migrations)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, m := range ms {
		name := m.Version + "_" + m.Name
		digest := fmt.Sprintf("%x", sha256.Sum256([]byte(m.SQL)))
		switch was, is := known[name]; {
		case is && was != digest:
			t.Errorf("migration %s was changed after its release: put the change into a new one", name)
		case !is && os.Getenv("UPDATE_GOLDEN") == "":
			t.Errorf("migration %s is not in %s: run UPDATE_GOLDEN=1 go test -run Released ./internal/store, and change it no more", name, golden)
		}
		fmt.Fprintf(&out, "%s %s\n", digest, name)
		delete(known, name)
	}
	for name := range known {
		t.Errorf("migration %s is gone: databases that ran it would refuse to be pushed to", name)
	}
	if os.Getenv("UPDATE_GOLDEN") != "" && !t.Failed() {
		if err := os.WriteFile(golden, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// A database of the release before, in which an attempt runs, is brought up to
// date under it.
func TestADatabaseOfTheReleaseBeforeIsMigrated(t *testing.T) {
	const before = "20261124000005"
	db := storetest.Empty(t)
	ms, err := store.Migrations(deploy.Migrations)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for ms[n].Version <= before {
		n++
	}
	if _, err := db.Store.Migrate(t.Context(), ms[:n], deploy.StandIns); err != nil {
		t.Fatal(err)
	}
	a := agent("a", 1)
	id, _ := admitted(t, db, a)
	ref := assign(t, db, id, 0, a)
	ref.Nonce = nonce(11)
	accept(t, db, a, ref)
	if applied, err := db.Store.Migrate(t.Context(), ms, deploy.StandIns); err != nil || len(applied) != len(ms)-n {
		t.Fatalf("applied %v, %v", applied, err)
	}
	if err := db.Store.CheckSchema(t.Context(), ms); err != nil {
		t.Error(err)
	}
	// The next process of the host, of the new version, adopts the attempt.
	heir := agent("a", 2)
	heir.Generation = 1
	if kept, err := db.Store.Register(t.Context(), heir, ttl, []job.Ref{ref}); err != nil || len(kept) != 1 {
		t.Fatalf("adopted %v, %v", kept, err)
	}
	late := agent("a", 3) // of a generation that counts as the one before
	if _, err := db.Store.Register(t.Context(), late, ttl, nil); !errors.Is(err, store.ErrReplaced) {
		t.Errorf("a registration that came late: %v", err)
	}
	if w := renew(t, db, heir, ref); w.Attempts[ref] != job.DesireRun {
		t.Errorf("wanted = %v", w.Attempts)
	}
	end := store.End{Outcome: store.OutcomeCompleted, Artifact: &store.Artifact{
		ID: nonce(77), Files: map[string]string{}, QualityMetrics: map[string]any{}, TrainingSummary: map[string]any{}, Metrics: map[string]any{},
	}}
	if status, err := db.Store.Settle(t.Context(), ref, end); err != nil || status != job.Completed {
		t.Errorf("settled as %s, %v", status, err)
	}
	storetest.CheckSettled(t, db.Pool)
}
