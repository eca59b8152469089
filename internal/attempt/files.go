package attempt

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"strconv"
	"time"

	"lorayard/internal/job"
	"lorayard/internal/storage"
	"lorayard/internal/store"
)

// This agent holds no key of Storage: for each object that it touches it has a
// grant of a dispatcher, and asks for the next one when that is too old.

// grantSlow is after what time of waiting an operator is told.
const grantSlow = 10 * time.Second

// grant asks until it is answered. No dispatcher is there for hours, or no
// database: the attempt waits, as a run does.
func (x *run) grant(ctx context.Context, verb, bucket, key string, after int) (*store.Grant, error) {
	asks := []store.GrantAsk{{Verb: verb, Bucket: bucket, Key: key, After: after}}
	began, told := time.Now(), false
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		call, cancel := context.WithTimeout(ctx, 15*time.Second)
		gs, err := x.Store.Grants(call, x.as.Ref, asks)
		cancel()
		switch {
		case err != nil && (job.KindOf(err) == job.LeaseLost || store.IsData(err)):
			return nil, err
		case err == nil && gs[0] != nil:
			return gs[0], nil
		case !told && time.Since(began) > grantSlow:
			told = true
			x.log.WarnContext(ctx, "waiting for a dispatcher to grant access to Storage", "verb", verb, "err", err)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(wait/2 + rand.N(wait)):
		}
	}
}

// denied is a refusal in words.
func denied(g *store.Grant, op, bucket, key string) error {
	return &storage.Error{Op: op, Bucket: bucket, Key: key, Status: http.StatusForbidden, Message: g.Refused}
}

// look is what Storage knows of an object that this attempt may read, with a
// grant to download it.
func (x *run) look(ctx context.Context, bucket, key string, after int) (*store.Grant, error) {
	g, err := x.grant(ctx, store.GrantRead, bucket, key, after)
	switch {
	case err != nil:
		return nil, err
	case g.Refused != "":
		return nil, denied(g, "read", bucket, key)
	case g.Missing:
		return nil, &storage.Error{Op: "read", Bucket: bucket, Key: key, Status: http.StatusNotFound, Message: "there is no such object"}
	}
	return g, nil
}

// download fetches the object that g grants; a file of another digest than
// want, where that is known, is none.
func (x *run) download(ctx context.Context, g *store.Grant, bucket, key, to, want string) (storage.Object, error) {
	began := time.Now()
	obj, err := x.Storage.DownloadSigned(ctx, g.URL, to, want, func(ctx context.Context) (string, error) {
		next, err := x.look(ctx, bucket, key, g.Serial)
		if err != nil {
			return "", err
		}
		g = next
		return g.URL, nil
	})
	x.carried(ctx, "download", began, obj, err)
	return obj, err
}

// carried counts a transfer; one that was called off is none.
func (x *run) carried(ctx context.Context, way string, began time.Time, obj storage.Object, err error) {
	switch {
	case err == nil:
		x.Metrics.StorageSeconds.WithLabelValues(way).Observe(time.Since(began).Seconds())
		x.Metrics.StorageBytes.WithLabelValues(way).Add(float64(obj.Bytes))
	case ctx.Err() == nil:
		x.Metrics.StorageErrors.WithLabelValues(way).Inc()
	}
}

// send uploads a file under a key of this attempt.
func (x *run) send(ctx context.Context, bucket, key, from, digest string) (storage.Object, error) {
	began := time.Now()
	obj, err := x.sendOnce(ctx, bucket, key, from, digest)
	x.carried(ctx, "upload", began, obj, err)
	return obj, err
}

func (x *run) sendOnce(ctx context.Context, bucket, key, from, digest string) (storage.Object, error) {
	name := sha256.Sum256([]byte(key))
	o := storage.Options{ContentType: contentType(key), SHA256: digest, Note: filepath.Join(x.dir, "upload-"+hex.EncodeToString(name[:8]))}
	serial := 0
	o.Renew = func(ctx context.Context) (string, error) {
		g, err := x.grant(ctx, store.GrantWrite, bucket, key, serial)
		switch {
		case err != nil:
			return "", err
		case g.Refused != "":
			return "", denied(g, "upload", bucket, key)
		case g.Exists:
			return "", errExists
		}
		serial = g.Serial
		return g.Token, nil
	}
	seen := 0
	o.Look = func(ctx context.Context) (storage.Info, error) {
		g, err := x.look(ctx, bucket, key, seen)
		if err != nil {
			return storage.Info{}, err
		}
		seen = g.Serial
		return storage.Info{Bucket: bucket, Key: key, Bytes: g.Bytes, ETag: g.ETag, SHA256: g.SHA256}, nil
	}
	var err error
	if o.Token, err = o.Renew(ctx); err == nil {
		var obj storage.Object
		if obj, err = x.Storage.Upload(ctx, bucket, key, from, o); err == nil {
			return obj, nil
		}
	}
	if errors.Is(err, errExists) { // of an earlier try of ours whose answer was lost, or not ours
		return x.same(ctx, o.Look, bucket, key, from)
	}
	return storage.Object{}, err
}

// limit asks what Storage takes as one object, and whether it takes any, before
// anything is trained for it; 0 when nobody knows.
func (x *run) limit(ctx context.Context) (int64, error) {
	key := x.as.User + "/" + artifactID(x.as.Ref) + "/" + adapterFile
	g, err := x.grant(ctx, store.GrantWrite, artifactBucket, key, 0)
	if err == nil && g.Refused != "" {
		err = denied(g, "upload", artifactBucket, key)
	}
	if err != nil {
		return 0, err
	}
	return g.Limit, nil
}

// adapterFile is the largest file of an adapter, by peft's name.
const adapterFile = "adapter_model.safetensors"

// tooLarge is a failure when what a trainer with so many trainable parameters
// would write cannot be stored: an adapter has 4 bytes for each, and the moments
// of AdamW, the largest file of a checkpoint, have 8.
func tooLarge(parameters, limit int64) error {
	const moments = 8
	if limit <= 0 || moments*parameters <= limit {
		return nil
	}
	mb := func(n int64) string { return strconv.FormatFloat(float64(n)/1e6, 'f', 1, 64) + " MB" }
	return &job.Failure{
		Kind: job.SpecInvalid,
		Message: fmt.Sprintf("This training would write files of about %s, and storage bucket %s takes %s at most: choose a lower rank, or have the limit raised.",
			mb(moments*parameters), artifactBucket, mb(limit)),
		Err: fmt.Errorf("%d trainable parameters do not fit the limit of %d bytes of bucket %s", parameters, limit, artifactBucket),
	}
}

// errExists is the answer to a question for an upload token: it is there.
var errExists = errors.New("the object is there already")

// same is the object under key if it holds the bytes of a local file.
func (x *run) same(ctx context.Context, look func(context.Context) (storage.Info, error), bucket, key, local string) (storage.Object, error) {
	i, err := look(ctx)
	if err != nil {
		return storage.Object{}, err
	}
	obj, err := storage.Digest(ctx, local)
	if err != nil {
		return storage.Object{}, err
	}
	if obj.Bytes != i.Bytes || obj.SHA256 != i.SHA256 {
		return storage.Object{}, fmt.Errorf("%s holds other bytes than %s", key, filepath.Base(local))
	}
	obj.Bucket, obj.Key = bucket, key
	return obj, nil
}
