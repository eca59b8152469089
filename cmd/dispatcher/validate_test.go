package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestValidateSaysWhatAnUploadWouldSay(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, content string) string {
		if err := os.WriteFile(path(name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path(name)
	}
	const line = `{"prompt":"p","completion":"c"}` + "\n"
	good, bad := write("good.jsonl", line+line), write("bad.jsonl", line+"{\n"+`{"prompt":3,"completion":"secret words"}`)
	run := func(args ...string) (string, error) {
		var out strings.Builder
		err := validate(args, nil, &out)
		return out.String(), err
	}

	out, err := run(good, "--normalised", path("out"))
	if err != nil || !strings.Contains(out, "examples    2: 2 to train on") || !strings.Contains(out, "duplicate, 1 in 1 line: 2") {
		t.Errorf("%v\n%s", err, out)
	}
	if raw, err := os.ReadFile(path("out")); err != nil || strings.Count(string(raw), `{"messages":`) != 2 {
		t.Errorf("normalised: %s, %v", raw, err)
	}

	out, err = run(bad, "--normalised", path("none"))
	if err == nil || !strings.Contains(err.Error(), "2 problems") || !strings.Contains(out, "line 3, column 11, /prompt: field_type") || strings.Contains(out, "secret") {
		t.Errorf("%v\n%s", err, out)
	}
	if _, err := os.Stat(path("none")); err == nil {
		t.Error("a bad file left a normalised one")
	}

	out, err = run("--json", bad)
	var report struct {
		BadLines int `json:"bad_lines"`
	}
	if json.Unmarshal([]byte(out), &report) != nil || report.BadLines != 2 || err == nil {
		t.Errorf("%v\n%s", err, out)
	}

	if _, err := run(good, "--normalised", good); err == nil {
		t.Error("the data file may be overwritten")
	}
	if raw, err := os.ReadFile(good); err != nil || string(raw) != line+line {
		t.Errorf("the data file was: %q, %v", raw, err)
	}
	for _, args := range [][]string{{}, {good, bad}, {path("missing")}} {
		if _, err := run(args...); err == nil {
			t.Errorf("validate %v is no error", args)
		}
	}
}
