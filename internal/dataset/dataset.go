// Package dataset judges data files and turns each good one into the file that
// the trainer reads. It alone knows the seven formats that users bring. It
// reads a stream once, in memory that does not grow with the file, reports
// every bad line in words for its owner, and never repeats what stands in one.
//
// The trainer's reader (scripts/train/lora_train/data.py) gives the same
// verdict on every line; testdata/cases.json is the table that both are held
// to.
package dataset

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"
)

// The usual limits.
const (
	MostBytes     = 1 << 30 // of a file, after decompression
	MostLineBytes = 8 << 20
	MostProblems  = 1000 // kept; all are counted
)

// Options say how to validate. The zero value is usual.
type Options struct {
	MostBytes     int64 // of the file, after decompression; 0: 1 GiB
	MostLineBytes int   // 0: 8 MiB
	// Normalised gets the file that the trainer reads, while it is read; nil:
	// nobody. What it got is worth nothing unless the report says OK.
	Normalised io.Writer
	// Fraction and Seed are those of the trainer's split; nil: 0.05 and 42.
	Fraction *float64
	Seed     *int64
}

// Report is everything that is known of a file. It holds text of the file only
// in Samples.
type Report struct {
	OK     bool   `json:"ok"`
	Format Format `json:"format"` // of the first line that has one

	Bytes         int64 `json:"bytes"` // after decompression
	Lines         int64 `json:"lines"` // with blank ones
	Examples      int64 `json:"examples"`
	Conversations int64 `json:"conversations"`
	Turns         int64 `json:"turns"`          // messages but system prompts
	Tokens        int64 `json:"tokens"`         // estimated: a token for four letters of ASCII or three other bytes
	TrainedTokens int64 `json:"trained_tokens"` // of these, in answers
	// TrainingPairs and ValidationPairs are the examples on each side of the
	// trainer's split.
	TrainingPairs           int64   `json:"training_pairs"`
	ValidationPairs         int64   `json:"validation_pairs"`
	AvgTurnsPerConversation float64 `json:"avg_turns_per_conversation"`
	AvgTokensPerTurn        float64 `json:"avg_tokens_per_turn"`

	BadLines int64          `json:"bad_lines"` // faults of the whole file included
	ByCode   map[Code]int64 `json:"by_code,omitempty"`
	Problems []Problem      `json:"problems,omitempty"` // the first 1,000
	Findings []Finding      `json:"findings,omitempty"`

	Roles   map[string]int64 `json:"roles,omitempty"` // messages by role
	Lengths Lengths          `json:"lengths"`
	Samples []Sample         `json:"-"`
	// Partial says that the file has more conversations than are remembered:
	// duplicates and leaks were looked for among the first 390,000, and the
	// split is estimated.
	Partial bool `json:"partial,omitempty"`
	// Normalised is the file that the trainer reads; nil unless OK and asked for.
	Normalised *File `json:"normalised,omitempty"`

	roles [len(roles)]int64
}

// Finding is something worth a look that makes no file unusable.
type Finding struct {
	Code       Code    `json:"code"`
	Count      int64   `json:"count"`
	LineCount  int64   `json:"line_count,omitempty"`
	Lines      []int64 `json:"lines,omitempty"` // the first 20
	Message    string  `json:"message"`
	Suggestion string  `json:"suggestion"`
}

// Lengths says how long the examples are, in estimated tokens.
type Lengths struct {
	P50     int64    `json:"p50"`
	P90     int64    `json:"p90"`
	P99     int64    `json:"p99"`
	Max     int64    `json:"max"`
	Buckets []Bucket `json:"buckets,omitempty"`
}

// Bucket is one bar of the histogram.
type Bucket struct {
	UpTo     int64 `json:"up_to,omitempty"` // tokens; 0: no end
	Examples int64 `json:"examples"`
}

// Sample is one conversation as the app shows it, cut to a bearable length.
type Sample struct {
	ConversationID string `json:"conversation_id,omitempty"`
	Turns          []Turn `json:"turns"`
}

// Turn is one message of a Sample.
type Turn struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

// File is what was written for the trainer.
type File struct {
	SHA256 string `json:"sha256"` // lower-case hex
	Bytes  int64  `json:"bytes"`
	Lines  int64  `json:"lines"` // as many as the user's file has, the empty ones included
}

// Validate reads r to its end, compressed with gzip or not. The error is of
// reading or writing; what is wrong with the file is in the report.
func Validate(r io.Reader, o Options) (*Report, error) {
	v := newValidation(o)
	l, err := open(r, v.mostLine, v.most)
	if err == nil {
		err = v.file(l)
	}
	if l != nil {
		v.report.Bytes, v.report.Lines = l.bytes, l.number
	}
	switch _, broken := errors.AsType[damaged](err); {
	case broken:
		v.problem(nil, 0, at(BadGzip, -1, "", "the compressed data is damaged or cut off"))
	case errors.Is(err, errTooLarge):
		v.problem(nil, 0, at(FileTooLarge, -1, "", "the file has more than %d MiB", v.most>>20))
	case err != nil:
		return nil, fmt.Errorf("validate a data file: %w", err)
	}
	return v.finish()
}

type validation struct {
	report    Report
	tally     *tally
	parser    *parser
	reader    reader
	out       *writer
	most      int64
	mostLine  int
	fraction  float64
	seenLine  bool // one that is not blank
	seenOther bool // one that is not _meta
}

func newValidation(o Options) *validation {
	v := &validation{parser: newParser(), most: o.MostBytes, mostLine: o.MostLineBytes, fraction: 0.05}
	seed := int64(42)
	if o.Seed != nil {
		seed = *o.Seed
	}
	if o.Fraction != nil {
		v.fraction = *o.Fraction
	}
	if v.most <= 0 {
		v.most = MostBytes
	}
	if v.mostLine <= 0 {
		v.mostLine = MostLineBytes
	}
	if o.Normalised != nil {
		v.out = newWriter(o.Normalised)
	}
	v.tally = newTally(&v.report, seed)
	return v
}

// file goes through all lines.
func (v *validation) file(l *lines) error {
	if head := l.head(); bytes.IndexByte(head, 0) >= 0 {
		v.problem(nil, 0, at(Binary, -1, "", "%s", whatIsIt(head)))
		return nil
	}
	l.skipBOM()
	for {
		line, long, err := l.next()
		switch {
		case errors.Is(err, io.EOF):
			v.whole()
			return nil
		case err != nil:
			return err
		case long:
			v.seenLine, v.seenOther = true, true
			v.problem(nil, l.number, at(LineTooLong, -1, "", "is longer than %d MiB", v.mostLine>>20))
		case blank(line):
			v.skip()
		default:
			v.line(line, l.number)
			v.seenLine = true
		}
		if v.out != nil && v.out.err != nil {
			return v.out.err
		}
	}
}

// whole says what is wrong with a file that has no line to speak of.
func (v *validation) whole() {
	switch {
	case !v.seenLine:
		v.problem(nil, 0, at(FileEmpty, -1, "", "the file is empty"))
	case !v.seenOther:
		v.problem(nil, 0, at(NoExamples, -1, "", "the file has no example, only its _meta line"))
	}
}

// skip leaves a line empty in the normalised file too, so that the trainer's
// line numbers are the user's.
func (v *validation) skip() {
	if v.out != nil && v.report.BadLines == 0 {
		v.out.blank()
	}
}

func (v *validation) line(line []byte, number int64) {
	row, f := v.parser.parse(line)
	if f == nil && row.fields[fMeta].kind != 0 && !v.seenLine {
		v.skip()
		return
	}
	v.seenOther = true
	var ex *example
	if f == nil {
		ex, f = v.judge(row, number)
	}
	if f != nil {
		v.problem(line, number, f)
		return
	}
	v.tally.add(ex, number)
	if v.out != nil && v.report.BadLines == 0 {
		v.out.add(ex)
	}
}

func (v *validation) judge(row *row, number int64) (*example, *fault) {
	kind := row.format()
	if kind == unknownFormat {
		return nil, at(UnknownFormat, -1, "", "has none of the known formats")
	}
	if v.report.Format == unknownFormat {
		v.report.Format = kind
	}
	if kind != v.report.Format {
		return nil, at(MixedFormat, -1, "", "is in the format %s, the lines before it are in %s", kind, v.report.Format)
	}
	return v.reader.read(row, kind, number)
}

func (v *validation) problem(line []byte, number int64, f *fault) {
	r := &v.report
	r.BadLines++
	if r.ByCode == nil {
		r.ByCode = map[Code]int64{}
	}
	r.ByCode[f.code]++
	if len(r.Problems) >= MostProblems {
		return
	}
	p := Problem{Code: f.code, Line: number, Pointer: f.pointer, Suggestion: suggestions[f.code]}
	if f.offset >= 0 {
		p.Column = utf8.RuneCount(line[:min(f.offset, len(line))]) + 1
	}
	if p.Message = "This line " + f.message + "."; number == 0 {
		p.Message = "T" + f.message[1:] + "."
	}
	r.Problems = append(r.Problems, p)
}

func (v *validation) finish() (*Report, error) {
	r := &v.report
	r.OK = r.BadLines == 0
	v.tally.finish(v.fraction)
	if v.out != nil && r.OK {
		var err error
		if r.Normalised, err = v.out.finish(); err != nil {
			return nil, fmt.Errorf("write the normalised data file: %w", err)
		}
	}
	return r, nil
}
