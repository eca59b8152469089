// Fakegpu makes a stand-in for the library of NVIDIA's driver and breaks its
// devices, to see what an agent does:
//
//	go run ./internal/cmd/fakegpu make /tmp/gpus 8
//	LD_LIBRARY_PATH=/tmp/gpus FAKE_NVML_STATE=/tmp/gpus/state bin/agent gpus --watch
//	go run ./internal/cmd/fakegpu xid /tmp/gpus 3 79
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"lorayard/internal/gpu/fakenvml"
)

const usage = `usage: fakegpu VERB DIR ...
  make DIR [N]               build the library into DIR, for N GPUs (8), 16 at most
  xid DIR GPU CODE           let the driver tell of an error
  lose DIR GPU               a GPU falls off the bus
  refuse DIR GPU             the driver speaks to it no more until it is reset
  reset DIR GPU              a GPU that was lost or refused is well
  recovery DIR GPU ACTION    what the driver wants done: 0 nothing, 1 reset, 2 reboot
  remap DIR GPU              a broken row of memory waits for a reset
  use DIR GPU GIB            memory in use
  busy DIR GPU PERCENT WATTS CELSIUS
  mig DIR GPU N              split it
  hang DIR SECONDS           every call takes so long from now on; 0: as always
  unload DIR, load DIR       the driver goes, and comes back anew`

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "fakegpu:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return errors.New(usage)
	}
	verb, dir := args[0], args[1]
	var numbers []int
	for _, a := range args[2:] {
		n, err := strconv.Atoi(a)
		if err != nil || n < 0 {
			return fmt.Errorf("%q is not a number", a)
		}
		numbers = append(numbers, n)
	}
	state := filepath.Join(dir, "state")
	if verb == "make" {
		return create(dir, state, numbers)
	}
	h, err := fakenvml.Attach(state)
	if err != nil {
		return err
	}
	defer h.Close()
	want := map[string]int{"xid": 2, "lose": 1, "refuse": 1, "reset": 1, "recovery": 2, "remap": 1, "use": 2, "busy": 4, "mig": 2, "hang": 1, "unload": 0, "load": 0}
	if n, known := want[verb]; !known || n != len(numbers) {
		return errors.New(usage)
	}
	switch verb {
	case "hang":
		h.Hang(time.Duration(numbers[0]) * time.Second)
		return nil
	case "unload":
		h.Unload()
		return nil
	case "load":
		h.Load()
		return nil
	}
	i := numbers[0]
	if i >= h.Devices() {
		return fmt.Errorf("there is no GPU %d: the host has %d", i, h.Devices())
	}
	switch verb {
	case "xid":
		h.XID(i, numbers[1])
	case "lose":
		h.Lose(i, true)
	case "refuse":
		h.RequireReset(i, true)
	case "reset":
		h.Lose(i, false)
		h.RequireReset(i, false)
		h.Recover(i, 0)
		h.RemapPending(i, false)
	case "recovery":
		h.Recover(i, numbers[1])
	case "remap":
		h.RemapPending(i, true)
	case "use":
		h.Use(i, uint64(numbers[1])<<30)
	case "busy":
		h.Busy(i, uint32(numbers[1]), float64(numbers[2]), float64(numbers[3]))
	case "mig":
		h.Split(i, numbers[1])
	}
	return nil
}

func create(dir, state string, numbers []int) error {
	n := 8
	if len(numbers) > 0 {
		n = numbers[0]
	}
	if n > 16 {
		return fmt.Errorf("%d GPUs are more than 16", n)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make %s: %w", dir, err)
	}
	if _, err := fakenvml.Build(dir); err != nil {
		return err
	}
	h, err := fakenvml.New(state, n)
	if err != nil {
		return err
	}
	return h.Close()
}
