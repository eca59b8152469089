package dataset

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// maxDepth is how deep objects and lists may be nested in one line. The house
// format needs four.
const maxDepth = 64

// mostMembers is how many names an object may have, how many messages a line,
// and how many parts a message: what is kept of each takes more memory than its
// two bytes in the file.
const mostMembers = 10_000

// value is where a JSON value stands in its line. The zero value: not there.
type value struct {
	kind       jsontext.Kind // ", 0, t, f, n, { or [
	start, end int           // of its bytes, with quotes and brackets
}

func (v value) there() bool { return v.kind != 0 && v.kind != 'n' }

// field is a name at the top of a line that some format knows.
type field int

const (
	fTarget field = iota
	fInput
	fHistory
	fTurns
	fMessages
	fConversations
	fInstruction
	fExtra
	fOutput
	fPrompt
	fCompletion
	fText
	fSystemPrompt
	fSystem
	fConversation
	fTools
	fMeta
	fieldCount
)

var fieldNames = [fieldCount]string{
	"target_response", "current_user_input", "conversation_history", "turns", "messages", "conversations", "instruction", "input",
	"output", "prompt", "completion", "text", "system_prompt", "system", "conversation_id", "tools", "_meta",
}

func fieldOf(name []byte) field {
	switch string(name) { // compiled without an allocation
	case "target_response":
		return fTarget
	case "current_user_input":
		return fInput
	case "conversation_history":
		return fHistory
	case "turns":
		return fTurns
	case "messages":
		return fMessages
	case "conversations":
		return fConversations
	case "instruction":
		return fInstruction
	case "input":
		return fExtra
	case "output":
		return fOutput
	case "prompt":
		return fPrompt
	case "completion":
		return fCompletion
	case "text":
		return fText
	case "system_prompt":
		return fSystemPrompt
	case "system":
		return fSystem
	case "conversation_id":
		return fConversation
	case "tools":
		return fTools
	case "_meta":
		return fMeta
	}
	return fieldCount
}

// entry is one message in a list of them.
type entry struct {
	self, role, content, from, value, weight, calls, callID, name value
}

// row is one line, taken apart but not yet judged.
type row struct {
	line    []byte
	fields  [fieldCount]value
	lists   [fieldCount][2]int // of entries: from, to
	entries []entry
}

// raw is what stands between a text's quotes, escapes as they are.
func (r *row) raw(v value) []byte { return r.line[v.start+1 : v.end-1] }

// parser takes lines apart. It is strict: what it lets pass, every JSON parser
// understands, and in the same way.
type parser struct {
	d   *jsontext.Decoder
	buf bytes.Buffer
	row row
}

func newParser() *parser {
	p := &parser{}
	p.d = jsontext.NewDecoder(&p.buf)
	return p
}

var (
	errDepth = errors.New("nested too deep")
	errMany  = errors.New("too many names or messages")
	errExtra = errors.New("more after the value")
)

// parse takes one line apart, or says why it is not one strict JSON object.
// The row is valid until the next call.
func (p *parser) parse(line []byte) (*row, *fault) {
	p.buf = *bytes.NewBuffer(line) // the decoder reads it in place
	p.d.Reset(&p.buf)
	p.row.line, p.row.entries = line, p.row.entries[:0]
	p.row.fields = [fieldCount]value{}
	switch kind := p.d.PeekKind(); {
	case kind == '[': // whole or not: it is most likely a file that is one array
		return nil, at(NotObject, int(p.d.InputOffset()), "", "is a list, not an object")
	case kind == '{':
		if err := p.object(); err != nil {
			return nil, p.fault(err)
		}
		return &p.row, nil
	}
	if _, err := p.d.ReadValue(); err != nil {
		return nil, p.fault(err)
	}
	if err := p.end(); err != nil {
		return nil, p.fault(err)
	}
	return nil, at(NotObject, 0, "", "is not a JSON object")
}

func (p *parser) object() error {
	if _, err := p.d.ReadToken(); err != nil {
		return err
	}
	for n := 0; p.d.PeekKind() != '}'; n++ {
		if n == mostMembers {
			return errMany
		}
		name, err := p.key()
		if err != nil {
			return err
		}
		switch f := fieldOf(name); f {
		case fHistory, fTurns, fMessages, fConversations, fTools:
			err = p.list(f)
		case fieldCount:
			_, err = p.value()
		default:
			p.row.fields[f], err = p.value()
		}
		if err != nil {
			return err
		}
	}
	if _, err := p.d.ReadToken(); err != nil {
		return err
	}
	return p.end()
}

func (p *parser) end() error {
	_, err := p.d.ReadToken()
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil && !utf8.Valid(p.row.line):
		return err
	}
	return errExtra
}

// key reads a name. Names with escapes are rare and made plain.
func (p *parser) key() ([]byte, error) {
	raw, err := p.d.ReadValue()
	if err != nil {
		return nil, err
	}
	if len(raw) < 2 || raw[0] != '"' {
		return nil, jsontext.ErrNonStringName
	}
	name := raw[1 : len(raw)-1]
	if bytes.IndexByte(name, '\\') >= 0 {
		return jsontext.AppendUnquote(nil, raw)
	}
	return name, nil
}

func (p *parser) value() (value, error) {
	kind := p.d.PeekKind()
	if kind != '{' && kind != '[' {
		raw, err := p.d.ReadValue()
		end := int(p.d.InputOffset())
		return value{kind, end - len(raw), end}, err
	}
	if _, err := p.d.ReadToken(); err != nil {
		return value{}, err
	}
	start, depth := int(p.d.InputOffset())-1, p.d.StackDepth()
	if depth > maxDepth {
		return value{}, errDepth
	}
	for p.d.StackDepth() >= depth {
		if _, err := p.d.ReadToken(); err != nil {
			return value{}, err
		}
		now := p.d.StackDepth()
		if now > maxDepth {
			return value{}, errDepth
		}
		if in, n := p.d.StackIndex(now); in == '{' && n > 2*mostMembers {
			return value{}, errMany
		}
	}
	return value{kind, start, int(p.d.InputOffset())}, nil
}

// list reads a list of messages, whatever it holds.
func (p *parser) list(f field) (err error) {
	if p.d.PeekKind() != '[' {
		p.row.fields[f], err = p.value()
		return err
	}
	if _, err := p.d.ReadToken(); err != nil {
		return err
	}
	start, from := int(p.d.InputOffset())-1, len(p.row.entries)
	for n := 0; p.d.PeekKind() != ']'; n++ {
		if n == mostMembers {
			return errMany
		}
		var e entry
		if err := p.entry(&e, f != fTools); err != nil {
			return err
		}
		p.row.entries = append(p.row.entries, e)
	}
	if _, err := p.d.ReadToken(); err != nil {
		return err
	}
	p.row.fields[f] = value{'[', start, int(p.d.InputOffset())}
	p.row.lists[f] = [2]int{from, len(p.row.entries)}
	return nil
}

func (p *parser) entry(e *entry, inside bool) (err error) {
	if !inside || p.d.PeekKind() != '{' {
		e.self, err = p.value()
		return err
	}
	if _, err := p.d.ReadToken(); err != nil {
		return err
	}
	e.self = value{kind: '{', start: int(p.d.InputOffset()) - 1}
	for n := 0; p.d.PeekKind() != '}'; n++ {
		if n == mostMembers {
			return errMany
		}
		name, err := p.key()
		if err != nil {
			return err
		}
		ignored := value{}
		to := &ignored
		switch string(name) {
		case "role":
			to = &e.role
		case "content":
			to = &e.content
		case "from":
			to = &e.from
		case "value":
			to = &e.value
		case "weight":
			to = &e.weight
		case "tool_calls":
			to = &e.calls
		case "tool_call_id":
			to = &e.callID
		case "name":
			to = &e.name
		}
		if *to, err = p.value(); err != nil {
			return err
		}
	}
	_, err = p.d.ReadToken()
	e.self.end = int(p.d.InputOffset())
	return err
}

// fault puts what the decoder says into our words.
func (p *parser) fault(err error) *fault {
	offset, pointer := int(p.d.InputOffset()), p.d.StackPointer()
	syntax, ok := errors.AsType[*jsontext.SyntacticError](err)
	if ok {
		offset, pointer = int(syntax.ByteOffset), syntax.JSONPointer
	}
	line := p.row.line
	offset = min(max(offset, 0), len(line))
	where := mask(pointer)
	if bad := firstBadUTF8(line); bad >= 0 {
		return at(BadUTF8, bad, where, "is not text in UTF-8")
	}
	switch {
	case errors.Is(err, errDepth):
		return at(TooDeep, offset, where, "is nested deeper than %d levels", maxDepth)
	case errors.Is(err, errMany):
		return at(TooMany, offset, where, "has more than %d names or messages in one place", mostMembers)
	case errors.Is(err, errExtra):
		return at(ExtraJSON, offset, "", "has more after its JSON object")
	case errors.Is(err, jsontext.ErrDuplicateName):
		return at(DuplicateKey, offset, where, "has the same name twice in one object")
	case errors.Is(err, io.ErrUnexpectedEOF) || offset >= len(line):
		return at(CutJSON, len(line), where, "ends before its JSON object does")
	}
	rest := line[offset:]
	reason := ""
	if ok {
		reason = syntax.Err.Error()
	}
	switch {
	case strings.Contains(reason, "surrogate"):
		return at(Surrogate, offset, where, "has one half of a character (a lone surrogate)")
	case strings.Contains(reason, "escape") || strings.Contains(reason, "in string"):
		return at(BadString, offset, where, "has a text with a character or an escape that JSON does not allow")
	case strings.Contains(reason, "number") || bytes.HasPrefix(rest, []byte("NaN")) || bytes.HasPrefix(rest, []byte("Inf")) || bytes.HasPrefix(rest, []byte("-Inf")) || rest[0] == '+' || rest[0] == '.':
		return at(BadNumber, offset, where, "has a number that JSON does not allow")
	case offset > 0 && line[offset-1] == '0' && '0' <= rest[0] && rest[0] <= '9':
		return at(BadNumber, offset, where, "has a number with a leading zero")
	case rest[0] == '\'':
		return at(BadJSON, offset, where, "has single quotes where JSON has double ones")
	case rest[0] == '}' || rest[0] == ']':
		return at(BadJSON, offset, where, "has a comma too many before a closing bracket, or a value too few")
	case rest[0] == '/' || rest[0] == '#':
		return at(BadJSON, offset, where, "has a comment, which JSON does not allow")
	}
	return at(BadJSON, offset, where, "is not JSON")
}

func firstBadUTF8(b []byte) int {
	if utf8.Valid(b) {
		return -1
	}
	for i := 0; i < len(b); {
		r, n := utf8.DecodeRune(b[i:])
		if r == utf8.RuneError && n == 1 {
			return i
		}
		i += n
	}
	return -1
}

// known are the names that a pointer may show: those of the formats. Any other
// is the user's own and shown as *.
var known = func() map[string]bool {
	m := map[string]bool{}
	for _, n := range append(fieldNames[:], "role", "content", "from", "value", "weight", "tool_calls", "tool_call_id", "name", "function", "arguments",
		"type", "id", "turn", "turn_number", "conversation_metadata", "emotional_context", "emotional_state", "training_metadata") {
		m[n] = true
	}
	return m
}()

// mask hides the names in a pointer that are not of the formats.
func mask(p jsontext.Pointer) string {
	if p == "" {
		return ""
	}
	var b strings.Builder
	for token := range p.Tokens() {
		b.WriteByte('/')
		if known[token] || isIndex(token) {
			b.WriteString(token)
		} else {
			b.WriteByte('*')
		}
	}
	return b.String()
}

func isIndex(s string) bool {
	if s == "" || len(s) > 7 {
		return false
	}
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return true
}
