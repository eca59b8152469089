//go:build linux

package proc_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"lorayard/internal/proc"
)

// TestMain is every process of these tests: the first argument names the part.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch part := os.Args[1]; part {
		case "shim":
			os.Exit(proc.RunShim(os.Args[2:], hook))
		case "agent", "exit", "stubborn", "polite", "pipes", "tree", "double", "grandchild", "storm", "leak", "last-words":
			os.Exit(play(part, os.Args[2:]))
		}
	}
	goleak.VerifyTestMain(m)
}

// play is a child's part. It talks on descriptor 3 and never on stdout, which
// belongs to the test.
func play(part string, args []string) int {
	fd3 := os.NewFile(3, "fd 3")
	switch part {
	case "agent": // starts a child, then waits to be killed, or hands it over and leaves
		if err := beAgent(args[0], args[1], fd3); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	case "exit":
		code, _ := strconv.Atoi(args[0])
		return code
	case "stubborn": // hears SIGTERM and stays
		signal.Ignore(syscall.SIGTERM)
		fmt.Fprintln(fd3, "ready")
		forever()
	case "polite": // saves and leaves
		c := make(chan os.Signal, 1)
		signal.Notify(c, syscall.SIGTERM)
		fmt.Fprintln(fd3, "ready")
		<-c
		return 75
	case "pipes": // echoes descriptor 4, then lives on with both closed
		fd4 := os.NewFile(4, "fd 4")
		io.Copy(fd3, fd4)
		fd3.Close()
		fd4.Close()
		forever()
	case "tree": // a grandchild in the group, one that left it, and one whose parent is gone, all deaf
		signal.Ignore(syscall.SIGTERM)
		for _, c := range []*exec.Cmd{exec.Command(self(), "grandchild"), exec.Command(self(), "grandchild"), exec.Command(self(), "double")} {
			c.ExtraFiles = []*os.File{fd3}
			c.SysProcAttr = &syscall.SysProcAttr{Setsid: c.Args[1] == "double"}
			if err := c.Start(); err != nil {
				return 1
			}
		}
		forever()
	case "double": // forks again into a session of its own, and leaves
		c := exec.Command(self(), "grandchild")
		c.ExtraFiles = []*os.File{fd3}
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := c.Start(); err != nil {
			return 1
		}
	case "storm": // shells that hand on to a copy in a new session, over and over
		for range 4 {
			c := exec.Command("/bin/sh", "-c", `PATH=/usr/bin:/bin; s='echo hop >&3; setsid /bin/sh -c "$0" "$0" & exit'; exec /bin/sh -c "$s" "$s"`)
			c.ExtraFiles = []*os.File{fd3}
			if err := c.Start(); err != nil {
				return 1
			}
		}
		fmt.Fprintln(fd3, "ready")
		forever()
	case "grandchild":
		signal.Ignore(syscall.SIGTERM, syscall.SIGHUP)
		fmt.Fprintln(fd3, os.Getpid())
		forever()
	case "leak": // leaves behind a process that holds stdout
		c := exec.Command(self(), "grandchild")
		c.Stdout = os.Stdout
		c.ExtraFiles = []*os.File{fd3}
		c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := c.Start(); err != nil {
			return 1
		}
		fmt.Println("said before leaving")
	case "last-words": // notices that the agent is gone, and uses the grace
		parent := os.Getppid()
		fmt.Fprintln(fd3, parent)
		var b [1]byte
		os.Stdin.Read(b[:])
		fmt.Fprintln(fd3, "saved")
	}
	return 0
}

// hook tells a test that waits at the other end of a FIFO.
func hook(path string) {
	if f, err := os.OpenFile(path, os.O_WRONLY, 0); err == nil {
		fmt.Fprintln(f, "orphaned")
		f.Close()
	}
}

// beAgent starts what is written in a file, with descriptor 3 for the child.
func beAgent(file, handOver string, fd3 *os.File) error {
	raw, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var c proc.Cmd
	if err := json.Unmarshal(raw, &c); err != nil {
		return err
	}
	c.Extra = []*os.File{fd3}
	p, err := proc.Start(c)
	if err != nil {
		return err
	}
	if handOver == "" {
		fd3.Close()
		p.Wait()
		return nil
	}
	d, err := time.ParseDuration(handOver)
	if err != nil {
		return err
	}
	return p.HandOver(d, fd3)
}

// agent is a process that starts c with w for the child; handOver empty makes
// it stay.
func agent(t *testing.T, c proc.Cmd, w *os.File, handOver string) *exec.Cmd {
	t.Helper()
	c.Path, c.Env = self(), []string{"GORACE=atexit_sleep_ms=0"}
	if c.Shim == nil {
		c.Shim = []string{self(), "shim"}
	}
	raw, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "cmd.json")
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	a := exec.Command(self(), "agent", file, handOver)
	a.ExtraFiles = []*os.File{w}
	a.Stderr = os.Stderr
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	t.Cleanup(func() {
		a.Process.Kill()
		a.Wait()
	})
	return a
}

// fifo gives a path for the hook, and a reader of what it says there.
func fifo(t *testing.T) (string, *bufio.Reader) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "orphaned")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	// Open for both, it does not end before the hook has come.
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if err := f.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return path, bufio.NewReader(f)
}

// ways are the two ways in which a shim kills: by control group, or by sweep
// alone. Without a writable hierarchy they are the same.
var ways = map[string][]string{"cgroup": {"/proc/self/exe", "shim"}, "sweep": {"/proc/self/exe", "shim", "--cgroup=false"}}

// forever is longer than any test; an empty select would be called a deadlock.
func forever() { <-time.After(time.Hour) }

func self() string {
	path, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return path
}

// eachWay runs f without and with a shim.
func eachWay(t *testing.T, f func(t *testing.T, shim []string)) {
	t.Run("plain", func(t *testing.T) { f(t, nil) })
	t.Run("shim", func(t *testing.T) { f(t, []string{"/proc/self/exe", "shim"}) })
}

// pipe gives a reader here and a writer for children. The reader ends when the
// last process that holds the writer is gone.
func pipe(t *testing.T) (*bufio.Reader, *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	if err := r.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return bufio.NewReader(r), w
}

func start(t *testing.T, c proc.Cmd) *proc.Process {
	t.Helper()
	if c.Path == "" {
		c.Path = self()
		c.Env = []string{"GORACE=atexit_sleep_ms=0"} // the detector waits 1 s at each exit
	}
	p, err := proc.Start(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Kill()
		p.Wait()
	})
	return p
}

func line(t *testing.T, r *bufio.Reader) string {
	t.Helper()
	s, err := r.ReadString('\n')
	if err != nil {
		t.Fatalf("read line: %v", err)
	}
	return strings.TrimSpace(s)
}

func number(t *testing.T, r *bufio.Reader) int {
	t.Helper()
	n, err := strconv.Atoi(line(t, r))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func ended(t *testing.T, p *proc.Process, want proc.Exit) {
	t.Helper()
	if got, err := p.Wait(); got != want || err != nil {
		t.Errorf("Wait = %v, %v; want %v", got, err, want)
	}
}

func TestExitCodesAndSignalsComeThrough(t *testing.T) {
	eachWay(t, func(t *testing.T, shim []string) {
		for _, code := range []int{0, 1, 64, 75, 83, 255} {
			ended(t, start(t, proc.Cmd{Args: []string{"exit", strconv.Itoa(code)}, Shim: shim}), proc.Exit{Code: code})
		}
		for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGUSR1} {
			ended(t, start(t, proc.Cmd{Path: "/bin/sh", Args: []string{"-c", fmt.Sprintf("kill -%d $$", sig)}, Shim: shim}), proc.Exit{Code: 128 + int(sig), Signal: sig})
		}
	})
}

func TestStopLetsAPoliteChildLeave(t *testing.T) {
	eachWay(t, func(t *testing.T, shim []string) {
		r, w := pipe(t)
		p := start(t, proc.Cmd{Args: []string{"polite"}, Shim: shim, Extra: []*os.File{w}, Grace: time.Minute})
		line(t, r)
		if err := p.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		ended(t, p, proc.Exit{Code: 75})
		if err := p.Signal(syscall.SIGUSR1); !errors.Is(err, os.ErrProcessDone) {
			t.Errorf("signal after the end: %v, want ErrProcessDone", err)
		}
		if err := p.Stop(t.Context()); err != nil {
			t.Errorf("second stop: %v", err)
		}
	})
}

func TestStopKillsAfterTheGrace(t *testing.T) {
	killed := proc.Exit{Code: 137, Signal: syscall.SIGKILL}
	eachWay(t, func(t *testing.T, shim []string) {
		r, w := pipe(t)
		p := start(t, proc.Cmd{Args: []string{"stubborn"}, Shim: shim, Extra: []*os.File{w}, Grace: 20 * time.Millisecond})
		line(t, r)
		if err := p.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		ended(t, p, killed)
	})
}

func TestAnEndedContextCutsTheGraceShort(t *testing.T) {
	eachWay(t, func(t *testing.T, shim []string) {
		r, w := pipe(t)
		p := start(t, proc.Cmd{Args: []string{"stubborn"}, Shim: shim, Extra: []*os.File{w}, Grace: time.Hour})
		line(t, r)
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(errors.New("lease lost"))
		if err := p.Stop(ctx); err != nil && !strings.Contains(err.Error(), "lease lost") {
			t.Errorf("Stop = %v, want the cause", err)
		}
		ended(t, p, proc.Exit{Code: 137, Signal: syscall.SIGKILL})
	})
}

func TestTheEnvironmentIsExactlyWhatWasGiven(t *testing.T) {
	t.Setenv("CANARY", "must not be seen")
	eachWay(t, func(t *testing.T, shim []string) {
		for _, env := range [][]string{nil, {"A=1", "B=", "C=x=y z"}} {
			var raw bytes.Buffer
			ended(t, start(t, proc.Cmd{Path: "/bin/cat", Args: []string{"/proc/self/environ"}, Shim: shim, Env: env, Dir: t.TempDir(), Stdout: &raw}), proc.Exit{})
			var got []string
			for v := range strings.SplitSeq(strings.TrimSuffix(raw.String(), "\x00"), "\x00") {
				if v != "" {
					got = append(got, v)
				}
			}
			if !slices.Equal(got, env) {
				t.Errorf("environment %q, want %q", got, env)
			}
		}
	})
}

func TestExtraDescriptorsEndWhenTheChildClosesThem(t *testing.T) {
	eachWay(t, func(t *testing.T, shim []string) {
		events, w := pipe(t)
		r, commands, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		p := start(t, proc.Cmd{Args: []string{"pipes"}, Shim: shim, Extra: []*os.File{w, r}})
		w.Close()
		r.Close()
		if _, err := commands.WriteString("stop\n"); err != nil {
			t.Fatal(err)
		}
		if got := line(t, events); got != "stop" {
			t.Errorf("child heard %q", got)
		}
		commands.Close()
		if _, err := events.ReadByte(); err != io.EOF {
			t.Errorf("events of a living child: %v, want their end", err)
		}
		if err := syscall.Kill(p.Pid(), 0); err != nil {
			t.Errorf("child %d: %v", p.Pid(), err)
		}
	})
}

func TestOutputIsWholeAndApart(t *testing.T) {
	eachWay(t, func(t *testing.T, shim []string) {
		var out, errs bytes.Buffer
		ended(t, start(t, proc.Cmd{
			Path: "/bin/sh", Args: []string{"-c", "i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done; echo oh >&2"},
			Shim: shim, Stdout: &out, Stderr: &errs,
		}), proc.Exit{})
		if n := bytes.Count(out.Bytes(), []byte("\n")); n != 5000 || errs.String() != "oh\n" {
			t.Errorf("%d lines on stdout, %q on stderr", n, errs.String())
		}
	})
}

func TestAMissingProgramIsAnErrorOfStart(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, []byte("no program"), 0o600); err != nil {
		t.Fatal(err)
	}
	eachWay(t, func(t *testing.T, shim []string) {
		if _, err := proc.Start(proc.Cmd{Path: "/no/such/program", Shim: shim}); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("missing program: %v, want ErrNotExist", err)
		}
		if _, err := proc.Start(proc.Cmd{Path: plain, Shim: shim}); !errors.Is(err, fs.ErrPermission) {
			t.Errorf("plain file: %v, want ErrPermission", err)
		}
	})
	if _, err := proc.Start(proc.Cmd{Path: self(), Shim: []string{"/bin/false"}}); !errors.Is(err, proc.ErrShimLost) {
		t.Errorf("a shim that is none: %v, want ErrShimLost", err)
	}
}

func TestALeakedStdoutDoesNotHangWait(t *testing.T) {
	t.Run("plain", func(t *testing.T) {
		r, w := pipe(t)
		var out bytes.Buffer
		p := start(t, proc.Cmd{Args: []string{"leak"}, Stdout: &out, Extra: []*os.File{w}, OutputDelay: 50 * time.Millisecond})
		stray := number(t, r)
		if got, err := p.Wait(); got != (proc.Exit{}) || !errors.Is(err, proc.ErrOutputCut) {
			t.Errorf("Wait = %v, %v; want ErrOutputCut", got, err)
		}
		if out.String() != "said before leaving\n" {
			t.Errorf("stdout %q", out.String())
		}
		if err := syscall.Kill(stray, syscall.SIGKILL); err != nil {
			t.Errorf("without a shim the stray should live: %v", err)
		}
	})
	t.Run("shim", func(t *testing.T) {
		r, w := pipe(t)
		var out bytes.Buffer
		p := start(t, proc.Cmd{Args: []string{"leak"}, Shim: []string{self(), "shim"}, Stdout: &out, Extra: []*os.File{w}, OutputDelay: time.Hour})
		w.Close()
		ended(t, p, proc.Exit{})
		if out.String() != "said before leaving\n" {
			t.Errorf("stdout %q", out.String())
		}
		if _, err := io.ReadAll(r); err != nil {
			t.Errorf("the stray still lives: %v", err)
		}
	})
}

func TestKillEndsWhatLeftTheGroup(t *testing.T) {
	for name, shim := range ways {
		t.Run(name, func(t *testing.T) {
			r, w := pipe(t)
			p := start(t, proc.Cmd{Args: []string{"tree"}, Shim: shim, Extra: []*os.File{w}})
			w.Close()
			pids := []int{p.Pid(), number(t, r), number(t, r), number(t, r)}
			if err := p.Kill(); err != nil {
				t.Fatal(err)
			}
			ended(t, p, proc.Exit{Code: 137, Signal: syscall.SIGKILL})
			allDead(t, pids...)
		})
	}
}

func TestAForkStormEnds(t *testing.T) {
	for name, shim := range ways {
		t.Run(name, func(t *testing.T) {
			r, w := pipe(t)
			p := start(t, proc.Cmd{Args: []string{"storm"}, Shim: shim, Extra: []*os.File{w}})
			w.Close()
			for range 100 {
				line(t, r)
			}
			killed := time.Now()
			if err := p.Kill(); err != nil {
				t.Fatal(err)
			}
			ended(t, p, proc.Exit{Code: 137, Signal: syscall.SIGKILL})
			t.Logf("over after %v", time.Since(killed).Round(100*time.Microsecond))
			if _, err := io.ReadAll(r); err != nil {
				t.Fatalf("the storm goes on: %v", err)
			}
		})
	}
}

func TestAKilledAgentTakesTheWholeTreeWithIt(t *testing.T) {
	for name, shim := range ways {
		t.Run(name, func(t *testing.T) {
			r, w := pipe(t)
			orphaned, called := fifo(t)
			a := agent(t, proc.Cmd{Args: []string{"tree"}, Shim: shim, Orphaned: orphaned}, w, "")
			pids := []int{number(t, r), number(t, r), number(t, r)}
			killed := time.Now()
			if err := a.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			line(t, called)
			t.Logf("tree gone and hook called %v after kill -9 of the agent", time.Since(killed).Round(100*time.Microsecond))
			allDead(t, pids...)
			if _, err := io.ReadAll(r); err != nil {
				t.Fatalf("the tree outlived the agent: %v", err)
			}
		})
	}
}

// allDead fails for whoever is not dead and reaped.
func allDead(t *testing.T, pids ...int) {
	t.Helper()
	for _, pid := range pids {
		if err := syscall.Kill(pid, 0); !errors.Is(err, syscall.ESRCH) {
			t.Errorf("process %d is not dead and reaped: %v", pid, err)
		}
	}
}

func TestOrphanGraceLetsTheChildFinish(t *testing.T) {
	r, w := pipe(t)
	// Its stdin stands for the command pipe, whose end tells that the agent is
	// gone. Here /dev/null tells it at once, before the agent is killed.
	a := agent(t, proc.Cmd{Args: []string{"last-words"}, Shim: []string{self(), "shim", "--orphan-grace=1m"}}, w, "")
	number(t, r)
	a.Process.Kill()
	a.Wait()
	rest, err := io.ReadAll(r)
	if err != nil || string(rest) != "saved\n" {
		t.Errorf("child said %q, %v; want saved", rest, err)
	}
}

func TestSignalsToTheShimReachTheChild(t *testing.T) {
	r, w := pipe(t)
	p := start(t, proc.Cmd{Args: []string{"polite"}, Shim: []string{self(), "shim"}, Extra: []*os.File{w}})
	line(t, r)
	if err := syscall.Kill(parentOf(t, p.Pid()), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	ended(t, p, proc.Exit{Code: 75})
}

func TestAKilledShimTakesTheGroupWithIt(t *testing.T) {
	r, w := pipe(t)
	p := start(t, proc.Cmd{Args: []string{"tree"}, Shim: []string{self(), "shim"}, Extra: []*os.File{w}})
	w.Close()
	pids := []int{number(t, r), number(t, r), number(t, r)}
	if err := syscall.Kill(parentOf(t, p.Pid()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if got, err := p.Wait(); got.Signal != syscall.SIGKILL || !errors.Is(err, proc.ErrShimLost) {
		t.Errorf("Wait = %v, %v; want ErrShimLost", got, err)
	}
	if p.Cgroup() == "" { // those that left the group are nobody's now
		for _, pid := range pids {
			syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	if _, err := io.ReadAll(r); err != nil {
		t.Errorf("somebody outlived the shim: %v", err)
	}
}

func TestAStoppedShimIsKilledAllTheSame(t *testing.T) {
	r, w := pipe(t)
	p := start(t, proc.Cmd{Args: []string{"stubborn"}, Shim: []string{self(), "shim"}, Extra: []*os.File{w}})
	line(t, r)
	if err := syscall.Kill(parentOf(t, p.Pid()), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	ended(t, p, proc.Exit{Code: 137, Signal: syscall.SIGKILL})
}

func TestAShimByHandSaysWhatItNeeds(t *testing.T) {
	c := exec.Command(self(), "shim", "/bin/true")
	out, err := c.CombinedOutput()
	if c.ProcessState.ExitCode() != 64 || !strings.Contains(string(out), "--lifeline") {
		t.Errorf("%v: %s", err, out)
	}
}

// parentOf reads the parent of pid: the shim.
func parentOf(t *testing.T, pid int) int {
	t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	var parent int
	rest := string(raw[bytes.LastIndexByte(raw, ')')+1:])
	if _, err := fmt.Sscanf(rest, " %s %d", new(string), &parent); err != nil {
		t.Fatal(err)
	}
	if parent == os.Getpid() {
		t.Fatal("no shim above the child")
	}
	return parent
}
