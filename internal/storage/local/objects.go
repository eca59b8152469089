package local

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/url"
	"regexp"
	"strings"
)

const maxMetadata = 1 << 20

var wholeNumber = regexp.MustCompile(`^[0-9]+$`)

// objectRoute serves what is below /object.
func (s *Server) objectRoute(w http.ResponseWriter, r *http.Request, rest string) error {
	word, below, _ := strings.Cut(rest, "/")
	read := r.Method == http.MethodGet || r.Method == http.MethodHead
	post := r.Method == http.MethodPost
	switch {
	case word == "list" && post:
		return s.list(w, r, below)
	case word == "list-v2" && post:
		return s.listV2(w, r, below)
	case word == "move" && post && below == "":
		return s.move(w, r)
	case word == "copy" && post && below == "":
		return s.copy(w, r)
	case word == "sign" && read:
		return s.getSigned(w, r, below)
	case word == "sign" && post && !strings.Contains(below, "/"):
		return s.signMany(w, r, below)
	case word == "sign" && post:
		return s.sign(w, r, below)
	case word == "upload" && strings.HasPrefix(below, "sign/") && post:
		return s.signUpload(w, r, strings.TrimPrefix(below, "sign/"))
	case word == "upload" && strings.HasPrefix(below, "sign/") && r.Method == http.MethodPut:
		return s.putSigned(w, r, strings.TrimPrefix(below, "sign/"))
	case word == "public" && read:
		return s.getPublic(w, r, below)
	case word == "authenticated" && read:
		return s.get(w, r, below)
	case word == "info" && read:
		if public, ok := strings.CutPrefix(below, "public/"); ok {
			return s.info(w, r, public)
		}
		return s.info(w, r, strings.TrimPrefix(below, "authenticated/"))
	case r.Method == http.MethodDelete && below == "":
		return s.deleteMany(w, r, word)
	case read:
		return s.get(w, r, rest)
	case post, r.Method == http.MethodPut:
		return s.upload(w, r, rest)
	case r.Method == http.MethodDelete:
		return s.deleteOne(w, r, rest)
	}
	return noRoute
}

// readable finds an object for the caller of r. What may not be seen is not
// there.
func (s *Server) readable(r *http.Request, bucket, key string) (*object, error) {
	who, err := s.caller(r)
	if err != nil {
		return nil, err
	}
	b, err := s.store.bucket(bucket)
	if err != nil {
		return nil, err
	}
	if !b.Public && !who.mayRead(bucket, key) {
		return nil, noKey
	}
	return s.store.object(bucket, key)
}

func (s *Server) get(w http.ResponseWriter, r *http.Request, rest string) error {
	bucket, key, err := names(rest)
	if err != nil {
		return err
	}
	if _, err := s.readable(r, bucket, key); err != nil {
		return err
	}
	return s.serve(w, r, bucket, key)
}

func (s *Server) getPublic(w http.ResponseWriter, r *http.Request, rest string) error {
	bucket, key, err := names(rest)
	if err != nil {
		return err
	}
	b, err := s.store.bucket(bucket)
	if err != nil || !b.Public {
		return noBucket
	}
	return s.serve(w, r, bucket, key)
}

// serve sends an object, or the part of it that was asked for.
func (s *Server) serve(w http.ResponseWriter, r *http.Request, bucket, key string) error {
	o, f, err := s.store.open(bucket, key)
	if err != nil {
		return err
	}
	defer f.Close()
	h := w.Header()
	h.Set("Content-Type", o.ContentType)
	h.Set("Cache-Control", o.CacheControl)
	h.Set("ETag", o.etag())
	h.Set("X-Content-Type-Options", "nosniff")
	if q := r.URL.Query(); q.Has("download") {
		h.Set("Content-Disposition", disposition(q.Get("download")))
	}
	http.ServeContent(&rangeWriter{ResponseWriter: w, s: s}, r, "", o.Updated, f)
	return nil
}

func disposition(name string) string {
	if name == "" {
		return "attachment"
	}
	return "attachment; filename*=UTF-8''" + url.PathEscape(name)
}

// rangeWriter turns ServeContent's answer to a bad range into the API's.
type rangeWriter struct {
	http.ResponseWriter
	s        *Server
	answered bool
}

func (w *rangeWriter) WriteHeader(status int) {
	if status != http.StatusRequestedRangeNotSatisfiable {
		w.ResponseWriter.WriteHeader(status)
		return
	}
	w.answered = true
	w.Header().Del("Content-Length")
	w.s.fail(w.ResponseWriter, badRange)
}

func (w *rangeWriter) Write(p []byte) (int, error) {
	if w.answered {
		return len(p), nil
	}
	return w.ResponseWriter.Write(p)
}

// ReadFrom keeps the way open for sendfile.
func (w *rangeWriter) ReadFrom(r io.Reader) (int64, error) {
	if w.answered {
		return io.Copy(io.Discard, r)
	}
	return io.Copy(w.ResponseWriter, r)
}

func (s *Server) info(w http.ResponseWriter, r *http.Request, rest string) error {
	bucket, key, err := names(rest)
	if err != nil {
		return err
	}
	o, err := s.readable(r, bucket, key)
	if err != nil {
		return err
	}
	w.Header().Set("ETag", o.etag())
	reply(w, http.StatusOK, map[string]any{
		"id": o.ID, "name": o.Key, "version": o.Version, "bucket_id": o.Bucket, "size": o.Bytes,
		"content_type": o.ContentType, "cache_control": o.CacheControl, "etag": o.etag(),
		"metadata": o.Metadata, "last_modified": o.Updated, "created_at": o.Created,
	})
	return nil
}

// writable says whether the caller may write the key, before its bytes are
// read.
func (s *Server) writable(who caller, bucket, key string, upsert bool) error {
	if _, err := s.store.bucket(bucket); err != nil {
		return err
	}
	if !who.mayWrite(bucket, key) {
		return denied
	}
	if _, err := s.store.object(bucket, key); err == nil && !upsert {
		return exists
	}
	return nil
}

// upload serves POST, and PUT, which overwrites.
func (s *Server) upload(w http.ResponseWriter, r *http.Request, rest string) error {
	bucket, key, err := names(rest)
	if err != nil {
		return err
	}
	who, err := s.caller(r)
	if err != nil {
		return err
	}
	upsert := r.Method == http.MethodPut || upserts(r)
	if err := s.writable(who, bucket, key, upsert); err != nil {
		return err
	}
	o, err := s.receive(r, object{Bucket: bucket, Key: key, Owner: who.user}, upsert)
	if err != nil {
		return err
	}
	reply(w, http.StatusOK, map[string]string{"Id": o.ID, "Key": o.Bucket + "/" + o.Key})
	return nil
}

func upserts(r *http.Request) bool { return r.Header.Get("x-upsert") == "true" }

// limitOf is the largest file that a bucket takes.
func (s *Server) limitOf(b *bucket) int64 {
	if b.FileSizeLimit != nil {
		return min(*b.FileSizeLimit, s.limit)
	}
	return s.limit
}

// receive stores the body of an upload as o.
func (s *Server) receive(r *http.Request, o object, upsert bool) (*object, error) {
	b, err := s.store.bucket(o.Bucket)
	if err != nil {
		return nil, err
	}
	in := incoming{s: s, b: b, limit: s.limitOf(b), o: o}
	defer func() { s.store.discard(in.file) }() // gone already when it was put
	kind, params, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if kind == "multipart/form-data" {
		err = in.form(multipart.NewReader(r.Body, params["boundary"]))
	} else {
		err = in.raw(r)
	}
	if err != nil {
		return nil, err
	}
	done, err := s.store.put(in.o, in.file, upsert)
	if err == nil {
		in.file = ""
	}
	return done, err
}

// incoming is one upload while it is read.
type incoming struct {
	s     *Server
	b     *bucket
	limit int64
	o     object
	file  string
}

func (in *incoming) raw(r *http.Request) error {
	if r.ContentLength > in.limit {
		return tooLarge
	}
	in.o.CacheControl = r.Header.Get("Cache-Control")
	if in.o.CacheControl == "" {
		in.o.CacheControl = "no-cache"
	}
	if v := r.Header.Get("x-metadata"); v != "" {
		raw, err := base64.StdEncoding.DecodeString(v)
		if err != nil {
			return badRequest("x-metadata is not base64")
		}
		if err := in.metadata(raw); err != nil {
			return err
		}
	}
	return in.bytes(r.Body, r.Header.Get("Content-Type"))
}

// form reads what browsers send: fields, and one file whose field often has no
// name.
func (in *incoming) form(m *multipart.Reader) error {
	in.o.CacheControl = "no-cache"
	kind := ""
	for {
		part, err := m.NextPart()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return badRequest("the form cannot be read")
		}
		if part.FileName() != "" || part.FormName() == "" || part.FormName() == "file" {
			if in.file != "" {
				return badRequest("the form has more than one file")
			}
			if kind == "" {
				kind = part.Header.Get("Content-Type")
			}
			if err := in.bytes(part, kind); err != nil {
				return err
			}
			continue
		}
		value, err := io.ReadAll(io.LimitReader(part, maxMetadata+1))
		if err != nil {
			return badRequest("the form cannot be read")
		}
		switch part.FormName() {
		case "cacheControl":
			if wholeNumber.Match(value) {
				in.o.CacheControl = "max-age=" + string(value)
			}
		case "contentType":
			kind = string(value)
		case "metadata":
			if err := in.metadata(value); err != nil {
				return err
			}
		}
	}
	if in.file == "" {
		return badRequest("the form has no file")
	}
	return nil
}

func (in *incoming) metadata(raw []byte) error {
	m, err := userMetadata(raw)
	in.o.Metadata = m
	return err
}

func userMetadata(raw []byte) (json.RawMessage, error) {
	var m map[string]any
	if len(raw) > maxMetadata || json.Unmarshal(raw, &m) != nil {
		return nil, badRequest("the metadata is not a JSON object of at most 1 MiB")
	}
	return raw, nil
}

func (in *incoming) bytes(r io.Reader, kind string) (err error) {
	if kind == "" {
		kind = "application/octet-stream"
	}
	if err := allowed(in.b, kind); err != nil {
		return err
	}
	in.o.ContentType = kind
	in.file, in.o.Bytes, err = in.s.store.receive(r, in.limit)
	return err
}

// allowed says whether the bucket takes a content type.
func allowed(b *bucket, kind string) error {
	if len(b.AllowedMimeTypes) == 0 {
		return nil
	}
	bare, _, err := mime.ParseMediaType(kind)
	if err != nil {
		return badMime(kind)
	}
	group, _, _ := strings.Cut(bare, "/")
	for _, a := range b.AllowedMimeTypes {
		if a == bare || a == group+"/*" || a == "*/*" {
			return nil
		}
	}
	return badMime(kind)
}

func (s *Server) deleteOne(w http.ResponseWriter, r *http.Request, rest string) error {
	bucket, key, err := names(rest)
	if err != nil {
		return err
	}
	gone, err := s.deleteKeys(r, bucket, []string{key})
	if err != nil {
		return err
	}
	if len(gone) == 0 {
		return noKey
	}
	message(w, "Successfully deleted")
	return nil
}

func (s *Server) deleteMany(w http.ResponseWriter, r *http.Request, rest string) error {
	bucket, err := url.PathUnescape(rest)
	if err != nil {
		return badName
	}
	var body struct {
		Prefixes []string `json:"prefixes"`
	}
	if err := decode(r, &body); err != nil {
		return err
	}
	if len(body.Prefixes) == 0 || len(body.Prefixes) > 1000 {
		return badRequest("body/prefixes must have 1 to 1000 items")
	}
	gone, err := s.deleteKeys(r, bucket, body.Prefixes)
	if err != nil {
		return err
	}
	rows := []map[string]any{}
	for _, o := range gone {
		rows = append(rows, row(o, o.Key))
	}
	reply(w, http.StatusOK, rows)
	return nil
}

// deleteKeys removes those keys that the caller may remove.
func (s *Server) deleteKeys(r *http.Request, bucket string, keys []string) ([]*object, error) {
	who, err := s.caller(r)
	if err != nil {
		return nil, err
	}
	mine := keys[:0:0]
	for _, k := range keys {
		if who.mayWrite(bucket, k) {
			mine = append(mine, k)
		}
	}
	return s.store.remove(bucket, mine...)
}

// transfer is the body of move and copy.
type transfer struct {
	Bucket       string `json:"bucketId"`
	Key          string `json:"sourceKey"`
	ToBucket     string `json:"destinationBucket"`
	ToKey        string `json:"destinationKey"`
	CopyMetadata *bool  `json:"copyMetadata"`
}

func (s *Server) transfer(r *http.Request) (t transfer, who caller, err error) {
	if who, err = s.caller(r); err != nil {
		return t, who, err
	}
	if err := decode(r, &t); err != nil {
		return t, who, err
	}
	if t.ToBucket == "" {
		t.ToBucket = t.Bucket
	}
	if err := checkKey(t.ToKey); err != nil {
		return t, who, err
	}
	_, err = s.readable(r, t.Bucket, t.Key)
	return t, who, err
}

func (s *Server) move(w http.ResponseWriter, r *http.Request) error {
	t, who, err := s.transfer(r)
	if err != nil {
		return err
	}
	if !who.mayWrite(t.Bucket, t.Key) {
		return denied
	}
	if err := s.writable(who, t.ToBucket, t.ToKey, false); err != nil {
		return err
	}
	o, err := s.store.move(t.Bucket, t.Key, t.ToBucket, t.ToKey)
	if err != nil {
		return err
	}
	reply(w, http.StatusOK, map[string]string{"message": "Successfully moved", "Id": o.ID, "Key": o.Key})
	return nil
}

func (s *Server) copy(w http.ResponseWriter, r *http.Request) error {
	t, who, err := s.transfer(r)
	if err != nil {
		return err
	}
	if err := s.writable(who, t.ToBucket, t.ToKey, upserts(r)); err != nil {
		return err
	}
	o, f, err := s.store.open(t.Bucket, t.Key)
	if err != nil {
		return err
	}
	defer f.Close()
	to, err := s.store.bucket(t.ToBucket)
	if err != nil {
		return err
	}
	n := *o
	n.Bucket, n.Key, n.Owner = t.ToBucket, t.ToKey, who.user
	if t.CopyMetadata != nil && !*t.CopyMetadata {
		n.Metadata = nil
	}
	file, _, err := s.store.receive(f, s.limitOf(to))
	if err != nil {
		return err
	}
	done, err := s.store.put(n, file, upserts(r))
	if err != nil {
		s.store.discard(file)
		return err
	}
	answer := row(done, done.Key)
	answer["Id"], answer["Key"] = done.ID, done.Bucket+"/"+done.Key
	reply(w, http.StatusOK, answer)
	return nil
}
