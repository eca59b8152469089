package dataset

import (
	"bytes"
	"strconv"
	"unicode"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// Format is the form of a file's lines.
type Format string

// The formats, in the order in which a line with the names of several is taken.
const (
	BrightRun     Format = "brightrun"  // the house format v4: current_user_input and target_response
	Turns         Format = "turns"      // {conversation_id, turns}
	Chat          Format = "chat"       // OpenAI's {messages, tools?}
	ShareGPT      Format = "sharegpt"   // {conversations: [{from, value}]}
	Alpaca        Format = "alpaca"     // {instruction, input?, output}
	Completion    Format = "completion" // {prompt, completion}
	Text          Format = "text"       // {text}
	unknownFormat Format = ""           // none of them
)

func (r *row) format() Format {
	has := func(f field) bool { return r.fields[f].kind != 0 }
	switch {
	case has(fTarget) || has(fInput):
		return BrightRun
	case has(fTurns):
		return Turns
	case has(fMessages):
		return Chat
	case has(fConversations):
		return ShareGPT
	case has(fInstruction):
		return Alpaca
	case has(fPrompt) || has(fCompletion):
		return Completion
	case has(fText):
		return Text
	}
	return unknownFormat
}

// The roles that a trainer knows.
const (
	system    = "system"
	user      = "user"
	assistant = "assistant"
	tool      = "tool"
)

// message is one message. Texts are as they stand in the file, with escapes.
type message struct {
	role    string
	parts   [][]byte // of its text
	trained bool     // the loss is taken on it
	calls   []byte   // tool calls as JSON; nil: none
	callID  []byte   // of a tool's answer, a raw text; nil: none
	name    []byte   // likewise
}

// example is one line as the trainer sees it.
type example struct {
	format   Format
	messages []message // of Text: one, trained
	tools    []byte    // as JSON; nil: none
	// group keeps examples of one conversation together; byUser says that the
	// trainer finds it by itself, because it is the user's first text.
	group  []byte
	byUser bool
}

// reader turns rows into examples, in slices of its own that it uses again.
type reader struct {
	row    *row
	ex     example
	parts  [][]byte
	number []byte
}

// read judges a row of a known format. The example is valid until the next call.
func (rd *reader) read(r *row, kind Format, line int64) (*example, *fault) {
	rd.row, rd.parts = r, rd.parts[:0]
	rd.ex = example{format: kind, messages: rd.ex.messages[:0]}
	var f *fault
	switch kind {
	case BrightRun:
		f = rd.brightrun()
	case Turns:
		f = rd.list(fTurns)
	case Chat:
		f = rd.chat()
	case ShareGPT:
		if f = rd.system(); f == nil {
			f = rd.list(fConversations)
		}
	case Alpaca:
		f = rd.alpaca()
	case Completion:
		f = rd.completion()
	case Text:
		f = rd.text()
	}
	if f != nil {
		return nil, f
	}
	rd.groupOf(kind, line)
	return &rd.ex, nil
}

func (rd *reader) say(role string, trained bool, parts ...[]byte) {
	from := len(rd.parts)
	rd.parts = append(rd.parts, parts...)
	rd.ex.messages = append(rd.ex.messages, message{role: role, trained: trained, parts: rd.parts[from:len(rd.parts):len(rd.parts)]})
}

// string reads a field that must be a text.
func (rd *reader) string(f field) ([]byte, *fault) {
	switch v := rd.row.fields[f]; {
	case v.kind == '"':
		return rd.row.raw(v), nil
	case v.kind == 0:
		return nil, at(FieldMissing, -1, "/"+fieldNames[f], "lacks the field %s", fieldNames[f])
	default:
		return nil, at(FieldType, v.start, "/"+fieldNames[f], "has a %s that is not a text", fieldNames[f])
	}
}

func (rd *reader) answer(f field) ([]byte, *fault) {
	raw, fault := rd.string(f)
	if fault == nil && empty(raw) {
		return nil, at(EmptyAnswer, rd.row.fields[f].start, "/"+fieldNames[f], "has an empty %s", fieldNames[f])
	}
	return raw, fault
}

// system reads the system prompt beside a list or an instruction, if there is one.
func (rd *reader) system() *fault {
	v := rd.row.fields[fSystem]
	switch {
	case !v.there():
		return nil
	case v.kind != '"':
		return at(FieldType, v.start, "/system", "has a system that is not a text")
	}
	if raw := rd.row.raw(v); !empty(raw) {
		rd.say(system, false, raw)
	}
	return nil
}

func (rd *reader) brightrun() *fault {
	if v := rd.row.fields[fSystemPrompt]; v.kind == '"' {
		if raw := rd.row.raw(v); !empty(raw) {
			rd.say(system, false, raw)
		}
	}
	first := len(rd.ex.messages)
	if rd.row.fields[fHistory].there() {
		if f := rd.entries(fHistory); f != nil {
			return f
		}
	}
	for i := first; i < len(rd.ex.messages); i++ {
		rd.ex.messages[i].trained = false
	}
	question, f := rd.string(fInput)
	if f != nil {
		return f
	}
	answer, f := rd.answer(fTarget)
	if f != nil {
		return f
	}
	// Real files repeat the question as the last entry of the history. Asking it
	// twice would teach the model to expect an echo.
	if n := len(rd.ex.messages); n > first {
		if last := rd.ex.messages[n-1]; last.role == user && same(last.parts, question) {
			rd.ex.messages = rd.ex.messages[:n-1]
		}
	}
	rd.say(user, false, question)
	rd.say(assistant, true, answer)
	return nil
}

func (rd *reader) chat() *fault {
	if v := rd.row.fields[fTools]; v.there() {
		span := rd.row.lists[fTools]
		if v.kind != '[' {
			return at(FieldType, v.start, "/tools", "has tools that are not a list")
		}
		for i, e := range rd.row.entries[span[0]:span[1]] {
			if e.self.kind != '{' {
				return at(EntryType, e.self.start, "/tools/"+strconv.Itoa(i), "has a tool that is not an object")
			}
		}
		if span[1] > span[0] {
			rd.ex.tools = rd.row.line[v.start:v.end]
		}
	}
	return rd.list(fMessages)
}

func (rd *reader) alpaca() *fault {
	if f := rd.system(); f != nil {
		return f
	}
	instruction, f := rd.string(fInstruction)
	if f != nil {
		return f
	}
	var extra []byte
	if rd.row.fields[fExtra].there() {
		if extra, f = rd.string(fExtra); f != nil {
			return f
		}
	}
	output, f := rd.answer(fOutput)
	if f != nil {
		return f
	}
	if empty(extra) {
		rd.say(user, false, instruction)
	} else {
		rd.say(user, false, instruction, []byte(`\n\n`), extra)
	}
	rd.say(assistant, true, output)
	return nil
}

func (rd *reader) completion() *fault {
	prompt, f := rd.string(fPrompt)
	if f != nil {
		return f
	}
	completion, f := rd.answer(fCompletion)
	if f != nil {
		return f
	}
	rd.say(user, false, prompt)
	rd.say(assistant, true, completion)
	return nil
}

func (rd *reader) text() *fault {
	raw, f := rd.answer(fText)
	if f != nil {
		return f
	}
	rd.say(assistant, true, raw)
	return nil
}

// list reads a conversation that must have something to train on.
func (rd *reader) list(f field) *fault {
	if f := rd.entries(f); f != nil {
		return f
	}
	for _, m := range rd.ex.messages {
		if m.trained && (m.calls != nil || !blankText(m.parts)) {
			return nil
		}
	}
	return at(NoAnswer, rd.row.fields[f].start, "/"+fieldNames[f], "has no text of the assistant to train on")
}

func (rd *reader) entries(f field) *fault {
	v := rd.row.fields[f]
	if v.kind != '[' {
		return at(FieldType, v.start, "/"+fieldNames[f], "has %s that are not a list", fieldNames[f])
	}
	span := rd.row.lists[f]
	for i := range rd.row.entries[span[0]:span[1]] {
		e := &rd.row.entries[span[0]+i]
		var bad *fault
		if f == fConversations {
			bad = rd.shared(e)
		} else {
			bad = rd.entry(e)
		}
		if bad != nil {
			bad.pointer = "/" + fieldNames[f] + "/" + strconv.Itoa(i) + bad.pointer
			bad.message += " (message " + strconv.Itoa(i+1) + ")"
			return bad
		}
	}
	return nil
}

// texts reads the text of a message; ok is false when it has none.
func (rd *reader) texts(v value) (parts [][]byte, ok bool) {
	switch v.kind {
	case '"':
		return append(rd.parts[len(rd.parts):], rd.row.raw(v)), true
	case '[':
		d := jsontext.NewDecoder(bytes.NewBuffer(rd.row.line[v.start:v.end]))
		_, err := d.ReadToken()
		for ; err == nil && d.PeekKind() != ']'; err = nil {
			var part struct {
				Text jsontext.Value `json:"text"`
			}
			if json.UnmarshalDecode(d, &part) != nil || part.Text.Kind() != '"' || len(parts) == mostMembers {
				return nil, false
			}
			parts = append(parts, part.Text[1:len(part.Text)-1])
		}
		return parts, err == nil
	}
	return nil, false
}

func (rd *reader) entry(e *entry) *fault {
	if e.self.kind != '{' {
		return at(EntryType, e.self.start, "", "has a message that is not an object")
	}
	m := message{}
	if e.role.kind == '"' {
		switch string(plain(rd.row.raw(e.role))) {
		case "user":
			m.role = user
		case "assistant":
			m.role = assistant
		case "system", "developer":
			m.role = system
		case "tool":
			m.role = tool
		}
	}
	if m.role == "" {
		return at(UnknownRole, at0(e.role, e.self), "/role", "has a message without a known role")
	}
	if e.calls.there() {
		calls, ok := rd.calls(e.calls, m.role)
		if !ok {
			return at(BadToolCalls, e.calls.start, "/tool_calls", "has tool calls that cannot be used")
		}
		m.calls = calls
	}
	var ok bool
	if m.parts, ok = rd.texts(e.content); !ok && (m.calls == nil || e.content.there()) {
		return at(ContentMissing, at0(e.content, e.self), "/content", "has a message without a text")
	}
	weight := 1.0
	if e.weight.kind != 0 {
		if weight, ok = rd.weight(e.weight); !ok {
			return at(BadWeight, e.weight.start, "/weight", "has a weight that is neither 0 nor 1")
		}
	}
	m.trained = m.role == assistant && weight == 1
	if m.role == tool {
		m.callID, m.name = rd.optional(e.callID), rd.optional(e.name)
	}
	rd.keep(m)
	return nil
}

func (rd *reader) keep(m message) {
	rd.parts = append(rd.parts, m.parts...)
	m.parts = rd.parts[len(rd.parts)-len(m.parts) : len(rd.parts) : len(rd.parts)]
	rd.ex.messages = append(rd.ex.messages, m)
}

// at0 is where a value stands, or where it is missing from.
func at0(v, in value) int {
	if v.kind == 0 {
		return in.start
	}
	return v.start
}

func (rd *reader) optional(v value) []byte {
	if v.kind != '"' {
		return nil
	}
	return rd.row.raw(v)
}

func (rd *reader) weight(v value) (float64, bool) {
	if v.kind != '0' {
		return 0, false
	}
	w, err := strconv.ParseFloat(string(rd.row.line[v.start:v.end]), 64)
	return w, err == nil && (w == 0 || w == 1)
}

// calls checks tool calls; an empty list is none.
func (rd *reader) calls(v value, role string) ([]byte, bool) {
	if v.kind != '[' {
		return nil, false
	}
	raw, n := rd.row.line[v.start:v.end], 0
	d := jsontext.NewDecoder(bytes.NewBuffer(raw))
	if _, err := d.ReadToken(); err != nil {
		return nil, false
	}
	for ; d.PeekKind() != ']'; n++ {
		var call struct {
			Function struct {
				Name      *string        `json:"name"`
				Arguments jsontext.Value `json:"arguments"`
			} `json:"function"`
		}
		if json.UnmarshalDecode(d, &call) != nil || call.Function.Name == nil || !isObject(call.Function.Arguments) {
			return nil, false
		}
	}
	if n == 0 {
		return nil, true
	}
	return raw, role == assistant
}

// isObject says whether tool arguments are an object, or a text that holds one.
func isObject(arguments jsontext.Value) bool {
	switch arguments.Kind() {
	case '{':
		return true
	case '"':
		inner, err := jsontext.AppendUnquote(nil, arguments)
		if err != nil {
			return false
		}
		_, f := newParser().parse(inner)
		return f == nil
	}
	return false
}

func (rd *reader) shared(e *entry) *fault {
	if e.self.kind != '{' {
		return at(EntryType, e.self.start, "", "has a message that is not an object")
	}
	role := ""
	if e.from.kind == '"' {
		switch string(plain(rd.row.raw(e.from))) {
		case "human", "user":
			role = user
		case "gpt", "assistant", "chatgpt", "model", "bot":
			role = assistant
		case "system":
			role = system
		case "tool", "observation":
			role = tool
		}
	}
	if role == "" {
		return at(UnknownRole, at0(e.from, e.self), "/from", "has a message without a known role")
	}
	if e.value.kind != '"' {
		return at(ContentMissing, at0(e.value, e.self), "/value", "has a message without a text")
	}
	rd.say(role, role == assistant, rd.row.raw(e.value))
	return nil
}

// groupOf finds what keeps examples together in the split: the conversation,
// else the user's first text, else nothing.
func (rd *reader) groupOf(kind Format, line int64) {
	switch v := rd.row.fields[fConversation]; v.kind {
	case '"':
		if raw := rd.row.raw(v); len(raw) > 0 {
			rd.ex.group = raw
			return
		}
	case '0':
		if n, err := strconv.ParseInt(string(rd.row.line[v.start:v.end]), 10, 64); err == nil && n != 0 && -maxID < n && n < maxID {
			rd.number = strconv.AppendInt(rd.number[:0], n, 10)
			rd.ex.group = rd.number
			return
		}
	}
	if kind != BrightRun && kind != Turns {
		for _, m := range rd.ex.messages {
			if m.role == user {
				rd.ex.group, rd.ex.byUser = joined(m.parts), true
				return
			}
		}
	}
	rd.number = strconv.AppendInt(append(rd.number[:0], "line "...), line, 10)
	rd.ex.group = rd.number
}

// maxID bounds numbers that may name a conversation: beyond it, languages
// disagree on what they are.
const maxID = 1e15

func joined(parts [][]byte) []byte {
	if len(parts) == 1 {
		return parts[0]
	}
	return bytes.Join(parts, nil)
}

// plain is a raw text without its escapes.
func plain(raw []byte) []byte {
	if bytes.IndexByte(raw, '\\') < 0 {
		return raw
	}
	quoted := append(append(append(make([]byte, 0, len(raw)+2), '"'), raw...), '"')
	out, err := jsontext.AppendUnquote(make([]byte, 0, len(raw)), quoted)
	if err != nil { // cannot be: the decoder took it
		return raw
	}
	return out
}

func same(parts [][]byte, text []byte) bool {
	a := joined(parts)
	return bytes.Equal(a, text) || (bytes.IndexByte(a, '\\') >= 0 || bytes.IndexByte(text, '\\') >= 0) && bytes.Equal(plain(a), plain(text))
}

// empty says whether a raw text is nothing but white space.
func empty(raw []byte) bool {
	for _, c := range raw { // most texts begin with a letter
		if c == ' ' {
			continue
		}
		if c < 0x80 && c != '\\' && c > 0x20 {
			return false
		}
		break
	}
	for len(raw) > 0 {
		piece := whole(raw, 4096)
		raw = raw[len(piece):]
		for text := plain(piece); len(text) > 0; {
			r, n := utf8.DecodeRune(text)
			// Python also counts the separators of ASCII as white space.
			if !unicode.IsSpace(r) && (r < 0x1c || r > 0x1f) {
				return false
			}
			text = text[n:]
		}
	}
	return true
}

func blankText(parts [][]byte) bool {
	for _, p := range parts {
		if !empty(p) {
			return false
		}
	}
	return true
}
