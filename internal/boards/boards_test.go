package boards_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"lorayard/internal/boards"
	"lorayard/internal/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

const written = "../../deploy/grafana/dashboards"

// What Grafana is given is what this room says. UPDATE_GOLDEN=1 writes it anew.
func TestTheBoardsOnDiskAreTheseBoards(t *testing.T) {
	want := map[string]bool{}
	for _, b := range boards.All() {
		raw, err := b.JSON()
		if err != nil {
			t.Fatal(err)
		}
		name := b.UID + ".json"
		want[name] = true
		path := filepath.Join(written, name)
		if os.Getenv("UPDATE_GOLDEN") != "" {
			if err := os.WriteFile(path, raw, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != string(raw) {
			t.Errorf("%s is not what the board %s makes (%v): run UPDATE_GOLDEN=1 go test -run OnDisk ./internal/boards", path, b.UID, err)
		}
	}
	files, err := os.ReadDir(written)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !want[f.Name()] {
			t.Errorf("%s is of no board", f.Name())
		}
	}
}

// each calls f for every panel.
func each(f func(b boards.Board, p boards.Panel)) {
	for _, b := range boards.All() {
		for _, r := range b.Rows {
			for _, p := range r.Panels {
				f(b, p)
			}
		}
	}
}

var legend = regexp.MustCompile(`\{\{(\w+)\}\}`)

var links = regexp.MustCompile(`"url": "/d/([a-z-]+)\?`)

func TestEveryPanelSaysWhatItIs(t *testing.T) {
	vars := map[string][]string{}
	for _, b := range boards.All() {
		for _, v := range b.Vars {
			vars[b.UID] = append(vars[b.UID], v.Name)
		}
		seen := map[string]bool{}
		for _, r := range b.Rows {
			for _, p := range r.Panels {
				if seen[p.Title] {
					t.Errorf("%s has two panels %q", b.UID, p.Title)
				}
				seen[p.Title] = true
			}
		}
	}
	each(func(b boards.Board, p boards.Panel) {
		who := b.UID + " / " + p.Title
		if p.Unit == "" || !strings.HasSuffix(p.About, ".") || p.Width < 3 || p.Width > 24 || len(p.Asks) == 0 {
			t.Errorf("%s has no unit, no description, no width or no query", who)
		}
		sql := p.Asks[0].SQL != ""
		for _, a := range p.Asks {
			if (a.SQL != "") != sql || (a.SQL != "") == (a.Expr != "") {
				t.Errorf("%s asks two data sources, or none", who)
			}
		}
		if p.Drill == "" {
			return
		}
		if by := strings.TrimSuffix(p.DrillBy, "_id"); !slices.Contains(vars[p.Drill], by) {
			t.Errorf("%s leads to %s by %s, which that board does not ask for", who, p.Drill, by)
		}
	})
	for _, b := range boards.All() {
		raw, err := b.JSON()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range links.FindAllStringSubmatch(string(raw), -1) {
			if vars[m[1]] == nil && m[1] != "lorayard-cost" {
				t.Errorf("%s leads to %s, which is no board", b.UID, m[1])
			}
		}
		checkSources(t, b.UID, raw)
	}
}

// checkSources holds that no data source is named but by the board's variables.
func checkSources(t *testing.T, uid string, raw []byte) {
	var doc any
	if err := json.Unmarshal(raw, &doc); err != nil {
		t.Fatal(err)
	}
	n := 0
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			if ds, ok := v["datasource"].(map[string]any); ok {
				n++
				if id := fmt.Sprint(ds["uid"]); id != "${metrics}" && id != "${database}" {
					t.Errorf("%s names the data source %s", uid, id)
				}
			}
			for _, x := range v {
				walk(x)
			}
		case []any:
			for _, x := range v {
				walk(x)
			}
		}
	}
	walk(doc)
	if n == 0 {
		t.Errorf("%s has no data source", uid)
	}
}

func TestEveryExpressionAsksForWhatThereIs(t *testing.T) {
	c := boards.NewChecker()
	each(func(b boards.Board, p boards.Panel) {
		for _, a := range p.Asks {
			if a.Expr == "" {
				continue
			}
			for _, l := range legend.FindAllStringSubmatch(a.Legend, -1) {
				if !c.Label(l[1]) {
					t.Errorf("%s / %s: the legend names label %s, which nothing has", b.UID, p.Title, l[1])
				}
			}
			for _, fault := range c.Check(a.Expr) {
				t.Errorf("%s / %s: %s\n%s", b.UID, p.Title, fault, a.Expr)
			}
		}
	})
	for _, b := range boards.All() {
		for _, v := range b.Vars {
			if v.Metric != "" && len(c.Check(v.Metric)) > 0 {
				t.Errorf("%s asks for %s: %v", b.UID, v.Metric, c.Check(v.Metric))
			}
		}
	}
}

func TestTheCheckerNoticesMistakes(t *testing.T) {
	c := boards.NewChecker()
	for expr, say := range map[string]string{
		`lorayard_gpu_powr_watts`:                                                           "no metric",
		`lorayard_gpu_power_watts{device="x"}`:                                              "no label device",
		`lorayard_gpu_health{state="well"}`:                                                 "never",
		`lorayard_gpu_health{state=~"ok|well"}`:                                             "never",
		`rate(lorayard_gpu_power_watts[5m])`:                                                "gauge",
		`max_over_time(lorayard_agent_sink_errors_total[5m])`:                               "counter",
		`rate(lorayard_job_handover_seconds[5m])`:                                           "histogram",
		`histogram_quantile(0.9, sum(rate(lorayard_job_handover_seconds_bucket[5m])))`:      "le",
		`histogram_quantile(0.9, sum by (le) (rate(lorayard_agent_sink_errors_total[5m])))`: "_bucket",
		`sum by (colour) (lorayard_gpu_busy)`:                                               "colour",
		`vector(1)`:                                                                         "no metric of ours",
	} {
		if got := strings.Join(c.Check(expr), "; "); !strings.Contains(got, say) {
			t.Errorf("%s: said %q, want something about %q", expr, got, say)
		}
	}
}

// filled is SQL as Grafana would send it.
func filled(sql string) string {
	sql = regexp.MustCompile(`\$__timeFilter\((\w+(?:\.\w+)?)\)`).ReplaceAllString(sql, `$1 BETWEEN now() - interval '1 hour' AND now()`)
	return strings.ReplaceAll(sql, "$job", "00000000-0000-0000-0000-000000000001")
}

// Every query runs as the role that dashboards have, on the schema as migrated.
func TestEveryQueryRunsForTheObserver(t *testing.T) {
	db := storetest.New(t)
	ask := func(who, sql string, timed bool) {
		err := pgx.BeginFunc(t.Context(), db.Pool, func(tx pgx.Tx) error {
			if _, err := tx.Exec(t.Context(), `SET LOCAL ROLE lorayard_observer`); err != nil {
				return err
			}
			rows, err := tx.Query(t.Context(), filled(sql))
			if err != nil {
				return err
			}
			var names []string
			for _, f := range rows.FieldDescriptions() {
				names = append(names, f.Name)
			}
			rows.Close()
			if timed && !slices.Equal(names, []string{"time", "metric", "value"}) {
				t.Errorf("%s: a time series has the columns time, metric and value, not %v", who, names)
			}
			return rows.Err()
		})
		if err != nil {
			t.Errorf("%s: %v\n%s", who, err, sql)
		}
	}
	each(func(b boards.Board, p boards.Panel) {
		for _, a := range p.Asks {
			if a.SQL != "" {
				ask(b.UID+" / "+p.Title, a.SQL, a.Time)
			}
		}
	})
	for _, b := range boards.All() {
		for _, v := range b.Vars {
			if v.SQL != "" {
				ask(b.UID+" variable "+v.Name, v.SQL, false)
			}
		}
	}
}

// What nobody can see on a board or by an alert need not be measured.
func TestEveryMetricIsSeenSomewhere(t *testing.T) {
	var text strings.Builder
	each(func(_ boards.Board, p boards.Panel) {
		for _, a := range p.Asks {
			text.WriteString(a.Expr + "\n")
		}
	})
	for _, f := range ruleFiles(t) {
		raw, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		text.Write(raw)
	}
	for name := range boards.NewChecker().Names() {
		if !regexp.MustCompile(name+`(_bucket|_sum|_count)?\b`).MatchString(text.String()) && name != "lorayard_build_info" {
			t.Errorf("%s is on no board and in no alert", name)
		}
	}
}
