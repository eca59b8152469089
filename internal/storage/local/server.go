// Package local is a server on a local disk that speaks the Supabase Storage
// HTTP API, for dev mode and for tests, where there is no account and no
// container. It exists so that the app's client library, the dispatcher and the
// agents run against the same contract as in production, its quirks included:
// most errors are an HTTP 400 whose body names the real status.
//
// It knows three callers. The service key may do everything. A signed-in user
// (a JWT with the role authenticated) reads what lies under a first folder that
// is the user's own id in the buckets lora-models and lora-datasets, and writes
// there in lora-datasets; everything else is "not found". Without either one
// sees public buckets only.
package local

import (
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"

	"github.com/golang-jwt/jwt/v5"
)

const (
	prefix       = "/storage/v1"
	defaultLimit = 50 << 30
	maxJSON      = 4 << 20

	modelsBucket   = "lora-models"
	datasetsBucket = "lora-datasets"
)

// Config says where the objects lie and who may call.
type Config struct {
	// Dir is made if it is not there. One server at a time uses it.
	Dir string
	// Secret signs and verifies the HS256 tokens of users and signed URLs.
	Secret string
	// ServiceKey and AnonKey are taken as they are, beside JWTs with the roles
	// service_role and anon. They may be empty.
	ServiceKey string
	AnonKey    string
	// MaxUploadBytes is the project's limit for one file; 0 means 50 GiB.
	MaxUploadBytes int64
}

// Server is the http.Handler for everything under /storage/v1.
type Server struct {
	store      *store
	secret     []byte
	serviceKey string
	anonKey    string
	limit      int64
	uploads    *uploads
}

// New opens the directory and returns a server for it. Close it to let another
// one use the directory.
func New(c Config) (*Server, error) {
	if c.Secret == "" {
		return nil, errors.New("opening the local store: the secret is empty")
	}
	st, err := openStore(c.Dir)
	if err != nil {
		return nil, fmt.Errorf("opening the local store: %w", err)
	}
	s := &Server{
		store: st, secret: []byte(c.Secret), serviceKey: c.ServiceKey, anonKey: c.AnonKey,
		limit: c.MaxUploadBytes, uploads: &uploads{held: map[string]*hold{}},
	}
	if s.limit <= 0 {
		s.limit = defaultLimit
	}
	return s, nil
}

// Close gives the directory back. Requests must have ended.
func (s *Server) Close() error { return s.store.close() }

// fault is an error in the API's own terms.
type fault struct {
	status  int    // what is meant
	http    int    // what is sent; 0: 400, as the real server does
	code    string // the new word
	name    string // the old word; empty: code
	message string
}

func (f *fault) Error() string { return f.message }

var (
	noBucket     = &fault{status: 404, code: "NoSuchBucket", name: "Bucket not found", message: "Bucket not found"}
	noKey        = &fault{status: 404, code: "NoSuchKey", name: "not_found", message: "Object not found"}
	noUpload     = &fault{status: 404, code: "NoSuchUpload", message: "Upload not found"}
	noRoute      = &fault{status: 404, http: 404, code: "InvalidRequest", name: "Not Found", message: "Route not found"}
	denied       = &fault{status: 403, code: "AccessDenied", name: "Unauthorized", message: "new row violates row-level security policy"}
	badToken     = &fault{status: 403, code: "AccessDenied", name: "Unauthorized", message: "Invalid Compact JWS"}
	badName      = &fault{status: 400, code: "InvalidBucketName", name: "Invalid Input", message: "Bucket name invalid"}
	badSignature = &fault{status: 400, code: "InvalidSignature", message: "Invalid signature"}
	badRange     = &fault{status: 416, http: 416, code: "InvalidRange", name: "invalid_range", message: "The requested range is not satisfiable"}
	exists       = &fault{status: 409, code: "KeyAlreadyExists", name: "Duplicate", message: "The resource already exists"}
	bucketExists = &fault{status: 409, code: "BucketAlreadyExists", name: "Duplicate", message: "The resource already exists"}
	notEmpty     = &fault{status: 409, code: "ResourceNotEmpty", message: "The bucket you tried to delete is not empty"}
	tooLarge     = &fault{status: 413, code: "EntityTooLarge", name: "Payload too large", message: "The object exceeded the maximum allowed size"}
	internal     = &fault{status: 500, http: 500, code: "InternalError", name: "Internal", message: "Internal Server Error"}
)

func badRequest(message string) *fault {
	return &fault{status: 400, code: "InvalidRequest", message: message}
}

func badKey(key string) *fault {
	return &fault{status: 400, code: "InvalidKey", message: "Invalid key: " + key}
}

func badMime(t string) *fault {
	return &fault{status: 415, code: "InvalidMimeType", name: "invalid_mime_type", message: "mime type " + t + " is not supported"}
}

// faultOf is the API's word for an error of the store.
func faultOf(err error) *fault {
	var f *fault
	switch {
	case errors.As(err, &f):
		return f
	case errors.Is(err, errNoBucket):
		return noBucket
	case errors.Is(err, errNoObject):
		return noKey
	case errors.Is(err, errExists):
		return exists
	case errors.Is(err, errNotEmpty):
		return notEmpty
	case errors.Is(err, errTooLarge):
		return tooLarge
	}
	return internal
}

func (s *Server) fail(w http.ResponseWriter, err error) {
	f := faultOf(err)
	name, status := f.name, f.http
	if name == "" {
		name = f.code
	}
	if status == 0 {
		status = http.StatusBadRequest
	}
	reply(w, status, map[string]string{
		"statusCode": itoa(int64(f.status)), "error": name, "message": f.message, "code": f.code,
	})
}

func reply(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // a client that left is no news
}

func decode(r *http.Request, v any) error {
	raw, err := io.ReadAll(io.LimitReader(r.Body, maxJSON))
	if err != nil {
		return badRequest("the body cannot be read")
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return badRequest("body must be object")
	}
	return nil
}

// ServeHTTP answers one request.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	cors(w.Header())
	at, ok := strings.CutPrefix(r.URL.EscapedPath(), prefix+"/")
	if !ok {
		s.fail(w, noRoute)
		return
	}
	room, rest, _ := strings.Cut(at, "/")
	resumable := room == "upload" && (rest == "resumable" || strings.HasPrefix(rest, "resumable/"))
	if r.Method == http.MethodOptions {
		if resumable {
			s.tusOptions(w.Header())
		}
		w.WriteHeader(http.StatusNoContent)
		return
	}
	if resumable {
		s.resumable(w, r, strings.TrimPrefix(strings.TrimPrefix(rest, "resumable"), "/"))
		return
	}
	var err error
	switch room {
	case "bucket":
		err = s.bucketRoute(w, r, rest)
	case "object":
		err = s.objectRoute(w, r, rest)
	case "status", "health":
		reply(w, http.StatusOK, map[string]bool{"healthy": true})
	default:
		err = noRoute
	}
	if err != nil {
		s.fail(w, err)
	}
}

func cors(h http.Header) {
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS")
	h.Set("Access-Control-Allow-Headers", "authorization, apikey, x-client-info, content-type, cache-control, range, "+
		"if-none-match, x-upsert, x-metadata, x-signature, x-forwarded-host, x-forwarded-proto, "+
		"tus-resumable, upload-length, upload-offset, upload-metadata, upload-defer-length")
	h.Set("Access-Control-Expose-Headers", "Content-Range, Content-Length, ETag, Location, "+
		"Tus-Resumable, Tus-Version, Tus-Extension, Tus-Max-Size, Upload-Offset, Upload-Length, Upload-Metadata, Upload-Expires")
	h.Set("Access-Control-Max-Age", "600")
}

// caller is who sent a request.
type caller struct {
	service bool
	user    string // the id of a signed-in user, or empty
}

// caller reads the bearer token. New keys come in apikey alone, which a hosted
// gateway translates.
func (s *Server) caller(r *http.Request) (caller, error) {
	token := ""
	if h := r.Header.Get("Authorization"); len(h) > 7 && strings.EqualFold(h[:7], "Bearer ") {
		token = strings.TrimSpace(h[7:])
	}
	if token == "" {
		token = r.Header.Get("apikey")
	}
	switch {
	case token == "", same(token, s.anonKey):
		return caller{}, nil
	case same(token, s.serviceKey):
		return caller{service: true}, nil
	}
	var claims struct {
		Role string `json:"role"`
		jwt.RegisteredClaims
	}
	if why := s.verify(token, &claims); why != "" {
		return caller{}, &fault{status: 403, code: "AccessDenied", name: "Unauthorized", message: why}
	}
	switch claims.Role {
	case "service_role":
		return caller{service: true}, nil
	case "authenticated":
		if claims.Subject == "" {
			return caller{}, badToken
		}
		return caller{user: claims.Subject}, nil
	case "anon":
		return caller{}, nil
	}
	return caller{}, badToken // also a signed URL's token
}

func same(a, b string) bool {
	return b != "" && subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1
}

// verify reads a token into claims and returns why it is not valid, in the real
// server's words, or nothing.
func (s *Server) verify(token string, claims jwt.Claims, o ...jwt.ParserOption) (reason string) {
	p := jwt.NewParser(append(o, jwt.WithValidMethods([]string{jwt.SigningMethodHS256.Name}))...)
	_, err := p.ParseWithClaims(token, claims, func(*jwt.Token) (any, error) { return s.secret, nil })
	switch {
	case err == nil:
		return ""
	case errors.Is(err, jwt.ErrTokenExpired):
		return `"exp" claim timestamp check failed`
	case errors.Is(err, jwt.ErrTokenSignatureInvalid):
		return "signature verification failed"
	}
	return badToken.message
}

func (c caller) mayRead(bucket, key string) bool {
	return c.service || c.owns(key) && (bucket == modelsBucket || bucket == datasetsBucket)
}

func (c caller) mayWrite(bucket, key string) bool {
	return c.service || c.owns(key) && bucket == datasetsBucket
}

func (c caller) owns(key string) bool {
	folder, _, nested := strings.Cut(key, "/")
	return c.user != "" && nested && folder == c.user
}

var (
	keyAlphabet    = regexp.MustCompile(`^[A-Za-z0-9_/!.*'() &$=@;:+,?-]+$`)
	bucketAlphabet = regexp.MustCompile(`^[A-Za-z0-9_!.*'() &$=@;:+,?-]{1,100}$`)
)

func checkKey(key string) error {
	if !keyAlphabet.MatchString(key) || len(key) > 1024 {
		return badKey(key)
	}
	for seg := range strings.SplitSeq(key, "/") {
		if seg == "" || seg == "." || seg == ".." {
			return badKey(key)
		}
	}
	return nil
}

// names splits the escaped rest of a path into bucket and key.
func names(rest string) (bucket, key string, err error) {
	b, k, _ := strings.Cut(rest, "/")
	bucket, err = url.PathUnescape(b)
	if err != nil || !bucketAlphabet.MatchString(bucket) {
		return "", "", badName
	}
	key, err = url.PathUnescape(k)
	if err != nil {
		return "", "", badKey(k)
	}
	return bucket, key, checkKey(key)
}
