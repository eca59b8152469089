package trainer

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"lorayard/internal/wire"
)

func lines(from, to int) string {
	var b strings.Builder
	for seq := from; seq <= to; seq++ {
		fmt.Fprintf(&b, `{"v":1,"seq":%d,"ts":1,"job":"j","attempt":1,"ev":"log","level":"info","message":"{\"v\":1}","code":""}`+"\n", seq)
	}
	return b.String()
}

func TestRejoinGivesEachEventOnce(t *testing.T) {
	half := len(lines(1, 1)) / 2
	for name, c := range map[string]struct {
		file, pipe string
		last       int
		err        error
	}{
		"nothing yet":                          {"", "", 0, nil},
		"the pipe alone":                       {"", lines(1, 5), 5, nil},
		"the file alone":                       {lines(1, 5), "", 5, nil},
		"the pipe repeats the file":            {lines(1, 5), lines(2, 9), 9, nil},
		"the pipe goes on where the file ends": {lines(1, 5), lines(6, 9), 9, nil},
		"the pipe begins in a line":            {lines(1, 5), lines(3, 9)[half:], 9, nil},
		"the pipe begins with an end of line":  {lines(1, 5), "\n" + lines(5, 9), 9, nil},
		"the file ends in a line":              {lines(1, 5)[:len(lines(1, 5))-half], lines(4, 9), 9, nil},
		"both":                                 {lines(1, 5)[:len(lines(1, 5))-half], lines(3, 9)[half:], 9, nil},
		"all of the pipe is old":               {lines(1, 9), lines(3, 7)[half:], 9, nil},
		"an event is missing between them":     {lines(1, 5), lines(7, 9), 5, wire.ErrProtocol},
		"an event is missing in the file":      {lines(1, 3) + lines(5, 6), lines(6, 9), 3, wire.ErrProtocol},
		"nonsense in the pipe":                 {lines(1, 5), lines(5, 6) + "nonsense\n" + lines(7, 9), 6, wire.ErrProtocol},
		"nonsense in what is skipped":          {lines(1, 5), lines(3, 4) + "nonsense\n" + lines(5, 9), 5, wire.ErrProtocol},
		"a line without end":                   {lines(1, 5), lines(5, 5) + strings.Repeat("x", 2*wire.MaxLine), 5, wire.ErrProtocol},
	} {
		t.Run(name, func(t *testing.T) {
			j := &rejoin{file: bufio.NewReaderSize(strings.NewReader(c.file), wire.MaxLine+1), pipe: bufio.NewReaderSize(strings.NewReader(c.pipe), wire.MaxLine+1)}
			d := wire.NewDecoder(j)
			for want := 1; ; want++ {
				e, _, err := d.Next()
				if errors.Is(err, io.EOF) {
					err = nil
				} else if err == nil {
					if e.Seq != uint64(want) {
						t.Fatalf("event %d, want %d", e.Seq, want)
					}
					continue
				}
				if want-1 != c.last || !errors.Is(err, c.err) {
					t.Errorf("%d events, then %v; want %d, then %v", want-1, err, c.last, c.err)
				}
				return
			}
		})
	}
}
