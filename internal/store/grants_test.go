package store_test

import (
	"fmt"
	"testing"

	"lorayard/internal/job"
	"lorayard/internal/store"
	"lorayard/internal/storetest"
)

func TestAnAttemptMayTouchItsOwnObjectsAlone(t *testing.T) {
	db := storetest.New(t)
	a := agent("a", 1)
	id, user := admitted(t, db, a)
	ref := assign(t, db, id, 0, a)
	ref.Nonce = nonce(11)
	as := accept(t, db, a, ref)
	artifact := db.Text(`SELECT lorayard.artifact_of($1, 1, $2)`, id, ref.Nonce)
	own := fmt.Sprintf("%s/%s/a1-%s/", user, id, ref.Nonce)
	cp := job.Checkpoint{Step: 1, Bucket: "lora-models", Path: user + "/" + string(id) + "/a0-old/step-1", Files: []job.File{}}
	if err := db.Store.AddCheckpoint(t.Context(), ref, cp); err != nil {
		t.Fatal(err)
	}
	stranger := db.User()
	db.Dataset(stranger)
	asks := []store.GrantAsk{ // those before the blank line are its own
		{Verb: "write", Bucket: "lora-models", Key: own + "step-1/adapter.safetensors"},
		{Verb: "write", Bucket: "lora-models", Key: user + "/" + artifact + "/adapter.safetensors"},
		{Verb: "read", Bucket: "lora-models", Key: user + "/" + artifact + "/adapter.safetensors"},
		{Verb: "read", Bucket: as.Dataset.Bucket, Key: as.Dataset.Path},
		{Verb: "read", Bucket: "lora-models", Key: cp.Path + "/state.pt"},

		{Verb: "write", Bucket: as.Dataset.Bucket, Key: as.Dataset.Path},
		{Verb: "write", Bucket: "lora-models", Key: cp.Path + "/state.pt"},
		{Verb: "write", Bucket: "lora-models", Key: user + "/" + string(id) + "/adapter.safetensors"},
		{Verb: "write", Bucket: "lora-models", Key: own},
		{Verb: "write", Bucket: "lora-models", Key: own + "../../x"},
		{Verb: "write", Bucket: "lora-models", Key: own + "/x"},
		{Verb: "write", Bucket: "training-files", Key: own + "x"},
		{Verb: "read", Bucket: "lora-models", Key: stranger + "/x/adapter.safetensors"},
		{Verb: "read", Bucket: "lora-datasets", Key: db.Text(`SELECT storage_path FROM datasets WHERE user_id = $1`, stranger)},
		{Verb: "read", Bucket: "lora-models", Key: cp.Path},
	}
	const granted = 5
	got, err := db.Store.Grants(t.Context(), ref, asks)
	if err != nil {
		t.Fatal(err)
	}
	for i, g := range got {
		if refused := g != nil && g.Refused != ""; refused != (i >= granted) {
			t.Errorf("%s %s: %+v", asks[i].Verb, asks[i].Key, g)
		}
	}
	asked, err := db.Store.Asked(t.Context(), 100)
	if err != nil || len(asked) != granted {
		t.Fatalf("asked: %+v, %v", asked, err)
	}
	if again, err := db.Store.Asked(t.Context(), 100); err != nil || len(again) != 0 {
		t.Errorf("taken twice: %+v, %v", again, err)
	}
	for _, x := range asked {
		if err := db.Store.Answer(t.Context(), x.ID, store.Grant{Token: x.Key}); err != nil {
			t.Fatal(err)
		}
	}
	got, err = db.Store.Grants(t.Context(), ref, asks[:granted])
	if err != nil {
		t.Fatal(err)
	}
	for i, g := range got {
		if g == nil || g.Token != asks[i].Key || g.Serial != 1 {
			t.Errorf("%s: %+v", asks[i].Key, g)
		}
	}
	// It does not work any more: the next one is made, once.
	again := []store.GrantAsk{asks[0]}
	again[0].After = 1
	for range 2 {
		if got, err := db.Store.Grants(t.Context(), ref, again); err != nil || got[0] != nil {
			t.Errorf("after its serial: %+v, %v", got[0], err)
		}
	}
	if asked, err = db.Store.Asked(t.Context(), 100); err != nil || len(asked) != 1 {
		t.Fatalf("asked anew: %+v, %v", asked, err)
	}
	if err := db.Store.Answer(t.Context(), asked[0].ID, store.Grant{Token: "new"}); err != nil {
		t.Fatal(err)
	}
	if got, err := db.Store.Grants(t.Context(), ref, again); err != nil || got[0] == nil || got[0].Token != "new" {
		t.Errorf("the next answer: %+v, %v", got[0], err)
	}
	zombie := ref
	zombie.Nonce = nonce(12)
	if _, err := db.Store.Grants(t.Context(), zombie, asks); !lost(err) {
		t.Errorf("a stale attempt asked: %v", err)
	}
	if _, err := db.Store.Settle(t.Context(), ref, store.End{Outcome: store.OutcomeCancelled}); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Store.Grants(t.Context(), ref, asks); !lost(err) {
		t.Errorf("a settled attempt asked: %v", err)
	}
	if err := db.Store.SweepGrants(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := db.Text(`SELECT count(*) FROM lorayard.grants`); n != "0" {
		t.Errorf("%s grants are left", n)
	}
}
