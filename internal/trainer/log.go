package trainer

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"unicode"
)

const (
	tailBytes = 4 << 10
	tailLines = 30
)

// withLog adds the end of the trainer's own text to err, for operators: a
// Python that never came to speak the protocol says there why.
func withLog(err error, dir string) error {
	text := endOfLog(filepath.Join(dir, logFile))
	if text == "" {
		return err
	}
	return fmt.Errorf("%w; the end of its log:\n%s", err, text)
}

// endOfLog is the last text of a log that may go on in an older file. The
// bytes are anybody's: what Postgres or a terminal would choke on is left out.
func endOfLog(path string) string {
	raw := lastBytes(path, tailBytes)
	if len(raw) < tailBytes {
		raw = append(lastBytes(path+".1", tailBytes-int64(len(raw))), raw...)
	}
	text := strings.Map(func(c rune) rune {
		switch {
		case c == '\r': // a progress bar's
			return '\n'
		case c != '\n' && c != '\t' && unicode.IsControl(c):
			return -1
		}
		return c
	}, strings.ToValidUTF8(string(raw), "\uFFFD"))
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-tailLines):], "\n")
}

// lastBytes reads the end of a file; what cannot be read is not there.
func lastBytes(path string, n int64) []byte {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > n {
		_, _ = f.Seek(-n, io.SeekEnd)
	}
	raw, _ := io.ReadAll(io.LimitReader(f, n))
	return raw
}
