package local

import (
	"net/http"
	"net/url"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

const (
	forDownload = "download"
	forUpload   = "upload"

	uploadTokenTTL = 2 * time.Hour
	mostSigned     = 1000
)

// pass is what a signed URL's token says: one object, one purpose, one time. It
// has no role, so it opens nothing as a bearer token.
type pass struct {
	URL    string `json:"url"` // bucket/key
	Scope  string `json:"scope"`
	Upsert bool   `json:"upsert,omitempty"`
	Owner  string `json:"owner,omitempty"`
	jwt.RegisteredClaims
}

func (s *Server) issue(p pass, ttl time.Duration) (string, error) {
	at := time.Now()
	p.IssuedAt, p.ExpiresAt = jwt.NewNumericDate(at), jwt.NewNumericDate(at.Add(ttl))
	return jwt.NewWithClaims(jwt.SigningMethodHS256, p).SignedString(s.secret)
}

// admit checks a token against the object that it is used for.
func (s *Server) admit(token, scope, bucket, key string) (pass, error) {
	var p pass
	if why := s.verify(token, &p, jwt.WithExpirationRequired()); why != "" {
		return p, &fault{status: 400, code: "InvalidJWT", message: why}
	}
	if p.Scope != scope || p.URL != bucket+"/"+key {
		return p, badSignature
	}
	return p, nil
}

// signOne returns the path of a signed URL, unescaped as the real server does.
func (s *Server) signOne(r *http.Request, bucket, key string, seconds int64) (string, error) {
	if err := checkKey(key); err != nil {
		return "", err
	}
	if _, err := s.readable(r, bucket, key); err != nil {
		return "", err
	}
	name := bucket + "/" + key
	token, err := s.issue(pass{URL: name, Scope: forDownload}, time.Duration(seconds)*time.Second)
	return "/object/sign/" + name + "?token=" + token, err
}

// lifetime is how the bodies of both sign calls begin.
type lifetime struct {
	Seconds int64    `json:"expiresIn"`
	Paths   []string `json:"paths"`
}

func (l lifetime) check() error {
	if l.Seconds < 1 || l.Seconds > int64(100*365*24*time.Hour/time.Second) {
		return badRequest("body/expiresIn must be >= 1")
	}
	return nil
}

func (s *Server) sign(w http.ResponseWriter, r *http.Request, rest string) error {
	bucket, key, err := names(rest)
	if err != nil {
		return err
	}
	var body lifetime
	if err := decode(r, &body); err != nil {
		return err
	}
	if err := body.check(); err != nil {
		return err
	}
	u, err := s.signOne(r, bucket, key, body.Seconds)
	if err != nil {
		return err
	}
	reply(w, http.StatusOK, map[string]string{"signedURL": u})
	return nil
}

func (s *Server) signMany(w http.ResponseWriter, r *http.Request, rest string) error {
	bucket, err := url.PathUnescape(rest)
	if err != nil {
		return badName
	}
	var body lifetime
	if err := decode(r, &body); err != nil {
		return err
	}
	if err := body.check(); err != nil {
		return err
	}
	if len(body.Paths) == 0 || len(body.Paths) > mostSigned {
		return badRequest("body/paths must have 1 to 1000 items")
	}
	rows := []map[string]any{}
	for _, key := range body.Paths {
		one := map[string]any{"path": key, "error": nil, "signedURL": nil}
		if u, err := s.signOne(r, bucket, key, body.Seconds); err == nil {
			one["signedURL"] = u
		} else {
			one["error"] = "Either the object does not exist or you do not have access to it"
		}
		rows = append(rows, one)
	}
	reply(w, http.StatusOK, rows)
	return nil
}

func (s *Server) getSigned(w http.ResponseWriter, r *http.Request, rest string) error {
	bucket, key, err := names(rest)
	if err != nil {
		return err
	}
	if _, err := s.admit(r.URL.Query().Get("token"), forDownload, bucket, key); err != nil {
		return err
	}
	return s.serve(w, r, bucket, key)
}

func (s *Server) signUpload(w http.ResponseWriter, r *http.Request, rest string) error {
	bucket, key, err := names(rest)
	if err != nil {
		return err
	}
	who, err := s.caller(r)
	if err != nil {
		return err
	}
	if err := s.writable(who, bucket, key, upserts(r)); err != nil {
		return err
	}
	name := bucket + "/" + key
	token, err := s.issue(pass{URL: name, Scope: forUpload, Upsert: upserts(r), Owner: who.user}, uploadTokenTTL)
	if err != nil {
		return err
	}
	reply(w, http.StatusOK, map[string]string{"url": "/object/upload/sign/" + name + "?token=" + token, "token": token})
	return nil
}

func (s *Server) putSigned(w http.ResponseWriter, r *http.Request, rest string) error {
	bucket, key, err := names(rest)
	if err != nil {
		return err
	}
	p, err := s.admit(r.URL.Query().Get("token"), forUpload, bucket, key)
	if err != nil {
		return err
	}
	if _, err := s.store.object(bucket, key); err == nil && !p.Upsert {
		return exists
	}
	o, err := s.receive(r, object{Bucket: bucket, Key: key, Owner: p.Owner}, p.Upsert)
	if err != nil {
		return err
	}
	reply(w, http.StatusOK, map[string]string{"Key": o.Bucket + "/" + o.Key})
	return nil
}
