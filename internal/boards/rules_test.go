package boards_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"lorayard/internal/boards"
)

const rules = "../../deploy/prometheus/rules"

func ruleFiles(t *testing.T) []string {
	t.Helper()
	all, err := filepath.Glob(rules + "/*.yml")
	if err != nil || len(all) == 0 {
		t.Fatalf("no rules: %v", err)
	}
	var out []string
	for _, f := range all {
		if !strings.HasSuffix(f, "_test.yml") {
			out = append(out, f)
		}
	}
	return out
}

// promtool runs it; a test is skipped where scripts/setup could not get it.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	switch dir := os.Getenv("PROMETHEUS"); {
	case dir == "unreachable":
		t.Skip("there is no promtool here and no apt to get it from")
	case dir == "" && os.Getenv("CI") == "true":
		t.Fatal("PROMETHEUS is not set: run `make test`, which unpacks Debian's prometheus")
	case dir == "":
		t.Skip("PROMETHEUS is not set: run `make test`")
	default:
		out, err := exec.CommandContext(t.Context(), filepath.Join(dir, "promtool"), args...).CombinedOutput()
		if err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

type ruleFile struct {
	Groups []struct {
		Name  string
		Rules []struct {
			Record, Alert, Expr string
			Labels, Annotations map[string]string
		}
	}
}

type testFile struct {
	Tests []struct {
		AlertRuleTest []struct {
			Alertname string
			ExpAlerts []any `yaml:"exp_alerts"`
		} `yaml:"alert_rule_test"`
	}
}

func read(t *testing.T, path string, into any) {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err == nil {
		d := yaml.NewDecoder(bytes.NewReader(raw))
		err = d.Decode(into)
	}
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}

func TestEveryAlertIsCompleteAndTested(t *testing.T) {
	c := boards.NewChecker()
	pages := map[string]bool{}
	seen := map[string]bool{}
	for _, f := range ruleFiles(t) {
		var rf ruleFile
		var tf testFile
		read(t, f, &rf)
		read(t, strings.TrimSuffix(f, ".yml")+"_test.yml", &tf)
		fires, silent := map[string]bool{}, map[string]bool{}
		for _, x := range tf.Tests {
			for _, a := range x.AlertRuleTest {
				if len(a.ExpAlerts) > 0 {
					fires[a.Alertname] = true
				} else {
					silent[a.Alertname] = true
				}
			}
		}
		for _, g := range rf.Groups {
			for _, r := range g.Rules {
				for _, fault := range c.Check(r.Expr) {
					t.Errorf("%s%s: %s", r.Alert, r.Record, fault)
				}
				if r.Alert == "" {
					continue
				}
				if seen[r.Alert] {
					t.Errorf("%s is there twice", r.Alert)
				}
				seen[r.Alert] = true
				if s := r.Labels["severity"]; s != "page" && s != "ticket" {
					t.Errorf("%s has severity %q", r.Alert, s)
				}
				if !strings.HasSuffix(r.Annotations["summary"], ".") {
					t.Errorf("%s has no sentence for a summary", r.Alert)
				}
				if !fires[r.Alert] || !silent[r.Alert] {
					t.Errorf("%s has no test in which it fires, or none in which it is silent", r.Alert)
				}
				checkRunbook(t, r.Alert, r.Annotations["runbook"])
				pages[filepath.Base(r.Annotations["runbook"])] = true
			}
		}
	}
	there, err := os.ReadDir("../../docs/runbooks")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range there {
		if !pages[f.Name()] {
			t.Errorf("docs/runbooks/%s is of no alert", f.Name())
		}
	}
}

var backticked = regexp.MustCompile("`[^`]+`")

// checkRunbook holds that a page says what an alert means, how to see and what to
// do, and names only metrics that exist.
func checkRunbook(t *testing.T, alert, page string) {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("../..", page))
	if err != nil {
		t.Errorf("%s has no runbook: %v", alert, err)
		return
	}
	text := string(raw)
	title, _, _ := strings.Cut(text, "\n")
	if !strings.Contains(title, alert) || !strings.Contains(text, "## How to see") || !strings.Contains(text, "## What to do") {
		t.Errorf("%s: %s does not name the alert, how to see it or what to do", alert, page)
	}
	c := boards.NewChecker()
	for _, q := range backticked.FindAllString(text, -1) {
		q = strings.Trim(q, "`")
		if !strings.Contains(q, "lorayard_") || strings.Contains(q, "lorayard_views") {
			continue
		}
		for _, fault := range c.Check(q) {
			if !strings.Contains(fault, "is a histogram") { // a page may name one as a whole
				t.Errorf("%s: %s", page, fault)
			}
		}
	}
}

func TestPromtoolTakesTheRulesAndTheirTests(t *testing.T) {
	files := ruleFiles(t)
	promtool(t, append([]string{"check", "rules"}, files...)...)
	tests, err := filepath.Glob(rules + "/*_test.yml")
	if err != nil {
		t.Fatal(err)
	}
	promtool(t, append([]string{"test", "rules"}, tests...)...)
}

func TestPromtoolTakesEveryExpressionOfTheBoards(t *testing.T) {
	type rule struct {
		Record string `json:"record"`
		Expr   string `json:"expr"`
	}
	var rs []rule
	each(func(_ boards.Board, p boards.Panel) {
		for _, a := range p.Asks {
			if a.Expr != "" {
				rs = append(rs, rule{"panel:expr:" + string(rune('a'+len(rs)%26)) + strings.Repeat("x", len(rs)/26), a.Expr})
			}
		}
	})
	if len(rs) < 100 {
		t.Fatalf("only %d expressions", len(rs))
	}
	raw, err := json.Marshal(map[string]any{"groups": []any{map[string]any{"name": "panels", "rules": rs}}}) // JSON is YAML
	path := filepath.Join(t.TempDir(), "panels.yml")
	if err := errors.Join(err, os.WriteFile(path, raw, 0o600)); err != nil {
		t.Fatal(err)
	}
	promtool(t, "check", "rules", path)
	promtool(t, "check", "config", "--syntax-only", "../../deploy/prometheus/prometheus.yml")
}
