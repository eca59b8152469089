package dataset

import (
	"fmt"
	"slices"
)

// Code is the durable name of what is wrong with a line or a file. Codes are
// appended, never renamed: the app, tests and users' scripts key on them.
type Code string

// What makes a file unusable. The first group is about the whole file.
const (
	FileEmpty    Code = "file_empty"
	NoExamples   Code = "no_examples"
	FileTooLarge Code = "file_too_large"
	Binary       Code = "binary_file"
	BadGzip      Code = "gzip_damaged"

	LineTooLong  Code = "line_too_long"
	BadUTF8      Code = "utf8_invalid"
	BadJSON      Code = "json_invalid"
	CutJSON      Code = "json_incomplete"
	ExtraJSON    Code = "json_extra"
	BadNumber    Code = "number_invalid"
	BadString    Code = "string_invalid"
	Surrogate    Code = "surrogate_invalid"
	DuplicateKey Code = "key_duplicate"
	TooDeep      Code = "nesting_too_deep"
	TooMany      Code = "too_many"
	NotObject    Code = "not_an_object"

	UnknownFormat  Code = "format_unknown"
	MixedFormat    Code = "format_mixed"
	FieldMissing   Code = "field_missing"
	FieldType      Code = "field_type"
	EntryType      Code = "entry_type"
	UnknownRole    Code = "role_unknown"
	ContentMissing Code = "content_missing"
	BadWeight      Code = "weight_invalid"
	BadToolCalls   Code = "tool_calls_invalid"
	EmptyAnswer    Code = "answer_empty"
	NoAnswer       Code = "answer_missing"
)

// Problem is one thing that makes a file unusable, in words for its owner. It
// never repeats what stands in the file.
type Problem struct {
	Code       Code   `json:"code"`
	Line       int64  `json:"line"`              // from 1; 0: the whole file
	Column     int    `json:"column,omitempty"`  // in characters, from 1; 0: not known
	Pointer    string `json:"pointer,omitempty"` // RFC 6901; the user's own names are shown as *
	Message    string `json:"error"`
	Suggestion string `json:"suggestion"`
}

// fault is a Problem before its line is known. It is not an error: it is the
// answer that a reader of lines gives.
type fault struct {
	code    Code
	offset  int // into the line; -1: not known
	pointer string
	message string
}

func at(code Code, offset int, pointer, format string, args ...any) *fault {
	if len(args) > 0 {
		format = fmt.Sprintf(format, args...)
	}
	return &fault{code: code, offset: offset, pointer: pointer, message: format}
}

// suggestions say what to do about a code.
var suggestions = map[Code]string{
	FileEmpty:    "Upload a file with one example per line.",
	NoExamples:   "Add at least one example after the _meta line.",
	FileTooLarge: "Split the file into smaller data sets.",
	Binary:       "Save the data as JSON Lines: text in UTF-8, one JSON object per line (.jsonl, or .jsonl.gz).",
	BadGzip:      "Compress the file again, or upload it without compression.",

	LineTooLong:  "Split the example, or remove what training does not need. Check that every example ends with a line break.",
	BadUTF8:      "Save the file as UTF-8.",
	BadJSON:      "Write the line as one JSON object; a JSON library does it right.",
	CutJSON:      "Write the whole example on one line, without line breaks inside it.",
	ExtraJSON:    "Write one JSON object per line and nothing after it.",
	BadNumber:    "Use a plain JSON number or null; NaN and Infinity do not exist in JSON.",
	BadString:    `Escape line breaks as \n, tabs as \t, quotes as \" and backslashes as \\.`,
	Surrogate:    "Replace the broken half of a character; it often comes from text that was cut in the middle of an emoji.",
	DuplicateKey: "Keep each name once per object.",
	TooDeep:      "Use flatter objects.",
	TooMany:      "Split the example.",
	NotObject:    "Write each example as an object: {...}. If the file is one JSON array, write each of its elements on a line of its own.",

	UnknownFormat:  "Use one of: target_response with current_user_input, turns, messages, conversations, instruction with output, prompt with completion, or text.",
	MixedFormat:    "Use one format in the whole file.",
	FieldMissing:   "Add the field as text in quotes.",
	FieldType:      "Give the field the type that its format asks for.",
	EntryType:      `Write each message as an object, such as {"role": "user", "content": "..."}.`,
	UnknownRole:    "Use one of the roles system, user, assistant or tool (in conversations: system, human, gpt, tool).",
	ContentMissing: `Give the message its text as "content" (in conversations: "value").`,
	BadWeight:      "Use weight 1 to train on an answer, 0 not to; or leave it out.",
	BadToolCalls:   `Give each tool call a function with a name and with arguments that are a JSON object, on a message of the assistant.`,
	EmptyAnswer:    "Write the answer that the model should learn, or remove the example.",
	NoAnswer:       "Add an answer of the assistant, or remove the example.",
}

// Codes lists every code, sorted.
func Codes() []Code {
	out := make([]Code, 0, len(suggestions))
	for c := range suggestions {
		out = append(out, c)
	}
	slices.Sort(out)
	return out
}
