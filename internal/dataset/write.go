package dataset

import (
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"io"
)

// writer writes the file that the trainer reads and takes its digest. Texts
// are copied as they stand, with their escapes.
type writer struct {
	to    io.Writer
	hash  hash.Hash
	buf   []byte
	bytes int64
	lines int64
	err   error
}

const writeBuffer = 128 << 10

func newWriter(to io.Writer) *writer {
	return &writer{to: to, hash: sha256.New(), buf: make([]byte, 0, writeBuffer)}
}

func (w *writer) flush() {
	w.direct(w.buf)
	w.buf = w.buf[:0]
}

func (w *writer) direct(p []byte) {
	if w.err != nil || len(p) == 0 {
		return
	}
	_, _ = w.hash.Write(p)
	w.bytes += int64(len(p))
	_, w.err = w.to.Write(p)
}

func (w *writer) put(p []byte) {
	if len(w.buf)+len(p) > cap(w.buf) {
		w.flush()
		if len(p) > cap(w.buf) {
			w.direct(p)
			return
		}
	}
	w.buf = append(w.buf, p...)
}

func (w *writer) str(s string) {
	if len(w.buf)+len(s) > cap(w.buf) {
		w.flush()
	}
	w.buf = append(w.buf, s...)
}

// text writes a raw text in quotes.
func (w *writer) text(parts ...[]byte) {
	w.str(`"`)
	for _, p := range parts {
		w.put(p)
	}
	w.str(`"`)
}

func (w *writer) blank() {
	w.str("\n")
	w.lines++
}

// add writes one example as a line.
func (w *writer) add(ex *example) {
	w.str(`{`)
	if !ex.byUser {
		w.str(`"conversation_id":`)
		w.text(ex.group)
		w.str(`,`)
	}
	if ex.format == Text {
		w.str(`"text":`)
		w.text(ex.messages[0].parts...)
		w.str("}\n")
		w.lines++
		return
	}
	w.str(`"messages":[`)
	for i := range ex.messages {
		m := &ex.messages[i]
		if i > 0 {
			w.str(`,`)
		}
		w.str(`{"role":"`)
		w.str(m.role)
		w.str(`","content":`)
		w.text(m.parts...)
		if m.role == assistant && !m.trained {
			w.str(`,"weight":0`)
		}
		if m.calls != nil {
			w.str(`,"tool_calls":`)
			w.put(m.calls)
		}
		if m.callID != nil {
			w.str(`,"tool_call_id":`)
			w.text(m.callID)
		}
		if m.name != nil {
			w.str(`,"name":`)
			w.text(m.name)
		}
		w.str(`}`)
	}
	w.str(`]`)
	if ex.tools != nil {
		w.str(`,"tools":`)
		w.put(ex.tools)
	}
	w.str("}\n")
	w.lines++
}

func (w *writer) finish() (*File, error) {
	w.flush()
	if w.err != nil {
		return nil, w.err
	}
	return &File{SHA256: hex.EncodeToString(w.hash.Sum(nil)), Bytes: w.bytes, Lines: w.lines}, nil
}
