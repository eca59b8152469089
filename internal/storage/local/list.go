package local

import (
	"encoding/base64"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

const (
	mostRowsV1 = 1500 // what the real server's function returns at most
	mostRowsV2 = 1000
)

// row is an object as lists show it.
func row(o *object, name string) map[string]any {
	return map[string]any{
		"id": o.ID, "name": name, "bucket_id": o.Bucket, "owner": o.Owner, "version": o.Version,
		"created_at": o.Created, "updated_at": o.Updated, "last_accessed_at": o.Updated,
		"metadata": map[string]any{
			"eTag": o.etag(), "size": o.Bytes, "mimetype": o.ContentType, "cacheControl": o.CacheControl,
			"lastModified": o.Updated, "contentLength": o.Bytes, "httpStatusCode": 200,
		},
	}
}

// folderRow is a common beginning of keys as lists show it.
func folderRow(name string) map[string]any {
	return map[string]any{
		"id": nil, "name": name, "created_at": nil, "updated_at": nil, "last_accessed_at": nil, "metadata": nil,
	}
}

type sortBy struct {
	Column string `json:"column"`
	Order  string `json:"order"`
}

// entry is an object or a folder under a list's prefix.
type entry struct {
	name string
	o    *object // nil: a folder
}

func (e entry) at(column string) time.Time {
	switch {
	case e.o == nil:
		return time.Time{}
	case column == "created_at":
		return e.o.Created
	}
	return e.o.Updated
}

// visible returns the objects under prefix that the caller may read.
func (s *Server) visible(r *http.Request, rest, prefix string) ([]*object, error) {
	who, err := s.caller(r)
	if err != nil {
		return nil, err
	}
	bucket, err := url.PathUnescape(rest)
	if err != nil {
		return nil, badName
	}
	all, err := s.store.under(bucket, prefix)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(o *object) bool { return !who.mayRead(bucket, o.Key) }), nil
}

// list shows one folder, by offset.
func (s *Server) list(w http.ResponseWriter, r *http.Request, rest string) error {
	var body struct {
		Prefix string `json:"prefix"`
		Search string `json:"search"`
		Limit  *int   `json:"limit"`
		Offset int    `json:"offset"`
		SortBy sortBy `json:"sortBy"`
	}
	if err := decode(r, &body); err != nil {
		return err
	}
	limit := 100
	if body.Limit != nil {
		limit = *body.Limit
	}
	if limit < 1 || body.Offset < 0 {
		return badRequest("body/limit must be >= 1 and body/offset >= 0")
	}
	limit = min(limit, mostRowsV1)
	folder := body.Prefix
	if folder != "" && !strings.HasSuffix(folder, "/") {
		folder += "/"
	}
	all, err := s.visible(r, rest, folder)
	if err != nil {
		return err
	}
	entries := entriesOf(all, folder, true)
	search := strings.ToLower(body.Search)
	entries = slices.DeleteFunc(entries, func(e entry) bool { return !strings.HasPrefix(strings.ToLower(e.name), search) })
	order(entries, body.SortBy)
	rows := []map[string]any{}
	for _, e := range entries[min(body.Offset, len(entries)):] {
		if len(rows) == limit {
			break
		}
		if e.o == nil {
			rows = append(rows, folderRow(e.name))
		} else {
			rows = append(rows, row(e.o, e.name))
		}
	}
	reply(w, http.StatusOK, rows)
	return nil
}

// entriesOf cuts keys at the first slash after the prefix, so that a folder
// stands for all that is in it.
func entriesOf(all []*object, prefix string, cut bool) []entry {
	entries := []entry{}
	seen := map[string]bool{}
	for _, o := range all {
		name := o.Key[len(prefix):]
		folder, _, nested := strings.Cut(name, "/")
		if !nested || !cut {
			entries = append(entries, entry{name: name, o: o})
		} else if !seen[folder] {
			seen[folder] = true
			entries = append(entries, entry{name: folder})
		}
	}
	return entries
}

func order(entries []entry, by sortBy) {
	sign := 1
	if by.Order == "desc" {
		sign = -1
	}
	slices.SortStableFunc(entries, func(a, b entry) int {
		if by.Column == "created_at" || by.Column == "updated_at" || by.Column == "last_accessed_at" {
			if c := a.at(by.Column).Compare(b.at(by.Column)); c != 0 {
				return sign * c
			}
		}
		return sign * strings.Compare(a.name, b.name)
	})
}

// listV2 shows everything under a prefix, by cursor, as folders when asked to.
func (s *Server) listV2(w http.ResponseWriter, r *http.Request, rest string) error {
	var body struct {
		Prefix    string `json:"prefix"`
		Limit     *int   `json:"limit"`
		Cursor    string `json:"cursor"`
		Delimiter bool   `json:"with_delimiter"`
		SortBy    sortBy `json:"sortBy"`
	}
	if err := decode(r, &body); err != nil {
		return err
	}
	limit := mostRowsV2
	if body.Limit != nil {
		limit = *body.Limit
	}
	if limit < 1 {
		return badRequest("body/limit must be >= 1")
	}
	limit = min(limit, mostRowsV2)
	all, err := s.visible(r, rest, body.Prefix)
	if err != nil {
		return err
	}
	entries := entriesOf(all, body.Prefix, body.Delimiter)
	order(entries, body.SortBy)
	if body.Cursor != "" {
		after, err := base64.StdEncoding.DecodeString(body.Cursor)
		if err != nil {
			return badRequest("the cursor is not one of ours")
		}
		entries = entries[afterCursor(entries, string(after), body.SortBy):]
	}
	answer := map[string]any{"hasNext": len(entries) > limit}
	if len(entries) > limit {
		entries = entries[:limit]
		last := entries[limit-1].name
		answer["nextCursor"] = base64.StdEncoding.EncodeToString([]byte(last))
		answer["nextCursorKey"] = body.Prefix + last
	}
	objects, folders := []map[string]any{}, []map[string]any{}
	for _, e := range entries {
		if e.o == nil {
			folders = append(folders, folderRow(body.Prefix+e.name+"/"))
		} else {
			objects = append(objects, row(e.o, e.o.Key))
		}
	}
	answer["objects"], answer["folders"] = objects, folders
	reply(w, http.StatusOK, answer)
	return nil
}

// afterCursor is the index behind the entry that a cursor names. In the order of
// names it also works when that entry has been removed meanwhile.
func afterCursor(entries []entry, name string, by sortBy) int {
	if by.Column != "" && by.Column != "name" {
		return slices.IndexFunc(entries, func(e entry) bool { return e.name == name }) + 1
	}
	i := slices.IndexFunc(entries, func(e entry) bool {
		if by.Order == "desc" {
			return e.name < name
		}
		return e.name > name
	})
	if i < 0 {
		return len(entries)
	}
	return i
}
