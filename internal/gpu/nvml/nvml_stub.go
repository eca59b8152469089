//go:build !linux || !cgo

package nvml

import (
	"context"

	"lorayard/internal/gpu"
)

// Driver cannot be had in this build.
type Driver struct{}

// Open gives ErrUnavailable.
func Open(Options) (*Driver, error) { return nil, ErrUnavailable }

// Close does nothing.
func (*Driver) Close() {}

// Devices gives ErrUnavailable.
func (*Driver) Devices(context.Context) ([]gpu.Device, error) { return nil, ErrUnavailable }

// Links gives ErrUnavailable.
func (*Driver) Links(context.Context) ([][]int, error) { return nil, ErrUnavailable }

// Versions are not known.
func (*Driver) Versions() (driver, cuda string) { return "", "" }

// Read gives ErrUnavailable.
func (*Driver) Read(context.Context, gpu.Tier, []gpu.Reading) error { return ErrUnavailable }

// Generation is 0.
func (*Driver) Generation() int { return 0 }

// Events gives ErrUnavailable.
func (*Driver) Events(context.Context, func(gpu.Fault)) error { return ErrUnavailable }

// Missing is empty.
func (*Driver) Missing() []string { return nil }

// Details gives ErrUnavailable.
func (*Driver) Details(context.Context, []string) ([]gpu.Detail, error) { return nil, ErrUnavailable }

// Measure gives ErrUnavailable.
func (*Driver) Measure(context.Context, int) ([]Timing, error) { return nil, ErrUnavailable }
