package devstack

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"lorayard/internal/devstack/services"
)

// Prometheus is a running one that scrapes parts of a stack.
type Prometheus struct {
	*Process
	targets string // file that it reads them from, again and again
	known   map[string][]string
}

// Prometheus starts the one in directory bin, with the rules in directory rules.
func (s *Stack) Prometheus(ctx context.Context, bin, rules string, every time.Duration) (*Prometheus, error) {
	port, err := services.FreePort()
	if err != nil {
		return nil, err
	}
	files, err := filepath.Glob(filepath.Join(rules, "*.yml"))
	if err != nil {
		return nil, fmt.Errorf("look for rules: %w", err)
	}
	var load []string
	for _, f := range files {
		if !strings.HasSuffix(f, "_test.yml") {
			load = append(load, f)
		}
	}
	dir := filepath.Join(s.Dir, "prometheus")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make Prometheus' directory: %w", err)
	}
	p := &Prometheus{targets: filepath.Join(dir, "targets.json"), known: map[string][]string{}}
	if err := p.write(); err != nil {
		return nil, err
	}
	conf, err := json.MarshalIndent(map[string]any{ // JSON is YAML
		"global":         map[string]any{"scrape_interval": every.String(), "evaluation_interval": every.String()},
		"rule_files":     load,
		"scrape_configs": []any{map[string]any{"job_name": "lorayard", "file_sd_configs": []any{map[string]any{"files": []string{p.targets}, "refresh_interval": "1s"}}}},
	}, "", " ")
	if err != nil {
		return nil, fmt.Errorf("encode Prometheus' settings: %w", err)
	}
	path := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(path, conf, 0o644); err != nil {
		return nil, fmt.Errorf("write Prometheus' settings: %w", err)
	}
	p.Process, err = s.process(ctx, "prometheus", filepath.Join(bin, "prometheus"), []string{
		"--config.file=" + path, "--storage.tsdb.path=" + filepath.Join(dir, "data"), "--web.listen-address=127.0.0.1:" + strconv.Itoa(port), "--log.level=warn",
	}, nil, port)
	return p, err
}

// Scrape adds a process of ours, or its successor by the same name.
func (p *Prometheus) Scrape(kind string, of *Process) error {
	p.known[of.Name] = []string{kind, strings.TrimPrefix(of.OpsURL(), "http://")}
	return p.write()
}

func (p *Prometheus) write() error {
	type group struct {
		Targets []string          `json:"targets"`
		Labels  map[string]string `json:"labels"`
	}
	groups := []group{}
	for name, t := range p.known {
		groups = append(groups, group{[]string{t[1]}, map[string]string{"instance": name, "job": "lorayard-" + t[0]}})
	}
	raw, err := json.Marshal(groups)
	if err == nil {
		err = os.WriteFile(p.targets+".new", raw, 0o644)
	}
	if err == nil {
		err = os.Rename(p.targets+".new", p.targets)
	}
	if err != nil {
		return fmt.Errorf("tell Prometheus what to scrape: %w", err)
	}
	return nil
}

// Point is one series of an answer: its labels and its newest value.
type Point struct {
	Labels map[string]string
	Value  float64
}

// Ask evaluates an expression now.
func (p *Prometheus) Ask(ctx context.Context, expr string) ([]Point, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.OpsURL()+"/api/v1/query?query="+url.QueryEscape(expr), nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask Prometheus: %w", err)
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("ask Prometheus: %w", err)
	}
	var doc struct {
		Status, Error string
		Data          struct {
			Result []struct {
				Metric map[string]string
				Value  [2]any
			}
		}
	}
	if err := json.Unmarshal(raw, &doc); err != nil || doc.Status != "success" {
		return nil, fmt.Errorf("ask Prometheus for %s: %s %w", expr, doc.Error, err)
	}
	out := make([]Point, len(doc.Data.Result))
	for i, r := range doc.Data.Result {
		text, _ := r.Value[1].(string)
		v, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return nil, fmt.Errorf("ask Prometheus for %s: %w", expr, err)
		}
		out[i] = Point{r.Metric, v}
	}
	return out, nil
}
