package main

import (
	"bytes"
	"os"
	"testing"

	"lorayard/internal/config"
)

// The example file is made of the declarations; UPDATE_GOLDEN=1
// writes it anew.
func TestTheExampleFileShowsEverySetting(t *testing.T) {
	const path = "../../deploy/dispatcher.env.example"
	var want bytes.Buffer
	config.EnvExample(&want, "Settings of the dispatcher.", &settings{})
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(path, want.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want.Bytes()) {
		t.Errorf("%s is not what the declarations say: run UPDATE_GOLDEN=1 go test ./cmd/...", path)
	}
}
