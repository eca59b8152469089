package local

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	tusVersion = "1.0.0"
	uploadTTL  = 24 * time.Hour
	partType   = "application/offset+octet-stream"
)

var uploadID = regexp.MustCompile(`^[0-9a-f-]{36}$`)

// upload is one resumable upload. Its bytes so far are the part file: what
// stands there has arrived, whatever happened to the request.
type upload struct {
	ID           string          `json:"id"`
	Bucket       string          `json:"bucket"`
	Key          string          `json:"key"`
	Length       int64           `json:"length"`
	ContentType  string          `json:"content_type"`
	CacheControl string          `json:"cache_control"`
	Metadata     json.RawMessage `json:"metadata"`
	Owner        string          `json:"owner"`
	Created      time.Time       `json:"created"`
	Done         bool            `json:"done"` // the object is there
}

func uploadFile(id string) string { return "uploads/" + id + ".json" }
func partFile(id string) string   { return "uploads/" + id + ".part" }

// uploads lets one request at a time work on an upload. The newer one wins: the
// older one stops reading and answers with what it has, because most often it
// belongs to a connection that is dead already.
type uploads struct {
	mu   sync.Mutex
	held map[string]*hold
}

type hold struct {
	turn  chan struct{} // has a value while nobody works
	users int
	evict func() // ends the present one; may be nil
}

func (u *uploads) take(ctx context.Context, id string, evict func()) (release func(), err error) {
	u.mu.Lock()
	h := u.held[id]
	if h == nil {
		h = &hold{turn: make(chan struct{}, 1)}
		h.turn <- struct{}{}
		u.held[id] = h
	}
	h.users++
	if h.evict != nil {
		h.evict()
	}
	u.mu.Unlock()

	leave := func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		if h.users--; h.users == 0 {
			delete(u.held, id)
		}
	}
	select {
	case <-h.turn:
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
	u.mu.Lock()
	h.evict = evict
	if evict != nil && h.users > 1 {
		evict() // somebody came while this one waited
	}
	u.mu.Unlock()
	return func() {
		u.mu.Lock()
		h.evict = nil
		u.mu.Unlock()
		h.turn <- struct{}{}
		leave()
	}, nil
}

func (s *Server) tusOptions(h http.Header) {
	h.Set("Tus-Resumable", tusVersion)
	h.Set("Tus-Version", tusVersion)
	h.Set("Tus-Extension", "creation,creation-with-upload,termination,expiration")
	h.Set("Tus-Max-Size", itoa(s.limit))
}

// resumable serves /upload/resumable. Unlike the rest it sends the status that
// it means, with a plain text.
func (s *Server) resumable(w http.ResponseWriter, r *http.Request, rest string) {
	w.Header().Set("Tus-Resumable", tusVersion)
	w.Header().Set("Cache-Control", "no-store")
	if err := s.tus(w, r, rest); err != nil {
		f := faultOf(err)
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(f.status)
		_, _ = io.WriteString(w, f.message)
	}
}

func (s *Server) tus(w http.ResponseWriter, r *http.Request, rest string) error {
	if r.Header.Get("Tus-Resumable") != tusVersion {
		w.Header().Set("Tus-Version", tusVersion)
		return &fault{status: http.StatusPreconditionFailed, message: "Tus-Resumable Required"}
	}
	id, signed := strings.CutPrefix(rest, "sign")
	id = strings.TrimPrefix(id, "/")
	switch {
	case id == "" && r.Method == http.MethodPost:
		return s.tusCreate(w, r, signed)
	case !uploadID.MatchString(id):
		return noUpload
	case r.Method == http.MethodHead:
		return s.tusHead(w, r, id)
	case r.Method == http.MethodPatch:
		return s.tusPatch(w, r, id, signed)
	case r.Method == http.MethodDelete:
		return s.tusDelete(w, r, id, signed)
	}
	return &fault{status: http.StatusMethodNotAllowed, message: "Method not allowed"}
}

// tusMay decides by token or by caller, as often as it is asked: each part
// needs the right again. It returns the owner and whether to overwrite.
func (s *Server) tusMay(r *http.Request, bucket, key string, signed bool) (owner string, upsert bool, err error) {
	if signed {
		token := r.Header.Get("x-signature")
		if token == "" {
			return "", false, &fault{status: 400, message: "Missing x-signature header"}
		}
		p, err := s.admit(token, forUpload, bucket, key)
		return p.Owner, p.Upsert, err
	}
	if r.Header.Get("Authorization") == "" && r.Header.Get("apikey") == "" {
		return "", false, badToken
	}
	who, err := s.caller(r)
	if err != nil {
		return "", false, err
	}
	return who.user, upserts(r), s.writable(who, bucket, key, upserts(r))
}

func (s *Server) tusCreate(w http.ResponseWriter, r *http.Request, signed bool) error {
	u := upload{ID: newID(), Created: now()}
	length, err := strconv.ParseInt(r.Header.Get("Upload-Length"), 10, 64)
	if err != nil || length < 0 {
		return badRequest("Upload-Length or Upload-Defer-Length header required")
	}
	u.Length = length
	if err := u.describe(r.Header.Get("Upload-Metadata")); err != nil {
		return err
	}
	var upsert bool
	if u.Owner, upsert, err = s.tusMay(r, u.Bucket, u.Key, signed); err != nil {
		return err
	}
	b, err := s.store.bucket(u.Bucket)
	if err != nil {
		return err
	}
	if u.Length > s.limitOf(b) {
		return &fault{status: http.StatusRequestEntityTooLarge, message: "Maximum size exceeded"}
	}
	if err := allowed(b, u.ContentType); err != nil {
		return err
	}
	s.sweep()
	release, err := s.uploads.take(r.Context(), u.ID, nil)
	if err != nil {
		return err
	}
	defer release()
	if err := s.store.root.WriteFile(partFile(u.ID), nil, 0o600); err != nil {
		return err
	}
	if err := s.store.writeJSON(uploadFile(u.ID), u); err != nil {
		return err
	}
	offset := int64(0)
	if r.Header.Get("Content-Type") == partType {
		if offset, err = s.append(&u, r.Body, 0); err != nil {
			return err
		}
	}
	if offset == u.Length {
		if err := s.finish(&u, upsert); err != nil {
			return err
		}
	}
	suffix := ""
	if signed {
		suffix = "sign/"
	}
	w.Header().Set("Location", origin(r)+prefix+"/upload/resumable/"+suffix+u.ID)
	w.Header().Set("Upload-Offset", itoa(offset))
	w.Header().Set("Upload-Expires", u.Created.Add(uploadTTL).Format(http.TimeFormat))
	w.WriteHeader(http.StatusCreated)
	return nil
}

// describe reads the metadata of an upload: names, each with a value in base64.
func (u *upload) describe(header string) error {
	bad := &fault{status: 400, message: "Upload-Metadata is invalid. It MUST consist of one or more comma-separated key-value pairs"}
	m := map[string]string{}
	for p := range strings.SplitSeq(header, ",") {
		name, value, _ := strings.Cut(strings.TrimSpace(p), " ")
		raw, err := base64.StdEncoding.DecodeString(value)
		if name == "" || err != nil {
			return bad
		}
		m[name] = string(raw)
	}
	u.Bucket, u.Key, u.ContentType = m["bucketName"], m["objectName"], m["contentType"]
	if !bucketAlphabet.MatchString(u.Bucket) {
		return badName
	}
	if err := checkKey(u.Key); err != nil {
		return err
	}
	if u.ContentType == "" {
		u.ContentType = "application/octet-stream"
	}
	u.CacheControl = "no-cache"
	if wholeNumber.MatchString(m["cacheControl"]) {
		u.CacheControl = "max-age=" + m["cacheControl"]
	}
	if m["metadata"] == "" {
		return nil
	}
	var err error
	u.Metadata, err = userMetadata([]byte(m["metadata"]))
	return err
}

// origin is the address that the client used, as far as proxies tell.
func origin(r *http.Request) string {
	scheme, host := "http", r.Host
	if r.TLS != nil {
		scheme = "https"
	}
	if v := r.Header.Get("X-Forwarded-Proto"); v == "http" || v == "https" {
		scheme = v
	}
	if v := r.Header.Get("X-Forwarded-Host"); v != "" {
		host = v
	}
	return scheme + "://" + host
}

// uploadOf reads an upload and how much of it has arrived.
func (s *Server) uploadOf(id string) (*upload, int64, error) {
	u := new(upload)
	err := readJSON(s.store.root, uploadFile(id), u)
	if errors.Is(err, fs.ErrNotExist) || err == nil && time.Since(u.Created) > uploadTTL {
		return nil, 0, noUpload
	}
	if err != nil {
		return nil, 0, err
	}
	if u.Done {
		return u, u.Length, nil
	}
	fi, err := s.store.root.Stat(partFile(id))
	if err != nil {
		return nil, 0, err
	}
	return u, fi.Size(), nil
}

func (s *Server) tusHead(w http.ResponseWriter, r *http.Request, id string) error {
	release, err := s.uploads.take(r.Context(), id, nil)
	if err != nil {
		return err
	}
	defer release()
	u, offset, err := s.uploadOf(id)
	if err != nil {
		return err
	}
	w.Header().Set("Upload-Offset", itoa(offset))
	w.Header().Set("Upload-Length", itoa(u.Length))
	w.WriteHeader(http.StatusOK)
	return nil
}

func (s *Server) tusPatch(w http.ResponseWriter, r *http.Request, id string, signed bool) error {
	if r.Header.Get("Content-Type") != partType {
		return &fault{status: http.StatusUnsupportedMediaType, message: "Content-Type header required"}
	}
	at, err := strconv.ParseInt(r.Header.Get("Upload-Offset"), 10, 64)
	if err != nil || at < 0 {
		return &fault{status: http.StatusForbidden, message: "Upload-Offset header required"}
	}
	c := http.NewResponseController(w)
	// A deadline in the past ends a read that waits for a dead connection.
	release, err := s.uploads.take(r.Context(), id, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })
	if err != nil {
		return err
	}
	defer release()
	u, offset, err := s.uploadOf(id)
	if err != nil {
		return err
	}
	_, upsert, err := s.tusMay(r, u.Bucket, u.Key, signed)
	if err != nil {
		return err
	}
	if at != offset {
		return &fault{status: http.StatusConflict, message: "Upload-Offset conflict"}
	}
	if !u.Done {
		offset, err = s.append(u, r.Body, offset)
		if errors.Is(err, errCut) {
			w.Header().Set("Connection", "close")
		} else if err != nil {
			return err
		}
		if offset == u.Length {
			if err := s.finish(u, upsert); err != nil {
				return err
			}
		}
	}
	w.Header().Set("Upload-Offset", itoa(offset))
	w.WriteHeader(http.StatusNoContent)
	return nil
}

var errCut = errors.New("the body ended early")

// append writes a part behind the others and returns the new offset. Bytes that
// arrived before a cut are kept.
func (s *Server) append(u *upload, body io.Reader, offset int64) (int64, error) {
	f, err := s.store.root.OpenFile(partFile(u.ID), os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return offset, err
	}
	n, err := io.Copy(disk{f}, io.LimitReader(body, u.Length-offset))
	if cerr := f.Close(); cerr != nil {
		return offset, cerr
	}
	var full *fs.PathError
	switch {
	case errors.As(err, &full):
		return offset + n, err
	case err != nil:
		return offset + n, errCut
	}
	return offset + n, nil
}

// disk hides the file's ReadFrom, so that an error of the body is not dressed
// as one of the file.
type disk struct{ io.Writer }

// finish makes an object of the bytes.
func (s *Server) finish(u *upload, upsert bool) error {
	o := object{
		Bucket: u.Bucket, Key: u.Key, Bytes: u.Length, ContentType: u.ContentType,
		CacheControl: u.CacheControl, Metadata: u.Metadata, Owner: u.Owner,
	}
	if _, err := s.store.put(o, partFile(u.ID), upsert); err != nil {
		return err
	}
	u.Done = true
	return s.store.writeJSON(uploadFile(u.ID), u)
}

func (s *Server) tusDelete(w http.ResponseWriter, r *http.Request, id string, signed bool) error {
	release, err := s.uploads.take(r.Context(), id, nil)
	if err != nil {
		return err
	}
	defer release()
	u, _, err := s.uploadOf(id)
	if err != nil {
		return err
	}
	if _, _, err := s.tusMay(r, u.Bucket, u.Key, signed); err != nil {
		return err
	}
	s.drop(id)
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *Server) drop(id string) {
	_ = s.store.root.Remove(uploadFile(id))
	_ = s.store.root.Remove(partFile(id))
}

// sweep removes uploads that have expired.
func (s *Server) sweep() {
	_ = readAll(s.store.root, "uploads", func(u *upload) {
		if time.Since(u.Created) > uploadTTL {
			s.drop(u.ID)
		}
	})
}
