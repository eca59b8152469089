//go:build linux

package proc

import (
	"os"
	"time"
)

const (
	logHalf  = 4 << 20     // bytes in each of the two files
	logLimit = time.Second // for what is left in the pipe once all writers are gone
)

// childLog takes what a child says into a bounded file. A flood costs the
// oldest text, a full disk the newest; neither holds up the child. The shim
// writes it, so that it goes on while the agent restarts.
type childLog struct {
	path string
	file *os.File // nil while it cannot be opened
	size int64
}

// openLog continues the file that is there.
func openLog(path string) *childLog {
	l := &childLog{path: path}
	l.open()
	return l
}

func (l *childLog) open() {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return
	}
	l.file, l.size = f, 0
	if info, err := f.Stat(); err == nil {
		l.size = info.Size()
	}
}

// readFrom writes down what comes out of pipe until its end.
func (l *childLog) readFrom(pipe *os.File) {
	buf := make([]byte, 64<<10)
	for {
		n, err := pipe.Read(buf)
		l.add(buf[:n])
		if err != nil {
			if l.file != nil {
				_ = l.file.Close()
			}
			return
		}
	}
}

// add never fails: there is nobody to tell.
func (l *childLog) add(p []byte) {
	if l.file != nil && l.size+int64(len(p)) > logHalf {
		_ = l.file.Close()
		l.file = nil
		if os.Rename(l.path, l.path+".1") != nil {
			_ = os.Remove(l.path)
		}
	}
	if l.file == nil {
		l.open()
	}
	if l.file != nil {
		n, _ := l.file.Write(p)
		l.size += int64(n)
	}
}
