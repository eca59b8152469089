package local

import (
	"encoding/json"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
)

func itoa(n int64) string { return strconv.FormatInt(n, 10) }

var sizeWithUnit = regexp.MustCompile(`(?i)^([0-9]+(?:\.[0-9]+)?)(gb|mb|kb|b)$`)

// bucketBody is what a client sends about a bucket. A field that is not there
// leaves the setting as it is, null takes it away.
type bucketBody struct {
	ID        string          `json:"id"`
	Name      string          `json:"name"`
	Public    *bool           `json:"public"`
	SizeLimit json.RawMessage `json:"file_size_limit"`
	MimeTypes json.RawMessage `json:"allowed_mime_types"`
}

func (b bucketBody) apply(to *bucket, max int64) error {
	if b.Public != nil {
		to.Public = *b.Public
	}
	if b.MimeTypes != nil {
		var types []string
		if err := json.Unmarshal(b.MimeTypes, &types); err != nil {
			return badRequest("body/allowed_mime_types must be array,null")
		}
		to.AllowedMimeTypes = types
	}
	if b.SizeLimit != nil {
		limit, err := sizeLimit(b.SizeLimit)
		if err != nil {
			return err
		}
		if limit != nil && *limit > max {
			return tooLarge
		}
		to.FileSizeLimit = limit
	}
	to.Updated = now()
	return nil
}

// sizeLimit reads a number of bytes, as a number or with a unit, or null.
func sizeLimit(raw json.RawMessage) (*int64, error) {
	bad := badRequest("the file size limit is not a number of bytes")
	text := strings.Trim(string(raw), `"`)
	if text == "null" || text == "" {
		return nil, nil
	}
	unit := 1.0
	if m := sizeWithUnit.FindStringSubmatch(text); m != nil {
		text = m[1]
		unit = map[string]float64{"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9}[strings.ToLower(m[2])]
	}
	f, err := strconv.ParseFloat(text, 64)
	if f *= unit; err != nil || f < 0 || f > math.MaxInt64/2 {
		return nil, bad
	}
	n := int64(f)
	if n == 0 {
		return nil, nil
	}
	return &n, nil
}

// bucketRoute serves /bucket and what is below it, for the service alone.
func (s *Server) bucketRoute(w http.ResponseWriter, r *http.Request, rest string) error {
	who, err := s.caller(r)
	if err != nil {
		return err
	}
	id, action, _ := strings.Cut(rest, "/")
	if id, err = url.PathUnescape(id); err != nil {
		return badName
	}
	if !who.service {
		switch {
		case r.Method == http.MethodGet && id == "":
			reply(w, http.StatusOK, []*bucket{})
			return nil
		case r.Method == http.MethodGet, id != "":
			return noBucket
		}
		return denied
	}
	switch {
	case id == "" && r.Method == http.MethodGet:
		reply(w, http.StatusOK, s.store.listBuckets())
	case id == "" && r.Method == http.MethodPost:
		return s.createBucket(w, r)
	case action == "" && r.Method == http.MethodGet:
		b, err := s.store.bucket(id)
		if err != nil {
			return err
		}
		reply(w, http.StatusOK, b)
	case action == "" && r.Method == http.MethodPut:
		return s.updateBucket(w, r, id)
	case action == "" && r.Method == http.MethodDelete:
		if err := s.store.deleteBucket(id); err != nil {
			return err
		}
		message(w, "Successfully deleted")
	case action == "empty" && r.Method == http.MethodPost:
		all, err := s.store.under(id, "")
		if err != nil {
			return err
		}
		for _, o := range all {
			if _, err := s.store.remove(id, o.Key); err != nil {
				return err
			}
		}
		message(w, "Successfully emptied")
	default:
		return noRoute
	}
	return nil
}

func message(w http.ResponseWriter, text string) {
	reply(w, http.StatusOK, map[string]string{"message": text})
}

func (s *Server) createBucket(w http.ResponseWriter, r *http.Request) error {
	var body bucketBody
	if err := decode(r, &body); err != nil {
		return err
	}
	if body.ID == "" {
		body.ID = body.Name
	}
	if !bucketAlphabet.MatchString(body.ID) || !bucketAlphabet.MatchString(body.Name) || body.ID == "." || body.ID == ".." {
		return badName
	}
	b := &bucket{ID: body.ID, Name: body.Name, Created: now()}
	if err := body.apply(b, s.limit); err != nil {
		return err
	}
	if err := s.store.createBucket(b); err != nil {
		if faultOf(err) == exists {
			return bucketExists
		}
		return err
	}
	reply(w, http.StatusOK, map[string]string{"name": b.Name})
	return nil
}

func (s *Server) updateBucket(w http.ResponseWriter, r *http.Request, id string) error {
	var body bucketBody
	if err := decode(r, &body); err != nil {
		return err
	}
	var trial bucket
	if err := body.apply(&trial, s.limit); err != nil {
		return err
	}
	if err := s.store.updateBucket(id, func(b *bucket) { _ = body.apply(b, s.limit) }); err != nil {
		return err
	}
	message(w, "Successfully updated")
	return nil
}
