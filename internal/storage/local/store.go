package local

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// bucket is one bucket's settings, as the API shows them.
type bucket struct {
	ID               string    `json:"id"`
	Name             string    `json:"name"`
	Owner            string    `json:"owner"`
	Public           bool      `json:"public"`
	FileSizeLimit    *int64    `json:"file_size_limit"`
	AllowedMimeTypes []string  `json:"allowed_mime_types"`
	Created          time.Time `json:"created_at"`
	Updated          time.Time `json:"updated_at"`
}

// object is one stored file. It is never changed once it is in the index.
type object struct {
	ID           string          `json:"id"`
	Version      string          `json:"version"` // names the file with the bytes; new with every write
	Bucket       string          `json:"bucket"`
	Key          string          `json:"key"`
	Bytes        int64           `json:"bytes"`
	ContentType  string          `json:"content_type"`
	CacheControl string          `json:"cache_control"`
	Metadata     json.RawMessage `json:"metadata"` // the uploader's own
	Owner        string          `json:"owner"`
	Created      time.Time       `json:"created"`
	Updated      time.Time       `json:"updated"`
}

func (o *object) etag() string { return `"` + o.Version + `"` }

// store keeps buckets and objects on disk and an index of them in memory.
//
//	lock                      held while a server uses the directory
//	buckets/<digest>.json     settings
//	objects/<digest>.json     one object: its key, size, version ...
//	data/<version>            its bytes
//	uploads/<id>.json, .part  resumable uploads
//	tmp/                      what is being written
//
// No name on disk is made of a key: a key that is a folder of another, or
// differs from it in case only, cannot get in its way. The object's JSON is
// renamed into place last, so that a crash at any point leaves the old object
// or the new one. Nothing is synced: this survives a killed process, not a
// power cut.
type store struct {
	root *os.Root
	lock *os.File

	mu      sync.RWMutex
	buckets map[string]*bucket
	objects map[string]map[string]*object // by bucket, by key
	sorted  map[string][]string           // keys by bucket; absent: to be made
}

var (
	errNoBucket = errors.New("no such bucket")
	errNoObject = errors.New("no such object")
	errExists   = errors.New("exists already")
	errNotEmpty = errors.New("not empty")
	errTooLarge = errors.New("too large")
)

func openStore(dir string) (_ *store, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	s := &store{
		root:    root,
		buckets: map[string]*bucket{},
		objects: map[string]map[string]*object{},
		sorted:  map[string][]string{},
	}
	defer func() {
		if err != nil {
			_ = s.close()
		}
	}()
	if s.lock, err = root.OpenFile("lock", os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(s.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, fmt.Errorf("another server uses %s: %w", dir, err)
	}
	if err := root.RemoveAll("tmp"); err != nil {
		return nil, err
	}
	for _, d := range []string{"buckets", "objects", "data", "uploads", "tmp"} {
		if err := root.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	return s, s.load()
}

func (s *store) close() error {
	var err error
	if s.lock != nil {
		err = s.lock.Close() // and with it the lock
	}
	return errors.Join(err, s.root.Close())
}

// load reads the index and removes bytes that no object names.
func (s *store) load() error {
	err := readAll(s.root, "buckets", func(b *bucket) {
		s.buckets[b.ID] = b
		s.objects[b.ID] = map[string]*object{}
	})
	if err != nil {
		return err
	}
	owner := map[string]*object{} // by version
	err = readAll(s.root, "objects", func(o *object) {
		keys := s.objects[o.Bucket]
		// After a crash in a move both names point at one file: the newer wins.
		if old := owner[o.Version]; keys == nil || old != nil && !old.Updated.Before(o.Updated) {
			_ = s.root.Remove(objectFile(o.Bucket, o.Key))
			return
		} else if old != nil {
			delete(s.objects[old.Bucket], old.Key)
			_ = s.root.Remove(objectFile(old.Bucket, old.Key))
		}
		owner[o.Version] = o
		keys[o.Key] = o
	})
	if err != nil {
		return err
	}
	files, err := fs.ReadDir(s.root.FS(), "data")
	if err != nil {
		return err
	}
	for _, f := range files {
		if owner[f.Name()] == nil {
			if err := s.root.Remove("data/" + f.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

func readAll[T any](root *os.Root, dir string, take func(*T)) error {
	files, err := fs.ReadDir(root.FS(), dir)
	if err != nil {
		return err
	}
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".json") {
			continue
		}
		v := new(T)
		if err := readJSON(root, path.Join(dir, f.Name()), v); err != nil {
			return err
		}
		take(v)
	}
	return nil
}

func readJSON(root *os.Root, name string, v any) error {
	raw, err := root.ReadFile(name)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return fmt.Errorf("reading %s: %w", name, err)
	}
	return nil
}

// writeJSON replaces a file whole.
func (s *store) writeJSON(name string, v any) error {
	raw, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp := "tmp/" + newID()
	if err := s.root.WriteFile(tmp, raw, 0o600); err != nil {
		return err
	}
	return s.root.Rename(tmp, name)
}

func hashed(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(sum[:])
}

func bucketFile(name string) string      { return "buckets/" + hashed(name) + ".json" }
func objectFile(bucket, k string) string { return "objects/" + hashed(bucket, k) + ".json" }
func dataFile(version string) string     { return "data/" + version }

// newID is a random UUID.
func newID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

func (s *store) bucket(name string) (*bucket, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if b := s.buckets[name]; b != nil {
		return b, nil
	}
	return nil, errNoBucket
}

func (s *store) listBuckets() []*bucket {
	s.mu.RLock()
	defer s.mu.RUnlock()
	all := make([]*bucket, 0, len(s.buckets))
	for _, b := range s.buckets {
		all = append(all, b)
	}
	slices.SortFunc(all, func(a, b *bucket) int { return strings.Compare(a.Name, b.Name) })
	return all
}

func (s *store) createBucket(b *bucket) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.buckets[b.ID] != nil {
		return errExists
	}
	if err := s.writeJSON(bucketFile(b.ID), b); err != nil {
		return err
	}
	s.buckets[b.ID] = b
	s.objects[b.ID] = map[string]*object{}
	return nil
}

// updateBucket stores what change makes of a copy of the bucket.
func (s *store) updateBucket(name string, change func(*bucket)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.buckets[name]
	if old == nil {
		return errNoBucket
	}
	b := *old
	change(&b)
	if err := s.writeJSON(bucketFile(name), &b); err != nil {
		return err
	}
	s.buckets[name] = &b
	return nil
}

func (s *store) deleteBucket(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.buckets[name] == nil:
		return errNoBucket
	case len(s.objects[name]) > 0:
		return errNotEmpty
	}
	if err := s.root.Remove(bucketFile(name)); err != nil {
		return err
	}
	delete(s.buckets, name)
	delete(s.objects, name)
	delete(s.sorted, name)
	return nil
}

func (s *store) object(bucket, key string) (*object, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.find(bucket, key)
}

func (s *store) find(bucket, key string) (*object, error) {
	if s.buckets[bucket] == nil {
		return nil, errNoBucket
	}
	if o := s.objects[bucket][key]; o != nil {
		return o, nil
	}
	return nil, errNoObject
}

// open returns an object and its bytes, which stay readable when the object is
// replaced.
func (s *store) open(bucket, key string) (*object, *os.File, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	o, err := s.find(bucket, key)
	if err != nil {
		return nil, nil, err
	}
	f, err := s.root.Open(dataFile(o.Version))
	return o, f, err
}

// receive writes what comes into a new file under tmp; the caller puts or
// discards it. More than limit bytes are errTooLarge.
func (s *store) receive(r io.Reader, limit int64) (name string, n int64, err error) {
	name = "tmp/" + newID()
	f, err := s.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return "", 0, err
	}
	n, err = io.Copy(f, io.LimitReader(r, limit+1))
	if err == nil && n > limit {
		err = errTooLarge
	}
	if err = errors.Join(err, f.Close()); err != nil {
		s.discard(name)
		return "", 0, err
	}
	return name, n, nil
}

func (s *store) discard(name string) {
	if name != "" {
		_ = s.root.Remove(name)
	}
}

// put makes the bytes in file the object o; the one who completes last wins.
// It fills in id, version and times.
func (s *store) put(o object, file string, upsert bool) (*object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, err := s.find(o.Bucket, o.Key)
	switch {
	case errors.Is(err, errNoBucket):
		return nil, err
	case old != nil && !upsert:
		return nil, errExists
	}
	o.ID, o.Version, o.Updated = newID(), newID(), now()
	o.Created = o.Updated
	if old != nil {
		o.ID, o.Created = old.ID, old.Created
	}
	if err := s.root.Rename(file, dataFile(o.Version)); err != nil {
		return nil, err
	}
	if err := s.writeJSON(objectFile(o.Bucket, o.Key), &o); err != nil {
		return nil, errors.Join(err, s.root.Remove(dataFile(o.Version)))
	}
	s.index(&o)
	if old != nil {
		_ = s.root.Remove(dataFile(old.Version))
	}
	return &o, nil
}

func (s *store) index(o *object) {
	if s.objects[o.Bucket][o.Key] == nil {
		delete(s.sorted, o.Bucket)
	}
	s.objects[o.Bucket][o.Key] = o
}

// move gives an object another key; the place must be free.
func (s *store) move(bucket, key, toBucket, toKey string) (*object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, err := s.find(bucket, key)
	if err != nil {
		return nil, err
	}
	switch _, err := s.find(toBucket, toKey); {
	case err == nil:
		return nil, errExists
	case errors.Is(err, errNoBucket):
		return nil, err
	}
	o := *old
	o.Bucket, o.Key, o.Updated = toBucket, toKey, now()
	if !o.Updated.After(old.Updated) {
		o.Updated = old.Updated.Add(time.Millisecond)
	}
	if err := s.writeJSON(objectFile(toBucket, toKey), &o); err != nil {
		return nil, err
	}
	if err := s.root.Remove(objectFile(bucket, key)); err != nil {
		return nil, err
	}
	s.index(&o)
	delete(s.objects[bucket], key)
	delete(s.sorted, bucket)
	return &o, nil
}

// remove deletes the keys that are there and returns what they were.
func (s *store) remove(bucket string, keys ...string) ([]*object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	gone := []*object{}
	for _, k := range keys {
		o, err := s.find(bucket, k)
		if errors.Is(err, errNoBucket) {
			return gone, err
		}
		if err != nil {
			continue
		}
		if err := s.root.Remove(objectFile(bucket, k)); err != nil {
			return gone, err
		}
		_ = s.root.Remove(dataFile(o.Version))
		delete(s.objects[bucket], k)
		delete(s.sorted, bucket)
		gone = append(gone, o)
	}
	return gone, nil
}

// under returns the objects whose keys begin with prefix, in key order.
func (s *store) under(bucket, prefix string) ([]*object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.buckets[bucket] == nil {
		return nil, errNoBucket
	}
	keys, ok := s.sorted[bucket]
	if !ok {
		keys = make([]string, 0, len(s.objects[bucket]))
		for k := range s.objects[bucket] {
			keys = append(keys, k)
		}
		slices.Sort(keys)
		s.sorted[bucket] = keys
	}
	from, _ := slices.BinarySearch(keys, prefix)
	found := []*object{}
	for _, k := range keys[from:] {
		if !strings.HasPrefix(k, prefix) {
			break
		}
		found = append(found, s.objects[bucket][k])
	}
	return found, nil
}

// now is in the precision that the API shows.
func now() time.Time { return time.Now().UTC().Truncate(time.Millisecond) }
