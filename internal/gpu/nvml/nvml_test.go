package nvml_test

import (
	"errors"
	"testing"

	"lorayard/internal/gpu/nvml"
)

// A host without a driver must get an error, not the end of the process. On a
// host with one, every device has a UUID and a class.
func TestOpenOnThisHost(t *testing.T) {
	d, err := nvml.Open()
	if err != nil {
		if !errors.Is(err, nvml.ErrUnavailable) {
			t.Fatal(err)
		}
		return
	}
	defer d.Close()
	devices, err := d.Devices(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, dev := range devices {
		if dev.Fault == "" && (dev.UUID == "" || dev.Class == "" || dev.MemoryBytes == 0) {
			t.Errorf("%+v", dev)
		}
	}
}
