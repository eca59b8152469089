package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"lorayard/internal/gpu"
	"lorayard/internal/gpu/nvml"
	"lorayard/internal/proc"
	"lorayard/internal/queue"
	"lorayard/internal/storage"
	"lorayard/internal/store"
	"lorayard/internal/trainer"
)

// finding is one line of the doctor's table.
type finding struct {
	what string
	seen string // what was found, when all is well
	err  error
	todo string // what to do about err
	mild bool   // jobs run in spite of err
}

// doctor looks at everything that a run needs and prints a table; the error is
// for the exit code. settingsErr is what was wrong with the settings: the rest
// is still looked at.
func doctor(ctx context.Context, s settings, settingsErr error, w io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	// Once: a host without persistence mode wakes its GPUs at each opening.
	h, openErr := openDevices(ctx, s)
	if openErr == nil {
		defer h.close()
	}
	findings := []finding{
		{what: "settings", seen: "complete", err: settingsErr, todo: "see agent run --help and deploy/agent.env.example"},
		{what: "host", seen: cpus()},
		lookAtDriver(h),
		lookAtDevices(h, openErr),
		lookAtModes(ctx, h),
		lookAtKernelLog(s),
		lookAtCgroup(),
		lookAtDisk(s),
		lookAtModels(s),
		lookAtTrainer(ctx, s),
		lookAtPostgres(ctx, s),
		lookAtRedis(ctx, s),
		lookAtStorage(ctx, s),
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	problems := 0
	for _, f := range findings {
		level := "ok"
		switch {
		case f.err != nil && f.mild:
			level = "warn"
		case f.err != nil:
			level = "fail"
			problems++
		}
		said := f.seen
		if f.err != nil {
			said = strings.ReplaceAll(f.err.Error(), "\n", "; ")
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\n", level, f.what, said)
		if f.err != nil {
			fmt.Fprintf(tw, "\t\t→ %s\n", f.todo)
		}
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	if problems > 0 {
		return fmt.Errorf("%d problems found: no job would run here", problems)
	}
	return nil
}

func lookAtDevices(h *host, err error) finding {
	f := finding{what: "devices", todo: "install NVIDIA's driver (nvidia-smi must list the GPUs), or set PRETEND_GPUS for development"}
	if err != nil {
		f.err = err
		if errors.Is(err, nvml.ErrUnavailable) {
			f.todo = "this host has no NVIDIA driver: install it, or set PRETEND_GPUS for development"
		}
		return f
	}
	var names []string
	for _, d := range h.list {
		name := fmt.Sprintf("%d: %s (%s, %d GiB)", d.Index, d.Name, d.Class, d.MemoryBytes>>30)
		if d.Fault != "" {
			name += " NOT FIT: " + d.Fault
		}
		names = append(names, name)
	}
	f.seen = strings.Join(names, ", ")
	if unfit := slices.DeleteFunc(slices.Clone(h.list), func(d gpu.Device) bool { return d.Fault == "" }); len(unfit) > 0 {
		f.err, f.mild = errors.New(f.seen), len(unfit) < len(h.list)
		f.todo = "look at the kernel log (dmesg) and nvidia-smi -q for those that are not fit; the others are used"
	}
	return f
}

// lookAtDriver says what the installed driver cannot tell; h is nil when it
// could not be opened.
func lookAtDriver(h *host) finding {
	f := finding{what: "driver", mild: true, todo: "a driver of version 550 or newer tells all; with this one these things are not watched"}
	switch {
	case h == nil:
		f.seen = "not open" // why stands at the devices
		return f
	case h.driver == nil:
		f.seen = "pretended"
		return f
	}
	version, cuda := h.driver.Versions()
	f.seen = fmt.Sprintf("%s, CUDA %s", version, cuda)
	if missing := h.driver.Missing(); len(missing) > 0 {
		f.err = fmt.Errorf("driver %s does not tell all: its library has no %s", version, strings.Join(missing, ", "))
	}
	return f
}

// lookAtKernelLog says whether a GPU that falls off the bus would be noticed at once.
func lookAtKernelLog(s settings) finding {
	f := finding{what: "kernel log", seen: "not watched", mild: true, todo: "let the agent read it (CAP_SYSLOG, or group adm): the driver's library does not tell of every error"}
	if s.KernelLog == "" || s.PretendGPUs > 0 {
		return f
	}
	file, err := os.OpenFile(s.KernelLog, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		f.err = err
		return f
	}
	_ = file.Close()
	f.seen = s.KernelLog + " can be read"
	return f
}

// lookAtCgroup says whether a trainer gets a control group of its own, which the
// kernel ends in one step.
func lookAtCgroup() finding {
	f := finding{what: "cgroup", mild: true, todo: "run the agent as the systemd unit in deploy/systemd, which has Delegate=yes; without it trainers are ended by process group"}
	raw, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		f.err = err
		return f
	}
	_, path, ok := strings.Cut(strings.TrimSpace(string(raw)), "0::")
	if !ok || strings.Contains(path, "\n") {
		f.err = errors.New("this host has control groups of version 1")
		return f
	}
	dir := filepath.Join("/sys/fs/cgroup", path)
	if err := syscall.Access(dir, 2); err != nil { // to write
		f.err = fmt.Errorf("%s is not ours to divide: %w", dir, err)
		return f
	}
	f.seen = dir + " may be divided"
	return f
}

func lookAtDisk(s settings) finding {
	f := finding{what: "disk", todo: "free some space, or point DATA_DIR at a larger disk"}
	if f.err = os.MkdirAll(s.DataDir, 0o700); f.err != nil {
		f.todo = "point DATA_DIR at a directory that this user may write"
		return f
	}
	var st syscall.Statfs_t
	if f.err = syscall.Statfs(s.DataDir, &st); f.err != nil {
		return f
	}
	free := int64(st.Bavail) * st.Bsize
	f.seen = fmt.Sprintf("%d GiB free in %s", free>>30, s.DataDir)
	if free < s.MinFree {
		f.err = fmt.Errorf("%s, less than MIN_FREE_BYTES", f.seen)
	}
	return f
}

func lookAtModels(s settings) finding {
	f := finding{what: "base models", todo: "put each base model into " + s.ModelsDir + "/<owner>/<name> (config.json, tokenizer, safetensors)"}
	models, err := modelsIn(s.ModelsDir)
	switch {
	case err != nil:
		f.err = err
	case len(models) == 0:
		f.err = fmt.Errorf("none in %s", s.ModelsDir)
	}
	f.seen = strings.Join(models, ", ")
	return f
}

func lookAtTrainer(ctx context.Context, s settings) finding {
	f := finding{what: "trainer", todo: "set TRAINER_PYTHON to the environment made by scripts/setup, and TRAINER_DIR to scripts/train"}
	var out, text bytes.Buffer
	p, err := proc.Start(proc.Cmd{
		Path: s.Python, Args: []string{"-m", "lora_train", "--check"}, Dir: s.TrainerDir,
		Env: trainer.Environment(os.Environ(), nil, os.TempDir(), nil), Stdout: &out, Stderr: &text,
	})
	if err != nil {
		f.err = err
		return f
	}
	go func() {
		select {
		case <-ctx.Done():
			_ = p.Kill()
		case <-p.Done():
		}
	}()
	exit, err := p.Wait()
	var versions map[string]any
	switch {
	case err != nil:
		f.err = err
	case exit.Code != 0:
		f.err = fmt.Errorf("`python -m lora_train --check` ended with %v: %s", exit, lastLine(text.String()))
	case json.Unmarshal(out.Bytes(), &versions) != nil:
		f.err = fmt.Errorf("`python -m lora_train --check` did not answer: %s", lastLine(out.String()))
	default:
		f.seen = strings.TrimSpace(out.String())
	}
	return f
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndexByte(s, '\n')+1:]
}

func lookAtPostgres(ctx context.Context, s settings) finding {
	f := finding{what: "Postgres", seen: "answers, the agent's functions may be run", todo: "check DATABASE_URL and the network; the login must be in role lorayard_agent of a migrated database"}
	st, err := store.Open(ctx, s.DatabaseURL.Reveal(), store.Options{Name: "lorayard-doctor", MaxConns: 1})
	if err != nil {
		f.err = err
		return f
	}
	defer st.Close()
	f.err = st.CheckAgent(ctx)
	return f
}

func lookAtRedis(ctx context.Context, s settings) finding {
	f := finding{what: "Redis", seen: "answers", todo: "check REDIS_URL and the network"}
	q, err := queue.Dial(s.RedisURL.Reveal())
	if err != nil {
		f.err = err
		return f
	}
	defer q.Close()
	f.err = q.Ping(ctx)
	return f
}

func lookAtStorage(ctx context.Context, s settings) finding {
	f := finding{what: "Storage", seen: "answers", todo: "check SUPABASE_URL and the network"}
	c, err := storage.Open(storage.Config{URL: s.SupabaseURL, Attempts: 1})
	if err != nil {
		f.err = err
		return f
	}
	defer c.Close()
	_, f.err = c.MaxUploadBytes(ctx) // needs no key
	return f
}
