package gpu_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"lorayard/internal/gpu"
)

func TestKernelLinesOfTheDriver(t *testing.T) {
	for line, want := range map[string]gpu.KernelLine{
		"4,1163,93847238,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=python, GPU has fallen off the bus.": {Bus: "0000:3b:00", XID: 79, Text: "pid=1234, name=python, GPU has fallen off the bus."},
		"NVRM: Xid (PCI:0000:3B:00): 48, pid='<unknown>', name=<unknown>, An uncorrectable double bit error":   {Bus: "0000:3b:00", XID: 48, Text: "pid='<unknown>', name=<unknown>, An uncorrectable double bit error"},
		"NVRM: Xid (PCI:0000:5d:00 GPU-I:03): 94, pid=77, Contained: SM (0x1). RST: No, D-RST: No":             {Bus: "0000:5d:00", XID: 94, Text: "pid=77, Contained: SM (0x1). RST: No, D-RST: No"},
		"NVRM: Xid (0000:03:00): 14, Channel 00000001":                                                         {Bus: "0000:03:00", XID: 14, Text: "Channel 00000001"},
		"NVRM: Xid (PCI:0008:01:00): 145, NVLINK: RLW_CTRL Nonfatal XC0 i0 link 07 (0x00000004 0x0)":           {Bus: "0008:01:00", XID: 145, Link: true, Text: "NVLINK: RLW_CTRL Nonfatal XC0 i0 link 07 (0x00000004 0x0)"},
		"NVRM: Xid (PCI:0008:01:00): 149, NVLINK: NETIR Fatal XC0 i0 link 02 (0x00000004 0x0)":                 {Bus: "0008:01:00", XID: 149, Link: true, LinkFatal: true, Text: "NVLINK: NETIR Fatal XC0 i0 link 02 (0x00000004 0x0)"},
		"NVRM: GPU 0000:3b:00.0: GPU has fallen off the bus.":                                                  {Bus: "0000:3b:00", XID: 79, Text: "GPU 0000:3b:00.0: GPU has fallen off the bus."},
		"NVRM: The NVIDIA GPU 0000:3b:00.0 (PCI ID: 10de:2330) has fallen off the bus and is not responding":   {Bus: "0000:3b:00", XID: 79, Text: "The NVIDIA GPU 0000:3b:00.0 (PCI ID: 10de:2330) has fallen off the bus and is not responding"},
		"NVRM: GPU at PCI:0000:3b:00: GPU-0a1b2c3d-1111-2222-3333-444455556666":                                {Bus: "0000:3b:00", UUID: "GPU-0a1b2c3d-1111-2222-3333-444455556666"},
	} {
		if got, ok := gpu.ParseKernelLine(line); !ok || got != want {
			t.Errorf("%s\n got %+v %t\nwant %+v", line, got, ok, want)
		}
	}
	for _, line := range []string{
		"", "6,1,2,-;usb 1-1: new device", "NVRM: loading NVIDIA UNIX x86_64 Kernel Module  550.54.15", "NVRM: Xid (PCI:0000:3b:00) 79", "NVRM: Xid (PCI:0000:3b:00): x",
		"NVRM: Xid (PCI:0000:3g:00): 79", "NVRM: Xid (PCI:0000:3b:00): 0, nothing", "NVRM: Xid (PCI:0000:3b:00): 99999999999999999999", "NVRM: GPU fallen off the bus",
	} {
		if got, ok := gpu.ParseKernelLine(line); ok {
			t.Errorf("%q was taken for %+v", line, got)
		}
	}
}

func TestBusAddressesAreBroughtToOneForm(t *testing.T) {
	for in, want := range map[string]string{
		"00000000:3B:00.0": "0000:3b:00", "0000:3b:00.0": "0000:3b:00", "PCI:0000:3b:00": "0000:3b:00", "00010000:01:00.0": "10000:01:00", "0:01:00": "0000:01:00",
		"": "", "3b:00.0": "", "0000:3b:0": "", "0000:3b:00:00": "", ":3b:00": "", "0000 :3b:00": "",
	} {
		if got := gpu.NormalBus(in); got != want {
			t.Errorf("NormalBus(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzParseKernelLine(f *testing.F) {
	for _, s := range []string{
		"4,1,2,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.", "NVRM: Xid (PCI:0000:01:00): 145, NVLINK: Nonfatal", "NVRM: GPU at PCI:0000:3b:00: GPU-1",
		"NVRM: GPU 0000:3b:00.0: GPU has fallen off the bus.", "NVRM: Xid (): , ", "NVRM: Xid (PCI:::): 1", "NVRM: fallen off the bus",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		l, ok := gpu.ParseKernelLine(line)
		switch {
		case !ok && l != gpu.KernelLine{}:
			t.Errorf("%q: nothing, and yet %+v", line, l)
		case ok && (l.Bus == "" || gpu.NormalBus(l.Bus) != l.Bus):
			t.Errorf("%q: bus %q", line, l.Bus)
		case ok && l.XID <= 0 && l.UUID == "":
			t.Errorf("%q: says nothing: %+v", line, l)
		}
	})
}

// follow runs FollowKernelLog and gives what it hears.
func follow(t *testing.T, path string) <-chan gpu.KernelLine {
	t.Helper()
	heard := make(chan gpu.KernelLine, 100)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- gpu.FollowKernelLog(ctx, path, func(l gpu.KernelLine) { heard <- l }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return heard
}

func TestALogIsFollowedLineByLine(t *testing.T) {
	dir := t.TempDir()
	pipe, file := filepath.Join(dir, "pipe"), filepath.Join(dir, "file")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{pipe, file} {
		heard := follow(t, path)
		for range 2 { // a writer that goes is followed by another one
			w, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				t.Fatal(err)
			}
			for _, part := range []string{"6,1,1,-;noise\nNVRM: Xid (PCI:0000:3b", ":00): 79, gone\n", strings.Repeat("x", 100_000), "\nNVRM: Xid (PCI:0000:3b:00): 48, bad\n"} {
				if _, err := w.WriteString(part); err != nil {
					t.Fatal(err)
				}
			}
			w.Close()
			for _, want := range []int{79, 48} {
				if l := <-heard; l.XID != want {
					t.Errorf("heard %+v, want XID %d", l, want)
				}
			}
		}
	}
}

func TestALogThatCannotBeReadIsAnErrorAtOnce(t *testing.T) {
	if err := gpu.FollowKernelLog(t.Context(), filepath.Join(t.TempDir(), "none"), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("err = %v", err)
	}
}

func BenchmarkParseKernelLine(b *testing.B) {
	for name, line := range map[string]string{
		"hit":  "4,1163,93847238,-;NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=python, GPU has fallen off the bus.",
		"miss": "6,1163,93847238,-;systemd[1]: Started Session 4 of user root, and some more words to look through.",
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				gpu.ParseKernelLine(line)
			}
		})
	}
}
