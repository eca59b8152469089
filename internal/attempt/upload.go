package attempt

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"math"
	"mime"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"lorayard/internal/job"
	"lorayard/internal/ship"
	"lorayard/internal/wire"
)

// side is how many files are uploaded side by side.
const side = 3

// put uploads files of dir into a folder of the artifact bucket and returns
// them with the digests of what was sent; a digest that differs from the
// trainer's means that the file changed and is an error.
func (x *run) put(ctx context.Context, dir, folder string, files []wire.File) ([]job.File, error) {
	out := make([]job.File, len(files))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(side)
	for i, f := range files {
		g.Go(func() error {
			if !fs.ValidPath(f.Name) {
				return fmt.Errorf("the trainer named a file %q", f.Name)
			}
			obj, err := x.send(ctx, artifactBucket, folder+"/"+f.Name, filepath.Join(dir, f.Name), f.SHA256)
			if err != nil {
				return fmt.Errorf("upload %s: %w", f.Name, err)
			}
			if f.SHA256 != "" && obj.SHA256 != f.SHA256 {
				return fmt.Errorf("upload %s: its digest is %s, the trainer recorded %s", f.Name, obj.SHA256, f.SHA256)
			}
			out[i] = job.File{Name: f.Name, Bytes: obj.Bytes, SHA256: obj.SHA256}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return out, nil
}

func contentType(name string) string {
	switch ext := filepath.Ext(name); ext {
	case ".md", ".txt", ".jinja":
		return "text/plain; charset=utf-8"
	case ".jsonl":
		return "application/x-ndjson"
	default:
		if t := mime.TypeByExtension(ext); t != "" {
			return t
		}
		return "application/octet-stream"
	}
}

// artifactID follows from the attempt and its nonce: a path of one attempt is
// never a path of another.
func artifactID(ref job.Ref) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "lorayard:artifact:%s:%d:%s", ref.Job, ref.Attempt, ref.Nonce))
	b := sum[:16]
	b[6] = b[6]&0x0f | 0x80 // version 8: an id of our own making (RFC 9562)
	b[8] = b[8]&0x3f | 0x80
	h := hex.EncodeToString(b)
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// upload brings the adapter to Storage.
func (x *run) upload(ctx context.Context, e *wire.Event) (*job.Result, error) {
	x.enter(job.StageUploading)
	res := &job.Result{
		ArtifactID: artifactID(x.as.Ref), Files: map[string]string{}, Steps: e.Steps, Epochs: float64(e.Epochs),
		TrainingLoss: float64(e.TrainingLoss), ValidationLoss: ship.Finite(e.ValidationLoss), BaseValidation: ship.Finite(e.BaseValidationLoss),
		Perplexity: ship.Finite(e.Perplexity), Overfit: e.Overfit, Tokens: e.Tokens, TrainingDuration: time.Duration(float64(e.Seconds) * float64(time.Second)),
	}
	folder := x.as.User + "/" + res.ArtifactID
	files, err := x.put(ctx, e.Path, folder, e.Files)
	if err != nil {
		if s := stopped(ctx); s != nil {
			return nil, s
		}
		if job.KindOf(err) == job.LeaseLost { // a grant is fenced
			return nil, err
		}
		return nil, &job.Failure{Kind: job.StorageUnavailable, Err: err}
	}
	res.Digests = files
	for _, f := range files {
		res.Files[f.Name] = folder + "/" + f.Name
	}
	return res, nil
}

// quality judges a run as the app's model page shows it.
func quality(r *job.Result) map[string]any {
	convergence, stars := judge(r)
	q := map[string]any{"convergence_quality": convergence, "overall_score": stars}
	putFinite(q, "final_training_loss", &r.TrainingLoss)
	putFinite(q, "final_validation_loss", r.ValidationLoss)
	putFinite(q, "perplexity", r.Perplexity)
	return q
}

func putFinite(m map[string]any, name string, f *float64) {
	if f != nil && !math.IsNaN(*f) && !math.IsInf(*f, 0) {
		m[name] = *f
	}
}

// judge compares the validation loss of the adapter that is handed out with the
// one before training. Without a validation set nothing is known. Whether the
// training overfit the trainer tells from all of its evaluations: the adapter
// may be the one from before that, so that its stars follow from its own loss,
// less one, because it was chosen by that very loss.
func judge(r *job.Result) (convergence string, stars int) {
	if r.ValidationLoss == nil || r.BaseValidation == nil || !(*r.BaseValidation > 0) {
		return "unknown", 3
	}
	kept := *r.ValidationLoss / *r.BaseValidation
	switch {
	case kept > 1:
		convergence, stars = "poor", 1
	case kept <= 0.6:
		convergence, stars = "excellent", 5
	case kept <= 0.8:
		convergence, stars = "good", 4
	case kept <= 0.95:
		convergence, stars = "fair", 3
	default:
		convergence, stars = "poor", 2
	}
	overfit := r.Overfit == "yes"
	if r.Overfit == "" { // a trainer from before it judged: a wide gap and no gain
		overfit = kept > 1 || *r.ValidationLoss > 1.5*r.TrainingLoss && kept > 0.8
	}
	if overfit {
		return "overfit", max(1, stars-1)
	}
	return convergence, stars
}
