package dataset

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
)

// lines yields the lines of a stream from one buffer that never grows beyond
// the longest allowed line.
type lines struct {
	r      io.Reader
	buf    []byte
	start  int // of what is not yielded yet
	end    int
	most   int   // bytes in a line
	total  int64 // bytes in the file
	number int64 // of the line last yielded, from 1
	bytes  int64 // read, after decompression
	eof    bool
}

const firstBuffer = 512 << 10

var (
	bom       = []byte("\xef\xbb\xbf")
	gzipMagic = []byte{0x1f, 0x8b}
)

// errTooLarge says that a file has more bytes than it may.
var errTooLarge = errors.New("the file is too large")

// damaged says that compressed data cannot be decompressed: the file's fault,
// not the reader's.
type damaged struct{ err error }

func (d damaged) Error() string { return "decompress: " + d.err.Error() }

// source remembers an error of the reader itself, so that it is not taken for
// damage.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF { //nolint:errorlint // a reader's own end
		s.err = err
	}
	return n, err
}

// unzip decompresses what is compressed and tells damage from other errors.
type unzip struct {
	gz  *gzip.Reader
	src *source
}

func (u unzip) Read(p []byte) (int, error) {
	n, err := u.gz.Read(p)
	switch {
	case err == nil || err == io.EOF: //nolint:errorlint // as gzip returns it
		return n, err
	case u.src.err != nil:
		return n, u.src.err
	}
	return n, damaged{err}
}

// open looks at the beginning of a stream: compressed or not, text or not.
func open(r io.Reader, most int, total int64) (*lines, error) {
	src := &source{r: r}
	peek := bufio.NewReaderSize(src, 64<<10)
	var plain io.Reader = peek
	if head, _ := peek.Peek(2); bytes.Equal(head, gzipMagic) {
		gz, err := gzip.NewReader(peek)
		switch {
		case err != nil && src.err != nil:
			return nil, src.err
		case err != nil:
			return nil, damaged{err}
		}
		plain = unzip{gz, src}
	}
	l := &lines{r: plain, buf: make([]byte, min(firstBuffer, most+1)), most: most, total: total}
	// Enough to judge the beginning, unless the file is shorter.
	for l.end < len(l.buf) && l.end < headBytes && !l.eof {
		if err := l.fill(); err != nil {
			return l, err
		}
	}
	return l, nil
}

// headBytes is how much of a file is looked at to tell text from anything else.
const headBytes = 4096

// head is the beginning of the text.
func (l *lines) head() []byte { return l.buf[l.start:min(l.end, headBytes)] }

// skipBOM drops the mark that some editors write.
func (l *lines) skipBOM() {
	if bytes.HasPrefix(l.buf[l.start:l.end], bom) {
		l.start += len(bom)
	}
}

func (l *lines) fill() error {
	n, err := l.r.Read(l.buf[l.end:])
	l.end += n
	l.bytes += int64(n)
	if l.bytes > l.total {
		return errTooLarge
	}
	if errors.Is(err, io.EOF) {
		l.eof = true
		return nil
	}
	return err
}

// next returns the next line without its end, valid until the next call; long
// says that it was too long and is skipped. io.EOF ends the file.
func (l *lines) next() (line []byte, long bool, err error) {
	searched := l.start
	for {
		if i := bytes.IndexByte(l.buf[searched:l.end], '\n'); i >= 0 {
			line, l.start = l.buf[l.start:searched+i], searched+i+1
			break
		}
		if l.eof {
			if l.start == l.end && !long {
				return nil, false, io.EOF
			}
			line, l.start = l.buf[l.start:l.end], l.end
			break
		}
		searched = l.end
		switch {
		case long || l.end-l.start > l.most:
			long, l.start, l.end, searched = true, 0, 0, 0
		case l.end == len(l.buf) && l.start > 0:
			searched -= l.start
			l.end = copy(l.buf, l.buf[l.start:l.end])
			l.start = 0
		case l.end == len(l.buf):
			bigger := make([]byte, min(2*len(l.buf), l.most+1))
			copy(bigger, l.buf[:l.end])
			l.buf = bigger
		}
		if err := l.fill(); err != nil {
			return nil, long, err
		}
	}
	l.number++
	if long || len(line) > l.most {
		return nil, true, nil
	}
	return line, false, nil
}

// blank says whether a line has nothing but white space, as JSON counts it.
func blank(line []byte) bool {
	for _, c := range line {
		if c != ' ' && c != '\t' && c != '\r' {
			return false
		}
	}
	return true
}

// whatIsIt names a file that is not text.
func whatIsIt(head []byte) string {
	for magic, name := range map[string]string{
		"PK\x03\x04": "an archive or a spreadsheet (zip)", "PAR1": "a Parquet file", "%PDF": "a PDF", "\xff\xfe": "text in UTF-16",
		"\xfe\xff": "text in UTF-16", "SQLite format 3": "a database", "ARROW1": "an Arrow file", "\x28\xb5\x2f\xfd": "compressed with zstd",
		"\xfd7zXZ": "compressed with xz", "BZh": "compressed with bzip2",
	} {
		if bytes.HasPrefix(head, []byte(magic)) {
			return fmt.Sprintf("the file is %s, not JSON Lines", name)
		}
	}
	return "the file is binary, not JSON Lines"
}
