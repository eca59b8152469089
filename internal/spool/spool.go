// Package spool is a bounded, ordered, on-disk log of one attempt. It is the
// only thing between a trainer that will not wait and a database that may be
// away; it promises order and at-least-once over a restart of the process, not
// durability across the loss of the disk or of power.
package spool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// ErrFull says that the spool holds as many bytes as it may.
var ErrFull = errors.New("spool is full")

// ErrClosed says that the spool was closed.
var ErrClosed = errors.New("spool is closed")

// Record is one entry; Seq starts at 1 and has no gaps.
type Record struct {
	Seq  uint64
	Data []byte
}

// A record on disk is a header of 16 bytes (length, CRC-32C of seq and data,
// seq; big endian) and the data. Segments are named by their first seq; a
// segment whose records are all acknowledged is removed whole.
const (
	headerBytes  = 16
	segmentBytes = 1 << 20
	maxRecord    = 1 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// segment is one file of records.
type segment struct {
	first   uint64
	offsets []int64 // of each record
	size    int64
}

func (s *segment) last() uint64 { return s.first + uint64(len(s.offsets)) - 1 }

// Spool is the log. It is safe for concurrent use.
type Spool struct {
	dir   string
	limit int64

	mu       sync.Mutex
	segments []*segment
	tail     *os.File // the last segment, open for appending
	last     uint64
	acked    uint64
	bytes    int64
	closed   bool
}

// Open opens or resumes the log in dir, which may hold limit bytes. What a
// crash left half-written at the end is cut off.
func Open(dir string, limit int64) (*Spool, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the spool's directory: %w", err)
	}
	s := &Spool{dir: dir, limit: limit}
	if err := s.load(); err != nil {
		return nil, fmt.Errorf("open spool %s: %w", dir, err)
	}
	return s, nil
}

func (s *Spool) path(first uint64) string {
	return filepath.Join(s.dir, fmt.Sprintf("%020d.seg", first))
}

func (s *Spool) load() error {
	if raw, err := os.ReadFile(filepath.Join(s.dir, "acked")); err == nil {
		// A damaged note means that records go out again, which is allowed.
		s.acked, _ = strconv.ParseUint(strings.TrimSpace(string(raw)), 10, 64)
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	var firsts []uint64
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".seg")
		if first, err := strconv.ParseUint(name, 10, 64); ok && err == nil && first > 0 {
			firsts = append(firsts, first)
		}
	}
	slices.Sort(firsts)
	for i, first := range firsts {
		if i > 0 && first != s.last+1 {
			// The segment before it is damaged: order matters more than what
			// cannot be joined to it.
			return s.dropFrom(firsts[i:])
		}
		seg, err := s.scan(first)
		if err != nil {
			return err
		}
		if len(seg.offsets) == 0 {
			return s.dropFrom(firsts[i:])
		}
		s.segments = append(s.segments, seg)
		s.last = seg.last()
		s.bytes += seg.size
	}
	s.last = max(s.last, s.acked)
	return nil
}

func (s *Spool) dropFrom(firsts []uint64) error {
	for _, f := range firsts {
		if err := os.Remove(s.path(f)); err != nil {
			return err
		}
	}
	s.last = max(s.last, s.acked)
	return nil
}

// scan reads a segment and cuts it at the first record that is not whole.
func (s *Spool) scan(first uint64) (*segment, error) {
	raw, err := os.ReadFile(s.path(first))
	if err != nil {
		return nil, err
	}
	seg := &segment{first: first}
	for seq := first; ; seq++ {
		_, n, ok := decode(raw[seg.size:], seq)
		if !ok {
			break
		}
		seg.offsets = append(seg.offsets, seg.size)
		seg.size += n
	}
	if seg.size < int64(len(raw)) {
		if err := os.Truncate(s.path(first), seg.size); err != nil {
			return nil, err
		}
	}
	return seg, nil
}

func encode(seq uint64, data []byte) []byte {
	b := make([]byte, headerBytes, headerBytes+len(data))
	binary.BigEndian.PutUint32(b, uint32(len(data)))
	binary.BigEndian.PutUint64(b[8:], seq)
	b = append(b, data...)
	binary.BigEndian.PutUint32(b[4:], crc32.Checksum(b[8:], castagnoli))
	return b
}

// decode reads the record with number seq at the start of b; ok is false when
// there is none that is whole.
func decode(b []byte, seq uint64) (data []byte, n int64, ok bool) {
	if len(b) < headerBytes {
		return nil, 0, false
	}
	size := int64(binary.BigEndian.Uint32(b))
	if size > maxRecord || int64(len(b)) < headerBytes+size || binary.BigEndian.Uint64(b[8:]) != seq {
		return nil, 0, false
	}
	if crc32.Checksum(b[8:headerBytes+size], castagnoli) != binary.BigEndian.Uint32(b[4:]) {
		return nil, 0, false
	}
	return b[headerBytes : headerBytes+size], headerBytes + size, true
}

// Append adds a record and returns its number. ErrFull leaves the log as it
// was.
func (s *Spool) Append(data []byte) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		return 0, ErrClosed
	case len(data) > maxRecord:
		return 0, fmt.Errorf("a record of %d bytes is longer than %d", len(data), maxRecord)
	case s.bytes+headerBytes+int64(len(data)) > s.limit:
		return 0, ErrFull
	}
	seq := s.last + 1
	if err := s.openTail(seq); err != nil {
		return 0, fmt.Errorf("append to the spool: %w", err)
	}
	seg := s.segments[len(s.segments)-1]
	b := encode(seq, data)
	if _, err := s.tail.WriteAt(b, seg.size); err != nil {
		// A short write is overwritten by the next one or cut at the next open.
		return 0, fmt.Errorf("append to the spool: %w", err)
	}
	seg.offsets = append(seg.offsets, seg.size)
	seg.size += int64(len(b))
	s.bytes += int64(len(b))
	s.last = seq
	return seq, nil
}

// openTail makes the last segment ready for record seq.
func (s *Spool) openTail(seq uint64) error {
	if n := len(s.segments); n > 0 && s.segments[n-1].size < segmentBytes && s.segments[n-1].last()+1 == seq {
		if s.tail != nil {
			return nil
		}
		f, err := os.OpenFile(s.path(s.segments[n-1].first), os.O_WRONLY, 0o600)
		s.tail = f
		return err
	}
	if s.tail != nil {
		if err := s.tail.Close(); err != nil {
			return err
		}
		s.tail = nil
	}
	f, err := os.OpenFile(s.path(seq), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	s.tail = f
	s.segments = append(s.segments, &segment{first: seq})
	return nil
}

// Read returns up to most records after number after, in order.
func (s *Spool) Read(after uint64, most int) ([]Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	var out []Record
	for _, seg := range s.segments {
		if len(seg.offsets) == 0 || seg.last() <= after {
			continue
		}
		f, err := os.Open(s.path(seg.first))
		if err != nil {
			return out, fmt.Errorf("read the spool: %w", err)
		}
		from := max(after+1, seg.first)
		start := seg.offsets[from-seg.first]
		raw := make([]byte, seg.size-start)
		_, err = io.ReadFull(io.NewSectionReader(f, start, seg.size-start), raw)
		f.Close()
		if err != nil {
			return out, fmt.Errorf("read the spool: %w", err)
		}
		for seq := from; seq <= seg.last(); seq++ {
			if len(out) == most {
				return out, nil
			}
			data, n, ok := decode(raw, seq)
			if !ok {
				return out, fmt.Errorf("read the spool: record %d is damaged on disk", seq)
			}
			out = append(out, Record{Seq: seq, Data: slices.Clone(data)})
			raw = raw[n:]
		}
	}
	return out, nil
}

// Ack forgets every record up to seq.
func (s *Spool) Ack(seq uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	if seq <= s.acked {
		return nil
	}
	note := filepath.Join(s.dir, "acked")
	if err := os.WriteFile(note+".new", strconv.AppendUint(nil, min(seq, s.last), 10), 0o600); err != nil {
		return fmt.Errorf("acknowledge in the spool: %w", err)
	}
	if err := os.Rename(note+".new", note); err != nil {
		return fmt.Errorf("acknowledge in the spool: %w", err)
	}
	s.acked = min(seq, s.last)
	for len(s.segments) > 0 && len(s.segments[0].offsets) > 0 && s.segments[0].last() <= s.acked {
		if len(s.segments) == 1 {
			if s.segments[0].size < segmentBytes {
				break // it is still being filled
			}
			if s.tail != nil {
				s.tail.Close()
				s.tail = nil
			}
		}
		if err := os.Remove(s.path(s.segments[0].first)); err != nil {
			return fmt.Errorf("remove an acknowledged segment: %w", err)
		}
		s.bytes -= s.segments[0].size
		s.segments = s.segments[1:]
	}
	return nil
}

// Acked is the number of the last acknowledged record.
func (s *Spool) Acked() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.acked
}

// Last is the number of the newest record, 0 before the first.
func (s *Spool) Last() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.last
}

// Pending tells how many records are not acknowledged and how many bytes the
// log takes on disk.
func (s *Spool) Pending() (records int, bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return int(s.last - s.acked), s.bytes
}

// Close closes the files; the records stay.
func (s *Spool) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	if s.tail == nil {
		return nil
	}
	return s.tail.Close()
}
