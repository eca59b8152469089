package gpu

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// KernelLog is where the driver writes what it does not tell its library: the
// library's events miss the worst of all, a device that fell off the bus.
const KernelLog = "/dev/kmsg"

// KernelLine is what one line of the kernel log says of a device.
type KernelLine struct {
	Bus  string // of the device, see NormalBus; empty: the line names none
	XID  int    // 0: the line only maps Bus to UUID
	UUID string // empty: the line does not tell
	Link bool   // of an NVLink error, whether the line tells how bad it was
	// LinkFatal is that it was; without Link it is not known.
	LinkFatal bool
	Text      string // what follows the number, for people
}

// NormalBus brings a PCI address to one form: 0000:3b:00, lower case, without
// the function. The driver writes 00000000:3B:00.0, the kernel 0000:3b:00.0 or
// PCI:0000:3b:00. What is no address gives "".
func NormalBus(s string) string {
	s = strings.ToLower(strings.TrimPrefix(s, "PCI:"))
	s, _, _ = strings.Cut(s, ".")
	domain, rest, ok := strings.Cut(s, ":")
	if !ok || len(domain) == 0 || len(domain) > 8 || len(rest) != 5 || rest[2] != ':' || !hex(domain) || !hex(rest[:2]) || !hex(rest[3:]) {
		return ""
	}
	domain = strings.TrimLeft(domain, "0")
	if n := 4 - len(domain); n > 0 {
		domain = "0000"[:n] + domain
	}
	return domain + ":" + rest
}

func hex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return s != ""
}

// ParseKernelLine reads one line, with or without the prefix of /dev/kmsg
// ("6,1234,5678,-;"). It reports false for every line that is not the driver's
// word about a device. It is written by hand: a busy host's log is read line by
// line, and nearly all of it is about something else.
func ParseKernelLine(line string) (KernelLine, bool) {
	const driver = "NVRM: "
	at := strings.Index(line, driver)
	if at < 0 {
		return KernelLine{}, false
	}
	said := strings.TrimRight(line[at+len(driver):], " \n")
	switch {
	case strings.HasPrefix(said, "Xid ("):
		return parseXID(said[len("Xid ("):])
	case strings.HasPrefix(said, "GPU at "):
		// NVRM: GPU at PCI:0000:3b:00: GPU-0a1b...
		where, uuid, ok := strings.Cut(said[len("GPU at "):], ": ")
		bus := NormalBus(where)
		if !ok || bus == "" || !strings.HasPrefix(uuid, "GPU-") {
			return KernelLine{}, false
		}
		uuid, _, _ = strings.Cut(uuid, " ")
		return KernelLine{Bus: bus, UUID: uuid}, true
	case strings.Contains(said, "fallen off the bus"):
		// NVRM: GPU 0000:3b:00.0: GPU has fallen off the bus.
		// NVRM: The NVIDIA GPU 0000:3b:00.0 ... has fallen off the bus ...
		_, rest, _ := strings.Cut(said, "GPU ")
		where, _, _ := strings.Cut(rest, " ")
		if bus := NormalBus(strings.TrimSuffix(where, ":")); bus != "" {
			return KernelLine{Bus: bus, XID: xidFellOff, Text: said}, true
		}
	}
	return KernelLine{}, false
}

// parseXID reads what follows "Xid (":
//
//	PCI:0000:3b:00): 79, pid=1234, name=python, GPU has fallen off the bus.
//	PCI:0000:3b:00 GPU-I:03): 94, pid=77, Contained: SM (0x1). RST: No, D-RST: No
//	PCI:0000:01:00): 145, NVLINK: RLW_CTRL Nonfatal XC0 i0 link 07 (0x...)
func parseXID(s string) (KernelLine, bool) {
	where, rest, ok := strings.Cut(s, "): ")
	if !ok {
		return KernelLine{}, false
	}
	where, _, _ = strings.Cut(where, " ") // of a MIG device the whole one is told
	digits := 0
	for digits < len(rest) && rest[digits] >= '0' && rest[digits] <= '9' {
		digits++
	}
	xid, err := strconv.Atoi(rest[:digits])
	bus := NormalBus(where)
	if err != nil || xid <= 0 || bus == "" {
		return KernelLine{}, false
	}
	out := KernelLine{Bus: bus, XID: xid, Text: strings.TrimLeft(rest[digits:], ", ")}
	if LookUp(xid).Class == XIDLink {
		switch {
		case strings.Contains(out.Text, "Nonfatal"), strings.Contains(out.Text, "Non-fatal"):
			out.Link = true
		case strings.Contains(out.Text, "Fatal"):
			out.Link, out.LinkFatal = true, true
		}
	}
	return out, true
}

// FollowKernelLog reads a kernel log from its end, or a pipe or file of the
// same lines from its beginning, until ctx ends, and gives the driver's words
// to heard. It returns an error at once when the log cannot be read, as in most
// containers: then the other sources have to do.
func FollowKernelLog(ctx context.Context, path string, heard func(KernelLine)) error {
	flags := os.O_RDONLY | syscall.O_NONBLOCK
	info, err := os.Stat(path)
	if err == nil && info.Mode()&os.ModeNamedPipe != 0 {
		flags = os.O_RDWR | syscall.O_NONBLOCK // with ourselves as a writer it has no end
	}
	if err != nil {
		return fmt.Errorf("open the kernel log: %w", err)
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return fmt.Errorf("open the kernel log: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	defer f.Close()
	if info.Mode()&os.ModeCharDevice != 0 {
		// What was said before we looked was dealt with, or is of a time before
		// the last reset.
		if _, err := f.Seek(0, io.SeekEnd); err != nil {
			return fmt.Errorf("go to the end of the kernel log: %w", err)
		}
		return followRecords(ctx, f, heard)
	}
	return followLines(ctx, f, heard)
}

// followRecords reads /dev/kmsg, which gives one record a read.
func followRecords(ctx context.Context, f *os.File, heard func(KernelLine)) error {
	record := make([]byte, 8<<10) // the kernel's limit
	for {
		n, err := f.Read(record)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, syscall.EPIPE): // records were overwritten before we came to them
		case err != nil:
			return fmt.Errorf("read the kernel log: %w", err)
		default:
			said, _, _ := bytes.Cut(record[:n], []byte("\n")) // after it come key=value pairs
			if l, ok := ParseKernelLine(string(said)); ok {
				heard(l)
			}
		}
	}
}

// followLines reads a pipe, or a file that grows.
func followLines(ctx context.Context, f *os.File, heard func(KernelLine)) error {
	r := bufio.NewReaderSize(f, 8<<10)
	var part []byte
	for {
		line, err := r.ReadSlice('\n')
		if part = append(part, line...); len(part) > 64<<10 {
			part = part[:0] // no line of the kernel's
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF):
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(100 * time.Millisecond):
			}
		case err != nil:
			return fmt.Errorf("read the kernel log: %w", err)
		default:
			if l, ok := ParseKernelLine(string(part)); ok {
				heard(l)
			}
			part = part[:0]
		}
	}
}
