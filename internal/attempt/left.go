package attempt

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/trainer"
)

// What stands in an attempt's directory for whoever comes after this process:
//
//	attempt.json   the assignment, from the accept on
//	handover.json  how far the process came; only where it stepped aside
//	the rest       of the trainer and its shim, which holds a lock on the
//	               directory while anything of the attempt may be alive
//
// A process that was killed leaves no handover.json: its shims have ended the
// trainers, and the attempt is given away.
const (
	journalFile  = "attempt.json"
	handOverFile = "handover.json"
)

// Left is an attempt that an earlier process of this agent left running, or
// about to be begun again.
type Left struct {
	Dir        string
	Assignment job.Assignment
	note       handOver
}

// handOver is how far the process before came.
type handOver struct {
	Event     uint64 `json:"event"`     // the last of the trainer's events that is in the spool
	Published int    `json:"published"` // step of the newest checkpoint in Storage
}

// writeJSON writes a file that is there whole or not at all.
func writeJSON(path string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", filepath.Base(path), err)
	}
	if err := os.WriteFile(path+".new", raw, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", filepath.Base(path), err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("write %s: %w", filepath.Base(path), err)
	}
	return nil
}

func readJSON(path string, v any) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(raw, v)
}

// Left lists the attempts that an earlier process stepped aside from. What else
// it left is waited for until it is dead, and removed: the devices of a killed
// process are free only when its trainers are gone.
func (r *Runner) Left(ctx context.Context) []Left {
	root := filepath.Join(r.Config.DataDir, "attempts")
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil // nothing was ever left
	}
	var out []Left
	for _, e := range entries {
		l := Left{Dir: filepath.Join(root, e.Name())}
		err := errors.Join(readJSON(filepath.Join(l.Dir, journalFile), &l.Assignment), readJSON(filepath.Join(l.Dir, handOverFile), &l.note))
		if err == nil {
			out = append(out, l)
			continue
		}
		if !errors.Is(err, fs.ErrNotExist) {
			r.Log.WarnContext(ctx, "what an attempt left cannot be read", "dir", l.Dir, "err", err)
		}
		r.clear(ctx, l.Dir)
	}
	return out
}

// clearLimit is how long a shim may take to end its trainer; it has SIGKILL and
// the whole tree, so this is generous.
const clearLimit = 30 * time.Second

// clear waits until nothing of an attempt is alive and removes its directory.
func (r *Runner) clear(ctx context.Context, dir string) {
	ctx, cancel := context.WithTimeout(ctx, clearLimit)
	defer cancel()
	if err := awaitShim(ctx, dir); err != nil {
		r.Log.ErrorContext(ctx, "something of an earlier attempt may still be alive", "dir", dir, "err", err)
		return
	}
	if err := os.RemoveAll(dir); err != nil {
		r.Log.WarnContext(ctx, "leftovers of an attempt not removed", "dir", dir, "err", err)
	}
}

// awaitShim returns when no shim holds the lock of an attempt's directory.
func awaitShim(ctx context.Context, dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open the attempt's directory: %w", err)
	}
	defer f.Close()
	// flock cannot be waited for with a deadline; its holder is dying, so it
	// is asked often and briefly.
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return err // nil, or a file system without locks
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the attempt's shim: %w", context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Discard ends an attempt that belongs to somebody else by now, and removes
// what it left.
func (r *Runner) Discard(ctx context.Context, l Left) {
	if child, err := trainer.Adopt(l.Dir, 0); err == nil {
		child.Kill()
		for range child.Events() { // to their end, as Wait wants
		}
		_ = child.Wait()
	}
	r.clear(ctx, l.Dir)
}
