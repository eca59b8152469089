//go:build linux

package trainer_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"lorayard/internal/job"
	"lorayard/internal/proc"
	"lorayard/internal/trainer"
	"lorayard/internal/wire"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "shim" {
		os.Exit(proc.RunShim(os.Args[2:], func(path string) {
			_ = os.WriteFile(path, []byte("orphaned\n"), 0o600)
		}))
	}
	goleak.VerifyTestMain(m)
}

// dry is a trainer of the dry backend, with a run directory as an agent has it.
func dry(t *testing.T, script wire.Dry) (*trainer.Trainer, wire.Plan) {
	t.Helper()
	python := os.Getenv("TRAINER_PYTHON")
	if python == "" {
		if os.Getenv("CI") == "true" {
			t.Fatal("TRAINER_PYTHON is not set: run `make test`, which sets up the trainer's environment")
		}
		t.Skip("TRAINER_PYTHON is not set: run `make test`")
	}
	dir, err := filepath.Abs("../../scripts/train")
	if err != nil {
		t.Fatal(err)
	}
	script.Loss = [2]float64{3.2, 0.4}
	return &trainer.Trainer{Python: python, Dir: dir, Shim: []string{"/proc/self/exe", "shim"}, Backend: "dry", Dry: &script}, plan(t)
}

func plan(t *testing.T) wire.Plan {
	t.Helper()
	dir := t.TempDir()
	return wire.Plan{
		Job: "7f000000-0000-4000-8000-000000000000", Attempt: 1, RunDir: filepath.Join(dir, strings.Repeat("r", 80), "run"), Device: "cpu",
		BaseModel: wire.BaseModel{Name: "lorayard/demo-llama", Path: dir}, Data: wire.Data{Path: filepath.Join(dir, "data.jsonl"), SHA256: strings.Repeat("0", 64)},
		Hyperparameters: wire.Hyperparameters{LearningRate: 1e-4, BatchSize: 4, Epochs: 1, Rank: 16, Alpha: 32, MaxSeqLength: 2048, Seed: 42},
		KeepCheckpoints: 2,
	}
}

// fake is a trainer that is a shell script.
func fake(t *testing.T, script string) (*trainer.Trainer, wire.Plan) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "python")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
	return &trainer.Trainer{Python: path, Shim: []string{"/proc/self/exe", "shim"}}, plan(t)
}

func start(t *testing.T, tr *trainer.Trainer, p wire.Plan, o trainer.Options) *trainer.Run {
	t.Helper()
	r, err := tr.Start(p, nil, os.Environ(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { finish(r) })
	return r
}

func finish(r *trainer.Run) {
	r.Kill()
	for range r.Events() {
	}
	_ = r.Wait()
}

func adopt(t *testing.T, p wire.Plan, after uint64) *trainer.Run {
	t.Helper()
	r, err := trainer.Adopt(p.RunDir, after)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { finish(r) })
	return r
}

// until reads events up to seq, and proves that each is the one after the last.
func until(t *testing.T, r *trainer.Run, seq, after uint64) (last wire.Event) {
	t.Helper()
	for e := range r.Events() {
		if e.Seq != last.Seq+1 {
			t.Fatalf("event %d follows event %d", e.Seq, last.Seq)
		}
		if e.Old != (e.Seq <= after) {
			t.Fatalf("event %d after %d: old is %t", e.Seq, after, e.Old)
		}
		if parsed, err := wire.Parse(e.Line); err != nil || parsed.Seq != e.Seq {
			t.Fatalf("line of event %d: %s, %v", e.Seq, e.Line, err)
		}
		last = e.Event
		if e.Seq == seq {
			return last
		}
	}
	return last
}

const toTheEnd = 1 << 62

func TestTheTrainerLearnsItsDevices(t *testing.T) {
	tr, p := fake(t, `echo "$CUDA_VISIBLE_DEVICES" > "$HOME/seen"`)
	r, err := tr.Start(p, []string{"GPU-a", "GPU-b"}, os.Environ(), trainer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for range r.Events() {
	}
	_ = r.Wait()
	seen, err := os.ReadFile(filepath.Join(p.RunDir, "seen"))
	if err != nil || string(seen) != "GPU-a,GPU-b\n" {
		t.Fatalf("the trainer saw %q, %v", seen, err)
	}
	raw, err := os.ReadFile(filepath.Join(p.RunDir, "plan.json"))
	if err != nil {
		t.Fatal(err)
	}
	var written wire.Plan
	if err := json.Unmarshal(raw, &written); err != nil || written.Devices != 2 {
		t.Fatalf("the plan says %d devices, %v", written.Devices, err)
	}
}

func TestARunThatIsHandedOnLosesNoEvent(t *testing.T) {
	// So fast that the pipe is never empty: it is cut anywhere.
	tr, p := dry(t, wire.Dry{Steps: 3000, StepSeconds: 0.0005})
	r := start(t, tr, p, trainer.Options{Deadline: time.Hour})
	pid := r.PID()
	var after uint64
	for n := uint64(100); n <= 1500; n += 350 {
		until(t, r, n, after)
		seq, err := r.HandOver(time.Minute)
		if errors.Is(err, os.ErrProcessDone) {
			t.Fatal("the trainer ended before it was handed over: it needs more steps")
		}
		if err != nil || seq != n {
			t.Fatalf("hand over: %d, %v; want %d", seq, err, n)
		}
		if e, more := <-r.Events(); more {
			t.Errorf("event %d after the hand-over", e.Seq)
		}
		if err := r.Wait(); !errors.Is(err, trainer.ErrHandedOver) {
			t.Errorf("Wait: %v, want ErrHandedOver", err)
		}
		after = seq
		r = adopt(t, p, after)
		if r.PID() != 0 && r.PID() != pid {
			t.Errorf("adopted %d, want %d", r.PID(), pid)
		}
	}
	if last := until(t, r, toTheEnd, after); last.Ev != "exit" || last.Code != "0" {
		t.Errorf("the last event is %s of code %s", last.Ev, last.Code)
	}
	if err := r.Wait(); err != nil {
		t.Errorf("Wait: %v", err)
	}
}

func TestAHandOverWhileTheReaderWaitsForThePipe(t *testing.T) {
	tr, p := dry(t, wire.Dry{Steps: 3, StepSeconds: 3600})
	r := start(t, tr, p, trainer.Options{})
	// hello, two stages, plan, training: then nothing but heartbeats.
	last := until(t, r, 5, 0)
	if last.Stage != "training" {
		t.Fatalf("event 5 is %v", last)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range r.Events() {
		}
	}()
	seq, err := r.HandOver(time.Minute)
	if err != nil || seq < 5 {
		t.Fatalf("hand over: %d, %v", seq, err)
	}
	<-done
	_ = r.Wait()
	r = adopt(t, p, seq)
	if last := until(t, r, 5, seq); last.Seq != 5 {
		t.Fatalf("the last event is %d", last.Seq)
	}
	r.Leave(time.Minute)
	for e := range r.Events() {
		last = e.Event
	}
	if last.Ev != "exit" || last.Code != "75" {
		t.Errorf("the last event is %v", last)
	}
	if err := r.Wait(); job.KindOf(err) != job.Preempted {
		t.Errorf("Wait: %v, want preempted", err)
	}
}

func TestATrainerEndsWhileNobodyIsThere(t *testing.T) {
	for name, script := range map[string]wire.Dry{
		"well":  {Steps: 50, StepSeconds: 0.002},
		"badly": {Steps: 50, StepSeconds: 0.002, ExitAtStep: 40, ExitCode: 81},
	} {
		t.Run(name, func(t *testing.T) {
			tr, p := dry(t, script)
			r := start(t, tr, p, trainer.Options{})
			until(t, r, 7, 0)
			gone := watch(t, parentOf(t, r.PID()))
			seq, err := r.HandOver(time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			gone()
			for range 2 {
				r = adopt(t, p, seq)
				if _, err := r.HandOver(time.Minute); !errors.Is(err, os.ErrProcessDone) {
					t.Errorf("hand over what has ended: %v", err)
				}
				last := until(t, r, toTheEnd, seq)
				err = r.Wait()
				if script.ExitCode == 0 && (last.Ev != "exit" || err != nil) {
					t.Errorf("ends with %s, %v", last.Ev, err)
				}
				if script.ExitCode != 0 && job.KindOf(err) != job.OutOfMemory {
					t.Errorf("Wait: %v, want out_of_memory", err)
				}
			}
		})
	}
}

func TestNobodyAdoptsSoTheTrainerSavesAndLeaves(t *testing.T) {
	tr, p := dry(t, wire.Dry{Steps: 5000, StepSeconds: 0.01})
	orphaned := filepath.Join(t.TempDir(), "orphaned")
	r := start(t, tr, p, trainer.Options{Grace: time.Minute, Orphaned: orphaned})
	until(t, r, 8, 0) // it has trained a step
	gone := watch(t, parentOf(t, r.PID()))
	if _, err := r.HandOver(time.Millisecond); err != nil {
		t.Fatal(err)
	}
	gone()
	if _, err := os.Stat(orphaned); err != nil {
		t.Errorf("the hook was not called: %v", err)
	}
	r = adopt(t, p, 0)
	var saved bool
	for e := range r.Events() {
		saved = saved || e.Ev == "checkpoint" && e.Final
	}
	if err := r.Wait(); job.KindOf(err) != job.Preempted || !saved {
		t.Errorf("Wait: %v, saved %t; want preempted with a checkpoint", err, saved)
	}
}

func TestKillEndsTheTrainer(t *testing.T) {
	tr, p := dry(t, wire.Dry{Steps: 5000, StepSeconds: 0.01, IgnoreSIGTERM: true})
	r := start(t, tr, p, trainer.Options{})
	until(t, r, 8, 0)
	seq, err := r.HandOver(time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	r = adopt(t, p, seq)
	pid := r.PID()
	r.Kill()
	for range r.Events() {
	}
	if err := r.Wait(); job.KindOf(err) != job.Preempted {
		t.Errorf("Wait: %v, want preempted", err)
	}
	if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
		t.Errorf("trainer %d: %v, want it gone", pid, err)
	}
}

func TestOutOfTouchForTooLong(t *testing.T) {
	tr, p := fake(t, "sleep 3600")
	if _, err := tr.Start(p, nil, nil, trainer.Options{Deadline: -time.Second}); job.KindOf(err) != job.AgentLost {
		t.Errorf("Start: %v, want agent_lost", err)
	}
	r := start(t, tr, p, trainer.Options{Deadline: time.Hour})
	if err := r.Extend(time.Millisecond); err != nil {
		t.Fatal(err)
	}
	for range r.Events() {
	}
	if err := r.Wait(); job.KindOf(err) != job.AgentLost || !strings.Contains(err.Error(), "out of touch for too long") {
		t.Errorf("Wait: %v, want agent_lost", err)
	}
}

func TestACrashShowsTheEndOfTheLog(t *testing.T) {
	for kind, script := range map[job.Kind]string{
		job.TrainerCrashed: `i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done; printf 'half\rModule\000NotFound\377\033[1m boom\n' >&2; exit 1`,
		job.Protocol:       `echo boom; echo nonsense >&3; sleep 3600`,
	} {
		t.Run(string(kind), func(t *testing.T) {
			tr, p := fake(t, script)
			r := start(t, tr, p, trainer.Options{})
			for range r.Events() {
			}
			err := r.Wait()
			f, ok := errors.AsType[*job.Failure](err)
			if !ok || f.Kind != kind || f.Message != "" {
				t.Fatalf("Wait: %#v, want %s without words for the user", err, kind)
			}
			text := f.Err.Error()
			if !strings.HasSuffix(text, "boom") || len(text) > 5<<10 || strings.Count(text, "\n") > 31 {
				t.Errorf("told: %s", text)
			}
			if strings.ContainsAny(text, "\x00\x1b\r") || !utf8.ValidString(text) {
				t.Errorf("told: %q", text)
			}
		})
	}
}

func TestATrainerThatNobodyTookOverIsTheAgentsLoss(t *testing.T) {
	tr, p := fake(t, "trap '' TERM; echo deaf; while :; do sleep 1; done")
	r := start(t, tr, p, trainer.Options{Grace: time.Millisecond})
	gone := watch(t, parentOf(t, r.PID()))
	if _, err := r.HandOver(time.Millisecond); err != nil {
		t.Fatal(err)
	}
	gone()
	r = adopt(t, p, 0)
	for range r.Events() {
	}
	if err := r.Wait(); job.KindOf(err) != job.AgentLost {
		t.Errorf("Wait: %v, want agent_lost", err)
	}
}

func TestATrainerWithoutATraceHasCrashed(t *testing.T) {
	if _, err := trainer.Adopt(t.TempDir(), 0); job.KindOf(err) != job.TrainerCrashed {
		t.Errorf("adopt: %v, want trainer_crashed", err)
	}
}

// parentOf reads the parent of pid: the shim.
func parentOf(t *testing.T, pid int) int {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	var parent int
	if _, err := fmt.Sscanf(string(raw[strings.LastIndexByte(string(raw), ')')+1:]), " %s %d", new(string), &parent); err != nil || parent == os.Getpid() {
		t.Fatalf("no shim above %d: %v", pid, err)
	}
	return parent
}

// watch gives a function that waits until the process has ended.
func watch(t *testing.T, pid int) func() {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return func() {
		t.Helper()
		for {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 30_000)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if n != 1 || err != nil {
				t.Fatalf("process %d lives on: %v", pid, err)
			}
			return
		}
	}
}
