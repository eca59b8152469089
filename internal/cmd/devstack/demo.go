package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"lorayard/internal/devstack"
)

var errCancelled = errors.New("cancelled")

// demo does what a user of the app does, and shows what the app would show.
func demo(ctx context.Context, st *devstack.Stack, s settings, say func(string)) error {
	user, err := st.User(ctx)
	if err != nil {
		return err
	}
	data, err := st.Upload(ctx, user, s.Data, "demo data")
	if err != nil {
		return err
	}
	id, err := st.Insert(ctx, devstack.Job{
		User: user, Dataset: data, Preset: "custom",
		Hyperparameters: map[string]any{"learning_rate": s.LearningRate, "batch_size": 4, "epochs": s.Epochs, "rank": 16, "alpha": 32, "dropout": 0.05},
		GPUConfig:       map[string]any{"type": "A100-80GB", "count": 1},
	})
	if err != nil {
		return err
	}
	say("inserted job " + id + " as the app does; press Ctrl-C to cancel it")
	fmt.Println()
	w := &watcher{st: st, id: id, user: user, began: time.Now(), spent: map[string]time.Duration{}}
	if err := w.follow(ctx); err != nil {
		return err
	}
	summary, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	status, err := w.summary(summary)
	switch {
	case err != nil:
		return err
	case status == "cancelled":
		return errCancelled
	case status != "completed":
		return fmt.Errorf("the job is %s", status)
	}
	return nil
}

// watcher polls the job's row as the app's page does.
type watcher struct {
	st       *devstack.Stack
	id, user string
	began    time.Time
	spent    map[string]time.Duration // by stage
	stages   []string
	sampled  bool
}

type standing struct {
	status, stage, cost, message string
	step                         int
	total                        *int
	progress                     float64
	loss, speed                  *float64
	eta                          *float64 // seconds
	settled                      bool
}

func (w *watcher) look(ctx context.Context) (x standing, err error) {
	err = w.st.Pool.QueryRow(ctx, `
		SELECT t.status, t.current_stage, t.current_step, t.total_steps, t.progress::float8, t.current_cost::text, coalesce(t.error_message, ''),
		       (t.current_metrics ->> 'training_loss')::float8, (t.current_metrics ->> 'throughput')::float8,
		       extract(epoch FROM t.estimated_completion_at - now())::float8,
		       coalesce((SELECT j.state = 'settled' FROM lorayard.jobs j WHERE j.job_id = t.id), false)
		FROM training_jobs t WHERE t.id = $1`, w.id).
		Scan(&x.status, &x.stage, &x.step, &x.total, &x.progress, &x.cost, &x.message, &x.loss, &x.speed, &x.eta, &x.settled)
	if err != nil {
		return x, fmt.Errorf("look at the job: %w", err)
	}
	return x, nil
}

// follow shows progress until the job is settled; Ctrl-C cancels the job as
// the app does and waits for that.
func (w *watcher) follow(ctx context.Context) error {
	live := context.WithoutCancel(ctx)
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	asked := ctx.Done()
	terminal := isTerminal()
	shown, last := "", time.Now()
	for {
		x, err := w.look(live)
		if err != nil {
			return err
		}
		if !slices.Contains(w.stages, x.stage) {
			w.stages = append(w.stages, x.stage)
		}
		w.spent[x.stage] += time.Since(last)
		last = time.Now()
		w.sample(live)
		line := w.line(x)
		if terminal {
			fmt.Printf("\r\033[K%s", line)
		} else if key := fmt.Sprint(x.stage, x.step); key != shown {
			fmt.Println(line)
			shown = key
		}
		if x.settled {
			fmt.Println()
			return nil
		}
		select {
		case <-asked:
			asked = nil
			fmt.Println("\n  cancelling the job as the app does")
			if _, err := w.st.Cancel(live, w.user, w.id); err != nil {
				return err
			}
		case <-tick.C:
		}
	}
}

// sample prints the first training example as soon as the trainer has shown it.
func (w *watcher) sample(ctx context.Context) {
	if w.sampled {
		return
	}
	var text string
	err := w.st.Pool.QueryRow(ctx, `SELECT message FROM job_logs WHERE job_id = $1 AND metadata ->> 'code' = 'training_sample' ORDER BY attempt, seq LIMIT 1`, w.id).Scan(&text)
	if err != nil {
		return // not there yet
	}
	w.sampled = true
	if r := []rune(text); len(r) > 1800 {
		text = string(r[:900]) + "\n   [...]\n" + string(r[len(r)-900:])
	}
	fmt.Printf("\r\033[K  what the model is trained on (the loss is taken between « and »):\n\n    %s\n\n", strings.ReplaceAll(text, "\n", "\n    "))
}

func (w *watcher) line(x standing) string {
	total := 0
	if x.total != nil {
		total = *x.total
	}
	const width = 24
	full := min(width, int(x.progress/100*width))
	out := fmt.Sprintf("  %-13s [%s%s] step %d/%d", x.stage, strings.Repeat("█", full), strings.Repeat("·", width-full), x.step, total)
	if x.loss != nil {
		out += fmt.Sprintf("  loss %.4f", *x.loss)
	}
	if x.speed != nil {
		out += fmt.Sprintf("  %.0f tokens/s", *x.speed)
	}
	if x.eta != nil && *x.eta > 0 {
		out += fmt.Sprintf("  ETA %.0f s", *x.eta)
	}
	return out + "  $" + x.cost
}

func (w *watcher) summary(ctx context.Context) (status string, err error) {
	x, err := w.look(ctx)
	if err != nil {
		return "", err
	}
	fmt.Printf("\n  status        %s after %.1f s\n", x.status, time.Since(w.began).Seconds())
	if x.message != "" {
		fmt.Printf("  message       %s\n", x.message)
	}
	fmt.Print("  stages       ")
	for _, s := range w.stages {
		fmt.Printf(" %s %.1f s ", s, w.spent[s].Seconds())
	}
	fmt.Println()
	return x.status, errors.Join(w.curve(ctx), w.artifacts(ctx),
		w.table(ctx, "cost records", `SELECT cost_type, '$' || amount, (details ->> 'gpu_seconds') || ' GPU seconds of ' || (details ->> 'gpu_class') FROM cost_records WHERE job_id = $1`),
		w.table(ctx, "notifications", `SELECT type, priority, message FROM notifications WHERE metadata ->> 'job_id' = $1::text ORDER BY created_at, type`),
		w.table(ctx, "in Postgres", `SELECT 'metrics_points ' || (SELECT count(*) FROM metrics_points WHERE job_id = $1::uuid), 'job_logs ' || (SELECT count(*) FROM job_logs WHERE job_id = $1::uuid), 'checkpoints ' || (SELECT count(*) FROM checkpoints WHERE job_id = $1::uuid)`))
}

func (w *watcher) table(ctx context.Context, title, sql string) error {
	rows, err := w.st.Pool.Query(ctx, sql, w.id)
	if err != nil {
		return fmt.Errorf("read %s: %w", title, err)
	}
	defer rows.Close()
	for rows.Next() {
		vs, err := rows.Values()
		if err != nil {
			return fmt.Errorf("read %s: %w", title, err)
		}
		fmt.Printf("  %-13s %-22v %-16v %v\n", title, vs[0], vs[1], vs[2])
		title = ""
	}
	return rows.Err()
}

func (w *watcher) artifacts(ctx context.Context) error {
	rows, err := w.st.Pool.Query(ctx, `
		SELECT f ->> 'name', (f ->> 'bytes')::bigint, f ->> 'sha256', m.artifacts ->> (f ->> 'name')
		FROM model_artifacts m, jsonb_array_elements(m.training_summary -> 'files') f WHERE m.job_id = $1 ORDER BY 1`, w.id)
	if err != nil {
		return fmt.Errorf("read the artifact: %w", err)
	}
	type file struct {
		Name  string
		Bytes int64
		SHA   string
		Path  string
	}
	files, err := pgx.CollectRows(rows, pgx.RowToStructByPos[file])
	if err != nil {
		return fmt.Errorf("read the artifact: %w", err)
	}
	for i, f := range files {
		title := ""
		if i == 0 {
			title = "artifact"
		}
		fmt.Printf("  %-13s %-28s %9d bytes  sha256 %s…\n", title, f.Name, f.Bytes, f.SHA[:16])
	}
	for _, f := range files {
		if f.Name == "adapter_model.safetensors" {
			url, err := w.st.Store.SignedURL(ctx, "lora-models", f.Path, time.Hour)
			if err != nil {
				return err
			}
			if shown, _, _ := strings.Cut(url, "?"); shown != "" {
				fmt.Printf("  %-13s %s (signed, as the app's download button does)\n", "download", shown)
			}
		}
	}
	return nil
}

// curve draws the training loss as the job page would, in text.
func (w *watcher) curve(ctx context.Context) error {
	rows, err := w.st.Pool.Query(ctx, `SELECT step, training_loss::float8 FROM metrics_points WHERE job_id = $1 ORDER BY timestamp LIMIT 100`, w.id)
	if err != nil {
		return fmt.Errorf("read the loss curve: %w", err)
	}
	type point struct {
		Step int
		Loss float64
	}
	ps, err := pgx.CollectRows(rows, pgx.RowToStructByPos[point])
	if err != nil {
		return fmt.Errorf("read the loss curve: %w", err)
	}
	if len(ps) < 2 {
		return nil
	}
	const width, height = 60, 10
	low, high := math.Inf(1), math.Inf(-1)
	for _, p := range ps {
		low, high = min(low, p.Loss), max(high, p.Loss)
	}
	if high == low {
		high = low + 1
	}
	var grid [height][]rune
	for y := range grid {
		grid[y] = []rune(strings.Repeat(" ", width))
	}
	for i, p := range ps {
		x := i * (width - 1) / (len(ps) - 1)
		y := int(math.Round((high - p.Loss) / (high - low) * (height - 1)))
		grid[y][x] = '●'
	}
	fmt.Println()
	for y, row := range grid {
		label := "      "
		switch y {
		case 0:
			label = fmt.Sprintf("%6.3f", high)
		case height - 1:
			label = fmt.Sprintf("%6.3f", low)
		}
		fmt.Printf("  %s │%s\n", label, string(row))
	}
	fmt.Printf("         └%s\n          training loss, step %d to %d\n\n", strings.Repeat("─", width), ps[0].Step, ps[len(ps)-1].Step)
	return nil
}

func isTerminal() bool {
	st, err := os.Stdout.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}
