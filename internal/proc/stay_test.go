//go:build linux

package proc_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"lorayard/internal/proc"
)

// home gives a child what it needs to be handed over, in a directory whose
// name is longer than a socket's address.
func home(t *testing.T, c proc.Cmd) proc.Cmd {
	t.Helper()
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 100))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	c.Socket, c.Record = filepath.Join(dir, "shim.sock"), filepath.Join(dir, "exit.json")
	if c.Shim == nil {
		c.Shim = []string{"/proc/self/exe", "shim"}
	}
	return c
}

func adopt(t *testing.T, c proc.Cmd) (*proc.Process, []*os.File) {
	t.Helper()
	p, files, err := proc.Adopt(c.Socket, c.Record, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Kill()
		p.Wait()
		for _, f := range files {
			f.Close()
		}
	})
	return p, files
}

func TestAChildOutlivesItsAgentAndIsAdopted(t *testing.T) {
	r, w := pipe(t)
	orphaned, _ := fifo(t)
	c := home(t, proc.Cmd{Args: []string{"polite"}, Orphaned: orphaned, Deadline: time.Hour})
	a := agent(t, c, w, "1m")
	if err := a.Wait(); err != nil {
		t.Fatalf("hand over: %v", err)
	}
	line(t, r)
	info, err := os.Stat(c.Socket)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v; want mode 0600", info, err)
	}
	p, files := adopt(t, c)
	if len(files) != 1 {
		t.Fatalf("%d kept files, want 1", len(files))
	}
	if _, err := files[0].WriteString("by the adopter\n"); err != nil {
		t.Fatal(err)
	}
	if got := line(t, r); got != "by the adopter" {
		t.Errorf("kept file carried %q", got)
	}
	if err := p.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	ended(t, p, proc.Exit{Code: 75})
	if _, err := os.Stat(c.Socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("socket of an adopted child: %v, want none", err)
	}
}

func TestHandingOverAgainAndAgain(t *testing.T) {
	r, w := pipe(t)
	c := home(t, proc.Cmd{Args: []string{"stubborn"}, Extra: []*os.File{w}})
	p := start(t, c)
	w.Close()
	line(t, r)
	for range 3 {
		if err := p.HandOver(time.Minute); err != nil {
			t.Fatal(err)
		}
		if _, err := p.Wait(); !errors.Is(err, proc.ErrHandedOver) {
			t.Errorf("Wait after hand-over: %v, want ErrHandedOver", err)
		}
		if err := p.Kill(); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("Kill after hand-over: %v, want ErrProcessDone", err)
		}
		if err := p.Stop(t.Context()); !errors.Is(err, proc.ErrHandedOver) {
			t.Errorf("Stop after hand-over: %v, want ErrHandedOver", err)
		}
		pid := p.Pid()
		if p, _ = adopt(t, c); p.Pid() != pid {
			t.Fatalf("adopted %d, want %d", p.Pid(), pid)
		}
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	ended(t, p, proc.Exit{Code: 137, Signal: syscall.SIGKILL})
	if err := p.HandOver(time.Minute); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("hand-over of a dead child: %v, want ErrProcessDone", err)
	}
}

func TestAnAdopterThatDiesLeavesAnOrphan(t *testing.T) {
	r, w := pipe(t)
	orphaned, called := fifo(t)
	c := home(t, proc.Cmd{Args: []string{"stubborn"}, Extra: []*os.File{w}, Orphaned: orphaned})
	p := start(t, c)
	w.Close()
	line(t, r)
	if err := p.HandOver(time.Minute); err != nil {
		t.Fatal(err)
	}
	// An adopter that says nothing: its connection is all there is of it.
	dir, err := os.Open(filepath.Dir(c.Socket))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	conn, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/shim.sock", dir.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	if said := line(t, bufio.NewReader(conn)); !strings.HasPrefix(said, fmt.Sprintf("adopted %d ", p.Pid())) {
		t.Errorf("shim said %q", said)
	}
	conn.Close()
	line(t, called)
	allDead(t, p.Pid())
}

func TestNobodyAdoptsSoTheChildIsAskedThenKilled(t *testing.T) {
	for part, want := range map[string]proc.Exit{"polite": {Code: 75, Orphaned: true}, "tree": {Code: 137, Signal: syscall.SIGKILL, Orphaned: true}} {
		t.Run(part, func(t *testing.T) {
			r, w := pipe(t)
			orphaned, called := fifo(t)
			c := home(t, proc.Cmd{Args: []string{part}, Extra: []*os.File{w}, Orphaned: orphaned, Grace: time.Minute})
			if want.Signal != 0 {
				c.Grace = 20 * time.Millisecond
			}
			p := start(t, c)
			w.Close()
			line(t, r)
			if err := p.HandOver(20 * time.Millisecond); err != nil {
				t.Fatal(err)
			}
			line(t, called)
			if rest, err := io.ReadAll(r); err != nil {
				t.Errorf("after the hook somebody lives: %q, %v", rest, err)
			}
			p, files := adopt(t, c)
			ended(t, p, want)
			if len(files) != 0 {
				t.Errorf("%d files of a dead child", len(files))
			}
		})
	}
}

func TestAnEndWhileNobodyIsThereIsRecorded(t *testing.T) {
	r, w := pipe(t)
	orphaned, called := fifo(t)
	c := home(t, proc.Cmd{Args: []string{"polite"}, Extra: []*os.File{w}, Orphaned: orphaned})
	p := start(t, c)
	w.Close()
	line(t, r)
	kept, shims := pipe(t)
	if err := p.HandOver(time.Minute, shims); err != nil {
		t.Fatal(err)
	}
	shims.Close()
	if err := syscall.Kill(p.Pid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if _, err := kept.ReadByte(); err != io.EOF { // the shim lets go of it when all is written
		t.Fatalf("kept file: %v", err)
	}
	for range 2 {
		p, _ = adopt(t, c)
		ended(t, p, proc.Exit{Code: 75})
	}
	if n := called.Buffered(); n != 0 {
		t.Error("the hook was called for a child that ended by itself")
	}
}

func TestAdoptingRacesTheEnd(t *testing.T) {
	for range 20 {
		r, w := pipe(t)
		c := home(t, proc.Cmd{Args: []string{"polite"}, Extra: []*os.File{w}})
		p := start(t, c)
		w.Close()
		line(t, r)
		if err := p.HandOver(time.Minute); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(p.Pid(), syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		p, _ = adopt(t, c)
		ended(t, p, proc.Exit{Code: 75})
	}
}

func TestAnAgentThatWasKilledLeavesARecord(t *testing.T) {
	r, w := pipe(t)
	c := home(t, proc.Cmd{Args: []string{"tree"}})
	a := agent(t, c, w, "")
	line(t, r)
	a.Process.Kill()
	a.Wait()
	p, _ := adopt(t, c) // waits for the shim, which is still at work
	ended(t, p, proc.Exit{Code: 137, Signal: syscall.SIGKILL, Orphaned: true})
}

func TestNothingToAdopt(t *testing.T) {
	dir := t.TempDir()
	if _, _, err := proc.Adopt(dir+"/s", dir+"/e", 0); !errors.Is(err, proc.ErrShimLost) {
		t.Errorf("empty directory: %v, want ErrShimLost", err)
	}
	if _, _, err := proc.Adopt(dir+"/no/s", dir+"/no/e", 0); !errors.Is(err, proc.ErrShimLost) {
		t.Errorf("no directory: %v, want ErrShimLost", err)
	}
	r, w := pipe(t)
	c := home(t, proc.Cmd{Args: []string{"tree"}, Extra: []*os.File{w}})
	p := start(t, c)
	w.Close()
	strays := []int{number(t, r), number(t, r), number(t, r)}
	if err := p.HandOver(time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(parentOf(t, p.Pid()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, _, err := proc.Adopt(c.Socket, c.Record, 0); !errors.Is(err, proc.ErrShimLost) {
		t.Errorf("killed shim: %v, want ErrShimLost", err)
	}
	if p.Cgroup() == "" { // they are nobody's now
		for _, pid := range strays {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	if _, err := io.ReadAll(r); err != nil {
		t.Errorf("somebody outlived shim and adopter: %v", err)
	}
}

func TestAChildInCareIsNotToBeHad(t *testing.T) {
	t.Parallel() // takes as long as an adopter has patience
	r, w := pipe(t)
	c := home(t, proc.Cmd{Args: []string{"polite"}, Extra: []*os.File{w}, Grace: time.Minute})
	p := start(t, c)
	w.Close()
	line(t, r)
	if _, _, err := proc.Adopt(c.Socket, c.Record, 0); !errors.Is(err, proc.ErrInCharge) {
		t.Errorf("adopt: %v, want ErrInCharge", err)
	}
	if _, err := proc.Start(c); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("a second child in the same directory: %v, want EBUSY", err)
	}
	if err := p.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	ended(t, p, proc.Exit{Code: 75})
}

func TestAShimThatDoesNotAnswerHandsOverLater(t *testing.T) {
	t.Parallel()
	r, w := pipe(t)
	c := home(t, proc.Cmd{Args: []string{"polite"}, Extra: []*os.File{w}, Grace: time.Minute})
	p := start(t, c)
	w.Close()
	line(t, r)
	shim := parentOf(t, p.Pid())
	if err := syscall.Kill(shim, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := p.HandOver(time.Minute); !errors.Is(err, proc.ErrHandedOver) {
		t.Errorf("hand over: %v, want ErrHandedOver", err)
	}
	if _, err := p.Wait(); !errors.Is(err, proc.ErrHandedOver) {
		t.Errorf("Wait: %v, want ErrHandedOver", err)
	}
	if err := syscall.Kill(shim, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	p, _ = adopt(t, c)
	if err := p.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	ended(t, p, proc.Exit{Code: 75})
}

func TestAStrangerAtTheSocketIsRefused(t *testing.T) {
	r, w := pipe(t)
	p := start(t, proc.Cmd{Args: []string{"stubborn"}, Extra: []*os.File{w}})
	line(t, r)
	for name, said := range map[string]string{
		"other start": fmt.Sprintf("adopted %d 12345\n", p.Pid()),
		"no number":   "adopted me\n",
		"other words": "ready\n",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			l, err := net.Listen("unix", dir+"/s")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				if c, err := l.Accept(); err == nil {
					io.WriteString(c, said)
					io.Copy(io.Discard, c)
					c.Close()
				}
			}()
			if _, _, err := proc.Adopt(dir+"/s", dir+"/e", 0); err == nil || errors.Is(err, proc.ErrShimLost) {
				t.Errorf("adopt: %v, want a refusal", err)
			}
		})
	}
	if err := syscall.Kill(p.Pid(), 0); err != nil {
		t.Errorf("the process that a stranger named: %v", err)
	}
}

func TestTheDeadlineEndsTheChildOfAStoppedAgent(t *testing.T) {
	r, w := pipe(t)
	c := home(t, proc.Cmd{Args: []string{"tree"}, Deadline: time.Second})
	began := time.Now()
	a := agent(t, c, w, "")
	line(t, r)
	if err := a.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(r); err != nil {
		t.Fatalf("the tree outlived its deadline: %v", err)
	}
	t.Logf("a deadline of %v: gone after %v, with the start of an agent", c.Deadline, time.Since(began).Round(time.Millisecond))
	p, _ := adopt(t, c)
	ended(t, p, proc.Exit{Code: 137, Signal: syscall.SIGKILL, Late: true})
}

func TestNoChildAfterTheDeadline(t *testing.T) {
	r, w := pipe(t)
	_, err := proc.Start(proc.Cmd{Path: self(), Args: []string{"stubborn"}, Shim: []string{self(), "shim"}, Extra: []*os.File{w}, Deadline: -time.Second})
	if !errors.Is(err, proc.ErrLate) {
		t.Errorf("start: %v, want ErrLate", err)
	}
	w.Close()
	if said, err := io.ReadAll(r); err != nil || len(said) > 0 {
		t.Errorf("the child said %q, %v", said, err)
	}
}

func TestExtendMovesTheDeadline(t *testing.T) {
	const first = time.Second // a busy machine takes its time to start a shim
	r, w := pipe(t)
	p := start(t, proc.Cmd{Args: []string{"polite"}, Shim: []string{self(), "shim"}, Extra: []*os.File{w}, Deadline: first})
	if err := p.Extend(time.Hour); err != nil {
		t.Fatal(err)
	}
	line(t, r)
	select {
	case <-p.Done():
		t.Fatal("the first deadline held")
	case <-time.After(first + 50*time.Millisecond):
	}
	if err := p.Extend(time.Millisecond); err != nil {
		t.Fatal(err)
	}
	ended(t, p, proc.Exit{Code: 137, Signal: syscall.SIGKILL, Late: true})
	if err := p.Extend(time.Hour); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("extend after the end: %v, want ErrProcessDone", err)
	}
}

func TestTheDeadlineHoldsWhileNobodyIsThere(t *testing.T) {
	r, w := pipe(t)
	orphaned, called := fifo(t)
	c := home(t, proc.Cmd{Args: []string{"polite"}, Extra: []*os.File{w}, Orphaned: orphaned, Deadline: time.Hour})
	p := start(t, c)
	w.Close()
	line(t, r)
	if err := errors.Join(p.Extend(100*time.Millisecond), p.HandOver(time.Hour)); err != nil {
		t.Fatal(err)
	}
	line(t, called)
	p, _ = adopt(t, c)
	ended(t, p, proc.Exit{Code: 137, Signal: syscall.SIGKILL, Late: true, Orphaned: true})
}

func TestTheControlGroupGoesWithTheChild(t *testing.T) {
	r, w := pipe(t)
	p := start(t, proc.Cmd{Args: []string{"tree"}, Shim: []string{self(), "shim"}, Extra: []*os.File{w}})
	w.Close()
	if p.Cgroup() == "" {
		t.Skip("no cgroup version 2 hierarchy that we may write")
	}
	for range 3 {
		number(t, r)
	}
	raw, err := os.ReadFile(filepath.Join(p.Cgroup(), "cgroup.procs"))
	if n := bytes.Count(raw, []byte("\n")); err != nil || n != 4 {
		t.Errorf("%d processes in the group, %v; want the child and three", n, err)
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	ended(t, p, proc.Exit{Code: 137, Signal: syscall.SIGKILL})
	if _, err := os.Stat(p.Cgroup()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("group after the end: %v, want none", err)
	}
}

func TestTheLogIsWholeAndBounded(t *testing.T) {
	const half = 4 << 20
	log := filepath.Join(t.TempDir(), "child.log")
	shim := []string{self(), "shim"}
	ended(t, start(t, proc.Cmd{Path: "/bin/sh", Args: []string{"-c", "echo one; echo two >&2"}, Shim: shim, Log: log}), proc.Exit{})
	if raw, err := os.ReadFile(log); err != nil || string(raw) != "one\ntwo\n" {
		t.Errorf("log %q, %v", raw, err)
	}
	began := time.Now()
	ended(t, start(t, proc.Cmd{Path: "/bin/sh", Args: []string{"-c", "head -c 256M /dev/zero; echo the end"}, Env: []string{"PATH=/usr/bin:/bin"}, Shim: shim, Log: log}), proc.Exit{})
	t.Logf("256 MiB in %v", time.Since(began).Round(time.Millisecond))
	raw, err := os.ReadFile(log)
	if err != nil || len(raw) > half || !bytes.HasSuffix(raw, []byte("the end\n")) {
		t.Errorf("%d bytes, %v; want at most %d, the last word at the end", len(raw), err, half)
	}
	if info, err := os.Stat(log + ".1"); err != nil || info.Size() > half {
		t.Errorf("older half: %v, %v", info, err)
	}
}

func TestALogThatCannotBeWrittenHoldsNobodyUp(t *testing.T) {
	log := filepath.Join(t.TempDir(), "not", "there")
	ended(t, start(t, proc.Cmd{Path: "/bin/sh", Args: []string{"-c", "head -c 1M /dev/zero"}, Env: []string{"PATH=/usr/bin:/bin"}, Shim: []string{self(), "shim"}, Log: log}), proc.Exit{})
}

func TestALeakedLogDoesNotHangTheEnd(t *testing.T) {
	r, w := pipe(t)
	log := filepath.Join(t.TempDir(), "child.log")
	p := start(t, proc.Cmd{Args: []string{"leak"}, Shim: []string{self(), "shim"}, Extra: []*os.File{w}, Log: log})
	w.Close()
	ended(t, p, proc.Exit{})
	if _, err := io.ReadAll(r); err != nil {
		t.Errorf("the stray still lives: %v", err)
	}
	if raw, err := os.ReadFile(log); err != nil || string(raw) != "said before leaving\n" {
		t.Errorf("log %q, %v", raw, err)
	}
}

func TestWithoutAShimNothingStays(t *testing.T) {
	if _, err := proc.Start(proc.Cmd{Path: self(), Args: []string{"exit", "0"}, Deadline: time.Hour}); err == nil {
		t.Error("a deadline without a shim was accepted")
	}
	p := start(t, proc.Cmd{Args: []string{"exit", "0"}})
	if err := errors.Join(p.Extend(time.Hour)); err == nil {
		t.Error("extend without a shim did nothing, and said nothing")
	}
	if err := p.HandOver(time.Hour); err == nil {
		t.Error("hand-over without a shim was accepted")
	}
}

func TestTheRecordIsPlainJSON(t *testing.T) {
	c := home(t, proc.Cmd{Args: []string{"exit", "83"}})
	ended(t, start(t, c), proc.Exit{Code: 83})
	raw, err := os.ReadFile(c.Record)
	if err != nil {
		t.Fatal(err)
	}
	var got map[string]any
	if err := json.Unmarshal(raw, &got); err != nil || got["code"] != 83.0 || got["signal"] != 0.0 || got["deadline"] != false {
		t.Errorf("record %s, %v", raw, err)
	}
}
