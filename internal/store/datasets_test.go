package store_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/store"
	"lorayard/internal/storetest"
)

const lease = time.Minute

// uploaded makes a data set as the app does and confirms its upload.
func uploaded(db *storetest.DB, user string) string {
	set := db.Dataset(user)
	db.Exec(`UPDATE datasets SET status = 'uploading', training_ready = false WHERE id = $1`, set)
	db.Exec(`UPDATE datasets SET status = 'validating' WHERE id = $1`, set)
	return set
}

func due(t *testing.T, db *storetest.DB) []store.DueDataset {
	t.Helper()
	d, err := db.Store.DueDatasets(t.Context(), 10, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func begin(t *testing.T, db *storetest.DB, set string, want bool) store.Validation {
	t.Helper()
	v, ok, err := db.Store.BeginValidation(t.Context(), set, lease)
	if err != nil || ok != want {
		t.Fatalf("begin: %v, %v", ok, err)
	}
	return v
}

func good(path string) store.Verdict {
	return store.Verdict{
		Ready: true, Notice: "ready", Samples: json.RawMessage(`[{"turns": []}]`), TrainingPairs: 39, ValidationPairs: 3, Tokens: 1000,
		TurnsPerConversation: 6, TokensPerTurn: 117.08, Report: json.RawMessage(`{}`), Source: path,
		File: &store.DataFile{Bucket: "lora-datasets", Path: "u/s/normalised-x.jsonl", Bytes: 9, SHA256: "x"},
	}
}

func finish(t *testing.T, db *storetest.DB, v store.Validation, verdict store.Verdict, want bool) {
	t.Helper()
	written, err := db.Store.FinishValidation(t.Context(), v, verdict)
	if err != nil || written != want {
		t.Fatalf("finish: %v, %v", written, err)
	}
}

func TestADataSetIsValidatedByOneAtATime(t *testing.T) {
	db := storetest.New(t)
	set := uploaded(db, db.User())
	if d := due(t, db); len(d) != 1 || d[0].ID != set || d[0].Send != 1 {
		t.Fatalf("due: %+v", d)
	}
	if d := due(t, db); len(d) != 0 {
		t.Errorf("sent twice: %+v", d)
	}
	db.Exec(`UPDATE lorayard.validations SET sent_at = sent_at - interval '2 minutes'`)
	if d := due(t, db); len(d) != 1 || d[0].Send != 2 {
		t.Errorf("a lost task is not sent again: %+v", d)
	}
	first := begin(t, db, set, true)
	if first.Bucket != "lora-datasets" || first.User == "" || !strings.Contains(first.Path, first.User) {
		t.Errorf("%+v", first)
	}
	begin(t, db, set, false)
	db.Exec(`UPDATE lorayard.validations SET sent_at = sent_at - interval '1 hour'`)
	if d := due(t, db); len(d) != 0 {
		t.Errorf("due while somebody is at it: %+v", d)
	}
	// Whoever was at it is gone.
	db.Exec(`UPDATE lorayard.validations SET lease_until = now() - interval '1 second'`)
	if d := due(t, db); len(d) != 1 {
		t.Errorf("not due after the lease: %+v", d)
	}
	second := begin(t, db, set, true)
	if kept, err := db.Store.RenewValidation(t.Context(), first, lease); err != nil || kept {
		t.Errorf("the first goes on: %v, %v", kept, err)
	}
	if kept, err := db.Store.RenewValidation(t.Context(), second, lease); err != nil || !kept {
		t.Errorf("the second does not: %v, %v", kept, err)
	}
	finish(t, db, first, good("x"), false)
	finish(t, db, second, good("x"), true)
	before := db.Text(`SELECT d::text FROM datasets d`)
	finish(t, db, second, store.Verdict{Notice: "late"}, false)
	if after := db.Text(`SELECT d::text FROM datasets d`); after != before {
		t.Errorf("twice changed\n%s\n%s", before, after)
	}
	if got := db.Text(`SELECT concat_ws(' ', status, training_ready, total_training_pairs, total_validation_pairs, total_tokens, avg_turns_per_conversation,
		avg_tokens_per_turn, validation_errors, jsonb_array_length(sample_data), error_message, validated_at IS NOT NULL) FROM datasets`); got != "ready t 39 3 1000 6.00 117.08 1 t" {
		t.Errorf("the app sees %s", got)
	}
	if got := db.Text(`SELECT string_agg(concat_ws(' ', type, priority, action_url = '/datasets/' || $1::text), ',') FROM notifications`, set); got != "dataset_ready medium t" {
		t.Errorf("notifications: %s", got)
	}
	begin(t, db, set, false)
	if d := due(t, db); len(d) != 0 {
		t.Errorf("due after the verdict: %+v", d)
	}
}

func TestAFailedTryWaitsAndADeletedDataSetIsLeftAlone(t *testing.T) {
	db := storetest.New(t)
	set := uploaded(db, db.User())
	due(t, db)
	v := begin(t, db, set, true)
	if err := db.Store.PostponeValidation(t.Context(), v, time.Hour, "storage is away"); err != nil {
		t.Fatal(err)
	}
	begin(t, db, set, false)
	if d := due(t, db); len(d) != 0 {
		t.Errorf("due too early: %+v", d)
	}
	db.Exec(`UPDATE lorayard.validations SET not_before = now()`)
	if d := due(t, db); len(d) != 1 {
		t.Errorf("not due: %+v", d)
	}
	if v = begin(t, db, set, true); v.Failures != 1 {
		t.Errorf("%d failures", v.Failures)
	}
	db.Exec(`UPDATE datasets SET deleted_at = now()`)
	if kept, err := db.Store.RenewValidation(t.Context(), v, lease); err != nil || kept {
		t.Errorf("goes on with a deleted data set: %v, %v", kept, err)
	}
	finish(t, db, v, good("x"), false)
	if n := db.Text(`SELECT count(*) FROM notifications`); n != "0" {
		t.Errorf("%s notifications about a deleted data set", n)
	}
}

func TestADataSetMayBeValidatedAgain(t *testing.T) {
	db := storetest.New(t)
	set := uploaded(db, db.User())
	due(t, db)
	message := "it is bad"
	finish(t, db, begin(t, db, set, true), store.Verdict{Notice: "bad", Message: &message, Errors: json.RawMessage(`[{"line": 1, "error": "e", "suggestion": "s"}]`)}, true)
	if got := db.Text(`SELECT concat_ws(' ', status, training_ready, error_message, validation_errors) FROM datasets`); got != `error f it is bad [{"line": 1, "error": "e", "suggestion": "s"}]` {
		t.Errorf("the app sees %s", got)
	}
	db.Exec(`UPDATE datasets SET status = 'validating'`)
	if d := due(t, db); len(d) != 1 {
		t.Fatalf("due: %+v", d)
	}
	finish(t, db, begin(t, db, set, true), good("x"), true)
	if got := db.Text(`SELECT string_agg(type, ' ' ORDER BY type) FROM notifications`); got != "dataset_error dataset_ready" {
		t.Errorf("notifications: %s", got)
	}
	if got := db.Text(`SELECT concat_ws(' ', status, error_message, validation_errors) FROM datasets`); got != "ready" {
		t.Errorf("the app sees %s", got)
	}
}

func TestAnAttemptTrainsOnTheNormalisedFile(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	id, _ := admitted(t, db, a)
	ref := assign(t, db, id, 0, a)
	ref.Nonce = nonce(11)
	as := accept(t, db, a, ref)
	set := as.Dataset
	want := func(path string) {
		t.Helper()
		f, err := db.Store.DataFile(t.Context(), ref)
		if err != nil || f.Path != path || f.Bucket != "lora-datasets" {
			t.Errorf("%+v, %v", f, err)
		}
		// It may read what it is to train on.
		g, err := db.Store.Grants(t.Context(), ref, []store.GrantAsk{{Verb: store.GrantRead, Bucket: f.Bucket, Key: f.Path}})
		if err != nil || g[0] != nil {
			t.Errorf("granted: %+v, %v", g, err)
		}
	}
	want(set.Path)
	db.Exec(`UPDATE datasets SET status = 'validating' WHERE id = $1`, set.ID)
	due(t, db)
	finish(t, db, begin(t, db, set.ID, true), good(set.Bucket+"/"+set.Path), true)
	want("u/s/normalised-x.jsonl")
	// Another file under another path was not validated.
	db.Exec(`UPDATE datasets SET storage_path = storage_path || '2' WHERE id = $1`, set.ID)
	want(set.Path + "2")
	ref.Nonce = nonce(12)
	if _, err := db.Store.DataFile(t.Context(), ref); job.KindOf(err) != job.LeaseLost {
		t.Errorf("a stale attempt: %v", err)
	}
}

func TestAJobWaitsForTheVerdictOnItsDataSet(t *testing.T) {
	db := storetest.New(t)
	user := db.User()
	set := uploaded(db, user)
	id := db.Job(user, set)
	rows := func(want int) {
		t.Helper()
		for _, only := range [][]job.ID{nil, {job.ID(id)}} {
			if got, err := db.Store.Unadmitted(t.Context(), 10, only); err != nil || len(got) != want {
				t.Errorf("%d rows: %v", len(got), err)
			}
		}
	}
	rows(0)
	db.Exec(`UPDATE datasets SET deleted_at = now()`) // nobody validates it any more
	rows(1)
	db.Exec(`UPDATE datasets SET deleted_at = NULL`)
	due(t, db)
	finish(t, db, begin(t, db, set, true), good("x"), true)
	rows(1)
}
