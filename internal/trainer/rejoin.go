package trainer

import (
	"bufio"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"lorayard/internal/wire"
)

var errLeft = errors.New("the trainer was handed over")

// tap is the event pipe with a valve. A byte that we read after the shim has
// taken over would be missing for the one who adopts; and until it has, we may
// have to go on reading.
type tap struct {
	pipe *os.File
	mu   sync.Mutex // held while reading, and while the valve is shut
	left bool
}

func (t *tap) Read(p []byte) (int, error) {
	for {
		n, err := t.read(p)
		if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		// Somebody shuts the valve: they get the lock.
	}
}

func (t *tap) read(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.left {
		return 0, errLeft
	}
	return t.pipe.Read(p)
}

// shut returns when nobody reads; open or leave must follow.
func (t *tap) shut() {
	_ = t.pipe.SetReadDeadline(time.Unix(1, 0))
	t.mu.Lock()
}

func (t *tap) open() {
	_ = t.pipe.SetReadDeadline(time.Time{})
	t.mu.Unlock()
}

func (t *tap) leave() {
	t.left = true
	t.mu.Unlock()
}

// rejoin is the stream of all events: those of the file, then those of the
// pipe that the file did not hold yet. The trainer writes the file first, so
// between them nothing is missing. Two ends are loose: the file's last line may
// be half written, and comes by the pipe again; the pipe's first line may have
// been half read by the agent before us, and then stood in the file.
type rejoin struct {
	file, pipe *bufio.Reader // nil when there is nothing more to read from it
	seen       uint64        // whole lines of the file, which is the seq of the last one
	met        bool          // the pipe's first line was looked at
	joined     bool          // the pipe carries what is new
	rest       []byte
}

func newRejoin(file *os.File, pipe *tap) *rejoin {
	// A line of the greatest length must fit, with its end.
	j := &rejoin{}
	if file != nil {
		j.file = bufio.NewReaderSize(file, wire.MaxLine+1)
	}
	if pipe != nil {
		j.pipe = bufio.NewReaderSize(pipe, wire.MaxLine+1)
	}
	return j
}

func (j *rejoin) Read(p []byte) (int, error) {
	for len(j.rest) == 0 {
		if err := j.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, j.rest)
	j.rest = j.rest[n:]
	return n, nil
}

// next finds bytes to pass on; there may be none yet.
func (j *rejoin) next() error {
	if j.file != nil {
		line, err := j.file.ReadSlice('\n')
		switch {
		case err == nil:
			j.seen++
			j.rest = line
		case errors.Is(err, bufio.ErrBufferFull): // the decoder will refuse it
			j.rest = line
		case errors.Is(err, io.EOF):
			j.file = nil
		default:
			return err
		}
		return nil
	}
	if j.pipe == nil {
		return io.EOF
	}
	line, err := j.pipe.ReadSlice('\n')
	if len(line) == 0 && err != nil {
		return err
	}
	if !j.joined {
		e, perr := wire.Parse(line)
		cut := perr != nil && !j.met
		j.met = true
		if cut || perr == nil && e.Seq <= j.seen {
			return nil
		}
		j.joined = true // also with what cannot be understood: the decoder says why
	}
	j.rest = line
	return nil
}
