package config_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"lorayard/internal/config"
)

type settings struct {
	URL    config.Secret `flag:"database-url" env:"DATABASE_URL" required:"true" example:"postgres://host" help:"the database"`
	Models []string      `flag:"base-models" env:"BASE_MODELS" help:"models"`
	Poll   time.Duration `flag:"poll" env:"POLL" default:"1s" help:"how often"`
	Max    int           `flag:"max" env:"MAX" default:"8" help:"how many"`
	Quick  bool          `flag:"quick" env:"QUICK" help:"be quick"`
	Part   float64       `flag:"part" env:"PART" default:"0.5" help:"how much"`
}

func TestFlagsWinOverEnvironmentOverFileOverDefault(t *testing.T) {
	file := filepath.Join(t.TempDir(), "env")
	if err := os.WriteFile(file, []byte("# mine\nexport DATABASE_URL='from-file'\nMAX=3\nPOLL=3s\nBASE_MODELS = \"a, b\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var s settings
	rest, err := config.Load(&s, []string{"--poll=5s", "--quick", "word", "--config", file}, []string{"POLL=4s", "MAX=4", "QUICK="})
	if err != nil {
		t.Fatal(err)
	}
	want := settings{URL: "from-file", Models: []string{"a", "b"}, Poll: 5 * time.Second, Max: 4, Quick: true, Part: 0.5}
	if !reflect.DeepEqual(s, want) || len(rest) != 1 || rest[0] != "word" {
		t.Errorf("%#v %v", s, rest)
	}
}

func TestEveryErrorIsNamedAtOnceAndNoSecret(t *testing.T) {
	var s settings
	_, err := config.Load(&s, []string{"--pol", "3s", "--max", "many"}, []string{"QUICK=perhaps", "PART=x", "DATABASE_URL_FILE=/does/not/exist"})
	for _, want := range []string{"--pol is not a flag; did you mean --poll?", `--max: "many" is not a whole number`, "QUICK", "PART", "DATABASE_URL_FILE"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q is not in: %v", want, err)
		}
	}
	if _, err := config.Load(&settings{}, nil, nil); err == nil || !strings.Contains(err.Error(), "--database-url (DATABASE_URL) is missing") {
		t.Errorf("err = %v", err)
	}
}

func TestSecretsComeFromFilesAndStayHidden(t *testing.T) {
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte("hunter2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var s settings
	if _, err := config.Load(&s, nil, []string{"DATABASE_URL_FILE=" + file}); err != nil || s.URL.Reveal() != "hunter2" {
		t.Fatalf("%q, %v", s.URL.Reveal(), err)
	}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "s", s, "u", s.URL)
	raw, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if all := fmt.Sprintf("%v %+v %#v %s %s", s, s, s, log.String(), raw); strings.Contains(all, "hunter2") {
		t.Errorf("the secret shows: %s", all)
	}
}

func TestHelpListsEverySetting(t *testing.T) {
	if _, err := config.Load(&settings{}, []string{"--help"}, nil); !errors.Is(err, config.ErrHelp) {
		t.Errorf("err = %v", err)
	}
	var usage, example bytes.Buffer
	config.Usage(&usage, &settings{})
	config.EnvExample(&example, "test", &settings{})
	for _, name := range []string{"DATABASE_URL", "BASE_MODELS", "POLL", "MAX", "QUICK", "PART"} {
		if !strings.Contains(usage.String(), name) || !strings.Contains(example.String(), name+"=") {
			t.Errorf("%s is missing from help or example", name)
		}
	}
}
