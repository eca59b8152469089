package gpu_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"lorayard/internal/gpu"
)

func TestADeviceHasOneAgentOnAHost(t *testing.T) {
	dir, none := t.TempDir(), filepath.Join(t.TempDir(), "not", "there")
	dirs := []string{none, dir}
	a, b := gpu.Device{UUID: "GPU-a"}, gpu.Device{UUID: "GPU-b"}
	first, err := gpu.LockDevices(dirs, []gpu.Device{a, b})
	if err != nil {
		t.Fatal(err)
	}
	_, err = gpu.LockDevices(dirs, []gpu.Device{{UUID: "GPU-c"}, b})
	if err == nil || !strings.Contains(err.Error(), "GPU-b is used by another agent on this host (process ") {
		t.Fatalf("err = %v", err)
	}
	// What the second one had got it has given up; a pretended or broken device
	// is nobody's.
	other, err := gpu.LockDevices(dirs, []gpu.Device{{UUID: "GPU-c"}, {UUID: "GPU-a", Pretend: true}, {UUID: "GPU-b", Fault: "gives no name"}})
	if err != nil {
		t.Fatal(err)
	}
	other.Close()
	first.Close()
	again, err := gpu.LockDevices(dirs, []gpu.Device{a, b})
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	if _, err := gpu.LockDevices([]string{none}, []gpu.Device{a}); err == nil {
		t.Error("locked without a file")
	}
	// A link that somebody laid in a directory of everybody's is not followed.
	target := filepath.Join(t.TempDir(), "precious")
	if err := os.Symlink(target, filepath.Join(dir, "lorayard-GPU-x.lock")); err != nil {
		t.Fatal(err)
	}
	if _, err := gpu.LockDevices([]string{dir}, []gpu.Device{{UUID: "GPU-x"}}); err == nil {
		t.Error("followed a link")
	}
}

// sysfs is a host of two sockets, as far as FindPlaces looks.
func sysfs(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for path, text := range map[string]string{
		"bus/pci/devices/0000:3b:00.0/numa_node":     "0\n",
		"bus/pci/devices/0000:5d:00.0/numa_node":     "0\n",
		"bus/pci/devices/0000:86:00.0/numa_node":     "1\n",
		"bus/pci/devices/0000:86:00.0/local_cpulist": "8-15\n",
		"bus/pci/devices/0000:af:00.0/numa_node":     "-1\n",
		"devices/system/node/node0/cpulist":          "0-7,16-23\n",
	} {
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestProcessorsAndMemoryNextToADevice(t *testing.T) {
	devices := []gpu.Device{
		{UUID: "a", Bus: "0000:3b:00", Node: -1},
		{UUID: "b", Bus: "0000:5d:00", Node: -1},
		{UUID: "c", Bus: "0000:86:00", Node: -1},
		{UUID: "d", Bus: "0000:af:00", Node: -1},
		{UUID: "e", Bus: "0000:ff:00", Node: -1},
		{UUID: "p", Pretend: true, Node: -1},
	}
	p := gpu.FindPlaces(sysfs(t), devices)
	for i, want := range []int{0, 0, 1, -1, -1, -1} {
		if devices[i].Node != want {
			t.Errorf("device %s is on node %d, want %d", devices[i].UUID, devices[i].Node, want)
		}
	}
	for uuids, want := range map[string]gpu.Place{
		"a":   {CPUs: "0-7,16-23", Memory: "0", Threads: 8}, // of 16, which two devices share
		"ab":  {CPUs: "0-7,16-23", Memory: "0", Threads: 8},
		"c":   {CPUs: "8-15", Memory: "1", Threads: 8},
		"cb":  {CPUs: "0-7,16-23,8-15", Memory: "0,1", Threads: 8},
		"d":   {}, // a host of one socket does not say
		"ad":  {},
		"p":   {},
		"":    {},
		"zzz": {},
	} {
		if got := p.Near(strings.Split(uuids, "")); got != want {
			t.Errorf("near %q: %+v, want %+v", uuids, got, want)
		}
	}
}
