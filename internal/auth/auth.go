// Package auth tells who a Supabase user is by the token that the app's client
// carries. Which algorithms count is configured and never chosen by the token:
// the project's published keys (ES256, RS256), or a shared secret (HS256) for
// projects that still have one.
package auth

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/MicahParks/jwkset"
	"github.com/MicahParks/keyfunc/v3"
	"github.com/golang-jwt/jwt/v5"
	"github.com/google/uuid"
	"golang.org/x/time/rate"
)

const (
	// Supabase tells caches to keep its keys for ten minutes.
	refresh = 10 * time.Minute
	// A token with a key that is not known makes us look for it, but no stranger
	// makes us look more often.
	refreshUnknown = 30 * time.Second
	fetchTimeout   = 5 * time.Second
	// unknownWait is how long such a token may wait for its turn.
	unknownWait = time.Second
	// leeway is what clocks may differ by.
	leeway = 30 * time.Second
	// maxToken is in bytes; Supabase's are of one to two thousand.
	maxToken = 8 << 10
)

// Config says which project's users are believed.
type Config struct {
	// ProjectURL is the project's address, such as https://ref.supabase.co; the
	// issuer is <ProjectURL>/auth/v1.
	ProjectURL string
	// KeysURL is where the project's keys are; empty:
	// <ProjectURL>/auth/v1/.well-known/jwks.json.
	KeysURL string
	// Secret is the legacy JWT secret. With it tokens of HS256 count, and no
	// others.
	Secret string
	// Anonymous lets users in that signed in without an identity.
	Anonymous bool
	Log       *slog.Logger
	Client    *http.Client // nil: one that follows no redirect
}

// User is who carries a token.
type User struct {
	ID        string // UUID of auth.users
	Anonymous bool   // signed in without an identity
	Session   string // of the sign-in; empty in old tokens
	Expires   time.Time
}

// The refusals. Their words are for the caller of an API; none repeats the token.
var (
	ErrNoToken     = errors.New("there is no bearer token: sign in")
	ErrExpired     = errors.New("the token has expired: refresh the session")
	ErrUnknownKey  = errors.New("the token was signed with a key that the project does not publish")
	ErrNotOurs     = errors.New("the token is not of this project")
	ErrAnonymous   = errors.New("anonymous users are not let in here: sign in with an identity")
	ErrBadToken    = errors.New("the token is not valid")
	ErrUnavailable = errors.New("the project's keys cannot be fetched now: try again")
)

// Verifier believes tokens of one project.
type Verifier struct {
	c      Config
	parser *jwt.Parser
	keys   func(context.Context) jwt.Keyfunc
	set    jwkset.Storage // nil with a secret
}

type claims struct {
	jwt.RegisteredClaims
	Role      string `json:"role"`
	Session   string `json:"session_id"`
	Anonymous bool   `json:"is_anonymous"`
}

// New makes a verifier that renews the project's keys until ctx ends. Keys that
// cannot be fetched now are fetched later: Ready tells.
func New(ctx context.Context, c Config) (*Verifier, error) {
	base, err := url.Parse(c.ProjectURL)
	if err != nil || base.Host == "" || base.User != nil || base.Scheme != "https" && base.Scheme != "http" {
		return nil, errors.New("the project's URL must be of the form https://ref.supabase.co")
	}
	issuer := strings.TrimRight(c.ProjectURL, "/") + "/auth/v1"
	v := &Verifier{c: c}
	methods := []string{"ES256", "RS256"}
	if c.Secret != "" {
		if len(c.Secret) < 32 {
			return nil, errors.New("the JWT secret is shorter than 32 bytes: it could be guessed")
		}
		methods = []string{"HS256"}
		v.keys = func(context.Context) jwt.Keyfunc {
			return func(*jwt.Token) (any, error) { return []byte(c.Secret), nil }
		}
	} else if err := v.fetch(ctx, issuer); err != nil {
		return nil, err
	}
	v.parser = jwt.NewParser(
		jwt.WithValidMethods(methods), jwt.WithIssuer(issuer), jwt.WithAudience("authenticated"),
		jwt.WithExpirationRequired(), jwt.WithIssuedAt(), jwt.WithLeeway(leeway),
	)
	return v, nil
}

// fetch keeps the project's keys.
func (v *Verifier) fetch(ctx context.Context, issuer string) error {
	at := v.c.KeysURL
	if at == "" {
		at = issuer + "/.well-known/jwks.json"
	}
	client := v.c.Client
	if client == nil {
		client = &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	}
	k, err := keyfunc.NewDefaultOverrideCtx(ctx, []string{at}, keyfunc.Override{
		Client: client, HTTPTimeout: fetchTimeout, RefreshInterval: refresh,
		RateLimitWaitMax: unknownWait, RefreshUnknownKID: rate.NewLimiter(rate.Every(refreshUnknown), 1),
		RefreshErrorHandlerFunc: func(string) func(context.Context, error) {
			return func(ctx context.Context, err error) {
				if v.c.Log != nil && ctx.Err() == nil {
					v.c.Log.WarnContext(ctx, "the project's keys were not renewed; those that are known go on", "err", err)
				}
			}
		},
	})
	if err != nil {
		return fmt.Errorf("keys of the project: %w", err)
	}
	v.keys, v.set = k.KeyfuncCtx, k.Storage()
	return nil
}

// Ready is nil when there are keys to check tokens with.
func (v *Verifier) Ready(ctx context.Context) error {
	if v.set == nil {
		return nil
	}
	if keys, err := v.set.KeyReadAll(ctx); err != nil || len(keys) == 0 {
		return ErrUnavailable
	}
	return nil
}

// Header is the token of an Authorization header.
func Header(h http.Header) (string, error) {
	scheme, token, ok := strings.Cut(h.Get("Authorization"), " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") || token == "" {
		return "", ErrNoToken
	}
	return strings.TrimSpace(token), nil
}

// Verify tells who carries token. Its error is one of the refusals above.
func (v *Verifier) Verify(ctx context.Context, token string) (User, error) {
	switch {
	case token == "":
		return User{}, ErrNoToken
	case len(token) > maxToken:
		return User{}, ErrBadToken
	}
	var c claims
	if _, err := v.parser.ParseWithClaims(token, &c, v.keys(ctx)); err != nil {
		return User{}, v.refusal(ctx, token, err)
	}
	switch {
	case c.Role != "authenticated" || c.IssuedAt == nil: // the keys of the project itself are tokens too
		return User{}, ErrNotOurs
	case uuid.Validate(c.Subject) != nil || len(c.Subject) != 36:
		return User{}, ErrBadToken
	case c.Anonymous && !v.c.Anonymous:
		return User{}, ErrAnonymous
	}
	return User{ID: strings.ToLower(c.Subject), Anonymous: c.Anonymous, Session: c.Session, Expires: c.ExpiresAt.Time}, nil
}

// refusal hides what a stranger need not know.
func (v *Verifier) refusal(ctx context.Context, token string, err error) error {
	switch {
	case errors.Is(err, jwt.ErrTokenExpired):
		return ErrExpired
	case errors.Is(err, jwt.ErrTokenInvalidIssuer), errors.Is(err, jwt.ErrTokenInvalidAudience), errors.Is(err, jwt.ErrTokenRequiredClaimMissing):
		return ErrNotOurs
	case errors.Is(err, keyfunc.ErrKeyfunc) && v.Ready(ctx) != nil:
		return ErrUnavailable
	case errors.Is(err, keyfunc.ErrKeyfunc) && !v.publishes(ctx, token):
		return ErrUnknownKey
	}
	return ErrBadToken
}

// publishes reports whether the project is known to publish the key that the
// token names. The library says that in as many words as there are reasons.
func (v *Verifier) publishes(ctx context.Context, token string) bool {
	unverified, _, err := v.parser.ParseUnverified(token, &claims{})
	if err != nil {
		return true
	}
	keys, err := v.set.KeyReadAll(ctx)
	return err != nil || slices.ContainsFunc(keys, func(k jwkset.JWK) bool { return k.Marshal().KID == unverified.Header["kid"] })
}
