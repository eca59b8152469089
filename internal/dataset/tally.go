package dataset

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"hash/maphash"
	"math"
	"math/bits"
	"slices"
	"strconv"
	"unicode/utf8"
)

const (
	keptLines   = 20   // line numbers per finding
	keptSamples = 3    // conversations
	sampleTurns = 20   // of a conversation
	sampleText  = 2000 // characters of a turn
	sampleID    = 200
	keptBytes   = 64 << 10 // of a text that the next line may repeat
	// messageTokens is what a chat template adds to each message.
	messageTokens = 4
)

// tally counts over all examples, in bounded memory.
type tally struct {
	report *Report
	seed   maphash.Seed
	groups table  // digest of a group → examples, turns of its longest
	known  table  // hash of a conversation → group
	prefix []byte // of what is digested of a group
	digest hash.Hash
	sum    []byte
	last   []byte // the last group as it stands in the file, if it is short
	key    uint64 // and its digest
	system []byte // the last system prompt, and what was found in it
	inSys  seen
	sysLen [2]int
	fine   [bits.UintSize * 8]int64 // examples by length, eight steps an octave
	found  [findingCount]Finding
	sample map[uint64]bool
}

func newTally(r *Report, splitSeed int64) *tally {
	return &tally{
		report: r, seed: maphash.MakeSeed(), groups: newTable(), known: newTable(), sample: map[uint64]bool{},
		prefix: append(strconv.AppendInt(nil, splitSeed, 10), ':'), digest: sha256.New(),
	}
}

// group is the first eight bytes of the digest by which the trainer orders
// groups for its split.
func (t *tally) group(raw []byte) uint64 {
	if t.key != 0 && bytes.Equal(raw, t.last) {
		return t.key
	}
	h := t.digest
	h.Reset()
	_, _ = h.Write(t.prefix)
	_, _ = h.Write(plain(raw))
	t.sum = h.Sum(t.sum[:0])
	t.key = max(1, binary.BigEndian.Uint64(t.sum))
	if t.last = t.last[:0]; len(raw) > 0 && len(raw) <= keptBytes {
		t.last = append(t.last, raw...)
	}
	return t.key
}

func (t *tally) add(ex *example, line int64) {
	r := t.report
	var s seen
	var h maphash.Hash
	h.SetSeed(t.seed)
	turns, tokens, trained := int64(0), 0, 0
	for i := range ex.messages {
		m := &ex.messages[i]
		ascii, other := t.text(m, &s)
		n := (ascii+3)/4 + (other+2)/3 + len(m.calls)/4 + messageTokens
		tokens += n
		if m.trained {
			trained += n
		}
		r.roles[roleIndex(m.role)]++
		if m.role == system {
			continue
		}
		turns++
		_ = h.WriteByte(m.role[0])
		for _, p := range m.parts {
			_, _ = h.Write(p)
		}
		_, _ = h.Write(m.calls)
		if m.role == assistant && m.calls == nil && blankText(m.parts) {
			s[blankAnswer]++
		}
	}
	if n := len(ex.messages); n > 0 && ex.messages[n-1].role != assistant {
		s[lastIsUser]++
	}
	r.Examples++
	r.Turns += turns
	r.Tokens += int64(tokens)
	r.TrainedTokens += int64(trained)
	t.fine[step(tokens)]++
	r.Lengths.Max = max(r.Lengths.Max, int64(tokens))

	key := t.group(ex.group)
	if g := t.groups.at(key); g != nil {
		g.a++
		g.b = max(g.b, uint32(min(turns, math.MaxUint32)))
	}
	tag := uint32(key>>32) | 1
	if k := t.known.at(max(1, h.Sum64())); k != nil {
		switch k.a {
		case 0:
			k.a = tag
		case tag:
			s[duplicate]++
		default:
			s[duplicate]++
			s[leak]++
		}
	}
	t.note(&s, line)
	if len(r.Samples) < keptSamples && !t.sample[key] {
		t.sample[key] = true
		r.Samples = append(r.Samples, sampleOf(ex))
	}
}

// text scans a message. Files repeat one system prompt in every line: it is
// scanned once.
func (t *tally) text(m *message, s *seen) (ascii, other int) {
	if m.role == system && len(m.parts) == 1 && len(m.parts[0]) <= keptBytes {
		if !bytes.Equal(m.parts[0], t.system) {
			t.system = append(t.system[:0], m.parts[0]...)
			t.inSys = seen{}
			t.sysLen[0], t.sysLen[1] = scan(m.parts[0], &t.inSys)
		}
		for i, n := range t.inSys {
			s[i] += n
		}
		return t.sysLen[0], t.sysLen[1]
	}
	if m.calls != nil {
		scan(m.calls, s) // how long they are is counted by the caller
	}
	for _, p := range m.parts {
		a, o := scan(p, s)
		ascii, other = ascii+a, other+o
	}
	return ascii, other
}

func (t *tally) note(s *seen, line int64) {
	if *s == (seen{}) {
		return
	}
	for i, n := range s {
		if n == 0 {
			continue
		}
		f := &t.found[i]
		f.Count += int64(n)
		f.LineCount++
		if len(f.Lines) < keptLines {
			f.Lines = append(f.Lines, line)
		}
	}
}

// finish works out what only the whole file tells.
func (t *tally) finish(fraction float64) {
	r := t.report
	if r.Examples == 0 {
		return
	}
	if r.Examples < 10 {
		t.found[fewExamples] = Finding{Count: 1}
	}
	for i, f := range t.found {
		if f.Count > 0 {
			f.Code = findingCodes[i]
			f.Message, f.Suggestion = findingWords[f.Code][0], findingWords[f.Code][1]
			r.Findings = append(r.Findings, f)
		}
	}
	r.Roles = map[string]int64{}
	for i, n := range r.roles {
		if n > 0 {
			r.Roles[roles[i]] = n
		}
	}
	longest := int64(0)
	for _, s := range t.groups.slots {
		longest += int64(s.b)
	}
	r.Conversations = int64(t.groups.n)
	r.Partial = t.groups.full || t.known.full
	r.AvgTurnsPerConversation = round(float64(longest) / float64(r.Conversations))
	r.AvgTokensPerTurn = round(float64(r.Tokens) / float64(max(1, r.Turns)))
	r.ValidationPairs = t.held(fraction)
	r.TrainingPairs = r.Examples - r.ValidationPairs
	t.lengths()
}

func round(x float64) float64 { return math.Round(x*100) / 100 }

// held is how many examples the trainer's split keeps for validation: groups
// in the order of their digests until they have their share.
func (t *tally) held(fraction float64) int64 {
	if t.groups.full { // too many to know: near enough
		return int64(math.Ceil(fraction * float64(t.report.Examples)))
	}
	if fraction <= 0 || t.groups.n < 5 {
		return 0
	}
	groups := t.groups.slots // not needed in its order any more
	slices.SortFunc(groups, func(a, b slot) int {
		switch {
		case a.key < b.key:
			return -1
		case a.key > b.key:
			return 1
		}
		return 0
	})
	groups = groups[len(groups)-t.groups.n:] // the free ones have key 0
	wanted, count := fraction*float64(t.report.Examples), int64(0)
	for _, g := range groups[:len(groups)/2] {
		count += int64(g.a)
		if float64(count) >= wanted {
			break
		}
	}
	return count
}

// step numbers lengths so that neighbours differ by an eighth at most.
func step(n int) int {
	if n < 16 {
		return n
	}
	e := bits.Len(uint(n)) - 4
	return e<<3 + n>>e
}

// upTo is the largest length with the number s.
func upTo(s int) int64 {
	if s < 16 {
		return int64(s)
	}
	e := s>>3 - 1
	return int64(s&7+8+1)<<e - 1
}

func (t *tally) lengths() {
	l := &t.report.Lengths
	for _, most := range buckets {
		l.Buckets = append(l.Buckets, Bucket{UpTo: most})
	}
	l.Buckets = append(l.Buckets, Bucket{})
	var sum int64
	for s, n := range t.fine {
		if n == 0 {
			continue
		}
		i, _ := slices.BinarySearch(buckets, upTo(s))
		l.Buckets[i].Examples += n
		for _, q := range []struct {
			to   *int64
			part float64
		}{{&l.P50, 0.5}, {&l.P90, 0.9}, {&l.P99, 0.99}} {
			if *q.to == 0 && float64(sum+n) >= q.part*float64(t.report.Examples) {
				*q.to = min(upTo(s), l.Max)
			}
		}
		sum += n
	}
}

// buckets are the upper ends of the histogram's bars, in tokens; the last bar
// is what is longer.
var buckets = []int64{31, 63, 127, 255, 511, 1023, 2047, 4095, 8191, 16383, 32767}

var roles = [...]string{system, user, assistant, tool}

func roleIndex(role string) int {
	switch role {
	case system:
		return 0
	case user:
		return 1
	case assistant:
		return 2
	}
	return 3
}

func sampleOf(ex *example) Sample {
	s := Sample{}
	if !ex.byUser {
		s.ConversationID = cut([][]byte{ex.group}, sampleID)
	}
	for i, m := range ex.messages {
		if i == sampleTurns {
			break
		}
		s.Turns = append(s.Turns, Turn{Role: m.role, Content: cut(m.parts, sampleText)})
	}
	return s
}

// cut is the beginning of a text, made plain. NUL, which the database refuses,
// goes.
func cut(parts [][]byte, most int) string {
	var text []byte
	for _, p := range parts {
		if len(text) > utf8.UTFMax*most {
			break
		}
		text = append(text, plain(whole(p, longestEscape*(most+1)))...)
	}
	text = bytes.ReplaceAll(text, []byte{0}, nil)
	if utf8.RuneCount(text) <= most {
		return string(text)
	}
	i := 0
	for range most {
		_, n := utf8.DecodeRune(text[i:])
		i += n
	}
	return string(text[:i]) + "…"
}

// longestEscape is a character beyond the first plane: two escapes.
const longestEscape = 12

// whole is the beginning of a raw text, of about most bytes, that ends neither
// within a character nor within an escape.
func whole(raw []byte, most int) []byte {
	if len(raw) <= most {
		return raw
	}
	i := 0
	for i < most {
		n := 1
		switch c := raw[i]; {
		case c >= utf8.RuneSelf:
			_, n = utf8.DecodeRune(raw[i:])
		case c == '\\' && raw[i+1] == 'u' && raw[i+2]|0x20 == 'd' && raw[i+3] > '7': // half of a pair
			n = 12
		case c == '\\' && raw[i+1] == 'u':
			n = 6
		case c == '\\':
			n = 2
		}
		i += n
	}
	return raw[:i]
}

// table is a map from hashes to two numbers that holds no pointers and never
// takes more than 8 MiB. The key 0 is a free slot.
type table struct {
	slots []slot
	n     int
	full  bool
}

type slot struct {
	key  uint64
	a, b uint32
}

const (
	firstSlots = 1 << 10
	mostSlots  = 1 << 19
)

func newTable() table { return table{slots: make([]slot, firstSlots)} }

// at returns the slot of a key, new or not, or nil when the table is full.
func (t *table) at(key uint64) *slot {
	if t.n*4 >= len(t.slots)*3 && len(t.slots) < mostSlots {
		old := t.slots
		t.slots = make([]slot, 2*len(old))
		for _, s := range old {
			if s.key != 0 {
				*t.find(s.key) = s
			}
		}
	}
	s := t.find(key)
	if s.key == 0 {
		if t.n*4 >= len(t.slots)*3 {
			t.full = true
			return nil
		}
		s.key = key
		t.n++
	}
	return s
}

func (t *table) find(key uint64) *slot {
	mask := uint64(len(t.slots) - 1)
	for i := key & mask; ; i = (i + 1) & mask {
		if s := &t.slots[i]; s.key == key || s.key == 0 {
			return s
		}
	}
}
