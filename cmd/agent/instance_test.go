package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/uuid"
)

func TestADataDirectoryKeepsItsNameAndCountsItsProcesses(t *testing.T) {
	dir := t.TempDir()
	first, n, err := instanceOf(dir)
	if err != nil || uuid.Validate(first) != nil || n != 1 {
		t.Fatalf("%s %d, %v", first, n, err)
	}
	if id, n, err := instanceOf(dir); err != nil || id != first || n != 2 {
		t.Errorf("the next process: %s %d, %v, want %s 2", id, n, err, first)
	}
	// As directories of before have it: a name alone.
	if err := os.WriteFile(filepath.Join(dir, "instance"), []byte(first+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if id, n, err := instanceOf(dir); err != nil || id != first || n != 1 {
		t.Errorf("without a count: %s %d, %v", id, n, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "instance"), []byte("rubbish"), 0o600); err != nil {
		t.Fatal(err)
	}
	if id, _, err := instanceOf(dir); err != nil || uuid.Validate(id) != nil || id == first {
		t.Errorf("after damage: %s, %v", id, err)
	}
}
