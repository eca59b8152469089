package auth_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/big"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"

	"lorayard/internal/auth"
)

const (
	subject = "0a1b2c3d-0000-4000-8000-00000000abcd"
	secret  = "a-legacy-secret-of-at-least-32-bytes!"
)

func b64(n *big.Int) string { return base64.RawURLEncoding.EncodeToString(n.Bytes()) }

// project is Supabase Auth as far as its keys go.
type project struct {
	*httptest.Server
	mu   sync.Mutex
	keys []map[string]any
	down atomic.Bool
	n    atomic.Int64
}

func newProject(t *testing.T, keys ...map[string]any) *project {
	t.Helper()
	p := &project{keys: keys}
	p.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.n.Add(1)
		if p.down.Load() || r.URL.Path != "/auth/v1/.well-known/jwks.json" {
			http.Error(w, "down", http.StatusServiceUnavailable)
			return
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		_ = json.NewEncoder(w).Encode(map[string]any{"keys": p.keys})
	}))
	t.Cleanup(p.Close)
	return p
}

func ec(t *testing.T, kid string) (*ecdsa.PrivateKey, map[string]any) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := k.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	enc := base64.RawURLEncoding.EncodeToString
	return k, map[string]any{"kty": "EC", "crv": "P-256", "kid": kid, "alg": "ES256", "use": "sig", "x": enc(pub[1:33]), "y": enc(pub[33:])}
}

func usual(p string) jwt.MapClaims {
	now := time.Now()
	return jwt.MapClaims{
		"iss": p + "/auth/v1", "aud": "authenticated", "sub": subject, "role": "authenticated", "session_id": "s", "is_anonymous": false,
		"iat": now.Unix(), "exp": now.Add(time.Hour).Unix(), "user_metadata": map[string]any{"role": "service_role"},
	}
}

func with(c jwt.MapClaims, over map[string]any) jwt.MapClaims {
	for k, v := range over {
		if v == nil {
			delete(c, k)
		} else {
			c[k] = v
		}
	}
	return c
}

func sign(t *testing.T, m jwt.SigningMethod, kid string, key any, c jwt.MapClaims) string {
	t.Helper()
	tok := jwt.NewWithClaims(m, c)
	if kid != "" {
		tok.Header["kid"] = kid
	}
	s, err := tok.SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func verifier(t *testing.T, c auth.Config) *auth.Verifier {
	t.Helper()
	v, err := auth.New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestTokensThatAreBelievedAndThoseThatAreNot(t *testing.T) {
	k, jwk := ec(t, "k1")
	stranger, _ := ec(t, "k1")
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p := newProject(t, jwk, map[string]any{"kty": "RSA", "kid": "k2", "alg": "RS256", "use": "sig", "n": b64(r.N), "e": b64(big.NewInt(int64(r.E)))})
	v := verifier(t, auth.Config{ProjectURL: p.URL + "/"})
	es := func(over map[string]any) string {
		return sign(t, jwt.SigningMethodES256, "k1", k, with(usual(p.URL), over))
	}
	public, err := k.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	ago := func(d time.Duration) int64 { return time.Now().Add(-d).Unix() }
	good := es(nil)
	for name, c := range map[string]struct {
		token string
		want  error
	}{
		"of ES256":                        {good, nil},
		"of RS256":                        {sign(t, jwt.SigningMethodRS256, "k2", r, usual(p.URL)), nil},
		"without kid":                     {sign(t, jwt.SigningMethodES256, "", k, usual(p.URL)), nil},
		"expired within the leeway":       {es(map[string]any{"exp": ago(10 * time.Second)}), nil},
		"empty":                           {"", auth.ErrNoToken},
		"not a token":                     {"x.y.z", auth.ErrBadToken},
		"endless":                         {good + strings.Repeat("A", 9000), auth.ErrBadToken},
		"with another end":                {good[:len(good)-3] + "AAA", auth.ErrBadToken},
		"of a stranger under our kid":     {sign(t, jwt.SigningMethodES256, "k1", stranger, usual(p.URL)), auth.ErrBadToken},
		"of an unknown key":               {sign(t, jwt.SigningMethodES256, "k9", stranger, usual(p.URL)), auth.ErrUnknownKey},
		"of algorithm none":               {sign(t, jwt.SigningMethodNone, "k1", jwt.UnsafeAllowNoneSignatureType, usual(p.URL)), auth.ErrBadToken},
		"of HS256 with our public key":    {sign(t, jwt.SigningMethodHS256, "k1", public, usual(p.URL)), auth.ErrBadToken},
		"of RS256 under the kid of ES256": {sign(t, jwt.SigningMethodRS256, "k1", r, usual(p.URL)), auth.ErrBadToken},
		"of PS256":                        {sign(t, jwt.SigningMethodPS256, "k2", r, usual(p.URL)), auth.ErrBadToken},
		"expired":                         {es(map[string]any{"exp": ago(time.Minute)}), auth.ErrExpired},
		"without an end":                  {es(map[string]any{"exp": nil}), auth.ErrNotOurs},
		"not valid yet":                   {es(map[string]any{"nbf": ago(-time.Hour)}), auth.ErrBadToken},
		"issued in the future":            {es(map[string]any{"iat": ago(-time.Hour)}), auth.ErrBadToken},
		"of another issuer":               {es(map[string]any{"iss": "https://other.supabase.co/auth/v1"}), auth.ErrNotOurs},
		"without an issuer":               {es(map[string]any{"iss": nil}), auth.ErrNotOurs},
		"for another audience":            {es(map[string]any{"aud": "other"}), auth.ErrNotOurs},
		"of role service_role":            {es(map[string]any{"role": "service_role"}), auth.ErrNotOurs},
		"of role anon":                    {es(map[string]any{"role": "anon"}), auth.ErrNotOurs},
		"without a role":                  {es(map[string]any{"role": nil}), auth.ErrNotOurs},
		"without a subject":               {es(map[string]any{"sub": nil}), auth.ErrBadToken},
		"of a subject that is no uuid":    {es(map[string]any{"sub": "'; DROP TABLE users; --"}), auth.ErrBadToken},
		"of a subject in braces":          {es(map[string]any{"sub": "{" + subject + "}"}), auth.ErrBadToken},
		"of an anonymous user":            {es(map[string]any{"is_anonymous": true}), auth.ErrAnonymous},
		"with a claim of the wrong type":  {es(map[string]any{"is_anonymous": "yes"}), auth.ErrBadToken},
	} {
		u, err := v.Verify(t.Context(), c.token)
		if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("a token %s: %v, want %v", name, err, c.want)
		}
		if err == nil && (u.ID != subject || u.Session != "s" || u.Anonymous || time.Until(u.Expires) > 2*time.Hour) {
			t.Errorf("a token %s: %+v", name, u)
		}
		if err != nil && len(c.token) > 20 && strings.Contains(err.Error(), c.token[:20]) {
			t.Errorf("the error repeats the token %s", name)
		}
	}
	open := verifier(t, auth.Config{ProjectURL: p.URL, Anonymous: true})
	if u, err := open.Verify(t.Context(), es(map[string]any{"is_anonymous": true})); err != nil || !u.Anonymous {
		t.Errorf("an anonymous user where they are let in: %+v, %v", u, err)
	}
}

func TestALegacySecretCountsOnlyWhereItIsConfigured(t *testing.T) {
	k, jwk := ec(t, "k1")
	p := newProject(t, jwk)
	v := verifier(t, auth.Config{ProjectURL: p.URL, Secret: secret})
	if _, err := v.Verify(t.Context(), sign(t, jwt.SigningMethodHS256, "", []byte(secret), usual(p.URL))); err != nil {
		t.Error(err)
	}
	for name, tok := range map[string]string{
		"another secret": sign(t, jwt.SigningMethodHS256, "", []byte(secret+"x"), usual(p.URL)),
		"HS512":          sign(t, jwt.SigningMethodHS512, "", []byte(secret), usual(p.URL)),
		"ES256":          sign(t, jwt.SigningMethodES256, "k1", k, usual(p.URL)),
	} {
		if _, err := v.Verify(t.Context(), tok); !errors.Is(err, auth.ErrBadToken) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if p.n.Load() != 0 {
		t.Error("keys were fetched beside the secret")
	}
	if _, err := auth.New(t.Context(), auth.Config{ProjectURL: p.URL, Secret: "short"}); err == nil {
		t.Error("a short secret was taken")
	}
	for _, bad := range []string{"", "ref.supabase.co", "ftp://ref.supabase.co", "https://user:pass@ref.supabase.co"} {
		if _, err := auth.New(t.Context(), auth.Config{ProjectURL: bad}); err == nil {
			t.Errorf("the project %q was taken", bad)
		}
	}
}

func TestKeysComeAndGoWithTheProject(t *testing.T) {
	k1, jwk1 := ec(t, "k1")
	p := newProject(t, jwk1)
	p.down.Store(true)
	v := verifier(t, auth.Config{ProjectURL: p.URL})
	if err := v.Ready(t.Context()); !errors.Is(err, auth.ErrUnavailable) {
		t.Errorf("ready without keys: %v", err)
	}
	one := sign(t, jwt.SigningMethodES256, "k1", crypto.Signer(k1), usual(p.URL))
	if _, err := v.Verify(t.Context(), one); !errors.Is(err, auth.ErrUnavailable) {
		t.Errorf("without keys: %v", err)
	}

	p.down.Store(false)
	v = verifier(t, auth.Config{ProjectURL: p.URL})
	if _, err := v.Verify(t.Context(), one); err != nil {
		t.Error(err)
	}
	// The project signs with a new key: it is looked for at once, and once only.
	k2, jwk2 := ec(t, "k2")
	p.mu.Lock()
	p.keys = append(p.keys, jwk2)
	p.mu.Unlock()
	two := sign(t, jwt.SigningMethodES256, "k2", k2, usual(p.URL))
	if _, err := v.Verify(t.Context(), two); err != nil {
		t.Errorf("a new key: %v", err)
	}
	// Away, and strangers ask: what is known goes on, nobody waits for long.
	p.down.Store(true)
	before := p.n.Load()
	for range 20 {
		k3, _ := ec(t, "k3")
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		_, err := v.Verify(ctx, sign(t, jwt.SigningMethodES256, "k3", k3, usual(p.URL)))
		cancel()
		if !errors.Is(err, auth.ErrUnknownKey) {
			t.Fatalf("an unknown key: %v", err)
		}
	}
	if n := p.n.Load() - before; n > 1 {
		t.Errorf("strangers made us ask %d times", n)
	}
	for name, tok := range map[string]string{"k1": one, "k2": two} {
		if _, err := v.Verify(t.Context(), tok); err != nil {
			t.Errorf("%s while the project is away: %v", name, err)
		}
	}
}

func TestTheHeader(t *testing.T) {
	for value, want := range map[string]string{"Bearer x": "x", "bearer x": "x", "Bearer  x ": "x", "": "", "x": "", "Basic x": "", "Bearer ": ""} {
		got, err := auth.Header(http.Header{"Authorization": {value}})
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", value, got, err)
		}
	}
}

func FuzzVerify(f *testing.F) {
	v, err := auth.New(context.Background(), auth.Config{ProjectURL: "https://ref.supabase.co", Secret: secret})
	if err != nil {
		f.Fatal(err)
	}
	tok, _ := jwt.NewWithClaims(jwt.SigningMethodHS256, usual("https://ref.supabase.co")).SignedString([]byte(secret))
	for _, seed := range []string{"", tok, "a.b.c", "..", strings.Repeat(".", 100), tok[:50]} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, token string) {
		if u, err := v.Verify(context.Background(), token); err == nil && u.ID != subject {
			t.Errorf("believed %+v", u)
		}
	})
}
