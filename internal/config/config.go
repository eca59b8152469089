// Package config fills a settings struct from flags, the environment and an
// optional file, in that order of weight. Each setting is declared once, as a
// field with tags; --help and deploy/*.env.example are made of the same tags.
// It reports everything that is wrong at once and never prints a secret.
//
//	DatabaseURL config.Secret `flag:"database-url" env:"DATABASE_URL" required:"true" example:"postgres://…" help:"…"`
//	Poll        time.Duration `flag:"poll" env:"POLL" default:"1s" help:"…"`
package config

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// Secret is a value that prints as [redacted].
type Secret string

const redacted = "[redacted]"

// String hides the value.
func (Secret) String() string { return redacted }

// GoString hides the value from %#v.
func (Secret) GoString() string { return redacted }

// LogValue hides the value from slog.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText hides the value from JSON and other encoders.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Reveal gives the value to whoever has to use it.
func (s Secret) Reveal() string { return string(s) }

// ErrHelp says that the caller asked for --help.
var ErrHelp = errors.New("help was asked for")

// setting is one field of a settings struct.
type setting struct {
	flag, env, help, example, otherwise string
	required, hasDefault                bool
	value                               reflect.Value
}

func (s *setting) secret() bool { return s.value.Type() == reflect.TypeFor[Secret]() }

// settingsOf reads the declarations of dst, a pointer to a struct.
func settingsOf(dst any) []*setting {
	v := reflect.ValueOf(dst)
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
		panic("config: settings must be a pointer to a struct")
	}
	var out []*setting
	for i := range v.Elem().NumField() {
		f := v.Elem().Type().Field(i)
		if f.Anonymous {
			out = append(out, settingsOf(v.Elem().Field(i).Addr().Interface())...)
			continue
		}
		s := &setting{
			flag: f.Tag.Get("flag"), env: f.Tag.Get("env"), help: f.Tag.Get("help"), example: f.Tag.Get("example"),
			required: f.Tag.Get("required") == "true", value: v.Elem().Field(i),
		}
		s.otherwise, s.hasDefault = f.Tag.Lookup("default")
		if s.flag == "" || s.env == "" || s.help == "" {
			panic("config: field " + f.Name + " needs the tags flag, env and help")
		}
		out = append(out, s)
	}
	return out
}

// Load fills dst. args are the arguments after the verb, environ is os.Environ's
// form. It returns the arguments that are not flags. The error joins everything
// that is wrong, or is ErrHelp. Any setting X may be given as a file instead,
// by the variable X_FILE; a settings file of KEY=VALUE lines is named by
// --config or CONFIG_FILE.
func Load(dst any, args, environ []string) (rest []string, err error) {
	settings := settingsOf(dst)
	flags, rest, errs := parseFlags(settings, args)
	if flags["help"] != "" {
		return nil, ErrHelp
	}
	env := map[string]string{}
	for _, kv := range environ {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	path := flags["config"]
	if path == "" {
		path = env["CONFIG_FILE"]
	}
	file := map[string]string{}
	if path != "" {
		if file, err = readFile(path); err != nil {
			errs = append(errs, err)
		}
	}
	for _, s := range settings {
		if err := s.fill(flags, env, file); err != nil {
			errs = append(errs, err)
		}
	}
	return rest, errors.Join(errs...)
}

// fill takes the first of flag, environment, file and default.
func (s *setting) fill(flags, env, file map[string]string) error {
	text, from, ok := "", "", false
	if text, ok = flags[s.flag]; ok {
		from = "--" + s.flag
	} else if text, ok = env[s.env]; ok && text != "" {
		from = s.env
	} else if path := env[s.env+"_FILE"]; path != "" {
		raw, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("%s_FILE: %w", s.env, err)
		}
		text, from, ok = strings.TrimRight(string(raw), "\r\n"), s.env+"_FILE", true
	} else if text, ok = file[s.env]; ok && text != "" {
		from = s.env + " in the settings file"
	} else if s.hasDefault {
		text, from, ok = s.otherwise, "the default of --"+s.flag, true
	} else if ok = false; s.required {
		return fmt.Errorf("--%s (%s) is missing: %s", s.flag, s.env, s.help)
	}
	if !ok {
		return nil
	}
	if s.required && text == "" {
		return fmt.Errorf("%s is empty: %s", from, s.help)
	}
	if err := s.set(text); err != nil {
		shown := strconv.Quote(text)
		if s.secret() {
			shown = "the value"
		}
		return fmt.Errorf("%s: %s is %w", from, shown, err)
	}
	return nil
}

func (s *setting) set(text string) error {
	switch p := s.value.Addr().Interface().(type) {
	case *string:
		*p = text
	case *Secret:
		*p = Secret(text)
	case *bool:
		b, err := strconv.ParseBool(text)
		if err != nil {
			return errors.New("neither true nor false")
		}
		*p = b
	case *time.Duration:
		d, err := time.ParseDuration(text)
		if err != nil || d < 0 {
			return errors.New("not a length of time such as 500ms, 10s or 5m")
		}
		*p = d
	case *int:
		n, err := strconv.Atoi(text)
		if err != nil {
			return errors.New("not a whole number")
		}
		*p = n
	case *int64:
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return errors.New("not a whole number")
		}
		*p = n
	case *float64:
		f, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return errors.New("not a number")
		}
		*p = f
	case *[]string:
		*p = nil
		for part := range strings.SplitSeq(text, ",") {
			if part = strings.TrimSpace(part); part != "" {
				*p = append(*p, part)
			}
		}
	default:
		panic(fmt.Sprintf("config: no settings of type %T", p))
	}
	return nil
}

// parseFlags reads --name value, --name=value and, for booleans, --name.
func parseFlags(settings []*setting, args []string) (flags map[string]string, rest []string, errs []error) {
	flags = map[string]string{}
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if arg == "--" {
			return flags, append(rest, args[i+1:]...), errs
		}
		if !strings.HasPrefix(arg, "-") || arg == "-" {
			rest = append(rest, arg)
			continue
		}
		name, value, hasValue := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		if name == "help" || name == "h" {
			flags["help"] = "true"
			continue
		}
		j := slices.IndexFunc(settings, func(s *setting) bool { return s.flag == name })
		if j < 0 && name != "config" {
			errs = append(errs, fmt.Errorf("--%s is not a flag%s", name, nearest(settings, name)))
			continue
		}
		if !hasValue {
			switch {
			case j >= 0 && settings[j].value.Kind() == reflect.Bool:
				value = "true"
			case i+1 < len(args):
				i++
				value = args[i]
			default:
				errs = append(errs, fmt.Errorf("--%s needs a value", name))
				continue
			}
		}
		flags[name] = value
	}
	return flags, rest, errs
}

// nearest suggests the flag that name was probably meant to be.
func nearest(settings []*setting, name string) string {
	best, least := "", 4
	for _, s := range settings {
		if d := distance(s.flag, name); d < least {
			best, least = s.flag, d
		}
	}
	if best == "" {
		return "; --help lists them"
	}
	return "; did you mean --" + best + "?"
}

// distance is Levenshtein's.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := diagonal
			if a[i-1] != b[j-1] {
				cost = 1 + min(diagonal, row[j], row[j-1])
			}
			diagonal, row[j] = row[j], cost
		}
	}
	return row[len(b)]
}

// readFile reads KEY=VALUE lines; blank lines and lines that begin with # are
// left out, quotes around a value are taken off.
func readFile(path string) (map[string]string, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the settings file: %w", err)
	}
	out := map[string]string{}
	n := 0
	for line := range strings.Lines(string(raw)) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		k, v, ok := strings.Cut(strings.TrimPrefix(line, "export "), "=")
		if !ok {
			return nil, fmt.Errorf("%s:%d is not of the form KEY=VALUE", path, n)
		}
		v = strings.TrimSpace(v)
		if len(v) >= 2 && (v[0] == '"' || v[0] == '\'') && v[len(v)-1] == v[0] {
			v = v[1 : len(v)-1]
		}
		out[strings.TrimSpace(k)] = v
	}
	return out, nil
}

// Usage prints a table of the settings of dst.
func Usage(w io.Writer, dst any) {
	fmt.Fprintln(w, "Settings, from flags, the environment, or a file of KEY=VALUE lines (--config FILE).\nAny variable may be given as a file: NAME_FILE=/path.")
	fmt.Fprintln(w)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, s := range settingsOf(dst) {
		note := ""
		switch {
		case s.required:
			note = " (required)"
		case s.otherwise != "":
			note = " (default " + s.otherwise + ")"
		}
		fmt.Fprintf(tw, "  --%s\t%s\t%s%s\n", s.flag, s.env, s.help, note)
	}
	_ = tw.Flush()
}

// EnvExample prints an example settings file for dst.
func EnvExample(w io.Writer, title string, dst any) {
	fmt.Fprintf(w, "# %s\n# Lines of KEY=VALUE; a flag or the environment wins over this file.\n", title)
	for _, s := range settingsOf(dst) {
		fmt.Fprintf(w, "\n# %s\n", s.help)
		switch {
		case s.required:
			fmt.Fprintf(w, "%s=%s\n", s.env, s.example)
		case s.otherwise != "":
			fmt.Fprintf(w, "#%s=%s\n", s.env, s.otherwise)
		default:
			fmt.Fprintf(w, "#%s=%s\n", s.env, s.example)
		}
	}
}
