package attempt

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/storage"
	"lorayard/internal/store"
	"lorayard/internal/wire"
)

// prepare brings everything to the host that the trainer needs and writes the
// plan.
func (x *run) prepare(ctx context.Context) (wire.Plan, error) {
	x.enter(job.StageDownloading)
	if err := x.checkDisk(); err != nil {
		return wire.Plan{}, err
	}
	model := filepath.Join(x.Config.ModelsDir, filepath.FromSlash(x.as.Spec.BaseModel))
	if _, err := os.Stat(filepath.Join(model, "config.json")); err != nil {
		return wire.Plan{}, &job.Failure{Kind: job.ModelMissing, Err: fmt.Errorf("base model %s: %w", x.as.Spec.BaseModel, err)}
	}
	path, digest, err := x.dataset(ctx)
	if err != nil {
		return wire.Plan{}, err
	}
	if x.takes, err = x.limit(ctx); err != nil {
		return wire.Plan{}, x.fetchFailure(ctx, fmt.Errorf("ask what Storage takes: %w", err))
	}
	resume, step, err := x.checkpoint(ctx)
	if err != nil {
		return wire.Plan{}, err
	}
	if err := x.setResumeStep(ctx, step); err != nil {
		return wire.Plan{}, err
	}
	s := x.as.Spec
	device := "cuda"
	if x.Config.Pretend {
		device = "cpu"
	}
	return wire.Plan{
		Job: string(x.as.Ref.Job), Attempt: x.as.Ref.Attempt, RunDir: x.dir, Device: device,
		Quantisation: s.Quantisation, BaseModel: wire.BaseModel{Name: s.BaseModel, Path: model},
		Data: wire.Data{Path: path, SHA256: digest, TooLong: s.TooLong},
		Hyperparameters: wire.Hyperparameters{
			LearningRate: s.LearningRate, BatchSize: s.BatchSize, Epochs: s.Epochs, Rank: s.Rank, Alpha: s.Alpha, Dropout: s.Dropout,
			WarmupSteps: s.WarmupSteps, WeightDecay: s.WeightDecay, MaxSeqLength: s.MaxSeqLength, Seed: s.Seed,
			EarlyStoppingPatience: s.EarlyStoppingPatience,
		},
		Merged: s.Merged, MergedFileBytes: mergedFileBytes(x.takes),
		ValidationFraction: 0.05, CheckpointEverySeconds: x.Config.CheckpointEvery.Seconds(), KeepCheckpoints: 2,
		ResumeFrom: resume, CacheDir: filepath.Join(x.Config.DataDir, "tokens"), Threads: x.threads(), Sanity: x.live.Devices.Check,
	}, nil
}

// threads is how many the trainer's libraries use: what the operator says, else
// what the processors near its devices give each of them.
func (x *run) threads() int {
	if x.Config.Threads > 0 {
		return x.Config.Threads
	}
	return x.live.Devices.Near.Threads
}

// mergedFileBytes is how large a file of a merged model may be where Storage
// takes so many bytes in one, 0 for any number: a tenth is left for what stands
// around the tensors.
func mergedFileBytes(takes int64) int64 {
	if takes <= 0 {
		return 0
	}
	return min(4_900_000_000, takes-takes/10)
}

// setResumeStep records the step to go on from.
func (x *run) setResumeStep(ctx context.Context, step int) error {
	return x.patiently(ctx, "the step to go on from is not recorded yet", func(ctx context.Context) error {
		return x.Store.SetResumeStep(ctx, x.as.Ref, step)
	})
}

// patiently waits for a database that is away: that is no reason to give a job
// back whose devices are here.
func (x *run) patiently(ctx context.Context, said string, call func(context.Context) error) error {
	for wait := 200 * time.Millisecond; ; wait = min(2*wait, 5*time.Second) {
		limited, cancel := context.WithTimeout(ctx, 15*time.Second)
		err := call(limited)
		cancel()
		if err == nil || job.KindOf(err) == job.LeaseLost || store.IsData(err) {
			return err
		}
		x.log.WarnContext(ctx, said, "err", err)
		select {
		case <-ctx.Done():
			return stopped(ctx)
		case <-time.After(wait/2 + rand.N(wait)):
		}
	}
}

func (x *run) checkDisk() error {
	var st syscall.Statfs_t
	if err := syscall.Statfs(x.Config.DataDir, &st); err != nil {
		return &job.Failure{Kind: job.DiskFull, Err: fmt.Errorf("look at the disk: %w", err)}
	}
	free := int64(st.Bavail) * st.Bsize
	need := x.Config.MinFreeBytes + 2*x.as.Dataset.Bytes
	if free < need {
		return &job.Failure{Kind: job.DiskFull, Err: fmt.Errorf("%d bytes are free in %s, %d are needed", free, x.Config.DataDir, need)}
	}
	return nil
}

// dataset fetches the data file: the one that the validation wrote, else the
// user's own. Files are kept by their digest; what a path held the last time is
// remembered by the version that Storage gives.
func (x *run) dataset(ctx context.Context) (path, digest string, err error) {
	d := x.as.Dataset
	var file store.DataFile
	err = x.patiently(ctx, "which file to train on is not known yet", func(ctx context.Context) (err error) {
		file, err = x.Store.DataFile(ctx, x.as.Ref)
		return err
	})
	if err != nil {
		return "", "", err
	}
	d.Bucket, d.Path = file.Bucket, file.Path
	info, err := x.look(ctx, d.Bucket, d.Path, 0)
	if err != nil {
		return "", "", x.fetchFailure(ctx, fmt.Errorf("look at data set %s: %w", d.ID, err))
	}
	cache := filepath.Join(x.Config.DataDir, "datasets")
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return "", "", &job.Failure{Kind: job.DiskFull, Err: fmt.Errorf("make the data-set cache: %w", err)}
	}
	version := sha256.Sum256([]byte(strings.Join([]string{d.Bucket, d.Path, info.ETag, fmt.Sprint(info.Bytes)}, "\x00")))
	note := filepath.Join(cache, hex.EncodeToString(version[:])+".digest")
	if raw, err := os.ReadFile(note); err == nil {
		digest = strings.TrimSpace(string(raw))
		path = filepath.Join(cache, digest+".jsonl")
		if st, err := os.Stat(path); err == nil && st.Size() == info.Bytes {
			x.ship.Say("info", fmt.Sprintf("data set %s is on this host already (%d bytes)", d.Name, info.Bytes), "")
			return path, digest, nil
		}
	}
	part := filepath.Join(x.dir, "data.part")
	if file.SHA256 == "" {
		file.SHA256 = info.SHA256
	}
	obj, err := x.download(ctx, info, d.Bucket, d.Path, part, file.SHA256)
	if err != nil {
		return "", "", x.fetchFailure(ctx, fmt.Errorf("fetch data set %s: %w", d.ID, err))
	}
	path = filepath.Join(cache, obj.SHA256+".jsonl")
	if err := os.Rename(part, path); err != nil {
		return "", "", fmt.Errorf("keep data set %s: %w", d.ID, err)
	}
	if info.ETag != "" {
		if err := os.WriteFile(note, []byte(obj.SHA256+"\n"), 0o600); err != nil {
			return "", "", fmt.Errorf("note the digest of data set %s: %w", d.ID, err)
		}
	}
	x.ship.Say("info", fmt.Sprintf("downloaded data set %s: %d bytes, sha256 %s", d.Name, obj.Bytes, obj.SHA256), "")
	return path, obj.SHA256, nil
}

func (x *run) fetchFailure(ctx context.Context, err error) error {
	if s := stopped(ctx); s != nil {
		return s
	}
	if job.KindOf(err) == job.LeaseLost { // a grant is fenced
		return err
	}
	if storage.IsNotFound(err) {
		return &job.Failure{Kind: job.DatasetMissing, Message: "The data set's file is not in storage: upload it again.", Err: err}
	}
	return &job.Failure{Kind: job.StorageUnavailable, Err: err}
}

// checkpoint fetches the newest checkpoint of earlier attempts whose files
// have the recorded digests, and returns its directory and step; none means
// that training starts from the beginning.
func (x *run) checkpoint(ctx context.Context) (dir string, step int, err error) {
	for _, c := range x.as.Checkpoints {
		dir = filepath.Join(x.dir, "resume", fmt.Sprintf("step-%08d", c.Step))
		err := x.fetchCheckpoint(ctx, c, dir)
		if err == nil {
			x.ship.Say("info", fmt.Sprintf("going on from the checkpoint of step %d", c.Step), "resumed")
			x.log.InfoContext(ctx, "resuming", "step", c.Step)
			return dir, c.Step, nil
		}
		if s := stopped(ctx); s != nil {
			return "", 0, s
		}
		if job.KindOf(err) == job.LeaseLost {
			return "", 0, err
		}
		if !unusable(err) {
			return "", 0, &job.Failure{Kind: job.StorageUnavailable, Err: err}
		}
		// The one before it still helps.
		x.log.WarnContext(ctx, "checkpoint not usable, trying an older one", "step", c.Step, "err", err)
		x.ship.Say("warn", fmt.Sprintf("the checkpoint of step %d is not usable, trying an older one", c.Step), "checkpoint_skipped")
	}
	return "", 0, nil
}

// unusable says that a checkpoint is missing or damaged. Whatever else keeps us
// from it, a key that is over or a full disk, is no reason to train again what
// it holds.
func unusable(err error) bool {
	_, ours := errors.AsType[*storage.Error](err)
	return !ours || storage.IsNotFound(err) || errors.Is(err, storage.ErrDigest)
}

func (x *run) fetchCheckpoint(ctx context.Context, c job.Checkpoint, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make a directory for the checkpoint of step %d: %w", c.Step, err)
	}
	for _, f := range c.Files {
		if !fs.ValidPath(f.Name) {
			return fmt.Errorf("checkpoint of step %d has a file named %q", c.Step, f.Name)
		}
		key := c.Path + "/" + f.Name
		g, err := x.look(ctx, c.Bucket, key, 0)
		if err == nil {
			_, err = x.download(ctx, g, c.Bucket, key, filepath.Join(dir, f.Name), f.SHA256)
		}
		if err != nil {
			return fmt.Errorf("fetch the checkpoint of step %d: %w", c.Step, err)
		}
	}
	return nil
}
