// Package trainer starts one Python trainer on given devices, yields its
// events, and names its failure. The child gets a plan file, two descriptors
// and an environment of its own; no key of ours is ever in it.
//
// The trainer may outlive the agent: HandOver leaves it to its shim, and Adopt
// finds it again by its run directory, with every event that it ever sent.
package trainer

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/proc"
	"lorayard/internal/wire"
)

// Trainer knows where Python and the package are.
type Trainer struct {
	Python  string            // interpreter of the trainer's environment
	Dir     string            // directory that holds the package lora_train
	Shim    []string          // argv that re-executes this binary as the shim; needed
	Backend string            // torch or dry
	Dry     *wire.Dry         // the script of the dry backend
	Env     map[string]string // beyond the allow-list, such as library paths
}

// allowed are the variables of our own environment that the trainer may see.
var allowed = []string{"PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES"}

// Environment is all that the trainer sees: the allow-list out of environ,
// offline switches, and the devices by UUID.
func Environment(environ []string, devices []string, home string, extra map[string]string) []string {
	env := []string{
		"HOME=" + home, "TMPDIR=" + home, "PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1", "PYTHONNOUSERSITE=1",
		"HF_HUB_OFFLINE=1", "TRANSFORMERS_OFFLINE=1", "HF_HUB_DISABLE_TELEMETRY=1", "DO_NOT_TRACK=1", "TOKENIZERS_PARALLELISM=false",
		"CUDA_DEVICE_ORDER=PCI_BUS_ID", "CUDA_VISIBLE_DEVICES=" + strings.Join(devices, ","),
	}
	for _, kv := range environ {
		name, _, _ := strings.Cut(kv, "=")
		for _, a := range allowed {
			if name == a {
				env = append(env, kv)
			}
		}
	}
	for k, v := range extra {
		env = append(env, k+"="+v)
	}
	return env
}

// Options are those of one run.
type Options struct {
	// Deadline is how long from now the trainer may run unless Extend is
	// called: the longest time out of touch. 0 is for ever.
	Deadline time.Duration

	// Orphaned is given to the hook of the shim when it has ended the trainer
	// because the agent is gone; empty for none.
	Orphaned string

	// Grace is how long the trainer may take to save and leave after a
	// hand-over that nobody answered.
	Grace time.Duration

	// Near is where the trainer runs best.
	Near Near
}

// Near names the processors and the memory that are next to the devices. Its
// zero value names none.
type Near struct {
	CPUs    string // a list as the kernel writes it, 0-15,32-47; empty: any
	Memory  string // NUMA nodes in the same form; empty: any
	Threads int    // a fair share of the processors; 0: not known
}

// near tells libraries that look nowhere else how many threads to use.
func near(env []string, threads int) []string {
	if threads > 0 {
		env = append(env, fmt.Sprintf("OMP_NUM_THREADS=%d", threads))
	}
	return env
}

// Files in the run directory beside those of the protocol.
const (
	planFile   = "plan.json"
	eventsFile = "events.jsonl"
	logFile    = "trainer.log" // its text, of which the shim keeps the newest 4 to 8 MiB
	socketFile = "shim.sock"   // where the shim waits to be adopted
	exitFile   = "exit.json"   // how the trainer ended, once all that it started is gone
)

// Start writes the plan into its run directory and starts the child. devices
// are UUIDs; empty means that the trainer uses the CPU.
func (t *Trainer) Start(plan wire.Plan, devices []string, environ []string, o Options) (*Run, error) {
	plan.Backend, plan.Dry, plan.Devices = t.Backend, t.Dry, max(1, len(devices))
	dir := plan.RunDir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the run directory: %w", err)
	}
	path := filepath.Join(dir, planFile)
	if err := wire.WritePlan(path, plan); err != nil {
		return nil, err
	}
	eventsR, eventsW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make the event pipe: %w", err)
	}
	commandsR, commandsW, err := os.Pipe()
	if err != nil {
		eventsR.Close()
		eventsW.Close()
		return nil, fmt.Errorf("make the command pipe: %w", err)
	}
	p, err := proc.Start(proc.Cmd{
		Path: t.Python, Args: []string{"-m", "lora_train", "--plan", path}, Dir: t.Dir,
		Env:   near(Environment(environ, devices, dir, t.Env), plan.Threads),
		Extra: []*os.File{eventsW, commandsR}, Shim: t.Shim,
		Grace: o.Grace, Deadline: o.Deadline, Orphaned: o.Orphaned,
		Log: filepath.Join(dir, logFile), Socket: filepath.Join(dir, socketFile), Record: filepath.Join(dir, exitFile),
		CPUs: o.Near.CPUs, Memory: o.Near.Memory,
	})
	eventsW.Close()
	commandsR.Close()
	if err != nil {
		eventsR.Close()
		commandsW.Close()
		kind := job.TrainerCrashed
		if errors.Is(err, proc.ErrLate) {
			kind, err = job.AgentLost, fmt.Errorf("%w: %w", errOutOfTouch, err)
		}
		return nil, &job.Failure{Kind: kind, Err: fmt.Errorf("start the trainer: %w", err)}
	}
	r := newRun(p, dir, 0)
	r.tap, r.commands = &tap{pipe: eventsR}, commandsW
	go r.read(r.tap)
	return r, nil
}

// Adopt takes charge of the trainer that runs in runDir, which another agent
// has handed over. Events yields all that the trainer ever sent, from the first
// one on: those up to after, which the caller has had before, are marked Old.
// When the trainer ended meanwhile, Events yields what it left, and Wait tells
// how it ended.
//
// A Failure of kind trainer_crashed says that the trainer is gone and left no
// trace of its end. ErrInCharge says that it is there, and not to be had.
func Adopt(runDir string, after uint64) (*Run, error) {
	p, files, err := proc.Adopt(filepath.Join(runDir, socketFile), filepath.Join(runDir, exitFile), 0)
	if errors.Is(err, proc.ErrShimLost) {
		return nil, &job.Failure{Kind: job.TrainerCrashed, Err: withLog(fmt.Errorf("adopt the trainer: %w", err), runDir)}
	}
	if err != nil {
		return nil, fmt.Errorf("adopt the trainer: %w", err)
	}
	r := newRun(p, runDir, after)
	if len(files) == 2 {
		r.tap, r.commands = &tap{pipe: files[0]}, files[1]
	} else if len(files) != 0 {
		for _, f := range files {
			f.Close()
		}
		_ = p.Kill()
		return nil, &job.Failure{Kind: job.TrainerCrashed, Err: fmt.Errorf("adopt the trainer: its shim kept %d files, not 2", len(files))}
	}
	// Opened now that nobody else reads the pipe: what is not in the file yet
	// is still to come there. A trainer that just began has no file.
	history, err := os.Open(filepath.Join(runDir, eventsFile))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		_ = p.Kill()
		r.closePipes()
		return nil, &job.Failure{Kind: job.TrainerCrashed, Err: fmt.Errorf("adopt the trainer: %w", err)}
	}
	go func() {
		defer history.Close()
		r.read(newRejoin(history, r.tap))
	}()
	return r, nil
}
